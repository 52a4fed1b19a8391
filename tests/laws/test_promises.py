"""What links, reducers and algorithms promise is kept by all that wraps them, or the composition is refused."""

import functools
import inspect
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Run, assert_identical, parameters, population, softmax_loss

import fedjax_clip as fc
from fedjax_clip import compression, privacy, reduce, uplink
from fedjax_clip.reduce import Roster
from fedjax_clip.uplink.base import encoded

CLIP, FIXED = uplink.clip_by_global_norm(1.0), fc.reduce.fixed_mean(4)
SGD = optax.sgd(0.1)
BARE = {
    "server": uplink.chain(CLIP, uplink.gaussian(1.0)),
    "bits": uplink.chain(uplink.quantile_clip(bits_noise=1.0), uplink.gaussian(1.5)),
    "squares": uplink.chain(CLIP, uplink.fedexp(8.0), uplink.gaussian(1.0)),
    "mechanism": uplink.chain(CLIP, uplink.gaussian(1.0, mechanism=fc.uplink.mechanism.tree(4))),
    "deployment": uplink.chain(CLIP, uplink.gaussian(1.0, noise_cohort=100)),
    "client": uplink.chain(CLIP, uplink.local_gaussian(1.0)),
    "shares": uplink.chain(CLIP, uplink.skellam(1.0)),
    "leaks": uplink.quantile_clip(),
    "packs": uplink.compress(compression.top_k(0.5)),
    "sums": uplink.count_sketch(3, 8, k=2),
    "named": uplink.chain(fc.attacks.sign_flip([5]), CLIP),
    "memory": uplink.memory(fc.clipping.clip_by_global_norm(1.0)),
}
KINDS = {"link": uplink.Uplink, "reducer": fc.reduce.Reducer, "algorithm": fc.extend.Algorithm}


def mentions(annotation):
    """The kinds that an annotation speaks of."""
    found = {kind for kind, cls in KINDS.items() if annotation is cls}
    for part in typing.get_args(annotation):
        for inner in part if isinstance(part, list) else [part]:
            found |= mentions(inner)
    return found


@functools.cache
def makers():
    """``{name: (kinds that it takes, kinds that it returns)}`` of every public function of the library."""
    found = {}
    modules = [(f"fc.{n}", getattr(fc, n)) for n in (*fc.__all__, "clusters", "drift", "fair", "personal")]
    for path, thing in modules:
        members = [(path, thing)]
        if inspect.ismodule(thing):
            names = getattr(thing, "__all__", [n for n in vars(thing) if not n.startswith("_")])
            members = [(f"{path}.{n}", getattr(thing, n)) for n in names]
        for name, value in members:
            if inspect.isfunction(value) and value.__module__.startswith("fedjax_clip"):
                hints = dict(value.__annotations__)
                returned = mentions(hints.pop("return", None))
                taken = set().union(*map(mentions, hints.values()))
                if returned:
                    found[value] = (name, taken, returned)
    return {name: (taken, returned) for name, taken, returned in found.values()}


def wraps(kind):
    """The names of what makes one of a kind of another of that kind."""
    return {name for name, (taken, returned) in makers().items() if kind in taken and kind in returned}


LINKS = {  # every public function that makes a link of a link
    "fc.uplink.by_group": lambda link: uplink.by_group(link, {"few": [0]}),
    "fc.uplink.chain": lambda link: uplink.chain(uplink.relative_to_last(), link),
    "fc.uplink.error_feedback": uplink.error_feedback,
    "fc.uplink.memory": uplink.memory,
    "fc.uplink.on_parts": uplink.on_parts,
    "fc.uplink.with_bias": uplink.with_bias,
}

REDUCERS = {  # every public function that makes a reducer of a reducer
    "fc.attacks.alie": lambda r: fc.attacks.alie(r, [0]),
    "fc.attacks.colluding": lambda r: fc.attacks.colluding(r, [0], lambda s, h: jax.tree.map(lambda x: x[0], s[0])),
    "fc.attacks.ipm": lambda r: fc.attacks.ipm(r, [0]),
    "fc.attacks.mimic": lambda r: fc.attacks.mimic(r, [0], 1),
    "fc.attacks.optimal_alie": lambda r: fc.attacks.optimal_alie(r, [0], candidates=2),
    "fc.attacks.optimal_ipm": lambda r: fc.attacks.optimal_ipm(r, [0], candidates=2),
    "fc.attacks.strongest": lambda r: fc.attacks.strongest(
        r, [0], lambda s, h, z: jax.tree.map(lambda x: x[0], s[0]), [1.0]
    ),
    "fc.reduce.arc": lambda r: reduce.arc(1, r),
    "fc.reduce.bucketing": lambda r: reduce.bucketing(r, 2),
    "fc.reduce.nnm": lambda r: reduce.nnm(1, r),
    "fc.reduce.norm_bounded": lambda r: reduce.norm_bounded(0.5, r),
    "fc.reduce.restacked": lambda r: reduce.restacked(lambda stack: stack, r),
    "fc.reduce.together": lambda r: fc.reduce.together(r, r),
}

ALGORITHMS = {  # every public function that makes an algorithm of an algorithm
    "fc.compressed_broadcast": lambda algorithm: fc.compressed_broadcast(algorithm, compression.qsgd(8)),
    "fc.partially_frozen": lambda algorithm: fc.partially_frozen(algorithm, "b"),
    "fc.partially_private": lambda algorithm: fc.partially_private(algorithm, "b"),
    "fc.drift.fedlc": lambda algorithm: fc.drift.fedlc(algorithm, 1.0, classes=3),
    "fc.drift.oort": lambda algorithm: fc.drift.oort(algorithm, 3, 6),
    "fc.drift.power_of_choice": lambda algorithm: fc.drift.power_of_choice(algorithm, 3),
}


@pytest.mark.parametrize(("kind", "table"), [("link", LINKS), ("reducer", REDUCERS), ("algorithm", ALGORITHMS)])
def test_no_wrapper_dodges_the_law(kind, table):
    """A new public function that wraps links, reducers or algorithms must join its table here."""
    shortest = {name.rsplit(".", 1)[-1] for name in wraps(kind)}
    assert shortest == {name.rsplit(".", 1)[-1] for name in table}


def made_or_refused(make, sentence=""):
    """What ``make()`` makes; ``None`` if it is refused by a whole sentence."""
    try:
        return make()
    except fc.InvalidInput as error:
        told = str(error)
    assert told.endswith((".", ")"))
    assert sentence in told
    return None


def kept(before, after):
    """What a wrapper may not lose."""
    for name in ("noise", "noise_multipliers", "mechanism", "deployment", "leaks", "trusts", "moves", "grid"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.population >= before.population
    assert after.mirrors == before.mirrors or after.mirrors == "memory"
    assert after.wire is before.wire or before.wire is uplink.Wire.KEEPS


@pytest.mark.parametrize("wrapper", LINKS)
@pytest.mark.parametrize("bare", BARE)
def test_a_wrapped_link_keeps_the_promises_or_is_refused(bare, wrapper):
    wrapped = made_or_refused(lambda: LINKS[wrapper](BARE[bare]))
    if wrapped is None:
        return
    kept(BARE[bare].promises, wrapped.promises)
    if BARE[bare].promises.noise is uplink.Noise.SERVER:
        assert epsilon(wrapped) == epsilon(BARE[bare])


def epsilon(link):
    z = privacy.together(link.promises.noise_multipliers)
    sampler, mechanism = fc.data.sampling.round_robin(4), link.promises.mechanism
    return privacy.epsilon(z, sampler, num_clients=12, rounds=4, delta=1e-3, mechanism=mechanism)


def test_the_table_of_wrapped_links_is_not_refused_throughout():
    """A law that everything dodges by a refusal would say nothing."""
    passed = {}
    for (name, wrap), (bare, link) in itertools.product(LINKS.items(), BARE.items()):
        try:
            wrap(link)
            passed.setdefault(name, []).append(bare)
        except fc.InvalidInput:
            pass
    assert {name: len(bares) >= 3 for name, bares in passed.items()} == dict.fromkeys(LINKS, True)


def reduced(reducer, messages, weights):
    roster = Roster(jnp.arange(len(weights), dtype=jnp.int32), jax.random.key(0))
    acc = reducer.zero(jax.tree.map(lambda x: x[0], messages), roster)
    return reducer.finish(reducer.add(acc, messages, weights), None)


@pytest.mark.parametrize("wrapper", REDUCERS)
def test_under_the_servers_noise_a_wrapped_mean_is_a_mean_or_refused(wrapper):
    """One client that comes or stays away moves the aggregate by its bound over the denominator, and no further."""
    reducer = REDUCERS[wrapper](FIXED)
    try:
        fc.fedavg(softmax_loss, SGD, uplink=BARE["server"], reducer=reducer)
    except fc.InvalidInput:
        return
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = rng.normal(size=(6, 5)).astype("f4")
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        x[0] = -3 * x[1:].sum(0) / np.linalg.norm(3 * x[1:].sum(0))
        messages = (jnp.asarray(x), jnp.asarray(x)) if wrapper == "fc.reduce.together" else jnp.asarray(x)
        there, away = (reduced(reducer, messages, jnp.asarray([w, *[1.0] * 5])) for w in (1.0, 0.0))
        gone = jax.tree.map(lambda m: m.at[0].set(0), messages)
        away = reduced(reducer, gone, jnp.asarray([0.0, *[1.0] * 5]))
        moved = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b)), there, away)
        assert max(jax.tree.leaves(moved)) <= 1 / 4 + 1e-6


@pytest.mark.parametrize("wrapper", REDUCERS)
@pytest.mark.parametrize("secure", ["modular_sum", "ckks_mean"])
def test_a_wrapped_secure_sum_hides_messages_or_is_refused(wrapper, secure):
    reducer = reduce.modular_sum(4) if secure == "modular_sum" else fc.secure.ckks_mean(4)
    wrapped = made_or_refused(lambda: REDUCERS[wrapper](reducer), "single messages")
    assert wrapped is None or wrapped.hides


def algorithm_makers():
    """Every public function that makes an algorithm of a loss, as flags would build it."""
    return {name for name, (taken, returned) in makers().items() if "algorithm" in returned - taken}


def build(name, **parts):
    make = functools.reduce(getattr, name.split(".")[1:], fc)
    needed = {"episode": {"threshold": 1.0}, "episode_plus": {"threshold": 1.0}, "fedbuff": {"max_staleness": 2}}
    needed |= {"feddyn": {"alpha": 0.1}, "ditto": {"strength": 0.1}, "mr_mtl": {"strength": 0.1}}
    needed |= {name: {"head": "^b$"} for name in ("fedbabu", "fedrep")} | {"fedbn": {"norms": "^b$"}}
    needed |= {"ifca": {"clusters": 2}, "q_ffl": {"q": 1.0, "rate": 0.1}, "term": {"t": 1.0}}
    needed |= {"cfl": {"clusters": 2, "stationary": 0.1, "disagree": 0.1}}
    needed |= {"afl": {"clients": 6, "rate": 0.1}}
    needed |= {"fedcm": {"alpha": 0.3, "rate": 0.1, "steps": 2}, "scaffnew": {"p": 0.5, "rate": 0.1}}
    needed |= {name: {"rate": 0.1} for name in ("fedadamw", "fedmuon")}
    return make(per_example_loss=softmax_loss, client_tx=SGD, **needed.get(name.split(".")[-1], {}), **parts)


@pytest.mark.parametrize("bare", ["server", "client", "shares", "mechanism"])
def test_every_algorithm_covers_what_it_sends_or_is_refused(bare):
    """Those that send more than the uplink covers: known by what one client's message is made of."""
    reducer = reduce.modular_sum(4) if bare == "shares" else FIXED
    names = algorithm_makers() - {"fc.extend.algorithm"}
    taken = set()
    for name in names:
        algorithm = made_or_refused(lambda name=name: build(name, uplink=BARE[bare], reducer=reducer))
        if algorithm is not None:
            taken.add(name.rsplit(".", 1)[-1])
            kept(BARE[bare].promises, algorithm.parts.uplink.promises)
    only_update = {"fedavg", "fedsgd", "feddyn", "fedbuff", "reptile", "per_fedavg", "pfedme", "ditto", "mr_mtl"}
    only_update |= {"apfl", "fedcm", "scaffnew"}
    only_update |= {"fedala", "fedbabu", "fedbn", "fedrep"}  # of a part of the model
    assert taken == only_update - ({"fedbuff"} if bare == "shares" else set())


@pytest.mark.parametrize(
    "wrapper", [n for n in ALGORITHMS if "oort" not in n and "choice" not in n]
)  # which refuse noise
def test_a_wrapped_algorithm_keeps_its_parts(wrapper):
    parts = ALGORITHMS[wrapper](fc.fedavg(softmax_loss, SGD, uplink=BARE["server"], reducer=FIXED)).parts
    assert parts.uplink.promises == BARE["server"].promises
    assert parts.reducer == FIXED


@pytest.mark.parametrize("bare", ["server", "client", "shares"])
def test_a_part_of_a_message_without_noise_does_not_travel_beside_one_with_it(bare):
    """Parameters may be a tuple: then ``on_parts`` of one link would let all but their first leave as they are."""
    link, parts = uplink.on_parts(BARE[bare]), (jnp.ones(3), jnp.ones(3))
    with pytest.raises(fc.InvalidInput, match="a link for each part"):
        link.encode(parts, link.init(parts), link.init_client(parts), None)


IN_ORDER = {
    "relative": uplink.relative_to_last(),
    "clip": CLIP,
    "memory": uplink.memory(fc.clipping.clip_by_global_norm(0.5)),
    "quantile": uplink.quantile_clip(bits_noise=1.0),
    "top": uplink.compress(compression.top_k(0.5)),
    "fedexp": uplink.fedexp(8.0),
    "gaussian": uplink.gaussian(1.0),
}


def orders():
    for count in (2, 3, 4):
        for names in itertools.permutations(IN_ORDER, count):
            if "gaussian" in names:
                try:
                    yield names, uplink.chain(*(IN_ORDER[name] for name in names))
                except fc.InvalidInput:
                    continue


@pytest.fixture
def one_sampler(monkeypatch):
    """All chains draw their noise by one compiled program."""
    monkeypatch.setattr(uplink.lattice, "noise", jax.jit(uplink.lattice.noise))


@pytest.mark.usefixtures("one_sampler")
def test_a_round_of_nobody_looks_like_any_other_whatever_the_order_of_links():
    """Under noise every coordinate of the update moves, in rounds with somebody and in rounds with nobody."""
    params = {"w": jnp.ones(5), "b": jnp.ones(3)}
    key, seen = jax.random.key(7), 0
    for names, link in orders():
        state = link.init(params)
        ctx = uplink.Context(key, key, jnp.int32(0), jnp.float32(1), 4.0, share=jnp.float32(0.5))
        (sent, *_), _, report = encoded(link, params, state, link.init_client(params), ctx)
        total, sums = jax.tree.map(jnp.zeros_like, (sent, report))  # as they add up over nobody
        server = ctx._replace(client_id=jnp.int32(-1), weight=jnp.float32(0))
        update, _, _ = link.decode(total, state, fc.extend.metrics.finish(sums), server)
        assert all(np.all(np.asarray(x) != 0) and np.all(np.isfinite(x)) for x in jax.tree.leaves(update)), names
        seen += 1
    assert seen > 30


@pytest.mark.usefixtures("one_sampler")
def test_what_clients_report_beside_their_messages_moves_nothing_that_is_kept_or_sent():
    """Under the server's noise, but for bits and squares that are noised themselves; nor does how many came."""
    params, key, seen = {"w": jnp.ones(5), "b": jnp.ones(3)}, jax.random.key(7), 0
    for names, link in orders():
        if {"quantile", "fedexp"} & set(names):
            continue
        state = link.init(params)
        ctx = uplink.Context(key, key, jnp.int32(0), jnp.float32(1), 4.0, share=jnp.float32(0.5))
        (sent, *_), _, report = encoded(link, params, state, link.init_client(params), ctx)
        report, absurd = (
            fc.extend.metrics.finish(report),
            jax.tree.map(lambda x: x * 0 + 1e9, fc.extend.metrics.finish(report)),
        )
        server = ctx._replace(client_id=jnp.int32(-1), weight=jnp.float32(1))
        honest = link.decode(sent, state, report, server)[:2]
        other = link.decode(sent, state, absurd, server._replace(weight=jnp.float32(7)))[:2]
        assert_identical(honest, other)
        seen += 1
    assert seen > 10


@pytest.mark.parametrize("name", ["fedavg", "fedsgd", "feddyn", "fedbuff", "scaffold"])
def test_a_round_of_nobody_is_noise_under_every_algorithm_that_takes_it(name):
    """All that the server keeps and sends moves as in any round: parameters, and SCAFFOLD's variate."""
    beside = {"variate_uplink": BARE["server"]} if name == "scaffold" else {}
    algorithm = build(f"fc.{name}", uplink=BARE["server"], reducer=FIXED, **beside)
    server, _, history = Run(algorithm, population()).rounds(parameters(), [[]])
    assert all(np.all(np.asarray(x) != parameters()[k]) for k, x in server.params.items())
    if name == "scaffold":
        assert all(np.all(np.asarray(x) != 0) for x in jax.tree.leaves(server.own))
    assert history[0]["clients"] == 0
