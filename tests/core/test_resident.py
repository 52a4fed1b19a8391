"""Examples that live on a device: the same examples in rows of any platform, and what they take of its memory."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    COHORTS,
    ENTRIES,
    SIZES,
    Run,
    assert_identical,
    clipped_sgd,
    entry,
    parameters,
    population,
    softmax_loss,
)

import fedjax_clip as fc
from fedjax_clip.core.resident import Resident
from fedjax_clip.training import loop, planner
from fedjax_clip.training.planner import Planner, room
from fedjax_clip.training.rounds import BY_ROUND, run_rounds

REPOSITORY = pathlib.Path(__file__).parents[2]
N = 100_003  # examples of the population whose copies are sought: no other array of a round has as many numbers
FREE_TO_READ = {"gather", "dynamic_slice"}


def examples(rng, count=2051):
    odd = rng.normal(size=(count, 3, 43)).astype(np.float32)
    odd[0, 0, :2] = np.frombuffer(np.array([0x7FC12345, 0x80000000], np.uint32).tobytes(), np.float32)  # a NaN, and -0
    return {
        "image": rng.integers(256, size=(count, 28, 28, 1), dtype=np.uint8),
        "odd": odd,
        "half": rng.normal(size=(count, 128)).astype(jnp.bfloat16),
        "nothing": np.zeros((count, 0), np.float32),
        "label": rng.integers(2**31, size=count, dtype=np.int32),
        "flag": rng.random(count) < 0.5,
        "weight": rng.random(count).astype(np.float32),
    }


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("where", [np.asarray, jnp.asarray])
def test_rows_hold_the_examples_to_the_last_bit(platform, where):
    data = examples(np.random.default_rng(0))
    index = np.array([[0, 2050, 1024], [1023, 128, 127]])
    taken = jax.jit(lambda rows, index: rows[index])(Resident.of(jax.tree.map(where, data), platform), index)
    for name, x in data.items():
        assert taken[name].dtype == x.dtype
        assert np.asarray(taken[name]).tobytes() == x[index].tobytes(), name


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_population_takes_what_its_rows_take(platform):
    data = examples(np.random.default_rng(0))
    rows = Resident.of(data, platform)
    assert Resident.nbytes(data, platform) == sum(x.nbytes for x in jax.tree.leaves(rows))
    if platform == "cpu":
        assert all(np.shares_memory(x, rows.rows[name]) or not x.size for name, x in data.items())
    else:
        assert all(x.shape[-1] % 128 == 0 for x in jax.tree.leaves(rows))


def test_a_round_reads_the_same_from_rows_of_whole_tiles():
    def tiled(cohort):
        rows = Resident.of(population().examples, "tpu")
        return dataclasses.replace(cohort, population=jax.tree.map(lambda x: x[None], rows))

    run = Run(fc.fedavg(softmax_loss, clipped_sgd), population())
    assert_identical(run.rounds(parameters(), COHORTS, edit=tiled), run.rounds(parameters(), COHORTS))


def copies(jaxpr, most, inside=False):
    """Operations in loops, other than a gather or a slice, that read an array of at least ``most`` numbers."""
    for equation in jaxpr.eqns:
        inner = list(jax.extend.core.jaxprs_in_params(equation.params))
        loops = equation.primitive.name in ("while", "scan")
        for one in inner:
            yield from copies(one, most, inside or loops)
        if inside and not inner and equation.primitive.name not in FREE_TO_READ:
            read = [x.aval for x in equation.invars if getattr(x.aval, "size", 0) >= most]
            if read:
                yield f"{equation.primitive.name} of {read[0].str_short()}"


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("name", ["fedavg", "fedsgd", "scaffold", "episode", "mime", "fedbuff", "partially_private"])
def test_no_loop_copies_the_resident_population(name, width):
    few = population()
    fields = {k: np.broadcast_to(x[:1], (N, *x.shape[1:])) for k, x in few.examples.items()}  # it takes no memory
    many = fc.FederatedData(fields, np.append(few.offsets[:-1], N))
    rounds = [np.arange(len(SIZES) - 1)]
    options = {"seed": 0, "first_round": 0, "width": width, "population": (), "staleness": [np.zeros(5, int)]}
    cohorts = jax.tree.map(lambda x: x[0], fc.extend.plan_rounds(many, rounds, fc.extend.LocalWork(4), **options))
    algorithm = ENTRIES[name]()
    kept = loop.client_states(algorithm, parameters(), 1)
    states = jax.tree.map(lambda x: np.broadcast_to(x, (*cohorts.ids.shape, *x.shape[1:])), kept)
    server, key = algorithm.init(parameters()), jax.random.key(0)
    for resident in (Resident.of(fields, "tpu"), Resident.of(fields), fields):
        run = functools.partial(run_rounds, algorithm.round, count=1, shelf=BY_ROUND)
        traced = jax.make_jaxpr(run)((server, states), cohorts, resident, key)
        assert list(copies(traced.jaxpr, N)) == []


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "mime"])
def test_no_loop_over_clients_copies_the_packed_batches(name, width):
    run, rows = entry(name), 4096
    plan = fc.extend.plan_rounds(
        run.data,
        [np.arange(4)],
        run.work,
        seed=0,
        first_round=0,
        width=width,
        least=(4, rows),
        state=run.start(parameters())[1],
    )
    cohort = jax.tree.map(lambda x: x[0, 0], plan)
    traced = jax.make_jaxpr(run.algorithm.round)(run.algorithm.init(parameters()), cohort, jax.random.key(0))
    assert list(copies(traced.jaxpr, rows)) == []


def test_a_compiled_tpu_program_neither_copies_nor_pads_the_population(monkeypatch):
    pytest.importorskip("libtpu", reason="make tpu installs it")
    command = [sys.executable, "benchmarks/tpu.py", "--child=mlp", "--chips=v5e", "--width=1"]
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from tpu import ENVIRONMENT, cases

    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=ENVIRONMENT, check=True)
    row, takes = json.loads(done.stdout.splitlines()[-1]), Resident.nbytes(cases()["mlp"].examples, "tpu")
    assert takes <= row["arguments"] < 1.02 * takes
    assert max(row["temporaries"], row["made"]) < 0.02 * takes


@dataclasses.dataclass
class Device:
    """A device with this much memory, of which some is taken."""

    limit: int
    taken: int = 0
    platform: str = "tpu"
    process_index: int = 0
    id: int = 0

    def memory_stats(self):
        return {"bytes_limit": self.limit, "bytes_in_use": self.taken}


def test_a_population_may_take_half_of_what_the_run_leaves_free():
    assert room(Device(1000, 200), beside=300) == 250
    assert room(Device(1000, 900), beside=300) == 0
    assert room(Device(1000, platform="cpu")) == planner.RESIDENT_BYTES


def test_a_population_without_room_is_packed_and_the_user_told():
    data = population()
    takes = Resident.nbytes(data.examples, "tpu")
    assert takes > 10 * sum(x.nbytes for x in data.fields().values())  # small rows are mostly padding
    sampler = fc.data.sampling.uniform(3)
    with pytest.warns(UserWarning, match="The examples would take .* GiB of a device's memory"):
        blocks = Planner(data, sampler, fc.extend.LocalWork(4), [Device(2 * takes - 1)], 0)
    assert not blocks.resident
    assert blocks.population is None
