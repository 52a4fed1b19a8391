"""Planted faults, each of which an audit should find, and right configurations, none of which it may call broken.

A fault spoils a link, a reducer, a sampler, an algorithm or an accountant, and leaves what it promises as it was.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_clip as fc
from fedjax_clip import clipping, compression, mechanism, sampling, tree, uplink
from fedjax_clip.keys import seeded
from fedjax_clip.local import Gradient, batch_gradient

DELTA = 1e-3
ROUNDS = 6


class Case(NamedTuple):
    """What is audited.

    Attributes:
      build: see ``fc.privacy.audit``.
      sampler: who takes part.
      num_clients: of the population.
      options: more arguments of ``fc.privacy.audit``.
    """

    build: Callable[..., fc.Algorithm]
    sampler: sampling.Sampler
    num_clients: int
    options: Mapping[str, Any] = {}

    def audit(self, **options: Any) -> fc.privacy.Audit:
        """What an audit finds."""
        chosen = {"num_clients": self.num_clients, "delta": DELTA, "rounds": ROUNDS, **self.options, **options}
        return fc.privacy.audit(self.build, self.sampler, **chosen)


IN_TURN, IN_TURN_OF = sampling.round_robin(4), 12
POISSON, POISSON_OF = sampling.poisson(4), 24
EVERYONE, EVERYONE_OF = sampling.round_robin(4), 4


def of(
    *links: fc.Uplink,
    reducer: fc.Reducer | None = None,
    make: Callable[..., fc.Algorithm] = fc.fedavg,
    sampler: sampling.Sampler = IN_TURN,
    num_clients: int = IN_TURN_OF,
    **options: Any,
) -> Case:
    """FedAvg, if nothing else is said, of these links and a mean over 4, in turn."""
    reducer = fc.fixed_mean(4) if reducer is None else reducer
    build = functools.partial(make, uplink=uplink.chain(*links), reducer=reducer)
    return Case(build, sampler, num_clients, options)


def sampled(*links: fc.Uplink, **options: Any) -> Case:
    """The same of a Poisson sample."""
    return of(*links, **{"sampler": POISSON, "num_clients": POISSON_OF} | options)


def everyone(*links: fc.Uplink, **options: Any) -> Case:
    """The same of all four clients in each round."""
    return of(*links, **{"sampler": EVERYONE, "num_clients": EVERYONE_OF} | options)


def in_shares(*links: fc.Uplink, **options: Any) -> Case:
    """The same of messages that only a modular sum adds."""
    return of(*links, **{"reducer": fc.reduce.modular_sum(4, 3)} | options)


def by_records(gradient: Gradient, z: float = 4.0, **options: Any) -> Case:
    """FedAvg whose clients protect their records by a noise multiplier z."""
    build = functools.partial(options.pop("make", fc.fedavg), gradient=gradient)
    return Case(build, IN_TURN, IN_TURN_OF, {"records": True, "noise_multiplier": z} | options)


def by_messages(*links: fc.Uplink, z: float = 8.0) -> Case:
    """FedAvg whose clients protect their messages by a noise multiplier z."""
    return of(*links, reducer=fc.uniform_mean(), noise_multiplier=z)


def with_noise(draw: Callable[[Any, Any, Any, Any], Any], z: float = 2.0) -> fc.Uplink:
    """``gaussian(z)`` by its promises; ``draw(key, aggregate, std, ctx)`` is what it adds to the mean."""

    def encode(update, state, client_state, ctx):
        return update, client_state, {}

    def decode(aggregate, state, report, ctx):
        std = z * ctx.bound / ctx.denominator
        return jax.tree.map(jnp.add, aggregate, draw(ctx.key, aggregate, std, ctx)), state, {}

    return uplink.gaussian(z)._replace(encode=encode, decode=decode)


def normal(key: Any, like: Any, std: Any) -> Any:
    """Independent normal numbers."""
    return jax.tree.map(lambda x: std * x, optax.tree.random_like(key, like, sampler=jax.random.normal))


def clip(bound: float = 1.0) -> fc.Uplink:
    """The clip of most cases."""
    return uplink.clip_by_global_norm(bound)


def promised(tx: optax.GradientTransformation, keep_state: bool = False) -> fc.Uplink:
    """A transform of which a bound of 1 is promised that it does not keep."""
    return uplink.at_client(tx, keep_state=keep_state, bound=1.0)


def encoding(link: fc.Uplink, encode: Callable[[Any, Any], Any]) -> fc.Uplink:
    """A link whose message is ``encode(update, ctx)`` instead."""

    def spoiled(update, state, client_state, ctx):
        return encode(update, ctx), *link.encode(update, state, client_state, ctx)[1:]

    return link._replace(encode=spoiled)


def rounds_seen_as(make: Callable[..., fc.Algorithm], seen: Callable[[Any], Any]) -> Callable[..., fc.Algorithm]:
    """An algorithm that takes its round's number for another one, and so draws that one's noise."""

    def build(*args, **kwargs):
        algorithm = make(*args, **kwargs)

        def round(server, cohort, key):
            after, states, metrics = algorithm.round(server._replace(round=seen(server.round)), cohort, key)
            return after._replace(round=server.round + 1), states, metrics

        return algorithm._replace(round=round)

    return build


def gaussian_epsilon(z: float, count: int) -> Callable[[float], float]:
    """What so many rounds of a Gaussian mechanism cost."""
    return lambda delta: fc.privacy.epsilon(z, fc.privacy.Separated(1), 1, count, delta, "pld")


def poisson_epsilon(z: float, cohort: float = 4, rounds: int = ROUNDS) -> Callable[[float], float]:
    """What Poisson samples of so many clients cost."""
    return lambda delta: fc.privacy.epsilon(z, sampling.poisson(cohort), POISSON_OF, rounds, delta, "pld")


def no_clip() -> Case:
    return of(encoding(clip(), lambda update, ctx: update), uplink.gaussian(2.0))


def clip_by_layer() -> Case:
    return of(promised(clipping.clip(1.0, scope=clipping.layer())), uplink.gaussian(2.0))


def clip_by_value() -> Case:
    return of(promised(optax.clip(1.0)), uplink.gaussian(2.0))


def clip_to_twice_the_bound() -> Case:
    return of(promised(clipping.clip_by_global_norm(2.0)), uplink.gaussian(2.0))


def momentum_behind_the_clip() -> Case:
    moved = optax.chain(clipping.clip_by_global_norm(1.0), optax.trace(0.9))
    return everyone(promised(moved, keep_state=True), uplink.gaussian(4.0))


def error_feedback_behind_the_clip() -> Case:
    lossy = uplink.error_feedback(compression.threshold(0.6))
    return everyone(clip(), lossy.promising(contracts=True), uplink.gaussian(2.0))


def memory_added_again() -> Case:
    link = uplink.memory(clipping.clip_by_global_norm(1.0))

    def encode(update, state, client_state, ctx):
        message, after, report = link.encode(update, state, client_state, ctx)
        return jax.tree.map(jnp.add, message, client_state[1]), after, report

    return everyone(link._replace(encode=encode), uplink.gaussian(4.0))


def weights_by_size() -> Case:
    fixed = fc.fixed_mean(4)

    def add(acc, messages, weights):
        weighted = jax.tree.map(lambda m: jnp.einsum("c,c...->c...", weights.astype(m.dtype), m), messages)
        return fixed.add(acc, weighted, weights)

    return of(clip(), uplink.gaussian(2.0), reducer=fixed._replace(add=add))


def mean_over_those_who_came() -> Case:
    fixed = fc.fixed_mean(4)

    def add(acc, messages, weights):
        return fixed.add(acc[0], messages, weights), acc[1] + jnp.sum(weights > 0)

    def finish(acc, axis_name):
        total, came = fixed.finish(acc[0], axis_name), jnp.maximum(acc[1], 1)
        return jax.tree.map(lambda t: (t * (4 / came)).astype(t.dtype), total)

    def zero(message, roster):
        return fixed.zero(message, roster), jnp.zeros((), jnp.int32)

    return sampled(clip(), uplink.gaussian(2.0), reducer=fixed._replace(zero=zero, add=add, finish=finish))


def half_the_denominator() -> Case:
    fixed = fc.fixed_mean(4)

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
        return optax.tree.random_like(key, x, sampler=lambda *at: jax.random.uniform(*at, minval=-half, maxval=half))

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
    return everyone(fixed, uplink.gaussian(4.0))


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
        return tree.where(tree.norm(update) > 0, message, update), *rest

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
    clipped = fc.per_example_gradient(clipping.clip_by_global_norm(1.0))
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
    drawn = {"sampler": sampling.uniform(12), "num_clients": POISSON_OF}
    return of(clip(), uplink.gaussian(2.0), **drawn, reducer=fc.fixed_mean(12), epsilon=poisson_epsilon(2.0, cohort=12))


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


BOUND = ("uplink/0/threshold",)  # of quantile_clip, which clients are told

MUTANTS: Mapping[str, Callable[[], Case]] = {
    case.__name__.replace("_", " "): case
    for case in (
        no_clip,
        clip_by_layer,
        clip_by_value,
        clip_to_twice_the_bound,
        momentum_behind_the_clip,
        error_feedback_behind_the_clip,
        memory_added_again,
        weights_by_size,
        mean_over_those_who_came,
        half_the_denominator,
        a_client_counts_twice,
        noise_divided_twice,
        variance_for_standard_deviation,
        a_wrapper_loses_the_noise,
        noise_on_one_leaf,
        one_key_for_all_leaves,
        one_number_for_a_leaf,
        float16_noise,
        noise_without_tails,
        uniform_noise,
        noise_in_proportion_to_the_update,
        noise_in_proportion_to_those_who_came,
        no_noise_where_nobody_came,
        noise_from_a_fixed_seed,
        the_same_noise_in_every_round,
        noise_once_for_two_rounds,
        noise_in_proportion_to_the_first_bound,
        bits_without_noise,
        bits_with_a_tenth_of_the_noise,
        the_number_of_clients_published,
        who_is_dropped_published,
        exact_norms_published,
        empty_rounds_that_show,
        shares_of_half_the_cohort,
        shares_of_every_second_client,
        local_noise_in_front_of_the_clip,
        all_clients_draw_the_same_local_noise,
        no_local_noise_on_zeros,
        variates_without_noise,
        half_of_the_local_noise,
        records_clipped_by_batch,
        records_not_clipped,
        record_noise_divided_twice,
        in_turn_accounted_as_poisson,
        twice_the_rate_of_poisson,
        one_sample_for_all_rounds,
        in_turn_with_a_favourite,
        replacing_accounted_as_joining,
        half_of_the_rounds_accounted,
        one_round_accounted,
        a_tenth_of_the_rate_accounted,
        delta_of_each_round,
        rho_taken_for_epsilon,
        bands_that_overlap,
        correlated_noise_accounted_as_independent,
        a_tree_that_forgets_a_node,
    )
}


def right() -> dict[str, Callable[[], Case]]:
    """Right configurations by name: mechanisms, samplers, links, algorithms, reducers."""
    gaussian, uniform = uplink.gaussian, sampling.uniform(4)
    drawn = {"sampler": uniform, "num_clients": 24}
    top_k = uplink.compress(compression.top_k(0.5))
    private = fc.private_gradient(1.0, 4.0)
    return {
        "gaussian, in turn": lambda: of(clip(), gaussian(2.0)),
        "gaussian, Poisson": lambda: sampled(clip(), gaussian(1.0)),
        "gaussian, uniform": lambda: of(clip(), gaussian(2.0), **drawn),
        "gaussian, everyone": lambda: everyone(clip(), gaussian(4.0)),
        "little noise": lambda: of(clip(), gaussian(0.7)),
        "much noise": lambda: of(clip(), gaussian(20.0)),
        "tree": lambda: of(clip(), gaussian(3.0, mechanism=mechanism.tree(4))),
        "tree, everyone": lambda: everyone(clip(), gaussian(6.0, mechanism=mechanism.tree(8))),
        "banded": lambda: of(clip(), gaussian(2.0, mechanism=mechanism.banded(ROUNDS, 3))),
        "toeplitz, everyone": lambda: everyone(clip(), gaussian(8.0, mechanism=mechanism.toeplitz([1.0, 0.5, 0.4]))),
        "quantile_clip, in turn": lambda: of(
            uplink.quantile_clip(1.0, 0.5, bits_noise=2.0), gaussian(2.0), published=BOUND
        ),
        "quantile_clip, Poisson": lambda: sampled(
            uplink.quantile_clip(1.0, 0.5, bits_noise=2.0), gaussian(2.0), published=BOUND
        ),
        "clip of each layer": lambda: of(
            uplink.at_client(clipping.clip(0.5, scope=clipping.layer())), gaussian(2.0)
        ),
        "quantile_clip by layer": lambda: of(
            uplink.quantile_clip(1.0, 0.5, bits_noise=4.0, scope=clipping.layer(), allocation="equal"), gaussian(2.0)
        ),
        "FedExP": lambda: of(clip(), uplink.fedexp(8.0), gaussian(2.0)),
        "SCAFFOLD": lambda: of(
            clip(), gaussian(3.0), make=functools.partial(fc.scaffold, variate_uplink=uplink.chain(clip(), gaussian(3.0)))
        ),
        "SCAFFOLD, records": lambda: by_records(private, make=fc.scaffold),
        "Clip21-SGD2M": lambda: everyone(
            uplink.memory(clipping.clip_by_global_norm(1.0), 0.6, 0.5), gaussian(4.0), make=fc.fedsgd
        ),
        "alpha-NormEC": lambda: everyone(
            uplink.memory(clipping.smoothed_clip(0.5, 1.0)), gaussian(4.0), make=fc.fedsgd
        ),
        "normalised": lambda: of(uplink.at_client(clipping.normalised(1.0)), gaussian(2.0)),
        "compressed": lambda: of(clip(), top_k, gaussian(2.0)),
        "error feedback around a clip": lambda: everyone(uplink.error_feedback(clip(), top_k), gaussian(4.0)),
        "memory of a clip": lambda: everyone(uplink.memory(clipping.clip_by_global_norm(1.0)), gaussian(4.0)),
        "relative to the last": lambda: sampled(uplink.relative_to_last(), clip(), gaussian(1.0)),
        "with_bias": lambda: of(uplink.with_bias(uplink.chain(clip(), gaussian(2.0)))),
        "by_group": lambda: of(uplink.by_group(clip(), {"few": [0, 1]}), gaussian(2.0)),
        "discrete Gaussian": lambda: in_shares(clip(), uplink.discrete_gaussian(2.0)),
        "Skellam": lambda: in_shares(clip(), uplink.skellam(2.0)),
        "Skellam, rotated": lambda: in_shares(clip(), uplink.skellam(2.0, bits=16, rotate=True)),
        "Skellam, uniform": lambda: in_shares(clip(), uplink.skellam(3.0), **drawn),
        "local noise": lambda: by_messages(clip(), uplink.local_gaussian(8.0)),
        "local noise, compressed": lambda: by_messages(clip(), uplink.local_gaussian(8.0), top_k),
        "records": lambda: by_records(private),
        "records, FedBuff": lambda: by_records(private, make=functools.partial(fc.fedbuff, max_staleness=2)),
        "records, partially private": lambda: by_records(
            private, make=functools.partial(fc.partially_private, private="^a$")
        ),
        "banded inverse, everyone": lambda: everyone(clip(), gaussian(6.0, mechanism=mechanism.banded_inverse(3))),
        "buffered Toeplitz": lambda: of(clip(), gaussian(3.0, mechanism=mechanism.blt(ROUNDS, 3, 2))),
        "cyclic Poisson": lambda: sampled(clip(), gaussian(1.0), sampler=sampling.cyclic_poisson(4, groups=3)),
        "cyclic Poisson, banded": lambda: sampled(
            clip(),
            gaussian(1.0, mechanism=mechanism.banded(ROUNDS, 3)),
            sampler=sampling.cyclic_poisson(4, groups=3),
        ),
        "truncated Poisson": lambda: sampled(clip(), gaussian(1.0), sampler=sampling.truncated_poisson(4, most=6)),
        "balls in bins": lambda: sampled(clip(), gaussian(1.0), sampler=sampling.balls_in_bins(4)),
        "rounds kept apart": lambda: sampled(clip(), gaussian(1.0), sampler=sampling.b_min_sep(2, separation=3)),
        "preconditioned": lambda: of(uplink.preconditioned(0.99, eps=1.0), clip(), gaussian(2.0)),
        "FedSGD": lambda: of(clip(), gaussian(2.0), make=fc.fedsgd),
        "FedBuff": lambda: of(clip(), gaussian(2.0), make=functools.partial(fc.fedbuff, max_staleness=2)),
        "partially private": lambda: of(
            clip(), gaussian(2.0), make=functools.partial(fc.partially_private, private="^a$")
        ),
        "partially frozen": lambda: of(clip(), gaussian(2.0), make=_frozen),
        "compressed broadcast": lambda: of(clip(), gaussian(2.0), make=_broadcast),
        "kept optimisers": lambda: of(clip(), gaussian(2.0), make=functools.partial(fc.fedavg, keep_opt_state=True)),
    }


def _frozen(loss: Any, *txs: Any, **options: Any) -> fc.Algorithm:
    return fc.partially_frozen(lambda loss: fc.fedavg(loss, *txs, **options), loss, "^a$")


def _broadcast(*args: Any, **options: Any) -> fc.Algorithm:
    return fc.compressed_broadcast(fc.fedavg(*args, **options), compression.qsgd(8))
