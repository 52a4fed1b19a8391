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
# changes. It runs as it is on a CPU, GPU or TPU; two CPU cores take about two minutes.

# %%
import glob
import importlib.util
import shutil

if importlib.util.find_spec("fedjax_clip") is None:
    # The package is on no public index yet: clone it, and run  pip install ".[experiments]"  in the clone instead.
    accelerator = ",cuda" if shutil.which("nvidia-smi") else ",tpu" if glob.glob("/dev/accel*") else ""
    # %pip install -q "fedjax_clip[experiments{accelerator}]"

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import display

import fedjax_clip as fc
from experiments import plots

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
digits = fc.sources.digits()
fc.partition.plot(digits)

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

    def layer(k, n, m):
        return {"w": jax.random.normal(k, (n, m)) / np.sqrt(n), "b": jnp.zeros(m)}

    return {"hidden": layer(k1, 64, 64), "out": layer(k2, 64, 10)}


def per_example_loss(params, batch, key):
    x = batch["x"].reshape(-1, 64)
    x = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    logits = x @ params["out"]["w"] + params["out"]["b"]
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

result = fc.train(
    algorithm, train, init(jax.random.key(0)),
    rounds=ROUNDS, cohort_size=8, batch_size=20, evaluate=evaluate, eval_every=2,
)  # fmt: skip
result.history[-1]

# %% [markdown]
# `history` holds such a row for each round. The gradients are longest in the first rounds, and there most steps are
# clipped; later few are.

# %%
plots.curves(result.history, "FedAvg on digits by form, steps clipped at norm 1, learning rate 0.3")

# %% [markdown]
# ## Which threshold?
#
# The same training at six thresholds (`inf` never clips), at the learning rate above and at ten times as much, with
# three seeds each. The round is compiled anew for each run, which is most of the time this takes.

# %%
thresholds = [0.1, np.inf] if SHORT else [0.03, 0.1, 0.3, 1.0, 3.0, np.inf]
learning_rates = [0.3, 3.0]
seeds = [0] if SHORT else [0, 1, 2]


def clipped_fedavg(threshold, learning_rate):
    return fc.fedavg(
        per_example_loss, optax.chain(fc.clipping.clip_by_global_norm(threshold), optax.sgd(learning_rate))
    )


def run(algorithm, seed=0, data=train):
    params = init(jax.random.key(seed))
    options = {
        "rounds": ROUNDS,
        "cohort_size": 8,
        "batch_size": 20,
        "evaluate": evaluate,
        "eval_every": 2,
        "seed": seed,
    }
    return fc.train(algorithm, data, params, **options).history


histories = {}
for lr in learning_rates:
    for c in thresholds:
        algorithm = clipped_fedavg(c, lr)
        histories[lr, c] = [run(algorithm, seed) for seed in seeds]

# %%
position = [c if np.isfinite(c) else 10.0 for c in thresholds]  # no clip: to the right of them all
names = [f"{c:g}" if np.isfinite(c) else "no clip" for c in thresholds]


def final_accuracy(history):
    return history[-1]["eval/examples/accuracy"]


def clipped_fraction(history):
    return np.mean([row["clipped_steps"] for row in history])


figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
panels = [(final_accuracy, f"accuracy on held-out examples, round {ROUNDS}"),
          (clipped_fraction, "fraction of local steps clipped, all rounds")]  # fmt: skip
for axis, (measure, title) in zip(axes, panels, strict=True):
    for lr, colour, marker in zip(learning_rates, ["#1f77b4", "#d95f02"], "os", strict=True):
        values = np.array([[measure(h) for h in histories[lr, c]] for c in thresholds])
        axis.plot(position, values.mean(1), color=colour, marker=marker, ms=5, label=f"learning rate {lr:g}")
        axis.plot(position, values, ".", color=colour, alpha=0.5, ms=4)  # each seed
    axis.set(title=title, xscale="log", xlabel="clipping threshold (norm of a step's gradient)", ylim=(-0.03, 1.03))
    axis.set_xticks(position, names)
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].legend(frameon=False, loc="center left")
plt.show()

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
colours = plt.colormaps["viridis"](np.linspace(0, 0.9, len(thresholds)))
for axis, lr in zip(axes, learning_rates, strict=True):
    for c, colour, name in zip(thresholds, colours, names, strict=True):
        rows = [row for row in histories[lr, c][0] if "eval/examples/accuracy" in row]
        y = [row["eval/examples/accuracy"] for row in rows]
        axis.plot(
            [row["round"] for row in rows], y, color=colour, lw=1.8, ls="-" if np.isfinite(c) else "--", label=name
        )
    axis.set(title=f"learning rate {lr:g}, seed 0", xlabel="round", ylim=(0, 1.02))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("accuracy on held-out examples")
axes[1].legend(title="threshold", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
for lr in learning_rates:
    for c, name in zip(thresholds, names, strict=True):
        final = [h[-1] for h in histories[lr, c]]
        means = {
            k: np.mean([row[f"eval/{k}"] for row in final])
            for k in ("examples/accuracy", "clients/accuracy", "examples/loss")
        }
        print(
            lr,
            name,
            means,
            [clipped_fraction(h) for h in histories[lr, c]],
            [row["eval/examples/accuracy"] for row in final],
            [round(h[0]["loss"], 2) for h in histories[lr, c]],
        )

# %% [markdown]
# TODO

# %% [markdown]
# ## Clients that differ more
#
# The forms are alike in their mix of digits. Clients often are not. Deal the same training examples out again, each
# digit in proportions drawn from a Dirichlet distribution: the smaller its parameter, the fewer clients have a digit.

# %%
skewed = fc.partition.dirichlet(train.examples, num_clients=train.num_clients, alpha=0.1, seed=0)
display(fc.partition.plot(skewed))
plots.curves(run(clipped_fedavg(1.0, 0.3), data=skewed), "the same training on Dirichlet(0.1) clients")

# %% [markdown]
# TODO
#
# ## Where to go next
#
# - `python -m experiments.run --help`: the same from the command line, with checkpoints, resuming and more tasks; ready
#   settings are in `experiments/presets/`.
# - `fc.uplink.clip_by_global_norm` clips a client's whole update instead of its steps; `fc.fedavg(..., server_tx=
#   optax.adam(0.01))` gives the server another optimiser.
# - `docs/design.md`: how a round is built, and how to write another algorithm.
