"""A preset over several seeds, with its clips and without them: the row of a table in docs/tasks.

  python benchmarks/tasks.py experiments/presets/tweets.flags --seeds=3

Mean and standard deviation over the seeds of the last round's evaluation. A seed draws the initial parameters, the
cohorts and the batches; data and splits stay, but for ``--splits``. Other flags are those of experiments.run, and
override the preset's.
"""

import functools
import inspect
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

import fedjax_clip as fc

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments.config import binary, privacy, registry, spec
from experiments.config import problem as flagged

FLAGS = flags.FLAGS
flags.DEFINE_integer("seeds", 3, "How many.")
flags.DEFINE_boolean("both", True, "With the clips and without them; otherwise as the preset says.")
flags.DEFINE_boolean("splits", False, "Whether each seed is that of the task too, which splits the data.")


def without_clips(chain: str) -> str:
    """``"clip_by_global_norm(1.0)|sgd(0.1)"`` as ``"sgd(0.1)"``."""
    return "|".join(link for link in chain.split("|") if "clip" not in link)


@functools.cache
def problem(seed: int | None) -> fc.tasks.Task:
    """What ``--task`` says, with this seed where one is given."""
    makers = registry.TASKS if seed is None else {n: with_seed(make, seed) for n, make in registry.TASKS.items()}
    return spec.one(FLAGS.task, makers, "--task")


def with_seed(make: Callable[..., fc.tasks.Task], seed: int) -> Callable[..., fc.tasks.Task]:
    """The task with another seed by default, where it has one."""
    return functools.partial(make, seed=seed) if "seed" in inspect.signature(make).parameters else make


def final_scores() -> dict[str, list[float]]:
    """``{metric: a value for each seed}`` after the last round, of what the flags say."""
    scores: dict[str, list[float]] = {}
    task = None
    for seed in range(FLAGS.seeds):
        if task is None or FLAGS.splits:
            task = problem(seed if FLAGS.splits else None)
            cohort = flagged.cohort_size(task)
            uplink = privacy.chain(FLAGS.uplink, None)
            algorithm = flagged.build_algorithm(task, uplink, cohort)
            sampler = flagged.sampler(cohort)
            judge = flagged.evaluator(task, algorithm, task.evaluation)
        result = fc.train(
            algorithm,
            task.data,
            jax.tree.map(np.asarray, task.init(jax.random.key(seed))),
            rounds=FLAGS.rounds,
            sampler=sampler,
            seed=seed,
            **flagged.local_work(),
        )
        clipped = np.mean([row.get("clipped_steps", 0.0) for row in result.history])
        for name, value in {**judge(result.params, result.state.clients), "clipped_steps": clipped}.items():
            scores.setdefault(name, []).append(float(value))
    return scores


def main(argv: list[str]) -> None:
    binary.configure_jax(FLAGS.devices)
    variants = {"clipped": (FLAGS.client, FLAGS.uplink)}
    if FLAGS.both:
        variants["unclipped"] = without_clips(FLAGS.client), without_clips(FLAGS.uplink)
    for name, (client, uplink) in variants.items():
        began = time.perf_counter()
        FLAGS.client, FLAGS.uplink = client, uplink
        scores = final_scores()
        print(f"{name}: {client} {uplink} ({(time.perf_counter() - began) / FLAGS.seeds:.0f} s a seed)")
        for metric, values in scores.items():
            print(
                f"  {metric:<20} {np.mean(values):.4f} ± {np.std(values, ddof=min(1, len(values) - 1)):.4f}", flush=True
            )


if __name__ == "__main__":
    app.run(
        main,
        flags_parser=lambda argv: FLAGS(
            [argv[0], *(f"--flagfile={x}" if x.endswith(".flags") else x for x in argv[1:])]
        ),
    )
