"""``jax_default_matmul_precision`` is the model's: no norm, mean or noise is computed with fewer bits than float32.

A CPU multiplies float32 exactly whatever is asked, so the laws look at what a GPU or TPU would be asked: a product
that names no precision takes the default, which on a TPU is one pass of bfloat16.
"""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import population

import fedjax_clip as fc
from fedjax_clip.training import loop

CLIP = fc.uplink.clip_by_global_norm(1.0)
EXACT = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
PARTS = {
    "mean": {},
    "uniform mean": {"reducer": fc.reduce.uniform_mean()},
    "quantile clip and noise": {
        "uplink": fc.uplink.chain(fc.uplink.quantile_clip(0.5, bits_noise=1.0), fc.uplink.gaussian(1.0)),
        "reducer": fc.reduce.fixed_mean(4),
    },
    "noise of a mechanism": {
        "uplink": fc.uplink.chain(
            CLIP, fc.uplink.gaussian(1.0, mechanism=fc.uplink.mechanism.inverse_toeplitz([1, -0.5]))
        ),
        "reducer": fc.reduce.fixed_mean(4),
    },
    "noise of a tree": {
        "uplink": fc.uplink.chain(CLIP, fc.uplink.gaussian(1.0, mechanism=fc.uplink.mechanism.tree(8))),
        "reducer": fc.reduce.fixed_mean(4),
    },
    "grid": {"uplink": fc.uplink.chain(CLIP, fc.uplink.integer_grid(rotate=True)), "reducer": fc.reduce.modular_sum(4)},
    "rotation": {"uplink": fc.uplink.compress(fc.compression.eden(2))},
    "median": {"reducer": fc.reduce.median()},
    "krum": {"reducer": fc.reduce.krum(1)},
    "geometric median": {"reducer": fc.reduce.geometric_median()},
    "centered mean": {"reducer": fc.reduce.centered_mean(1.0)},
    "trimmed mean": {"reducer": fc.reduce.trimmed_mean(1)},
    "mimicry": {"reducer": fc.attacks.mimic(fc.reduce.median(), [0], target=1)},
    "forgery": {"reducer": fc.attacks.ipm(fc.reduce.median(), [0])},
    "clipping and mixing": {"reducer": fc.reduce.arc(1, fc.reduce.nnm(1, fc.reduce.bulyan(0)))},
    "least variance": {"reducer": fc.reduce.smea(1)},
    "filter": {"reducer": fc.reduce.caf(1)},
    "widest direction": {"reducer": fc.reduce.dnc(1)},
    "majority": {"reducer": fc.reduce.flame(0.1)},
    "optimal forgery": {"reducer": fc.attacks.optimal_alie(fc.reduce.mda(1), [0])},
    "fltrust": {"reducer": fc.reduce.fltrust(0)},
}


def without_products(params, batch, key):
    """A loss whose gradient multiplies no matrices."""
    return jnp.sum(jnp.square(batch["x"] - params["w"]), -1)


def products(jaxpr):
    """``(precision, operand)`` of every product of floats in a program."""
    for equation in jaxpr.eqns:
        operand = equation.invars[0].aval if equation.invars else None
        if equation.primitive.name == "dot_general" and jnp.issubdtype(operand.dtype, jnp.floating):
            yield equation.params["precision"], operand.str_short()
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


def traced(parts, clip):
    algorithm = fc.fedavg(without_products, optax.chain(clip, optax.sgd(0.1)), optax.adam(0.1), **parts)
    data, params = population(), {"w": np.zeros(4, np.float32)}
    kept = loop.client_states(algorithm, params, data.num_clients)
    cohort = fc.extend.plan(data, np.arange(4), fc.extend.LocalWork(4), seed=0, round=0, width=2, state=kept)
    cohort = jax.tree.map(lambda x: x[0], cohort)
    return jax.make_jaxpr(algorithm.round)(algorithm.init(params), cohort, jax.random.key(0))


@pytest.mark.parametrize("name", PARTS)
def test_means_norms_and_noise_name_their_precision(name):
    with jax.default_matmul_precision("bfloat16"):
        found = list(products(traced(PARTS[name], fc.clipping.clip_by_global_norm(1.0)).jaxpr))
    assert [product for product in found if product[0] != EXACT] == []


def test_the_setting_changes_nothing_but_the_model():
    programs = []
    for setting in ("bfloat16", "highest"):
        with jax.default_matmul_precision(setting):
            programs.append(str(traced(PARTS["quantile clip and noise"], fc.clipping.clip_by_global_norm(1.0))))
    assert programs[0] == programs[1]
