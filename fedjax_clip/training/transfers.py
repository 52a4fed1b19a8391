"""Arrays on their way to the devices of a run and back: a slice, or a copy, for each place.

A place is a device of a list or a row of a ``Mesh``, and D places hold an array ``[D, ...]``. In several processes each
one sends and reads the slices of its own places only.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from fedjax_clip.core.types import Array, PyTree
from fedjax_clip.placement import AXIS, Mesh

Devices = Sequence[jax.Device]  # a list of this process's, or a Mesh


def own(devices: Devices) -> list[int]:
    """The places, among ``devices``, of those that are this process's.

    Args:
      devices: a list of devices, or a ``Mesh``, whose places are its rows.

    Example:
      >>> fc.extend.placement.own(jax.local_devices()[:1])
      [0]
    """
    return [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]


def beginning(devices: Devices) -> contextlib.AbstractContextManager[object]:
    """A block in which what is computed of a whole model is computed on the host, if a device cannot hold the model.

    Args:
      devices: of the run; nothing changes unless they split the model.

    Example:
      >>> with fc.extend.placement.beginning(fc.placement.mesh(clients=1)):
      ...     server = algorithm.init(params)
    """
    if not isinstance(devices, Mesh) or devices.model == 1 or devices[0].platform == "cpu":
        return contextlib.nullcontext()
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def replicate(values: PyTree, devices: Devices) -> PyTree:
    """A copy of every leaf on each device, ``[D, ...]``; nothing is compiled.

    Args:
      values: arrays of any shape.
      devices: D devices, or a ``Mesh`` of D rows; this process fills its own.

    Example:
      >>> server = fc.extend.placement.replicate(algorithm.init(params), jax.local_devices())
    """
    return jax.tree.map(lambda x: _copies(np.asarray(x), len(devices), _sharding(devices)), values)


def send_server(server: PyTree, devices: Devices) -> PyTree:
    """A copy of the server's state in each place, ``[D, ...]``, split over a row's devices like the parameters.

    Args:
      server: from the algorithm's ``init``.
      devices: D devices, or a ``Mesh`` of D rows; this process fills its own.

    Example:
      >>> server = fc.extend.placement.send_server(algorithm.init(params), fc.placement.mesh(clients=1))
    """
    if not isinstance(devices, Mesh) or devices.model == 1:
        return replicate(server, devices)
    lie = devices.lie(server, server.params, 0)
    return jax.tree.map(lambda x, sharding: _copies(np.asarray(x), len(devices), sharding), server, lie)


def _copies(x: np.ndarray, count: int, sharding: jax.sharding.NamedSharding) -> Array:
    """``[count, ...]``, each slice ``x``."""
    shape = (count, *x.shape)
    # Each device gets its own copy: a round donates it, and a CPU device would otherwise share the host's array.
    where = sharding.addressable_devices_indices_map(shape).items()
    each = [jax.device_put(np.array(x[index[1:] if index else ...])[None], device) for device, index in where]
    return jax.make_array_from_single_device_arrays(shape, sharding, each)


def split(values: PyTree, devices: Devices) -> PyTree:
    """Sends host arrays ``[D, ...]`` to the devices, a slice to each, without waiting. Arrays already there stay.

    Args:
      values: host arrays ``[D, ...]``; in several processes only the slices of the process's own places (``own``).
      devices: D devices, or a ``Mesh`` of D rows.

    Example:
      >>> on_devices = fc.extend.placement.split(cohorts, jax.local_devices()[:1])
    """
    return _split(values, len(devices), _sharding(devices))


def split_states(states: PyTree, server: PyTree, devices: Devices) -> PyTree:
    """``split`` for clients' states ``[D, R, C, ...]``, which lie within a row like the parameters.

    Args:
      states: of clients; see ``split``.
      server: the server's state, arrays or shapes ``[D, ...]``.
      devices: D devices, or a ``Mesh`` of D rows.

    Example:
      >>> devices = fc.placement.mesh(clients=1)
      >>> server = fc.extend.placement.send_server(algorithm.init(params), devices)
      >>> states = fc.extend.placement.split_states((), server, devices)  # FedAvg's clients keep nothing
    """
    if not isinstance(devices, Mesh) or devices.model == 1 or not jax.tree.leaves(states):
        return split(states, devices)
    lie = devices.lie(states, server.params, 3)
    return jax.tree.map(lambda x, sharding: _split(x, len(devices), sharding), states, lie)


def _split(values: PyTree, count: int, sharding: jax.sharding.NamedSharding) -> PyTree:
    if sharding.is_fully_addressable:
        return jax.device_put(values, sharding)

    def send(x: Any) -> Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), (count, *np.shape(x)[1:]))

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
        return np.asarray(x) if not isinstance(x, jax.Array) or x.is_fully_addressable else _own_rows(x)

    return jax.tree.map(rows, values)


def first_replica(values: PyTree) -> PyTree:
    """This process's first copy of each leaf as a NumPy array, without the leading axis.

    Args:
      values: arrays ``[D, ...]`` with a slice on each device.

    Example:
      >>> server = fc.extend.placement.replicate(algorithm.init(params), jax.local_devices())
      >>> params = fc.extend.placement.first_replica(server.params)
    """

    def first(x: Array) -> np.ndarray:
        if isinstance(x, jax.Array) and x.sharding.num_devices == 1:
            return np.asarray(x)[0]  # a tenth of the time that addressable_data takes
        one = np.asarray(x.addressable_data(0))
        return one.reshape(x.shape[1:]) if one.shape[1:] == x.shape[1:] else _own_rows(x, 1)[0]

    return jax.tree.map(first, values)


def _own_rows(x: Array, most: int | None = None) -> np.ndarray:
    """The first slices of this process's own places, put together of the pieces on the devices of a row."""
    pieces: dict[int, list[Any]] = {}
    for shard in x.addressable_shards:
        pieces.setdefault(shard.index[0].start or 0, []).append(shard)
    rows = sorted(pieces)[:most]
    out = np.empty((len(rows), *x.shape[1:]), x.dtype)
    for place, row in enumerate(rows):
        for shard in pieces[row]:
            out[(place, *shard.index[1:])] = np.asarray(shard.data)[0]
    return out
