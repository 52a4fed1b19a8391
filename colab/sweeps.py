# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sweeps in one program, and thresholds tuned by their gradient
#
# A clipping threshold is worth nothing without the learning rate that it stands beside, so the two have to be chosen
# together. This notebook does it in three ways: a grid with cross-validation, a random search that gives up early on what
# does not go well, and `jax.grad` of the validation loss through whole rounds. All of a grid's trainings are **one**
# compiled program, because every float hyper-parameter of the library may be a traced array.
#
# No line after the installation names a kind of device.

# %%
import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

REPOSITORY = ""  # the address of the git repository, if neither the package nor a clone nor a wheel is here


def there(module):
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a folder of the same name has no origin


def jax_here():
    """What pip needs for the accelerator of this machine; nothing if JAX has it already, as on Colab."""
    versions = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True).stdout if shutil.which("nvidia-smi") else ""
    if driver[:3].isdigit():
        plugins, extra = ["jax-cuda12-plugin", "jax-cuda13-plugin"], "cuda13" if int(driver[:3]) >= 580 else "cuda12"
    elif glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"):
        plugins, extra = ["libtpu"], "tpu"
    else:
        return []
    recent = [int(part) for part in versions.get("jax", "0.0").split(".")[:2]] >= [0, 10]
    return [] if recent and set(plugins) & set(versions) else [f"jax[{extra}]>=0.10"]


wheels = sorted(glob.glob("fedjax_clip-*.whl"))
clones = [d for d in ["..", ".", *glob.glob("*/")] if os.path.isfile(os.path.join(d, "fedjax_clip/__init__.py"))]
if not there("fedjax_clip") or not there("optax"):
    if REPOSITORY and not wheels + clones:
        subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, "clone"], check=True)
        clones = ["clone"]
    if not wheels + clones:
        raise RuntimeError("Upload a wheel of fedjax_clip, or write the repository's address into REPOSITORY.")
    address = pathlib.Path((wheels or clones)[-1]).resolve().as_uri()
    wanted = [f"fedjax_clip[experiments] @ {address}", *jax_here()]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
    importlib.invalidate_caches()
sys.path += [os.path.abspath(clone) for clone in clones]  # the benchmarks are in the repository, not in the package

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import display

import fedjax_clip as fc

# %matplotlib inline
SHORT = os.environ.get("FEDJAX_CLIP_SHORT") == "1"  # the project's tests run this notebook with less work
ROUNDS = 3 if SHORT else 40

jax.devices()

# %% [markdown]
# ## The problem
#
# Handwritten digits; the 14 forms on which they were written are the clients. Three forms are held out for the end.

# %%
data, test_clients = fc.data.sources.digits().split_clients(0.2, seed=0)


def init(seed):
    k1, k2 = jax.random.split(jax.random.key(seed))
    w1, w2 = jax.random.normal(k1, (64, 32)) / 8, jax.random.normal(k2, (32, 10)) / 6
    return {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(10)}


def per_example_loss(params, batch, key):
    x = batch["x"].reshape(-1, 64)
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}


# %% [markdown]
# `build` makes the algorithm from a point's hyper-parameters. It is traced once, so the numbers are not known in it.


# %%
def build(hyper):
    client_tx = optax.chain(fc.clipping.clip_by_global_norm(hyper["clip"]), optax.sgd(hyper["lr"]))
    return fc.fedavg(per_example_loss, client_tx)


# %% [markdown]
# ## A grid, cross-validated over clients
#
# Will it serve clients that have not taken part? Hold out a quarter of the forms, train on the others, and do that four
# times, so that every form is held out once. Each cell of the map is the mean of four trainings.

# %%
grid = fc.sweeping.grid(
    lr=[0.1, 3.0] if SHORT else [0.03, 0.1, 0.3, 1.0, 3.0, 10.0],
    clip=[0.1, np.inf] if SHORT else [0.03, 0.1, 0.3, 1.0, 3.0, np.inf],
)
folds = fc.data.folds.clients(data, 4)
settings = {"rounds": ROUNDS, "cohort_size": 8}
trials = fc.sweep(build, grid, data, init, per_example_loss, {"new clients": test_clients}, folds=folds, **settings)

accuracy = fc.sweeping.values(trials, "eval/fold/accuracy")
display(fc.plots.sweep(grid, accuracy, "eval/fold/accuracy", f"after {ROUNDS} rounds, mean of 4 folds over clients"))

# %% [markdown]
# A row of the map says what a threshold does to the choice of the learning rate: the smaller the threshold, the further
# the good cells reach to the right. Where every step is clipped, only the product lr × clip counts, and the good cells lie
# on a diagonal.
#
# The forms that were put aside at the start have not been looked at in the choice:

# %%
best = fc.sweeping.rank(trials, "eval/fold/accuracy")[0]
new = fc.sweeping.values(trials, "eval/new clients/accuracy")
print({name: float(values[best]) for name, values in grid.items()})
print(f"accuracy on the folds {np.mean(accuracy[best]):.3f}, on new clients {np.mean(new[best]):.3f}")
display(fc.plots.sweep(grid, new, "eval/new clients/accuracy", "the same trainings on forms that were put aside"))

# %% [markdown]
# ## A random search that gives up early
#
# Points drawn at random try a new value of each hyper-parameter every time. Successive halving trains all of them for a
# few rounds, the better half for twice as many, and so on.

# %%
Range = fc.sweeping.Range
drawn = fc.sweeping.random(4 if SHORT else 32, lr=Range(0.03, 10.0, log=True), clip=Range(0.03, 3.0, log=True))
searched = fc.sweep(
    build, drawn, data, init, per_example_loss, folds=folds, halving=2, score="eval/fold/loss", **settings
)
stops, kept = fc.sweeping.rungs(ROUNDS, len(drawn["lr"]), 2)
print(
    "points that trained up to round " + ", ".join(f"{stop}: {count}" for stop, count in zip(stops, kept, strict=True))
)
winner = fc.sweeping.rank(searched, "eval/fold/loss")[0]
print({name: round(float(values[winner]), 3) for name, values in drawn.items()})
display(fc.plots.sweep(drawn, fc.sweeping.values(searched, "eval/fold/loss"), "eval/fold/loss", "32 points, halved"))

# %% [markdown]
# ## The gradient of the validation loss
#
# A round is a pure function, so several rounds are one, and its derivative by the threshold is one `jax.grad` away.
# `cohort.differentiable()` gives the loops over clients and steps a fixed length, which reverse mode needs. Take a few
# rounds on the first fold, and the loss on its held-out clients.

# %%
HORIZON = 2 if SHORT else 8
train, held_out = folds[0].split(data)
sampler = fc.data.sampling.uniform(4)
ids = [sampler.sample(train.sizes, 0, r) for r in range(HORIZON)]
planned = fc.extend.plan_rounds(train, ids, fc.extend.LocalWork(batch_size=20), seed=0, first_round=0)
cohorts = jax.tree.map(lambda x: x[0], planned).differentiable()  # [rounds, ...] of one device


def validation_loss(log_hyper, cohorts, examples):
    algorithm = build(jax.tree.map(jnp.exp, log_hyper))

    def round(server, cohort):
        return algorithm.round(server, cohort, jax.random.key(0))[0], None

    server, _ = jax.lax.scan(round, algorithm.init(init(0)), cohorts)
    return jnp.mean(per_example_loss(server.params, examples, None)[0])


compiled = jax.jit(jax.value_and_grad(validation_loss))


def hypergradient(log_hyper):
    return compiled(log_hyper, cohorts, held_out.examples)


# %% [markdown]
# Is it right? Central differences say so, as far as `float32` goes:

# %%
start = {"clip": jnp.float32(np.log(0.3)), "lr": jnp.float32(np.log(0.1))}
value, gradient = hypergradient(start)
for name in start:
    h = 0.02
    up, down = ({**start, name: start[name] + s} for s in (h, -h))
    difference = (hypergradient(up)[0] - hypergradient(down)[0]) / (2 * h)
    print(f"d loss / d log {name:<4}  by jax.grad {gradient[name]:+.5f}   by central differences {difference:+.5f}")
    assert abs(gradient[name] - difference) < 1e-2 * abs(difference)

# %% [markdown]
# So let Adam tune both from a poor start, on a logarithmic scale:

# %%
STEPS = 2 if SHORT else 30
tx = optax.adam(0.2)
hyper, state = start, tx.init(start)
path, losses = [], []
for _ in range(STEPS):
    value, gradient = hypergradient(hyper)
    path.append([float(jnp.exp(hyper["lr"])), float(jnp.exp(hyper["clip"]))])
    losses.append(float(value))
    updates, state = tx.update(gradient, state)
    hyper = optax.apply_updates(hyper, updates)
print(f"loss {losses[0]:.3f} at lr={path[0][0]:.3g}, clip={path[0][1]:.3g}")
print(f"loss {losses[-1]:.3f} at lr={path[-1][0]:.3g}, clip={path[-1][1]:.3g}, after {STEPS} steps")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
axes[0].plot(losses, color="#1f77b4", marker="o", ms=3)
axes[0].set(xlabel="step of Adam", ylabel=f"loss on held-out clients after {HORIZON} rounds")
axes[1].plot(*zip(*path, strict=True), color="#d95f02", marker="o", ms=3)
axes[1].set(xscale="log", yscale="log", xlabel="learning rate", ylabel="clipping threshold")
for axis in axes:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The gradient sees only as far as its rounds: what is best after a few rounds is bolder than what is best after many.
# Where every step is clipped the loss depends on lr × clip alone, and where none is, not on the threshold at all: its
# derivative is then zero, and a search that starts there stays. That is what the grid is for.
#
# ## Where to go next
#
# - `python -m experiments.sweep --help`: the same from the command line; a stopped sweep resumes with the same command, and
#   it writes the best point as a flagfile for `experiments.run`.
# - `docs/sweeps.md`: a measured example.
