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
# # One chip, and a slice of them
#
# A Colab runtime with a TPU has one chip: v5e-1 or v6e-1. JAX shows it as one device. A slice such as v5e-4 or v5e-8 shows
# four or eight. This notebook runs on any number of devices, without a change. It shows what a single chip gains by
# training several clients at once, what a slice would gain, and that the result is the same to the last bit.
#
# On a runtime without a TPU or GPU the devices are host devices of the CPU. The program is the same there, but host devices
# share the cores of one machine: they show that it works, not that it is fast.

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
import hashlib
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import fedjax_clip as fc

# %matplotlib inline

SHORT = "FEDJAX_CLIP_SHORT" in os.environ  # for tests: the same cells with less work

cpu_devices = int(os.environ.get("CPU_DEVICES", "8"))
jax.config.update("jax_num_cpu_devices", cpu_devices)  # before the first computation; an accelerator keeps its number
devices = jax.devices()
counts = sorted({1, len(devices)})  # of devices to compare; one chip is alone
print(f"{len(devices)} device(s): {devices[0].device_kind}")

# %% [markdown]
# ## A problem with many clients
#
# Two thousand clients, each with some tens of points of ten Gaussian classes, and not all classes: Dirichlet(0.3). The
# sizes differ too, so that there is something to balance: the planner deals clients to devices so that all devices have
# the same number of local steps, as nearly as it can.

# %%
rng = np.random.default_rng(0)
num_clients, features = (100 if SHORT else 2000), 64
labels = rng.integers(10, size=40 * num_clients)
centres = rng.normal(size=(10, features))
points = (centres[labels] + 1.5 * rng.normal(size=(len(labels), features))).astype(np.float32)
examples = {"x": points, "y": labels.astype(np.int32)}
data, held_out_clients = fc.data.partition.dirichlet(examples, num_clients, alpha=0.3, seed=0).split_clients(0.1)
print(data)
print("examples a client, smallest to largest:", data.sizes.min(), "to", data.sizes.max())


# %%
def init(key):
    k1, k2 = jax.random.split(key)
    w1, w2 = jax.random.normal(k1, (features, 256)) / 8, jax.random.normal(k2, (256, 10)) / 16
    return {"w1": w1, "b1": jnp.zeros(256), "w2": w2, "b2": jnp.zeros(10)}


def per_example_loss(params, batch, key):
    hidden = jax.nn.relu(batch["x"] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}


client_tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1))
algorithm = fc.fedavg(per_example_loss, client_tx, reducer=fc.reduce.exact_mean())
evaluate = fc.evaluator(per_example_loss, {"clients": held_out_clients})

# %% [markdown]
# ## What one chip gains
#
# A local step of a small model leaves most of a chip idle. `clients_per_chunk` trains several clients at once on a device,
# each on its own batches. The work is the same and only the order of the arithmetic differs, so results agree up to
# rounding. On a TPU `fc.train` chooses the number by a rule; here you see what it is worth.


# %%
def run(count, width, rounds=3 if SHORT else 60):
    """The result on the first devices, and rounds per second in the second half of the run."""
    settings = {"rounds": rounds, "cohort_size": 16 if SHORT else 256, "batch_size": 20, "eval_every": rounds}
    settings |= {"devices": devices[:count], "clients_per_chunk": width, "rounds_per_dispatch": 1}
    result = fc.train(algorithm, data, init(jax.random.key(0)), evaluate=evaluate, **settings)
    seconds = [row["seconds"] for row in result.history]
    return result, 1 / np.median(seconds[len(seconds) // 2 :])


widths = (1, 4) if SHORT else (1, 2, 4, 8, 16, 32)
speeds = {}
for width in widths:
    result, speeds[width] = run(1, width)
    print(f"{width:>2} clients at once: {speeds[width]:6.1f} rounds a second, loss {result.history[-1]['loss']:.5f}")
best = max(speeds, key=speeds.get)

# %% [markdown]
# ## What a slice gains
#
# `devices` is the only word that differs, and without it `fc.train` takes all that there are. A round is one program: every
# device trains its share of the cohort, one `psum` adds up the clipped updates, and each device takes the server's step
# itself. A device waits for the one with the most work, so the second picture shows the fraction of steps that wait.

# %%
results = {count: run(count, best) for count in counts}
for count, (result, speed) in results.items():
    waits = np.mean([row["wasted_steps"] for row in result.history])
    print(f"{count} device(s): {speed:6.1f} rounds a second, {waits:.1%} of the steps wait")

figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
axes[0].plot(list(speeds), list(speeds.values()), "o-", color="#1f77b4")
axes[0].set(title="one device", xlabel="clients at once", ylabel="rounds a second", xscale="log")
axes[0].set_xticks(widths, [str(width) for width in widths])
axes[1].bar([str(count) for count in results], [speed for _, speed in results.values()], color="#d95f02")
axes[1].set(title=f"{best} clients at once", xlabel="devices", ylabel="rounds a second")
for axis in axes:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# On a runtime with one chip the second picture has one bar. What a slice would add to it depends on the part of a round that
# does not shrink with the number of devices: starting the program, adding up the updates, planning on the host. The larger
# the cohort and the model, the closer eight chips come to eight times the speed. This notebook has run on 1, 4 and 8 host
# devices of a CPU only; on a TPU, the figures are for you to see.
#
# ## The same bits
#
# The same clients were drawn, and each trained on the same batches in the same order with the same random numbers. All of it
# is a function of (seed, round, client). With `fc.reduce.exact_mean()` the sum over clients does not depend on their order
# either, so the parameters are the same to the last bit on any number of devices.


# %%
def sha(result):
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(result.params))).hexdigest()


for count, (result, _) in results.items():
    accuracy = result.history[-1]["eval/clients/accuracy"]
    print(f"{count} device(s): accuracy on held-out clients {accuracy:.4f}, parameters {sha(result)[:16]}")
assert len({sha(result) for result, _ in results.values()}) == 1

# %% [markdown]
# ## The program itself
#
# That nothing changes has one reason: `algorithm.round` knows of one cohort and of an axis name, and neither of devices
# nor of their number. The same function under another name for parallelism gives the same numbers:

# %%
sampler, work = fc.data.sampling.uniform(16), fc.extend.LocalWork(batch_size=20)
ids = sampler.sample(data.sizes, seed=0, round=0)
alone = jax.tree.map(lambda x: x[0], fc.extend.plan(data, ids, work, seed=0, round=0))
_, _, jitted = jax.jit(algorithm.round)(algorithm.init(init(jax.random.key(0))), alone, jax.random.key(0))

cohorts = fc.extend.plan_rounds(data, [ids], work, seed=0, first_round=0, num_devices=len(devices))
server = fc.extend.placement.replicate(algorithm.init(init(jax.random.key(0))), devices)
_, _, mapped = fc.extend.placement.pmap_rounds(algorithm, devices)(
    server, fc.extend.placement.split(cohorts, devices), jax.random.key(0), 1
)
for name in ("loss", "update_norm", "clipped_steps"):
    print(f"{name:<14} jit {float(jitted[name]):.6f}   pmap {float(np.ravel(mapped[name])[0]):.6f}")
