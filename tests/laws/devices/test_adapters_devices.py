"""Adapters whose products are averaged train alike on one device and on two, and draw the same new adapters there."""

import jax
import numpy as np
import pytest
from problems import COHORTS, Run, assert_close, clipped_sgd, parameters, population, softmax_loss

import fedjax_clip as fc


@pytest.mark.parametrize("make", [fc.adapters.residual, fc.adapters.stacked, fc.adapters.decomposed])
def test_two_devices_are_one(make):
    tuned = fc.lora(softmax_loss, parameters(), 2, "w")
    run = Run(fc.partially_frozen(make(tuned, clipped_sgd), tuned.untouched), population())
    start = jax.tree.map(np.asarray, tuned.init(jax.random.key(0)))
    alone = run.rounds(start, COHORTS)[0].params
    together = run.rounds(start, COHORTS, run.pmapped(jax.local_devices()[:2]), 2)[0].params
    assert_close(tuned.merge(together), tuned.merge(alone))
    if make is fc.adapters.stacked:
        assert_close(together["adapters"], alone["adapters"])
