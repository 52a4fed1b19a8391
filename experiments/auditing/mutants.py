"""Planted faults, each of which an audit should find.

A fault spoils a link, a reducer, a sampler, an algorithm or an accountant, and leaves what it promises as it was.
Faults of clips are planted beside noise that believes them: ``gaussian`` itself shortens what exceeds its bound.
"""
# ruff: noqa: D103 (a fault's name says what it is; the table has it)

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_clip as fc
from experiments.auditing.cases import (
    BOUND,
    IN_TURN,
    POISSON,
    POISSON_OF,
    ROUNDS,
    Case,
    by_messages,
    by_records,
    clip,
    encoding,
    everyone,
    gaussian_epsilon,
    in_shares,
    normal,
    of,
    poisson_epsilon,
    promised,
    rounds_seen_as,
    sampled,
    trusting,
    with_noise,
)
from fedjax_clip import clipping, compression, uplink
from fedjax_clip.core import tree
from fedjax_clip.core.keys import seeded
from fedjax_clip.core.loss import Gradient, batch_gradient
from fedjax_clip.data import sampling
from fedjax_clip.uplink import mechanism


def no_clip() -> Case:
    return of(encoding(clip(), lambda update, ctx: update), trusting(2.0))


def clip_by_layer() -> Case:
    return of(promised(clipping.clip(1.0, scope=clipping.layer())), trusting(2.0))


def clip_by_value() -> Case:
    return of(promised(optax.clip(1.0)), trusting(2.0))


def clip_to_twice_the_bound() -> Case:
    return of(promised(clipping.clip_by_global_norm(2.0)), trusting(2.0))


def momentum_behind_the_clip() -> Case:
    moved = optax.chain(clipping.clip_by_global_norm(1.0), optax.trace(0.9))
    return everyone(promised(moved, keep_state=True), trusting(4.0))


def error_feedback_behind_the_clip() -> Case:
    lossy = uplink.error_feedback(compression.threshold(0.6))
    return everyone(clip(), lossy.promising(contracts=True), trusting(2.0))


def memory_added_again() -> Case:
    link = uplink.memory(clipping.clip_by_global_norm(1.0))

    def encode(update, state, client_state, ctx):
        message, after, report = link.encode(update, state, client_state, ctx)
        return jax.tree.map(jnp.add, message, client_state[1]), after, report

    return everyone(link._replace(encode=encode), trusting(4.0))


def weights_by_size() -> Case:
    fixed = fc.reduce.fixed_mean(4)

    def add(acc, messages, weights):
        weighted = jax.tree.map(lambda m: jnp.einsum("c,c...->c...", weights.astype(m.dtype), m), messages)
        return fixed.add(acc, weighted, weights)

    return of(clip(), uplink.gaussian(2.0), reducer=fixed._replace(add=add))


def mean_over_those_who_came() -> Case:
    fixed = fc.reduce.fixed_mean(4)

    def add(acc, messages, weights):
        return fixed.add(acc[0], messages, weights), acc[1] + jnp.sum(weights > 0)

    def finish(acc, axis_name):
        total, came = fixed.finish(acc[0], axis_name), jnp.maximum(acc[1], 1)
        return jax.tree.map(lambda t: (t * (4 / came)).astype(t.dtype), total)

    def zero(message, roster):
        return fixed.zero(message, roster), jnp.zeros((), jnp.int32)

    return sampled(clip(), uplink.gaussian(2.0), reducer=fixed._replace(zero=zero, add=add, finish=finish))


def half_the_denominator() -> Case:
    fixed = fc.reduce.fixed_mean(4)

    def add(acc, messages, weights):
        return fixed.add(acc, jax.tree.map(lambda m: 2 * m, messages), weights)

    return of(clip(), uplink.gaussian(2.0), reducer=fixed._replace(add=add))


def a_client_counts_twice() -> Case:
    twice = IN_TURN._replace(sample=lambda *at: np.repeat(IN_TURN.sample(*at), 2), replacement=True)
    return of(clip(), uplink.gaussian(2.0), sampler=twice)


def noise_divided_twice() -> Case:
    return of(clip(), with_noise(lambda key, x, std, ctx: normal(key, x, std / ctx.denominator)))


def variance_for_standard_deviation() -> Case:
    return of(clip(), with_noise(lambda key, x, std, ctx: normal(key, x, std**2)))


def a_wrapper_loses_the_noise() -> Case:
    return of(clip(), with_noise(lambda key, x, std, ctx: optax.tree.zeros_like(x)))


def noise_on_one_leaf() -> Case:
    def draw(key, x, std, ctx):
        leaves, structure = jax.tree.flatten(normal(key, x, std))
        return jax.tree.unflatten(structure, [leaves[0], *map(jnp.zeros_like, leaves[1:])])

    return of(clip(), with_noise(draw))


def one_key_for_all_leaves() -> Case:
    def draw(key, x, std, ctx):
        return jax.tree.map(lambda leaf: std * jax.random.normal(key, leaf.shape), x)

    return of(clip(), with_noise(draw))


def one_number_for_a_leaf() -> Case:
    def draw(key, x, std, ctx):
        return jax.tree.map(lambda leaf: std * jax.random.normal(key, ()) + jnp.zeros_like(leaf), x)

    return of(clip(), with_noise(draw))


def float16_noise() -> Case:
    def draw(key, x, std, ctx):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), normal(key, x, std))

    return sampled(clip(), with_noise(draw))


def noise_without_tails() -> Case:
    def draw(key, x, std, ctx):
        return jax.tree.map(lambda leaf: jnp.clip(leaf, -1.5 * std, 1.5 * std), normal(key, x, std))

    return of(clip(), with_noise(draw))


def uniform_noise() -> Case:
    def draw(key, x, std, ctx):
        half = std * np.sqrt(3)
        return optax.tree.random_like(key, x, sampler=lambda *at: half * (2 * jax.random.uniform(*at) - 1))

    return of(clip(), with_noise(draw))


def noise_in_proportion_to_the_update() -> Case:
    def draw(key, x, std, ctx):
        return normal(key, x, std * jnp.minimum(1.0, 2.0 * tree.norm(x)))

    return of(clip(), with_noise(draw))


def noise_in_proportion_to_those_who_came() -> Case:
    return sampled(clip(), with_noise(lambda key, x, std, ctx: normal(key, x, std * ctx.weight / ctx.denominator)))


def no_noise_where_nobody_came() -> Case:
    return sampled(clip(), with_noise(lambda key, x, std, ctx: normal(key, x, jnp.where(ctx.weight > 0, std, 0.0))))


def noise_from_a_fixed_seed() -> Case:
    return of(clip(), with_noise(lambda key, x, std, ctx: normal(seeded(0), x, std)))


def the_same_noise_in_every_round() -> Case:
    return of(clip(), uplink.gaussian(2.0), make=rounds_seen_as(fc.fedavg, jnp.zeros_like))


def noise_once_for_two_rounds() -> Case:
    return of(clip(), uplink.gaussian(2.0), make=rounds_seen_as(fc.fedavg, lambda round: round // 2))


def noise_in_proportion_to_the_first_bound() -> Case:
    moving = uplink.quantile_clip(0.1, 1.0, rate=1.0, bits_noise=4.0)
    fixed = moving.promising(bound=lambda state, like: jnp.float32(0.1))
    return everyone(fixed, trusting(4.0))


def bits_without_noise() -> Case:
    noised = uplink.quantile_clip(1.0, 0.5, bits_noise=2.0)
    return of(noised._replace(decode=uplink.quantile_clip(1.0, 0.5).decode), uplink.gaussian(2.0), published=BOUND)


def bits_with_a_tenth_of_the_noise() -> Case:
    noised, weak = (uplink.quantile_clip(1.0, 0.5, bits_noise=b) for b in (2.0, 0.2))
    return of(noised._replace(decode=weak.decode), uplink.gaussian(2.0), published=BOUND)


def the_number_of_clients_published() -> Case:
    return sampled(clip(), uplink.gaussian(2.0), published=("clients",))


def who_is_dropped_published() -> Case:
    return sampled(clip(), uplink.gaussian(2.0), published=("dropped",))


def exact_norms_published() -> Case:
    return of(clip(), uplink.gaussian(2.0), published=("client_norm/p90",))


def empty_rounds_that_show() -> Case:
    link = uplink.relative_to_last()

    def decode(aggregate, m, report, ctx):
        return link.decode(aggregate, m, report, ctx._replace(denominator=None))  # as it was before

    return sampled(link._replace(decode=decode), clip(), uplink.gaussian(2.0))


def shares_of_half_the_cohort() -> Case:
    half = uplink.skellam(1.0 / np.sqrt(2))
    return in_shares(clip(), half._replace(promises=uplink.skellam(1.0).promises), reducer=fc.reduce.modular_sum(4, 4))


def shares_of_every_second_client() -> Case:
    noisy, bare = uplink.discrete_gaussian(2.0), uplink.discrete_gaussian(1e-3)
    return in_shares(clip(), bare._replace(promises=noisy.promises))


def local_noise_in_front_of_the_clip() -> Case:
    link = uplink.local_gaussian(8.0)

    def encode(update, ctx):
        noisy = jax.tree.map(jnp.add, update, normal(ctx.key, update, 8.0 * ctx.bound))
        return jax.tree.map(lambda x: tree.scaled(1 / jnp.maximum(1.0, tree.norm(noisy)), x), noisy)

    return by_messages(encoding(clip(), lambda update, ctx: update), encoding(link, encode))


def all_clients_draw_the_same_local_noise() -> Case:
    def encode(update, ctx):
        return jax.tree.map(jnp.add, update, normal(ctx.round_key, update, 8.0 * ctx.bound))

    return by_messages(clip(), encoding(uplink.local_gaussian(8.0), encode))


def no_local_noise_on_zeros() -> Case:
    link = uplink.local_gaussian(8.0)

    def encode(update, state, client_state, ctx):
        message, *rest = link.encode(update, state, client_state, ctx)
        return optax.tree.where(tree.norm(update) > 0, message, update), *rest

    return by_messages(clip(), link._replace(encode=encode))


def variates_without_noise() -> Case:
    """Of SCAFFOLD, whose clients send them beside the update."""
    silent = uplink.chain(clip(), with_noise(lambda key, x, std, ctx: optax.tree.zeros_like(x), 4.0))
    return of(clip(), uplink.gaussian(4.0), make=functools.partial(fc.scaffold, variate_uplink=silent))


def half_of_the_local_noise() -> Case:
    return by_messages(clip(), uplink.local_gaussian(4.0))


def _record_noise(z: float, clipped: Gradient, power: int = 1) -> Gradient:
    def gradient(loss, params, batch, weights, key):
        mean, report = clipped(loss, params, batch, weights, key)
        count = jnp.sum((weights > 0).astype(jnp.float32))
        return jax.tree.map(jnp.add, mean, normal(key, mean, z / count**power)), report

    return gradient


def records_clipped_by_batch() -> Case:
    def clipped(loss, params, batch, weights, key):
        mean, report = batch_gradient(loss, params, batch, weights, key)
        norm = tree.norm(mean)
        return jax.tree.map(lambda x: tree.scaled(1 / jnp.maximum(1.0, norm), x), mean), report

    return by_records(_record_noise(4.0, clipped))


def records_not_clipped() -> Case:
    return by_records(_record_noise(4.0, batch_gradient))


def record_noise_divided_twice() -> Case:
    clipped = fc.local.per_example_gradient(clipping.clip_by_global_norm(1.0))
    return by_records(_record_noise(4.0, clipped, power=2))


def in_turn_accounted_as_poisson() -> Case:
    return sampled(clip(), uplink.gaussian(1.0), sampler=POISSON._replace(sample=IN_TURN.sample))


def twice_the_rate_of_poisson() -> Case:
    return sampled(clip(), uplink.gaussian(1.0), sampler=POISSON._replace(sample=sampling.poisson(12).sample))


def one_sample_for_all_rounds() -> Case:
    alike = POISSON._replace(sample=lambda sizes, seed, round: POISSON.sample(sizes, seed, 0))
    return sampled(clip(), uplink.gaussian(1.0), sampler=alike)


def in_turn_with_a_favourite() -> Case:
    def sample(sizes, seed, round):
        return np.concatenate([[0], 1 + (3 * round + np.arange(3)) % (len(sizes) - 1)])

    return of(clip(), uplink.gaussian(2.0), sampler=IN_TURN._replace(sample=sample))


def replacing_accounted_as_joining() -> Case:
    drawn: dict[str, Any] = {"sampler": sampling.uniform(12), "num_clients": POISSON_OF}
    return of(
        clip(), uplink.gaussian(2.0), **drawn, reducer=fc.reduce.fixed_mean(12), epsilon=poisson_epsilon(2.0, cohort=12)
    )


def half_of_the_rounds_accounted() -> Case:
    return everyone(clip(), uplink.gaussian(2.0), epsilon=gaussian_epsilon(2.0, ROUNDS // 2))


def one_round_accounted() -> Case:
    return sampled(clip(), uplink.gaussian(0.7), epsilon=poisson_epsilon(0.7, rounds=1))


def a_tenth_of_the_rate_accounted() -> Case:
    return sampled(clip(), uplink.gaussian(1.0), epsilon=poisson_epsilon(1.0, cohort=0.4))


def delta_of_each_round() -> Case:
    """The epsilon of a hundred times the delta."""
    right = gaussian_epsilon(2.0, 2)
    return of(clip(), uplink.gaussian(2.0), epsilon=lambda delta: right(min(100 * delta, 0.9)))


def rho_taken_for_epsilon() -> Case:
    return of(clip(), uplink.gaussian(2.0), epsilon=lambda delta: 2 / (2 * 2.0**2))


def bands_that_overlap() -> Case:
    wide = mechanism.toeplitz([1.0, 0.9, 0.9, 0.9, 0.9, 0.9])
    norm = float(np.linalg.norm(np.asarray(wide.strategy(ROUNDS))[:, 0]))
    noise = uplink.gaussian(6.0, mechanism=wide)
    return everyone(clip(), noise, epsilon=gaussian_epsilon(6.0 / norm, ROUNDS))  # as if its rounds were far apart


def correlated_noise_accounted_as_independent() -> Case:
    noise = uplink.gaussian(4.0, mechanism=mechanism.tree(8))
    return everyone(clip(), noise.promising(mechanism=None))


def a_tree_that_forgets_a_node() -> Case:
    """Rounds 2, 4, 6 have no noise of their own: that of their node is taken for drawn already."""
    right = mechanism.tree(8)

    def step(noise, state):
        odd = state[0] % 2
        return right.next(jax.tree.map(lambda x: jnp.where(odd, 0.0, x), noise), state)

    return of(clip(), uplink.gaussian(3.0, mechanism=right._replace(next=step)))


# Every public function of this file, so that none is left out, by its name with spaces.
MUTANTS: Mapping[str, Callable[[], Case]] = {
    name.replace("_", " "): fault
    for name, fault in list(globals().items())
    if inspect.isfunction(fault) and fault.__module__ == __name__ and not name.startswith("_")
}
