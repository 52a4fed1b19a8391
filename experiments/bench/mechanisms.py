"""The noise mechanisms that PrivacyBench compares, a line each."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import optax

import fedjax_clip as fc
from experiments.bench.core import command
from experiments.bench.core.problem import Track
from experiments.bench.core.rule import STEP, Rule
from experiments.bench.core.tuning import Point, Range
from experiments.config import outside, spec
from experiments.config.components import Components, Make, later
from experiments.config.registry import IN_UPLINKS
from fedjax_clip.core.loss import batch_gradient
from fedjax_clip.core.types import InvalidInput, PerExampleLoss

BITS = 0.05  # share of a round's privacy cost for quantile_clip's bits; updates get the rest
GROUPS = 3  # of cyclic samples, and the bands that go with them
SERVER, CLIENT, RECORD = "a client's presence", "a client's data, from the server too", "a record, from the server too"
SUMS = "a client's data, from who sees sums"


@dataclasses.dataclass(frozen=True)
class Private:
    """A way of adding noise.

    Attributes:
      link: ``(bound, noise multiplier, track) -> uplink``.
      noise: ``(epsilon, track, delta) -> noise multiplier``, as ``link`` and ``gradient`` take it.
      sampler: ``cohort_size -> sampler``.
      protects: the guarantee: what it covers, and from whom.
      note: what it is.
      gradient: ``(bound on a gradient, noise multiplier) -> gradient`` of a client's batch.
      thresholds: where the bound is searched, if it is one of something else than a client's gradient.
    """

    link: Callable[[Any, Any, Track], fc.uplink.Uplink]
    noise: Callable[[float, Track, float], float]
    sampler: Callable[[int], fc.data.sampling.Sampler]
    protects: str
    note: str
    gradient: Callable[[Any, Any], Any] = lambda bound, z: batch_gradient
    thresholds: Range | None = None

    def algorithm(self, loss: PerExampleLoss, point: Point, track: Track) -> fc.extend.Algorithm:
        """FedAvg with this noise."""
        rate, bound, z = point["client_lr"], point["threshold"], point["noise"]
        link = self.link(bound * rate if self.thresholds is None else bound, z, track)
        parts = {"uplink": link, "reducer": reducer(link, track), "gradient": self.gradient(bound, z)}
        return fc.fedavg(loss, optax.sgd(rate), **parts)

    def rules(self, track: Track, noise: Sequence[float]) -> list[Rule]:
        """A rule of two knobs for each noise multiplier; they share a program."""
        ranges = {} if self.thresholds is None else {"threshold": self.thresholds}

        def build(loss: PerExampleLoss, point: Point) -> fc.extend.Algorithm:
            return self.algorithm(loss, point, track)

        return [Rule(build, STEP, ranges, note=self.note, fixed={"noise": z}) for z in noise]


def reducer(link: fc.uplink.Uplink, track: Track) -> fc.reduce.Reducer:
    """The reducer for a link's messages; on a grid it needs the whole cohort."""
    if link.promises.grid:
        return fc.reduce.modular_sum(track.cohort_size, threshold=track.cohort_size)
    return (
        fc.reduce.fixed_mean(track.cohort_size)
        if link.promises.noise is fc.uplink.Noise.SERVER
        else fc.reduce.uniform_mean()
    )


MakeMechanism = Callable[[Track], fc.uplink.mechanism.Mechanism | None]


def _clipped(bound: Any, noise: fc.uplink.Uplink) -> fc.uplink.Uplink:
    return fc.uplink.chain(fc.uplink.clip_by_global_norm(bound), noise)


def _solve(epsilon: float, track: Track, delta: float, mechanism: MakeMechanism = lambda track: None) -> float:
    sampler, clients, made = track.sampler(track.cohort_size), track.data.num_clients, mechanism(track)
    return fc.privacy.noise_multiplier(epsilon, sampler, clients, track.rounds, delta, mechanism=made)


def _central(sampler: Callable, note: str, mechanism: MakeMechanism = lambda track: None) -> Private:
    def link(bound, z, track):
        return _clipped(bound, fc.uplink.gaussian(z, mechanism=mechanism(track)))

    return Private(link, functools.partial(_solve, mechanism=mechanism), sampler, SERVER, note)


def _on_grid(make: Callable[..., fc.uplink.Uplink], note: str) -> Private:
    def link(bound, z, track):
        return _clipped(bound, make(z))

    def noise(epsilon, track, delta):
        def curve(z):
            return fc.privacy.distributed(link(1.0, z, track), track.start(0), reducer(link(1.0, z, track), track))

        sampler, clients = TURNS(track.cohort_size), track.data.num_clients
        return fc.privacy.noise_multiplier(epsilon, sampler, clients, track.rounds, delta, curve=curve)

    return Private(link, noise, TURNS, SUMS, note)


def _quantile(bound: Any, z: Any, track: Track) -> fc.uplink.Uplink:
    bits_noise = z * math.sqrt((1 - BITS) / BITS) / 2  # a bit minus one half has sensitivity one half
    return fc.uplink.chain(fc.uplink.quantile_clip(bound, 0.5, 0.2, bits_noise), fc.uplink.gaussian(z))


def _scaled(bound: Any, z: Any, track: Track) -> fc.uplink.Uplink:
    return fc.uplink.chain(fc.uplink.preconditioned(0.9, eps=0.01), _clipped(bound, fc.uplink.gaussian(z)))


def _apart(track: Track) -> int:
    return min(track.rounds, track.data.num_clients // track.cohort_size)


def _tree(track: Track) -> fc.uplink.mechanism.Mechanism:
    return fc.uplink.mechanism.tree(track.rounds)


def _banded(track: Track) -> fc.uplink.mechanism.Mechanism:
    return fc.uplink.mechanism.banded(track.rounds, _apart(track))


def _few_bands(track: Track) -> fc.uplink.mechanism.Mechanism:
    return fc.uplink.mechanism.banded(track.rounds, GROUPS)


def _inverse(track: Track) -> fc.uplink.mechanism.Mechanism:
    return fc.uplink.mechanism.banded_inverse(_apart(track))


def _blt(track: Track) -> fc.uplink.mechanism.Mechanism:
    return fc.uplink.mechanism.blt(track.rounds, _apart(track), buffers=2)


POISSON, TURNS, BINS = fc.data.sampling.poisson, fc.data.sampling.round_robin, fc.data.sampling.balls_in_bins


def cyclic_poisson(cohort_size: int) -> fc.data.sampling.Sampler:
    """Poisson samples of one group after the other."""
    return fc.data.sampling.cyclic_poisson(cohort_size, GROUPS)


def truncated_poisson(cohort_size: int) -> fc.data.sampling.Sampler:
    """Poisson samples with room for half as many more as are expected."""
    return fc.data.sampling.truncated_poisson(cohort_size, cohort_size + cohort_size // 2)


MECHANISMS: dict[str, Private] = {
    "gaussian": _central(POISSON, "DP-FedAvg: fixed clip, independent noise"),
    "quantile": Private(
        _quantile,
        lambda *args: _solve(*args) / math.sqrt(1 - BITS),
        POISSON,
        SERVER,
        "the same, the bound following the median of the norms from where it is tuned, its bits noised",
    ),
    "scaled": Private(
        _scaled,
        lambda *args: _solve(*args),
        POISSON,
        SERVER,
        "the same, scale-then-privatise: the bound is on updates over their root mean squares",
        thresholds=Range(1.0, 300.0),
    ),
    "truncated": _central(truncated_poisson, "the same, in cohorts of 3/2 of the expected size at most"),
    "gaussian in bins": _central(BINS, "the same, each client in its bin's turns"),
    "amplified bands": _central(cyclic_poisson, f"DP-MF: {GROUPS} bands, samples of {GROUPS} groups", _few_bands),
    "bands in bins": _central(BINS, "DP-MF: as many bands as bins, each client in its bin's turns", _banded),
    "gaussian in turn": _central(TURNS, "DP-FedAvg without sampling"),
    "tree": _central(TURNS, "DP-FTRL: one tree over all rounds", _tree),
    "banded": _central(TURNS, "DP-MF: as many bands as rounds between a client's", _banded),
    "banded inverse": _central(TURNS, "DP-MF: the inverse has as many bands", _inverse),
    "blt": _central(TURNS, "DP-MF: two buffers", _blt),
    "discrete gaussian": _on_grid(fc.uplink.discrete_gaussian, "each client's share of the noise, as integers"),
    "skellam": _on_grid(fc.uplink.skellam, "the same, of the other distribution"),
    "local": Private(
        lambda bound, z, track: _clipped(bound, fc.uplink.local_gaussian(z)),
        lambda *args: 2 * _solve(*args),
        TURNS,
        CLIENT,
        "each client's own noise: twice the multiplier, as any change of its data counts",
    ),
    "records": Private(
        lambda bound, z, track: fc.uplink.identity(),
        _solve,
        TURNS,
        RECORD,
        "DP-SGD at each client, all its records in one batch; the bound is on a record's gradient",
        gradient=lambda bound, z: fc.local.private_gradient(bound, z),
    ),
}


def named(names: Sequence[str]) -> dict[str, Private]:
    """The mechanisms of these names; one with a dot is made of a function of ``--import``'s, see ``from_outside``.

    Raises:
      InvalidInput: a name that no mechanism has, or no name at all.
    """
    command.check_names("--mechanisms", "mechanism", names, MECHANISMS)
    own = Components(Private, {}, from_outside)
    return {n: MECHANISMS[n] if n in MECHANISMS else spec.one(n, own, "--mechanisms", IN_UPLINKS) for n in names}


def from_outside(make: Make) -> Callable[..., Private]:
    """``(own arguments) -> mechanism`` of a function from outside of the repository, by its first argument.

    ``(rounds, ...)``: a ``Mechanism`` of the noise on the sum, for clients in turn. ``(threshold, ...)``: a clip of the
    update, as an optax transform or a link that promises a bound; independent Gaussian noise follows it.
    """
    name, takes = make.__name__, list(inspect.signature(make).parameters)
    note, *_ = (inspect.getdoc(make) or "–").splitlines()
    if not takes:
        raise InvalidInput(f"--mechanisms: {name} must take (rounds) or (threshold), and it takes nothing.")
    own = later(make, 1)

    def private(*args: Any, **kwargs: Any) -> Private:
        build = own(*args, **kwargs)

        def mechanism(track: Track) -> fc.uplink.mechanism.Mechanism:
            return outside.checked(build(track.rounds), fc.uplink.mechanism.Mechanism, name)

        def link(bound: Any, z: Any, track: Track) -> fc.uplink.Uplink:
            clip = outside.checked(build(bound), (optax.GradientTransformation, fc.uplink.Uplink), name)
            clip = clip if isinstance(clip, fc.uplink.Uplink) else fc.uplink.at_client(clip)
            if clip.promises.noise is not None:
                raise InvalidInput(
                    f"--mechanisms: {name} adds noise of its own: give the clip alone, noise follows it."
                )
            return fc.uplink.chain(clip, fc.uplink.gaussian(z))

        if takes[0] == "rounds":
            outside.checked(build(8), fc.uplink.mechanism.Mechanism, name)
            return _central(TURNS, note, mechanism)
        probe: Any = None
        link(1.0, 1.0, probe)  # says now what is wrong
        return Private(link, _solve, POISSON, f"{SERVER}, if the bound holds that it promises", note)

    return functools.wraps(own)(private)


def sampled_by(track: Track, private: Private) -> Track:
    """The problem with the mechanism's cohorts."""
    return dataclasses.replace(track, sampler=private.sampler)
