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
# # Eight cores
#
# A TPU of a Colab runtime has eight cores, and JAX shows each as a device. This notebook trains on one of them and on all,
# and shows what changes in the code (nothing), in the result (rounding) and in speed (measured here, where you run it).
#
# On a runtime without a TPU or GPU the eight devices are eight host devices of the CPU. Everything below is the same
# then, except that eight host devices share the cores of one machine: they show that it works, not that it is fast.

# %%
import glob
import importlib.util
import shutil

tpu = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
if importlib.util.find_spec("fedjax_clip") is None:
    # Where a clone of the repository lies, seen from here: a notebook in its colab/ folder sees it as "..".
    clone = ".."
    accelerator = ",cuda" if shutil.which("nvidia-smi") else ",tpu" if tpu else ""
    # %pip install -q "{clone}[experiments{accelerator}]"

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import fedjax_clip as fc

# %matplotlib inline

SHORT = "FEDJAX_CLIP_SHORT" in os.environ  # for tests: the same cells with less work

jax.config.update("jax_num_cpu_devices", 8)  # before the first computation; accelerators have the number they have
devices = jax.devices()
print(f"{len(devices)} devices: {devices[0].device_kind}")

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
algorithm = fc.fedavg(per_example_loss, client_tx)
evaluate = fc.evaluator(per_example_loss, {"clients": held_out_clients})

# %% [markdown]
# ## One device, then all
#
# `devices` is the only word that differs, and without it `fc.train` takes all that there are. A round is one program:
# under `jax.pmap` every device trains its share of the cohort, one `psum` adds up the clipped updates, and each device
# takes the server's step itself.


# %%
def run(devices):
    started = time.perf_counter()
    rounds, cohort_size = (3, 16) if SHORT else (100, 256)
    settings = {"rounds": rounds, "cohort_size": cohort_size, "batch_size": 20, "eval_every": rounds}
    result = fc.train(algorithm, data, init(jax.random.key(0)), evaluate=evaluate, devices=devices, **settings)
    print(f"{len(devices)} devices: {time.perf_counter() - started:.1f} s, compilation included")
    return result


results = {len(some): run(some) for some in (devices[:1], devices)}

# %% [markdown]
# ## What changed in the result
#
# The same clients were drawn, each trained on the same batches in the same order, with the same random numbers: all of
# it is a function of (seed, round, client). What is left is the order in which floats are added up.

# %%
one, many = results[1], results[len(devices)]
difference = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params)))
largest = max(np.abs(a).max() for a in jax.tree.leaves(one.params))
print(f"largest difference of a parameter {difference:.1e}, where the largest parameter is {largest:.2f}")
for count, result in results.items():
    row = result.history[-1]
    print(f"{count} devices: accuracy on held-out clients {row['eval/clients/accuracy']:.4f}, loss {row['loss']:.5f}")
assert difference < 1e-3

# %% [markdown]
# ## What changed in speed
#
# Rounds per second, after the first rounds (which compile), and the fraction of the devices' steps that trained nobody:
# with eight devices a round lasts as long as the device with the most work.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for colour, (count, result) in zip(["#1f77b4", "#d95f02"], results.items()):
    rounds = [row["round"] for row in result.history]
    speed = 1 / np.array([row["seconds"] for row in result.history])
    settled = np.median(speed[len(speed) // 2 :])
    axes[0].plot(
        rounds, speed, color=colour, label=f"{count} device{'s' * (count > 1)}: {settled:,.0f} rounds a second"
    )
    axes[1].plot(rounds, [row["wasted_steps"] for row in result.history], color=colour)
axes[0].set(title=f"rounds per second on {devices[0].device_kind}", xlabel="round", yscale="log")
axes[1].set(title="fraction of steps that wait for another device", xlabel="round")
axes[0].legend(frameon=False)
for axis in axes:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# How much eight devices gain is for this cell to say: the larger the cohort and the model, the more, since a round also
# has a part that does not shrink (starting the program, adding up the updates). Host devices of a CPU share its cores, so
# there one device a core is best, which is what `python -m experiments.run` asks for. This notebook has been run on host
# devices only.
#
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
