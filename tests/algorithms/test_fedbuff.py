"""FedBuff against a NumPy loop written from Algorithm 1 of Nguyen et al. (2022), and its limiting cases."""

import jax
import numpy as np
import optax
import pytest
from problems import assert_close, assert_identical, leaky_error_feedback, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip.training.loop import client_states
from fedjax_clip.training.states import InMemory

# Seven buffers with a ring of three: it goes round more than twice. Clients come again, and some are staler than the
# rounds done so far: nobody has sent them anything but x_0.
BUFFERS = ([0, 2, 3], [1, 3], [3, 0, 1], [4, 2, 0], [1], [2, 4, 3, 0], [0, 1, 4])
STALENESS = ([0, 1, 2], [2, 1], [2, 0, 1], [2, 2, 0], [1], [0, 2, 2, 1], [2, 2, 2])
SIZES = (4, 8, 2, 6, 4)
BATCH, LR, BOUND, TAU = 2, 0.1, 0.15, 1.5


def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(SIZES), 3)).astype(np.float32)
    y = rng.normal(scale=3.0, size=sum(SIZES)).astype(np.float32)
    return fc.FederatedData({"x": x, "y": y}, np.concatenate([[0], np.cumsum(SIZES)])), np.array([1.0, -2.0, 0.5])


def loss(params, batch, key):
    return 0.5 * (batch["x"] @ params["w"] - batch["y"]) ** 2


def numpy_fedbuff(server_lr, exponent, weights):
    """Every x of the past is kept; the clip acts on what arrives, then the discount, then 1/K."""
    data, start = problem()
    features, labels = (data.examples[k].astype(np.float64) for k in ("x", "y"))

    def clip(v, bound):
        return v * min(1, bound / np.sqrt(np.sum(v**2)))

    past = [start]
    for ids, staleness in zip(BUFFERS, STALENESS, strict=True):
        total, k = 0.0, 0.0
        for i, s in zip(ids, staleness, strict=True):
            x = y = past[max(len(past) - 1 - s, 0)]
            for first in range(data.offsets[i], data.offsets[i + 1], BATCH):
                rows = slice(first, first + BATCH)
                g = features[rows].T @ (features[rows] @ y - labels[rows]) / BATCH
                y = y - LR * clip(g, TAU)
            total = total + weights[i] * (1 + s) ** -exponent * clip(y - x, BOUND)
            k += weights[i]
        past.append(past[-1] + server_lr * total / k)
    return np.array(past[1:])


def run(algorithm, buffers=BUFFERS, staleness=STALENESS):
    """The parameters after each buffer, the last client states, and all metrics."""
    data, start = problem()
    params = {"w": start.astype(np.float32)}
    server, clients = algorithm.init(params), client_states(algorithm, params, len(SIZES))
    step, xs, history = jax.jit(algorithm.round), [], []
    for r, ids in enumerate(buffers):
        late = None if staleness is None else [np.array(staleness[r])]
        work = fc.extend.LocalWork(BATCH, shuffle=False)
        options = {"seed": 0, "first_round": r, "least": (4, 12), "state": clients}  # one shape: compiled once
        cohort = fc.extend.plan_rounds(data, [np.array(ids)], work, staleness=late, **options)
        server, states, metrics = step(server, jax.tree.map(lambda x: x[0, 0], cohort), jax.random.key(0))
        InMemory(clients).scatter(cohort.ids, jax.tree.map(lambda x: x[None, None], states))
        xs.append(np.asarray(server.params["w"]))
        history.append(metrics)
    return np.array(xs), clients, history


CLIENT = optax.chain(fc.clipping.clip_by_global_norm(TAU), optax.sgd(LR))
LINK = fc.uplink.clip_by_global_norm(BOUND)


UNIFORM, WEIGHTED = (None, np.ones(5)), (fc.reduce.weighted_mean(), np.array(SIZES))


@pytest.mark.parametrize(
    ("server_lr", "exponent", "reducer", "weights"),
    [(1.0, 0.5, *UNIFORM), (1.3, 0.0, *UNIFORM), (0.7, 2.0, *WEIGHTED)],
    ids=["paper", "no discount", "weighted"],
)
def test_the_numpy_loop(server_lr, exponent, reducer, weights):
    algorithm = fc.fedbuff(
        loss, CLIENT, optax.sgd(server_lr), max_staleness=2, exponent=exponent, uplink=LINK, reducer=reducer
    )
    xs, _, history = run(algorithm)
    assert_close(xs, numpy_fedbuff(server_lr, exponent, weights), rtol=1e-4, atol=1e-5)
    assert_close([m["staleness"] for m in history], [np.float32(np.mean(s)) for s in STALENESS])
    assert not any(m["dropped"] for m in history)


@pytest.mark.parametrize(("max_staleness", "staleness"), [(0, None), (3, [[0] * len(ids) for ids in BUFFERS])])
def test_without_delay_it_is_clipped_fedavg_to_the_last_bit(max_staleness, staleness):
    options = {"uplink": LINK, "reducer": fc.reduce.uniform_mean()}
    waited = run(fc.fedavg(loss, CLIENT, optax.adam(0.1), **options), staleness=None)
    stale = run(
        fc.fedbuff(loss, CLIENT, optax.adam(0.1), max_staleness=max_staleness, uplink=LINK), staleness=staleness
    )
    assert_identical(stale[0], waited[0])


def test_without_delay_a_whole_run_is_that_of_fedavg_to_the_last_bit():
    def train(make, **options):
        algorithm = make(
            softmax_loss, CLIENT, uplink=leaky_error_feedback(0.05), reducer=fc.reduce.weighted_mean(), **options
        )
        return fc.train(algorithm, population(), parameters(), rounds=7, cohort_size=4, batch_size=4, local_steps=3)

    stale, waited = train(fc.fedbuff, max_staleness=2), train(fc.fedavg)
    assert_identical(stale.params, waited.params)
    assert_identical(stale.state.clients, waited.state.clients)


def test_staleness_changes_no_bit_of_an_algorithm_that_ignores_it():
    algorithm = fc.fedavg(loss, CLIENT, uplink=LINK)
    assert_identical(run(algorithm)[0], run(algorithm, staleness=None)[0])


def test_the_clip_acts_before_the_discount():
    """What is far over the bound arrives with the bound's norm, and then counts for half."""
    algorithm = fc.fedbuff(loss, CLIENT, max_staleness=3, uplink=fc.uplink.clip_by_global_norm(1e-3))
    xs, _, history = run(algorithm, [[0]], [[3]])
    assert_close(np.linalg.norm(xs[0] - problem()[1]), 0.5e-3, rtol=1e-3)
    assert history[0]["uplink/clipped"] == 1


def test_an_answer_that_is_too_stale_is_dropped_and_leaves_no_trace():
    link = leaky_error_feedback(0.05)
    algorithm = fc.fedbuff(loss, CLIENT, max_staleness=2, uplink=link)
    late, without = run(algorithm, [[0, 1, 3]], [[1, 3, 0]]), run(algorithm, [[0, 3]], [[1, 0]])
    assert late[2][0]["dropped"] == 1
    assert late[2][0]["clients"] == 2
    assert_close(late[0], without[0])
    assert_identical(jax.tree.map(lambda x: x[1], late[1]), jax.tree.map(lambda x: x[1], without[1]))


def test_a_schedule_counts_the_rounds_of_the_parameters_that_were_sent():
    algorithm = fc.fedbuff(loss, lambda r: optax.sgd(0.1 / (1.0 + r)), max_staleness=2, exponent=0.0)

    def third_step(staleness):
        xs = run(algorithm, [[0], [0], [2]], [[0], [0], [staleness]])[0]
        return xs[2] - xs[1], [problem()[1], *xs]

    for staleness in (0, 1, 2):
        update, past = third_step(staleness)
        data, _ = problem()
        x, rows = past[2 - staleness], slice(data.offsets[2], data.offsets[3])
        g = data.examples["x"][rows].T @ (data.examples["x"][rows] @ x - data.examples["y"][rows]) / 2
        assert_close(update, -0.1 / (1 + 2 - staleness) * g.astype(np.float32), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bad", [-1, 1.5, True, None])
def test_a_staleness_is_a_whole_number(bad):
    with pytest.raises(fc.InvalidInput, match="max_staleness"):
        fc.fedbuff(loss, CLIENT, max_staleness=bad)
