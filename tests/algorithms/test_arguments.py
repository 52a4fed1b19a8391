"""What an algorithm is given: a wrong argument is named, and a loss is tried before it is trusted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import ENTRIES, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip.core.loss import examples_meet


def test_a_loss_that_is_not_one_number_an_example_is_refused():
    algorithm = fc.fedavg(lambda p, b, k: jnp.mean(softmax_loss(p, b, k)[0]), optax.sgd(0.1))
    with pytest.raises(fc.InvalidInput, match=r"one loss for each example, shape \(12,\), not \(\)"):
        fc.train(algorithm, population(), parameters(), rounds=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fc.fedavg(softmax_loss, 0.1), "client_tx must be an optax optimiser"),
        (lambda: fc.fedavg(softmax_loss, optax.sgd(0.1), 0.1), "server_tx must be an optax optimiser"),
        (lambda: fc.fedavg(softmax_loss, fc.uplink.clip_by_global_norm(1.0)), "client_tx is an uplink"),
        (lambda: fc.fedavg(softmax_loss, optax.sgd(0.1), uplink=optax.clip(1.0)), "at_client"),
        (lambda: fc.fedavg(softmax_loss, optax.sgd(0.1), reducer=fc.reduce.uniform_mean), "uniform_mean()"),
        (lambda: fc.evaluator(softmax_loss, population()), "in a dict by name"),
        (lambda: train(parameters()), "data must be a FederatedData"),
        (lambda: train(population(), sampler="uniform"), "sampler must be"),
        (lambda: train(population(), sampler=fc.data.sampling.uniform(2), cohort_size=2), "give one of them"),
        (lambda: train(population(), evaluate=softmax_loss), "evaluate must be a function of the parameters"),
        (lambda: train(population(), evaluate=lambda params, clients: {}), "evaluate must be a function of the par"),
        (
            lambda: train(population(), uplink=link(lambda u, s, c, ctx: u)),
            "encode must return (message, client_state, report)",
        ),
        (lambda: train(population(), uplink=link(lambda u, s, c, ctx: (u, c, 0.5))), "the last a dict"),
        (
            lambda: train(population(), uplink=link(lambda u, s, c, ctx: (u, jnp.ones(2), {}))),
            "encode must return the client_state in the form it got it, {}, not {'': 'float32[2]'}",
        ),
        (lambda: train(population(), uplink=link(decode=lambda a, s, r, ctx: a)), "decode must return"),
        (lambda: train(fc.FederatedData({"x": np.array(["a"])}, [0, 1])), "Field 'x' holds <U1"),
        (lambda: fc.fedavg(softmax_loss, optax.sgd), "client_tx is the function sgd itself"),
        (
            lambda: fc.scaffold(softmax_loss, functools.partial(optax.adam, b1=0.5)),
            "function adam itself",
        ),
        (lambda: fc.fedavg(softmax_loss, fc.clipping.clip_by_global_norm), "function clip_by_global_norm itself"),
        (lambda: fc.fedavg(softmax_loss, optax.sgd(0.1), optax.sgd), "not the function sgd (without its parentheses?)"),
        (
            lambda: fc.fedavg(softmax_loss, optax.sgd(0.1), reducer=fc.reduce.uniform_mean),
            "not the function uniform_mean",
        ),
        (lambda: loss_of(lambda p, b, k: b["y"] == 1), "floating-point losses, not bool"),
        (lambda: loss_of(lambda p, b, k: b["y"]), "floating-point losses, not int32"),
        (lambda: loss_of(lambda p, b, k: [*softmax_loss(p, b, k)]), "one loss for each example, shape (12,), not list"),
        (lambda: loss_of(lambda p, b, k: None), "one loss for each example, shape (12,), not NoneType"),
        (lambda: loss_of(lambda p, b, k: (b["x"][:, 0], b["y"])), "must return losses[B], or (losses[B], {name"),
        (lambda: loss_of(lambda p, b: b["x"][:, 0]), "per_example_loss must be a function of (params, batch, key)"),
        (lambda: loss_of("loss"), "per_example_loss must be a function of (params, batch, key)"),
        (lambda: fc.train(softmax_loss, population(), parameters(), rounds=1), "not the function softmax_loss"),
        (lambda: train_from({}), "params hold nothing to train"),
        (lambda: train_from({"w": "a"}), "Parameter 'w' must be an array of numbers, not 'a'"),
        (lambda: train_from(lambda key: parameters()), "Parameter 'params' must be an array of numbers, not <function"),
        (lambda: train_from({"w": np.zeros((4, 3), int), "b": np.zeros(3)}), "Parameter 'w' holds int32"),
        (lambda: train(population(), rounds=2.5), "rounds must be a whole number of at least 1, not 2.5"),
        (lambda: train(population(), clients_per_chunk=-3), "clients_per_chunk must be a whole number"),
        (lambda: train(population(), devices=[]), "devices must be one or more different devices"),
        (lambda: train(population(), devices=["cpu"]), "A device must be one of jax.local_devices(), not str"),
        (lambda: train(population(), local_epochs=2, local_steps=3), "local_epochs and local_steps both say"),
        (
            lambda: train(population(), evaluate=lambda params: 3.0),
            "What an evaluation returns must be numbers by name",
        ),
        (lambda: train(population(), evaluate=lambda params: {"a": "b"}), "one number for each name, not {'a': 'b'}"),
        (lambda: train(population(), on_round=3), "on_round must be a function of a row"),
        (
            lambda: train(population(), checkpoints=3),
            "checkpoints must be a directory, or fc.extend.Checkpoints(directory)",
        ),
        (
            lambda: fc.sweep(3, {"lr": [0.1]}, population(), parameters(), softmax_loss, rounds=1),
            "build must be a function",
        ),
        (
            lambda: fc.sweep(abs, [0.1], population(), parameters(), softmax_loss, rounds=1),
            "points must be values by name",
        ),
        (lambda: loss_of(reporting("round")), "reports 'round', a name that the library fills itself"),
        (lambda: loss_of(reporting("seconds")), "Taken are bytes_down"),
        (lambda: loss_of(reporting("eval/x")), "begin with client_norm/"),
        (lambda: loss_of(reporting(3)), "names that are text, not 3"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(fc.InvalidInput) as error:
        call()
    assert message in str(error.value)


def loss_of(per_example_loss):
    return fc.train(fc.fedavg(per_example_loss, optax.sgd(0.1)), population(), parameters(), rounds=1)


def train_from(params):
    return fc.train(fc.fedavg(softmax_loss, optax.sgd(0.1)), population(), params, rounds=1)


def reporting(name):
    return lambda params, batch, key: (softmax_loss(params, batch, key)[0], {name: batch["x"][:, 0]})


def train(data, uplink=None, **options):
    algorithm = fc.fedavg(softmax_loss, optax.sgd(0.1), uplink=uplink)
    return fc.train(algorithm, data, parameters(), **{"rounds": 1, **options})


def test_parameters_may_be_numbers_of_python():
    """As arrays of no axes."""

    def loss(params, batch, key):
        return 0.5 * (batch["x"][:, 0] * params["w"] - 1) ** 2

    runs = [fc.train(fc.fedavg(loss, optax.sgd(0.1)), population(), {"w": w}, rounds=1) for w in (0.5, np.float32(0.5))]
    assert runs[0].params["w"] == runs[1].params["w"] != 0.5


def link(encode=lambda u, s, c, ctx: (u, c, {}), decode=lambda a, s, r, ctx: (a, s, {})):
    return fc.uplink.Uplink(lambda params: (), lambda params: (), encode, decode)


def test_a_checkpoint_of_another_seed_is_refused(tmp_path):
    checkpoints = fc.extend.Checkpoints(tmp_path)
    train(population(), checkpoints=checkpoints)
    with pytest.raises(fc.InvalidInput, match="seed=0, not 1"):
        train(population(), checkpoints=checkpoints, seed=1)


def normalised_loss(params, batch, key):
    """Batch normalisation in training mode: every example sees the others."""
    x = batch["x"]
    return softmax_loss(params, {**batch, "x": (x - x.mean(0)) / (x.std(0) + 1e-3)}, key)


def contrastive_loss(params, batch, key):
    """The pairs within a batch."""
    embedded = batch["x"] @ params["w"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(embedded @ embedded.T, jnp.arange(len(embedded)))


def test_padding_is_warned_of_where_examples_see_each_other():
    assert all(make().loss is not None for make in ENTRIES.values())
    algorithm = fc.fedavg(normalised_loss, optax.sgd(0.1))
    with pytest.warns(UserWarning, match="another loss in another batch .* Choose a batch_size that divides every"):
        fc.train(algorithm, population((4, 6)), parameters(), rounds=1, batch_size=4, devices=jax.local_devices()[:1])
    batch, zeros = population((6,)).examples, jax.tree.map(np.zeros_like, parameters())
    for loss, meet in ((normalised_loss, True), (contrastive_loss, True), (softmax_loss, False)):
        for params in (parameters(), zeros):  # where all examples have one and the same loss
            assert examples_meet(loss, params, batch) == meet


@pytest.mark.parametrize(
    ("sizes", "batch_size", "pads"),
    [((4, 8), 4, False), ((4, 6), 4, True), ((6,), 12, False), ((4, 8), 12, True), ((5, 5), None, False)],
)
def test_which_batches_are_padded(sizes, batch_size, pads):
    assert fc.extend.LocalWork(batch_size).pads(np.array(sizes)) == pads


def test_a_loss_is_tried_once_and_only_where_batches_are_padded(compilations):
    def loss(*args):
        return softmax_loss(*args)

    def programs(sizes, seed):
        compilations.clear()
        algorithm = fc.fedavg(loss, optax.sgd(0.1))
        fc.train(algorithm, population(sizes), parameters(), rounds=1, batch_size=4, seed=seed)
        return len(compilations)

    programs((4, 4), 0)  # with all that any training compiles
    assert programs((4, 4), 1) == 1
    assert programs((4, 6), 2) == 2
    assert programs((4, 6), 3) == 1


def one_round(end=None, send=None, report=None):
    """FedAvg in which one thing is wrong: how the round ends, what clients send, or what they report."""

    def round(now):
        def client_fn(x, client, key):
            y, _, _, said = client.local_steps(x, key)
            update = optax.tree.sub(y, x)
            return send(update) if send else update, client.state.own, said | (report or {})

        answer = now.exchange(client_fn, now.server.params)
        return end(now, answer) if end else now.step(answer)

    return fc.train(fc.extend.algorithm(round, softmax_loss, optax.sgd(0.1)), population(), parameters(), rounds=1)


def forgetful():
    return optax.GradientTransformation(optax.init_empty_state, lambda updates, state, params=None: updates)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: one_round(lambda now, a: now.step(a, metrics={"norms": jnp.ones(3)})),
            'The metric "norms" of the round has shape (3,): a metric is one number.',
        ),
        (lambda: one_round(report={"n": jnp.ones(3)}), 'The metric "n" of the round has shape (3,)'),
        (
            lambda: one_round(lambda now, a: now.step(a, metrics={"loss": 1.0})),
            "reports 'loss' by metrics= of now.step, a name that the library fills itself",
        ),
        (lambda: one_round(lambda now, a: now.step(a, own=jnp.ones(()))), "by server_own= of fc.extend.algorithm"),
        (lambda: one_round(lambda now, a: now.step(a.update)), "now.step takes the answer of now.exchange first"),
        (lambda: one_round(lambda now, a: now.step(a, (a.update, 1.0))), "with beside= the mean is answer.update[0]"),
        (lambda: one_round(lambda now, a: now.step(a, 1.0)), "must have the parameters' structure"),
        (
            lambda: one_round(send=lambda u: jax.tree.map(jnp.ravel, u)),
            "The clients' update at w has shape (12,), not (4, 3).",
        ),
        (lambda: train(population(), fc.uplink.stateless(lambda u, ctx: u)), "encode(update, ctx) of a link must"),
        (
            lambda: train(population(), fc.uplink.stateless(lambda u, ctx: fc.uplink.Message(u))),
            "must return (message, metrics), the last a dict.",
        ),
        (lambda: fc.uplink.stateless(lambda u: (u, {})), "encode must be a function of (update, ctx)"),
        (lambda: train(population(), fc.uplink.at_client(forgetful())), "must return (updates, state)."),
    ],
)
def test_what_an_author_gets_wrong_is_said_while_tracing(call, message):
    with pytest.raises(fc.InvalidInput) as error:
        call()
    assert message in str(error.value)
