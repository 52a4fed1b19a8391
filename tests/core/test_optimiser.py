"""Optax transforms that draw: other noise at each client and in each round, in states that go to the host and back."""

import jax
import numpy as np
import optax
import pytest

import fedjax_clip as fc

DATA = fc.FederatedData({"x": np.ones((6, 2), np.float32)}, [0, 2, 4, 6])
START = {"w": np.zeros(4, np.float32)}
NOISE = optax.add_noise(1.0, 0.0, 0)
SETTINGS = {"rounds": 3, "batch_size": 2, "devices": jax.local_devices()[:1]}


def nothing(params, batch, key):
    return 0.0 * batch["x"][:, 0] * params["w"].sum()


def spread(stack):
    """How far the clients' messages lie apart: nothing, if all are the same."""
    return jax.tree.map(lambda x: x.max(0) - x.min(0), stack.messages)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (fc.fedavg, {}),
        (fc.fedsgd, {}),
        (fc.fedavg, {"keep_opt_state": True}),
        (fc.fedavg, {"uplink": fc.uplink.at_client(NOISE, keep_state=True)}),
    ],
    ids=["fedavg", "fedsgd", "kept", "uplink"],
)
def test_noise_of_a_transform_differs_by_client_and_round(make, options):
    client_tx = optax.sgd(1.0) if "uplink" in options else optax.chain(NOISE, optax.sgd(1.0))
    algorithm, seen = make(nothing, client_tx, reducer=fc.reduce.stacking(spread), **options), [START["w"]]
    fc.train(algorithm, DATA, START, **SETTINGS, evaluate=lambda p: seen.append(p["w"]) or {}, eval_every=1)
    moved = np.diff(seen, axis=0)
    assert np.all(moved > 0)
    assert len(np.unique(np.round(moved, 4))) == moved.size


def test_a_server_that_draws_ends_resumes_and_keeps_its_bits(tmp_path):
    algorithm = fc.fedavg(nothing, optax.sgd(1.0), optax.chain(NOISE, optax.sgd(1.0)))
    whole = fc.train(algorithm, DATA, START, **SETTINGS)
    assert np.linalg.norm(whole.params["w"]) > 0.3
    for rounds in (1, 3):
        kept = {"checkpoints": fc.extend.Checkpoints(tmp_path / "run")}
        resumed = fc.train(algorithm, DATA, START, **{**SETTINGS, "rounds": rounds}, **kept)
    np.testing.assert_array_equal(resumed.params["w"], whole.params["w"])


def test_a_transform_that_wants_each_examples_gradient_is_refused():
    private = optax.contrib.differentially_private_aggregate(1.0, 1.0, 0)
    for algorithm in (
        fc.fedavg(nothing, optax.chain(private, optax.sgd(1.0))),
        fc.fedsgd(nothing, optax.chain(private, optax.sgd(1.0))),
        fc.fedavg(nothing, optax.sgd(1.0), optax.chain(private, optax.sgd(1.0))),
        fc.fedavg(nothing, optax.sgd(1.0), uplink=fc.uplink.at_client(private, keep_state=True)),
    ):
        with pytest.raises(fc.InvalidInput, match="gradient=fc.local.private_gradient"):
            fc.train(algorithm, DATA, START, **SETTINGS)


NAN = fc.FederatedData({"x": np.array([[1.0], [np.nan], [1.0], [np.inf]], np.float32)}, [0, 1, 2, 3, 4], list("abcd"))


def shown(params, batch, key):
    return batch["x"][:, 0] * params["w"].sum()


def test_updates_that_are_not_finite_are_dropped_kept_or_end_the_run(tmp_path):
    algorithm = fc.fedavg(shown, optax.sgd(1.0))
    settings = {**SETTINGS, "devices": jax.local_devices()[:2], "rounds": 1}
    dropped = fc.train(algorithm, NAN, START, **settings)
    assert dropped.history[0]["dropped"] == 2
    np.testing.assert_array_equal(dropped.params["w"], -1.0)
    kept = fc.train(algorithm, NAN, START, **settings, non_finite="keep")
    assert (kept.history[0]["dropped"], kept.history[0]["clients"]) == (0, 4)
    assert np.all(np.isnan(kept.params["w"]))
    checkpoints = fc.extend.Checkpoints(tmp_path / "run")
    with pytest.raises(fc.InvalidInput, match=r"Round 1: the updates of clients b, d are not finite\. Lower the"):
        fc.train(algorithm, NAN, START, **settings, non_finite="stop", checkpoints=checkpoints)
    assert checkpoints.restore(dropped.state) is None
    fine = fc.train(algorithm, DATA, START, **settings, non_finite="stop")
    assert "dropped_ids" not in fine.history[0]
    with pytest.raises(fc.InvalidInput, match="non_finite must be 'drop', 'keep' or 'stop', not 'halt'"):
        fc.train(algorithm, DATA, START, **settings, non_finite="halt")
