"""CKKS: what leaves a client is an exact sum, from which the attack on decrypted sums gets no key."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tenseal
from problems import softmax_loss
from tenseal import sealapi

import fedjax_clip as fc


def test_what_leaves_a_ckks_client_is_the_exact_sum_of_rounded_messages():
    """So it is the same whatever the key and the errors were: nothing about them can be in it."""
    rng = np.random.default_rng(0)
    for n, scale in ((2, 1e-5), (8, 0.1), (8, 1e6)):
        x = (scale * rng.normal(size=(n, 2100))).astype(np.float32)
        schemes = [fc.secure.Ckks(n) for _ in range(2)]
        totals = [scheme.add([scheme.encrypt(row) for row in x]) for scheme in schemes]
        rounded = sum(schemes[0].rounded(row) for row in x)
        for scheme, total in zip(schemes, totals, strict=True):
            assert np.array_equal(scheme.decrypt(total), rounded)
            error = np.abs(scheme._approximate(total) - rounded).max()
            assert 0 < error < scheme.error <= scheme.step / 2  # there was one, and it was within its bound
        assert totals[0] != totals[1]
        if scale < 1:
            assert np.abs(rounded - x.sum(0, dtype=np.float64)).max() <= n * scheme.step / 2
        assert np.abs(rounded).max() <= n * scheme.limit == scheme.MOST
    assert [len(parts) for parts in (scheme.encrypt(x[0]), scheme.encrypt(x[0][:2048]))] == [2, 1]
    assert not scheme.public.has_secret_key()
    assert [math.log2(fc.secure.Ckks(n).step) for n in (8, 100)] == [-27, -23]
    assert scheme.encrypt(x[0]) != scheme.encrypt(x[0])


def key_of(scheme, total, decrypted):
    """Li and Micciancio's attack, Section 3: the key from the ciphertext of a sum of 4096 numbers, and its decryption.

    Decryptions are real: of ``p = c0 + c1 s`` one sees ``w = p + p*``, with * the conjugation X -> 1/X. Two ciphertexts
    are two linear equations in s and s* at each root of unity, where * takes the i-th to the i-th from the end.
    """
    degree, parameters = scheme.DEGREE, sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    moduli = sealapi.CoeffModulus.Create(degree, list(scheme.PRIMES))
    parameters.set_poly_modulus_degree(degree)
    parameters.set_coeff_modulus(moduli)
    context, q = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128), moduli[0].value()
    equations = []
    for text, values in zip(total, np.split(decrypted, 2), strict=True):
        w = sealapi.Plaintext()
        sealapi.CKKSEncoder(context).encode((2 * values).tolist(), context.first_parms_id(), scheme.SCALE, w)
        (sum_of_all,) = tenseal.ckks_vector_from(scheme.public, text).ciphertext()
        c0, c1 = ([sum_of_all[k * degree + i] for i in range(degree)] for k in (0, 1))
        equations.append([(c1[i], c1[-1 - i], w[i] - c0[i] - c0[-1 - i]) for i in range(degree)])
    key = []
    for (a, b, v), (c, d, w) in zip(*equations, strict=True):
        key.append((v * d - b * w) * pow(a * d - b * c, -1, q) % q)
    return key


@pytest.mark.parametrize("scale", [1e-5, 0.1])
def test_the_server_does_not_get_the_key_from_a_decrypted_sum(scale):
    scheme = fc.secure.Ckks(8)
    x = (scale * np.random.default_rng(0).normal(size=(8, 4096))).astype(np.float32)
    total = scheme.add([scheme.encrypt(row) for row in x])
    true = scheme._context.secret_key().data.data()
    true = [true[i] for i in range(scheme.DEGREE)]
    assert key_of(scheme, total, scheme._approximate(total)) == true  # what left the clients before
    guessed = key_of(scheme, total, scheme.decrypt(total))
    assert sum(a == b for a, b in zip(guessed, true, strict=True)) < 3


EXTRAS = {
    "scaffold": lambda **parts: fc.scaffold(softmax_loss, optax.sgd(0.1), **parts),
    "mime": lambda **parts: fc.mime(softmax_loss, optax.sgd(0.1), **parts),
    "episode": lambda **parts: fc.episode(softmax_loss, optax.sgd(0.1), threshold=1.0, **parts),
    "episode_plus": lambda **parts: fc.episode_plus(softmax_loss, optax.sgd(0.1), threshold=1.0, **parts),
    "fednova": lambda **parts: fc.fednova(softmax_loss, optax.sgd(0.1), **parts),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_what_is_sent_beside_the_update_does_not_go_in_the_clear(name):
    clip, grid = fc.uplink.clip_by_global_norm(1.0), fc.uplink.integer_grid()
    for link, reducer in (
        (clip, fc.secure.ckks_mean(8)),
        (fc.uplink.chain(clip, grid), fc.secure.pairwise_masks(8)),
    ):
        with pytest.raises(fc.InvalidInput, match="take fedavg or fedsgd"):
            EXTRAS[name](uplink=link, reducer=reducer)


def test_a_server_that_lies_reads_a_ckks_message():
    """It hands the clients one message for the sum: documented, since they cannot tell."""
    scheme, x = fc.secure.Ckks(8), np.arange(5) / 8
    assert np.array_equal(scheme.decrypt(scheme.add([scheme.encrypt(x)])), x)


def test_every_round_of_ckks_has_a_fresh_key():
    reducer, drawn = fc.secure.ckks_mean(3), []

    class Watched(fc.secure.Ckks):
        def __init__(self, n):
            super().__init__(n)
            drawn.append((n, self._context.secret_key().data.data()[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedjax_clip.secure.ckks.Ckks", Watched)
        came = jnp.array([1.0, 1.0, 0.0, 0.0])
        messages = jnp.asarray([[0.5], [0.25], [0.0], [0.0]])
        for present, weights, mean in (
            ([0, 1, 2, -1], came, 0.25),
            ([0, 1, 2, -1], came, 0.25),
            ([0, 1, 2, -1], came * 0, 0),
        ):
            acc = reducer.zero(messages[0], fc.reduce.Roster(jnp.array(present), None))
            assert reducer.finish(reducer.add(acc, messages, weights), None)[0] == mean
        one = reducer.add(
            reducer.zero(messages[0], fc.reduce.Roster(jnp.arange(4), None)), messages, jnp.array([1.0, 0, 0, 0])
        )
        assert reducer.finish(one, None)[0] == 0  # the sum of one is its message
    assert [n for n, _ in drawn] == [3, 3]  # of who is in the round, not of the places there are
    assert drawn[0][1] != drawn[1][1]
