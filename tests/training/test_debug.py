"""What a user meets whose function fails, and a run without compilation."""

import traceback

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import assert_close, parameters, population, softmax_loss

import fedjax_clip as fc

DATA = population([3, 5, 2])
NAMED = fc.FederatedData(DATA.examples, DATA.offsets, ["ann", "bob", "cid"])


def wrong_shape(params, batch, key):
    return batch["x"] @ params["w"].T


def wrong_name(params, batch, key):
    return undefined(params)  # noqa: F821


def wrong_key(params, batch, key):
    return batch["label"]


def only_late(params, batch, key):
    """Fails for the numbers of one client only, which nothing but a run with numbers can see."""
    if not isinstance(batch["x"], jax.core.Tracer) and float(batch["mark"].max()) > 0:
        raise RuntimeError("the marked one")
    return softmax_loss(params, batch, key)


def train(loss, data=NAMED, params=None, client_tx=None, uplink=None, reducer=None, server_tx=None, **options):
    algorithm = fc.fedavg(loss, client_tx or optax.sgd(0.1), server_tx, uplink=uplink, reducer=reducer)
    options = {"rounds": 1, "batch_size": 2} | options
    return fc.train(algorithm, data, params or parameters(), **options)


def fails(*args, **options):
    try:
        train(*args, **options)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("loss", "kind", "words"),
    [
        (wrong_shape, TypeError, "contracting dimensions"),
        (wrong_name, NameError, "name 'undefined' is not defined"),
        (wrong_key, KeyError, "'label'"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_in_a_loss_is_its_own_and_ends_in_the_users_frame(loss, kind, words, debug):
    error = fails(loss, debug=debug)
    assert type(error) is kind
    assert words in str(error)
    assert traceback.extract_tb(error.__traceback__)[-1].name == loss.__name__
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    assert not any("fedjax_clip/training" in file or "/jax/_src/" in file for file in files)
    note = error.__notes__[-1]
    assert note.startswith("fedjax_clip: raised in per_example_loss")
    assert ("debug=True" in note) is not debug
    assert ("local step 1 of client '" in note) is debug


def boom(*args):
    raise RuntimeError("boom")


LINK = fc.uplink.Uplink(lambda params: (), lambda params: (), boom, lambda a, s, r, c: (a, s, r))
FAILING = optax.GradientTransformation(lambda params: (), boom)


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        ({"client_tx": FAILING}, "the client's optimiser"),
        ({"client_tx": boom}, "client_tx, called with the round's number"),
        ({"server_tx": FAILING}, "the server's step"),
        ({"uplink": LINK}, "the uplink's encode"),
        ({"uplink": LINK._replace(encode=lambda u, s, c, ctx: (u, c, {}), decode=boom)}, "the uplink's decode"),
        ({"reducer": fc.reduce.uniform_mean()._replace(finish=boom)}, "the algorithm's round"),
        ({"reducer": fc.reduce.uniform_mean()._replace(add=boom)}, "the reducer"),
        ({"evaluate": boom}, "the evaluation"),
    ],
)
def test_each_stage_is_named(options, stage):
    error = fails(softmax_loss, **options)
    assert str(error) == "boom"
    assert stage in error.__notes__[-1]


def test_an_error_names_the_client_whose_numbers_made_it():
    marked = {**NAMED.examples, "mark": jnp.zeros(10).at[7].set(1)}  # the last example of bob's last step
    data = fc.FederatedData(marked, NAMED.offsets, NAMED.names)
    error = fails(only_late, data, debug=True, shuffle=False)
    assert "raised in per_example_loss, local step 3 of client 'bob', round 1." in error.__notes__[-1]


def test_an_error_of_a_callback_and_a_sentence_for_people_are_left_alone():
    for options in ({"on_round": boom}, {"should_stop": lambda: 1 / 0}):
        error = fails(softmax_loss, **options)
        assert not hasattr(error, "__notes__")
    error = fails(lambda *args: softmax_loss(*args)[0].mean())
    assert isinstance(error, fc.InvalidInput)
    assert not [note for note in getattr(error, "__notes__", []) if "fedjax_clip" in note]


@pytest.mark.parametrize(
    "make",
    [
        lambda: fc.fedavg(softmax_loss, optax.chain(fc.clipping.clip_by_global_norm(0.5), optax.sgd(0.3))),
        lambda: fc.scaffold(softmax_loss, optax.sgd(0.3), uplink=fc.uplink.clip_by_global_norm(0.1)),
    ],
    ids=["fedavg", "scaffold"],
)
def test_a_run_without_compilation_is_the_run(make):
    seen = []

    def evaluate(params):
        seen.append(params)
        return {"norm": optax.tree.norm(params)}

    options = {"rounds": 2, "cohort_size": 2, "batch_size": 2, "evaluate": evaluate, "eval_every": 1}
    compiled, plain = (fc.train(make(), NAMED, parameters(), debug=debug, **options) for debug in (False, True))
    assert_close(plain.state[:2], compiled.state[:2])
    for rows in zip(plain.history, compiled.history, strict=True):
        assert rows[0].keys() == rows[1].keys()
        for name in rows[0].keys() - {"seconds", "wasted_steps"}:
            assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4), name


def test_a_sweep_lets_an_error_through_as_well():
    with pytest.raises(TypeError, match="contracting dimensions") as caught:
        fc.sweep(
            lambda hyper: fc.fedavg(wrong_shape, optax.sgd(hyper["lr"])),
            {"lr": [0.1]},
            NAMED,
            parameters(),
            softmax_loss,
            rounds=1,
        )
    assert "raised in per_example_loss" in caught.value.__notes__[-1]
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "wrong_shape"


def test_numbers_can_be_printed(capsys):
    def loss(params, batch, key):
        if not isinstance(batch["x"], jax.core.Tracer):
            print("seen", batch["x"].shape)
        return softmax_loss(params, batch, key)

    train(loss, debug=True)
    assert "seen (2, 4)" in capsys.readouterr().out


def test_a_directory_is_a_checkpoint(tmp_path):
    train(softmax_loss, checkpoints=str(tmp_path / "run"))
    assert train(softmax_loss, checkpoints=tmp_path / "run").history == []
