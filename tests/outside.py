"""Laws over algorithms, links and clips from outside of the repository."""

import functools
import importlib
import inspect
from collections.abc import Callable

import optax
from problems import ENTRIES, MAKERS, OUTSIDE, clipped_sgd, leaky_error_feedback, softmax_loss

import fedjax_clip as fc
from fedjax_clip.uplink.base import Uplink


def only_outside(names: str) -> None:
    """Makes the laws run over others' algorithms, links and clips in place of ours: ``"module.name,module.name"``.

    A name is a function ``(per_example_loss, client_tx, server_tx=None, **parts) -> Algorithm``, such as ``fc.fedavg``,
    or one without arguments that gives a link, or a clip of local steps. What it needs besides belongs into a
    ``functools.partial``.

    Raises:
      ValueError: a name of nothing that the laws can run over.
    """
    ENTRIES.clear()
    MAKERS.clear()
    for name in names.split(","):
        thing = from_outside(name)
        try:
            made = thing() if takes_nothing(thing) else None
            algorithm = thing(softmax_loss, clipped_sgd) if made is None else fc.fedavg(softmax_loss, clipped_sgd)
        except Exception as error:
            raise ValueError(f"--laws-over={name} fails: {type(error).__name__}: {error}") from error
        kinds = Uplink | optax.GradientTransformation if made is not None else fc.extend.Algorithm
        if not isinstance(algorithm if made is None else made, kinds):
            raise ValueError(
                f"--laws-over={name} must be (per_example_loss, client_tx, server_tx=None, **parts) -> Algorithm, or "
                f"return a link or an optax transform, not {type(algorithm if made is None else made).__name__}."
            )
        if isinstance(made, Uplink):
            ENTRIES[name] = functools.partial(fc.fedavg, softmax_loss, clipped_sgd, uplink=made)
        elif made is not None:
            ENTRIES[name] = functools.partial(fc.fedavg, softmax_loss, optax.chain(made, optax.sgd(0.2)))
        else:
            MAKERS[name] = thing
            ENTRIES[name] = functools.partial(thing, softmax_loss, clipped_sgd)
            link = fc.uplink.chain(leaky_error_feedback(0.05), fc.uplink.clip_by_global_norm(0.2))
            adam = optax.adam(0.03, eps=1e-3)
            ENTRIES[f"{name}, stateful link"] = functools.partial(thing, softmax_loss, clipped_sgd, adam, uplink=link)
    OUTSIDE.update(ENTRIES)


def from_outside(name: str) -> Callable:
    """The function of ``"module.name"``, or ``"module:name"``."""
    module, _, attribute = name.replace(":", ".").rpartition(".")
    try:
        found = importlib.import_module(module) if module else None
    except Exception as error:
        raise ValueError(
            f"--laws-over={name}: the module {module} cannot be imported, {type(error).__name__}: {error}. Put its "
            "directory into $PYTHONPATH."
        ) from error
    if not callable(thing := getattr(found, attribute, None)):
        raise ValueError(f"--laws-over={name} is not the function of a module, such as my_module.fedexp.")
    return thing


def takes_nothing(function: Callable) -> bool:
    """Whether a function can be called without arguments."""
    parameters = inspect.signature(function).parameters.values()
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
