"""The terminal output of a run: its problem, its progress and its result."""

from collections.abc import Sequence

import jax
import numpy as np
import tqdm
from absl import flags

import fedjax_clip as fc
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


class Progress:
    """A bar of rounds with loss, held-out accuracy, clipped fraction and clients per second, if rows have them."""

    def __init__(self, rounds: int):
        self.rounds = rounds
        self.shown: dict[str, str] = {}
        self.bar: tqdm.tqdm | None = None

    def __call__(self, row: fc.extend.Row) -> None:
        if self.bar is None:
            initial = int(row["round"]) - 1
            self.bar = tqdm.tqdm(total=self.rounds, initial=initial, unit="round", dynamic_ncols=True, mininterval=0.2)
        for key, name, form in (
            ("loss", "loss", ".3f"),
            ("epsilon", "epsilon", ".3f"),
            ("eval/examples/accuracy", "accuracy", ".3f"),
            ("eval/clients/accuracy", "new clients", ".3f"),
            ("clipped_steps", "clipped", ".0%"),
        ):
            if key in row:
                self.shown[name] = format(row[key], form)
        if "seconds" in row:
            self.shown["clients/s"] = f"{row['clients'] / row['seconds']:,.0f}"
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()


def summary(directory: rundir.RunDirectory, noisy: bool) -> str:
    """The last evaluation, the parameters if they are few, the privacy statement, and the files to look at next.

    Args:
      directory: of the run, which is complete.
      noisy: whether noise was added.
    """
    rows, claim, arrays = directory.rows(), directory.claim, directory.params()
    last = rows[-1]
    sets = dict.fromkeys(k.split("/")[1] for k in last if k.startswith("eval/"))
    lines = []
    for name in sets:
        scores = {k.split("/")[2]: v for k, v in last.items() if k.startswith(f"eval/{name}/") and k.count("/") == 2}
        lines.append(f"held-out {name:<10}" + "  ".join(f"{k} {v:.4f}" for k, v in sorted(scores.items())))
    if last["round"] < FLAGS.rounds:
        why = f"one more round would pass --target_epsilon={FLAGS.target_epsilon:g}"
        lines.append(f"ended early        after {last['round']:.0f} of {FLAGS.rounds} rounds: {why}")
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
    served = ["clients.npz"] * (directory.path / "clients.npz").exists()
    files = ["report.html", *sorted(pictures), "metrics.jsonl", "params.npz", *served, "tensorboard"]
    lines.append(f"run directory      {directory.path}: {', '.join(files)}")
    if claim is not None:
        lines += [f"{name:<18} {text}" for name, text in privacy.statement(claim, last, complete=True)]
    elif noisy:
        lines.append(f"noise              {privacy.COMPUTABLE.format(f'--seed={FLAGS.seed}')}; --delta asks for more")
    return "\n".join(lines)
