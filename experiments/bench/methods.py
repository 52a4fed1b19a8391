"""The methods of the leaderboard, each with the numbers that are tuned."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import optax

import fedjax_clip as fc
from experiments.bench.contests import Contest
from fedjax_clip.clipping import clip_by_global_norm
from fedjax_clip.core.types import Algorithm
from fedjax_clip.training.sweeping import Range

Point = Mapping[str, Any]
RATE, CLIP = Range(0.02, 2.0, log=True), Range(0.1, 10.0, log=True)
SERVER, SMALL = Range(0.003, 0.3, log=True), Range(0.002, 0.2, log=True)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
      build: ``(contest, point) -> algorithm``; the point's values may be traced.
      knobs: the range of each number that is tuned; ``lr`` is the clients' rate.
      gradients: how many a round takes, of FedAvg's; a pass without gradients counts a third.
      note: what it is.
      several: how many models it starts from (IFCA).
      classifies: whether it needs a loss of classes (FedLC).
    """

    build: Callable[[Contest, Point], Algorithm]
    knobs: Mapping[str, Range]
    gradients: float = 1.0
    note: str = ""
    several: int = 1
    classifies: bool = False


def sgd(point: Point) -> optax.GradientTransformation:
    """The clients' SGD, clipped where a threshold is tuned."""
    plain = optax.sgd(point["lr"])
    return optax.chain(clip_by_global_norm(point["clip"]), plain) if "clip" in point else plain


def of(make: Callable[..., Algorithm], *knobs: str, **given: Any) -> Callable[[Contest, Point], Algorithm]:
    """Builds by a maker, with a point's numbers under the maker's own names."""
    return lambda contest, point: make(contest.loss, sgd(point), **{k: point[k] for k in knobs}, **given)


def _with_rate(make: Callable[..., Algorithm], *knobs: str) -> Callable[[Contest, Point], Algorithm]:
    return lambda contest, point: of(make, *knobs, rate=point["lr"])(contest, point)


def _head(make: Callable[..., Algorithm], **given: Any) -> Callable[[Contest, Point], Algorithm]:
    return lambda contest, point: make(contest.loss, sgd(point), head=contest.head, **given)


def _private(body: bool) -> Callable[[Contest, Point], Algorithm]:
    def build(contest, point):
        return fc.partially_private(fc.fedavg(contest.loss, sgd(point)), contest.body if body else contest.head)

    return build


def _fedlc(contest: Contest, point: Point) -> Algorithm:
    loss = contest.calibrated or contest.loss
    return fc.drift.fedlc(fc.fedavg(loss, sgd(point)), point["tau"], classes=contest.classes)


def _server(make: Callable[[Any], optax.GradientTransformation]) -> Callable[[Contest, Point], Algorithm]:
    return lambda contest, point: fc.fedavg(contest.loss, sgd(point), make(point["server_lr"]))


def _linked(link: Callable[[Point], fc.uplink.Uplink]) -> Callable[[Contest, Point], Algorithm]:
    return lambda contest, point: fc.fedavg(contest.loss, sgd(point), uplink=link(point))


def _proximal(contest: Contest, point: Point) -> Algorithm:
    return fc.fedavg(contest.loss, optax.chain(fc.local.proximal(point["mu"]), sgd(point)))


def _oort(contest: Contest, point: Point) -> Algorithm:
    average = fc.fedavg(contest.loss, sgd(point))
    return fc.drift.oort(average, max(1, contest.cohort // 2), contest.data.num_clients)


def _power_of_choice(contest: Contest, point: Point) -> Algorithm:
    return fc.drift.power_of_choice(fc.fedavg(contest.loss, sgd(point)), max(1, contest.cohort // 2))


def _sam(contest: Contest, point: Point) -> Algorithm:
    return fc.fedavg(contest.loss, sgd(point), gradient=fc.local.sharpness_aware(point["rho"]))


def _mgda(contest: Contest, point: Point) -> Algorithm:
    reducer = fc.reduce.min_norm(point["epsilon"])
    return fc.fedavg(contest.loss, sgd(point), optax.sgd(point["server_lr"]), reducer=reducer)


def _afl(contest: Contest, point: Point) -> Algorithm:
    return fc.fair.afl(contest.loss, sgd(point), clients=contest.data.num_clients, rate=point["rate"])


STRENGTH = {"strength": Range(0.01, 3.0, log=True)}
PLAIN, CLIPPED = {"lr": RATE}, {"lr": RATE, "clip": CLIP}

METHODS: Mapping[str, Method] = types.MappingProxyType(
    {
        "fedavg": Method(of(fc.fedavg), PLAIN, note="no clip"),
        "fedavg + clip": Method(of(fc.fedavg), CLIPPED, note="CELGC: each local step"),
        "fedavg + update clip": Method(
            _linked(lambda h: fc.uplink.clip_by_global_norm(h["bound"])),
            PLAIN | {"bound": CLIP},
            note="each client's update",
        ),
        "clip21": Method(
            _linked(lambda h: fc.uplink.memory(clip_by_global_norm(h["bound"]))),
            PLAIN | {"bound": CLIP},
            note="differences to a memory",
        ),
        "fedexp": Method(_linked(lambda h: fc.uplink.fedexp()), PLAIN, note="the server's rate from the norms"),
        "fedavgm": Method(_server(lambda lr: optax.sgd(lr, momentum=0.9)), PLAIN | {"server_lr": RATE}),
        "fedadam": Method(_server(lambda lr: fc.fedopt.fedadam(lr)), PLAIN | {"server_lr": SERVER}),
        "fedprox": Method(_proximal, PLAIN | {"mu": Range(0.001, 1.0, log=True)}),
        "fednova": Method(of(fc.fednova), PLAIN),
        "scaffold": Method(of(fc.scaffold), PLAIN),
        "scaffold + clip": Method(of(fc.scaffold), CLIPPED, note="each corrected step"),
        "episode_plus": Method(of(fc.episode_plus, "threshold"), PLAIN | {"threshold": CLIP}),
        "feddyn": Method(of(fc.feddyn, "alpha"), PLAIN | {"alpha": Range(0.001, 1.0, log=True)}),
        "mime lite": Method(of(fc.mime, lite=True), PLAIN, gradients=2.0, note="a full gradient besides"),
        "fedcm": Method(_with_rate(fc.drift.fedcm, "alpha"), PLAIN | {"alpha": Range(0.05, 1.0, log=True)}),
        "fedadamw": Method(_with_rate(fc.drift.fedadamw), {"lr": SMALL}, note="AdamW at the clients"),
        "fedmuon": Method(_with_rate(fc.drift.fedmuon), {"lr": SMALL}, note="Muon at the clients"),
        "fedsam": Method(_sam, PLAIN | {"rho": Range(0.01, 0.3, log=True)}, gradients=2.0),
        "fedlc": Method(_fedlc, PLAIN | {"tau": Range(0.1, 3.0, log=True)}, classifies=True),
        "oort": Method(_oort, PLAIN, gradients=0.67, note="half of the cohort, by earlier losses"),
        "power of choice": Method(_power_of_choice, PLAIN, gradients=0.83, note="the half with the larger loss"),
        "local": Method(of(fc.personal.ditto, strength=0.0), PLAIN, note="each client alone"),
        "fedper": Method(_private(body=False), PLAIN, note="own head"),
        "lg-fedavg": Method(_private(body=True), PLAIN, note="own body"),
        "fedrep": Method(_head(fc.personal.fedrep), PLAIN, gradients=2.0, note="own head, trained first"),
        "ditto": Method(of(fc.personal.ditto, "strength"), PLAIN | STRENGTH, gradients=2.0),
        "ditto + clip": Method(of(fc.personal.ditto, "strength"), CLIPPED | STRENGTH, gradients=2.0),
        "mr_mtl": Method(of(fc.personal.mr_mtl, "strength"), PLAIN | STRENGTH),
        "apfl": Method(of(fc.personal.apfl, "alpha"), PLAIN | {"alpha": Range(0.1, 1.0)}, gradients=2.0),
        "adaptive apfl": Method(
            of(fc.personal.apfl, "alpha_rate"), PLAIN | {"alpha_rate": Range(0.001, 0.3, log=True)}, gradients=2.0
        ),
        "fedala": Method(of(fc.personal.fedala), PLAIN, gradients=1.5, note="a mixture number by number"),
        "pfedme": Method(
            _with_rate(fc.personal.pfedme, "strength"),
            PLAIN | {"strength": Range(0.3, 30.0, log=True)},
            gradients=5.0,
        ),
        "per_fedavg": Method(
            of(fc.personal.per_fedavg, "rate"),
            PLAIN | {"rate": Range(0.003, 0.3, log=True)},
            gradients=2.0,
            note="first order; its start is judged, before the step of each client",
        ),
        "cfl": Method(
            of(fc.clusters.cfl, "stationary", "disagree", clusters=4),
            PLAIN | {"stationary": Range(0.01, 1.0, log=True), "disagree": Range(0.01, 1.0, log=True)},
            note="half of the clients come, where its paper has all",
        ),
        "ifca of 2": Method(of(fc.clusters.ifca, clusters=2), PLAIN, gradients=1.67, several=2),
        "ifca of 4": Method(of(fc.clusters.ifca, clusters=4), PLAIN, gradients=2.33, several=4),
        "q_ffl": Method(_with_rate(fc.fair.q_ffl, "q"), PLAIN | {"q": Range(0.05, 5.0, log=True)}, gradients=1.33),
        "term": Method(of(fc.fair.term, "t"), PLAIN | {"t": Range(0.05, 5.0, log=True)}, gradients=1.33),
        "afl": Method(_afl, PLAIN | {"rate": Range(0.001, 0.3, log=True)}, gradients=1.33),
        "fedmgda+": Method(_mgda, PLAIN | {"server_lr": RATE, "epsilon": Range(0.01, 1.0, log=True)}),
    }
)
