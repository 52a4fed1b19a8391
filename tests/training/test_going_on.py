"""Going on from a state: who keeps what, the server's means by hand, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, assert_identical

import fedjax_clip as fc
from fedjax_clip.training import going_on, states
from fedjax_clip.training.state import Members

PARAMS = {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)}


def population(sizes, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(sum(sizes.values()), 3)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    return fc.FederatedData({"x": x, "y": y}, np.cumsum([0, *sizes.values()]), list(sizes))


DATA = population({"ann": 10, "bob": 20, "cem": 30})
LATER = population({"dan": 8, "cem": 36, "ann": 10, "eva": 6}, seed=1)  # bob has left, cem has more


def loss(params, batch, key):
    logits = batch["x"] @ params["w"] + params["b"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def train(algorithm, data, rounds, **options):
    work = {"cohort_size": 2, "batch_size": 5, "local_steps": 2, "seed": 3}
    return fc.train(algorithm, data, PARAMS, rounds=rounds, **work | options)


SCAFFOLD = fc.scaffold(loss, optax.sgd(0.1), optax.adam(0.05), reducer=fc.reduce.uniform_mean())


def carried(algorithm, state, members):
    after, row, take_over = going_on.carried(algorithm, state, members)
    take_over()
    return after, row


@pytest.fixture(scope="module")
def begun():
    return train(SCAFFOLD, DATA, 4)


def test_more_rows_and_other_clients_go_on_and_nothing_of_the_old_result_changes(begun, tmp_path):
    before = jax.tree.map(np.array, begun.state[:2])
    result = train(SCAFFOLD, LATER, 7, state=begun.state, checkpoints=tmp_path, checkpoint_every=1)
    assert_identical(begun.state[:2], before)
    first, *others = result.history
    told = {name: first[name] for name in ("went_on_from", "clients_kept", "clients_new", "clients_gone")}
    assert told == {"went_on_from": 4, "clients_kept": 2, "clients_new": 2, "clients_gone": 1}
    assert [row["round"] for row in result.history] == [5, 6, 7]
    assert not any("went_on_from" in row for row in others)
    assert int(result.state.server.opt_state[0].count) == 7  # Adam's, and the round's
    assert int(result.state.server.round) == 7
    # c is still the mean of the c_i, of which some are new clients' and some those of earlier rounds
    c = result.state.server.own
    assert_close(c, jax.tree.map(lambda x: np.mean(x, 0), result.state.clients.own), atol=1e-6)

    # The same call goes on by itself, a kill included; another one is refused.
    again = train(SCAFFOLD, LATER, 7, state=begun.state, checkpoints=tmp_path)
    assert again.history == []
    assert_identical(again.state[:2], result.state[:2])
    with pytest.raises(fc.InvalidInput, match="is of a run that went on from another state"):
        train(SCAFFOLD, LATER, 7, checkpoints=tmp_path)
    with pytest.raises(
        fc.InvalidInput, match=r"on other data: num_clients=4, not 3. To train on with these data, go on"
    ):
        train(SCAFFOLD, DATA, 7, state=begun.state, checkpoints=tmp_path)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("memory", [2**30, 0], ids=["in memory", "on disk"])
def test_a_kill_changes_no_bit_of_a_run_that_went_on(begun, tmp_path, monkeypatch, memory):
    monkeypatch.setattr(states, "MEMORY_BYTES", memory)

    def go(directory, on_round=None):
        options = {"checkpoints": directory, "checkpoint_every": 2, "on_round": on_round}
        return train(SCAFFOLD, LATER, 9, state=begun.state, **options)

    def killed(at, row):
        if row["round"] == at:
            raise KilledError

    expected = go(tmp_path / "straight")
    for at in (5, 7):  # before the first checkpoint, and after it
        with pytest.raises(KilledError):
            go(tmp_path / "killed", functools.partial(killed, at))
    resumed = go(tmp_path / "killed")
    assert [row["round"] for row in resumed.history] == [7, 8, 9]
    assert_identical(resumed.state[:2], expected.state[:2])
    kept = fc.extend.Checkpoints(tmp_path / "killed").state(SCAFFOLD, PARAMS)
    assert (kept.rounds, list(kept.members.names)) == (9, ["dan", "cem", "ann", "eva"])
    assert_identical(jax.tree.map(np.asarray, kept[:2]), jax.tree.map(np.asarray, expected.state[:2]))


def made(algorithm, of, weights, seed=0, known=None):
    """A state of three clients, whose server's mean is that of their values, to the last bit but for rounding."""
    rng = np.random.default_rng(seed)
    begin = states.alike(algorithm, PARAMS, 3)
    clients = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype) if x.dtype.kind == "f" else np.array(x), begin
    )
    if known is not None:
        clients = clients._replace(own=clients.own._replace(known=np.array(known)))
    p = np.array(weights) / np.sum(weights)
    mean = jax.tree.map(lambda m: np.tensordot(p, m.astype(float), 1).astype(np.float32), of(clients))
    return clients, mean


CASES = {
    "scaffold": (SCAFFOLD, lambda c: c.own, lambda s: s.own, lambda s, m: s._replace(own=m)),
    "scaffold, by examples": (
        fc.scaffold(loss, optax.sgd(0.1)),
        lambda c: c.own,
        lambda s: s.own,
        lambda s, m: s._replace(own=m),
    ),
    "feddyn": (
        fc.feddyn(loss, optax.sgd(0.1), alpha=0.1),
        lambda c: c.own,
        lambda s: s.own,
        lambda s, m: s._replace(own=m),
    ),
    "a memory in a chain": (
        fc.fedsgd(
            loss,
            optax.sgd(0.1),
            uplink=fc.uplink.chain(fc.uplink.zeroing(), fc.uplink.memory(fc.clipping.clip_by_global_norm(1.0))),
            reducer=fc.reduce.uniform_mean(),
        ),
        lambda c: c.uplink[1][1],
        lambda s: s.uplink[1],
        lambda s, m: s._replace(uplink=(s.uplink[0], m)),
    ),
    "under a compressed broadcast": (
        fc.compressed_broadcast(SCAFFOLD, fc.compression.qsgd(8)),
        lambda c: c.own,
        lambda s: s.own[1],
        lambda s, m: s._replace(own=(s.own[0], m)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_servers_mean_is_that_of_the_clients_that_there_are(case):
    algorithm, of, part, put = CASES[case]
    weighs = algorithm.parts.reducer.weighted
    was, now = (Members.of(data) for data in (DATA, LATER))
    clients, mean = made(algorithm, of, was.weights if weighs else np.ones(3))
    state = fc.extend.State(put(algorithm.init(PARAMS), mean), clients, {}, was, 4)
    after, row = carried(algorithm, state, now)
    assert row["clients_kept"] == 2
    # By hand: dan and eva are new, with zeros; cem was client 2, ann client 0.
    p = now.weights / now.weights.sum() if weighs else np.full(4, 0.25)
    by_hand = jax.tree.map(lambda m: p[1] * m[2].astype(float) + p[2] * m[0], of(clients))
    assert_close(part(after.server), by_hand, atol=1e-6)
    assert_identical(jax.tree.map(lambda x: x[[1, 2]], after.clients), jax.tree.map(lambda x: x[[2, 0]], clients))
    begun = algorithm.init_client(PARAMS)
    assert_identical(jax.tree.map(lambda x: x[0], after.clients), jax.tree.map(np.asarray, begun))
    unchanged, _ = carried(algorithm, state, was)
    assert_identical(unchanged.server, state.server)


def test_new_clients_of_episode_plus_count_as_the_mean_until_they_send_a_gradient():
    algorithm = fc.episode_plus(loss, optax.sgd(0.1), threshold=1.0, reducer=fc.reduce.uniform_mean())
    clients, mean = made(algorithm, lambda c: c.own.gradient, np.ones(3), known=[True, True, True])
    state = fc.extend.State(algorithm.init(PARAMS)._replace(own=mean), clients, {}, Members.of(DATA), 4)
    after, _ = carried(algorithm, state, Members.of(LATER))
    by_hand = jax.tree.map(lambda g: (g[2].astype(float) + g[0]) / 2, clients.own.gradient)
    assert_close(after.server.own, by_hand, atol=1e-6)
    assert after.clients.own.known.tolist() == [False, True, True, False]


def test_states_on_disk_carry_over_to_disk(monkeypatch):
    clients, mean = made(SCAFFOLD, lambda c: c.own, np.ones(3))
    begin = states.alike(SCAFFOLD, PARAMS, 3)
    rows = states.OnDisk(begin)
    rows.scatter(np.array([0, 2]), jax.tree.map(lambda x: x[[0, 2]], clients))  # bob never took part
    server = SCAFFOLD.init(PARAMS)._replace(own=mean)
    state = fc.extend.State(server, rows.tree, {}, Members.of(DATA), 4)
    monkeypatch.setattr(states, "MEMORY_BYTES", 0)
    after, _ = carried(SCAFFOLD, state, Members.of(LATER))
    found = states.of(after.clients)
    assert isinstance(found, states.OnDisk)
    assert np.flatnonzero(found.index[:, 0]).tolist() == [1, 2]
    assert_identical(jax.tree.map(lambda x: x[[1, 2]], after.clients), jax.tree.map(lambda x: x[[2, 0]], clients))
    assert going_on.digest(state) != going_on.digest(after)


def test_clients_without_names_are_matched_by_number_and_it_is_said():
    numbered = [fc.FederatedData(d.examples, d.offsets) for d in (DATA, LATER)]
    with pytest.warns(UserWarning, match="no names, so they are matched by their numbers"):
        places = going_on.matched(*map(Members.of, numbered))
    assert places.tolist() == [0, 1, 2, -1]
    assert going_on.matched(Members.of(numbered[0]), Members.of(numbered[0])).tolist() == [0, 1, 2]


def test_what_cannot_go_on_is_refused_with_one_sentence(begun):
    larger = {"w": np.zeros((3, 4), np.float32), "b": np.zeros(4, np.float32)}
    feddyn = fc.feddyn(loss, optax.sgd(0.1), alpha=0.1)
    for changes, words in (
        ({"state": begun}, "state must be the state of a result of fc.train"),
        ({"state": fc.extend.State(*begun.state[:3])}, "does not say which clients it is of"),
        ({"rounds": 4}, "state is of round 4, and rounds=4 counts those rounds: ask for more than 4"),
        ({"algorithm": feddyn}, "state is of scaffold, not feddyn: go on with scaffold"),
        ({"params": larger}, "it has float32[2] server/params/b, where float32[4] is needed. If the model has grown"),
        ({"secret": fc.privacy.Secret.fresh()}, "A run with a secret goes on from its own checkpoints only"),
    ):
        told = {"algorithm": SCAFFOLD, "data": DATA, "params": PARAMS, "rounds": 5, "state": begun.state} | changes
        with pytest.raises(fc.InvalidInput) as error:
            fc.train(**told)
        assert words in str(error.value)


def test_under_noise_nobody_leaves_a_mean_but_others_may_join():
    link = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.gaussian(1.0))
    private = fc.scaffold(loss, optax.sgd(0.1), uplink=link, variate_uplink=link, reducer=fc.reduce.fixed_mean(2))
    clients, mean = made(private, lambda c: c.own, np.ones(3))
    state = fc.extend.State(private.init(PARAMS)._replace(own=mean), clients, {}, Members.of(DATA), 4)
    with pytest.raises(fc.InvalidInput, match="Client 'bob' has left or changed its weight.*under noise"):
        carried(private, state, Members.of(LATER))
    more = Members(["ann", "bob", "cem", "dan"], np.ones(4))
    after, _ = carried(private, state, more)
    assert_close(after.server.own, jax.tree.map(lambda c: 0.75 * c, mean))


def test_a_state_grows_with_its_model(begun):
    rng = np.random.default_rng(2)
    larger = {"w": rng.normal(size=(3, 4)).astype(np.float32), "b": np.ones(4, np.float32)}
    state = fc.extend.grown(begun.state, SCAFFOLD, larger)
    assert_identical(state.server.params["w"][:, :2], begun.params["w"])
    assert_identical(state.server.params["w"][:, 2:], larger["w"][:, 2:])
    moments, c_i = state.server.opt_state[0], state.clients.own
    assert_identical(moments.nu["b"], np.append(begun.state.server.opt_state[0].nu["b"], [0, 0]).astype(np.float32))
    assert_identical(c_i["w"][..., :2], begun.state.clients.own["w"])
    assert not c_i["w"][..., 2:].any()
    assert int(moments.count) == 4
    begin = fc.extend.State(SCAFFOLD.init(larger), states.alike(SCAFFOLD, larger, 3), {})
    assert going_on.differs(begin, state) == []
    with pytest.raises(fc.InvalidInput, match="does not fit into"):
        fc.extend.grown(state, SCAFFOLD, PARAMS)
    with pytest.raises(fc.InvalidInput, match="other layers"):
        fc.extend.grown(state, SCAFFOLD, {"w": larger["w"]})


def test_the_average_is_the_mean_of_the_parameters_so_far():
    tx = optax.chain(optax.sgd(1.0), fc.fedopt.average(0.8))
    params = {"w": jnp.array([1.0, -1.0])}
    state, seen = tx.init(params), []
    for gradient in ([0.5, 0.1], [-0.2, 0.3], [0.4, 0.4]):
        updates, state = tx.update({"w": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params["w"])
    weights = 0.8 ** np.arange(2, -1, -1)
    expected = np.tensordot(weights / weights.sum(), np.array(seen), 1)
    np.testing.assert_allclose(state[1].params["w"], expected, rtol=1e-6)
    with pytest.raises(fc.InvalidInput, match="average's decay"):
        fc.fedopt.average(1.0)
    with pytest.raises(fc.InvalidInput, match="keeps no average: end server_tx with"):
        fc.fedopt.averaged(SCAFFOLD.init(PARAMS))
