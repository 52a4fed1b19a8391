"""Which devices a run uses, and what lies on each: rows of devices for clients, and a model split over a row."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import overload

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput

__all__ = ["Mesh", "mesh"]

AXIS, MODEL = "clients", "model"  # the axes of a mesh
SMALL = 2**12  # numbers; smaller parameters lie whole on every device

Rule = Callable[[str, tuple[int, ...]], PartitionSpec]


@dataclasses.dataclass(frozen=True)
class Mesh(Sequence[jax.Device]):
    """Devices in rows, for ``devices=`` of ``fc.train``: each row trains clients of its own, and holds one model.

    As a sequence it has one device for each row, its first. ``fc.placement.mesh`` makes one.

    Attributes:
      devices: JAX's mesh of the axes ``"clients"`` and, if rows have several devices, ``"model"``.
      shard: how parameters are split over ``"model"``; see ``fc.placement.mesh``.

    Example:
      >>> mesh = fc.placement.mesh(clients=1)
      >>> len(mesh), mesh.devices.axis_names, mesh.model
      (1, ('clients',), 1)
    """

    devices: jax.sharding.Mesh
    shard: Rule | tuple[tuple[str, PartitionSpec], ...] | None = None

    def __len__(self) -> int:
        return self.devices.devices.shape[0]

    @overload
    def __getitem__(self, row: int) -> jax.Device: ...

    @overload
    def __getitem__(self, row: slice) -> list[jax.Device]: ...

    def __getitem__(self, row: int | slice) -> jax.Device | list[jax.Device]:
        first = [devices[0] for devices in self.devices.devices.reshape(len(self), -1)]
        return first[row]

    @property
    def model(self) -> int:
        """The number of devices that share a model."""
        return self.devices.size // len(self)

    def sharding(self, *spec: str | None) -> NamedSharding:
        """Of arrays ``[D, ...]`` with a slice for each of the D rows, which ``spec`` splits further within a row."""
        return NamedSharding(self.devices, PartitionSpec(AXIS, *spec))


def mesh(
    clients: int | None = None,
    model: int = 1,
    *,
    shard: Rule | Mapping[str, PartitionSpec] | None = None,
    devices: Iterable[jax.Device] | None = None,
) -> Mesh:
    """A mesh of ``clients x model`` devices.

    Args:
      clients: rows of devices, over which a cohort is split; as many as there are devices for by default.
      model: devices in a row, over which the parameters are split.
      shard: how a parameter is split.
      devices: all devices of all processes by default.

    Returns:
      A ``Mesh``, for ``fc.train(devices=...)``.

    Raises:
      InvalidInput: more devices than there are.

    Example:
      >>> result = fc.train(algorithm, data, params, rounds=1, devices=fc.placement.mesh(clients=1))
    """
    model = checks.count("mesh: model", model)
    given = sorted(jax.devices(), key=lambda d: d.process_index) if devices is None else list(devices)
    clients = len(given) // model if clients is None else checks.count("mesh: clients", clients)
    if not 0 < clients * model <= len(given):
        raise InvalidInput(
            f"A mesh of {clients} x {model} needs {max(1, clients) * model} devices, and there are {len(given)}: ask "
            "for fewer, or start more processes."
        )
    rows = np.array(given[: clients * model]).reshape(clients, model)
    if any(len({device.process_index for device in row}) > 1 for row in rows):
        raise InvalidInput(
            f"A model cannot be split over the devices of two processes: model={model} must divide the number of "
            "devices of each process."
        )
    if model == 1:
        return Mesh(jax.sharding.Mesh(rows[:, 0], (AXIS,)))
    pairs = tuple(shard.items()) if isinstance(shard, Mapping) else shard
    return Mesh(jax.sharding.Mesh(rows, (AXIS, MODEL)), pairs)
