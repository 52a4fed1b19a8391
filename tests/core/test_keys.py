"""ChaCha20 as the generator of a secret: RFC 8439's blocks, OpenSSL's streams, and all of jax.random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from statistical import assert_uniform

from fedjax_clip.core import keys
from fedjax_clip.privacy import Secret
from fedjax_clip.uplink import discrete

SECRET = Secret.of_seed(7)
KEY = np.arange(32, dtype=np.uint8)


def words(text):
    return np.frombuffer(bytes.fromhex(text.replace(" ", "").replace("\n", "")), "<u4")


# RFC 8439, section 2.3.2 and appendix A.1 (test vectors 1, 2, 3 and 5): key, counter, nonce, block.
VECTORS = (
    (
        bytes(range(32)).hex(),
        1,
        "000000090000004a00000000",
        """10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e
        d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e""",
    ),
    (
        "00" * 32,
        0,
        "00" * 12,
        """76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7
        da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586""",
    ),
    (
        "00" * 32,
        1,
        "00" * 12,
        """9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed
        29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f""",
    ),
    (
        "00" * 31 + "01",
        1,
        "00" * 12,
        """3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a
        8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0""",
    ),
    (
        "00" * 32,
        0,
        "00" * 11 + "02",
        """c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7
        8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d""",
    ),
)


@pytest.mark.parametrize("vector", VECTORS, ids=range(len(VECTORS)))
def test_the_block_is_that_of_rfc_8439(vector):
    key, counter, nonce, block = vector
    found = keys.block(words(key), jnp.array([counter], jnp.uint32), words(nonce))
    np.testing.assert_array_equal(found[0], words(block))


def stream(key, nonce, count):
    """The key stream of another implementation (OpenSSL's), from counter 0 on."""
    state = Cipher(algorithms.ChaCha20(key.tobytes(), bytes(4) + np.array(nonce, "<u4").tobytes()), None)
    return np.frombuffer(state.encryptor().update(bytes(4 * count)), "<u4")


def test_bits_children_and_folds_are_streams_of_nonces_of_their_own():
    key = keys.chacha(KEY.view("<u4"))
    np.testing.assert_array_equal(jax.random.bits(key, (7, 100), jnp.uint32).ravel(), stream(KEY, (0, 0, 0), 700))
    np.testing.assert_array_equal(
        jax.random.bits(key, (37,), jnp.uint8), stream(KEY, (0, 0, 0), 10).view(np.uint8)[:37]
    )
    children = np.asarray(jax.random.key_data(jax.random.split(key, (2, 3)))).reshape(6, 8)
    np.testing.assert_array_equal(children, stream(KEY, (1, 0, 0), 96).reshape(6, 16)[:, :8])
    folded = jax.random.key_data(jax.random.fold_in(key, 2**32 - 1))
    np.testing.assert_array_equal(folded, stream(KEY, (2, 2**32 - 1, 0), 8))
    assert jax.random.bits(key, (0,)).shape == (0,)


def test_all_of_jax_random_takes_such_a_key_and_vmap_changes_nothing():
    key = SECRET.key()
    assert keys.threefry(key) is key
    draw = jax.jit(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), (5,), jnp.float32))
    together = jax.vmap(draw, (None, 0))(key, jnp.arange(3, dtype=jnp.int32))
    np.testing.assert_array_equal(together, [draw(key, jnp.int32(i)) for i in range(3)])
    np.testing.assert_array_equal(jax.lax.map(lambda i: draw(key, i), jnp.arange(3, dtype=jnp.int32)), together)
    normals = np.asarray(jax.random.normal(key, (100_000,), jnp.float32), float)
    moments = [np.mean(normals**k) for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.08)  # five standard errors of the fourth
    assert_uniform(np.bincount(jax.random.bits(key, (100_000,), jnp.uint32) >> 24, minlength=256))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(draw(key, jnp.int32(1)), together[1])
        wide = stream(SECRET.words(), (0, 0, 0), 10).view("<u8")
        np.testing.assert_array_equal(jax.random.bits(key, (5,), jnp.uint64), wide)
        assert jax.random.key(2**40 + 3, impl=keys.CHACHA20).shape == ()


@pytest.mark.parametrize("variance", [0.5, 90.0])
def test_skellam_noise_is_drawn_from_such_a_key_too(variance):
    x = np.asarray(jax.jit(lambda key: discrete.skellam(key, (20_000,), variance))(SECRET.key()), float)
    kurtosis = np.mean(x**4) / np.mean(x**2) ** 2 - 3
    np.testing.assert_allclose([x.mean() / x.std(), x.var() / variance], [0, 1], atol=0.05)
    assert abs(kurtosis - 1 / variance) < 0.3 + 1 / variance / 2
