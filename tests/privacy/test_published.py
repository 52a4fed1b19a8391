"""Published epsilons, made again by this library from the published configuration."""

import math

import jax
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, rdp

from fedjax_clip import privacy
from fedjax_clip.data import sampling
from fedjax_clip.uplink import mechanism

# Where a figure is older than dp-accounting's conversion, the loss is the library's and the conversion that of its day.
ORDERS = np.array([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)))  # of TensorFlow Privacy's examples


def classic(spent, delta, orders=ORDERS):
    """``min_a rho(a) + log(1 / delta) / (a - 1)``: Mironov (2017), Proposition 3."""
    return float(np.min(spent + np.log(1 / delta) / (orders - 1)))


def sampled(z, cohort, clients, rounds, orders=ORDERS):
    """The Renyi loss of ``fc.privacy.epsilon(z, poisson(cohort), clients, rounds)``."""
    event = PoissonSampledDpEvent(cohort / clients, GaussianDpEvent(z))
    return np.array(rdp.RdpAccountant(orders).compose(event, rounds)._rdp)


def correlated(z, sensitivity):
    """The Renyi loss of one Gaussian mechanism of noise multiplier ``z / sensitivity``."""
    return ORDERS * sensitivity**2 / (2 * z**2)


def test_dp_fedavg_of_tensorflow_federateds_tutorial():
    """Its calibration of EMNIST's 3383 clients over 100 rounds to (2, 1e-5): "use 120 clients with noise multiplier
    1.2", the least cohort at a ratio of 0.01 (tensorflow.org/federated, "Differential Privacy in TFF")."""

    def epsilon(cohort):
        return privacy.epsilon(0.01 * cohort, sampling.poisson(cohort), 3383, 100, 1e-5, "rdp")

    assert epsilon(120) <= 2 < epsilon(119)
    assert epsilon(120) == pytest.approx(1.986, abs=1e-3)


def test_dp_sgd_by_the_moments_accountant():
    """q = 0.01, sigma = 4, 10,000 steps: 1.26 at 1e-5 (Abadi et al. 2016, section 3.2), by whole orders up to 32 + 1;
    today's conversion of the same loss gives 1.035."""
    orders = np.arange(2.0, 34)
    assert classic(sampled(4.0, 10, 1000, 10_000, orders), 1e-5, orders) == pytest.approx(1.26, abs=5e-3)
    assert privacy.epsilon(4.0, sampling.poisson(10), 1000, 10_000, 1e-5, "rdp") == pytest.approx(1.035, abs=1e-3)


def test_dp_sgd_of_tensorflow_privacys_tutorial():
    """60,000 pictures, batches of 250, sigma 1.3, 15 epochs: 1.18 at 1e-5 (tensorflow.org, "Implement Differential
    Privacy with TensorFlow Privacy"); and ``compute_noise_from_budget``'s example: 1.12 for 2.92, batches of 256, 60
    epochs."""
    assert classic(sampled(1.3, 250, 60_000, 3600), 1e-5) == pytest.approx(1.18, abs=1e-3)
    assert classic(sampled(1.12, 256, 60_000, 14_063), 1e-5) == pytest.approx(2.92, abs=5e-3)


@pytest.mark.parametrize(("z", "published"), [(1.13, 19.74), (8.83, 2.04)])
def test_dp_ftrl_on_stackoverflow(z, published):
    """342,477 users, 100 a round, each once in a tree over 1600 rounds, delta 1e-6 (Kairouz et al. 2021; the figures
    are in TensorFlow Privacy's test of its tree accountant)."""
    sensitivity = privacy.sensitivity(mechanism.tree(1600), sampling.round_robin(100), 342_477, 1600)
    assert classic(correlated(z, sensitivity), 1e-6) == pytest.approx(published, abs=5e-3)


def test_dp_ftrl_of_a_production_keyboard():
    """Spanish next-word prediction in Gboard: noise multiplier 7, 2000 rounds, at most 6 of a device's with 313 rounds
    between: 0.81-zCDP, epsilon 8.90 at 1e-10 (Google AI blog, "Federated Learning with Formal Differential Privacy
    Guarantees", 2022, and its notebook).

    That mechanism's C has a row for every node of the forest, since Honaker's estimator reads them all; of this
    library's tree those that complete a round are enough, and it is worth a little more.
    """
    rounds, apart, most, z = 2000, 314, 6, 7.0
    index = np.arange(rounds)
    took_part = np.isin(index - np.arange(rounds - apart * (most - 1))[:, None], apart * np.arange(most)).T

    def moved(nodes):
        return np.max(np.sum((nodes @ took_part.astype(float)) ** 2, axis=0))

    first = [(start, 2**k) for k in range(11) for start in range(0, rounds - 2**k + 1, 2**k)]
    forest = np.stack([(index >= start) & (index < start + size) for start, size in first])
    assert moved(forest) / (2 * z**2) == pytest.approx(0.81, abs=5e-3)
    alone = privacy.Separated(1)
    assert privacy.epsilon(z / moved(forest) ** 0.5, alone, 1, 1, 1e-10, "rdp") == pytest.approx(8.90, abs=5e-3)
    assert moved(mechanism.tree(rounds).strategy(rounds)) < moved(forest)


def test_a_fourier_accountants_example():
    """q = 0.01, sigma = 4, 10,000 steps: epsilon 1 at 4.243484012034273e-06 (Koskela, Jalko and Honkela 2020, with its
    first ncomp = 1e4)."""
    delta = 4.243484012034273e-06
    tight = privacy.epsilon(4.0, sampling.poisson(10), 1000, 10_000, delta, accountant="pld")
    assert tight == pytest.approx(1.0, abs=1e-3)
    assert tight < privacy.epsilon(4.0, sampling.poisson(10), 1000, 10_000, delta, "rdp") < 1.2


def test_jax_privacys_examples():
    """Rates of 0.1 at delta 1e-6: 3.77 for 512 rounds of noise 3, noise 9.66 for epsilon 1, 155 rounds for epsilon 2
    (the documentation of ``jax_privacy.experimental.accounting``)."""
    run = sampling.poisson(100), 1000
    assert privacy.epsilon(3.0, *run, 512, 1e-6) == pytest.approx(3.77, abs=5e-3)
    assert privacy.noise_multiplier(1.0, *run, 512, 1e-6) == pytest.approx(9.66, abs=5e-3)
    assert privacy.rounds(2.0, 3.0, *run, 1e-6) == pytest.approx(155, abs=0)


def test_amplified_bands_and_truncated_samples_are_jax_privacys():
    """No table of epsilons in the papers could be read: these are what the authors' library computes."""
    from dp_accounting.pld import PLDAccountant
    from jax_privacy.experimental import accounting

    event = accounting.amplified_bandmf_event(1.5, 40, num_bands=8, sampling_prob=0.25)
    banded = mechanism.banded(40, 8)
    ours = privacy.epsilon(1.5, sampling.cyclic_poisson(10, 8), 320, 40, 1e-4, mechanism=banded)
    assert ours == pytest.approx(PLDAccountant().compose(event).get_epsilon(1e-4), abs=1e-3)
    event = accounting.truncated_dpsgd_event(1.5, 40, sampling_prob=0.1, num_examples=200, truncated_batch_size=28)
    ours = privacy.epsilon(1.5, sampling.truncated_poisson(20, 28), 200, 40, 1e-4)
    assert ours == pytest.approx(PLDAccountant().compose(event).get_epsilon(1e-4), abs=1e-3)


def test_bins_are_jax_privacys():
    """By its privacy losses, of a banded matrix: epsilon's delta is just under the one that was asked for."""
    from jax_privacy.batch_selection import BallsInBinsSampling
    from jax_privacy.experimental.monte_carlo import delta_calculation, sample_generation

    made, delta = mechanism.toeplitz([1.0, 0.5, 0.25]), 2e-2
    epsilon = privacy.epsilon(2.0, sampling.balls_in_bins(10), 40, 12, delta, mechanism=made)
    strategy, draws = BallsInBinsSampling(iterations=12, cycle_length=4), 6000
    losses, _ = sample_generation.get_privacy_loss_sample(
        strategy, 2.0, np.array([1.0, 0.5, 0.25]), seed=1, num_samples=draws
    )
    found = delta_calculation.delta_from_epsilon_and_samples(epsilon, losses)
    assert 0.6 * delta < found < delta


# By jax-privacy's buffered_toeplitz.optimize for 1000 rounds, each client once; and those of a test of Google's
# confidential federated compute, to which the noise multiplier 7.379 belongs.
BUFFERS = {
    "1000 rounds": (
        [0.99921308, 0.98870417, 0.92092621, 0.56081076],
        [0.03753396, 0.06940153, 0.16033017, 0.22955688],
    ),
    "a deployment's": (
        [0.9999999999921251, 0.9944453083640997, 0.8985923474607591, 0.4912001418098778],
        [0.0070314825502323835, 0.10613806907600574, 0.1898159060327625, 0.1966594748073734],
    ),
}


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize(("apart", "most"), [(1000, 1), (100, 4), (7, None)])
def test_buffers_sensitivity_is_jax_privacys(name, apart, most):
    from jax_privacy.matrix_factorization import buffered_toeplitz, toeplitz

    with jax.enable_x64(True):
        theirs = buffered_toeplitz.BufferedToeplitz.build(*BUFFERS[name])
        squared = float(toeplitz.minsep_sensitivity_squared(theirs.toeplitz_coefs(1000), apart, most))
    made = mechanism.buffered_toeplitz(*BUFFERS[name])
    ours = privacy.sensitivity(made, privacy.Separated(apart, most), 10**6, 1000)
    assert ours == pytest.approx(math.sqrt(squared), rel=1e-5)


def test_buffers_reach_the_best_toeplitz_matrix():
    """Each client once: the least largest error over Toeplitz matrices is ``sum_k (binom(2k, k) / 4^k)^2``, which is
    ``(ln n + gamma + ln 16) / pi`` for large n (Fichtenberger, Henzinger and Upadhyay 2023; Dvijotham et al. 2024)."""
    rounds = 1000
    best = (math.log(rounds) + np.euler_gamma + math.log(16)) / math.pi

    def error(strategy):
        largest = np.linalg.norm(np.tri(rounds) @ np.linalg.inv(strategy), axis=1).max()
        return largest * np.linalg.norm(strategy[:, 0])

    root = mechanism.inverse_toeplitz(np.cumprod([1.0, *(1 - 1.5 / np.arange(1, rounds))]))
    assert error(root.strategy(rounds)) == pytest.approx(best, abs=1e-3)
    made = mechanism.buffered_toeplitz(*BUFFERS["1000 rounds"])
    assert best < error(made.strategy(rounds)) < 1.001 * best
