"""The engine over a mesh gives pmap's bits, and a model split over the devices of a row trains like a whole one."""

import chex
import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from problems import assert_close, assert_identical, entry, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip.training.placement import chosen, mesh_rounds, replicate, send_server

LENGTH, VOCABULARY = 8, 64
MODEL = fc.models.Transformer(VOCABULARY, length=LENGTH, width=64, layers=1)


@pytest.mark.parametrize(
    ("name", "devices"),
    [("fedavg, stateful link", 1), ("scaffold", 2), ("fedavg, bucketed", 8), ("fedadam, clipped update", 8)],
)
def test_the_mesh_gives_the_bits_of_pmap(name, devices):
    run = entry(name)

    def train(devices):
        options = {"rounds": 4, "cohort_size": 4, "batch_size": 4, "seed": 5}
        return fc.train(run.algorithm, run.data, parameters(), devices=devices, **options)

    pmap, mesh = train(jax.local_devices()[:devices]), train(fc.placement.mesh(clients=devices))
    assert_identical(mesh.state[:2], pmap.state[:2])
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (pmap, mesh)]
    assert timeless[0] == timeless[1]


def next_token_loss(params, batch, key):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(MODEL.apply(params, batch["x"]), batch["y"])
    return losses.mean(-1)


@pytest.fixture(scope="module")
def texts():
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(40, LENGTH + 1)).astype(np.int32)
    return fc.FederatedData({"x": tokens[:, :-1], "y": tokens[:, 1:]}, np.array([0, 5, 18, 20, 27, 40]))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, LENGTH), np.int32))


def transformer():
    client_tx = optax.chain(fc.clipping.clip_by_global_norm(0.5), optax.sgd(0.1))
    return fc.fedavg(next_token_loss, client_tx, optax.adam(0.01, eps=1e-3))


def held(values, device):
    """Bytes of these arrays on a device."""
    shards = [shard for x in jax.tree.leaves(values) for shard in x.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def test_a_transformer_split_in_two_trains_and_resumes_like_a_whole_one(texts, params, tmp_path):
    algorithm, split = transformer(), fc.placement.mesh(clients=4, model=2)

    evaluate = fc.evaluator(next_token_loss, {"train": texts}, devices=split)

    def train(devices, evaluate=evaluate, rounds=4, **options):
        options |= {"evaluate": evaluate, "eval_every": 2, "cohort_size": 4, "batch_size": 4, "rounds": rounds}
        return fc.train(algorithm, texts, params, devices=devices, clients_per_chunk=1, **options)

    judged = fc.evaluator(next_token_loss, {"train": texts})
    whole = train(jax.local_devices()[:4], judged)
    in_two = train(split)
    assert_close(in_two.state.server, whole.state.server, rtol=1e-5, atol=1e-5)
    for one, two in zip(whole.history, in_two.history, strict=True):
        names = {"loss", "eval/train/loss"} & one.keys()
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-5)
    assert len(names) == 2
    for name in ("split", "whole"):
        train(split, rounds=2, checkpoints=tmp_path / name)
    assert_identical(train(split, checkpoints=tmp_path / "split").state[:2], in_two.state[:2])
    resumed = train(jax.local_devices()[:4], judged, checkpoints=tmp_path / "whole")
    assert_close(resumed.state.server, in_two.state.server, rtol=1e-5, atol=1e-5)


def test_each_device_holds_half_of_the_model_and_of_what_follows_it(texts, params):
    algorithm, devices = transformer(), fc.placement.mesh(clients=4, model=2)
    algorithm = algorithm._replace(round=chex.assert_max_traces(algorithm.round, 1))
    ids, work = [np.array([0, 1, 2, 3])], fc.extend.LocalWork(4)
    cohorts = fc.extend.plan_rounds(texts, ids, work, seed=0, first_round=0, num_devices=4)
    server, step = send_server(algorithm.init(params), devices), mesh_rounds(algorithm, devices)
    chex.clear_trace_counter()
    compiled = step.func.lower(server, cohorts, jax.random.key(0), 1).compile()
    whole = sum(x.nbytes for x in jax.tree.leaves(algorithm.init(params)))
    assert compiled.memory_analysis().argument_size_in_bytes < 0.55 * whole
    assert compiled.memory_analysis().temp_size_in_bytes < whole  # 0.9 of it; of a whole model's round 1.8

    size = sum(x.nbytes for x in jax.tree.leaves(params))
    for _ in range(3):  # what comes back lies as it came, so the second round does not compile
        for part in (server.params, *server.opt_state[0][1:]):
            assert {held(part, device) < 0.55 * size for device in jax.devices()} == {True}
        server, _, _ = step(server, cohorts, jax.random.key(0), 1)


def test_a_frozen_base_is_split_too(texts, params):
    tuned, split = fc.lora(next_token_loss, params, rank=2), fc.placement.mesh(clients=4, model=2)
    algorithm = fc.partially_frozen(fc.scaffold(tuned.per_example_loss, optax.sgd(0.1)), tuned.frozen)
    start = tuned.init(jax.random.key(1))
    server = send_server(algorithm.init(start), split)
    base = sum(x.nbytes for x in jax.tree.leaves(params))
    assert held(server.params["base"], jax.devices()[0]) < 0.55 * base

    def train(devices):
        return fc.train(algorithm, texts, start, rounds=2, cohort_size=4, batch_size=4, devices=devices)

    in_two = train(split)
    assert_close(in_two.state[:2], train(jax.local_devices()[:4]).state[:2], rtol=1e-5, atol=1e-5)
    assert_identical(in_two.params["base"], jax.tree.map(np.asarray, params))


@pytest.mark.parametrize("bits", [32, 8])
def test_a_decoders_base_is_split_and_its_adapters_train_alike(texts, bits):
    llama = fc.models.Llama(VOCABULARY, width=128, hidden=128, layers=1, heads=4, key_heads=2)
    base = llama.init(jax.random.key(0), np.zeros((1, LENGTH), np.int32))
    base = base if bits == 32 else fc.models.quantised(base, bits)
    tuned = fc.lora(fc.tasks.next_token(llama), base, 2, "query|value", beside=True)
    tokens = np.concatenate([texts.examples["x"], texts.examples["y"][:, -1:]], 1)
    chats = {"tokens": tokens, "segments": np.ones_like(tokens), "answers": tokens % 3 > 0}
    data, split = fc.FederatedData(chats, texts.offsets), fc.placement.mesh(clients=4, model=2)
    algorithm = fc.partially_frozen(fc.fedavg(tuned.per_example_loss, optax.sgd(0.5)), tuned.frozen)
    start = tuned.init(jax.random.key(1))
    server = send_server(algorithm.init(start), split)
    size = sum(x.nbytes for x in jax.tree.leaves(base))
    assert (
        held(server.params["base"], jax.devices()[0]) < (0.55 if bits == 32 else 0.6) * size
    )  # small scales lie whole

    def train(devices):
        return fc.train(algorithm, data, start, rounds=2, cohort_size=4, batch_size=4, devices=devices)

    in_two, whole = train(split), train(jax.local_devices()[:4])
    assert_close(in_two.params["adapters"], whole.params["adapters"], rtol=1e-4, atol=1e-5)
    assert max(abs(np.asarray(x)).max() for x in jax.tree.leaves(whole.params["adapters"])) > 1e-3


def test_every_part_of_a_rounds_state_follows_the_parameters_of_its_name():
    data, split = population(), fc.placement.mesh(clients=2, model=2, shard={"^w": PartitionSpec("model")})
    link = fc.uplink.error_feedback(fc.uplink.clip_by_global_norm(0.5), fc.uplink.compress(fc.compression.top_k(0.5)))
    algorithm = fc.scaffold(softmax_loss, optax.sgd(0.2), optax.sgd(1.0, momentum=0.9), uplink=link)
    server, kept = algorithm.init(parameters()), algorithm.init_client(parameters())
    lie = split.lie(server, server.params, 0)
    assert {x.spec for x in (lie.params["w"], lie.opt_state[0].trace["w"])} == {PartitionSpec("clients", "model")}
    assert lie.params["b"].spec == PartitionSpec("clients")
    assert PartitionSpec("clients", "model") in {x.spec for x in jax.tree.leaves(split.lie(kept.own, server.params, 0))}

    def train(devices):
        return fc.train(algorithm, data, parameters(), rounds=3, cohort_size=4, batch_size=4, devices=devices)

    assert_close(train(split).state[:2], train(jax.local_devices()[:2]).state[:2], rtol=1e-5, atol=1e-5)


def test_rows_with_unequal_work_wait_for_each_other():
    """Its noise moves pieces between the devices of a row in each step: XLA then has all rows meet."""
    run, shard = entry("fedavg, private for records and clients"), {"w": PartitionSpec("model")}

    def train(devices):
        options = {"rounds": 2, "cohort_size": 3, "batch_size": 4, "seed": 3}
        return fc.train(run.algorithm, run.data, parameters(), devices=devices, **options)

    split = train(fc.placement.mesh(clients=2, model=2, shard=shard))
    assert_close(split.state[:2], train(jax.local_devices()[:2]).state[:2], rtol=1e-5, atol=1e-5)


def test_what_no_mesh_can_do_is_refused():
    with pytest.raises(fc.InvalidInput, match="A mesh of 5 x 2 needs 10 devices, and there are 8"):
        fc.placement.mesh(clients=5, model=2)
    with pytest.raises(fc.InvalidInput, match="model=3 must divide the number of devices, 8"):
        fc.placement.mesh(model=3)
    run = entry("fedavg")
    for shard, said in (
        ({"w": PartitionSpec(None, "model")}, r"cannot split parameter 'w' of shape \(4, 3\) over model=2 devices"),
        (lambda name, shape: PartitionSpec("clients"), "name only 'model'"),
        (lambda name, shape: "model", "must be a jax.sharding.PartitionSpec"),
    ):
        with pytest.raises(fc.InvalidInput, match=said):
            devices = fc.placement.mesh(clients=2, model=2, shard=shard)
            fc.train(run.algorithm, run.data, parameters(), rounds=1, devices=devices)
    secure = fc.fedavg(
        softmax_loss, optax.sgd(0.1), reducer=fc.reduce.on_host(lambda messages, came: messages.sum(0), 3)
    )
    with pytest.raises(fc.InvalidInput, match="A round that calls the host .* cannot split a model"):
        fc.train(secure, run.data, parameters(), rounds=1, devices=fc.placement.mesh(clients=2, model=2))
    with pytest.raises(fc.InvalidInput, match="Only fc.train and fc.evaluator split a model"):
        fc.extend.placement.local(fc.placement.mesh(clients=2, model=2))


def test_devices_are_a_list_or_a_mesh():
    assert chosen(None) == jax.local_devices()
    mesh = fc.placement.mesh(clients=3)
    assert chosen(mesh) is mesh
    assert list(mesh) == jax.local_devices()[:3]
    assert replicate(np.zeros(2), mesh).shape == (3, 2)
    assert fc.placement.mesh(model=2)[1] == jax.local_devices()[2]
