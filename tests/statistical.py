"""Statistical tests that several files share."""

import numpy as np


def chi_squared(counts):
    expected = np.sum(counts) / len(counts)
    return np.sum((counts - expected) ** 2) / expected, len(counts) - 1


def assert_uniform(counts):
    statistic, freedom = chi_squared(np.asarray(counts))
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 15
