"""The optimisers and clips of ``--client`` and ``--server``, and schedules in place of a learning rate."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import fedjax_clip as fc
from experiments.config import spec
from experiments.config.components import Components, Make, read
from fedjax_clip import clipping, compression
from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput


def _cosine(init: float, rounds: int, alpha: float = 0.0) -> optax.Schedule:
    """From ``init`` to ``alpha * init`` along a cosine."""
    return optax.cosine_decay_schedule(init, rounds, alpha)


def _cubic(end: float, rounds: int, first: int = 0) -> optax.Schedule:
    """From 0 to ``end``, fast and then slower; begins after ``first`` rounds."""
    return optax.polynomial_schedule(0.0, end, 3, rounds, first)


def _exponential(init: float, decay: float, rounds: int = 1, staircase: bool = False) -> optax.Schedule:
    """``init``, times ``decay`` every ``rounds``."""
    return optax.exponential_decay(init, rounds, decay, staircase=staircase)


def _linear(init: float, end: float, rounds: int) -> optax.Schedule:
    """From ``init`` to ``end`` along a line."""
    return optax.linear_schedule(init, end, rounds)


def _warmup_cosine(peak: float, warmup: int, rounds: int, end: float = 0.0) -> optax.Schedule:
    """From 0 to ``peak`` in ``warmup`` rounds, and along a cosine to ``end`` in round ``rounds``."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, rounds, end)


def _counted(make: Make) -> Make:
    """Schedules that see the round's number as a float: some mix it with one, which strict types forbid."""

    @functools.wraps(make)
    def build(*args: Any, **kwargs: Any) -> optax.Schedule:
        schedule = make(*args, **kwargs)
        return lambda count: schedule(jnp.asarray(count, jnp.float32))

    return build


SCHEDULES = Components(
    object,
    {
        "cosine": _cosine,
        "cubic": _cubic,
        "exponential": _exponential,
        "linear": _linear,
        "warmup_cosine": _warmup_cosine,
    },
    _counted,
)
_FRACTIONS = ("b1", "b2", "beta1", "beta2", "decay", "momentum")


def _checked(optimizer: Make) -> Make:
    """Refuses arguments that optax would refuse only in the first round, or never."""

    @functools.wraps(optimizer)
    def build(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        for name, value in inspect.signature(optimizer).bind(*args, **kwargs).arguments.items():
            if isinstance(value, str):
                checks.number(name, value)
            if name == "learning_rate" and not callable(value) and not isinstance(value, jax.Array):  # of a schedule
                checks.positive("the learning rate", value, finite=True)
            if name in _FRACTIONS and value is not None:
                checks.fraction(name, value, zero=True)
        return optimizer(*args, **kwargs)

    return build


def clip_by_layer_norm(max_norm: float) -> optax.GradientTransformation:
    """Clips each layer by its own norm."""
    return clipping.clip(max_norm, scope=clipping.layer())


def _u_clip(max_norm: float) -> optax.GradientTransformation:
    """Clips to ``max_norm``, and adds what was cut off to the next step's gradient."""
    return clipping.u_clip(clipping.clip_by_global_norm(max_norm))


_OPTAX = (optax.adagrad, optax.adam, optax.adamw, optax.rmsprop, optax.sgd, optax.yogi)
OPTIMIZERS = Components(
    optax.GradientTransformation,
    {
        **{make.__name__: _checked(make) for make in _OPTAX},
        **{name: _checked(make) for name, make in read(fc.fedopt, optax.GradientTransformation).items()},
        # Left out: clip, for which there is clip_by_global_norm, and functions of a function.
        **read(clipping, optax.GradientTransformation, without=("clip", "watch")),
        **read(compression, optax.GradientTransformation),
        **read(fc.local, optax.GradientTransformation, without=("at_round",)),
        "add_decayed_weights": optax.add_decayed_weights,
        "clip_by_layer_norm": clip_by_layer_norm,
        "u_clip": _u_clip,
    },
)


def server_tx(text: str, values: Mapping[str, Any] = spec.NO_VALUES) -> optax.GradientTransformation:
    """``"adam(0.01)"``: the server's optimiser; a schedule counts rounds."""
    if "average" in [call.name for call in spec.parse(text, "--server")][:-1]:
        raise InvalidInput('--server: average comes last, behind the optimiser: "sgd(1.0)|average(0.99)".')
    return optax.chain(*_optimizers(text, "--server", SCHEDULES, values))


def client_tx(text: str, values: Mapping[str, Any] = spec.NO_VALUES) -> Callable[[Any], optax.GradientTransformation]:
    """``"clip_by_global_norm(1.0)|sgd(cosine(0.1, 100))"``: a client's optimiser; a schedule counts rounds."""

    if "average" in [call.name for call in spec.parse(text, "--client")]:
        raise InvalidInput(
            '--client: average keeps a mean of the server\'s parameters: give it as --server="sgd(1.0)|average(0.99)".'
        )

    def at(round: Any) -> optax.GradientTransformation:
        rates = Components(object, SCHEDULES, lambda make: _at_round(make, round))
        return optax.chain(*_optimizers(text, "--client", rates, values))

    at(jnp.zeros((), jnp.int32))  # says at once what is wrong with the text
    return at


def _at_round(make: Make, round: Any) -> Make:
    return functools.wraps(make)(lambda *args, **kwargs: make(*args, **kwargs)(round))


def _optimizers(
    text: str, flag: str, schedules: Components, values: Mapping[str, Any]
) -> list[optax.GradientTransformation]:
    chain = spec.build(text, OPTIMIZERS, flag, nested=schedules, values=values)
    if not any(_steps(call.name, flag) for call in spec.parse(text, flag)):
        raise InvalidInput(f'{flag}: the chain needs an optimiser, such as sgd in "clip_by_global_norm(1.0)|sgd(0.1)".')
    return chain


def _steps(name: str, flag: str) -> bool:
    """Whether a name is that of an optimiser, which has a learning rate."""
    return "learning_rate" in inspect.signature(spec.component(name, OPTIMIZERS, flag)).parameters


def behind_optimizer(text: str, flag: str) -> list[str]:
    """The names of the clips after a flag's optimiser, which bound steps, not gradients."""
    names = [call.name for call in spec.parse(text, flag)]
    first = next(i for i, name in enumerate(names) if _steps(name, flag))
    return [name for name in names[first:] if "clip" in name or name == "normalised"]
