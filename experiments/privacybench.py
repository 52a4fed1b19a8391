"""Accuracy against epsilon, for each way of adding noise: one run of every mechanism, epsilon and seed.

  python -m experiments.privacybench --quick
  python -m experiments.privacybench

The working directory gets results.jsonl (a line for each mechanism, with all its epsilons), report.md and a picture.
Stopped in any way, the same command goes on where it was.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import flags

import fedjax_clip as fc
from experiments import binary, rundir
from experiments.clipbench_lanes import fingerprint, plan, run
from experiments.clipbench_tracks import Measure, Run, Track
from experiments.entries import Results
from experiments.rules import Rule
from experiments.standings import interval
from fedjax_clip import checks, files
from fedjax_clip.local import batch_gradient
from fedjax_clip.typing import InvalidInput, PerExampleLoss

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, math.inf)
RATE = 0.5  # of a client's one step
BOUND = 0.3  # of an update
EXAMPLE = 1.0  # of an example's gradient
BITS = 0.05  # share of quantile_clip's bits in what a round costs, the updates having the rest
SERVER, CLIENT, RECORD = "a client's presence", "a client's data, from the server too", "a record, from the server too"
SUMS = "a client's data, from who sees sums"


@dataclasses.dataclass(frozen=True)
class Private:
    """A way of adding noise.

    Attributes:
      link: ``(noise multiplier, track) -> uplink``.
      noise: ``(epsilon, track, delta) -> noise multiplier``, as ``link`` and ``gradient`` take it.
      sampler: ``cohort_size -> sampler``.
      protects: what epsilon is for, and from whom.
      note: what it is.
      gradient: ``noise multiplier -> gradient`` of a client's batch.
    """

    link: Callable[[Any, Track], fc.Uplink]
    noise: Callable[[float, Track, float], float]
    sampler: Callable[[int], fc.sampling.Sampler]
    protects: str
    note: str
    gradient: Callable[[Any], Any] = lambda z: batch_gradient

    def algorithm(self, loss: PerExampleLoss, z: Any, track: Track) -> fc.Algorithm:
        """FedAvg with this noise."""
        link = self.link(z, track)
        parts = {"uplink": link, "reducer": reducer(link, track), "gradient": self.gradient(z)}
        return fc.fedavg(loss, optax.sgd(RATE), **parts)


def reducer(link: fc.Uplink, track: Track) -> fc.Reducer:
    """What adds the messages of a link; on a grid only those of a whole cohort."""
    if link.promises.grid:
        return fc.reduce.modular_sum(track.cohort_size, threshold=track.cohort_size)
    return fc.fixed_mean(track.cohort_size) if link.promises.noise is fc.uplink.Noise.SERVER else fc.uniform_mean()


MakeMechanism = Callable[[Track], fc.mechanism.Mechanism | None]


def _clipped(noise: fc.Uplink) -> fc.Uplink:
    return fc.uplink.chain(fc.uplink.clip_by_global_norm(BOUND), noise)


def _solve(epsilon: float, track: Track, delta: float, mechanism: MakeMechanism = lambda track: None) -> float:
    sampler, clients, made = track.sampler(track.cohort_size), track.data.num_clients, mechanism(track)
    return fc.privacy.noise_multiplier(epsilon, sampler, clients, track.rounds, delta, mechanism=made)


def _central(sampler: Callable, note: str, mechanism: MakeMechanism = lambda track: None) -> Private:
    def link(z, track):
        return _clipped(fc.uplink.gaussian(z, mechanism=mechanism(track)))

    return Private(link, functools.partial(_solve, mechanism=mechanism), sampler, SERVER, note)


def _on_grid(make: Callable[..., fc.Uplink], note: str) -> Private:
    def link(z, track):
        return _clipped(make(z))

    def noise(epsilon, track, delta):
        def curve(z):
            return fc.privacy.distributed(link(z, track), track.start(0), reducer(link(z, track), track))

        sampler, clients = TURNS(track.cohort_size), track.data.num_clients
        return fc.privacy.noise_multiplier(epsilon, sampler, clients, track.rounds, delta, curve=curve)

    return Private(link, noise, TURNS, SUMS, note)


def _quantile(z: Any, track: Track) -> fc.Uplink:
    bits_noise = z * math.sqrt((1 - BITS) / BITS) / 2  # a bit minus one half has sensitivity one half
    return fc.uplink.chain(fc.uplink.quantile_clip(0.1, 0.5, 0.2, bits_noise), fc.uplink.gaussian(z))


def _tree(track: Track) -> fc.mechanism.Mechanism:
    return fc.mechanism.tree(track.rounds)


def _banded(track: Track) -> fc.mechanism.Mechanism:
    return fc.mechanism.banded(track.rounds, min(track.rounds, track.data.num_clients // track.cohort_size))


POISSON, TURNS = fc.sampling.poisson, fc.sampling.round_robin
MECHANISMS: dict[str, Private] = {
    "gaussian": _central(POISSON, "DP-FedAvg: fixed clip, independent noise"),
    "quantile": Private(
        _quantile,
        lambda *args: _solve(*args) / math.sqrt(1 - BITS),
        POISSON,
        SERVER,
        "the same, the bound following the median of the norms, its bits noised",
    ),
    "gaussian in turn": _central(TURNS, "DP-FedAvg without sampling"),
    "tree": _central(TURNS, "DP-FTRL: one tree over all rounds", _tree),
    "banded": _central(TURNS, "DP-FTRL: as many bands as rounds between a client's", _banded),
    "discrete gaussian": _on_grid(fc.uplink.discrete_gaussian, "each client's share of the noise, as integers"),
    "skellam": _on_grid(fc.uplink.skellam, "the same, of the other distribution"),
    "local": Private(
        lambda z, track: _clipped(fc.uplink.local_gaussian(z)),
        lambda *args: 2 * _solve(*args),
        TURNS,
        CLIENT,
        "each client's own noise: twice the multiplier, as any change of its data counts",
    ),
    "records": Private(
        lambda z, track: fc.uplink.identity(),
        _solve,
        TURNS,
        RECORD,
        "DP-SGD at each client, all its records in one batch",
        gradient=lambda z: fc.private_gradient(EXAMPLE, z),
    ),
}


def sampled_by(track: Track, private: Private) -> Track:
    """The problem with the mechanism's cohorts."""
    return dataclasses.replace(track, sampler=private.sampler)


def problem(quick: bool) -> Track:
    """Fashion-MNIST at 14 x 14 pixels, dealt to clients of 20 pictures; a linear classifier.

    Raises:
      InvalidInput: the data are not here.
    """
    clients, size, rounds = (40, 10, 4) if quick else (600, 20, 60)

    def halved(split, count):
        found = fc.sources.fashion_mnist(split)
        x = found["x"][:count].reshape(-1, 14, 2, 14, 2).astype(np.float32).mean((2, 4)).reshape(-1, 196)
        return {"x": x / 255 - 0.25, "y": found["y"][:count]}

    train, test = halved("train", size * clients), halved("test", 10_000)

    def loss(params, batch, key):
        logits = batch["x"] @ params["w"] + params["b"]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses, {"accuracy": (logits.argmax(-1) == batch["y"]).astype(jnp.float32)}

    return Track(
        "fashion_mnist",
        fc.partition.iid(train, clients, seed=0),
        loss,
        lambda seed: {"w": np.zeros((196, 10), np.float32), "b": np.zeros(10, np.float32)},
        {"accuracy": Measure(lambda params, _: jnp.mean(loss(params, test, None)[1]["accuracy"]), window=1)},
        ranges={},
        rounds=rounds,
        cohort_size=clients // 10,
        work=fc.LocalWork(batch_size=20),
        accuracy=True,
    )


def bench(
    names: Sequence[str],
    epsilons: Sequence[float],
    seeds: int,
    workdir: str | pathlib.Path,
    quick: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Runs each mechanism at each epsilon, unless the working directory has it already, and writes the report.

    Returns:
      How many mechanisms were run.

    Raises:
      InvalidInput: an unknown mechanism, no seeds, an epsilon that is not positive, a directory that cannot be written.
    """
    for name in names:
        if name not in MECHANISMS:
            raise InvalidInput(f"--mechanisms: unknown {name!r} (valid: {', '.join(MECHANISMS)}).")
    checks.count("--seeds", seeds)
    if not epsilons or not all(e > 0 for e in epsilons):
        raise InvalidInput("--epsilons must be positive numbers, inf among them if you like.")
    results, track = Results(files.expanded(workdir)), problem(quick)
    delta = float(f"{track.data.num_clients**-1.1:.0e}")
    found, done = {}, 0
    for name in tqdm.tqdm(names, unit="mechanism", dynamic_ncols=True):
        private = MECHANISMS[name]
        own = sampled_by(track, private)
        noise = [private.noise(e, own, delta) if math.isfinite(e) else 0.0 for e in epsilons]

        def build(loss, point, private=private, own=own):
            return private.algorithm(loss, point["noise"], own)

        rule = Rule(build, ("noise",))
        config = {"program": fingerprint(own, rule), "noise": noise, "seeds": seeds, "delta": delta}
        entry = results.find(own, name, config)
        if entry is None and not should_stop():
            bank = plan(own, [Run(seed) for seed in range(seeds)])
            outcome = run(own, rule, [{"noise": z} for z in noise], bank)
            accuracy = np.where(outcome.diverged, 0, outcome.measured["accuracy"])
            entry = {"track": own.name, "rule": name, "config": config, "accuracy": accuracy.tolist()}
            results.add(entry | {"seconds": outcome.compile_seconds + outcome.run_seconds})
            done += 1
        if entry is not None:
            found[name] = np.array(entry["accuracy"]), noise
    rundir.save_picture(results.path / "accuracy.png", draw(found, epsilons))
    files.write(results.path / "report.md", report(track, found, epsilons, delta, seeds, quick))
    print(f"{done} run, {len(found) - done} found; see {results.path / 'report.md'}")
    return done


Found = dict[str, tuple[np.ndarray, list[float]]]


def report(track: Track, found: Found, epsilons: Sequence[float], delta: float, seeds: int, quick: bool) -> str:
    """The page: a table of accuracies, one of noise multipliers, and how to read them."""
    shown = ["none" if math.isinf(e) else f"{e:g}" for e in epsilons]
    lines = [
        "# PrivacyBench",
        "",
        f"**Accuracy against epsilon**{' (quick: too few rounds to say)' if quick else ''}",
    ]
    lines += ["", "![accuracy against epsilon](accuracy.png)", ""]
    lines += [
        f"Fashion-MNIST at 14 x 14 pixels, a linear classifier of 1970 parameters, {track.data.num_clients} clients of "
        f"{track.data.sizes[0]} pictures each, {track.cohort_size} in each of {track.rounds} rounds, one local step at "
        f"rate {RATE:g}; updates are clipped to {BOUND:g} (`quantile`: to the bound that it follows; "
        f"`records`: examples' gradients to {EXAMPLE:g}, which costs accuracy before any noise does), and delta is "
        f"{delta:g}. Accuracy on the test split after the last round: mean of {seeds} seeds and half a 95% interval. "
        "Nothing but the noise differs along a row, and nothing is tuned for a column. Epsilons in different units of "
        "the second column are different promises, and no row is better than another for them.",
        "",
    ]
    head = ["mechanism", "epsilon is for", "cohorts", *(f"ε = {e}" for e in shown)]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, (values, _) in found.items():
        centre, low, _high = interval(values)
        cells = [f"{c:.3f} ± {c - lo:.3f}" for c, lo in zip(centre, low, strict=True)]
        private = MECHANISMS[name]
        lines.append(f"| {name} | {private.protects} | {private.sampler.__name__} | " + " | ".join(cells) + " |")
    lines += ["", "Noise multipliers (of the sum over the bound; of each client's own for `local` and `records`):", ""]
    head = ["mechanism", "is", *(f"ε = {e}" for e in shown)]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, (_, noise) in found.items():
        lines.append(f"| {name} | {MECHANISMS[name].note} | " + " | ".join(f"{z:.3g}" for z in noise) + " |")
    return "\n".join(lines) + "\n"


def draw(found: Found, epsilons: Sequence[float]) -> Any:
    """Accuracy against epsilon, a line for each mechanism; without noise at the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    finite = [e for e in epsilons if math.isfinite(e)]
    places = [e if math.isfinite(e) else 2 * max(finite, default=1.0) for e in epsilons]
    for number, (name, (values, _)) in enumerate(found.items()):
        centre, low, high = interval(values)
        axes.plot(places, centre, f"C{number}", marker="o", ms=3, lw=1.4, label=name)
        axes.fill_between(places, low, high, color=f"C{number}", alpha=0.12, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, ["no noise" if math.isinf(e) else f"{e:g}" for e in epsilons])
    axes.set_xlabel("epsilon")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def define_flags() -> None:
    """Defines the flags; not on import, for other binaries have flags of the same names."""
    flags.DEFINE_list("mechanisms", None, "Mechanisms to compare; by default all.")
    shown = ",".join(f"{e:g}" for e in EPSILONS)
    flags.DEFINE_list("epsilons", None, f"Epsilons, inf for no noise; by default {shown}.")
    flags.DEFINE_integer("seeds", 5, "Seeds of each.")
    flags.DEFINE_string("workdir", "runs/privacybench", "Where results and report are written.")
    flags.DEFINE_boolean("quick", False, "Few clients and rounds: to see that it runs.")


def main() -> None:
    """Runs what the flags say."""
    values = flags.FLAGS
    binary.configure_jax(1)
    try:
        epsilons = EPSILONS if values.epsilons is None else [float(e) for e in values.epsilons]
    except ValueError:
        raise InvalidInput(f"--epsilons: {','.join(values.epsilons)!r} are not numbers.") from None
    stopping = binary.Stopping()
    bench(values.mechanisms or list(MECHANISMS), epsilons, values.seeds, values.workdir, values.quick, stopping)
    stopping.leave()


def describe() -> str:
    """All mechanisms, for ``--help``."""
    return "\n".join(["Mechanisms:", *(f"    {name:<18} {private.note}" for name, private in MECHANISMS.items())])


if __name__ == "__main__":
    define_flags()
    binary.run(main, __doc__ or "", describe)
