"""Secure aggregation on eight devices: the masks change no bit, and the host is asked by one device only."""

import jax
import numpy as np
import optax
from problems import COHORTS, Run, assert_identical, parameters, population, softmax_loss

import fedjax_clip as fc

CLIP = fc.uplink.clip_by_global_norm(0.2)
GRID = fc.uplink.chain(CLIP, fc.uplink.integer_grid(16, rotate=True))


def test_the_protocol_gives_the_plain_sums():
    devices = jax.local_devices()
    calls = []

    def counted(messages, came):
        calls.append(came)
        return fc.secure.aggregate(messages, 2, came)[0]

    def train(uplink, reducer):
        run = Run(fc.fedavg(softmax_loss, optax.sgd(0.2), uplink=uplink, reducer=reducer), population())
        return run.rounds(parameters(), COHORTS, run.pmapped(devices), len(devices))

    plain = train(GRID, fc.reduce.modular_sum(3))
    assert_identical(train(GRID, fc.reduce.on_host(counted, 3, 2, modular=True)), plain)
    assert [int(np.sum(came)) for came in calls] == [3, 3, 3]


def test_large_messages_reach_the_host_while_the_other_devices_wait():
    """More than JAX copies without a thread, of which none is free: it would stop here for ever."""
    wide = {"w": np.zeros((4, 3), np.float32), "b": np.zeros(3, np.float32), "far": np.zeros(40_000, np.float32)}
    algorithm = fc.fedavg(
        softmax_loss, optax.sgd(0.2), uplink=CLIP, reducer=fc.reduce.on_host(lambda m, c: m.sum(0), 3)
    )
    run, devices = Run(algorithm, population()), jax.local_devices()
    after = run.rounds(wide, COHORTS[:2], run.pmapped(devices), len(devices))[0].params
    assert np.any(after["w"])
    assert not np.any(after["far"])
