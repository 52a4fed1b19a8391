"""Incremental learning on digits, for ``docs/streams.md``: what each method still knows of the old classes.

Digits 0 to 4 until round 50, then 5 to 9, and three new forms from round 100 on. Each method gets three trials of one
number on a seed of its own, chosen by the mean accuracy over the three held-out sets at the end, then three seeds.

  python benchmarks/streams.py            writes runs/streams.json and docs/streams.png, and prints the table; goes on
                                          with the methods that are missing
"""

import json
import pathlib
import time

import jax
import numpy as np
import optax

import fedjax_clip as fc
from fedjax_clip.data import stream

ROOT = pathlib.Path(__file__).parents[1]
ENDS = [50, 100, 150]
METRICS = [f"eval/examples_from_{start}/accuracy" for start in (0, 50, 100)]
SEEDS, TUNING_SEED = (0, 1, 2), 100
RATES = (0.1, 0.3, 1.0)
RATE = 0.3  # of EWC and LwF, whose strength is tuned
METHODS = {  # the number that is tuned, and its three values
    "no memory": ("rate", RATES),
    "balanced 20": ("rate", RATES),  # old examples at each client, of about 65 that it had
    "balanced 5": ("rate", RATES),
    "EWC": ("strength", (10.0, 100.0, 1000.0)),
    "LwF": ("strength", (1.0, 3.0, 10.0)),
    "all classes stay": ("rate", RATES),
    "reservoir 5": ("rate", RATES),
    "no memory, no clip": ("rate", RATES),
    "balanced 5, no clip": ("rate", RATES),
}


def task(method: str) -> fc.tasks.Task:
    """The stream of a method."""
    rules = [
        lambda data: stream.classes(data, groups=2, every=50, stay=method == "all classes stay"),
        lambda data: stream.clients(data, 3, start=100),
    ]
    if method.startswith(("reservoir", "balanced")):
        rule, capacity = method.split(",")[0].split()
        rules.append(lambda data: getattr(stream, rule)(data, int(capacity)))
    return fc.tasks.stream(fc.tasks.digits(), rules)


def algorithm_of(method: str, loss, logits, rate: float, strength: float) -> tuple[fc.extend.Algorithm, object]:
    """The algorithm, and the loss that it trains."""
    client_tx = optax.sgd(rate)
    if not method.endswith("no clip"):
        client_tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), client_tx)
    if method == "EWC":
        loss = fc.local.ewc(loss, strength)
        return fc.partially_frozen(fc.fedavg(loss, client_tx), "^(anchor|fisher)/"), loss
    if method == "LwF":
        loss = fc.local.lwf(loss, logits, strength)
        return fc.partially_frozen(fc.fedavg(loss, client_tx), "^(teacher/|known)"), loss
    return fc.fedavg(loss, client_tx), loss


def train(method: str, problem: fc.tasks.Task, algorithm, evaluate, seed: int, eval_every: int = 10) -> list[dict]:
    """The history of a run. Between two phases EWC and LwF look back."""
    params = problem.init(jax.random.key(seed))
    if method == "EWC":
        params = fc.local.anchored(params)
    if method == "LwF":
        params = fc.local.taught(params, np.zeros(10))
    history, state = [], None
    for end in ENDS:
        result = fc.train(
            algorithm,
            problem.data,
            params,
            rounds=end,
            cohort_size=8,
            batch_size=20,
            seed=seed,
            evaluate=evaluate,
            eval_every=eval_every,
            state=state,
            devices=jax.devices()[:1],
        )
        history += result.history
        params = result.params
        if end == ENDS[-1]:
            break
        if method == "EWC":
            fisher = fc.local.fisher(problem.per_example_loss, params["model"], problem.data, round=end - 1)
            params = fc.local.consolidated(params, fisher)
        if method == "LwF":
            params = fc.local.taught(params["model"], np.arange(10) < (5 if end == 50 else 10))
        state = result.state._replace(server=result.state.server._replace(params=params))
    return history


def measured(method: str) -> dict:
    """Tunes a method and runs its seeds."""
    began = time.time()
    name, values = METHODS[method]
    problem = task(method)
    model = fc.models.MLP((128,), 10)  # what fc.tasks.digits trains

    def logits(params, batch):
        return model.apply(params, batch["x"])

    made = {}
    for value in values:
        given = {"rate": RATE, "strength": 0.0} | {name: value}
        algorithm, loss = algorithm_of(method, problem.per_example_loss, logits, **given)
        if not made:
            evaluate = fc.evaluator(loss, problem.evaluation)  # in which no number above counts
        made[value] = problem, algorithm, evaluate
    trials = {v: stream.accuracies(train(method, *made[v], TUNING_SEED, 50), METRICS, ENDS) for v in values}
    best = max(values, key=lambda value: np.nan_to_num(trials[value][-1].mean()))
    runs = [train(method, *made[best], seed) for seed in SEEDS]
    curves = [
        [[row["round"], *(round(row[m], 4) for m in METRICS)] for row in run if METRICS[0] in row] for run in runs
    ]
    return {
        "tuned": name,
        "value": best,
        "trials": {str(v): round(float(matrix[-1].mean()), 4) for v, matrix in trials.items()},
        "matrices": [stream.accuracies(run, METRICS, ENDS).tolist() for run in runs],
        "curves": curves,
        "seconds": time.time() - began,
    }


def table(found: dict) -> str:
    """The rows of ``docs/streams.md``: mean and standard deviation over seeds, in percent."""
    lines = [
        "| method | tuned | old classes | new classes | new forms | average | forgetting | backward transfer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, run in found.items():
        matrices = [np.array(matrix) for matrix in run["matrices"]]
        scores = [matrix[-1] for matrix in matrices]
        columns = [[score[j] for score in scores] for j in range(3)]
        columns += [[f(m) for m in matrices] for f in (stream.average_accuracy, stream.forgetting)]
        columns += [[stream.backward_transfer(m) for m in matrices]]
        shown = " | ".join(f"{100 * np.mean(c):.1f} ± {100 * np.std(c, ddof=1):.1f}" for c in columns)
        lines.append(f"| {method} | {run['tuned']} {run['value']:g} | {shown} |")
    return "\n".join(lines)


def draw(found: dict) -> None:
    """Accuracy on old and new classes by rounds, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True, layout="constrained")
    for j, (axis, title) in enumerate(zip(axes, ("old classes (0-4)", "new classes (5-9)", "new forms"))):
        for method, run in found.items():
            if method.endswith("no clip"):
                continue
            mean = np.mean(run["curves"], axis=0)
            axis.plot(mean[:, 0], mean[:, 1 + j], label=method, lw=1.5)
        for end in ENDS[:-1]:
            axis.axvline(end, color="0.7", lw=0.8, zorder=0)
        axis.set(title=title, xlabel="round", ylim=(-0.02, 1.02))
    axes[0].set_ylabel("held-out accuracy")
    axes[1].legend(fontsize=7, loc="upper left")
    figure.savefig(ROOT / "docs/streams.png", dpi=80)


def main() -> None:
    path = ROOT / "runs/streams.json"
    path.parent.mkdir(exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    for method in METHODS:
        if method not in found:
            found[method] = measured(method)
            print(method, found[method]["trials"], f"{found[method]['seconds']:.0f} s", flush=True)
            path.write_text(json.dumps(found))
    print(table(found))
    draw(found)


if __name__ == "__main__":
    main()
