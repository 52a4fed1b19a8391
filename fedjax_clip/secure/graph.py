"""The sparse graph of clients that share secrets, and its smallest safe size."""

import math
import secrets
from typing import NamedTuple

import numpy as np
import scipy.stats

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput


class Neighbourhood(NamedTuple):
    """The clients with which each client shares masks and secrets.

    Attributes:
      size: k, neighbours of each client.
      threshold: t, the number of neighbours whose shares give a client's secret back.

    Example:
      >>> fc.secure.neighbourhood(1000, colluding=0.05, silent=0.33)
      Neighbourhood(size=72, threshold=24)
    """

    size: int
    threshold: int


def neighbourhood(
    num_clients: int, colluding: float, silent: float, security: int = 40, failure: int = 20
) -> Neighbourhood:
    """The smallest neighbourhoods that protect n clients from an honest-but-curious server.

    With A of n clients colluding and B silent, chosen independently of the graph, three failures are rare:

      ``P[some client has t colluding neighbours]   <= n P[Hyp(n, A, k) >= t]                  <= 2^-(security + 1)``
      ``P[the honest survivors are disconnected]    <= n (n - k - 1) / 2 C(A + B, k) / C(n, k)  <= 2^-(security + 1)``
      ``P[some client has under t neighbours left]  <= n P[Hyp(n, n - B, k) < t]               <= 2^-failure``

    The first two reveal a message or a smaller sum; the third ends the round without a sum.

    Args:
      num_clients: n.
      colluding, silent: upper bounds on the fractions of the clients.
      security: bits.
      failure: bits.

    Returns:
      The least even k, and the least t for it.

    Raises:
      InvalidInput: no k below n - 1 is enough: take the full graph.

    Example:
      >>> fc.secure.pairwise_masks(1000, neighbours=fc.secure.neighbourhood(1000, 0.05, 0.33))

    Source: Bell et al. (2020), Section 3. The constants are those of Google's federated-compute,
    ``graph_parameter_finder``.
    """
    n = checks.count("num_clients", num_clients)
    checks.fraction("colluding", colluding, zero=True)
    checks.fraction("silent", silent, zero=True)
    bad, gone = (math.floor((fraction + 1e-14) * n) for fraction in (colluding, silent))
    for k in range(2, n - 1, 2):
        if _log_disconnected(n, k, bad + gone) >= -(security + 1) * math.log(2):
            continue
        counts = np.arange(k + 1)
        spies, left = (scipy.stats.hypergeom.pmf(counts, n, number, k) for number in (bad, n - gone))
        at_least = np.cumsum(spies[::-1])[::-1]
        enough = np.flatnonzero(n * at_least <= 2.0 ** -(security + 1))
        if not len(enough):
            continue
        t = max(int(enough[0]), 2)
        if n * left[:t].sum() <= 2.0**-failure:
            return Neighbourhood(k, t)
    raise InvalidInput(
        f"No sparse graph of {n} clients is safe from a fraction {colluding:g} that colludes while {silent:g} are "
        "silent: take the full graph, neighbours=None."
    )


def _log_disconnected(n: int, k: int, removed: int) -> float:
    """Log probability that the circle breaks: two disjoint runs of k / 2 neighbours must be missing."""
    if k > removed:
        return -math.inf
    ratio = math.lgamma(removed + 1) - math.lgamma(removed - k + 1) + math.lgamma(n - k + 1) - math.lgamma(n + 1)
    return math.log(n) + math.log(n - k - 1) - math.log(2) + ratio


def check_neighbourhood(neighbours: Neighbourhood | None) -> Neighbourhood | None:
    """Refuses a neighbourhood whose threshold hides nothing: with a threshold of 1, each share is the secret itself.

    Raises:
      InvalidInput: not a neighbourhood; a size or a threshold below 2, or a threshold above the size.
    """
    checks.kind("neighbours", neighbours, Neighbourhood | None, "an fc.secure.neighbourhood(...)")
    if neighbours is not None:
        size = checks.count("neighbours: size", neighbours.size, 2)
        checks.count("neighbours: threshold", neighbours.threshold, 2, size)
    return neighbours


def harary(num_clients: int, size: int) -> list[frozenset[int]]:
    """The neighbours of each client on a circle in random order: the ``size / 2`` nearest on either side.

    Args:
      num_clients: n.
      size: k, even and below n.

    Returns:
      n sets of k clients each.

    Raises:
      InvalidInput: a k that is odd or too large.

    Example:
      >>> fc.secure.harary(100, 6)[0]

    Source: Bell et al. (2020), Algorithm 1; Harary (1962), "The Maximum Connectivity of a Graph".
    """
    n, k = checks.count("num_clients", num_clients), checks.count("size", size, 2)
    if k % 2 or k >= n:
        raise InvalidInput(f"Neighbours must be an even number below the {n} clients, not {k}.")
    order = list(range(n))
    secrets.SystemRandom().shuffle(order)
    place = {client: position for position, client in enumerate(order)}
    steps = [d for d in range(-k // 2, k // 2 + 1) if d]
    return [frozenset(order[(place[u] + d) % n] for d in steps) for u in range(n)]
