"""Own models and clusters beside FedAvg on digits that are rotated by group: the table of docs/personal.md.

  python benchmarks/personal.py few.json                       # 12 clients of 149 digits, 16 hidden units
  python benchmarks/personal.py many.json --clients=20 --cohort=10 --hidden=32    # of 89 digits

A run takes ten minutes on two cores, and goes on where it was stopped.

Clients are of four groups, whose digits are rotated by 0, 90, 180 and 270 degrees. A seed draws which digits a client
has, which of them are held out (a third), the initial model and the cohorts. Each method has the same number of points
of its numbers, drawn alike from the same range of learning rates, with and without a clip of each step's gradient. The
best point on the tuning seeds is measured on other seeds, by each client's own model on its held-out digits.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import fedjax_clip as fc
from fedjax_clip.core import keys
from fedjax_clip.training.rounds import run_rounds
from fedjax_clip.training.state import init_state

CLIENTS, GROUPS, COHORT, ROUNDS, HIDDEN = 12, 4, 6, 80, 16
WORK = fc.extend.LocalWork(batch_size=10, steps=5)
TUNING, MEASURING, POINTS = (100, 101), tuple(range(5)), 8

RANGES = {  # of each method's own numbers, on a logarithmic scale; all have lr, and threshold if they are clipped
    "fedavg": {},
    "fine-tuned": {"own_lr": (0.03, 1.0)},
    "local": {},
    "fedper": {},
    "fedrep": {},
    "ditto": {"strength": (0.01, 1.0)},
    "mr_mtl": {"strength": (0.01, 1.0)},
    "apfl": {"alpha": (0.1, 1.0)},
    "ifca": {},
}
LR, THRESHOLD = (0.03, 1.0), (0.3, 10.0)


def problem(seed: int) -> tuple[fc.FederatedData, fc.FederatedData, dict]:
    """``(train, held_out, params)``: every client keeps its number in both."""
    digits, rng = fc.data.sources.digits().examples, np.random.default_rng(seed)
    order = rng.permutation(len(digits["y"]))[: len(digits["y"]) // CLIENTS * CLIENTS].reshape(CLIENTS, -1)
    x = np.asarray(digits["x"], np.float32).reshape(-1, 8, 8)
    turned = np.concatenate([np.rot90(x[rows], c % GROUPS, (1, 2)) for c, rows in enumerate(order)])
    data = fc.FederatedData(
        {"x": turned.reshape(len(turned), 64), "y": digits["y"][order.ravel()].astype(np.int32)},
        np.arange(CLIENTS + 1) * order.shape[1],
    )

    def kernel(n: int, m: int) -> np.ndarray:
        return (rng.normal(size=(n, m)) / np.sqrt(n)).astype(np.float32)

    params = {
        "body": {"kernel": kernel(64, HIDDEN), "bias": np.zeros(HIDDEN, np.float32)},
        "head": {"kernel": kernel(HIDDEN, 10), "bias": np.zeros(10, np.float32)},
    }
    return *data.split_examples(1 / 3, seed), params


def loss(params, batch, key):
    """Cross-entropy of a network of one hidden layer, and whether it is right."""
    hidden = jax.nn.relu(batch["x"] @ params["body"]["kernel"] + params["body"]["bias"])
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}


def build(method: str, h: dict) -> fc.extend.Algorithm:
    """The algorithm at a point, whose numbers may be traced."""
    tx = optax.chain(fc.clipping.clip_by_global_norm(h["threshold"]), optax.sgd(h["lr"]))
    make = {
        "fedper": lambda: fc.partially_private(fc.fedavg(loss, tx), "^head"),
        "fedrep": lambda: fc.personal.fedrep(loss, tx, head="^head"),
        "ditto": lambda: fc.personal.ditto(loss, tx, strength=h["strength"]),
        "mr_mtl": lambda: fc.personal.mr_mtl(loss, tx, strength=h["strength"]),
        "apfl": lambda: fc.personal.apfl(loss, tx, alpha=h["alpha"]),
        "ifca": lambda: fc.clusters.ifca(loss, tx, clusters=GROUPS),
    }
    return make.get(method, lambda: fc.fedavg(loss, tx))()


@functools.cache
def inputs(seed: int) -> tuple:
    """What a run reads: parameters, examples, cohorts of all rounds, and held-out examples by client."""
    train, held_out, params = problem(seed)
    ids = [fc.data.sampling.uniform(COHORT).draw(train.sizes, seed, round) for round in range(ROUNDS)]
    planned = fc.extend.plan_rounds(train, ids, WORK, seed=seed, first_round=0, population=())
    tuning = fc.extend.plan(train, np.arange(CLIENTS), WORK, seed=seed, round=ROUNDS, population=())
    alone = [jax.tree.map(lambda x: x[0], cohorts) for cohorts in (planned, tuning)]
    judged = jax.tree.map(lambda x: x.reshape(CLIENTS, -1, *x.shape[1:]), held_out.examples)
    return params, train.examples, *alone, judged


@functools.cache
def trained(method: str):
    """``(point, seed, inputs) -> (accuracy [N], clusters [N])``, compiled once."""

    @jax.jit
    def run(h, seed, params, examples, cohorts, everybody, judged):
        algorithm, key = build(method, h), keys.seeded(seed)
        state = init_state(algorithm, params, CLIENTS)
        (server, kept), _ = run_rounds(algorithm.round, state, cohorts, examples, key, ROUNDS)
        personal = algorithm.personal or (lambda params, state: params)
        if method == "fine-tuned":  # as many steps as a round has
            tuned = fc.personal.ditto(loss, optax.sgd(h["own_lr"]), strength=0.0)
            state = init_state(tuned, server.params, CLIENTS)
            everybody = jax.tree.map(lambda x: x[None], everybody)
            (_, kept), _ = run_rounds(tuned.round, state, everybody, examples, key, 1)
            personal = tuned.personal
        right = jax.vmap(lambda state, own: loss(personal(server.params, state), own, None)[1]["accuracy"].mean())
        chosen = kept.own if method == "ifca" else jnp.zeros(CLIENTS, jnp.int32)
        return right(kept, judged), chosen

    return run


def points(method: str, clipped: bool) -> list[dict]:
    """The points that a method may try; the clip of an infinite threshold is none."""
    space = {"lr": LR} | ({"threshold": THRESHOLD} if clipped else {}) | RANGES[method]
    fixed = ({} if clipped else {"threshold": np.inf}) | ({"strength": 0.0} if method == "local" else {})
    drawn = fc.sweeping.random(POINTS, 0, **{k: fc.sweeping.Range(*bounds, log=True) for k, bounds in space.items()})
    return [{k: np.float32(x) for k, x in ({n: x[i] for n, x in drawn.items()} | fixed).items()} for i in range(POINTS)]


def rand_index(found: np.ndarray, planted: np.ndarray) -> float:
    """The adjusted Rand index of two partitions: 1 if they are the same."""

    def pairs(x: np.ndarray) -> float:
        return (x * (x - 1) / 2).sum()

    table = np.zeros((found.max() + 1, planted.max() + 1))
    np.add.at(table, (found, planted), 1)
    rows, columns, everyone = pairs(table.sum(1)), pairs(table.sum(0)), len(found) * (len(found) - 1) / 2
    expected = rows * columns / everyone
    return float((pairs(table) - expected) / ((rows + columns) / 2 - expected))


def main() -> None:
    """Tunes, measures, prints the table."""
    global CLIENTS, COHORT, HIDDEN
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="two points, and few seeds")
    for name, default in (("clients", CLIENTS), ("cohort", COHORT), ("hidden", HIDDEN)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    CLIENTS, COHORT, HIDDEN = flags.clients, flags.cohort, flags.hidden
    tuning, measuring = (TUNING[:1], MEASURING[:2]) if flags.quick else (TUNING, MEASURING)
    found = json.loads(flags.file.read_text()) if flags.file.exists() else {}
    for clipped in (False, True):
        for method in RANGES:
            name = f"{method}, clipped" if clipped else method
            if name in found:
                continue
            began, run = time.time(), trained("ditto" if method == "local" else method)
            tried = points(method, clipped)[: 2 if flags.quick else None]
            scores = [np.mean([run(h, s, *inputs(s))[0].mean() for s in tuning]) for h in tried]
            best = tried[int(np.nanargmax(scores))]
            outcomes = [jax.tree.map(np.asarray, run(best, s, *inputs(s))) for s in measuring]
            found[name] = {
                "point": {k: float(x) for k, x in best.items()},
                "accuracy": [float(right.mean()) for right, _ in outcomes],
                "worst": [float(np.sort(right)[: CLIENTS // 10].mean()) for right, _ in outcomes],
                "rand": [rand_index(c, np.arange(CLIENTS) % GROUPS) for _, c in outcomes] if method == "ifca" else [],
            }
            flags.file.write_text(json.dumps(found, indent=1))
            print(f"{name}: {np.mean(found[name]['accuracy']):.4f} ({time.time() - began:.0f} s)", flush=True)
    print(table(found))


def table(found: dict) -> str:
    """The table in Markdown: means over seeds, and 95% intervals of the difference from FedAvg on the same seeds."""
    lines = ["| method | accuracy | minus FedAvg | worst tenth | clipped: accuracy | minus FedAvg | worst tenth |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for method in RANGES:
        cells = [method]
        for suffix in ("", ", clipped"):
            own, base = found[f"{method}{suffix}"], found[f"fedavg{suffix}"]
            gain = np.subtract(own["accuracy"], base["accuracy"])
            half = scipy.stats.t.ppf(0.975, len(gain) - 1) * scipy.stats.sem(gain)
            difference = "" if method == "fedavg" else f"{gain.mean():+.3f} ± {half:.3f}"
            cells += [f"{np.mean(own['accuracy']):.3f}", difference, f"{np.mean(own['worst']):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    rand = [f"{x:.2f}" for suffix in ("", ", clipped") for x in found[f"ifca{suffix}"]["rand"]]
    return "\n".join([*lines, "", f"Adjusted Rand index of IFCA's clusters, seed by seed: {', '.join(rand)}."])


if __name__ == "__main__":
    main()
