"""The terminal output of a run: its problem, its progress and its result."""

from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from experiments.config import privacy, rundir
from fedjax_clip import tasks
from fedjax_clip.core import tree
from fedjax_clip.core.types import Params

FLAGS = flags.FLAGS


def describe(
    task: tasks.Task, cohort_size: int, params: Params, devices: Sequence[jax.Device], withheld: bool = False
) -> str:
    """One line on the run that begins; if ``withheld``, only the number of clients appears."""
    data, size, frozen = task.data, tree.size(trained(task, params)), ""
    if task.frozen is not None:
        frozen = f" beside {tree.size(params) - size:,} that stay as they are"
    count = len(devices) * getattr(devices, "model", 1)
    sizes = "" if withheld else f" with {data.sizes.min()} to {data.sizes.max()} examples"
    return (
        f"{FLAGS.task}: {data.num_clients} clients{sizes}, {cohort_size} a round, "
        f"{size:,} parameters{frozen}, {count} {devices[0].platform} device{'s' * (count > 1)}"
    )


def trained(task: tasks.Task, params: Params) -> Params:
    """The parameters that train, and travel."""
    return params if task.frozen is None else tree.split(params, task.frozen)[1]


def summary(directory: rundir.RunDirectory, noisy: bool) -> str:
    """The last evaluation, the parameters if they are few, the privacy statement, and the files to look at next.

    Args:
      directory: of the run, which is complete.
      noisy: whether noise was added.
    """
    rows, claim, arrays = directory.rows(), directory.claim, directory.params()
    last = rows[-1]
    sets = dict.fromkeys(k.split("/")[1] for k in last if k.startswith("eval/"))
    where, _, chosen = str(directory.config.get("metric") or "").removeprefix("eval/").rpartition("/")
    lines = []
    for name in sorted(sets, key=lambda name: name != where):
        scores = {k.split("/")[2]: v for k, v in last.items() if k.startswith(f"eval/{name}/") and k.count("/") == 2}
        ordered = sorted(scores.items(), key=lambda score: (score[0] != chosen, score))
        lines.append(f"held-out {name:<9} " + "  ".join(f"{k} {v:.4f}" for k, v in ordered))
    if last["round"] < FLAGS.rounds:
        why = f"{FLAGS.patience} evaluations brought no better {FLAGS.metric}"
        if FLAGS.target_epsilon is not None:
            why = f"one more round would pass --target_epsilon={FLAGS.target_epsilon:g}"
        lines.append(f"ended early        after {last['round']:.0f} of {FLAGS.rounds} rounds: {why}")
    if best := rundir.read_config(directory.path).get("best"):
        lines.append(f"best model         {best['metric']} {best['value']:.4f} after round {best['round']}: best.npz")
    if lost := sum(row.get("dropped", 0) for row in rows):
        when = sum(row["dropped"] > 0 for row in rows)
        stale = ", or too stale" * ("staleness" in last)
        lines.append(f"dropped            {lost:.0f} clients in {when} rounds: their updates were not finite{stale}")
    if sum(x.size for x in arrays.values()) <= 8:
        lines.append(
            "parameters         " + "  ".join(f"{k} {np.array2string(x, precision=4)}" for k, x in arrays.items())
        )
    seconds = f" in {sum(row['seconds'] for row in rows):.1f} s" if "seconds" in last else ""
    simulated = f", {last['simulated_seconds']:,.0f} s of the clients' time" if "simulated_seconds" in last else ""
    lines.append(f"training           {last['round']:.0f} rounds{seconds}{simulated}")
    pictures = [path.name for path in directory.path.glob("*.png")]
    beside = "clients.npz", "model.json", "samples.json", "model"
    served = [name for name in beside if (directory.path / name).exists()]
    files = ["report.html", *sorted(pictures), "metrics.jsonl", "params.npz", *served, "tensorboard"]
    lines.append(f"run directory      {directory.path}: {', '.join(files)}")
    if claim is not None:
        lines += [f"{name:<18} {text}" for name, text in privacy.statement(claim, last, complete=True)]
    elif noisy:
        lines.append(f"noise              {privacy.COMPUTABLE.format(f'--seed={FLAGS.seed}')}; --delta asks for more")
    return "\n".join(lines)
