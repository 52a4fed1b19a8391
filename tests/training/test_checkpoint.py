"""Checkpoints: whose they are, what is wrong with them, and what a Ctrl-C leaves."""

import functools
import os
import signal

import numpy as np
import optax
import pytest

import fedjax_clip as fc
from fedjax_clip.training import identity
from fedjax_clip.training.checkpoint import Checkpoints

EXAMPLES = {"x": np.ones((300, 2), np.float32), "y": np.arange(300, dtype=np.float32) / 100}
OFFSETS = [0, 100, 300]
DATA = fc.FederatedData(EXAMPLES, OFFSETS)
PARAMS = {"w": np.zeros(2, np.float32)}


def loss(params, batch, key):
    return 0.5 * (batch["x"] @ params["w"] - batch["y"]) ** 2


SCAFFOLD = fc.scaffold(loss, optax.sgd(0.1))


def train(directory, rounds, data=DATA, algorithm=SCAFFOLD, params=PARAMS, **options):
    options = {"checkpoint_every": 2, "local_steps": 2, "rounds_per_dispatch": 1} | options
    return fc.train(algorithm, data, params, rounds=rounds, checkpoints=Checkpoints(directory), **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    train(directory, 4)
    return directory


def changed(field, number, value):
    array = EXAMPLES[field].copy()
    array[number] = value
    return fc.FederatedData(EXAMPLES | {field: array}, OFFSETS)


OTHER_RUNS = {
    "one label": ({"data": changed("y", 151, 9)}, "other data: the values of field 'y' have changed"),
    "one feature": ({"data": changed("x", (1, 1), 0)}, "the values of field 'x'"),
    "a border": ({"data": fc.FederatedData(EXAMPLES, [0, 101, 300])}, "the numbers of the clients' examples"),
    "a name": ({"data": fc.FederatedData(EXAMPLES, OFFSETS, ["0", "b"])}, "the clients' names"),
    "weights": ({"data": fc.FederatedData(EXAMPLES, OFFSETS, weights=np.full(300, 2.0))}, "the example weights"),
    "a type": ({"data": fc.FederatedData(EXAMPLES | {"y": EXAMPLES["y"].astype(int)}, OFFSETS)}, "field 'y'=float32[]"),
    "fewer examples": (
        {"data": fc.FederatedData({k: x[:299] for k, x in EXAMPLES.items()}, [0, 100, 299])},
        "num_examples=300, not 299",
    ),
    "the batch size": ({"batch_size": 10}, "batch_size=20, not 10"),
    "the local work": ({"local_steps": 3}, "local_steps=2, not 3"),
    "the order": ({"shuffle": False}, "shuffle=True, not False"),
    "the cohort": ({"cohort_size": 1}, "sampler=uniform(cohort_size=2), not uniform(cohort_size=1)"),
    "a clock": (
        {"sampler": fc.data.clock.synchronous(fc.data.sampling.uniform(2), fc.data.speeds.lognormal(2.0))},
        "not synchronous(deadline=inf, dropout=0.0, keep=None, sampler=uniform(cohort_size=2), speeds=lognormal(",
    ),
    "the seed": ({"seed": 1}, "seed=0, not 1"),
    "the algorithm": (
        {"algorithm": fc.feddyn(loss, optax.sgd(0.1), alpha=0.1)},
        "algorithm=scaffold, not feddyn",
    ),
    "what is around it": (
        {"algorithm": fc.compressed_broadcast(SCAFFOLD, fc.compression.qsgd(8))},
        "algorithm=scaffold, not compressed_broadcast(scaffold)",
    ),
    "what it keeps": (
        {"algorithm": fc.scaffold(loss, optax.sgd(0.1), optax.adam(0.1))},
        "another model or algorithm",
    ),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_a_checkpoint_says_what_has_changed_and_what_to_do(saved, case):
    options, words = OTHER_RUNS[case]
    with pytest.raises(fc.InvalidInput) as error:
        train(saved, 8, **options)
    assert words in str(error.value)
    assert f"{saved / '4'}" in str(error.value)
    assert "another directory, or remove this one." in str(error.value)


def test_no_two_kinds_of_algorithm_have_one_name():
    made = {"fedavg": fc.fedavg, "fedsgd": fc.fedsgd, "scaffold": fc.scaffold, "mime": fc.mime}
    made["feddyn"] = functools.partial(fc.feddyn, alpha=0.1)
    tx = optax.sgd(0.1)
    for name, make in made.items():
        algorithm = make(loss, tx)
        assert identity.kind(algorithm) == name
        frozen = fc.partially_frozen(algorithm, "b")
        assert identity.kind(frozen) == f"partially_frozen({name})"
    assert identity.kind(fc.episode_plus(loss, tx, threshold=1.0)) == "episode_plus"
    assert identity.kind(fc.partially_private(fc.fedavg(loss, tx), "b")) == "partially_private(fedavg)"


def test_fewer_rounds_than_are_done_are_refused_and_as_many_are_done(saved):
    with pytest.raises(fc.InvalidInput, match="has done 4 rounds, more than rounds=3: ask for 4 or more"):
        train(saved, 3)
    assert train(saved, 4, eval_every=1, rounds_per_dispatch=2).history == []


def test_a_memory_mapped_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.arange(12.0))
    hashed = []
    monkeypatch.setattr(identity, "_digest", lambda x: hashed.append(x.shape) or str(len(hashed)))

    def digest(part=slice(None), mode="r"):
        return identity.digest(np.asarray(np.load(tmp_path / "x.npy", mmap_mode=mode)[part]))

    assert digest() == digest() == "1"
    assert digest(slice(6)) == digest(slice(6)) == "2"
    assert digest(slice(6, 12)) == "3"  # another part of the file
    assert digest(mode="c") == "4"  # which may have been written to
    about = os.stat(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.arange(12.0) + 1)
    os.utime(tmp_path / "x.npy", ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert digest() == "5"


def test_an_array_has_one_hash_however_it_lies():
    x = np.random.default_rng(0).normal(size=(70, 3, 2))
    assert identity.digest(x) == identity.digest(np.asfortranarray(x)) == identity.digest(x[::-1][::-1])
    assert identity.digest(x) != identity.digest(x[::-1])
    assert identity.digest(np.zeros((0, 3))) == identity.digest(np.zeros(0))


def test_a_flipped_byte_is_found_and_the_way_back_is_said(tmp_path, monkeypatch):
    train(tmp_path, 4)
    read = Checkpoints._read

    def flipped(self, step, item, *how):
        found = read(self, step, item, *how)
        if item == "arrays":
            found["0"] = found["0"].copy()
            found["0"].view(np.uint8)[3] ^= 1
        return found

    monkeypatch.setattr(Checkpoints, "_read", flipped)
    with pytest.raises(fc.InvalidInput) as error:
        train(tmp_path, 6)
    assert str(error.value) == (
        f"The checkpoint {tmp_path / '4'} is corrupt: server.params['w'] is not what was saved. Remove it to go on from "
        "round 2."
    )


def test_leaves_without_elements_and_with_confusing_names_are_kept_apart(tmp_path):
    params = {"a": {"b": np.full(2, 1, np.float32)}, "a.b": np.full(2, 2, np.float32), "none": np.zeros((0, 3))}
    state = fc.extend.State(params, (), {})
    Checkpoints(tmp_path / "all").save(1, state)
    _, found = Checkpoints(tmp_path / "all").restore(
        fc.extend.State({**params, "a": {"b": np.zeros(2, np.float32)}}, (), {})
    )
    assert found.server["a"]["b"].tolist() == [1, 1]
    assert found.server["a.b"].tolist() == [2, 2]
    assert found.server["none"].shape == (0, 3)
    nothing = fc.extend.State({"none": np.zeros((0, 3))}, (), {})
    Checkpoints(tmp_path / "nothing").save(1, nothing)
    assert Checkpoints(tmp_path / "nothing").restore(nothing)[0] == 1


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C, which a process begun in the background lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_control_c_saves_the_last_whole_state_and_goes_on(tmp_path):
    def on_round(row):
        if row["round"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", 6, checkpoint_every=50, on_round=on_round)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Checkpoints(tmp_path / "stopped").newest() == 3
    resumed, undisturbed = train(tmp_path / "stopped", 6), train(tmp_path / "undisturbed", 6)
    assert [row["round"] for row in resumed.history] == [4, 5, 6]
    assert resumed.params["w"].tobytes() == undisturbed.params["w"].tobytes()


@pytest.mark.usefixtures("interruptible")
def test_a_second_control_c_ends_at_once(tmp_path):
    def on_round(row):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 6, on_round=on_round)
    assert Checkpoints(tmp_path).newest() is None


def test_a_home_directory_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Checkpoints("~/runs").directory == tmp_path / "runs"
    with pytest.raises(fc.InvalidInput, match="no such home directory"):
        Checkpoints("~nobody-of-this-name/runs")
    with pytest.raises(fc.InvalidInput, match="is not UTF-8: choose another name"):
        Checkpoints(tmp_path / "\udcff")
    with pytest.raises(fc.InvalidInput, match="keep must be a whole number of at least 1, not 0"):
        Checkpoints(tmp_path, keep=0)


def test_parameters_that_do_not_train_are_left_out_and_a_run_goes_on_with_its_own(tmp_path):
    def whole(params, batch, key):
        return loss({"w": params["w"] + params["base"][:2]}, batch, key)

    algorithm = fc.partially_frozen(fc.scaffold(whole, optax.sgd(0.1)), "^base")
    params = PARAMS | {"base": np.arange(50_000, dtype=np.float32) / 50_000}
    evaluate = fc.evaluator(whole, {"all": DATA})
    run = functools.partial(
        train, algorithm=algorithm, params=params, evaluate=evaluate, eval_every=1, best=fc.extend.Best("all/loss")
    )
    run(tmp_path / "saved", 2)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < params["base"].nbytes
    resumed, at_once = run(tmp_path / "saved", 4), run(tmp_path / "at once", 4)
    for of in (lambda x: x.params, lambda x: x.best.params):
        for name, x in of(at_once).items():
            np.testing.assert_array_equal(of(resumed)[name], x)
    saved = Checkpoints(tmp_path / "saved").state(algorithm, params)
    assert saved.rounds == 4
    np.testing.assert_array_equal(saved.server.params["base"], params["base"])
    other = params | {"base": 2 * params["base"]}
    going_on = functools.partial(
        train, algorithm=algorithm, params=params, state=run(tmp_path / "b", 2, params=other).state
    )
    going_on(tmp_path / "c", 3)  # of a state with a base of its own, which is not that of params
    resumed = going_on(tmp_path / "c", 4)
    for name, x in going_on(tmp_path / "d", 4).params.items():
        np.testing.assert_array_equal(resumed.params[name], x)
    np.testing.assert_array_equal(resumed.params["base"], other["base"])
    with pytest.raises(fc.InvalidInput, match=r"leaves out server.*base.*another one: begin with the model"):
        run(tmp_path / "saved", 5, params=params | {"base": params["base"] + 1})
    with pytest.raises(fc.InvalidInput, match=r"leaves out .*base"):
        Checkpoints(tmp_path / "saved").state(algorithm, params | {"base": params["base"] + 1})
