"""Which links may follow which, and which mean may follow them: what is said of those that break a promise."""

from collections.abc import Sequence
from typing import Any

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.uplink.promises import Noise, Promises, Wire, last_bound

NO_BOUND = (
    "Noise needs a finite bound to be in proportion to: put a clip, such as clip_by_global_norm(1.0), in front of it, "
    "and nothing between them that may make an update larger. Error feedback behind a clip may: put the clip inside of "
    "it, error_feedback(clip_by_global_norm(1.0), top_k(0.01))."
)
NEEDS_MODULAR_SUM = (
    "The uplink ends on an integer grid, and only a modular sum adds such messages (no weighted mean, no median): "
    "make modular_sum the reducer, or take the grid out of the uplink."
)


def check_chain(links: Sequence[Promises]) -> None:
    """Refuses links, by their promises in the order of a chain, of which one breaks what another promises.

    Raises:
      InvalidInput: says which link to move where.
    """
    leaks = next((link.leaks for link in links if link.leaks), "")
    if leaks and any(link.noise or link.grid for link in links):
        raise InvalidInput(leaks)
    trusts = next((link.trusts for link in links if link.trusts), "")
    if trusts and any(link.noise in (Noise.CLIENT, Noise.SHARES) or link.grid for link in links):
        raise InvalidInput(
            f"Clients tell the server {trusts}'s bits without noise, which the server adds, and the noise or the masks "
            "on their messages protect them from that server: put clip_by_global_norm in its place."
        )
    if sum(link.noise is Noise.SERVER for link in links) > 1:
        raise InvalidInput("Two links add the server's noise, and only their sum is seen: keep one, the last.")
    moves = next((link.moves for link in links if link.moves), "")
    if moves and any(link.mechanism for link in links):
        raise InvalidInput(
            f"{moves}'s bound moves from round to round, and noise that is correlated over rounds is in proportion to "
            "one that does not: put clip_by_global_norm in its place, or give the noise no mechanism."
        )
    if trusts and any(link.mechanism for link in links):
        raise InvalidInput(
            f"{trusts}'s noise is drawn anew in each round, and beside a mechanism all noise is accounted for as if it "
            f"followed that: take {trusts} out, or give the noise no mechanism."
        )
    if any(link.grid for link in links) and any(link.noise for link in links if not link.grid):
        raise InvalidInput(
            "Noise beside an integer grid: let the clients add theirs on it, by discrete_gaussian(z) or skellam(z) as "
            "the last link in place of the grid and the other noise."
        )
    if any(link.grid for link in links[:-1]):
        raise InvalidInput(
            "A link behind the integer grid would work on integers that stand for an update (a clip, a compression or "
            "a second grid has no meaning there): move integer_grid, discrete_gaussian or skellam to the chain's end."
        )
    for position, link in enumerate(links):
        if link.needs_bound and last_bound(links[:position]) is None:
            raise InvalidInput(NO_BOUND)
        if link.noise is Noise.SERVER and links[position + 1 :]:
            raise InvalidInput(
                "A link behind the server's noise would work on whole steps of its lattice, which stand for an update: "
                "move the noise last."
            )
    changing = [link for link in links if link.wire is not Wire.KEEPS]
    if any(link.wire in (Wire.PACKS, Wire.SUMS) for link in changing[:-1]):
        raise InvalidInput(
            "A link behind the compressor would change what was packed, and other bytes would travel: move the "
            "compressor last (only noise of the server may follow), and a clip in front of it, or inside of its "
            "error_feedback."
        )


def check_ends(promises: Promises, reducer: Any, covers_all: bool) -> None:
    """Refuses an uplink and a reducer that do not go together, or an algorithm that sends more than the uplink covers.

    Args:
      promises: of the whole chain.
      reducer: what becomes of its messages.
      covers_all: whether clients send nothing but what passes the uplink.

    Raises:
      InvalidInput: says what to put in the place of what.
    """
    if promises.needs_bound:
        raise InvalidInput(NO_BOUND)
    if promises.wire is Wire.SUMS and not reducer.linear:
        raise InvalidInput(
            "The uplink sends sketches, which mean something in a sum only: make weighted_mean, uniform_mean "
            "or fixed_mean the reducer."
        )
    if promises.grid is None and reducer.threshold is not None:
        raise InvalidInput(
            "A modular sum adds integers: put a clip and integer_grid() last in the uplink, or take a mean."
        )
    if not covers_all and (promises.noise or reducer.hides):
        covered, purpose = ("secure sum", "secure aggregation") if reducer.hides else ("uplink's noise", "privacy")
        raise InvalidInput(
            f"This algorithm's clients send a gradient or a variate beside the update, which the {covered} does not "
            f"cover: for {purpose} take fedavg or fedsgd, or give scaffold a variate_uplink with noise, too."
        )
    if promises.grid is not None and reducer.threshold is None:
        raise InvalidInput(NEEDS_MODULAR_SUM)
    if reducer.hides and (promises.leaks or promises.trusts):
        raise InvalidInput(
            promises.leaks
            or f"{promises.trusts} tells the server single clients' bits, which the secure sum hides: put "
            "clip_by_global_norm in its place."
        )
    if promises.noise is Noise.CLIENT and reducer.weighted:
        raise InvalidInput(
            "A weighted mean needs each client's number of examples, which clients tell the server without the noise "
            "that is to protect them from it: make uniform_mean the reducer."
        )
    if reducer.forges and promises.noise in (Noise.SERVER, Noise.SHARES):
        raise InvalidInput(
            f"{reducer.forges} replaces messages behind the clip by what depends on other clients', so the noise is in "
            "proportion to no bound: study attacks without noise, or put the attack in front of the clip as a link."
        )
    if promises.noise is Noise.SERVER and reducer.denominator is None:
        raise InvalidInput(
            "The server's noise needs a mean with a fixed denominator and without weights: make fixed_mean the reducer."
        )
    if promises.noise is Noise.SERVER and (reducer.hides or not reducer.linear):
        raise InvalidInput(
            "The server's noise is in proportion to what one client moves an exact sum, and this reducer makes no such "
            "sum of the messages as they were sent: make fixed_mean the reducer."
        )
