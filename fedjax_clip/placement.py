"""A round over all local devices: the cohort is split, the server replicated, its buffers donated.

The round itself knows nothing of this: give it an unsplit cohort under ``jax.jit``, or a split one under
``jax.shard_map``, and it computes the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_clip.cohort import Cohort
from fedjax_clip.typing import Algorithm, Array, Metrics, PyTree

AXIS = "devices"


def pmap_round(
    algorithm: Algorithm, devices: Sequence[jax.Device]
) -> Callable[[PyTree, Cohort, Array], tuple[PyTree, PyTree, Metrics]]:
    """The algorithm's round as one compiled program over ``devices``.

    Args:
      algorithm: any ``Algorithm``.
      devices: D local devices.

    Returns:
      ``(server, cohort, key) -> (server, client_states, metrics)`` where server, states and metrics have a leading
      axis D (all replicas of a server are equal, see ``replicate``), and so have the cohort's arrays. The server
      passed in is donated: do not use it again.
    """

    return _pmap_round(algorithm, tuple(devices))


@functools.lru_cache(maxsize=16)  # so that training the same algorithm again does not compile again
def _pmap_round(algorithm: Algorithm, devices: tuple[jax.Device, ...]) -> Callable[..., Any]:
    def one_device(server: PyTree, cohort: Cohort, key: Array):
        return algorithm.round(server, dataclasses.replace(cohort, axis_name=AXIS), key)

    return jax.pmap(one_device, axis_name=AXIS, in_axes=(0, 0, None), donate_argnums=(0,), devices=devices)


def replicate(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """A copy of every leaf on each device, ``[D, ...]``."""
    # The same axis name as the round: arrays of another mesh would cost the second round a compilation.
    copy = jax.pmap(lambda x, _: x, axis_name=AXIS, in_axes=(None, 0), devices=devices)
    return copy(tree, np.zeros(len(devices), np.int8)) if jax.tree.leaves(tree) else tree


def first_replica(tree: PyTree) -> PyTree:
    """The first device's copy of each leaf as a NumPy array, without the leading axis."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)).reshape(x.shape[1:]), tree)
