"""Data sets of Hugging Face's datasets from local files, and Flower's partitioners beside ours."""

import datetime

import numpy as np
import pytest

import fedjax_clip as fc
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data import partition, sources

pytestmark = pytest.mark.filterwarnings("ignore:Specifying null_placement")  # datasets' own, of pyarrow
datasets = pytest.importorskip("datasets")
WARDS = ["b", "a", "b", "a"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def dataset():
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "ward": datasets.Value("string"),
        "code": datasets.Sequence(datasets.Value("uint8"), length=3),
        "grid": datasets.Array2D((2, 2), "int16"),
        "dose": datasets.Value("float32"),
        "born": datasets.Value("timestamp[ns]"),
        "ragged": datasets.Sequence(datasets.Value("int32")),
        "nested": {"inner": datasets.Value("int8")},
    }
    rows = {
        "image": [np.full((4, 5), i, np.uint8) for i in range(4)],
        "label": [0, 1, 1, 0],
        "ward": WARDS,
        "code": [[i, 2, 3] for i in range(4)],
        "grid": [[[i, 2], [3, 4]] for i in range(4)],
        "dose": [0.5, None, 1.0, 2.0],
        "born": [datetime.datetime(2026, 1, 1)] * 4,
        "ragged": [[1], [1, 2], [1], [1]],
        "nested": [{"inner": 1}] * 4,
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


FIELDS = {"x": "image", "y": "label", "code": "code", "grid": "grid", "dose": "dose"}


def check(data):
    assert data.names == ["a", "b"]
    assert data.labels == {"y": ["cat", "dog"]}
    order = [1, 3, 0, 2]
    x = data.examples["x"]
    assert x.dtype == np.uint8
    assert x.shape == (4, 4, 5, 1)
    np.testing.assert_array_equal(x[:, 0, 0, 0], order)
    np.testing.assert_array_equal(data.examples["y"], np.array([0, 1, 1, 0])[order])
    assert data.examples["code"].dtype == np.uint8
    np.testing.assert_array_equal(data.examples["code"][:, 0], order)
    assert data.examples["grid"].dtype == np.int16
    assert data.examples["dose"].dtype == np.float32
    np.testing.assert_array_equal(data.examples["dose"], np.float32([np.nan, 2, 0.5, 1]))


def test_columns_become_arrays_and_a_natural_column_the_clients(dataset, tmp_path):
    check(sources.huggingface(dataset, FIELDS, by="ward"))
    dataset.to_parquet(tmp_path / "pets.parquet")
    dataset.save_to_disk(tmp_path / "pets")
    before = sorted(tmp_path.iterdir())
    check(sources.huggingface(tmp_path / "pets.parquet", FIELDS, by="ward"))
    check(sources.huggingface(str(tmp_path / "pets"), FIELDS, by="ward"))
    assert sorted(tmp_path.iterdir()) == before


def test_labels_go_along_with_clients_and_examples(dataset):
    data = sources.huggingface(dataset, {"y": "label"}, by="ward")
    assert data.select([1]).labels == {"y": ["cat", "dog"]}
    assert data.split_examples(0.5)[1].labels == {"y": ["cat", "dog"]}
    legend = partition.plot(data).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["cat", "dog"]


def test_a_class_that_names_clients_does_so_by_its_names(dataset):
    assert sources.huggingface(dataset, {"x": "dose"}, by="label").names == ["cat", "dog"]


def test_files_of_text(dataset, tmp_path):
    small = dataset.select_columns(["ward", "dose", "label"])
    small.to_csv(tmp_path / "pets.csv")
    small.to_json(tmp_path / "pets.jsonl")
    for name in ("pets.csv", "pets.jsonl"):
        examples = sources.huggingface(tmp_path / name, {"x": "dose", "y": "label", "who": "ward"})
        np.testing.assert_array_equal(examples["x"], [0.5, np.nan, 1, 2])
        np.testing.assert_array_equal(examples["y"], [0, 1, 1, 0])
        assert examples["who"].tolist() == WARDS


def test_a_filtered_and_shuffled_data_set_gives_its_own_rows(dataset):
    part = dataset.shuffle(seed=1).filter(lambda row: row["label"] == 1)
    assert set(sources.huggingface(part, {"x": "code"})["x"][:, 0].tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("born", "dates or times"),
        ("ragged", r"arrays of different shapes, \(1,\) and \(2,\)"),
        ("nested", "holds {'inner': Value"),
        ("lable", "no field 'lable' .* 'label'"),
    ],
)
def test_a_column_of_which_there_is_no_array_is_refused(dataset, column, words):
    with pytest.raises(InvalidInput, match=words):
        sources.huggingface(dataset, {"x": column})


def test_what_is_no_data_set_is_refused(dataset, tmp_path):
    (tmp_path / "bad.json").write_text("{nope")
    (tmp_path / "bad.parquet").write_bytes(b"xx")
    (tmp_path / "bad.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for thing, words in (
        (tmp_path / "bad.json", "cannot be read by datasets"),
        (tmp_path / "bad.parquet", "cannot be read by datasets"),
        (tmp_path / "bad.txt", "must be a file .csv, .json"),
        (tmp_path / "empty", "cannot be read by datasets"),
        ("user/name", "There is no file user/name. To read one from the Hub"),
        (datasets.DatasetDict({"train": dataset}), "has the splits train"),
        (dataset.to_iterable_dataset(), "is a stream"),
        (dataset.select([]), "is empty"),
        (3, "not int"),
    ):
        with pytest.raises(InvalidInput, match=words) as refusal:
            sources.huggingface(thing)
        assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def flower():
    return pytest.importorskip("flwr_datasets.partitioner")


def labelled(labels):
    rows = {"id": np.arange(len(labels)), "label": labels}
    return rows, datasets.Dataset.from_dict(rows)


def theirs(partitioner, dataset):
    partitioner.dataset = dataset
    return sources.flwr(partitioner, {"id": "id", "y": "label"})


@pytest.mark.filterwarnings("ignore:Classes")
def test_the_clients_are_their_partitions_in_their_order(flower):
    labels = np.random.default_rng(0).integers(0, 5, 300)
    _, dataset = labelled(labels)
    for partitioner in (
        flower.IidPartitioner(7),
        flower.LinearPartitioner(7),
        flower.DirichletPartitioner(7, "label", alpha=0.5, min_partition_size=1, seed=1),
        flower.ShardPartitioner(7, "label", num_shards_per_partition=2, seed=1),
        flower.PathologicalPartitioner(7, "label", num_classes_per_partition=2, seed=1),
        flower.NaturalIdPartitioner("label"),
    ):
        data = theirs(partitioner, dataset)
        assert data.num_clients == partitioner.num_partitions
        for c in range(data.num_clients):
            part = partitioner.load_partition(c)
            assert data.client(c)["id"].tolist() == list(part["id"])
            assert data.client(c)["y"].tolist() == list(part["label"])


def test_a_federated_data_set_of_a_local_file(flower, tmp_path):
    from flwr_datasets import FederatedDataset

    (tmp_path / "rows.jsonl").write_text("".join(f'{{"id": {i}, "label": {i % 2}}}\n' for i in range(10)))
    options = {"data_files": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache"), "shuffle": False}
    federated = FederatedDataset(dataset="json", partitioners={"train": 3}, **options)
    data = sources.flwr(federated, {"id": "id", "y": "label"})
    assert [data.client(c)["id"].tolist() for c in range(3)] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    with pytest.raises(InvalidInput, match="split='test' has no partitioner; there is one of train"):
        sources.flwr(federated, split="test")


def test_what_makes_no_clients_is_refused(flower):
    with pytest.raises(InvalidInput, match="has no data set"):
        sources.flwr(flower.IidPartitioner(2))
    with pytest.raises(InvalidInput, match="must be a partitioner or a FederatedDataset"):
        sources.flwr(datasets.Dataset.from_dict({"x": [1]}))
    _, dataset = labelled(np.zeros(4, int))
    with pytest.raises(InvalidInput, match="Partition . is empty"):
        theirs(flower.DirichletPartitioner(4, "label", alpha=0.01, min_partition_size=0), dataset)


def test_natural_clients_are_theirs_exactly(flower):
    labels = np.random.default_rng(0).integers(0, 12, 200)
    rows, dataset = labelled(labels)
    ours = partition.natural(rows | {"y": labels}, by="label")
    found = theirs(flower.NaturalIdPartitioner("label"), dataset)
    assert found.names == ours.names
    np.testing.assert_array_equal(found.offsets, ours.offsets)
    np.testing.assert_array_equal(found.examples["id"], ours.examples["id"])


@pytest.mark.parametrize(("num_examples", "num_clients"), [(100, 7), (10, 10), (60, 6)])
def test_iid_sizes_are_theirs_exactly(flower, num_examples, num_clients):
    rows, dataset = labelled(np.arange(num_examples) % 5)
    found = theirs(flower.IidPartitioner(num_clients), dataset)
    assert found.sizes.tolist() == partition.iid(rows, num_clients).sizes.tolist()


def counts(data, num_classes):
    """``[clients, classes]``."""
    return np.stack([np.bincount(data.client(c)["y"], minlength=num_classes) for c in range(data.num_clients)])


def test_shards_are_of_their_sizes_and_as_pure(flower):
    """With whole shards of one class, the pathological split: a client has two shards, so one or two classes."""
    labels = np.repeat(np.arange(5), 40)
    rows, dataset = labelled(labels)
    ours, found = [], []
    for seed in range(40):
        deal = flower.ShardPartitioner(10, "label", num_shards_per_partition=2, shard_size=10, seed=seed)
        found.append(counts(theirs(deal, dataset), 5))
        ours.append(counts(partition.shards(rows | {"y": labels}, 10, 2, seed=seed), 5))
    for table in (*ours, *found):
        assert (table.sum(1) == 20).all()
        assert set(np.unique(table)) <= {0, 10, 20}
    # Two of 20 shards, four of each class: a client has one class with probability 3/19. Of 400 clients 63 +- 7.
    pure = [sum(int((table == 20).any(1).sum()) for table in tables) for tables in (ours, found)]
    assert all(abs(number - 400 * 3 / 19) < 30 for number in pure), pure


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_dirichlet_shares_have_their_distribution(flower, alpha):
    """A client's share of a class is Beta(alpha, (M - 1) alpha); ours and theirs are also compared with each other."""
    from scipy import stats

    num_clients, per_class = 8, 500
    labels = np.repeat(np.arange(10), per_class)
    rows, dataset = labelled(labels)
    ours, found = [], []
    for seed in range(6):
        deal = flower.DirichletPartitioner(num_clients, "label", alpha=alpha, min_partition_size=0, seed=seed)
        found.append(counts(theirs(deal, dataset), 10) / per_class)
        ours.append(counts(partition.dirichlet(rows | {"y": labels}, num_clients, alpha, seed=seed), 10) / per_class)
    beta = stats.beta(alpha, (num_clients - 1) * alpha)
    for shares in (np.array(ours), np.array(found)):
        assert abs(shares.mean() - 1 / num_clients) < 1e-12
        assert abs(shares.std() / beta.std() - 1) < 0.2
        # One client of each class, so that the shares are independent: 60 of them.
        one = shares[:, np.arange(10) % num_clients, np.arange(10)].ravel() + 0.5 / per_class
        assert stats.kstest(one, beta.cdf).pvalue > 1e-3
    assert stats.ks_2samp(np.ravel(ours), np.ravel(found)).pvalue > 1e-3


def test_a_model_learns_from_a_data_set(dataset):
    task = fc.tasks.huggingface(dataset, x="grid", by="ward", hidden=(), classes=2)
    assert task.data.labels == {"y": ["cat", "dog"]}
    assert task.predictor.output == {"classes": ["cat", "dog"]}
    assert task.data.examples["x"].shape[1:] == (2, 2)
    assert fc.tasks.huggingface(dataset, x="code", num_clients=2, hidden=()).data.num_clients == 1
