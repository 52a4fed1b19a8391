"""Rounds over devices: the cohort is split, the server replicated, its buffers donated.

Two engines give the same bits. ``pmap_rounds`` is that of one process. ``mesh_rounds``, ``jax.jit`` of
``jax.shard_map``, also serves devices of several processes, for which ``jax.pmap`` would copy what it is given at each
call, and models that are split over devices. In several processes each one passes and gets the slices of its own rows.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fedjax_clip.core import checks
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.types import Algorithm, Array, InvalidInput, Metrics, PyTree
from fedjax_clip.placement import AXIS, Mesh, mesh
from fedjax_clip.training.rounds import BY_ROUND, run_rounds

__all__ = [
    *("chosen", "first_replica", "local", "mesh_rounds", "own", "own_rows"),
    *("pmap_rounds", "replicate", "rounds", "run_rounds", "split"),
]

Devices = Sequence[jax.Device]  # a list of this process's, or a Mesh
Program = Callable[[PyTree, Cohort, Array, int], tuple[PyTree, PyTree, Metrics]]


def chosen(devices: Iterable[jax.Device] | Mesh | None) -> Devices:
    """The devices of a run: a list if they are all this process's, else a ``Mesh``.

    Args:
      devices: ``None`` for all devices, of all processes if there are several.

    Raises:
      InvalidInput: as ``local``.

    Example:
      >>> devices = fc.extend.placement.chosen(None)
    """
    if isinstance(devices, Mesh):
        return devices
    if devices is None and jax.process_count() > 1:
        return mesh()
    wanted = local(devices)
    alone = all(device.process_index == jax.process_index() for device in wanted)
    return wanted if alone else mesh(devices=wanted)


def own(devices: Devices) -> list[int]:
    """The places, among ``devices``, of those that are this process's.

    Args:
      devices: a list of devices, or a ``Mesh``, whose places are its rows.

    Example:
      >>> fc.extend.placement.own(jax.local_devices()[:1])
      [0]
    """
    return [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]


def local(devices: Iterable[jax.Device] | None) -> list[jax.Device]:
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


def rounds(algorithm: Algorithm, devices: Devices) -> Program:
    """``mesh_rounds`` over a ``Mesh``, ``pmap_rounds`` over a list of devices.

    Args:
      algorithm: any ``Algorithm``.
      devices: from ``chosen``.

    Example:
      >>> step = fc.extend.placement.rounds(algorithm, fc.extend.placement.chosen(None))
    """
    return mesh_rounds(algorithm, devices) if isinstance(devices, Mesh) else pmap_rounds(algorithm, devices)


def pmap_rounds(algorithm: Algorithm, devices: Sequence[jax.Device]) -> Program:
    """Up to R of the algorithm's rounds as one compiled program over ``devices``.

    Args:
      algorithm: any ``Algorithm``.
      devices: D local devices.

    Returns:
      ``(server, cohorts, key, count) -> (server, client_states, metrics)``. Server and metrics have a leading axis D
      (all replicas are equal, see ``replicate``); ``cohorts`` are R rounds' cohorts, ``[D, R, ...]``
      (``fc.extend.plan_rounds``), of which the first ``count`` are run; client states and metrics are ``[D, R, ...]``.
      One round and many are the same program, so they give the same bits. The server passed in and the cohorts' client
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


def mesh_rounds(algorithm: Algorithm, devices: Mesh) -> Program:
    """``pmap_rounds`` over the D rows of a mesh, some of which may be other processes'.

    Args:
      algorithm: any ``Algorithm``.
      devices: a ``Mesh``.

    Returns:
      A function like that of ``pmap_rounds``. In several processes a host array among the cohorts has the slices of the
      process's own rows only, in their order, and results are arrays of which it can read its own rows.

    Example:
      >>> devices = fc.placement.mesh(clients=1)
      >>> step = fc.extend.placement.mesh_rounds(algorithm, devices)
      >>> server = fc.extend.placement.replicate(algorithm.init(params), devices)
      >>> ids = [np.array([3, 1, 4])]
      >>> cohorts = fc.extend.plan_rounds(data, ids, fc.extend.LocalWork(20), seed=0, first_round=0)
      >>> server, client_states, metrics = step(server, cohorts, key, 1)
    """
    return _mesh_rounds(algorithm.round, devices)


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
        return program

    return find


@remembered
def _rounds(play: Callable[..., Any], devices: tuple[jax.Device, ...]) -> Callable[..., Any]:
    def one_device(server: PyTree, states: PyTree, cohorts: Cohort, population: PyTree, key: Array, count: Array):
        state, metrics = run_rounds(play, (server, states), cohorts, population, key, count, BY_ROUND, AXIS)
        return *state, metrics

    compiled = _on_each(one_device, devices, num_mapped=4, num_shared=2, donate=(0, 1))

    def run(server: PyTree, cohorts: Cohort, key: Array, count: int):
        rest = dataclasses.replace(cohorts, state=(), population=None)
        return compiled(server, cohorts.state, rest, cohorts.population, key, np.int32(count))

    return run


@remembered
def _mesh_rounds(play: Callable[..., Any], devices: Mesh) -> Callable[..., Any]:
    def one_row(server: PyTree, states: PyTree, cohorts: Cohort, population: PyTree, key: Array, count: Array):
        mine = jax.tree.map(lambda x: x[0], (server, states, cohorts, population))
        server, states, cohorts, population = mine
        state, metrics = run_rounds(play, (server, states), cohorts, population, key, count, BY_ROUND, AXIS)
        return jax.tree.map(lambda x: x[None], (*state, metrics))

    row, whole = PartitionSpec(AXIS), PartitionSpec()
    specs = (row, row, row, row, whole, whole)
    mapped = jax.shard_map(
        one_row, mesh=devices.devices, in_specs=specs, out_specs=row, axis_names={AXIS}, check_vma=False
    )
    compiled = jax.jit(mapped, donate_argnums=(0, 1))

    def run(server: PyTree, cohorts: Cohort, key: Array, count: int):
        cohorts = split(cohorts, devices)
        rest = dataclasses.replace(cohorts, state=(), population=None)
        return compiled(server, cohorts.state, rest, cohorts.population, key, np.int32(count))

    return run


def eager_rounds(algorithm: Algorithm, devices: Sequence[jax.Device]) -> Program:
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

    weakref.finalize(program, _forget, function).atexit = False
    return program


def _forget(function: Callable[..., Any]) -> None:
    """Drops what ``jax.pmap`` compiled for a function, whose cache refers to its own keys and never frees them."""
    try:
        from jax._src.pmap import _cached_shard_map

        _cached_shard_map.evict_function(function)
    except (ImportError, AttributeError):  # another JAX: programs of deleted algorithms then stay in memory
        pass


def replicate(values: PyTree, devices: Devices) -> PyTree:
    """A copy of every leaf on each device, ``[D, ...]``; nothing is compiled.

    Args:
      values: arrays of any shape.
      devices: D devices, or a ``Mesh`` of D rows; this process fills its own.

    Example:
      >>> server = fc.extend.placement.replicate(algorithm.init(params), jax.local_devices())
    """
    sharding = _sharding(devices)

    def copies(x: Any) -> Array:
        # Each device gets its own copy: a round donates it, and a CPU device would otherwise share the host's array.
        mine = sharding.addressable_devices
        each = [jax.device_put(np.array(x)[None], device) for device in mine]
        return jax.make_array_from_single_device_arrays((len(devices), *each[0].shape[1:]), sharding, each)

    return jax.tree.map(copies, values)


def split(values: PyTree, devices: Devices) -> PyTree:
    """Sends host arrays ``[D, ...]`` to the devices, a slice to each, without waiting. Arrays already there stay.

    Args:
      values: host arrays ``[D, ...]``; in several processes only the slices of the process's own places (``own``).
      devices: D devices, or a ``Mesh`` of D rows.

    Example:
      >>> on_devices = fc.extend.placement.split(cohorts, jax.local_devices()[:1])
    """
    sharding = _sharding(devices)
    if sharding.is_fully_addressable:
        return jax.device_put(values, sharding)

    def send(x: Any) -> Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), (len(devices), *np.shape(x)[1:]))

    return jax.tree.map(send, values)


def _sharding(devices: Devices) -> jax.sharding.NamedSharding:
    return devices.sharding() if isinstance(devices, Mesh) else _in_a_row(tuple(devices))


@functools.lru_cache(maxsize=16)
def _in_a_row(devices: tuple[jax.Device, ...]) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))


def own_rows(values: PyTree) -> PyTree:
    """The slices of this process's own places as NumPy arrays ``[own, ...]``, in their order.

    Args:
      values: arrays ``[D, ...]`` with a slice in each place.

    Example:
      >>> fc.extend.placement.own_rows(fc.extend.placement.replicate(np.zeros(3), jax.local_devices()[:1])).shape
      (1, 3)
    """

    def rows(x: Array) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        slices = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(slices[row]) for row in sorted(slices)])

    return jax.tree.map(rows, values)


def first_replica(values: PyTree) -> PyTree:
    """This process's first copy of each leaf as a NumPy array, without the leading axis.

    Args:
      values: arrays ``[D, ...]`` with a slice on each device.

    Example:
      >>> server = fc.extend.placement.replicate(algorithm.init(params), jax.local_devices())
      >>> params = fc.extend.placement.first_replica(server.params)
    """
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)).reshape(x.shape[1:]), values)
