"""The work of one client in a round, as pure functions of (shared, client, key)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_clip import clipping
from fedjax_clip.core import checks, optimiser, stateful, tree
from fedjax_clip.core.cohort import Client
from fedjax_clip.core.loops import packing
from fedjax_clip.core.loss import Gradient, batch_gradient, batch_loss, check_parameters, gradient_and_terms
from fedjax_clip.core.metrics import Mean, add, finish
from fedjax_clip.core.types import Array, ClientTx, InvalidInput, Metrics, Params, PerExampleLoss, PyTree


def local_steps(
    per_example_loss: PerExampleLoss,
    client_tx: optax.GradientTransformation,
    params: Params,
    client: Client,
    key: Array,
    *,
    adjust: Callable[[PyTree, Params, Array], PyTree] | None = None,
    gradient: Gradient = batch_gradient,
    opt_state: PyTree | None = None,
    collect: bool = False,
) -> tuple[Params, PyTree, PyTree, Metrics]:
    """One optimiser step for each of the client's batches, from ``params``; every algorithm uses it.

    Args:
      per_example_loss: ``(params, batch, key) -> losses[B]``, or ``(losses[B], {name: values[B]})``.
      client_tx: any optax optimiser; ``anchor=params`` is among its extra arguments.
      params: what the client was sent.
      client: its batches.
      key: of this client and round; each step folds its number in.
      adjust: ``(gradient, y, step) -> direction``, between the gradient and the optimiser.
      gradient: ``batch_gradient``, or ``per_example_gradient(...)``.
      opt_state: the optimiser's state to begin with; a fresh one by default.
      collect: whether to average the raw gradients.

    Returns:
      ``(y, opt_state, mean raw gradient or (), report)``. State of the model (``fc.local.with_state``) is new in y, and
      None in all else.

    Example:
      >>> def client_fn(params, client, key):  # a client of FedAvg
      ...   y, _, _, report = fc.extend.local_steps(per_example_loss, optax.sgd(0.1), params, client, key)
      ...   return jax.tree.map(jnp.subtract, y, params), client.state.own, report
    """
    client_tx = optax.with_extra_args_support(client_tx)
    packed = client.cohort.loops.packed
    if packed and gradient is batch_gradient:
        gradient = gradient_and_terms  # the report is summed over the examples after the loop
    state, x = stateful.split(per_example_loss, params)
    opt_state = optimiser.init(client_tx, x) if opt_state is None else opt_state
    opt_state = optimiser.reseeded(opt_state, jax.random.fold_in(key, 2**31 - 1))  # no step has this number

    def step(i, y, opt_state, state):
        batch, weights = client.batch(i)
        here = jax.random.fold_in(key, i)
        raw, report, state = stateful.gradient_and_state(gradient, per_example_loss, y, state, batch, weights, here)
        direction = raw if adjust is None else adjust(raw, y, i)
        updates, opt_state = optimiser.update(client_tx, direction, opt_state, y, anchor=x)
        y = tree.apply_updates(y, updates)
        return y, opt_state, state, raw if collect else (), report | _step_report(opt_state)

    step, (_, _, _, zero, nothing) = tree.traced(step, 0, x, opt_state, state)
    pack, unpack = packing(nothing, x) if packed else (lambda x: x, lambda x: x)

    def body(i, carry):
        *kept, raw, report = step(i, *carry[:3])
        return *kept, add(carry[3], raw), add(carry[4], pack(report))

    y, opt_state, state, total, report = client.loop(body, (x, opt_state, state, zero, pack(nothing)))
    report = unpack(report)
    if gradient is gradient_and_terms:
        report = jax.tree.map(jnp.sum, report)
    mean = jax.tree.map(lambda g: tree.divided(g, jnp.maximum(client.num_steps, 1)), total)
    if "clipped_steps" in report:
        any_clipped = (report["clipped_steps"].total > 0).astype(jnp.float32)
        report |= {"clipped_clients": Mean(any_clipped, jnp.ones((), jnp.float32))}
    return stateful.join(state, y), opt_state, mean, report


def full_gradient(
    per_example_loss: PerExampleLoss,
    params: Params,
    client: Client,
    key: Array,
    gradient: Gradient = batch_gradient,
) -> tuple[PyTree, Metrics]:
    """The gradient at ``params`` of the mean loss over all of a client's batches: ``sum_i w_i g_i / sum_i w_i``.

    ``g_i`` is the gradient of batch i, and ``w_i`` the sum of its example weights. Batches only bound the memory: their
    size does not matter. So ``per_example_gradient`` clips each of a client's examples once. ``private_gradient`` adds
    noise to each batch, and each record is in one of them: the pass is one Gaussian mechanism for a record.

    Args:
      per_example_loss: ``(params, batch, key)``, see ``fc.fedavg``.
      params: where the gradient is taken.
      client: whose batches are used.
      key: PRNG key of the client and round; each batch folds its number in.
      gradient: how a batch's gradient is taken.

    Returns:
      ``(gradient, report)``.

    Example:
      >>> def client_fn(params, client, key):  # of distributed gradient descent
      ...     gradient, report = fc.local.full_gradient(per_example_loss, params, client, key)
      ...     return jax.tree.map(jnp.negative, gradient), client.state.own, report
    """
    return _full_gradient(per_example_loss, params, client, key, gradient)[:2]


def _full_gradient(
    per_example_loss: PerExampleLoss, params: Params, client: Client, key: Array, gradient: Gradient
) -> tuple[PyTree, Metrics, PyTree]:
    """``full_gradient``, and the model's state after all batches."""
    state, params = stateful.split(per_example_loss, params)
    check_parameters(params)
    sums = gradient is batch_gradient and not isinstance(per_example_loss, stateful.Stateful)

    def total(i, state):
        batch, weights = client.batch(i)
        here = jax.random.fold_in(key, i)
        if sums:  # directly, without dividing and multiplying by the batch's weight

            def total_loss(x):
                return batch_loss(per_example_loss, x, batch, weights, here)

            return jax.grad(total_loss, has_aux=True)(params), state
        mean, report, state = stateful.gradient_and_state(
            gradient, per_example_loss, params, state, batch, weights, here
        )
        return (jax.tree.map(lambda g: tree.scaled(report["loss"].weight, g), mean), report), state

    total, (zeros, _) = tree.traced(total, 0, state)

    def body(i, carry):
        more, state = total(i, carry[1])
        return add(carry[0], more), state

    (summed, report), state = client.loop(body, (zeros, state))
    weight = tree.or_one(report["loss"].weight)
    return jax.tree.map(lambda g: tree.divided(g, weight), summed), report, state


def mean_loss(per_example_loss: PerExampleLoss, params: Params, client: Client, key: Array) -> Array:
    """The mean loss at ``params`` over all of a client's batches, float32 scalar; no gradient is taken.

    Args:
      per_example_loss: ``(params, batch, key)``, see ``fc.fedavg``.
      params: where the loss is taken.
      client: whose batches are used.
      key: PRNG key of the client and round; each batch folds its number in.

    Example:
      >>> def client_fn(params, client, key):  # sends no update, but how well the model serves it
      ...     loss = fc.local.mean_loss(per_example_loss, params, client, key)
      ...     return jax.tree.map(jnp.zeros_like, params), client.state.own, {"fit": loss}
    """

    def term(i):
        batch, weights = client.batch(i)
        return batch_loss(per_example_loss, params, batch, weights, jax.random.fold_in(key, i))[1]["loss"]

    term, zero = tree.traced(term, 0)
    total = client.loop(lambda i, acc: add(acc, term(i)), zero)
    return finish(total).astype(jnp.float32)


def full_step(
    per_example_loss: PerExampleLoss,
    client_tx: optax.GradientTransformation,
    params: Params,
    client: Client,
    key: Array,
    gradient: Gradient = batch_gradient,
) -> tuple[PyTree, Metrics]:
    """One optimiser step along the gradient of the mean loss over ALL of a client's examples, taken at ``x``.

    Args:
      per_example_loss, params, client, key, gradient: as for ``full_gradient``.
      client_tx: the client's optimiser; ``anchor=params`` is among its extra arguments.

    Returns:
      ``(update, report)``.

    Example:
      >>> def client_fn(params, client, key):  # of FedSGD
      ...     update, report = fc.local.full_step(per_example_loss, optax.sgd(0.1), params, client, key)
      ...     return update, client.state.own, report

    Source: McMahan et al. (2017), section 2, FedSGD.
    """
    client_tx = optax.with_extra_args_support(client_tx)
    grads, report, after = _full_gradient(per_example_loss, params, client, key, gradient)
    state, x = stateful.split(per_example_loss, params)
    opt_state = optimiser.reseeded(optimiser.init(client_tx, x), jax.random.fold_in(key, 2**31 - 1))
    update, opt_state = optimiser.update(client_tx, grads, opt_state, x, anchor=x)
    return stateful.join(optax.tree.sub(after, state), update), report | _step_report(opt_state)


def proximal(mu: float | Array) -> optax.GradientTransformationExtraArgs:
    """Adds ``mu (y - x)``, the gradient of FedProx's ``mu/2 ||y - x||^2``, with x the server's parameters.

    In front of a clip, which then bounds the sum: ``optax.chain(proximal(0.1), clip, optax.sgd(0.1))`` in
    ``fc.fedavg`` is (clipped) FedProx. mu = 0 changes nothing.

    Args:
      mu: strength of the pull, at least 0; may be traced.

    Raises:
      InvalidInput: a negative mu; (when a round is traced) a place outside of a client's optimiser.

    Example:
      >>> fc.fedavg(per_example_loss, optax.chain(fc.local.proximal(0.1), optax.sgd(0.1)))

    Source: Li et al. (2020), "Federated Optimization in Heterogeneous Networks", equation 2.
    """

    checks.within("mu", mu, 0)

    def update(updates, state, params=None, *, anchor=None, **extra_args):
        if anchor is None or params is None:
            raise InvalidInput("proximal pulls towards the server's parameters: it belongs into a client's optimiser.")
        return jax.tree.map(lambda g, y, x: g + mu * (y - x), updates, params, anchor), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def at_round(client_tx: ClientTx, round: Array) -> optax.GradientTransformation:
    """The client optimiser of a round: ``client_tx`` itself, or what it builds from the round's number.

    Example:
      >>> client_tx = lambda round: optax.sgd(optax.cosine_decay_schedule(0.1, 100)(round))
    """
    if isinstance(client_tx, tuple):
        return client_tx
    checks.takes("client_tx", client_tx, 1, "the round's number, or an optax optimiser")
    built = client_tx(round)
    checks.kind("client_tx(round)", built, optax.GradientTransformation, "an optax optimiser")
    return built


def _step_report(opt_state: PyTree) -> Metrics:
    report = clipping.clip_report(opt_state)
    clipped = {"clipped_steps": report.pop("clipped")} if report else {}
    return {"steps": jnp.ones((), jnp.float32)} | clipped | {f"step_{name}": x for name, x in report.items()}
