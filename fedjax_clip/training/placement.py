"""Rounds over all local devices: the cohort is split, the server replicated, its buffers donated.

``run_rounds`` is the one loop over rounds, and ``fc.train`` compiles it by ``pmap_rounds``. A round does not know how
it is placed: it computes the same under ``jax.jit`` with an unsplit cohort, and under ``jax.shard_map`` with a split
one.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import checks, tree
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.resident import Resident
from fedjax_clip.core.types import Algorithm, Array, InvalidInput, Metrics, PyTree

__all__ = ["first_replica", "local", "pmap_rounds", "replicate", "run_rounds", "split"]

AXIS = "devices"
Index = Array | int
Round = Callable[[PyTree, Cohort, Array], tuple[PyTree, PyTree, Metrics]]  # of an algorithm


def local(devices: Sequence[jax.Device] | None) -> list[jax.Device]:
    """The devices to use: the given ones, or all local ones.

    Args:
      devices: one or more, or ``None``.

    Returns:
      A list of them.

    Raises:
      InvalidInput: no devices, or one of them twice.

    Example:
      >>> fc.extend.placement.local(None)  # jax.local_devices()
    """
    if devices is None:
        return jax.local_devices()
    checks.kind("devices", devices, Iterable, "a list of JAX devices, such as jax.local_devices()")
    devices = list(devices)
    for device in devices:
        checks.kind("A device", device, jax.Device, "one of jax.local_devices()")
    if not devices or len(set(devices)) < len(devices):
        raise InvalidInput(f"devices must be one or more different devices, not {devices}.")
    return devices


class Shelf(NamedTuple):
    """How a program reads and writes the clients' states between rounds.

    Attributes:
      read: ``(kept, index of the round, cohort) -> states [C, ...]``.
      write: ``(kept, index of the round, cohort, states [C, ...]) -> kept``.
    """

    read: Callable[[PyTree, Index, Cohort], PyTree]
    write: Callable[[PyTree, Index, Cohort, PyTree], PyTree]


def _read_round(kept: PyTree, index: Index, cohort: Cohort) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), kept)


def _write_round(kept: PyTree, index: Index, cohort: Cohort, states: PyTree) -> PyTree:
    return jax.tree.map(lambda xs, x: jax.lax.dynamic_update_index_in_dim(xs, x, index, 0), kept, states)


def _read_clients(kept: PyTree, index: Index, cohort: Cohort) -> PyTree:
    return jax.tree.map(lambda x: x[jnp.maximum(cohort.ids, 0)], kept)


def _write_clients(kept: PyTree, index: Index, cohort: Cohort, states: PyTree) -> PyTree:
    def write(xs: Array, x: Array) -> Array:
        return xs.at[jnp.where(cohort.ids < 0, len(xs), cohort.ids)].set(x, mode="drop")

    return jax.tree.map(write, kept, states)


BY_ROUND = Shelf(_read_round, _write_round)  # [R, C, ...]: the host gathered each round's states
BY_CLIENT = Shelf(_read_clients, _write_clients)  # [M, ...]: all clients' states are on the device


def run_rounds(
    round: Round,
    state: PyTree,
    cohorts: Cohort,
    population: PyTree,
    key: Array,
    count: Array | np.int32 | int,
    shelf: Shelf = BY_CLIENT,
    axis_name: str | None = None,
) -> tuple[PyTree, Metrics]:
    """Runs the first ``count`` of the R rounds that ``cohorts`` plan.

    Args:
      round: an algorithm's round.
      state: ``(server, kept)``; see ``shelf``.
      cohorts: ``[R, ...]``, without states.
      population: examples on the device, a ``Resident`` or ``[N, ...]``, or ``None`` if the cohorts hold batches.
      key: PRNG key of the run.
      count: int32, at most R.
      shelf: how ``kept`` is indexed: by client ``[M, ...]``, or by round ``[R, C, ...]``.
      axis_name: the mapped axis of the devices, if there are several.

    Returns:
      ``(state, metrics [R, ...])``; metrics of rounds that were not run are 0.

    Example:
      >>> work = fc.extend.LocalWork(20)
      >>> cohorts = fc.extend.plan_rounds(data, [np.array([3, 1, 4])], work, seed=0, first_round=0)
      >>> cohorts = jax.tree.map(lambda x: x[0], cohorts)  # those of the first device
      >>> state = algorithm.init(params), algorithm.init_client(params)  # FedAvg's clients keep nothing
      >>> state, metrics = fc.extend.placement.run_rounds(algorithm.round, state, cohorts, None, key, 1)
    """
    population = None if population is None else Resident.of(population)  # outside the loops: at most one copy

    def one(state: PyTree, index: Array) -> tuple[PyTree, Metrics]:
        cohort = _read_round(cohorts, index, cohorts)
        return one_round(round, state, dataclasses.replace(cohort, axis_name=axis_name), population, key, shelf, index)

    one, (_, metrics) = tree.traced(one, state, 0)
    reports = jax.tree.map(lambda x: jnp.zeros((cohorts.ids.shape[0], *x.shape), x.dtype), metrics)

    def body(index: Array, carry: tuple[PyTree, Metrics]) -> tuple[PyTree, Metrics]:
        state, reports = carry
        state, metrics = one(state, index)
        return state, _write_round(reports, index, cohorts, metrics)

    return jax.lax.fori_loop(0, count, body, (state, reports))


def one_round(
    round: Round,
    state: PyTree,
    cohort: Cohort,
    population: PyTree,
    key: Array,
    shelf: Shelf = BY_CLIENT,
    index: Index = 0,
) -> tuple[PyTree, Metrics]:
    """``(state, metrics)`` after an algorithm's ``round``, or its ``start``, of one cohort; see ``run_rounds``."""
    server, kept = state
    own = shelf.read(kept, index, cohort)
    server, own, metrics = round(server, dataclasses.replace(cohort, state=own, population=population), key)
    return (server, shelf.write(kept, index, cohort, own)), metrics


def pmap_rounds(
    algorithm: Algorithm, devices: Sequence[jax.Device]
) -> Callable[[PyTree, Cohort, Array, int], tuple[PyTree, PyTree, Metrics]]:
    """Up to R of the algorithm's rounds as one compiled program over ``devices``.

    Args:
      algorithm: any ``Algorithm``.
      devices: D local devices.

    Returns:
      ``(server, cohorts, key, count) -> (server, client_states, metrics)``. Server and metrics have a leading axis D
      (all replicas are equal, see ``replicate``); ``cohorts`` are R rounds' cohorts, ``[D, R, ...]``
      (``fc.extend.plan_rounds``), of which the first ``count`` are run; client states and metrics are ``[D, R, ...]``.
      One
      round and many are the same program, so they give the same bits. The server passed in and the cohorts' client
      states are donated: do not use them again.

    Example:
      >>> devices = jax.local_devices()[:1]
      >>> step = fc.extend.placement.pmap_rounds(algorithm, devices)
      >>> server = fc.extend.placement.replicate(algorithm.init(params), devices)
      >>> ids = [np.array([3, 1, 4])]
      >>> cohorts = fc.extend.plan_rounds(data, ids, fc.extend.LocalWork(20), seed=0, first_round=0)
      >>> cohorts = fc.extend.placement.split(cohorts, devices)
      >>> server, client_states, metrics = step(server, cohorts, key, 1)
    """
    return _rounds(algorithm.round, tuple(devices))


def remembered(make: Callable[..., Any]) -> Callable[..., Any]:
    """Caches ``make(function, ...)`` by its arguments, as long as ``function`` lives.

    Training the same algorithm again therefore compiles nothing, and a deleted algorithm leaves no program behind.
    ``make`` gets a callable weak reference, so that its result does not keep the function alive.

    Example:
      >>> @remembered
      ... def compiled(function):
      ...   return jax.jit(lambda *args: function(*args))
      >>> compiled(per_example_loss).func is compiled(per_example_loss).func
      True
    """
    kept: weakref.WeakKeyDictionary[Callable[..., Any], dict] = weakref.WeakKeyDictionary()

    @functools.wraps(make)
    def find(function: Callable[..., Any], *rest: Any) -> Any:
        try:
            made = kept.setdefault(function, {})
            weak = weakref.proxy(function)
        except TypeError:  # a callable object without weak references
            return make(function, *rest)
        if rest not in made:
            made[rest] = make(weak, *rest)
        program: Any = functools.partial(made[rest])
        program.made_of = function  # a program keeps its function alive
        program.lower = getattr(made[rest], "lower", None)
        return program

    return find


@remembered
def _rounds(play: Callable[..., Any], devices: tuple[jax.Device, ...]) -> Callable[..., Any]:
    def one_device(server: PyTree, states: PyTree, cohorts: Cohort, population: PyTree, key: Array, count: Array):
        state, metrics = run_rounds(play, (server, states), cohorts, population, key, count, BY_ROUND, AXIS)
        return *state, metrics

    compiled = _on_each(one_device, devices, num_mapped=4, num_shared=2, donate=(0, 1))

    def arguments(server: PyTree, cohorts: Cohort, key: Array, count: int) -> tuple:
        rest = dataclasses.replace(cohorts, state=(), population=None)
        return server, cohorts.state, rest, cohorts.population, key, np.int32(count)

    def run(*args):
        return compiled(*arguments(*args))

    run.lower = lambda *args: compiled.lower(*arguments(*args))  # type: ignore[attr-defined]
    return run


def eager_rounds(
    algorithm: Algorithm, devices: Sequence[jax.Device]
) -> Callable[[PyTree, Cohort, Array, int], tuple[PyTree, PyTree, Metrics]]:
    """``pmap_rounds`` on one device without compilation, one client and one operation at a time, for debugging.

    Call it under ``jax.disable_jit()``. Plan the cohorts with ``width=1``. Nothing is donated.
    """

    def run(server: PyTree, cohorts: Cohort, key: Array, count: int):
        server, cohorts = jax.tree.map(lambda x: jnp.asarray(x)[0], (server, cohorts))
        rest = dataclasses.replace(cohorts, state=(), population=None)
        arguments = rest, cohorts.population, key, np.int32(count)
        state, metrics = run_rounds(algorithm.round, (server, cohorts.state), *arguments, BY_ROUND)
        return jax.tree.map(lambda x: x[None], (*state, metrics))

    return run


def pmap_alone(
    function: Callable[..., Any], devices: Sequence[jax.Device], num_mapped: int, num_shared: int, donate: int
) -> Callable[..., Any]:
    """``function`` on every device independently: its first arguments are ``[D, ...]``, the others the same on all.

    Args:
      function: has no collectives, so devices need not wait for each other.
      devices: D local devices.
      num_mapped, num_shared: number of arguments of each kind.
      donate: index of the argument to donate.

    Example:
      >>> devices = jax.local_devices()[:1]
      >>> doubled = pmap_alone(lambda x, factor: factor * x, devices, 1, 1, donate=0)
    """
    return _on_each(function, tuple(devices), num_mapped, num_shared, (donate,))


def _on_each(
    function: Callable[..., Any],
    devices: tuple[jax.Device, ...],
    num_mapped: int,
    num_shared: int,
    donate: tuple[int, ...],
) -> Callable[..., Any]:
    """``function`` under ``jax.pmap``: its first arguments are ``[D, ...]``, the others the same on all devices."""
    axes = (0,) * num_mapped + (None,) * num_shared
    mapped = jax.pmap(function, axis_name=AXIS, in_axes=axes, donate_argnums=donate, devices=devices)

    def program(*args: PyTree) -> PyTree:
        return mapped(*args)

    program.lower = mapped.lower  # type: ignore[attr-defined] # from shapes, and for devices that are not here
    weakref.finalize(program, _forget, function).atexit = False
    return program


def _forget(function: Callable[..., Any]) -> None:
    """Drops what ``jax.pmap`` compiled for a function, whose cache refers to its own keys and never frees them."""
    try:
        from jax._src.pmap import _cached_shard_map

        _cached_shard_map.evict_function(function)
    except (ImportError, AttributeError):  # another JAX: programs of deleted algorithms then stay in memory
        pass


def replicate(values: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """A copy of every leaf on each device, ``[D, ...]``; nothing is compiled.

    Args:
      values: arrays of any shape.
      devices: D local devices.

    Example:
      >>> server = fc.extend.placement.replicate(algorithm.init(params), jax.local_devices())
    """
    sharding = _sharding(tuple(devices))

    def copies(x: Any) -> Array:
        # Each device gets its own copy: a round donates it, and a CPU device would otherwise share the host's array.
        each = [jax.device_put(np.array(x)[None], device) for device in devices]
        return jax.make_array_from_single_device_arrays((len(each), *each[0].shape[1:]), sharding, each)

    return jax.tree.map(copies, values)


def split(values: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Sends host arrays ``[D, ...]`` to the devices, a slice to each, without waiting. Arrays already there stay.

    Args:
      values: host arrays ``[D, ...]``.
      devices: D local devices.

    Example:
      >>> on_devices = fc.extend.placement.split(cohorts, jax.local_devices()[:1])
    """
    return jax.device_put(values, _sharding(tuple(devices)))


@functools.lru_cache(maxsize=16)
def _sharding(devices: tuple[jax.Device, ...]) -> jax.sharding.NamedSharding:
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))


def first_replica(values: PyTree) -> PyTree:
    """The first device's copy of each leaf as a NumPy array, without the leading axis.

    Args:
      values: arrays ``[D, ...]`` with a slice on each device.

    Example:
      >>> server = fc.extend.placement.replicate(algorithm.init(params), jax.local_devices())
      >>> params = fc.extend.placement.first_replica(server.params)
    """
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)).reshape(x.shape[1:]), values)
