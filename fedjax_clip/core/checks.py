"""Checks of arguments: each error is one sentence that names the argument, the expected and the actual value.

Numbers of NumPy and JAX are numbers. A bool, a string and NaN are not. Traced values pass, since their values are not
known yet.
"""

import collections
import inspect
import math
import operator
import re
import reprlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fedjax_clip.core.types import InvalidInput

MOST = 2**31 - 1  # devices count in int32

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def count(name: str, value: Any, least: int = 1, most: int | None = None) -> Any:
    """``value`` as an ``int``, if it is a whole number from ``least`` to ``most``, by default to what int32 holds."""
    if isinstance(value, jax.core.Tracer):
        return value
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    limit = MOST if most is None else most
    if number is None or not least <= number <= limit:
        above = number is not None and number > limit
        wanted = f"between {least} and {limit}" if most is not None or above else f"of at least {least}"
        raise InvalidInput(f"{name} must be a whole number {wanted}, not {shown(value)}.")
    return number


def client_number(name: str, value: Any) -> int:
    """``value`` as an ``int``, if it may be the number of a client."""
    try:
        return count(name, value, 0)
    except InvalidInput:
        raise InvalidInput(f"{name} must be a client's number, 0 or more, not {shown(value)}.") from None


def seed(name: str, value: Any) -> int:
    """``value`` as an ``int``, if it is a seed: randomness is hashed from 32-bit words."""
    return count(name, value, 0, 2**32 - 1)


def client_numbers(name: str, ids: Any, num_clients: int, twice: bool = False) -> np.ndarray:
    """``ids`` as int64 ``[K]``, if they are numbers of clients, without repetitions unless ``twice``."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        cure = ": np.flatnonzero(mask) makes numbers of a mask" * (array.dtype == bool)
        raise InvalidInput(f"{name} must be clients' numbers [K], not {array.dtype} of shape {array.shape}{cure}.")
    if (wrong := array[(array < 0) | (array >= num_clients)]).size:
        raise InvalidInput(f"{name} must be clients' numbers from 0 to {num_clients - 1}, and hold {wrong[0]}.")
    if not twice and len(set(array.tolist())) < len(array):
        first = collections.Counter(array.tolist()).most_common(1)[0][0]
        raise InvalidInput(f"{name} hold client {first} twice, which only replacement=True of the sampler allows.")
    return array.astype(np.int64)


def counts(name: str, values: Any, size: int, least: int = 1, most: int | None = None) -> np.ndarray:
    """``values`` as int64 ``[size]``, if they are whole numbers from ``least`` to ``most``."""
    array = np.asarray(values)
    if array.shape != (size,) or (size and array.dtype.kind not in "iu"):
        raise InvalidInput(f"{name} must be {size} whole numbers, not {array.dtype} of shape {array.shape}.")
    if size:
        count(name, array.min(), least, most)
        count(name, array.max(), least, most)
    return array.astype(np.int64)


def number(name: str, value: Any) -> None:
    """Refuses a value that is not a number; infinity passes."""
    _real(name, value, "a number", lambda x: not math.isnan(x))


def within(name: str, value: Any, low: float, high: float = np.inf, finite: bool = False) -> None:
    """Refuses a value that is not a number from ``low`` to ``high``, both included; infinity too if ``finite``."""
    wanted = f"number between {low:g} and {high:g}" if np.isfinite(high) else f"number of at least {low:g}"
    _real(name, value, f"a {'finite ' * finite}{wanted}", lambda x: low <= x <= high and (x < np.inf or not finite))


def positive(name: str, value: Any, finite: bool = False) -> None:
    """Refuses a value that is not a positive number; infinity passes unless ``finite``."""
    wanted = "a positive, finite number" if finite else "a positive number"
    _real(name, value, wanted, lambda x: x > 0 and (x < np.inf or not finite))


def fraction(name: str, value: Any, zero: bool = False) -> None:
    """Refuses a value that is not a number between 0 and 1; 1 is refused, and 0 too unless ``zero``."""
    wanted = "a number of at least 0 and below 1" if zero else "a number between 0 and 1, both excluded"
    _real(name, value, wanted, lambda x: 0 < x < 1 or (zero and x == 0))


def kind(name: str, value: Any, kind: Any, wanted: str) -> None:
    """Refuses an argument of the wrong kind while its name is still known."""
    if not isinstance(value, kind):
        made = callable(value) and hasattr(value, "__name__")
        got = f"the function {value.__name__} (without its parentheses?)" if made else type(value).__name__
        raise InvalidInput(f"{name} must be {wanted}, not {got}.")


def takes(name: str, function: Any, arguments: int, wanted: str) -> None:
    """Refuses a value that cannot be called with ``count`` arguments."""
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except ValueError:  # a built-in without a signature
        return
    except TypeError:
        raise InvalidInput(f"{name} must be a function of {wanted}.") from None


def shown(value: Any) -> str:
    """The value, short enough for a sentence."""
    value = value.item() if isinstance(value, np.generic) else value
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"a number of {value.bit_length()} bits"


def _real(name: str, value: Any, wanted: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    try:
        number = math.nan if isinstance(value, (bool, np.bool_, str, bytes)) or np.ndim(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not holds(number):
        raise InvalidInput(f"{name} must be {wanted}, not {shown(value)}.")


def pattern(name: str, value: Any) -> None:
    """Refuses a pattern that is not a regular expression.

    Raises:
      InvalidInput: names the argument.
    """
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise InvalidInput(f"{name}: {value!r} is not a regular expression: {error}.") from error
