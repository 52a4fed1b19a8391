"""Links that keep a memory, and what algorithms keep of all clients: against loops written from the papers alone."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import memory as memory_oracle
from oracles import rounds as rounds_oracle
from problems import assert_close

import fedjax_clip as fc
from fedjax_clip import clipping, compression, uplink
from fedjax_clip.training.loop import client_states
from fedjax_clip.training.states import InMemory

SIZES, DIM, LR, TAU = np.array([4, 8, 2, 6, 4]), 3, 0.1, 0.4
N = len(SIZES)
STEPS = -(-SIZES // 2)  # batches of 2
# Drawn uniformly, then Poisson (nobody, everybody), then in turn; some clients late.
COHORTS = [[0, 2, 3], [1, 3], [3, 0, 1], [], [4], [0, 1, 2, 3, 4], [2, 4], [], [0, 1], [2, 3], [4, 0], [1, 2]]
MEANS = {"uniform": (fc.reduce.uniform_mean, np.ones(N)), "weighted": (fc.reduce.weighted_mean, SIZES.astype(float))}


def problem():
    """Regressions whose optima differ: data, loss, start, and the oracle's gradients of the batches in order."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(SIZES.sum(), DIM)).astype(np.float32)
    y = (x * rng.normal(size=(N, DIM))[np.repeat(np.arange(N), SIZES)]).sum(1).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(SIZES)])

    def gradient(i, w, step, round):
        first, rows = offsets[i], slice(offsets[i], offsets[i + 1])
        if step != rounds_oracle.FULL:
            rows = slice(first + 2 * step, first + 2 * step + 2)
        a = x[rows].astype(np.float64)
        return a.T @ (a @ w - y[rows]) / len(a)

    def loss(params, batch, key):
        return 0.5 * jnp.square(batch["x"] @ params["w"] - batch["y"])

    return fc.FederatedData({"x": x, "y": y}, offsets), loss, np.array([1.0, -2.0, 0.5], np.float32), gradient


DATA, LOSS, START, GRADIENT = problem()


def run(algorithm, cohorts=COHORTS, begin=True):
    """The server and all clients' states before and after each round, in arrays of one shape: one compilation."""
    server, clients = algorithm.init({"w": START}), client_states(algorithm, {"w": START}, N)
    work, saved = fc.extend.LocalWork(2, shuffle=False), []

    def step(function, server, ids, r):
        cohort = fc.extend.plan_rounds(
            DATA, [np.array(ids, int)], work, seed=0, first_round=r, least=(N, 12), state=clients
        )
        flat = jax.tree.map(lambda x: x[0, 0], cohort)
        server, states, metrics = function(server, flat, jax.random.key(0))
        assert metrics["dropped"] == 0
        InMemory(clients).scatter(cohort.ids[0], jax.tree.map(lambda x: x[None], states))
        saved.append(jax.tree.map(np.array, (server, clients)))
        return server

    saved.append(jax.tree.map(np.array, (server, clients)))
    if algorithm.start and begin:  # in two cohorts
        server = step(jax.jit(algorithm.start), server, [3, 1], 0)
        server = step(jax.jit(algorithm.start), server, [0, 2, 4], 0)
        saved = saved[-1:]
    function = jax.jit(algorithm.round)
    for r, ids in enumerate(cohorts):
        server = step(function, server, ids, r)
    return saved


def params(saved):
    return np.array([server.params["w"] for server, _ in saved])


def full_gradient(i, x, round):
    return GRADIENT(i, x, rounds_oracle.FULL, round)


def memory(*arguments, mean, **options):
    reducer = MEANS[mean][0]()
    link = uplink.memory(*arguments, **options)
    return fc.fedsgd(LOSS, optax.sgd(1.0), optax.sgd(LR), uplink=link, reducer=reducer)


MEMORIES = {
    "clip21": ((clipping.clip_by_global_norm(TAU),), memory_oracle.clip21, {"tau": TAU}),
    "clip21-sgd2m": (
        (clipping.clip_by_global_norm(TAU), 0.6, 0.8),
        memory_oracle.clip21_sgd2m,
        {"tau": TAU, "beta": 0.6, "betahat": 0.8},
    ),
    "normec": ((clipping.smoothed_clip(0.7, 0.4),), memory_oracle.normec, {"alpha": 0.4, "beta": 0.7}),
    "ef21": ((uplink.compress(compression.top_k(2 / 3)),), memory_oracle.ef21, {"k": 2}),
}


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_follows_the_mean_over_all_clients_whoever_comes(name, mean):
    """The papers' rounds under sampling, and the law g = mean v_i after each of them, empty rounds included."""
    arguments, oracle, options = MEMORIES[name]
    weights = MEANS[mean][1]
    saved = run(memory(*arguments, mean=mean))
    right = oracle(
        START,
        lambda i, x, t: -full_gradient(i, x, t),
        memory_oracle.delta_server(LR),
        COHORTS,
        N,
        weights=weights,
        **options,
    )
    g = np.array([server.uplink["w"] for server, _ in saved])
    v = np.array([clients.uplink[1]["w"] for _, clients in saved])
    assert_close(g, np.average(v, axis=1, weights=weights), rtol=1e-5, atol=1e-6)
    for got, wanted in ((params(saved), right["x"]), (g, right["g"]), (v, right["v"])):
        assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_memory_under_a_fixed_mean_and_behind_local_training():
    """A fixed denominator n counts n / N; FedAvg's updates take the place of gradients."""
    link = uplink.memory(clipping.clip_by_global_norm(TAU))
    saved = run(fc.fedavg(LOSS, optax.sgd(LR), uplink=link, reducer=fc.reduce.fixed_mean(2.0)))

    def update(i, x, t):
        y = x
        for step in range(STEPS[i]):
            y = y - LR * GRADIENT(i, y, step, t)
        return y - x

    right = memory_oracle.clip21(START, update, memory_oracle.delta_server(), COHORTS, N, TAU)
    assert_close(params(saved), right["x"], rtol=1e-4, atol=1e-5)


def test_the_servers_step_does_not_depend_on_how_many_come():
    gradients = np.array([1, 2, 3, 10, 4, 4, 5, 3], np.float32)
    data, seen = fc.FederatedData({"a": gradients}, np.arange(9)), []
    link = uplink.memory(clipping.clip_by_global_norm(1e9))
    algorithm = fc.fedsgd(
        lambda p, b, k: p["x"] * b["a"], optax.sgd(1.0), optax.sgd(1.0), uplink=link, reducer=fc.reduce.uniform_mean()
    )
    for cohort in (8, 2):
        places = [0.0]
        fc.train(
            *(algorithm, data, {"x": np.float32(0)}),
            **{"rounds": 8 // cohort + 2, "sampler": fc.data.sampling.round_robin(cohort), "batch_size": 1},
            evaluate=lambda p, places=places: places.append(float(p["x"])) or {},
            eval_every=1,
        )
        seen.append(places[-2] - places[-1])
    np.testing.assert_allclose(seen, [4.0, 4.0], rtol=1e-5)


def test_a_secure_sum_that_aborts_leaves_memories_as_they_were():
    link = uplink.chain(
        uplink.memory(clipping.clip_by_global_norm(TAU)), uplink.clip_by_global_norm(1.0), uplink.integer_grid()
    )
    algorithm = fc.fedavg(LOSS, optax.sgd(LR), uplink=link, reducer=fc.reduce.modular_sum(4, threshold=3))
    (_, (before, kept), (after, kept_too)) = run(algorithm, [[0, 1, 2], [3, 4]])
    v = kept.uplink[0][1]["w"]
    assert_close(before.uplink[0]["w"], v.mean(0), atol=1e-4)  # the grid rounds
    assert np.any(v)
    np.testing.assert_array_equal(kept_too.uplink[0][1]["w"], v)
    np.testing.assert_array_equal(after.uplink[0]["w"], before.uplink[0]["w"])


def test_what_would_spoil_a_memory_is_refused():
    link = uplink.memory(clipping.clip_by_global_norm(TAU))
    with pytest.raises(fc.InvalidInput, match="FedBuff weighs messages by their staleness, and memory"):
        fc.fedbuff(LOSS, optax.sgd(LR), max_staleness=2, uplink=uplink.chain(link))
    with pytest.raises(fc.InvalidInput, match="make the cohort by fc.extend.plan"):
        context = uplink.Context(jax.random.key(0), jax.random.key(0), jnp.int32(-1), jnp.float32(1))
        link.decode({"w": START}, {"w": START}, {}, context)


def oracle_run(function, **options):
    return function(START, GRADIENT, COHORTS, STEPS, **options)


SIDES = {  # what else an algorithm keeps follows which mean: the papers', by unequal clients
    "episode": (
        lambda **kwargs: fc.episode(LOSS, optax.sgd(LR), threshold=2.0, **kwargs),
        lambda w: oracle_run(rounds_oracle.episode, eta=LR, gamma=2.0 * LR, weights=w, side_weights=w),
        None,
    ),
    "episode++": (
        lambda **kwargs: fc.episode_plus(LOSS, optax.sgd(LR), threshold=2.0, **kwargs),
        lambda w: oracle_run(rounds_oracle.episode_plus, eta=LR, gamma=2.0 * LR, weights=w, side_weights=w),
        ("G", lambda server: server.own["w"]),
    ),
    "scaffold": (
        lambda **kwargs: fc.scaffold(LOSS, optax.sgd(LR), optax.sgd(0.7), **kwargs),
        lambda w: oracle_run(rounds_oracle.scaffold, eta=LR, server_lr=0.7, weights=w, side_weights=w),
        ("c", lambda server: server.own["w"]),
    ),
    "feddyn": (
        lambda **kwargs: fc.feddyn(LOSS, optax.sgd(LR), alpha=0.3, **kwargs),
        lambda w: oracle_run(rounds_oracle.feddyn, eta=LR, alpha=0.3, weights=w, side_weights=w),
        ("h", lambda server: server.own["w"]),
    ),
    "mime": (
        lambda **kwargs: fc.mime(LOSS, optax.sgd(LR), beta=0.7, **kwargs),
        lambda w: oracle_run(rounds_oracle.mime, eta=LR, base=rounds_oracle.sgdm(0.7), weights=w, side_weights=w),
        ("s", lambda server: server.own["w"]),
    ),
    "mimelite": (
        lambda **kwargs: fc.mime(LOSS, optax.sgd(LR), beta=0.7, lite=True, **kwargs),
        lambda w: oracle_run(
            rounds_oracle.mime, eta=LR, base=rounds_oracle.sgdm(0.7), lite=True, weights=w, side_weights=w
        ),
        ("s", lambda server: server.own["w"]),
    ),
    "fednova": (
        lambda **kwargs: fc.fednova(LOSS, optax.sgd(LR), **kwargs),
        lambda w: oracle_run(rounds_oracle.fednova, eta=LR, weights=w),
        None,
    ),
}


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", SIDES)
def test_side_messages_take_the_mean_that_is_stated(name, mean):
    make, oracle, kept = SIDES[name]
    saved = run(make(reducer=MEANS[mean][0]()))
    right = oracle(MEANS[mean][1])
    assert_close(params(saved), right["x"], rtol=1e-4, atol=1e-5)
    if kept is not None:
        assert_close(np.array([kept[1](server) for server, _ in saved]), right[kept[0]], rtol=1e-4, atol=1e-5)


def test_an_episode_that_never_clips_is_scaffold_from_all_gradients():
    saved = run(fc.episode_plus(LOSS, optax.sgd(LR), threshold=1e9, reducer=fc.reduce.uniform_mean()))
    first = [np.mean([GRADIENT(i, START, k, rounds_oracle.INITIAL) for k in range(STEPS[i])], 0) for i in range(N)]
    assert_close(params(saved), oracle_run(rounds_oracle.scaffold, eta=LR, c0=first)["x"], rtol=1e-4, atol=1e-5)


def test_fixed_means_keep_what_is_kept_of_all_clients():
    """A fixed denominator changes the server's step, and not that h is the mean of the clients' h_i."""
    saved = run(fc.feddyn(LOSS, optax.sgd(LR), alpha=0.3, reducer=fc.reduce.fixed_mean(2.0)))
    for server, clients in saved:
        assert_close(server.own["w"], clients.own["w"].mean(0), rtol=1e-5, atol=1e-6)


def test_a_client_that_joins_later_has_no_gradient_and_the_mean_stands_for_it():
    """As if all clients' G_i were the mean of those that were asked, for those that were not."""
    algorithm = fc.episode_plus(LOSS, optax.sgd(LR), threshold=2.0, reducer=fc.reduce.uniform_mean())
    late = run(algorithm, begin=False)
    right = oracle_run(rounds_oracle.episode_plus, eta=LR, gamma=2.0 * LR, initial=np.zeros((N, DIM)))
    assert_close(params(late)[1], right["x"][1], rtol=1e-4, atol=1e-5)  # nobody was asked: G = 0, and d = g

    server, clients = late[0]
    own = clients.own
    known = own._replace(
        gradient={"w": own.gradient["w"] + 7.0}, known=own.known | True
    )  # is not looked at where unknown
    unknown = known._replace(known=own.known)
    mean = {"w": np.array([0.1, -0.2, 0.3], np.float32)}

    def after(state):
        cohort = fc.extend.plan(
            DATA,
            np.array([0]),
            fc.extend.LocalWork(2, shuffle=False),
            seed=0,
            round=0,
            state=clients._replace(own=state),
        )
        return jax.jit(algorithm.round)(
            server._replace(own=mean), jax.tree.map(lambda x: x[0], cohort), jax.random.key(0)
        )

    moved, states, _ = after(unknown)
    stands = after(known._replace(gradient={"w": np.tile(mean["w"], (N, 1))}))
    assert_close(moved.params, stands[0].params)
    assert_close(moved.own, stands[0].own)
    assert bool(states.own.known[0])


def quartic():
    """EPISODE's two clients at H = 4, without noise."""
    data = fc.FederatedData({"h": np.array([4.0, -8.0], np.float32)}, [0, 1, 2])
    return data, lambda p, b, k: p["x"] ** 4 - 3 * p["x"] ** 3 + b["h"] * p["x"] ** 2 + p["x"]


def test_episode_plus_clips_its_first_rounds_from_far_starts_and_counts_what_it_asked():
    data, loss = quartic()
    algorithm = fc.episode_plus(loss, optax.sgd(0.01), threshold=5.0)
    settings = {"rounds": 500, "batch_size": 1, "local_steps": 8, "shuffle": False, "cohort_size": 2}
    for start in (1.0, 12.0):
        run = fc.train(algorithm, data, {"x": np.float32(start)}, **settings)
        np.testing.assert_allclose(run.params["x"], 2.5979, atol=1e-4)
        assert sum(row["dropped"] for row in run.history) == 0
    first, second = run.history[:2]
    assert (first["clipped_round"], first["steps"], second["steps"]) == (1, 32, 16)
    assert (first["bytes_down"], second["bytes_down"]) == (2 * 4 + 2 * 8, 2 * 8)
    assert (first["bytes_up"], second["bytes_up"]) == (2 * 4 + 2 * 8, 2 * 8)


def test_a_sweep_begins_as_a_training_does():
    data, loss = quartic()

    def build(hyper):
        return fc.episode_plus(loss, optax.sgd(0.01), threshold=hyper["threshold"])

    settings = {"rounds": 5, "batch_size": 1, "local_steps": 8, "shuffle": False}
    trials = fc.sweep(build, {"threshold": [5.0, 50.0]}, data, {"x": np.float32(12)}, loss, {"all": data}, **settings)
    for trial, threshold in zip(trials, (5.0, 50.0), strict=True):
        run = fc.train(build({"threshold": threshold}), data, {"x": np.float32(12)}, **settings)
        np.testing.assert_allclose(
            trial.metrics["mean_gradient_norm"], run.history[-1]["mean_gradient_norm"], rtol=1e-5
        )


FEDOPT = {
    "adagrad": (fc.fedopt.fedadagrad(0.05, 0.3, 0.01), {"b1": 0.3}),
    "adam": (fc.fedopt.fedadam(0.05, 0.8, 0.95, 0.01), {"b1": 0.8, "b2": 0.95}),
    "yogi": (fc.fedopt.fedyogi(0.05, 0.8, 0.95, 0.01), {"b1": 0.8, "b2": 0.95}),
}


@pytest.mark.parametrize("kind", FEDOPT)
def test_fedopt_is_reddis(kind):
    tx, betas = FEDOPT[kind]
    saved = run(fc.fedavg(LOSS, optax.sgd(LR), tx, reducer=fc.reduce.uniform_mean()))
    options = {"eta_l": LR, "eta": 0.05, "tau": 0.01, "empty": "zero", **betas}
    right = rounds_oracle.fedopt(kind, START, GRADIENT, COHORTS, STEPS, **options)
    assert_close(params(saved), right["x"], rtol=1e-4, atol=1e-5)


def test_fedopts_defaults_are_the_papers():
    change, eta, tau = np.array([0.3, -0.02, 0.0004]), 0.05, 1e-3
    steps = {
        "fedadam": 0.1 * change / (np.sqrt(0.99 * tau**2 + 0.01 * change**2) + tau),
        "fedyogi": 0.1 * change / (np.sqrt(tau**2 - 0.01 * change**2 * np.sign(tau**2 - change**2)) + tau),
        "fedadagrad": change / (np.sqrt(tau**2 + change**2) + tau),
    }
    for name, step in steps.items():
        tx = getattr(fc.fedopt, name)(eta)
        moved, _ = tx.update({"w": -jnp.asarray(change, jnp.float32)}, tx.init({"w": jnp.zeros(3)}))
        np.testing.assert_allclose(moved["w"], eta * step, rtol=1e-5)
    page = (pathlib.Path(__file__).parents[2] / "docs/algorithms.md").read_text()
    rivals = (
        *(
            (fc.fedopt.fedadam(1.0), "`fedadam`"),
            (optax.adam(1.0, b2=0.99, eps=1e-3), "`optax.adam(b2=0.99, eps=1e-3)`"),
        ),
        *(
            (fc.fedopt.fedyogi(1.0), "`fedyogi`"),
            (optax.yogi(1.0, b2=0.99, eps=1e-3), "`optax.yogi(b2=0.99, eps=1e-3)`"),
        ),
        *((fc.fedopt.fedadagrad(1.0), "`fedadagrad`"), (optax.adagrad(1.0), "`optax.adagrad`")),
    )
    for tx, name in rivals:  # the table of docs/algorithms.md
        same = jnp.array([0.3, 0.0004])

        def step(state, _, tx=tx, same=same):
            moved, state = tx.update(-same, state, jnp.zeros(2))
            return state, moved

        moved = np.asarray(jax.lax.scan(step, tx.init(jnp.zeros(2)), None, 100)[1])[[0, 9, 99]]
        assert f"| {name} | " + " | ".join(f"{x:.3f}" for x in moved.T.ravel()) + " |" in page
    for bad in ({"beta1": 2}, {"beta2": -1}, {"tau": 0}):
        with pytest.raises(fc.InvalidInput, match=next(iter(bad))):
            fc.fedopt.fedadam(0.1, **bad)
