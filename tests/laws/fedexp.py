"""FedExP as somebody outside of the repository writes it: the server's step, extrapolated."""

import jax.numpy as jnp
import optax

import fedjax_clip as fc


def fedexp(per_example_loss, client_tx, server_tx=None, *, epsilon=1e-3, **parts):
    """``x <- x + eta mean u``, ``eta = max(1, mean ||u_i||^2 / (2 (||mean u||^2 + epsilon)))``.

    Source: Jhunjhunwala, Wang and Joshi (2023), "FedExP", Algorithm 1.
    """

    def round(now):
        def client_fn(x, client, key):
            y, _, _, report = client.local_steps(x, key)
            update = optax.tree.sub(y, x)
            return (update, optax.tree.norm(update, squared=True)), client.state.own, report

        answer = now.exchange(client_fn, now.server.params)
        mean, squares = answer.update
        eta = jnp.maximum(1.0, squares / (2 * (optax.tree.norm(mean, squared=True) + epsilon)))
        return now.step(answer, optax.tree.scale(eta, mean), metrics={"extrapolation": eta})

    return fc.extend.algorithm(round, per_example_loss, client_tx, server_tx, beside=[None], **parts)
