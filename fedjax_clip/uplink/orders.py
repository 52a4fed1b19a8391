"""Which links and reducers may follow which links, and the errors for broken promises."""

from collections.abc import Sequence
from typing import Any

from fedjax_clip.core.types import InvalidInput
from fedjax_clip.uplink.promises import Noise, Promises, Wire, last_bound

NO_BOUND = (
    "Noise needs a finite bound for its scale: put a clip, such as clip_by_global_norm(1.0), in front of it, and "
    "nothing between them that may enlarge an update. Error feedback behind a clip may enlarge it: put the clip "
    "inside of it, as error_feedback(clip_by_global_norm(1.0), top_k(0.01))."
)
NEEDS_MODULAR_SUM = (
    "The uplink ends on an integer grid, whose messages only a modular sum adds (no weighted mean, no median): make "
    "modular_sum the reducer, or take the grid out of the uplink."
)


def check_chain(links: Sequence[Promises]) -> None:
    """Refuses a chain in which one link breaks another's promise.

    Raises:
      InvalidInput: says which link to move where.
    """
    # One value without noise voids the epsilon of all values with noise.
    leaks = next((link.leaks for link in links if link.leaks), "")
    if leaks and any(link.noise or link.grid for link in links):
        raise InvalidInput(leaks)
    trusts = next((link.trusts for link in links if link.trusts), "")
    if trusts and any(link.noise in (Noise.CLIENT, Noise.SHARES) or link.grid for link in links):
        raise InvalidInput(
            f"{trusts} sends the server bits without noise, while the noise or the masks on the messages assume an "
            "untrusted server: put clip_by_global_norm in its place."
        )
    if sum(link.noise is Noise.SERVER for link in links) > 1:
        raise InvalidInput("Two links add the server's noise, which is released as one sum: keep one, the last.")
    moves = next((link.moves for link in links if link.moves), "")
    if moves and any(link.mechanism for link in links):
        raise InvalidInput(
            f"{moves}'s bound changes from round to round, and correlated noise needs a constant bound: put "
            "clip_by_global_norm in its place, or give the noise no mechanism."
        )
    if trusts and any(link.mechanism for link in links):
        raise InvalidInput(
            f"{trusts} draws fresh noise in each round, while all noise beside a mechanism is accounted for as "
            f"correlated: take {trusts} out, or give the noise no mechanism."
        )
    if any(link.grid for link in links) and any(link.noise for link in links if not link.grid):
        raise InvalidInput(
            "Noise beside an integer grid would not be on the grid: end the uplink on discrete_gaussian(z) or "
            "skellam(z) in place of the grid and the other noise."
        )
    if any(link.grid for link in links[:-1]):
        raise InvalidInput(
            "A link behind the integer grid (a clip, a compressor, a second grid) would receive points of the grid, "
            "not an update: move integer_grid, discrete_gaussian or skellam to the chain's end."
        )
    for position, link in enumerate(links):
        if link.needs_bound and last_bound(links[:position]) is None:
            raise InvalidInput(NO_BOUND)
        if link.noise is Noise.SERVER and links[position + 1 :]:
            raise InvalidInput(
                "A link behind the server's noise would receive steps of its lattice, not an update: move the noise "
                "last."
            )
    # The server's noise keeps the message on the wire, so it may follow a code.
    changing = [link for link in links if link.wire is not Wire.KEEPS]
    if any(link.wire in (Wire.PACKS, Wire.SUMS) for link in changing[:-1]):
        raise InvalidInput(
            "A link behind the compressor would change what was packed, so other bytes would travel: move the "
            "compressor last (only the server's noise may follow), and a clip in front of it, or inside of its "
            "error_feedback."
        )


def check_ends(promises: Promises, reducer: Any, covers_all: bool, algorithm: str = "") -> None:
    """Refuses an uplink and a reducer that do not fit, or an algorithm that sends more than the uplink covers.

    Args:
      promises: of the whole chain.
      reducer: of the chain's messages.
      covers_all: whether all that clients send passes the uplink.
      algorithm: its name.

    Raises:
      InvalidInput: says what to replace.
    """
    if promises.needs_bound:
        raise InvalidInput(NO_BOUND)
    if promises.wire is Wire.SUMS and not reducer.linear:
        raise InvalidInput(
            "The uplink sends sketches, which only a linear reducer adds: make weighted_mean, uniform_mean "
            "or fixed_mean the reducer."
        )
    if promises.grid is None and reducer.threshold is not None:
        raise InvalidInput(
            "A modular sum adds integers: put a clip and integer_grid() last in the uplink, or take a mean."
        )
    if not covers_all and (promises.noise or reducer.hides):
        cure = ", or give scaffold a variate_uplink with noise, too" if algorithm == "scaffold" else ""
        covered, purpose = ("secure sum", "secure aggregation") if reducer.hides else ("uplink's noise", "privacy")
        raise InvalidInput(
            f"This algorithm's clients send more than the update, which the {covered} does not "
            f"cover: for {purpose} take fedavg or fedsgd{cure}."
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
            "A weighted mean needs each client's number of examples, which would reach the server without noise: make "
            "uniform_mean the reducer."
        )
    if reducer.forges and promises.noise in (Noise.SERVER, Noise.SHARES):
        raise InvalidInput(
            f"{reducer.forges} replaces messages behind the clip by functions of other clients' messages, so no bound "
            "holds for the noise: study attacks without noise, or put the attack in front of the clip as a link."
        )
    if promises.noise is Noise.SERVER and reducer.denominator is None:
        raise InvalidInput(
            "The server's noise needs a mean with a fixed denominator and without weights: make fixed_mean the reducer."
        )
    if promises.noise is Noise.SERVER and (reducer.hides or not reducer.linear):
        raise InvalidInput(
            "The server's noise is scaled to one client's part in an exact sum, which this reducer does not compute: "
            "make fixed_mean the reducer."
        )
