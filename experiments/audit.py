"""Audits a run's privacy: attacks it with canaries in thousands of replays, and bounds epsilon from below.

  python -m experiments.audit --sampler=poisson --uplink="clip_by_global_norm(0.5)|gaussian(2.0)"
  python -m experiments.audit --flagfile=my_private_run.flags --delta=1e-5
  python -m experiments.audit --mutants=docs/audit.md

The flags are those of experiments.run. They give the algorithm, the links, the reducer, the noise and its mechanism,
the sampler, the number of clients and the names of the model's leaves. The audit itself provides the data, the sizes of
the leaves, the loss and plain SGD on both sides, because privacy must hold whatever clients send. If the lower bound
exceeds the accountant's epsilon, the verdict is BROKEN and the exit code is 1. Otherwise the audit found no fault,
which proves nothing.
"""

import sys
import time
from typing import Any

import jax
import numpy as np
from absl import flags

import fedjax_clip as fc
from experiments.auditing import cases, mutants
from experiments.config import binary, outside, problem, registry, spec
from fedjax_clip import tasks
from fedjax_clip.core import checks, files
from fedjax_clip.core.keys import seeded

FLAGS = flags.FLAGS

flags.DEFINE_integer("replays", 10_000, "Replays with each canary.")
flags.DEFINE_integer("audit_rounds", 6, "Rounds of a replay; --rounds, where they are fewer.")
flags.DEFINE_float("confidence", 0.999, "That the lower bound holds.")
flags.DEFINE_string("mutants", None, "Audits planted faults and right configurations, and writes a table of them here.")

DELTA = 1e-3  # if the run claims no delta
CAUGHT = 28  # the fewest planted faults that must be caught


def main() -> None:
    """Audits the run of the flags."""
    problem.check_numbers()
    checks.count("--audit_rounds", FLAGS.audit_rounds, most=1000)
    binary.configure_jax(1)
    outside.load()
    if FLAGS.mutants is not None:
        sys.exit(0 if audit_mutants(FLAGS.mutants) else 1)
    asked = problem.read()
    reducer = in_program(problem.build_reducer(asked.uplink, asked.cohort_size))
    delta = DELTA if FLAGS.delta is None else FLAGS.delta
    found = fc.privacy.audit(
        problem.builder(asked.task, asked.uplink, reducer),
        asked.sampler,
        num_clients=asked.task.data.num_clients,
        delta=delta,
        rounds=min(FLAGS.rounds, FLAGS.audit_rounds),
        noise_multiplier=local_noise(),
        published=bounds_that_move(),
        params=shrunk(asked.task),
        replays=FLAGS.replays,
        confidence=FLAGS.confidence,
        seed=FLAGS.seed,
    )
    print(summary(found))
    sys.exit(1 if found.broken else 0)


def in_program(reducer: fc.reduce.Reducer | None) -> fc.reduce.Reducer | None:
    """A reducer for replays: the same result without the host's cryptography."""
    name = (FLAGS.reducer or "").split("(")[0]
    if reducer is None or name not in ("pairwise_masks", "ckks_mean"):
        return reducer
    assert reducer.denominator is not None
    print(f"{name} is replayed as the sum that it computes, without its cryptography.", file=sys.stderr)
    if reducer.threshold is None:
        return fc.reduce.fixed_mean(reducer.denominator)
    return fc.reduce.modular_sum(int(reducer.denominator), reducer.threshold)


def local_noise() -> float | None:
    """The noise multiplier of ``local_gaussian(1.0)`` in ``--uplink``, which no promise carries."""
    for call in spec.parse(FLAGS.uplink, "--uplink"):
        if call.name == "local_gaussian":
            return float((*call.args, *call.kwargs.values())[0])
    return None


def bounds_that_move() -> tuple[str, ...]:
    """The metrics with a clip's bound of the round, which is public because clients receive it."""
    calls = spec.parse(FLAGS.uplink, "--uplink")
    where = [f"{i}/" for i in range(len(calls))] if len(calls) > 1 else [""]
    return tuple(f"uplink/{i}threshold" for i, call in zip(where, calls) if call.name == "quantile_clip")


def shrunk(task: tasks.Task) -> Any:
    """The model with its leaves' names, and at most two elements along each dimension."""
    params = jax.eval_shape(task.init, seeded(0))
    return jax.tree.map(lambda x: np.zeros([min(n, 2) for n in x.shape], x.dtype), params)


NEIGHBOURS = {
    "presence": "one client's presence",
    "zeros": "one client's data, or zeros in their place",
    "data": "one client's data, or others in their place",
}


def summary(found: fc.privacy.Audit) -> str:
    """The result in words."""
    verdict = "BROKEN: less private than accounted for" if found.broken else "nothing wrong found, which is no proof"
    return "\n".join(
        [
            f"epsilon            [{found.audited:.3f}, {found.accounted:.3f}] "
            f"audited and accounted, at delta {found.delta:g}",
            f"neighbours         {NEIGHBOURS[found.neighbours]}",
            f"best attack        {found.attack}",
            f"estimator          {found.estimator}, at {FLAGS.confidence:.2%} over {found.attempts} attempts",
            f"verdict            {verdict}",
        ]
    )


HEAD = """# Planted faults

This page shows the verdicts of [the audit](privacy.md#an-audit) on planted faults and on correct configurations.
`python -m experiments.audit --mutants=docs/audit.md` wrote it.
"""
ROW = "| {} | {:.2f} | {:.2f} | {:g} | {} |"


def audit_mutants(path: str) -> bool:
    """Audits all of ``mutants``, writes the table, and returns whether the results are as expected."""
    begun, lines = time.monotonic(), [HEAD]
    counts: dict[str, tuple[int, int]] = {}
    for title, audited in (("Faults", mutants.MUTANTS), ("Correct configurations", cases.right())):
        lines += [f"\n## {title}\n", "| what | audited | accounted | at delta | found by |", "|---|---|---|---|---|"]
        broken = 0
        for name, case in audited.items():
            found = case().audit(replays=FLAGS.replays, confidence=FLAGS.confidence, seed=FLAGS.seed)
            attack = f"{found.attack}; {found.estimator}" if found.broken else "nothing"
            lines.append(ROW.format(name, found.audited, found.accounted, found.delta, attack))
            broken += found.broken
            print(lines[-1], flush=True)
        counts[title] = broken, len(audited)
    caught, wronged = counts["Faults"], counts["Correct configurations"]
    seconds = time.monotonic() - begun
    lines.insert(
        1,
        f"The audit found {caught[0]} of {caught[1]} faults, and called {wronged[0]} of {wronged[1]} correct "
        f"configurations broken, in {seconds:.0f} s. Each audit has {FLAGS.replays:,} replays of {cases.ROUNDS} "
        f"rounds with each canary, at a confidence of {FLAGS.confidence:.2%}.",
    )
    files.expanded(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(lines[1])
    return caught[0] >= CAUGHT and wronged[0] == 0


if __name__ == "__main__":
    binary.run(main, __doc__ or "", registry.describe, without=("distributed", "metric", "scores"))
