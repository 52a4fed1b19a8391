"""Going on from the state of another run: on more examples, with clients that joined or left."""

import functools
import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Algorithm, InvalidInput, PyTree, Row
from fedjax_clip.training import identity, states
from fedjax_clip.training.processes import ALONE, Processes
from fedjax_clip.training.state import Members, State

MOST = 2**24  # bytes of clients' states that are copied at a time
BY_NUMBER = (
    "The clients have no names, so they are matched by their numbers: the state of client 0 goes to the new client 0, "
    "and so on. Give FederatedData names=... in both runs if that is wrong."
)
WITHOUT = (
    "A run with a secret goes on from its own checkpoints only, because its noise and its epsilon are of the whole "
    "run: leave state out, or start anew from state.server.params and add up both epsilons."
)


def check(state: Any, rounds: int) -> None:
    """Refuses what is no state of ``fc.train``, or one of as many rounds already.

    Raises:
      InvalidInput: says what to give.
    """
    checks.kind("state", state, State, "the state of a result of fc.train")
    if state.members is None:
        raise InvalidInput("state does not say which clients it is of: give the state of a result of fc.train.")
    clients = states.of(state.clients)
    if isinstance(clients, states.OnDisk) and not clients.complete:
        raise InvalidInput(
            "state has only this process's part of the clients' states: train with checkpoints, in a directory that "
            "all processes share, and go on from there."
        )
    if state.rounds >= rounds:
        raise InvalidInput(
            f"state is of round {state.rounds}, and rounds={rounds} counts those rounds: ask for more than "
            f"{state.rounds}."
        )


def check_alike(algorithm: Algorithm, begin: State, state: State) -> None:
    """Refuses a state of another algorithm or model.

    Args:
      algorithm: of this run.
      begin: the state in which this run would begin anew.
      state: to go on from.

    Raises:
      InvalidInput: names the first difference, and says what to do.
    """
    kind = identity.kind(algorithm)
    if (was := state.run.get("algorithm", kind)) != kind:
        raise InvalidInput(f"state is of {was}, not {kind}: go on with {was}, or begin anew from state.server.params.")
    if not differs(begin, state):
        return
    name, has, wants = differs(begin, state)[0]
    raise InvalidInput(
        f"state is of another model or algorithm: it has {has} {name}, where {wants} is needed. If the model has "
        "grown, as for new classes, give fc.extend.grown(state, algorithm, params); or begin anew from its parameters."
    )


def differs(begin: State, state: State) -> list[tuple[str, str, str]]:
    """``(name, form in the state, form at the beginning)`` of the arrays in which two states differ in form."""
    forms = []
    for one in (state, begin):
        server, clients = tree.named_leaves(one.server), tree.named_leaves(one.clients)
        forms.append(
            {f"server/{name}": f"{x.dtype}{list(x.shape)}" for name, x in server}
            | {f"clients/{name}": f"{x.dtype}{list(x.shape[1:])}" for name, x in clients}
        )
    has, wants = forms
    names = dict.fromkeys([*wants, *has])
    return [(n, has.get(n, "no"), wants.get(n, "none")) for n in names if has.get(n) != wants.get(n)]


def carried(
    algorithm: Algorithm,
    state: State,
    members: Members,
    place: Callable[[], Any] | None = None,
    processes: Processes = ALONE,
) -> tuple[State, Row, Callable[[], None]]:
    """The state with which a run on other data goes on, what its first row says of it, and what gives clients theirs.

    The last is a function to call once the new states are held: until then another run may write there.

    Clients keep their states by their names. New clients begin with ``init_client``'s. The parts of the server's state
    that are means over all clients stay so (``Algorithm.regroup``). If the clients and their weights are the same, the
    server's state keeps its bits.

    Args:
      algorithm: of this run; its states have the form of ``state``.
      state: to go on from; it is not changed.
      members: the clients that there are now.
      place, processes: of the clients' new states, see ``states.begun``.

    Raises:
      InvalidInput: under noise, clients that left, or changed their weight, and are part of the server's means.
    """
    assert state.members is not None
    places = matched(state.members, members)
    kept, here = int(np.sum(places >= 0)), len(places)
    old, alike = states.of(state.clients), states.alike(algorithm, state.server.params, here)
    new = states.begun(alike, place, processes)
    server = state.server
    if algorithm.regroup is not None and not members.same(state.members):
        server = algorithm.regroup(server, _average(algorithm, old, alike, state.members, members, places))
    row = {
        "went_on_from": float(state.rounds),
        "clients_kept": float(kept),
        "clients_new": float(here - kept),
        "clients_gone": float(len(state.members.weights) - kept),
    }
    run = {"width": state.run["width"]} if "width" in state.run else {}
    after = State(server, new.tree, run, members, state.rounds)
    return after, row, functools.partial(_copy, old, new, places, processes)


def matched(old: Members, new: Members) -> np.ndarray:
    """``[M]`` the number that each of the new clients had among the old ones, or -1; by names, else by numbers."""
    count = len(new.weights)
    if old.names is None and new.names is None:
        if not old.same(new):
            warnings.warn(BY_NUMBER, stacklevel=2)
        numbers = np.arange(count)
        return np.where(numbers < len(old.weights), numbers, -1)
    known = {old.name(c): c for c in range(len(old.weights))}
    return np.array([known.get(new.name(c), -1) for c in range(count)], np.int64)


def _copy(old: states.ClientStates, new: states.ClientStates, places: np.ndarray, processes: Processes) -> None:
    """Gives the clients that stayed their old states."""
    if not (leaves := jax.tree.leaves(old.tree)):
        return
    stayed = np.flatnonzero(places >= 0)
    if isinstance(new, states.OnDisk):
        stayed = stayed[stayed % processes.count == processes.number]  # each process keeps its own clients'
        if isinstance(old, states.OnDisk) and old.complete and np.array_equal(old.begin, new.begin):
            stayed = stayed[old.index[places[stayed], 0] > 0]  # the others are as they began
    step = max(1, MOST // max(1, sum(x.nbytes for x in leaves) // len(leaves[0])))
    for start in range(0, len(stayed), step):
        ids = stayed[start : start + step]
        new.scatter(ids, old.gather(places[ids]))


def _average(
    algorithm: Algorithm, old: states.ClientStates, begin: PyTree, was: Members, now: Members, places: np.ndarray
) -> Callable[..., PyTree]:
    """``average(part, of)`` of ``Algorithm.regroup``.

    A mean s of values m_i with weights w_i, over the clients that have one, becomes ``(W s + sum_i (w_i' - w_i) m_i) /
    W'``, where w_i' is 0 for a client that has left. What s has beside the mean of the m_i, such as rounding, stays.
    """
    reducer = getattr(algorithm.parts, "reducer", None)
    weighs = reducer is not None and reducer.weighted and reducer.denominator is None
    w = was.weights if weighs else np.ones(len(was.weights))
    w_now = now.weights if weighs else np.ones(len(now.weights))
    after, stayed = np.zeros(len(w)), places >= 0
    after[places[stayed]] = w_now[stayed]
    changed = np.flatnonzero(after != w)
    link = getattr(algorithm.parts, "uplink", None)
    if len(changed) and link is not None and link.promises.noise is not None:
        raise InvalidInput(
            f"Client {was.name(int(changed[0]))!r} has left or changed its weight, and the server's state is a mean "
            "that it is part of: under noise the server cannot take it out. Keep the clients as they were, take "
            "fc.reduce.uniform_mean(), or begin anew from state.server.params."
        )

    def average(part: PyTree, of: Callable[[PyTree], tuple[PyTree, Any]]) -> PyTree:
        first, known = of(jax.tree.map(lambda x: x[:1], begin))
        joined = w_now[~stayed].sum() if np.all(known) else 0.0
        total = jax.tree.map(lambda m: joined * np.asarray(m[0], np.float64), first)
        before, weight = 0.0, joined
        read = np.arange(len(w))
        if known is True:  # all have a value, so those that stay the same need not be read
            read = changed
            same = after == w
            before, weight = before + w[same].sum(), weight + w[same].sum()
        step = max(1, MOST // max(1, sum(x.nbytes for x in jax.tree.leaves(old.tree)) // len(w)))
        for start in range(0, len(read), step):
            ids = read[start : start + step]
            values, known = of(old.gather(ids))
            known = np.broadcast_to(np.asarray(known), ids.shape)
            before, weight = before + w[ids][known].sum(), weight + after[ids][known].sum()
            moved = jax.tree.map(functools.partial(_summed, np.where(known, after[ids] - w[ids], 0.0)), values)
            total = jax.tree.map(np.add, total, moved)
        if weight == 0:
            return part
        scaled = jax.tree.map(lambda s, t: (before * np.asarray(s, np.float64) + t) / weight, part, total)
        return jax.tree.map(lambda s, x: x.astype(np.asarray(s).dtype), part, scaled)

    return average


def _summed(weights: np.ndarray, values: Any) -> np.ndarray:
    return np.asarray(np.tensordot(weights, np.asarray(values, np.float64), 1))


def grown(state: State, algorithm: Algorithm, params: PyTree) -> State:
    """The state for a model with larger layers, such as one with an output for each new class.

    Each array of the server's and of the clients' states has the shape that it has with ``params``. Where both have an
    element, its value is the old one, counted from the first. Elsewhere it is that of a beginning: new parameters are
    those of ``params``, new moments and variates are zero. So new classes get the numbers after the old ones.

    Args:
      state: of a result of ``fc.train``; it is not changed.
      algorithm: the same one.
      params: initial parameters of the larger model, of the same structure.

    Returns:
      A ``State`` for ``fc.train(..., state=...)``.

    Raises:
      InvalidInput: no such state; a model with other layers, or with one that is smaller.

    Example:
      >>> state = fc.train(algorithm, data, params, rounds=1).state
      >>> larger = {"w": np.zeros((64, 12), np.float32), "b": np.zeros(12, np.float32)}
      >>> fc.extend.grown(state, algorithm, larger).server.params["w"].shape
      (64, 12)
    """
    check(state, state.rounds + 1)
    assert state.members is not None
    begin = State(algorithm.init(params), states.alike(algorithm, params, len(state.members.weights)), {})

    def grow(name: str, old: Any, new: Any) -> np.ndarray:
        if len(old.shape) != len(new.shape) or any(o > n for o, n in zip(old.shape, new.shape)):
            raise InvalidInput(
                f"The state's {name} has shape {tuple(old.shape)}, which does not fit into {tuple(new.shape)}: grown "
                "makes layers larger, and none smaller."
            )
        out = np.array(new)
        out[tuple(map(slice, old.shape))] = np.asarray(old)
        return out

    made = []
    for was, now in ((state.server, begin.server), (state.clients, begin.clients)):
        names = [name for name, _ in tree.named_leaves(now)]
        if names != [name for name, _ in tree.named_leaves(was)]:
            raise InvalidInput("The state is of another algorithm, or of a model with other layers than params have.")
        leaves = [grow(*x) for x in zip(names, jax.tree.leaves(was), jax.tree.leaves(now))]
        made.append(jax.tree.unflatten(jax.tree.structure(now), leaves))
    return state._replace(server=made[0], clients=made[1])


def digest(state: State) -> str:
    """A hash of all that a run takes over from a state."""
    found = hashlib.blake2b(digest_size=16)
    clients = states.of(state.clients)
    kept = [clients.index[:, 1], clients.begin] if isinstance(clients, states.OnDisk) else []
    for x in [*jax.tree.leaves(state.server), *(kept or jax.tree.leaves(state.clients))]:
        found.update(identity.digest(np.asarray(x)).encode())
    names = None if state.members is None or state.members.names is None else list(state.members.names)
    found.update(repr((state.rounds, names)).encode("utf-8", "surrogatepass"))
    return found.hexdigest()
