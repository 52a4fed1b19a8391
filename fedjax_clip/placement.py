"""Which devices a run uses, and what lies on each: rows of devices for clients, and a model split over a row."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import InvalidInput, Params, PyTree

__all__ = ["Mesh", "mesh"]

AXIS, MODEL = "clients", "model"  # the axes of a mesh
SMALL = 2**12  # numbers; by default, smaller parameters lie whole on every device

Rule = Callable[[str, tuple[int, ...]], PartitionSpec]  # of a parameter's name and shape


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

    @property
    def mine(self) -> "Mesh":
        """The rows of this process."""
        rows = [row for row, device in enumerate(self) if device.process_index == jax.process_index()]
        return dataclasses.replace(self, devices=jax.sharding.Mesh(self.devices.devices[rows], self.devices.axis_names))

    def sharding(self, *spec: Any) -> NamedSharding:
        """Of arrays ``[D, ...]`` with a slice for each of the D rows, which ``spec`` splits further within a row."""
        return NamedSharding(self.devices, PartitionSpec(AXIS, *spec))

    def lie(self, state: PyTree, params: Params, axes: int) -> PyTree:
        """Where each leaf of a state lies, as arrays ``[D, ...]`` with a slice for each of the D rows.

        A leaf lies like the parameter that it belongs to: the one whose name its own name ends with, if the shapes are
        equal. All other leaves lie whole on every device of a row.

        Args:
          state: of the server or of clients; arrays or their shapes.
          params: the model's parameters, with as many of the leading axes as there are.
          axes: leading axes that the leaves of ``state`` have before those of a parameter: 0 for a state without rows,
            1 for the server's ``[D, ...]``, 3 for clients' ``[D, R, C, ...]``.

        Returns:
          A pytree of ``NamedSharding``.

        Example:
          >>> mesh = fc.placement.mesh(clients=1)
          >>> tuple(mesh.lie({"momentum": params}, params, 0)["momentum"]["w"].spec)
          ('clients',)
        """
        skip = min(axes, 1)
        known = {}
        for name, x in tree.named_leaves(params):
            shape = np.shape(x)[skip:]
            known[name] = shape, self._spec(name, shape)

        def sharding(path: Any, x: Any) -> NamedSharding:
            keys = tree.leaf_name(path).split("/")
            ends = ("/".join(keys[i:]) for i in range(len(keys) + 1))  # the longest first
            shape, spec = next((known[end] for end in ends if end in known), ((), PartitionSpec()))
            return self.sharding(*[None] * (axes - 1), *(spec if np.shape(x)[axes:] == shape else ()))

        return jax.tree_util.tree_map_with_path(sharding, state)

    def whole(self, params: Params) -> PyTree:
        """Where parameters without rows lie: split over ``"model"``, and the same in all rows. ``NamedSharding`` each.

        Example:
          >>> tuple(fc.placement.mesh(clients=1).whole(params)["w"].spec)
          ()
        """
        named = [NamedSharding(self.devices, self._spec(name, np.shape(x))) for name, x in tree.named_leaves(params)]
        return jax.tree.unflatten(jax.tree.structure(params), named)

    def _spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How a parameter lies in a row."""
        if self.model == 1:
            return PartitionSpec()
        if self.shard is None:
            return largest_axis(shape, self.model)
        if isinstance(self.shard, tuple):
            spec = next((spec for pattern, spec in self.shard if re.search(pattern, name)), PartitionSpec())
        else:
            spec = self.shard(name, shape)
        checks.kind(f"shard: for {name!r} it", spec, PartitionSpec, "a jax.sharding.PartitionSpec")
        split = [size for size, axis in zip(shape, spec, strict=False) if axis == MODEL]
        if len(spec) > len(shape) or set(spec) - {None, MODEL} or any(size % self.model for size in split):
            raise InvalidInput(
                f"shard: {spec} cannot split parameter {name!r} of shape {shape} over model={self.model} devices: name "
                f"only 'model', for an axis that {self.model} divides."
            )
        return spec


def largest_axis(shape: tuple[int, ...], model: int) -> PartitionSpec:
    """Splits the largest axis that ``model`` divides, the last of equal ones; nothing if there are few numbers.

    Args:
      shape: of a parameter.
      model: devices to split it over.

    Example:
      >>> tuple(largest_axis((128, 512), 2)), tuple(largest_axis((512,), 2))
      ((None, 'model'), ())
    """
    sizes = [(size, axis) for axis, size in enumerate(shape) if size % model == 0]
    if not sizes or math.prod(shape) < SMALL:
        return PartitionSpec()
    _, largest = max(sizes)
    return PartitionSpec(*[None] * largest, MODEL)


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
      model: devices in a row, which share one model. They must be of one process.
      shard: how parameters are split over the devices of a row: ``(name, shape) -> PartitionSpec`` over ``"model"``, or
        such a specification by regular expression, the first that is found in the parameter's name. Parameters that
        none finds lie whole on every device. By default the largest axis that ``model`` divides is split, of parameters
        of at least 4,096 numbers.
      devices: all devices of all processes by default. The first ``clients * model`` are used.

    Returns:
      A ``Mesh``, for ``fc.train(devices=...)``. Gradients, updates and the states of optimisers, links and clients lie
      like the parameters, and XLA divides the work of a client among the devices of its row. Splitting changes results
      by rounding only.

    Raises:
      InvalidInput: more devices than there are, some that would be left over, or rows of devices of two processes.

    Example:
      >>> result = fc.train(algorithm, data, params, rounds=1, devices=fc.placement.mesh(clients=1))
      >>> split = fc.placement.mesh(clients=1, shard={"kernel$": jax.sharding.PartitionSpec(None, "model")})

    Source: Shoeybi et al. (2019), "Megatron-LM", for layers split over devices; Xu et al. (2021), "GSPMD", for the
    compiler that derives such programs from where the parameters lie.
    """
    model = checks.count("mesh: model", model)
    given = sorted(jax.devices(), key=lambda d: d.process_index) if devices is None else list(devices)
    if clients is None and (not given or len(given) % model):
        raise InvalidInput(f"model={model} must divide the number of devices, {len(given)}, or say how many clients=.")
    clients = len(given) // model if clients is None else checks.count("mesh: clients", clients)
    if clients * model > len(given):
        raise InvalidInput(
            f"A mesh of {clients} x {model} needs {clients * model} devices, and there are {len(given)}: ask for fewer."
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
