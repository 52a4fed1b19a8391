"""The same round under jit, pmap and shard_map, on 1, 2 and 8 devices. Started by test_devices.py."""

import dataclasses

import chex
import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from problems import COHORTS, ENTRIES, EVERYTHING, assert_close, assert_identical, entry, one_round, parameters

import fedjax_clip as fc
from fedjax_clip.core.secret import Secret
from fedjax_clip.training.placement import AXIS, pmap_rounds, replicate, split
from fedjax_clip.training.states import InMemory

FEW = ["fedavg", "fedavg, stateful link", "fedadam, clipped update"]
# One entry of each way in which devices meet: sums, sums of codes, rows that a reducer needs together, several phases,
# state that the server keeps. The others repeat one of these; ``make strict`` has them, too.
MEETINGS = {
    *("fedavg", "fedavg, stateful link", "fedadam, clipped update", "fedavg, private for records and clients"),
    *("fedavg, on a grid", "fedavg, centered thrice", "fedavg, bucketed", "fedavg, clipped and mixed"),
    *("fedavg, compressed", "fedavg, model with state", "scaffold, sketched", "episode", "fednova, few by leaf"),
    *("fedbuff, stateful link", "mime", "ifca", "afl", "oort", "power_of_choice"),
}
SENDERS = [name for name in ENTRIES if EVERYTHING or name in MEETINGS]


@pytest.mark.parametrize(
    ("name", "devices"), [*((n, 8) for n in SENDERS), *((n, 2) for n in FEW), ("fedavg, stateful link", 1)]
)
def test_pmap_is_jit(name, devices):
    run = entry(name)
    step = run.pmapped(jax.local_devices()[:devices])
    assert_close(run.rounds(parameters(), COHORTS, step, devices), run.rounds(parameters(), COHORTS))


@pytest.mark.parametrize(("name", "devices"), [*((n, 8) for n in FEW), *(("fedavg, stateful link", d) for d in (1, 2))])
def test_shard_map_is_jit(name, devices):
    run = entry(name)
    mesh = Mesh(np.array(jax.local_devices()[:devices]), (AXIS,))

    def one_device(server, cohort, key):
        cohort = dataclasses.replace(jax.tree.map(lambda x: x[0], cohort), axis_name=AXIS)
        server, states, metrics = run.algorithm.round(server, cohort, key)
        return server, jax.tree.map(lambda x: x[None], states), metrics

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    step = jax.jit(
        jax.shard_map(
            one_device, mesh=mesh, in_specs=(whole, split, whole), out_specs=(whole, split, whole), check_vma=False
        ),
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in (whole, split, whole)),  # or the second round compiles
    )
    assert_close(run.rounds(parameters(), COHORTS, step, devices), run.rounds(parameters(), COHORTS))


def test_replicas_stay_equal_and_the_second_round_does_not_compile():
    run, devices = entry("fedavg, stateful link"), jax.local_devices()
    server, clients = run.start(parameters())
    server = replicate(server, devices)
    chex.clear_trace_counter()
    step = pmap_rounds(run.algorithm._replace(round=chex.assert_max_traces(run.algorithm.round, 1)), devices)
    for round in range(3):
        cohort = run.cohort([4, 1, 3], round, clients, len(devices))
        server, states, _ = step(server, one_round(cohort), jax.random.key(0), 1)
        InMemory(clients).scatter(cohort.ids[:, None], states)
    for leaf in jax.tree.leaves(server):
        assert_identical(np.asarray(leaf), np.broadcast_to(np.asarray(leaf)[:1], leaf.shape))


def test_the_server_and_what_clients_keep_are_donated():
    run, devices = entry("fedavg, stateful link"), jax.local_devices()
    server, clients = run.start(parameters())
    server = replicate(server, devices)
    cohorts = split(one_round(run.cohort([4, 1, 3], 0, clients, len(devices))), devices)
    pmap_rounds(run.algorithm, devices)(server, cohorts, jax.random.key(0), 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((server, cohorts.state)))
    assert not cohorts.batches.is_deleted()


@pytest.mark.parametrize("secret", [None, Secret.of_seed(3)])
def test_train_agrees_over_any_number_of_devices(secret):
    run = entry("fedavg, stateful link")

    def train(devices, **options):
        algorithm, data = run.algorithm, run.data
        return fc.train(
            algorithm,
            data,
            parameters(),
            rounds=4,
            cohort_size=5,
            batch_size=4,
            devices=jax.local_devices()[:devices],
            secret=secret,
            **options,
        )

    one = train(1)
    for devices, width in ((8, 1), (2, 2)):
        assert_close(train(devices, clients_per_chunk=width).state[:2], one.state[:2], rtol=1e-4, atol=1e-5)


def test_a_start_and_what_is_not_finite_are_the_same_over_devices():
    run = entry("episode_plus")
    whole, split_ = (
        fc.train(run.algorithm, run.data, parameters(), rounds=2, cohort_size=4, devices=jax.local_devices()[:devices])
        for devices in (1, 4)
    )
    assert_close(split_.state[:2], whole.state[:2], rtol=1e-4, atol=1e-5)
    assert split_.history[0]["bytes_up"] == whole.history[0]["bytes_up"] > whole.history[1]["bytes_up"]

    data = fc.FederatedData({"x": np.array([1, np.nan, 1, np.inf], np.float32)}, np.arange(5), list("abcd"))
    algorithm = fc.fedavg(lambda params, batch, key: batch["x"] * params["w"], optax.sgd(1.0))
    with pytest.raises(fc.InvalidInput, match="Round 1: the updates of clients b, d are not finite"):
        fc.train(algorithm, data, {"w": np.float32(0)}, rounds=1, devices=jax.local_devices()[:4], non_finite="stop")


@pytest.mark.parametrize(("name", "devices"), [("fedavg, dropout", 1), ("fedadam, clipped update", 8)])
def test_many_rounds_a_dispatch_give_the_bits_of_one(name, devices):
    run = entry(name)

    def train(rounds_per_dispatch):
        # steps, so that rounds have one shape
        options = {"cohort_size": 4, "batch_size": 4, "local_steps": 3, "checkpoint_every": 4, "seed": 5}
        options |= {"devices": jax.local_devices()[:devices], "rounds_per_dispatch": rounds_per_dispatch}
        return fc.train(run.algorithm, run.data, parameters(), rounds=11, **options)

    one = train(1)
    for many in (train(7), train(None)):
        assert_identical(many.state[:2], one.state[:2])
        without_time = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (one, many)]
        assert without_time[0] == without_time[1]


def test_hundreds_of_tiny_dispatches_do_not_dead_lock():
    run = entry("fedavg")
    options = {"rounds_per_dispatch": 4, "cohort_size": 3, "local_steps": 1}
    result = fc.train(run.algorithm, run.data, parameters(), rounds=1000, **options)
    assert len(result.history) == 1000
    assert np.isfinite(result.history[-1]["loss"])
