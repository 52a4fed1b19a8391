"""Two algorithms in training that take turns, a round each, on the same clients: what one costs more than the other."""

import pathlib
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import scipy.stats

sys.path.insert(0, str(pathlib.Path(__file__).parent / "peers"))
import tasks
from workers.fedjax_clip import to_model
from workers.paused import Paused

import fedjax_clip as fc


class Side:
    """One algorithm in training, held up after each round; ``clock`` is processors' time, or that on the wall."""

    def __init__(self, task: tasks.Task, data: fc.FederatedData, algorithm: fc.extend.Algorithm, wall: bool = False):
        self.task, self.data, self.algorithm = task, data, algorithm
        self.clock = time.perf_counter if wall else time.process_time
        self.params, self.paused = to_model(task), Paused(self._train)

    def seconds(self) -> float:
        """Of one more round; processors' time is that of all threads together, which a busy machine stretches less."""
        began = self.clock()
        self.paused.run(1)
        return self.clock() - began

    def _train(self, first_round: int, after_round: Callable[[], bool]) -> None:
        def on_round(row):
            self.paused.count += 1

        self.params = fc.train(
            *(self.algorithm, self.data, self.params),
            rounds=10**6,
            sampler=fc.data.sampling.Sampler(lambda sizes, seed, round: self.task.cohort(round)),
            batch_size=self.task.batch,
            shuffle=False,
            on_round=on_round,
            should_stop=after_round,
            rounds_per_dispatch=1,
        ).params


def compare(sides: list[Side], rounds: int) -> np.ndarray:
    """Seconds ``[rounds, 2]`` of both sides in turns, whose order changes."""
    for side in sides:
        side.paused.run(3)
    seconds = np.zeros((rounds, 2))
    for r in range(rounds):
        for i in (0, 1) if r % 2 else (1, 0):
            seconds[r, i] = sides[i].seconds()
    for side in sides:
        side.paused.stop()
    return seconds


def share(seconds: np.ndarray) -> float:
    """Of a round's time on the second side, what it takes longer than the first: median over the pairs."""
    return float(np.median(1 - seconds[:, 0] / seconds[:, 1]))


def more(seconds: np.ndarray) -> str:
    """``"12.3 ms a round  +1.0% [-0.5%, +2.1%]"``: median of the pairs' ratios, and a 95% interval by their order."""
    ratios = np.sort(seconds[:, 1] / seconds[:, 0]) - 1
    low, high = (ratios[int(i)] for i in scipy.stats.binom.interval(0.95, len(ratios) - 1, 0.5))
    return f"{1e3 * np.median(seconds[:, 0]):8.1f} ms a round   {np.median(ratios):+6.1%} [{low:+.1%}, {high:+.1%}]"


def population(name: str, tiny: bool) -> tuple[tasks.Task, fc.FederatedData]:
    """One of the peers' tasks, and its clients; says on which device."""
    print(f"JAX {jax.__version__}, {jax.local_device_count()} {jax.local_devices()[0].device_kind} device(s)")
    task = tasks.build(name, tiny)
    return task, fc.FederatedData({"x": task.x, "y": task.y}, task.offsets)
