"""Accuracy against simulated time under four clocks, with the clip and without it: the table of docs/asynchrony.md.

  python benchmarks/asynchrony.py [--seeds=3] [--seconds=1500]

Digits, clients whose seconds a step (median 1) and a message (median 5) are log-normal with sigma 1, SGD at 0.5, steps
clipped at 1; evaluated after each round. A time to reach an accuracy is that of the first evaluation at it.
"""

import argparse

import jax
import numpy as np
import optax

import fedjax_clip as fc

SPEEDS = fc.data.speeds.lognormal(step=1.0, message=5.0, sigma=1.0)
CLOCKS = {
    "waiting for 4": fc.data.clock.synchronous(fc.data.sampling.uniform(4), SPEEDS),
    "waiting for 8": fc.data.clock.synchronous(fc.data.sampling.uniform(8), SPEEDS),
    "the first 4 of 6 in 30 s": fc.data.clock.synchronous(fc.data.sampling.uniform(6), SPEEDS, keep=4, deadline=30),
    "FedBuff, 8 at work": fc.data.clock.buffered(fc.data.sampling.uniform(4), SPEEDS, buffer_size=4, concurrency=8),
}


def curve(
    algorithm: fc.extend.Algorithm, clock: fc.data.clock.Clock, task: fc.tasks.Task, seed: int, seconds: float
) -> np.ndarray:
    """``[rounds, 4]``: simulated seconds, accuracy on held-out examples and on held-out forms, mean staleness."""
    rows: list[fc.extend.Row] = []
    fc.train(
        algorithm,
        task.data,
        jax.tree.map(np.asarray, task.init(jax.random.key(seed))),
        rounds=10_000,
        sampler=clock,
        seed=seed,
        evaluate=fc.evaluator(task.per_example_loss, task.evaluation),
        eval_every=1,
        on_round=rows.append,
        should_stop=lambda: rows[-1]["simulated_seconds"] > seconds,
    )
    names = ("simulated_seconds", "eval/examples/accuracy", "eval/clients/accuracy", "staleness")
    return np.array([[row.get(name, 0.0) for name in names] for row in rows if row["simulated_seconds"] <= seconds])


def readings(rows: np.ndarray) -> list[float]:
    """A row of the table for one seed."""
    seconds, accuracy, forms, staleness = rows.T
    reached = [seconds[accuracy >= level][:1] for level in (0.9, 0.95)]
    at = [accuracy[seconds <= moment][-1] for moment in (100, 800)]
    return [len(rows), *(x[0] if len(x) else np.nan for x in reached), *at, accuracy[-1], forms[-1], staleness.mean()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1500)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    task = fc.tasks.digits()
    columns = ("steps", "s to 90%", "s to 95%", "at 100 s", "at 800 s", "at the end", "held-out forms", "staleness")
    print(f"| rounds | clip | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for name, clock in CLOCKS.items():
        for clipped in (True, False):
            steps = optax.chain(*[fc.clipping.clip_by_global_norm(1.0)][: int(clipped)], optax.sgd(0.5))
            if name.startswith("FedBuff"):
                algorithm = fc.fedbuff(task.per_example_loss, steps, max_staleness=10)
            else:
                algorithm = fc.fedavg(task.per_example_loss, steps, reducer=fc.reduce.uniform_mean())
            found = [
                readings(curve(algorithm, clock, task, seed, arguments.seconds)) for seed in range(arguments.seeds)
            ]
            cells = [f"{min(f[0] for f in found)} to {max(f[0] for f in found)}"]
            for i, values in enumerate(zip(*[f[1:] for f in found], strict=True)):
                digits = 0 if i < 2 else 3
                cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}")
            print(f"| {name} | {'yes' if clipped else 'no'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
