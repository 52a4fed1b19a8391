"""A population of which a process opens a part: what it holds, and what it refuses."""

import numpy as np
import optax
import pytest

import fedjax_clip as fc

SIZES = [3, 4, 2]
PART = fc.data.parts.opened({"x": np.arange(5.0, dtype=np.float32)[:, None]}, [2, 0], SIZES)


def loss(params, batch, key):
    return (batch["x"] @ params["w"]) ** 2


def test_own_examples_lie_where_those_of_the_whole_population_would():
    assert PART.sizes.tolist() == SIZES
    assert PART.own.tolist() == [True, False, True]
    assert PART.client(2)["x"].ravel().tolist() == [0, 1]
    assert PART.client(0)["x"].ravel().tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("use", "sentence"),
    [
        (lambda: PART.client(1), "Client '1' is opened by another process"),
        (lambda: PART.select([0]), "must be a whole population"),
        (lambda: fc.evaluator(loss, {"mine": PART}), r"sets\['mine'\] must be a whole population"),
        (
            lambda: fc.train(fc.fedavg(loss, optax.sgd(0.1)), PART, {"w": np.zeros(1, np.float32)}, rounds=1),
            "data, in one process, must be a whole population",
        ),
        (lambda: fc.data.parts.opened({"x": np.zeros(4)}, [2, 0], SIZES), "have 5 examples, and 4 are given"),
        (lambda: fc.data.parts.opened({"x": np.zeros(2)}, [3], SIZES), "clients"),
    ],
)
def test_a_part_is_not_taken_for_the_whole(use, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        use()
