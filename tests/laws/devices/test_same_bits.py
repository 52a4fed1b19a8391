"""exact_mean on 1, 2, 4 and 8 devices, in two orders of the clients: one SHA of all that a run ends with."""

import hashlib

import jax
import numpy as np
import optax
import pytest
from problems import EVERYTHING, clipped_sgd, parameters, population, softmax_loss

import fedjax_clip as fc

EXACT = fc.reduce.exact_mean()
ENTRIES = {
    "fedadam": lambda: fc.fedavg(
        softmax_loss, clipped_sgd, fc.fedopt.fedadam(0.03), uplink=fc.uplink.quantile_clip(0.2), reducer=EXACT
    ),
    "scaffold": lambda: fc.scaffold(softmax_loss, clipped_sgd, optax.sgd(1.0, momentum=0.9), reducer=EXACT),
}
OF_DEVICES = ("seconds", "wasted_steps")
SIZES = np.random.default_rng(4).integers(1, 13, 24)


def trained(algorithm, devices, backwards=False, **options):
    """The SHA-256 of parameters, states and rows after five rounds of nine clients."""
    data = population(SIZES)

    def draw(sizes, seed, round):
        ids = fc.data.sampling.uniform(9).draw(sizes, seed, round)
        return ids[::-1] if backwards else ids

    options = {"sampler": fc.data.sampling.Sampler(draw), "batch_size": 4, "local_epochs": 2, **options}
    options = {"clients_per_chunk": 2, "devices": jax.local_devices()[:devices], **options}
    result = fc.train(algorithm, data, parameters(), rounds=5, **options)
    rows = [{name: x for name, x in row.items() if name not in OF_DEVICES} for row in result.history]
    sha = hashlib.sha256(repr(rows).encode())
    for leaf in jax.tree.leaves((result.state.server, result.state.clients)):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("name", ENTRIES if EVERYTHING else ["fedadam"])
def test_the_bits_are_the_same_on_any_number_of_devices_in_any_order(name):
    algorithm = ENTRIES[name]()
    dispatch = {1: 1, 2: 5, 4: 3, 8: None}
    shas = {d: trained(algorithm, d, backwards=d in (2, 8), rounds_per_dispatch=dispatch[d]) for d in dispatch}
    assert len(set(shas.values())) == 1, shas


def test_a_mean_of_floats_has_other_bits():
    """Or the laws above would hold of anything."""
    algorithm = fc.fedavg(softmax_loss, clipped_sgd)
    assert trained(algorithm, 1) != trained(algorithm, 8, backwards=True)
