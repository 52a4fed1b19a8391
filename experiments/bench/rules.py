"""The rules that ClipBench compares: clips, and algorithms that clip, each one line."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

import fedjax_clip as fc
from experiments.bench.core import command
from experiments.bench.core.rule import PLAIN, RATE, RATES, SERVER, STEP, Build, Rule
from experiments.bench.core.tuning import Range
from experiments.config import outside, spec
from experiments.config.algorithms import ALGORITHMS, Maker, maker
from experiments.config.components import Components, Make, later, signed
from experiments.config.registry import IN_UPLINKS
from fedjax_clip import clipping, uplink
from fedjax_clip.core.types import InvalidInput

Clip = Callable[[Any], optax.GradientTransformation]
TUNED = type("Tuned", (), {"__repr__": lambda self: "tuned"})()  # stands for an argument that is a knob


def _stepwise(make: Clip, keep: bool = False) -> Build:
    """FedAvg whose local steps go through ``make(threshold)``; ``keep``: clients keep its state between rounds."""

    def build(loss, point):
        tx = optax.chain(make(point.get("threshold")), optax.sgd(point["client_lr"]))
        return fc.fedavg(loss, tx, keep_opt_state=keep)

    return build


def _linked(make: Callable[[Any], fc.uplink.Uplink], scaled: bool = True) -> Build:
    """FedAvg whose updates go through a link, and are the server's step times its rate.

    Scaled: through ``make(client_lr * threshold)``, so that the threshold is on a SUM of gradients.
    """

    def build(loss, point):
        link = make(point["threshold"] * (point["client_lr"] if scaled else 1) if "threshold" in point else None)
        return fc.fedavg(loss, _sgd(point), _server(point), uplink=link)

    return build


def _clipped_sgd(point: Mapping[str, Any]) -> optax.GradientTransformation:
    return optax.chain(clipping.clip_by_global_norm(point["threshold"]), optax.sgd(point["client_lr"]))


def _sgd(point: Mapping[str, Any]) -> optax.GradientTransformation:
    return optax.sgd(point["client_lr"])


def _server(point: Mapping[str, Any]) -> optax.GradientTransformation:
    return optax.sgd(point["server_lr"])


def _episode(fresh: int | None) -> Build:
    return lambda loss, p: fc.episode(loss, _sgd(p), threshold=p["threshold"], fresh_batches=fresh)


def _prox(loss, point):
    return fc.fedavg(loss, optax.chain(fc.local.proximal(0.1), _clipped_sgd(point)))


_TARGETS = {"threshold": Range(0.05, 0.95, log=False)}
_PERCENTILES = {"threshold": Range(2.0, 98.0, log=False)}
_SCORES = {"threshold": Range(0.25, 4.0)}
_RATIOS = {"threshold": Range(0.003, 10.0)}

RULES: dict[str, Rule] = {
    "fedavg": PLAIN,
    "fedavg_server": Rule(
        lambda loss, p: fc.fedavg(loss, _sgd(p), _server(p)), RATES, note="no clip; the server's step has a rate, too"
    ),
    "celgc": Rule(_stepwise(clipping.clip_by_global_norm), note="each local step"),
    "clipped_update": Rule(
        _linked(uplink.clip_by_global_norm), SERVER, note="the sum of a round's gradients (FAT-Clipping-PR)"
    ),
    "clipped_minibatch": Rule(
        lambda loss, p: fc.fedsgd(loss, optax.sgd(1.0), _clipped_sgd(p)),
        note="the mean gradient, in one server step a round at the rate",
    ),
    "coordinate": Rule(_stepwise(clipping.clip_by_value), note="each element of each local step; knob: its bound"),
    "normalised": Rule(_stepwise(clipping.normalised), note="each local step has the threshold's length"),
    "smoothed": Rule(_stepwise(lambda c: clipping.smoothed_clip(c, c)), note="each local step: C g / (C + |g|)"),
    "delta": Rule(_stepwise(lambda c: clipping.delta_clip(c, 0.1)), note="each local step, to no less than a tenth"),
    "u_clip": Rule(
        _stepwise(lambda c: clipping.u_clip(clipping.clip_by_global_norm(c)), keep=True),
        note="each local step; what is cut off is carried on, from round to round too",
    ),
    "layer": Rule(_stepwise(lambda c: clipping.clip(c, scope=clipping.layer())), note="each layer of each local step"),
    "autoclip": Rule(
        _stepwise(lambda percent: clipping.auto_clip(percent, window=50), keep=True),
        ranges=_PERCENTILES,
        note="each local step; knob: percentile of the client's last 50 norms",
    ),
    "zclip": Rule(
        _stepwise(clipping.z_clip, keep=True), ranges=_SCORES, note="each local step; knob: z-score of its norm"
    ),
    "agc": Rule(
        _stepwise(clipping.adaptive_gradient_clip),
        ranges=_RATIOS,
        note="each unit of each local step; knob: ratio to the norm of its weights",
    ),
    "quantile_clip": Rule(
        _linked(lambda target: uplink.quantile_clip(0.1, target, 0.2), scaled=False),
        SERVER,
        _TARGETS,
        note="the update; knob: fraction of updates that shall pass unclipped",
    ),
    "zeroing_quantile": Rule(
        _linked(lambda target: uplink.chain(uplink.zeroing(), uplink.quantile_clip(1.0, target, 0.2)), scaled=False),
        SERVER,
        _TARGETS,
        note="as quantile_clip, far outliers zeroed before",
    ),
    "centered": Rule(
        _linked(lambda bound: uplink.chain(uplink.relative_to_last(), uplink.clip_by_global_norm(bound))),
        SERVER,
        note="the update's difference to the last aggregate",
    ),
    "clip21": Rule(
        _linked(lambda bound: uplink.memory(clipping.clip_by_global_norm(bound))),
        SERVER,
        note="the update's difference to what the client sent before",
    ),
    "clip21_sgd2m": Rule(
        _linked(lambda bound: uplink.memory(clipping.clip_by_global_norm(bound), 0.5, 0.5)),
        SERVER,
        note="as clip21, with both momenta 0.5",
    ),
    "normec": Rule(
        _linked(lambda bound: uplink.memory(clipping.smoothed_clip(bound, bound))),
        SERVER,
        note="as clip21, with a smoothed clip",
    ),
    "unclipped_memory": Rule(
        lambda loss, p: fc.fedavg(loss, _sgd(p), _server(p), uplink=uplink.memory(uplink.identity())),
        RATES,
        note="no clip: the mean over all clients of what each sent last",
    ),
    "episode": Rule(
        _episode(1),
        fresh=1,
        note="all steps of a round, if the mean gradient at its start, on one fresh batch, is over the threshold",
    ),
    "episode_full": Rule(_episode(None), passes=2, note="as episode, with that gradient on all of the round's batches"),
    "episode_plus": Rule(
        lambda loss, p: fc.episode_plus(loss, _sgd(p), _server(p), threshold=p["threshold"]),
        SERVER,
        note="as episode, with gradients stored from the clients' last rounds",
    ),
    "scaffold": Rule(lambda loss, p: fc.scaffold(loss, _sgd(p), _server(p)), RATES, note="no clip"),
    "scaffold_clip": Rule(
        lambda loss, p: fc.scaffold(loss, _clipped_sgd(p), _server(p)), SERVER, note="each corrected local step"
    ),
    "fedprox_clip": Rule(_prox, note="each local step, with FedProx's pull of 0.1"),
    "fednova_clip": Rule(lambda loss, p: fc.fednova(loss, _clipped_sgd(p)), note="each local step"),
    "mimelite_clip": Rule(
        lambda loss, p: fc.mime(loss, _clipped_sgd(p), lite=True),
        passes=2,
        note="each local step with the server's momentum of 0.9",
    ),
}


def named(names: Sequence[str], rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules of these names; one with a dot is made of a function of ``--import``'s, see ``from_outside``.

    Raises:
      InvalidInput: a name that no rule has, or no name at all.
    """
    command.check_names("--rules", "rule", names, rules)
    own = Components(Rule, {}, from_outside)
    nested = {**ALGORITHMS, **IN_UPLINKS}
    return {name: rules[name] if name in rules else spec.one(name, own, "--rules", nested) for name in names}


def from_outside(make: Make) -> Callable[..., Rule]:
    """``(own arguments) -> rule`` of a function from outside of the repository, by what the function takes.

    ``(loss, client_tx, ...)``: an algorithm. Its knob is the clients' rate, and the server's if it takes ``server_tx``.
    ``(loss, point, ...)``: an algorithm that takes the numbers ``client_lr`` and ``threshold`` from the point itself.
    ``(threshold, ...)``: a clip of each local step if it returns an optax transform, or of the update if it returns a
    link. The threshold is tuned, unless a flag gives it: then only rates are.

    Raises:
      InvalidInput: a function of something else.
    """
    takes, name = inspect.signature(make).parameters, make.__name__
    note, *_ = (inspect.getdoc(make) or "–").splitlines()
    if list(takes)[1:2] == ["client_tx"]:
        return _wrapped(maker(make), lambda algorithm: _of_algorithm(algorithm, "server_tx" in takes, note))
    if list(takes)[1:2] == ["point"]:
        return _wrapped(
            later(make, 2),
            lambda build: Rule(lambda loss, p: outside.checked(build(loss, p), fc.extend.Algorithm, name), note=note),
        )
    if not takes or [p for p in list(takes.values())[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]:
        raise InvalidInput(
            f"--rules: {name} must take (loss, client_tx), (loss, point) or (threshold), not ({', '.join(takes)})."
        )
    return _of_clip(make, note)


def _wrapped(make: Make, convert: Callable[[Any], Rule]) -> Callable[..., Rule]:
    build = functools.wraps(make)(lambda *args, **kwargs: convert(make(*args, **kwargs)))
    return signed(build, inspect.signature(make))


def _of_algorithm(algorithm: Maker, served: bool, note: str) -> Rule:
    def build(loss, p):
        return algorithm(loss, _sgd(p), _server(p) if served else None)

    return Rule(build, RATES if served else RATE, note=note)


def _of_clip(make: Make, note: str) -> Callable[..., Rule]:
    """A clip's rule: its first argument is the threshold."""
    signature = inspect.signature(make)
    first, *rest = signature.parameters.values()
    shown = signature.replace(parameters=[first.replace(default=TUNED), *rest])

    @functools.wraps(make)
    def rule(*args: Any, **kwargs: Any) -> Rule:
        given = shown.bind(*args, **kwargs)
        tuned = given.arguments.pop(first.name, TUNED) is TUNED

        def clip(threshold: Any) -> Any:
            if not tuned:
                return make(*args, **kwargs)
            return make(threshold, *given.args, **given.kwargs)

        made = clip(1.0)
        outside.checked(made, (optax.GradientTransformation, fc.uplink.Uplink), make.__name__)
        if isinstance(made, fc.uplink.Uplink):
            return Rule(_linked(clip), SERVER if tuned else RATES, note=note)
        return Rule(_stepwise(clip), STEP if tuned else RATE, note=note)

    return signed(rule, shown)
