"""``reduce.exact_mean`` for one array in fractions, written from the formulas of its docstring alone, not from its code."""

from fractions import Fraction

import numpy as np


def exact_mean(messages, weights, weighted=True, denominator=None):
    """The mean of finite ``messages`` [n, ...] with ``weights`` [n]: float64 for float64 messages, otherwise float32."""
    messages = np.asarray(messages)
    dtype = np.float64 if messages.dtype == np.float64 else np.float32
    messages = messages.astype(dtype)
    n, shape = len(messages), messages.shape[1:]
    if n == 0:
        return np.zeros(shape, dtype)
    by_weight = weighted and denominator is None
    w = np.asarray(weights).astype(dtype) if by_weight else np.ones(n, dtype)
    with np.errstate(over="ignore", under="ignore"):
        p = w[:, None] * messages.reshape(n, -1)  # NumPy rounds one product to nearest even, subnormal or not
        total = _sums(p, dtype)
        divisor = _sums(w[:, None], dtype)[0] if denominator is None else dtype(denominator)
        return (total * (dtype(1) / divisor)).reshape(shape)


def _sums(p, dtype):
    """S: fl(u sum_i rn(p_i / u)) for each column of ``p`` [n, size], one u for all."""
    bias, below = (1023, 4) if dtype == np.float64 else (127, 2)
    largest = max((abs(Fraction(float(x))) for x in p.ravel()), default=Fraction(0))
    if largest == 0:
        return np.zeros(p.shape[1], dtype)
    bin_number = max((_floor_log2(largest) + bias + 1) // 13 - below, 1)
    u = Fraction(2) ** (13 * bin_number - bias)
    sums = [u * sum(round(Fraction(float(x)) / u) for x in column) for column in p.T]  # round: half to even
    return np.array([_fl(s, dtype) for s in sums], dtype)


def _floor_log2(x):
    """floor(log2(x)) of a positive fraction, exactly."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def _fl(x, dtype):
    """The fraction ``x`` rounded once to ``dtype``, to nearest even."""
    if x == 0:
        return dtype(0)
    info = np.finfo(dtype)
    ulp = Fraction(2) ** (max(_floor_log2(abs(x)), int(info.minexp)) - int(info.nmant))
    x = round(x / ulp) * ulp
    if abs(x) > Fraction(float(info.max)):
        return dtype(np.inf if x > 0 else -np.inf)
    return dtype(float(x))  # exact: x has at most the type's bits
