"""Cases for the audit: how to make one, how to spoil one, and correct configurations, which must pass."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fedjax_clip as fc
from fedjax_clip import clipping, compression, uplink
from fedjax_clip.core.loss import Gradient
from fedjax_clip.data import sampling
from fedjax_clip.uplink import lattice, mechanism

DELTA = 1e-3
ROUNDS = 6


class Case(NamedTuple):
    """A configuration to audit.

    Attributes:
      build: see ``fc.privacy.audit``.
      sampler: who takes part.
      num_clients: of the population.
      options: more arguments of ``fc.privacy.audit``.
    """

    build: Callable[..., fc.extend.Algorithm]
    sampler: sampling.Sampler
    num_clients: int
    options: Mapping[str, Any] = {}

    def audit(self, **options: Any) -> fc.privacy.Audit:
        """The result of an audit."""
        chosen = {"num_clients": self.num_clients, "delta": DELTA, "rounds": ROUNDS, **self.options, **options}
        return fc.privacy.audit(self.build, self.sampler, **chosen)


IN_TURN, IN_TURN_OF = sampling.round_robin(4), 12
POISSON, POISSON_OF = sampling.poisson(4), 24
EVERYONE, EVERYONE_OF = sampling.round_robin(4), 4


def of(
    *links: fc.uplink.Uplink,
    reducer: fc.reduce.Reducer | None = None,
    make: Callable[..., fc.extend.Algorithm] = fc.fedavg,
    sampler: sampling.Sampler = IN_TURN,
    num_clients: int = IN_TURN_OF,
    **options: Any,
) -> Case:
    """These links, by default with FedAvg, a mean over 4 and clients in turn."""
    reducer = fc.reduce.fixed_mean(4) if reducer is None else reducer
    build = functools.partial(make, uplink=uplink.chain(*links), reducer=reducer)
    return Case(build, sampler, num_clients, options)


def sampled(*links: fc.uplink.Uplink, **options: Any) -> Case:
    """The same of a Poisson sample."""
    chosen: dict[str, Any] = {"sampler": POISSON, "num_clients": POISSON_OF, **options}
    return of(*links, **chosen)


def everyone(*links: fc.uplink.Uplink, **options: Any) -> Case:
    """The same of all four clients in each round."""
    chosen: dict[str, Any] = {"sampler": EVERYONE, "num_clients": EVERYONE_OF, **options}
    return of(*links, **chosen)


def in_shares(*links: fc.uplink.Uplink, **options: Any) -> Case:
    """The same of messages that only a modular sum adds."""
    chosen: dict[str, Any] = {"reducer": fc.reduce.modular_sum(4, 3), **options}
    return of(*links, **chosen)


def by_records(gradient: Gradient, z: float = 4.0, **options: Any) -> Case:
    """FedAvg whose clients protect their records by a noise multiplier z."""
    build = functools.partial(options.pop("make", fc.fedavg), gradient=gradient)
    return Case(build, IN_TURN, IN_TURN_OF, {"records": True, "noise_multiplier": z} | options)


def by_messages(*links: fc.uplink.Uplink, z: float = 8.0) -> Case:
    """FedAvg whose clients protect their messages by a noise multiplier z."""
    return of(*links, reducer=fc.reduce.uniform_mean(), noise_multiplier=z)


def clip(bound: float = 1.0) -> fc.uplink.Uplink:
    """The clip of most cases."""
    return uplink.clip_by_global_norm(bound)


BOUND = ("uplink/0/threshold",)  # of quantile_clip, which clients are told


def trusting(z: float) -> fc.uplink.Uplink:
    """``gaussian(z)`` that trusts the bound before it, and does not shorten longer messages."""

    def encode(update, state, client_state, ctx):
        on = lattice.lattice(ctx.bound, z, ctx.denominator)
        steps = jax.tree.map(lambda x: x.astype(jnp.float32) / on.bound * on.levels, update)
        message = jax.tree.map(lambda x: jnp.clip(x, -lattice.ROOM, lattice.ROOM).astype(jnp.int32), steps)
        return message, client_state, {}

    return uplink.gaussian(z)._replace(encode=encode)


def with_noise(draw: Callable[[Any, Any, Any, Any], Any], z: float = 2.0) -> fc.uplink.Uplink:
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


def promised(tx: optax.GradientTransformation, keep_state: bool = False) -> fc.uplink.Uplink:
    """A transform with a promised bound of 1 that it does not keep."""
    return uplink.at_client(tx, keep_state=keep_state, bound=1.0)


def encoding(link: fc.uplink.Uplink, encode: Callable[[Any, Any], Any]) -> fc.uplink.Uplink:
    """A link whose message is ``encode(update, ctx)`` instead."""

    def spoiled(update, state, client_state, ctx):
        return encode(update, ctx), *link.encode(update, state, client_state, ctx)[1:]

    return link._replace(encode=spoiled)


def rounds_seen_as(
    make: Callable[..., fc.extend.Algorithm], seen: Callable[[Any], Any]
) -> Callable[..., fc.extend.Algorithm]:
    """An algorithm that takes its round for another one, and so draws that round's noise."""

    def build(*args, **kwargs):
        algorithm = make(*args, **kwargs)

        def round(server, cohort, key):
            after, states, metrics = algorithm.round(server._replace(round=seen(server.round)), cohort, key)
            return after._replace(round=server.round + 1), states, metrics

        return algorithm._replace(round=round)

    return build


def gaussian_epsilon(z: float, count: int) -> Callable[[float], float]:
    """Epsilon of several rounds of a Gaussian mechanism."""
    return lambda delta: fc.privacy.epsilon(z, fc.privacy.Separated(1), 1, count, delta, "pld")


def poisson_epsilon(z: float, cohort: float = 4, rounds: int = ROUNDS) -> Callable[[float], float]:
    """Epsilon of Poisson samples of this expected size."""
    return lambda delta: fc.privacy.epsilon(z, sampling.poisson(cohort), POISSON_OF, rounds, delta, "pld")


def right() -> dict[str, Callable[[], Case]]:
    """Right configurations by name: mechanisms, samplers, links, algorithms, reducers."""
    gaussian, uniform = uplink.gaussian, sampling.uniform(4)
    drawn: dict[str, Any] = {"sampler": uniform, "num_clients": 24}
    top_k = uplink.compress(compression.top_k(0.5))
    private = fc.local.private_gradient(1.0, 4.0)
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
        "clip of each layer": lambda: of(uplink.at_client(clipping.clip(0.5, scope=clipping.layer())), gaussian(2.0)),
        "quantile_clip by layer": lambda: of(
            uplink.quantile_clip(1.0, 0.5, bits_noise=4.0, scope=clipping.layer(), allocation="equal"), gaussian(2.0)
        ),
        "FedExP": lambda: of(clip(), uplink.fedexp(8.0), gaussian(2.0)),
        "SCAFFOLD": lambda: of(
            clip(),
            gaussian(3.0),
            make=functools.partial(fc.scaffold, variate_uplink=uplink.chain(clip(), gaussian(3.0))),
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
        "records, partially private": lambda: by_records(private, make=_private),
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
        "partially private": lambda: of(clip(), gaussian(2.0), make=_private),
        "partially frozen": lambda: of(clip(), gaussian(2.0), make=_frozen),
        "compressed broadcast": lambda: of(clip(), gaussian(2.0), make=_broadcast),
        "kept optimisers": lambda: of(clip(), gaussian(2.0), make=functools.partial(fc.fedavg, keep_opt_state=True)),
    }


def _frozen(loss: Any, *txs: Any, **options: Any) -> fc.extend.Algorithm:
    return fc.partially_frozen(fc.fedavg(loss, *txs, **options), "^a$")


def _private(*args: Any, **options: Any) -> fc.extend.Algorithm:
    return fc.partially_private(fc.fedavg(*args, **options), "^a$")


def _broadcast(*args: Any, **options: Any) -> fc.extend.Algorithm:
    return fc.compressed_broadcast(fc.fedavg(*args, **options), compression.qsgd(8))
