"""Several processes that train one model: what each drives, and how they agree.

Where one process drives all devices, nothing here communicates.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_clip.core.types import InvalidInput, PyTree
from fedjax_clip.training import identity
from fedjax_clip.training.transfers import own_rows

CURE = "Start all processes with the same code, data and settings."


class Processes:
    """The processes that drive some devices: this one alone, or all that ``jax.distributed.initialize`` joined.

    Each method that gathers is to be called by all processes at the same place, in the same order.

    Args:
      devices: equally many of each process.

    Attributes:
      count: P, the number of processes.
      number: of this process, from 0.
      own: places among ``devices`` of those that this process drives.
      drivers: ``[D]`` the process that drives each device.

    Raises:
      InvalidInput: devices of some of several processes only, or unequally many.

    Example:
      >>> Processes(jax.local_devices()).count
      1
    """

    def __init__(self, devices: Sequence[jax.Device]):
        drivers = [device.process_index for device in devices]
        self.drivers = np.array(drivers, int)
        self.count, self.number, self.own = max(1, len(set(drivers))), 0, list(range(len(drivers)))
        if self.count > 1:
            self.number = jax.process_index()
            self.own = [i for i, driver in enumerate(drivers) if driver == self.number]
            for counted in (drivers, [device.process_index for device in jax.devices()]):
                numbers = {process: counted.count(process) for process in range(jax.process_count())}
                if len(set(numbers.values())) > 1:
                    told = ", ".join(f"{n} of process {process}" for process, n in numbers.items())
                    raise InvalidInput(
                        f"Processes that train together have equally many devices each, not {told}: give jax.devices() "
                        "and start every process with as many devices."
                    )
        elif drivers and drivers[0] != jax.process_index():
            raise InvalidInput("The devices belong to another process: give jax.local_devices(), or jax.devices().")

    def gather(self, values: PyTree) -> PyTree:
        """Every process's values, ``[P, ...]`` on the host; bits are kept, whatever the type.

        Args:
          values: pytree of host arrays or numbers, with the same shapes and types in all processes.
        """
        arrays = jax.tree.map(np.asarray, values)
        if self.count == 1:
            return jax.tree.map(lambda x: x[None], arrays)
        from jax.experimental import multihost_utils

        # As bytes in one message: JAX would round doubles to floats.
        leaves, structure = jax.tree.flatten(arrays)
        sent = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in leaves]
        with jax.disable_jit(False):  # fc.train(..., debug=True) disables it
            came = multihost_utils.process_allgather(np.concatenate([np.zeros(0, np.uint8), *sent]))
        parts = np.split(came, np.cumsum([x.nbytes for x in leaves])[:-1], axis=1)
        arrays = [np.ascontiguousarray(p).view(x.dtype).reshape(self.count, *x.shape) for p, x in zip(parts, leaves)]
        return jax.tree.unflatten(structure, arrays)

    def whole(self, values: PyTree) -> PyTree:
        """Arrays ``[D, ...]`` with a slice on each device, of all processes, on the host."""
        own = own_rows(values)
        if self.count == 1 or not jax.tree.leaves(own):
            return own
        places, rows = self.gather((np.array(self.own), own))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[np.argsort(places.ravel())], rows)

    def homes(self, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The process ``[M]`` that has each client's examples, from ``own [M]`` of each, and that of each device."""
        return self.gather(own).argmax(0), self.drivers if self.count > 1 else np.zeros(len(self.own), int)

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return bool(flag if self.count == 1 else self.gather(flag).any())

    def most(self, value: float) -> float:
        """The largest of the processes' numbers."""
        return float(value if self.count == 1 else self.gather(float(value)).max())

    def tell(self, text: str) -> list[str]:
        """What each process has to say, ``[P]``."""
        said = text.encode()
        most = int(self.gather(len(said)).max())
        if self.count == 1 or most == 0:
            return [text] * self.count
        room = np.zeros(1 << most.bit_length(), np.uint8)  # few shapes: each compiles a gather
        room[: len(said)] = np.frombuffer(said, np.uint8)
        return [row.tobytes().rstrip(b"\0").decode() for row in self.gather(room)]

    def first(self, value: Any) -> Any:
        """What the first process has: of numbers, texts, and lists and dicts of them."""
        return value if self.count == 1 else json.loads(self.tell(json.dumps(value) if self.number == 0 else "")[0])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that ends in all processes if it fails in one: there with its error, elsewhere with its message.

        The block itself must not gather.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.count == 1:
                raise
            failure = error
        if self.count == 1:
            return
        said = self.tell("" if failure is None else f"{failure}" or type(failure).__name__)
        if failure is not None:
            raise failure
        for process, message in enumerate(said):
            if message:
                raise InvalidInput(f"Process {process} of {self.count} ended: {message}")

    def agree(self, facts: Mapping[str, str], cure: str = CURE) -> None:
        """Ends all processes with one sentence if they differ in some fact.

        Args:
          facts: what must be the same, by names that appear in the sentence. Hashes are not shown.
          cure: what to do about it.

        Raises:
          InvalidInput: a difference.
        """
        if self.count == 1:
            return
        all_facts = [json.loads(text) for text in self.tell(json.dumps(dict(facts)))]
        for name in dict.fromkeys(name for told in all_facts for name in told):
            values = [told.get(name, "none") for told in all_facts]
            if len(set(values)) > 1:
                raise InvalidInput(f"The processes differ in {name}: {_grouped(values)}. {cure}")


def _grouped(values: Sequence[str]) -> str:
    """Who has what: ``1 (processes 0 and 2), 3 (process 1)``."""
    holders: dict[str, list[str]] = {}
    for process, value in enumerate(values):
        holders.setdefault(value, []).append(str(process))
    told = []
    for i, (value, who) in enumerate(holders.items()):
        shown = f"value {i + 1}" if identity.is_hash(value) else value if len(value) < 60 else value[:57] + "..."
        several = len(who) > 1
        listed = f"{', '.join(who[:-1])} and {who[-1]}" if several else who[0]
        told.append(f"{shown} (process{'es' * several} {listed})")
    return ", ".join(told)


ALONE = Processes(())


def joined(devices: Any) -> Processes:
    """Those that train together on what ``fc.train`` was given as ``devices``, before anything is checked."""
    if jax.process_count() == 1:
        return ALONE
    found = jax.devices() if devices is None else devices if isinstance(devices, Sequence) else ()
    found = [device for device in found if isinstance(device, jax.Device)]
    foreign = any(device.process_index != jax.process_index() for device in found)
    return Processes(found) if foreign else ALONE
