"""The values of ``--algorithm``: the library's algorithms, without the arguments that a binary fills in."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import fedjax_clip as fc
from experiments.config import outside
from experiments.config.components import Components, Make, defaulted, read, signed
from fedjax_clip.core import checks
from fedjax_clip.core.types import Algorithm

FILLED = ("server_tx", "uplink", "variate_uplink", "reducer", "gradient")


@dataclasses.dataclass(frozen=True)
class Maker:
    """An algorithm whose own arguments are known: ``(loss, client_tx, server_tx, uplink=...) -> Algorithm``."""

    make: Make
    own: Mapping[str, Any]

    def takes(self, part: str) -> bool:
        """Whether the algorithm has this argument."""
        parameters = inspect.signature(self.make).parameters
        return part in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def __call__(self, loss: Any, client_tx: Any, server_tx: Any = None, **parts: Any) -> Algorithm:
        parts |= {"server_tx": server_tx}
        made = self.make(loss, client_tx, **{name: x for name, x in parts.items() if self.takes(name)}, **self.own)
        return outside.checked(made, Algorithm, self.make.__name__)


def maker(make: Make) -> Make:
    """``make`` with the algorithm's own arguments only, by name or in order."""
    rest = list(inspect.signature(make).parameters.values())[2:]  # without the loss and the clients' optimiser
    own = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in rest if p.name not in FILLED and p.kind != p.VAR_KEYWORD]
    signature = inspect.Signature(sorted(own, key=lambda p: p.default is not p.empty))

    @functools.wraps(make)
    def build(*args: Any, **kwargs: Any) -> Maker:
        return Maker(make, signature.bind(*args, **kwargs).arguments)

    return signed(build, signature)


ALGORITHMS = Components(
    Maker,
    {
        # Left out: wrappers that a task or --downlink sets, and functions of an algorithm.
        **read(fc, Algorithm, without=("partially_frozen", "compressed_broadcast", "partially_private")),
        **{name: make for room in (fc.personal, fc.clusters, fc.fair) for name, make in read(room, Algorithm).items()},
        **read(fc.drift, Algorithm, without=("fedlc", "oort", "power_of_choice")),
        "fedbuff": defaulted(fc.fedbuff, max_staleness=10),
        "feddyn": defaulted(fc.feddyn, alpha=0.1),
    },
    maker,
)


def _wrapped(algorithm: Maker | None, wrapper: Make, *args: Any, **kwargs: Any) -> Maker:
    """The maker of a wrapped algorithm, by default of FedAvg."""
    inner = ALGORITHMS["fedavg"]() if algorithm is None else algorithm
    checks.kind("algorithm", inner, Maker, "an algorithm, such as scaffold()")

    @functools.wraps(inner.make)
    def make(*given: Any, **parts: Any) -> Algorithm:
        return wrapper(inner(*given, **parts), *args, **kwargs)

    return Maker(make, {})


def _partially_private(private: str, algorithm: Maker | None = None) -> Maker:
    """Any algorithm, FedAvg by default, for the shared parameters; each client keeps its own private ones."""
    return _wrapped(algorithm, fc.partially_private, private)


def _fedlc(temperature: float, classes: int, algorithm: Maker | None = None) -> Maker:
    """Any algorithm, FedAvg by default, whose clients calibrate their logits by their counts of the classes."""
    return _wrapped(algorithm, fc.drift.fedlc, temperature, classes=classes)


def _power_of_choice(clients: int, algorithm: Maker | None = None) -> Maker:
    """Any algorithm, FedAvg by default, in whose rounds the candidates with the largest losses train."""
    return _wrapped(algorithm, fc.drift.power_of_choice, clients)


def _oort(clients: int, population: int, algorithm: Maker | None = None, **options: Any) -> Maker:
    """Any algorithm, FedAvg by default, in whose rounds the clients train whose losses were large, or unknown."""
    return _wrapped(algorithm, fc.drift.oort, clients, population, **options)


ALGORITHMS["partially_private"] = _partially_private
ALGORITHMS["fedlc"] = _fedlc
ALGORITHMS["oort"] = _oort
ALGORITHMS["power_of_choice"] = _power_of_choice
