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
from fedjax_clip.training.transfers import (
    Devices,
    beginning,
    first_replica,
    own,
    own_rows,
    replicate,
    send_server,
    split,
    split_states,
)

__all__ = [
    "beginning",
    "chosen",
    "first_replica",
    "local",
    "mesh_rounds",
    "own",
    "own_rows",
    "pmap_rounds",
    "replicate",
    "rounds",
    "run_rounds",
    "send_server",
    "split",
    "split_states",
]

NO_CALLBACKS = (
    "A round that calls the host (fc.reduce.on_host, fc.secure's sums, jax.debug.print) cannot split a model over "
    "devices: give a mesh of model=1."
)

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


def local(devices: Iterable[jax.Device] | None) -> list[jax.Device]:
    """The devices to use: the given ones, or all local ones.

    Args:
      devices: one or more, or ``None``.

    Returns:
      A list of them.

    Raises:
      InvalidInput: no devices, or one of them twice; a mesh that splits a model.

    Example:
      >>> fc.extend.placement.local(None)  # jax.local_devices()
    """
    if devices is None:
        return jax.local_devices()
    if isinstance(devices, Mesh) and devices.model > 1:
        raise InvalidInput(f"Only fc.train and fc.evaluator split a model (model={devices.model}): give model=1 here.")
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

    Raises:
      InvalidInput: (when called) a callback to the host in a round of a model that is split over devices.

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


@remembered
def _mesh_rounds(play: Callable[..., Any], devices: Mesh) -> Callable[..., Any]:
    def one_row(server: PyTree, states: PyTree, cohorts: Cohort, population: PyTree, key: Array, count: Array):
        server, states, cohorts, population = jax.tree.map(lambda x: x[0], (server, states, cohorts, population))
        rest = cohorts, population, key, count, BY_ROUND, AXIS, devices.model > 1
        state, metrics = run_rounds(play, (server, states), *rest)
        return jax.tree.map(lambda x: x[None], (*state, metrics))

    row, whole = PartitionSpec(AXIS), PartitionSpec()
    specs = (row, row, row, row, whole, whole)
    mapped = jax.shard_map(  # manual over rows; within one, XLA divides the work as the parameters lie
        one_row, mesh=devices.devices, in_specs=specs, out_specs=row, axis_names={AXIS}, check_vma=False
    )

    def program(*args: PyTree) -> tuple[PyTree, PyTree, Metrics]:
        server, states, metrics = mapped(*args)
        if devices.model > 1:  # the state comes back as it came
            lie = devices.lie(server, server.params, 1), devices.lie(states, server.params, 3)
            server, states = jax.lax.with_sharding_constraint((server, states), lie)
        return server, states, metrics

    compiled = jax.jit(program, donate_argnums=(0, 1))

    def run(server: PyTree, cohorts: Cohort, key: Array, count: int):
        states = split_states(cohorts.state, server, devices)
        rest, population = split((dataclasses.replace(cohorts, state=(), population=None), cohorts.population), devices)
        try:
            return compiled(server, states, rest, population, key, np.int32(count))
        except NotImplementedError as error:
            if devices.model > 1 and "callback" in str(error):
                raise InvalidInput(NO_CALLBACKS) from error
            raise

    def lower(server: PyTree, cohorts: Cohort, key: Array, count: int) -> jax.stages.Lowered:
        def shapes(values: PyTree, axes: int) -> PyTree:  # nothing is sent, so the devices need not exist
            lie = devices.lie(values, server.params, axes)
            return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), values, lie)

        rest, population = shapes((dataclasses.replace(cohorts, state=(), population=None), cohorts.population), 1)
        return compiled.lower(shapes(server, 1), shapes(cohorts.state, 3), rest, population, key, np.int32(count))

    run.lower = lower  # type: ignore[attr-defined]
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
