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
# # Choosing a clip: five problems that tell clipping rules apart
#
# What to clip (each step, the update, the difference to a memory), and at which threshold? The answer depends on what
# goes wrong without a clip. This notebook takes five of ClipBench's problems and compares a few rules on each. Every
# rule is tuned by the same number of trials, and then measured on other seeds. `python -m experiments.bench.clip` does
# the same for all rules, with more trials. `docs/choosing-a-clip.md` draws the conclusions.
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
if not there("experiments"):
    raise RuntimeError(
        "This notebook runs ClipBench, which is in the repository only: write its address into REPOSITORY."
    )

# %%
import dataclasses
import os

import jax
import matplotlib.pyplot as plt  # noqa: F401 (it lets a notebook show figures)
import numpy as np
import optax

import fedjax_clip as fc
from experiments.bench import tracks
from experiments.bench.clip import draw
from experiments.bench.core.grid import Banks, play
from experiments.bench.core.rule import Rule
from experiments.bench.core.standing import Standing
from experiments.bench.rules import RULES

# %matplotlib inline
SHORT = os.environ.get("FEDJAX_CLIP_SHORT") == "1"  # the project's tests run this notebook with less work
TRIALS = 32

jax.devices()

# %% [markdown]
# ## The tools
#
# A **rule** is a function `(loss, point) -> algorithm` and the names of its knobs. A **point** has a number for each
# knob: `client_lr`, `threshold`, `server_lr`. A **track** is a problem with a range for each knob, seeds to tune on, and
# other seeds to measure on. `play` tries points: half of them spread over the ranges, half around the best of those.
# All trials and seeds run in one compiled program, since knobs are data, and so can be mapped over.

# %%
for name in ("fedavg", "celgc", "clipped_update", "clip21", "episode"):
    print(f"{name:<15} {', '.join(RULES[name].knobs):<33} {RULES[name].note}")


def compare(track, names, trials=TRIALS):
    """Tunes and measures these rules, and draws how they stand."""
    track = dataclasses.replace(track, trials=trials)
    track, names = (track.quick(), names[:2]) if SHORT else (track, names)
    banks = Banks()
    rows = [Standing(track, name, RULES[name], play(track, RULES[name], banks)) for name in names]
    rows.sort(key=lambda row: row.order)
    for row in rows:
        knobs = ", ".join(f"{knob} {row.knob(knob)}" for knob in RULES[row.name].knobs)
        print(f"{row.name:<18} {row.value():<36} {knobs}")
    return draw(track, rows)


# %% [markdown]
# How to read the pictures. On the left a bar is a measuring seed and a dot their mean (of errors the geometric mean).
# Blue rules are not told apart from the first: the interval of their differences, seed by seed and corrected for the
# number of comparisons, holds zero. On the right is the best trial in each quarter of the threshold's range, on the
# tuning seeds.
#
# ## A clip has a bias of its own: three numbers
#
# Three clients hold one number each: 3, −3, −3. Each minimises $(x - a_i)^2/2$, so the mean objective has its minimum at
# −1. There is no noise, one local step, and everybody takes part: whatever is left in the end is the clip's doing.

# %%
compare(tracks.three_numbers(), ["celgc", "clip21", "clipped_minibatch"])

# %% [markdown]
# All three arrive at their best threshold. The right side shows the difference. Clipping each client's gradient
# (`celgc`) arrives at large thresholds only, at which no client is clipped near the optimum. At threshold 1 it stops
# where the clipped pulls balance, a distance of 1.5 away, **and no learning rate helps**: the fixed point is wrong.
#
# `clip21` clips the difference to what the client sent before. The differences shrink, in the end nothing is clipped,
# and the bias is gone at every threshold. `clipped_minibatch` clips the mean, and one vector that is clipped keeps its
# direction: no bias either.
#
# ## Clients that differ: the quartic
#
# Two clients with $x^4 - 3x^3 + Hx^2 + x$ and $x^4 - 3x^3 - 2Hx^2 + x$, eight local steps, noise on every gradient.
# Now there are two biases: the clip's, and the drift of the local steps.

# %%
compare(tracks.quartic(4.0), ["celgc", "episode", "fedavg", "clip21", "scaffold_clip"])

# %% [markdown]
# The paper's rate is 0.01. Where does `fedavg` end with it?

# %%
track = tracks.quartic(4.0).quick() if SHORT else tracks.quartic(4.0)
untuned = dataclasses.replace(RULES["fedavg"], points=[{"client_lr": 0.01}])
gaps = np.array(play(track, untuned, Banks())["measured"]["gap"])
print(f"fedavg at a rate of 0.01: gap {np.exp(np.log(gaps).mean()):.2g}")

# %% [markdown]
# It drifts. Tuned, it takes a far smaller rate, and the drift is all but gone: **a comparison at one learning rate
# compares learning rates.** What remains on the right side is the bias of `celgc`. With small thresholds it gets nowhere:
# both clients are clipped to the same length, pull in opposite directions, and cancel. `episode` and `scaffold_clip`
# decide on corrected gradients whether to clip, and arrive at every threshold. They pay for it with a second upload in
# each round.
#
# ## A far start: where unclipped steps overflow
#
# The same two clients, from a start between 50 and 100 in place of 1. Curvature grows with the square of x, so plain
# steps must be tiny there, and are too small later.

# %%
compare(tracks.quartic_far(), ["celgc", "episode", "fedavg", "clipped_minibatch", "scaffold"])

# %% [markdown]
# This is what a clip of gradients is for. Unclipped rules overflow at most rates, and at the largest that they bear 500
# rounds are too few. A rule some of whose seeds diverged has a cross in place of a score: **one dropped update counts as
# divergence**, even if the run recovers.
#
# ## Heavy tails
#
# Quadratics in ten dimensions with Student-t noise of 1.5 degrees of freedom on every gradient: it has no variance, so
# plain SGD does not settle.

# %%
compare(tracks.heavy_tails(), ["celgc", "fedavg", "clipped_update", "coordinate"])

# %% [markdown]
# Even at its best rate `fedavg` is many times further away than any clip. The closer the clip is to the noise, the
# better: one outlier spoils one step of `celgc`, and all ten steps of `clipped_update`. A bound on each element
# (`coordinate`) spoils one element of one step.
#
# ## Real data: digits by form
#
# Ten forms train and four others are measured. Knobs are tuned on five folds of the ten, so that nobody is measured on
# what it was tuned on.

# %%
compare(tracks.digits(), ["celgc", "fedavg"], trials=8)

# %% [markdown]
# Nothing is wrong here that a clip could mend: gradients have no heavy tails, and every form holds all digits. Once both
# rates are tuned, the two differ by a fraction of a per cent. So: **clip for a reason**, and choose the clip by the reason.
#
# ## A rule of your own
#
# Is a clip of each step *and* of the update better than either, in heavy tails? A rule is one function.


# %%
def both(loss, point):
    clip = fc.clipping.clip_by_global_norm(point["threshold"])
    bound = 4 * point["client_lr"] * point["threshold"]
    client_tx = optax.chain(clip, optax.sgd(point["client_lr"]))
    return fc.fedavg(loss, client_tx, uplink=fc.uplink.clip_by_global_norm(bound))


RULES["both"] = Rule(both, note="each step, and the update at four steps' length")
compare(tracks.heavy_tails(), ["both", "celgc"])

# %% [markdown]
# It is not: what the first clip has let through, the second only makes shorter. ClipBench takes the function from a file
# of yours, too: `python -m experiments.bench.clip --import=my_rules --rules=my_rules.both,celgc` once it is in `my_rules.py`.
