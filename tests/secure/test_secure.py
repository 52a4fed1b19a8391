"""Sums that a server learns without a message: exact to the last bit, and what they hide.

``test_secure_client.py`` has a server lie to one client, ``test_secure_model.py`` to all of them;
``test_homomorphic.py`` is on CKKS.
"""

import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import MESSAGES, brought_to, party

import fedjax_clip as fc
from fedjax_clip.secure import Stage
from fedjax_clip.secure.sharing import PRIME

FALSE_ALARM = 1e-6  # of each statistical test below: keys and masks are fresh in every run
secure = fc.secure


@st.composite
def sums(draw):
    """Messages of a few clients, of any type, of whom enough come and answer."""
    n = draw(st.integers(2, 7))
    threshold = draw(st.integers(max(2, n // 2 + 1), n))
    dtype = np.dtype(draw(st.sampled_from(["uint8", "uint16", "uint32"])))
    order = draw(st.permutations(range(n)))
    came = draw(st.integers(threshold, n))
    answered = draw(st.integers(threshold, came))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    messages = rng.integers(0, np.iinfo(dtype).max, (n, draw(st.integers(1, 40))), dtype, endpoint=True)
    # a circle in which each has four neighbours: one of them silent, at most, so that two answer of any four
    neighbours = secure.Neighbourhood(4, 2) if n > 5 and answered >= n - 2 and draw(st.booleans()) else None
    return messages, threshold, np.isin(range(n), order[:came]), np.isin(range(n), order[:answered]), neighbours


@settings(max_examples=30, deadline=None)
@given(sums())
def test_the_sum_is_exact_whoever_falls_silent(case):
    messages, threshold, came, answered, neighbours = case
    total, seen = secure.aggregate(messages, threshold, came, answered, neighbours)
    expected = messages[came].astype(object).sum(0) % 2 ** (8 * messages.itemsize)
    assert total.dtype == messages.dtype
    assert total.tolist() == expected.tolist()
    assert secure.unmask(seen, neighbours.threshold if neighbours else threshold).tolist() == total.tolist()


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_every_number_of_dropouts_up_to_the_threshold(silent):
    came = np.arange(5) >= silent
    total, seen = secure.aggregate(MESSAGES, 3, came, answered=np.arange(5) != 4 if silent < 2 else None)
    assert total.tolist() == MESSAGES[silent:].sum(0).tolist()
    assert sorted(seen.masked) == list(range(silent, 5))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((MESSAGES, 4, np.arange(5) > 1), "3 clients are left, fewer than the threshold of 4"),
        ((MESSAGES, 4, None, np.arange(5) > 1), "3 clients are left"),
        ((MESSAGES, 6), "more than the cohort of 5"),
        ((MESSAGES.astype(np.float32), 3), "unsigned integers, not float32"),
    ],
)
def test_what_stays_closed(arguments, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        secure.aggregate(*arguments)


def test_fewer_shares_than_the_threshold_open_nothing():
    secret = bytes(range(32))
    shares = dict(zip(range(1, 8), secure.split(secret, 4, range(1, 8)), strict=True))
    some = {x: shares[x] for x in (2, 3, 5, 7)}
    assert secure.join(some) == secret
    assert secure.join({x: some[x] for x in (2, 3, 5)}) != secret
    assert pow(7, PRIME - 1, PRIME) == 1  # Fermat

    # Three shares of 1 and of 2^255 look alike: their top bits, over fresh polynomials.
    def high(secret):
        draws = [secure.split(secret.to_bytes(32), 4, (1, 2, 3)) for _ in range(2000)]
        return np.bincount([(a >> 253) * 8 + (b >> 254) * 2 + (c >> 255) for a, b, c in draws], minlength=64)

    assert same_distribution(high(1), high(2**255)) > FALSE_ALARM


def test_a_neighbourhood_whose_shares_are_the_secret_is_refused():
    for near in (secure.Neighbourhood(4, 1), secure.Neighbourhood(4, 0), secure.Neighbourhood(4, 5), (4, 2)):
        for build in (
            lambda near=near: secure.pairwise_masks(8, neighbours=near),
            lambda near=near: secure.aggregate(MESSAGES, 4, neighbours=near),
            lambda near=near: party(5, 4, ([{1, 2}] * 5, near)),
        ):
            with pytest.raises(fc.InvalidInput, match="neighbours"):
                build()


def test_messages_of_another_order_of_bytes_have_the_same_sum():
    assert secure.aggregate(MESSAGES.astype(">u4"), 4)[0].tolist() == MESSAGES.sum(0).tolist()


def test_a_threshold_must_be_a_majority():
    """Else two halves open two sums."""
    clients = party(4, 2)
    seen = brought_to(Stage.SHARE, clients)
    with pytest.raises(fc.InvalidInput, match="2 is no majority of the 4 clients"):
        clients[0].share(seen.keys)
    for build in (fc.reduce.modular_sum, secure.pairwise_masks):
        with pytest.raises(fc.InvalidInput, match="no majority of a cohort of 8.* take 5 or more"):
            build(8, threshold=4)
        with pytest.raises(fc.InvalidInput, match="one client is its message"):
            build(1)
    with pytest.raises(fc.InvalidInput, match="one client is its message"):
        fc.secure.ckks_mean(1)
    assert [fc.reduce.secure_threshold(n, None) for n in (2, 3, 8, 9)] == [2, 2, 6, 6]
    assert [fc.reduce.majority(n, 6) for n in (7, 11, 12, 30)] == [6, 6, 7, 16]


@pytest.mark.parametrize(  # of federated-compute, graph_parameter_finder_test
    ("clients", "colluding", "silent", "size", "threshold"),
    [
        (100, 0.45, 0.45, 92, 46),
        (10, 0.33, 0.33, 8, 4),
        (100, 0.33, 0.33, 68, 34),
        (1000, 0.33, 0.33, 286, 150),
        (100, 0.05, 0.33, 28, 6),
        (1000, 0.05, 0.33, 72, 24),
        (10_000, 0.05, 0.33, 86, 29),
        (1_000_000, 0.05, 0.33, 102, 34),
        (10, 0.33, 0.05, 4, 4),
        (100, 0.33, 0.05, 34, 29),
        (10_000, 0.33, 0.05, 92, 70),
    ],
)
def test_neighbourhoods_are_the_published_ones(clients, colluding, silent, size, threshold):
    assert secure.neighbourhood(clients, colluding, silent) == (size, threshold)


def test_sparse_graphs_are_regular_and_random():
    graph = secure.harary(20, 6)
    assert all(len(near) == 6 and u not in near for u, near in enumerate(graph))
    assert all(u in graph[v] for u in range(20) for v in graph[u])
    assert graph != secure.harary(20, 6)
    for n, k in ((6, 3), (6, 6)):
        with pytest.raises(fc.InvalidInput, match="even number below"):
            secure.harary(n, k)
    with pytest.raises(fc.InvalidInput, match="take the full graph"):
        secure.neighbourhood(8, 0.4, 0.4)


def test_a_sparse_graph_costs_less_and_its_neighbourhoods_must_answer():
    messages = np.random.default_rng(0).integers(0, 2**16, (40, 5), np.uint16)
    came = np.arange(40) % 8 > 0
    full, sparse = (secure.aggregate(messages, 27, came, neighbours=k) for k in (None, secure.Neighbourhood(10, 4)))
    assert np.array_equal(full[0], sparse[0])
    assert 3.3 < full[1].bytes_up(1) / sparse[1].bytes_up(1) < 39 / 10
    with pytest.raises(fc.InvalidInput, match="threshold of 10"):
        secure.aggregate(messages, 27, came, neighbours=secure.Neighbourhood(10, 10))
    # a client knows its neighbours, and is told of nobody else
    graph = [{1, 3}, {0, 2}, {1, 3}, {0, 2}]
    clients = party(4, 3, (graph, secure.Neighbourhood(2, 2)))
    with pytest.raises(fc.InvalidInput, match="roster hold client 2"):
        clients[0].share({c.number: c.advertise() for c in clients})


def test_what_the_server_sees_is_uniform_and_does_not_depend_on_a_clients_input():
    """Masked messages of all zeros and of all ones: each byte uniform, and both alike; so are bytes side by side."""
    size = 40_000
    views = []
    for value in (0, 2**32 - 1):
        messages = np.full((3, size), 5, np.uint32)
        messages[0] = value
        _, seen = secure.aggregate(messages, 2)
        views.append(seen.masked[0])
        for masked in seen.masked.values():
            counts = np.bincount(masked.view(np.uint8), minlength=256)
            assert scipy.stats.chisquare(counts).pvalue > FALSE_ALARM
            pairs = (masked[::2] >> 27) * 32 + (masked[1::2] >> 27)
            assert scipy.stats.chisquare(np.bincount(pairs, minlength=1024)).pvalue > FALSE_ALARM
    zeros, ones = (np.bincount(view.view(np.uint8), minlength=256) for view in views)
    assert same_distribution(zeros, ones) > FALSE_ALARM

    # An input that varies: its leading bits and those of its masked form are independent; unmasked they are not.
    messages = np.random.default_rng(0).integers(0, 2**32, (3, size), np.uint32)
    _, seen = secure.aggregate(messages, 2)
    for u in range(3):
        for shown, independent in ((seen.masked[u], True), (messages[u] + np.uint32(9), False)):
            table = np.bincount((messages[u] >> 28) * 16 + (shown >> 28), minlength=256).reshape(16, 16) + 1
            assert (scipy.stats.chi2_contingency(table).pvalue > FALSE_ALARM) == independent


def same_distribution(first, second):
    return scipy.stats.chi2_contingency(np.stack([first, second]) + 1).pvalue


def test_masks_are_chacha20s_key_stream():
    """RFC 8439, appendix A.1, test vector 1."""
    mask = secure.expand(bytes(32), np.zeros(4, np.uint32))
    assert mask.tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_bytes_up_counts_everything():
    messages = np.zeros((5, 100), np.uint16)
    _, seen = secure.aggregate(messages, 3, answered=np.arange(5) < 4)
    keys, masked, signature = 2 * 32 + 64, 200, 64
    assert seen.bytes_up(0) == keys + 4 * (2 * 33 + 16) + masked + signature + 5 * 33
    assert seen.bytes_up(4) == keys + 4 * (2 * 33 + 16) + masked


@pytest.mark.parametrize("came", [6, 5, 4, 3])
def test_large_poisson_rounds_need_a_majority_in_the_protocol_too(came):
    """Nine of five expected: more than half of them must come, or nothing is opened; the same in both."""
    messages = jnp.arange(20, dtype=jnp.uint32).reshape(10, 2)
    roster = fc.reduce.Roster(jnp.array([*range(9), -1]), None)
    weights = (jnp.arange(10) < came).astype(jnp.float32)
    held = messages * (jnp.arange(10) < came)[:, None].astype(jnp.uint32)

    def total(reducer):
        return reducer.finish(reducer.add(reducer.zero(messages[0], roster), held, weights), None).tolist()

    expected = messages[:came].sum(0).tolist() if came >= 5 else [0, 0]
    assert total(fc.reduce.modular_sum(5)) == total(secure.pairwise_masks(5)) == expected


def skellam_curve(colluding, threshold=6):
    link = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.skellam(0.8, bits=8))
    params = {"w": np.zeros(15, np.float32)}
    return fc.privacy.distributed(link, params, fc.reduce.modular_sum(8, threshold), colluding), link.promises.grid(
        15, 8.0, threshold
    )


def test_colluding_clients_take_their_noise_out():
    """By hand: 4 of 6 shares of variance (0.8 D)^2 / 6 are left if two clients tell theirs."""
    curve, grid = skellam_curve(2)
    mu = 4 * (0.8 * grid.l2) ** 2 / 6
    order = np.array([2.0, 5.0, 40.0])
    extra = np.minimum(((2 * order - 1) * grid.l2**2 + 6 * grid.l1) / (4 * mu**2), 3 * grid.l1 / (2 * mu))
    np.testing.assert_allclose(curve(order, 1), order * grid.l2**2 / (2 * mu) + extra, rtol=1e-12)
    # of fine steps, that is a Gaussian of z sqrt((t - k) / t)
    link = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.discrete_gaussian(1.5))
    for k, z in ((0, 1.5), (2, 1.5 * math.sqrt(4 / 6)), (5, 1.5 * math.sqrt(1 / 6))):
        told = fc.privacy.distributed(link, {"w": np.zeros(15, np.float32)}, fc.reduce.modular_sum(8, 6), colluding=k)
        np.testing.assert_allclose(told(order, 1), order / (2 * z**2), rtol=1e-4)
    for k, sentence in ((6, "threshold above colluding"), (-1, "colluding must be a whole number")):
        with pytest.raises(fc.InvalidInput, match=sentence):
            skellam_curve(k)


def test_sampling_in_the_servers_sight_only_spares_rounds():
    """A round of probability q costs nothing or all of it: the moments of that, and between q and 1 of the whole."""
    curve, rate = skellam_curve(0)[0], 0.08
    orders = fc.privacy.renyi.ORDERS
    sampled, whole = fc.privacy.renyi.in_sight(curve, rate), curve(orders, 1)
    low = orders[:20] - 1
    np.testing.assert_allclose(sampled[:20], np.log(1 - rate + rate * np.exp(low * whole[:20])) / low)
    assert np.all(sampled >= rate * whole)
    assert np.all(sampled <= whole)
    # the exact Renyi divergence of two outputs that say who took part: 'absent' or one of two normal variables
    z, order = 1.3, 7
    moment = (1 - rate) + rate * math.exp(order * (order - 1) / (2 * z**2))
    found = fc.privacy.renyi.in_sight(fc.privacy.renyi.gaussian(z), rate)[list(orders).index(order)]
    assert found == pytest.approx(math.log(moment) / (order - 1))
    for sampler in (fc.data.sampling.poisson(8), fc.data.sampling.uniform(8)):
        spent = fc.privacy.epsilon(curve, sampler, 100, 10, 1e-3)
        by_hand = np.min(10 * sampled + np.log1p(-1 / orders) - np.log(1e-3 * orders) / (orders - 1))
        assert spent == pytest.approx(by_hand)
    assert fc.privacy.epsilon(curve, fc.data.sampling.uniform(8), 8, 10, 1e-3) > spent


@pytest.mark.parametrize(
    ("module", "package", "name"),
    [("fedjax_clip.secure", "cryptography", "secure"), ("fedjax_clip.secure.ckks", "tenseal", "ckks_mean")],
)
def test_a_missing_package_is_named(module, package, name, monkeypatch):
    for imported in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, imported)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    parent = fc if name == "secure" else fc.secure
    monkeypatch.delattr(parent, module.rpartition(".")[2], raising=False)
    with pytest.raises(fc.InvalidInput, match=rf"needs {package}: pip install 'fedjax_clip\[secure\]'"):
        getattr(parent, name)
