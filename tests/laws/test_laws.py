"""The laws that every algorithm passes, whatever it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import COHORTS, ENTRIES, OUTSIDE, assert_close, assert_identical, entry, model, parameters

import fedjax_clip as fc
from fedjax_clip.core.metrics import check_names
from fedjax_clip.training import states

# One worker for each entry, where there are several: its laws share compiled rounds.
pytestmark = pytest.mark.parametrize("name", [pytest.param(n, id=f"@{n}") for n in ENTRIES])


@pytest.fixture
def run(name):
    return entry(name)


def test_rounds_are_finite_and_move_the_parameters(name, run):
    server, clients, history = run.rounds(parameters(), COHORTS)
    assert_close((server, clients, history), (server, clients, history))
    params = server.params
    if run.algorithm.personal is not None:
        params = run.algorithm.personal(params, jax.tree.map(lambda xs: xs[COHORTS[0][0]], clients))
    params = model(params)
    moved = {k for k, x in params.items() if np.any(x != parameters()[k])}
    stays = name == "fedbabu" or name.startswith("adapters")  # the head, or what has no adapter
    assert moved == set(params) - ({"b"} if stays else set())
    assert int(server.round) == len(COHORTS)
    assert [m["clients"] for m in history] == [2 if name == "power_of_choice" else 3] * 3
    for own in history[0].keys() - {"accuracy"} if name not in OUTSIDE else ():  # which no loss may report
        with pytest.raises(fc.InvalidInput, match="choose another one"):
            check_names([own])


def test_the_order_of_clients_does_not_matter(run):
    backwards = [ids[::-1] for ids in COHORTS]
    assert_close(run.rounds(parameters(), backwards), run.rounds(parameters(), COHORTS))


def test_chunk_width_does_not_matter(name, run):
    assert_close(entry(name, width=2).rounds(parameters(), COHORTS), run.rounds(parameters(), COHORTS))


def test_packed_and_resident_examples_agree_to_the_last_bit(name, run):
    packed = entry(name, resident=False)
    # A loss that is taken without its gradient may round otherwise, and these send what depends on it.
    same = assert_close if name in ("afl", "oort", "q_ffl", "term") else assert_identical
    same(packed.rounds(parameters(), COHORTS), run.rounds(parameters(), COHORTS))


@pytest.mark.parametrize("options", [{}, {"resident": False}, {"width": 2}])
def test_padding_changes_nothing_whatever_it_holds(name, options):
    run = entry(name, **options)
    assert_identical(run.rounds(parameters(), COHORTS, edit=with_garbage), run.rounds(parameters(), COHORTS))


def with_garbage(cohort: fc.extend.Cohort) -> fc.extend.Cohort:
    """Fills every place that is padding with NaN or a huge number."""
    absent, dead = cohort.ids < 0, cohort.example_weight == 0
    assert absent.any()
    assert dead.all(-1).any()

    def spoil(x, where):
        bad = {"f": np.nan, "b": True}.get(x.dtype.kind) or np.iinfo(x.dtype).max
        return np.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), np.asarray(bad, x.dtype), x)

    return dataclasses.replace(
        cohort,
        weight=spoil(cohort.weight, absent),
        staleness=spoil(cohort.staleness, absent),
        first=spoil(cohort.first, absent),
        num_steps=np.where(absent, 7, cohort.num_steps),
        batches=jax.tree.map(lambda x: spoil(x, dead), cohort.batches),
        example_weight=np.where(dead.all(-1, keepdims=True), np.float32(np.nan), cohort.example_weight),
        state=jax.tree.map(lambda x: spoil(x, absent), cohort.state),
    )


def test_the_second_round_does_not_compile(run):
    run.rounds(parameters(), COHORTS[:1])
    traced = run.traces
    server, _, _ = run.rounds(parameters(), COHORTS)
    assert run.traces == traced > 0
    before = run.start(parameters())[0]
    assert jax.tree.map(jax.typeof, before) == jax.tree.map(jax.typeof, jax.tree.map(jnp.asarray, server))


def test_a_run_that_goes_on_from_a_checkpoint_or_a_state_has_the_same_bits(run, tmp_path, monkeypatch):
    def train(rounds, **options):
        work = {"cohort_size": 4, "batch_size": 4, "local_steps": 5}  # steps, so that all rounds have one shape
        return fc.train(run.algorithm, run.data, parameters(), rounds=rounds, seed=5, **work, **options)

    straight = train(5)
    monkeypatch.setattr(states, "MEMORY_BYTES", 0)  # the clients' states lie on disk
    begun = train(3, checkpoints=fc.extend.Checkpoints(tmp_path))
    gone_on = train(5, state=begun.state)
    assert_identical(gone_on.state[:2], straight.state[:2])
    resumed = train(5, checkpoints=fc.extend.Checkpoints(tmp_path))
    assert [row["round"] for row in resumed.history] == [4, 5]
    assert_identical(resumed.state[:2], straight.state[:2])


P = sum(x.size for x in parameters().values())
A_AND_B = 2 * (4 + 3)  # floats of an adapter of rank 2 of w
TRAFFIC = {  # (down, up): floats that a client is sent in a round, and sends, where they are not the parameters once
    "adapters, residual": (A_AND_B + 4 * 3, A_AND_B),  # of the cohort's factors and the matrix the smaller
    "adapters, stacked": (4 * 3, A_AND_B),
    "adapters, decomposed": (A_AND_B, A_AND_B),
    "episode": (P + 2 * P, P + P),  # x, then x and G; g, then y - x
    "episode_plus": (2 * P, 2 * P),
    "fedavg, compressed": (
        6 / 8 + 6 / 8 + 1,
        4 + 3 + 3,
    ),  # places and levels of four bits, a norm; two vectors for w, b
    "fednova, few by leaf": (P, 5 + 1 + 1),  # the number of steps, too
    "mime": (P + 3 * P, P + P),  # x, then x, m and G; g, then y - x
    "mime, lite": (2 * P, 2 * P),
    "partially_private": (parameters()["w"].size, parameters()["w"].size),
    "fedbabu": (parameters()["w"].size, parameters()["w"].size),
    "fedbn": (parameters()["w"].size, parameters()["w"].size),
    "fedrep": (parameters()["w"].size, parameters()["w"].size),
    "fedcm": (2 * P, P + 1),
    "scaffnew": (P + 1, P),
    "fedadamw": (2 * P + 2 + 1, P + 2 + 1),  # x, D, V by leaf and a count; v by leaf, and its number of steps
    "fedmuon": (3 * P, 2 * P + 1),
    "ifca": (2 * P, P + 1),  # both models; one, and its number
    "cfl": (P, P + 1),  # its own; and its number
    "oort": (P, P + 1),  # their utility, too
    "q_ffl": (P, P + 1),
    "term": (P + 1, P + 1),
    "afl": (P + 6, P + 1 + 2 * 6),  # the weights; its weight, and its place twice
    "scaffold": (2 * P, 2 * P),
    "scaffold, own state": (2 * parameters()["w"].size, 2 * parameters()["w"].size),
    "scaffold, sketched": (2 * P, 3 * 4 + P),
    "scaffold, filtered": (2 * P, 2 * P),
    "scaffold, robust": (2 * P, 2 * P),
}


HIDDEN = (  # by noise: nobody may see who diverged
    "fedavg, private",
    "fedavg, private for records and clients",
    "fedavg, on a grid",
    "fedavg, centered",
)


def poisoned_by(run, value):
    data = run.data
    x = data.examples["x"].copy()
    x[data.offsets[1] : data.offsets[2]] = value
    return dataclasses.replace(run, data=dataclasses.replace(data, examples={**data.examples, "x": x}))


def test_under_noise_clients_that_diverge_send_zeros_like_any_other_message(run, name):
    """So a round does not tell whether a client's update was finite: only the metrics do."""
    if name not in HIDDEN:
        return
    rounds = [poisoned_by(run, value).rounds(parameters(), [[4, 1, 3]], run.jitted) for value in (np.inf, np.nan)]
    for server, clients, history in rounds:
        assert history[0]["clients"] == 3
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((server, clients)))
        assert_identical(server, rounds[0][0])
    as_usual = run.rounds(parameters(), [[4, 1, 3]], run.jitted)[2][0]
    stds = [name for name in as_usual if name.endswith("noise_std")]  # on a grid, of as many clients as came
    assert stds
    assert [rounds[0][2][0][name] for name in stds] == [as_usual[name] for name in stds]


def test_clients_that_diverge_are_dropped_and_counted(run, name):
    if name in HIDDEN:
        return  # they send zeros
    poisoned = poisoned_by(run, np.inf)
    server, clients, history = poisoned.rounds(parameters(), [[4, 1, 3]], run.jitted)
    without, _others, expected = run.rounds(parameters(), [[4, 3]])
    assert history[0].pop("dropped") == 1
    assert expected[0].pop("dropped") == 0
    assert (history[0].pop("asked"), expected[0].pop("asked")) == (3, 2)
    unknown = [expected[0][sent] / (2 * 4) for sent in ("bytes_down", "bytes_up")]
    if name == "power_of_choice":  # all are sent x, two chosen ones the rest of scaffold's
        sums = [[row.pop(sent) / 4 for sent in ("bytes_down", "bytes_up")] for row in (history[0], expected[0])]
        assert sums == [[3 * P + 2 * P, 3 + 4 * P], [2 * P + 2 * P, 2 + 4 * P]]
        history[0] |= {"bytes_down": 3 * 4 * P, "bytes_up": 3 * 4 * P}
        expected[0] |= {"bytes_down": 2 * 4 * P, "bytes_up": 2 * 4 * P}
    floats_sent = unknown if name in OUTSIDE else TRAFFIC.get(name, (P, P))
    for sent, floats in zip(("bytes_down", "bytes_up"), floats_sent, strict=True):
        assert history[0].pop(sent) == 3 * 4 * floats  # who is dropped was sent the parameters, and answered
        assert expected[0].pop(sent) == 2 * 4 * floats
        packed = name == "fedavg, compressed" or (name == "fednova, few by leaf" and sent == "bytes_up")
        assert (f"{sent}_entropy" in history[0]) == packed or name in OUTSIDE
        assert history[0].pop(f"{sent}_entropy", 0) == expected[0].pop(f"{sent}_entropy", 0) * 3 / 2
    assert_close((server, history), (without, expected))
    untouched = jax.tree.map(lambda xs: xs[1], run.start(parameters())[1])
    assert_identical(jax.tree.map(lambda xs: xs[1], clients), untouched)


def test_the_scale_of_example_weights_does_not_matter(run):
    def rounds(scale):
        data = dataclasses.replace(run.data, weights=np.full(run.data.num_examples, scale))
        return dataclasses.replace(run, data=data).rounds(parameters(), COHORTS[:1], run.jitted)[:2]

    for scale in (1e12, 1e-12):
        assert_close(rounds(scale), rounds(1.0), rtol=1e-4, atol=1e-5)


def test_a_round_without_clients_leaves_the_parameters(name, run):
    server, _, history = run.rounds(parameters(), [[]])
    if name.startswith("fedavg, private"):  # must not tell that nobody came: the round is noise
        assert np.any(server.params["w"] != parameters()["w"])
    elif name.startswith("adapters"):  # the same model, perhaps by others
        assert_close(model(server.params), parameters(), rtol=1e-5, atol=1e-6)
    else:
        assert_identical(server.params, run.start(parameters())[0].params)
    assert history[0]["clients"] == 0
