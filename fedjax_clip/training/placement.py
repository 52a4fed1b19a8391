"""A round over all local devices: the cohort is split, the server replicated, its buffers donated.

The round itself knows nothing of this: give it an unsplit cohort under ``jax.jit``, or a split one under
``jax.shard_map``, and it computes the same.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_clip.core import checks, tree
from fedjax_clip.core.cohort import Cohort
from fedjax_clip.core.types import Algorithm, Array, InvalidInput, Metrics, PyTree

AXIS = "devices"


def local(devices: Sequence[jax.Device] | None) -> list[jax.Device]:
    """The devices to use: these, or all local ones if none are named.

    Args:
      devices: one or more, or ``None``.

    Returns:
      A list of them.

    Raises:
      InvalidInput: something else than one or more different devices.

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
    """``make(function, ...)``, made once for the same arguments, as long as ``function`` lives.

    So training the same algorithm again compiles nothing, and one that is gone leaves no program behind. ``make`` gets
    a weak reference that can be called: what it makes must not keep the function alive.

    Example:
      >>> @fc.extend.placement.remembered
      ... def compiled(function):
      ...   return jax.jit(lambda x: function()(x))
      >>> compiled(jnp.sin) is compiled(jnp.sin)
      True
    """
    kept: weakref.WeakKeyDictionary[Callable[..., Any], dict] = weakref.WeakKeyDictionary()

    @functools.wraps(make)
    def find(function: Callable[..., Any], *rest: Any) -> Any:
        try:
            made = kept.setdefault(function, {})
            weak = weakref.proxy(function)
        except TypeError:  # a callable object that has no place for weak references
            return make(function, *rest)
        if rest not in made:
            made[rest] = make(weak, *rest)
        return functools.partial(_call, made[rest], function)

    return find


def _call(program: Callable[..., Any], owner: Any, *args: Any) -> Any:
    """Whoever has a program keeps alive what it was made of."""
    return program(*args)


@remembered
def _rounds(play: Callable[..., Any], devices: tuple[jax.Device, ...]) -> Callable[..., Any]:
    def one_device(server: PyTree, states: PyTree, cohorts: Cohort, population: PyTree, key: Array, count: Array):
        def at(index: Array, xs: PyTree) -> PyTree:
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), xs)

        def put(index: Array, xs: PyTree, x: PyTree) -> PyTree:
            return jax.tree.map(lambda xs, x: jax.lax.dynamic_update_index_in_dim(xs, x, index, 0), xs, x)

        def round(server: PyTree, states: PyTree, index: Array):
            cohort = dataclasses.replace(at(index, cohorts), population=population, axis_name=AXIS)
            return play(server, dataclasses.replace(cohort, state=at(index, states)), key)

        round, (_, _, metrics) = tree.traced(round, server, states, 0)
        reports = jax.tree.map(lambda x: jnp.zeros((cohorts.ids.shape[0], *x.shape), x.dtype), metrics)

        def body(index: Array, carry: tuple[PyTree, PyTree, Metrics]):  # states stay where they lie: they are large
            server, states, reports = carry
            server, state, metrics = round(server, states, index)
            return server, put(index, states, state), put(index, reports, metrics)

        return jax.lax.fori_loop(0, count, body, (server, states, reports))

    compiled = _on_each(one_device, devices, num_mapped=4, num_shared=2, donate=(0, 1))

    def run(server: PyTree, cohorts: Cohort, key: Array, count: int):
        rest = dataclasses.replace(cohorts, state=(), population=None)
        return compiled(server, cohorts.state, rest, cohorts.population, key, np.int32(count))

    return run


def pmap_alone(
    function: Callable[..., Any], devices: Sequence[jax.Device], num_mapped: int, num_shared: int, donate: int
) -> Callable[..., Any]:
    """``function`` on every device by itself: its first arguments are ``[D, ...]``, the others the same on all.

    Args:
      function: has no collectives, so devices need not wait for each other.
      devices: D local devices.
      num_mapped, num_shared: how many arguments of each kind there are.
      donate: number of the argument that is donated.

    Example:
      >>> devices = jax.local_devices()[:1]
      >>> doubled = fc.extend.placement.pmap_alone(lambda x, factor: factor * x, devices, 1, 1, donate=0)
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
    """Drops what ``jax.pmap`` compiled for a function: its cache refers to its own keys, and so keeps them for ever."""
    try:
        from jax._src.pmap import _cached_shard_map

        _cached_shard_map.evict_function(function)
    except (ImportError, AttributeError):  # another JAX: a program of an algorithm that is gone then stays in memory
        pass


def replicate(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """A copy of every leaf on each device, ``[D, ...]``; nothing is compiled.

    Args:
      tree: arrays of any shape.
      devices: D local devices.

    Example:
      >>> server = fc.extend.placement.replicate(algorithm.init(params), jax.local_devices())
    """
    sharding = _sharding(tuple(devices))

    def copies(x: Any) -> Array:
        # A copy of the host's for each device, since a round donates it and a CPU device takes an array as it lies.
        each = [jax.device_put(np.array(x)[None], device) for device in devices]
        return jax.make_array_from_single_device_arrays((len(each), *each[0].shape[1:]), sharding, each)

    return jax.tree.map(copies, tree)


def split(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Sends host arrays ``[D, ...]`` to the devices, a slice to each, without waiting; what is there stays there.

    Args:
      tree: host arrays ``[D, ...]``.
      devices: D local devices.

    Example:
      >>> cohorts = fc.extend.placement.split(cohort, jax.local_devices()[:1])
    """
    return jax.device_put(tree, _sharding(tuple(devices)))


@functools.lru_cache(maxsize=16)
def _sharding(devices: tuple[jax.Device, ...]) -> jax.sharding.NamedSharding:
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))


def first_replica(tree: PyTree) -> PyTree:
    """The first device's copy of each leaf as a NumPy array, without the leading axis.

    Args:
      tree: arrays ``[D, ...]`` with a slice on each device.

    Example:
      >>> server = fc.extend.placement.replicate(algorithm.init(params), jax.local_devices())
      >>> params = fc.extend.placement.first_replica(server.params)
    """
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)).reshape(x.shape[1:]), tree)
