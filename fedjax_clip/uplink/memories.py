"""Links that send the difference from earlier messages."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip.core import checks, tree
from fedjax_clip.core.types import Array, InvalidInput
from fedjax_clip.uplink.base import Uplink, at_client, encoded, nothing
from fedjax_clip.uplink.promises import Noise, Wire


def memory(
    tx: optax.GradientTransformation | Uplink, momentum: float | Array = 1.0, step: float | Array = 1.0
) -> Uplink:
    """Sends the clipped difference between an update and the client's memory v of its messages.

    ``u_i <- (1 - momentum) u_i + momentum x_i;  c_i = clip(u_i - v_i);  v_i <- v_i + step c_i`` at client i, and
    ``g <- g + step (1/N) sum_i c_i`` at the server, which uses g. The sum is over the cohort, and N counts all clients.
    Under ``fc.fedsgd`` it is

      ``memory(clip_by_global_norm(tau))``                           Clip21
      ``memory(clip_by_global_norm(tau), momentum, step)``           Clip21-SGD2M
      ``memory(smoothed_clip(beta, alpha))``                         α-NormEC
      ``memory(fc.uplink.compress(top_k(0.01)))``                    EF21, its memory at the server, too

    Guarantee: each message is as small as the clip makes it (its sensitivity), while g converges to the mean of
    constant updates, without bias. Up to rounding, g is the mean of the v_i of ALL N clients: a mean over the cohort
    counts ``|S| / N`` times. ``weighted_mean`` weighs clients by their examples in g, too; the papers use
    ``uniform_mean``. A robust reducer applies its rule to the messages. Noise or rounding after the memory stays in g.

    Args:
      tx: a clip, or a link such as a compressor, without a state of its own.
      momentum: beta, the weight of the new update; 1 keeps no average.
      step: beta-hat, how far memory and server follow.

    Raises:
      InvalidInput: a momentum or step outside [0, 1], a link that keeps a state, adds noise or sends sketches; (when
        a round is traced) a cohort that was not made by ``fc.extend.plan`` and does not tell N.

    Example:
      >>> link = fc.uplink.memory(fc.clipping.clip_by_global_norm(1.0))
      >>> algorithm = fc.fedsgd(per_example_loss, optax.sgd(1.0), optax.sgd(0.1), uplink=link)  # Clip21

    Source: Khirirat et al. (2023), "Clip21", Algorithms 1 and 2; Islamov et al. (2025), Clip21-SGD2M; Shulgin et al.
    (2025), α-NormEC; Richtárik, Sokolov and Fatkhullin (2021), "EF21", Algorithm 1; Fatkhullin et al. (2021), "EF21
    with Bells & Whistles", Algorithm 4 (EF21-PP), for clients that are sampled.
    """

    checks.within("momentum", momentum, 0, 1)
    checks.within("step", step, 0, 1)
    link = tx if isinstance(tx, Uplink) else at_client(tx)
    if link.promises.wire is Wire.SUMS or link.promises.noise or link.promises.noise_multipliers:
        raise InvalidInput("memory keeps what was sent of each update: noise and sketches belong behind it.")

    averages = isinstance(momentum, jax.Array) or momentum != 1

    def zeros(params):
        return jax.tree.map(jnp.zeros_like, params)

    def encode(update, g, client_state, ctx):
        average, sent = client_state
        if averages:
            update = average = jax.tree.map(lambda u, x: (1 - momentum) * u + momentum * x, average, update)
        difference = jax.tree.map(jnp.subtract, update, sent)
        message, _, report = encoded(link, difference, link.init(difference), link.init_client(difference), ctx)
        sent = jax.tree.map(lambda v, c: v + step * c, sent, message.value)
        return message.plain, (average, sent), report

    def decode(aggregate, g, report, ctx):
        if ctx.share is None:
            raise InvalidInput("memory needs to know how many clients there are: make the cohort by fc.extend.plan.")
        g = tree.add_scaled(g, step * ctx.share, aggregate)
        return g, g, report

    def init_client(params):
        if jax.tree.leaves((link.init(params), link.init_client(params))):
            raise InvalidInput("memory takes a link that keeps nothing itself: a compressor, or a clip.")
        return zeros(params) if averages else (), zeros(params)

    of_link = link.promises.bound
    # A clip of the difference bounds the message for any update; a contraction bounds nothing.
    bound = None if of_link is None else lambda g, like: of_link(link.init(like), like)

    def regroup(g, average):
        return average(g, lambda clients: (clients[1], True))

    return Uplink(zeros, init_client, encode, decode, link.promises, regroup).promising(
        bound=bound, contracts=False, mirrors="memory"
    )


def relative_to_last() -> Uplink:
    """Sends the difference from the last aggregate m, which the server adds back: ``m <- m + mean(x_i - m)``.

    Before a clip it is centered clipping: ``chain(relative_to_last(), clip_by_global_norm(tau))`` makes ``m <- m +
    mean clip(x_i - m)``, one iteration a round. Guarantee with the clip: m moves by at most tau a round, whatever a
    client sends. Updates keep their momentum: heavy-ball momentum ``m = beta m + g`` is not damped, so choose tau on
    that scale.

    Example:
      >>> link = fc.uplink.chain(fc.uplink.relative_to_last(), fc.uplink.clip_by_global_norm(1.0))

    Source: Karimireddy, He and Jaggi (2021), "Learning from History for Byzantine Robust Optimization", Algorithm 1.
    """

    def encode(update, m, client_state, ctx):
        return jax.tree.map(jnp.subtract, update, m), client_state, {}

    def decode(aggregate, m, report, ctx):
        m = tree.apply_updates(m, aggregate)
        if ctx.denominator is not None:  # a fixed denominator hides whether anybody came
            return m, m, {}
        # An empty round leaves m as it is and adds nothing to the parameters.
        return jax.tree.map(lambda x: jnp.where(ctx.weight > 0, x, 0), m), m, {}

    return Uplink(lambda params: jax.tree.map(jnp.zeros_like, params), nothing, encode, decode)


def with_bias(link: Uplink) -> Uplink:
    """A link, and its bias: cosine and relative norm between what it delivers and the plain mean.

    Metrics besides the link's: ``bias/cosine`` and ``bias/norm`` (1 and 1: no bias). The plain updates travel too, in
    simulation, so a round takes a second accumulator of the parameters' size.

    Args:
      link: any link or chain; include the server's noise in it.

    Raises:
      InvalidInput: a link on an integer grid, or with the clients' own noise.

    Example:
      >>> link = fc.uplink.with_bias(fc.uplink.quantile_clip(0.1))
    """
    checks.kind("link", link, Uplink, "an fc.uplink.Uplink, such as fc.uplink.clip_by_global_norm(1.0)")

    def encode(update, state, client_state, ctx):
        message, client_state, report = encoded(link, update, state, client_state, ctx)
        return message._replace(value=(message.value, update), packed=None).plain, client_state, report

    def decode(aggregate, state, report, ctx):
        update, state, metrics = link.decode(aggregate[0], state, report, ctx)
        plain = aggregate[1]
        norms = optax.tree.norm(update), optax.tree.norm(plain)
        cosine = optax.tree.vdot(update, plain) / (norms[0] * norms[1])
        return update, state, metrics | {"bias/cosine": cosine, "bias/norm": norms[0] / norms[1]}

    if link.promises.grid is not None:
        raise InvalidInput("with_bias sends the plain updates, too, which no secure sum adds: take the grid out of it.")
    if link.promises.noise is Noise.CLIENT:
        raise InvalidInput(
            "with_bias sends the plain updates, too, from which each client's own noise is to protect it: take "
            "with_bias out, or study the bias without that noise."
        )
    return link._replace(encode=encode, decode=decode).promising(bound=None, contracts=False)  # plain updates
