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
# # Federated learning with gradient clipping: a quickstart
#
# In federated learning the data stay with the clients that own them. In each round a server sends its parameters to
# some of the clients, each client trains on its own data for a while and sends back how its copy changed, and the server
# adds the mean of these changes to its parameters. This is federated averaging (FedAvg).
#
# This notebook trains a small network that way on handwritten digits, and looks at what clipping the clients' gradients
# changes. No line after the installation names a kind of device.

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
ROUNDS = 4 if SHORT else 60

jax.devices()

# %% [markdown]
# ## The data
#
# 1797 digits of 8 × 8 pixels, written on 14 forms. Each form is a client: the sizes and the mix of digits are much alike,
# the handwriting differs.

# %%
digits = fc.data.sources.digits()
fc.data.partition.plot(digits)

# %% [markdown]
# There are two questions to ask of the result: does it serve the clients that took part, and does it serve new ones? So
# hold out three forms whole, and a fifth of the examples of each other form.

# %%
train, held_out_clients = digits.split_clients(0.2, seed=0)
train, held_out_examples = train.split_examples(0.2, seed=0)
print("train on          ", train)
print("held-out examples ", held_out_examples)
print("held-out clients  ", held_out_clients)

# %% [markdown]
# ## A model
#
# A model is one pure function that gives one loss **for each example** of a batch, and any metrics beside it. The library
# does the averaging, so batches that are not full come out right. Parameters are any pytree. No framework is needed
# (Flax and others work as well); `key` is there for dropout and the like.


# %%
def init(key):
    k1, k2 = jax.random.split(key)
    w1, w2 = jax.random.normal(k1, (64, 64)) / 8, jax.random.normal(k2, (64, 10)) / 8
    return {"w1": w1, "b1": jnp.zeros(64), "w2": w2, "b2": jnp.zeros(10)}


def per_example_loss(params, batch, key):
    x = batch["x"].reshape(-1, 64)
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}


# %% [markdown]
# ## Training
#
# What a client does in a step is an optax chain: here it scales a gradient that is longer than 1 down to length 1, and
# takes an SGD step. In each round 8 of the 11 clients go once over their examples, 20 at a time.

# %%
client_tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.3))
algorithm = fc.fedavg(per_example_loss, client_tx)
evaluate = fc.evaluator(per_example_loss, {"examples": held_out_examples, "clients": held_out_clients})

settings = {"rounds": ROUNDS, "cohort_size": 8, "batch_size": 20, "evaluate": evaluate, "eval_every": 2}
result = fc.train(algorithm, train, init(jax.random.key(0)), **settings)
result.history[-1]

# %% [markdown]
# `history` holds such a row for each round. `clipped_steps` is the fraction of the local steps that the clip changed. The
# accuracy on held-out clients is that on unseen handwriting.

# %%
clipped, last = [row["clipped_steps"] for row in result.history], result.history[-1]
print(
    f"steps clipped: at most {max(clipped):.0%}, in round {np.argmax(clipped) + 1}; {clipped[-1]:.0%} in the last round"
)
for name in ("examples", "clients"):
    print(f"accuracy on held-out {name}: {last[f'eval/{name}/accuracy']:.3f}")

# %%
fc.plots.curves(result.history, "FedAvg on digits by form, steps clipped at norm 1, learning rate 0.3")

# %% [markdown]
# ## Which threshold?
#
# The same training at six thresholds (`inf` never clips), at the learning rate above and at ten times as much, with
# three seeds each. This is the one cell that takes a while: each of the twelve algorithms is compiled once.


# %%
def clipped_fedavg(threshold, learning_rate):
    client_tx = optax.chain(fc.clipping.clip_by_global_norm(threshold), optax.sgd(learning_rate))
    return fc.fedavg(per_example_loss, client_tx)


def run(algorithm, seed=0, data=train):
    return fc.train(algorithm, data, init(jax.random.key(seed)), seed=seed, **settings).history


thresholds = [0.1, np.inf] if SHORT else [0.03, 0.1, 0.3, 1.0, 3.0, np.inf]
learning_rates = [0.3, 3.0]
seeds = [0] if SHORT else [0, 1, 2]

histories = {}
for lr in learning_rates:
    for c in thresholds:
        algorithm = clipped_fedavg(c, lr)
        histories[lr, c] = [run(algorithm, seed) for seed in seeds]

# %%
names = [f"{c:g}" if np.isfinite(c) else "no clip" for c in thresholds]
position = [c if np.isfinite(c) else 10.0 for c in thresholds]  # no clip: to the right of them all
panels = {
    f"accuracy on held-out examples, round {ROUNDS}": lambda history: history[-1]["eval/examples/accuracy"],
    "fraction of local steps clipped, all rounds": lambda history: np.mean([row["clipped_steps"] for row in history]),
}

figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for axis, (title, measure) in zip(axes, panels.items(), strict=True):
    for lr, colour, marker in zip(learning_rates, ["#1f77b4", "#d95f02"], "os", strict=True):
        values = np.array([[measure(history) for history in histories[lr, c]] for c in thresholds])
        axis.plot(position, values.mean(1), color=colour, marker=marker, ms=5, label=f"learning rate {lr:g}")
        axis.plot(position, values, ".", color=colour, alpha=0.6, ms=4)
    axis.set(title=title, xscale="log", xlabel="clipping threshold (norm of a step's gradient)", ylim=(-0.03, 1.03))
    axis.set_xticks(position, names)
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.4))
plt.show()

# %% [markdown]
# Lines are means over the seeds, small dots the seeds. The means as numbers:

# %%
print("threshold         " + "".join(f"{name:>9}" for name in names))
for lr in learning_rates:
    means = [np.mean([history[-1]["eval/examples/accuracy"] for history in histories[lr, c]]) for c in thresholds]
    print(f"learning rate {lr:<4g}" + "".join(f"{mean:9.3f}" for mean in means))

# %% [markdown]
# **At learning rate 0.3 clipping gains nothing.** Large thresholds end where no clip does. Small ones shorten every step,
# and are only slower.
#
# **At learning rate 3 it decides.** Without a clip the first long steps silence every unit of the hidden layer for good (a
# ReLU that is 0 on all inputs has no gradient), and the network ends at chance. Nothing becomes NaN. A clip that hardly
# ever acts is as good as none; the right panel says how many steps a clip must shorten to help.
#
# **Where all steps are clipped, only the product counts.** Learning rate 3 at threshold 0.03 does what 0.3 at 0.3 does:
# a step then has the length learning rate × threshold, whatever the gradient.
#
# So a clip makes the choice of the learning rate matter less. The curves show when it happens:

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
colours = [*plt.colormaps["plasma"](np.linspace(0, 0.9, len(thresholds) - 1)), "black"]
for axis, lr in zip(axes, learning_rates, strict=True):
    for c, colour, name in zip(thresholds, colours, names, strict=True):
        points = [(row["round"], row["eval/examples/accuracy"]) for row in histories[lr, c][0] if row["round"] % 2 == 0]
        axis.plot(*zip(*points, strict=True), color=colour, ls="-" if np.isfinite(c) else ":", lw=1.8, label=name)
    axis.set(title=f"learning rate {lr:g}, first seed", xlabel="round", ylim=(0, 1.02))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("accuracy on held-out examples")
axes[1].legend(title="threshold", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## Clients that differ more
#
# The forms hold every digit equally often. Clients seldom do. Deal the same training examples out again, each digit in
# proportions drawn from a Dirichlet distribution: the smaller its parameter, the fewer clients share a digit.

# %%
skewed = fc.data.partition.dirichlet(train.examples, num_clients=train.num_clients, alpha=0.1, seed=0)
display(fc.data.partition.plot(skewed))
history = run(clipped_fedavg(1.0, 0.3), data=skewed)
fc.plots.curves(history, "Dirichlet(0.1) clients, steps clipped at norm 1, learning rate 0.3")

# %% [markdown]
# It learns more slowly and less smoothly, because each client pulls towards its own digits. The training accuracy is the
# higher from the start: a client that holds few digits has an easier task than the held-out data set.

# %%
early = min(10, ROUNDS)
for name, rows in (("forms", result.history), ("Dirichlet(0.1)", history)):
    curve = {row["round"]: row["eval/examples/accuracy"] for row in rows if "eval/examples/accuracy" in row}
    print(f"{name:<15} {curve[early]:.3f} after {early} rounds, {curve[ROUNDS]:.3f} after {ROUNDS}")

# %% [markdown]
# ## Where to go next
#
# - `python -m experiments.run --help`: such runs from the command line, with checkpoints and more tasks; ready settings
#   are in `experiments/presets/`.
# - `fc.uplink.clip_by_global_norm` clips a client's whole update instead of its steps; `server_tx=optax.adam(0.01)` in
#   `fc.fedavg` gives the server another optimiser.
# - `docs/design.md`: how a round is built, and how to write another algorithm.
