"""Compression of the downlink, for any algorithm."""

import jax
import jax.numpy as jnp
import optax

from fedjax_clip import compression
from fedjax_clip.algorithms.base import kind
from fedjax_clip.compression import Compressor
from fedjax_clip.compression.base import check_memory
from fedjax_clip.core import checks, keys, stateful, tree
from fedjax_clip.core.types import Algorithm, InvalidInput, Server


def compressed_broadcast(algorithm: Algorithm, compressor: Compressor, relative: bool = True) -> Algorithm:
    """Wraps an algorithm so that clients receive a code: of the change of the parameters x, or of x itself.

    ``w <- w + C(x - w)`` at the server and at all clients, which train from w; the server takes its step from w and
    adds the error of w: ``x <- step(w) + (x - w)``. The error of a code is thus sent with the next code. With
    ``relative=False``, ``w <- C(x)``, for clients that did not receive the earlier codes.

    ``bytes_down`` counts the code's bytes for each client of the cohort, and whatever else the algorithm sends.
    All clients must receive every relative code, sampled or not, as in a real broadcast; those extra bytes are not
    counted. Metrics: ``bytes_down_entropy``; ``downlink/error``, of ``||x - w||^2 / ||x||^2``.

    Args:
      algorithm: any that sends its clients ``server.params``.
      compressor: of ``fc.compression``, for the whole of the parameters as one vector.
        A model's state (``fc.local.with_state``) is sent as it is.
      relative: whether the code is of the difference.

    Returns:
      An ``Algorithm``; ``server.params`` is x.

    Raises:
      InvalidInput: no compressor; an algorithm that sends something else: FedBuff (past models), or a part of the model
        (put that wrapper outside of this one); (when a run begins) differences by a compressor whose error may be above
        1 for the model's size.

    Example:
      >>> average = fc.fedavg(per_example_loss, optax.sgd(0.1))
      >>> algorithm = fc.compressed_broadcast(average, fc.compression.qsgd(8, bucket=512))

    Source: Tang et al. (2019), "DoubleSqueeze", Algorithm 1, the server's side; Caldas et al. (2018), "Expanding the
    Reach of Federated Learning by Reducing Client Resource Requirements", for ``relative=False``.
    """
    checks.kind("algorithm", algorithm, Algorithm, "one such as fc.fedavg(...)")
    checks.kind("compressor", compressor, Compressor, "of fc.compression, such as fc.compression.qsgd(8)")
    if not algorithm.broadcasts:
        raise InvalidInput(
            "compressed_broadcast replaces all of the server's parameters on their way to the clients, and this "
            "algorithm sends something else: for a part of a model put compressed_broadcast inside, as in "
            "partially_private(compressed_broadcast(algorithm, compressor), pattern); fedbuff sends past models."
        )

    def split(params):  # a model's state is sent as it is: a variance with an error may be negative
        return ((), params) if algorithm.loss is None else stateful.split(algorithm.loss, params)

    def init(params):
        _, x = split(params)
        if relative:
            check_memory("compressed_broadcast", compressor, x)
        server = algorithm.init(params)
        return server._replace(own=(tree.as_arrays(x) if relative else (), server.own))

    def round(server: Server, cohort, key):
        (state, x), (last, own) = split(server.params), server.own
        new = optax.tree.sub(x, last) if relative else x
        here = jax.random.fold_in(jax.random.fold_in(keys.threefry(key), server.round), 2**31 - 1)
        sent, code = compression.roundtrip(compressor, new, here)
        missing = optax.tree.sub(new, sent)
        w = optax.tree.sub(x, missing)  # = last + sent, but exactly x where the code lost nothing
        after, client_states, metrics = algorithm.round(
            server._replace(params=stateful.join(state, w), own=own), cohort, key
        )
        asked = metrics["asked"]
        rest = metrics["bytes_down"] - asked * float(tree.nbytes(x))
        down = {
            "bytes_down": rest + asked * compression.nbytes(code).astype(jnp.float32),
            "bytes_down_entropy": rest + asked * compression.entropy(code),
            "downlink/error": (tree.norm(missing) / jnp.maximum(tree.norm(x), 1e-30)) ** 2,
        }
        state, x = split(after.params)
        params = stateful.join(state, optax.tree.add(x, missing))
        return after._replace(params=params, own=(w if relative else (), after.own)), client_states, metrics | down

    def start(server: Server, cohort, key):
        last, own = server.own
        assert algorithm.start is not None
        after, client_states, metrics = algorithm.start(server._replace(own=own), cohort, key)
        return after._replace(own=(last, after.own)), client_states, metrics

    def regroup(server: Server, average):
        last, own = server.own
        assert algorithm.regroup is not None
        after = algorithm.regroup(server._replace(own=own), average)
        return after._replace(own=(last, after.own))

    return algorithm._replace(
        name=f"compressed_broadcast({kind(algorithm)})",
        init=init,
        round=round,
        start=start if algorithm.start else None,
        regroup=regroup if algorithm.regroup else None,
    )
