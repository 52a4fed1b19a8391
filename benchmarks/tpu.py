"""Rounds of ``fc.train`` compiled for TPUs on a machine that has none, and what XLA says of the programs.

  make tpu                                                     # all rounds, v4, v5e and v6e, into benchmarks/README.md
  make tpu ARGS="--only=cnn,mlp --chips=v5e"                   # some of them, printed only
  make tpu ARGS="--only=cnn,mlp --write"                       # their rows of the table only
  make tpu ARGS="--only=cnn --chips=v5e --width=4 --profile"   # LLO profile, too: a minute or two for each
  python benchmarks/tpu.py --only=cnn --chips=v5e --keep=DIR   # leaves the programs' text in DIR

It needs ``pip install 'libtpu==0.0.42.*'`` beside JAX 0.10.2, and no TPU: only shapes go in. Two instruments:

  HLO   the sum of XLA's ``estimated_cycles`` over a local step: quick and coarse
  LLO   libtpu's static profile of the final instruction bundles of the same step: finer, 30 to 170 seconds

Both are estimates; compare them with themselves only. Cycles are of one client's step: those of a step of ``--width``
clients, by default as many as ``fc.train`` takes, divided by the width. "Copies" are the share of HLO cycles that only
move data from one layout to another. The share of peak is the model's arithmetic (3 times the forward pass) over what
the chip could do in as many LLO cycles, or HLO cycles where there is no profile. The profile aborts at a v5e's gathers,
so there it is of a program without them (on a v6e those of the MLP take 4,300 LLO cycles at width 1). Every program
runs in a process of its own with a time limit.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hlo
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_clip as fc
from fedjax_clip.core.resident import Resident
from fedjax_clip.training.width import on_accelerator

ENVIRONMENT = {  # or libtpu asks a metadata server who it is
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # beside another compilation
}
README = pathlib.Path(__file__).parent / "README.md"
MARKS = "<!-- make tpu -->", "<!-- end of make tpu -->"
CHIPS = ("v4", "v4:2x2x1", "v5e", "v5e:2x2", "v6e", "v6e:2x2")
SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}  # one chip is the first of these
PEAK = {"v4": 8 * 128**2 * 2, "v5e": 4 * 128**2 * 2, "v6e": 4 * 256**2 * 2}  # operations a cycle, bfloat16
PROFILED = {("cnn", "v5e"), ("cnn", "v6e"), ("mlp", "v5e"), ("mlp", "v6e")}
CLIPPED = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1))


class Case(NamedTuple):
    """A round, by shapes alone: ``make(loss, cohort size)`` is its algorithm."""

    make: Callable[[Callable, int], fc.extend.Algorithm]
    loss: Callable
    init: Callable
    examples: dict[str, np.ndarray]
    per_client: int = 100


def of_model(model: Any, loss: Callable, like: np.ndarray, examples: dict[str, np.ndarray], **more: Any) -> Case:
    """FedAvg with a clip, or another algorithm with the ``more`` of a case, on a Flax model."""
    more = {"make": lambda loss, cohort: fc.fedavg(loss, CLIPPED)} | more
    return Case(loss=loss(model), init=lambda key: model.init(key, like), examples=examples, **more)


def zeros(*shape: int, of: Any) -> np.ndarray:
    """An array that takes no memory."""
    return np.broadcast_to(np.zeros((), of), shape)


def cases() -> dict[str, Case]:
    """All rounds by name."""
    byte, integer, real = np.uint8, np.int32, np.float32
    text = {"text": zeros(50_000, 81, of=byte)}, zeros(1, 80, of=integer)
    emnist = {"x": zeros(814_000, 28, 28, 1, of=byte), "y": zeros(814_000, of=integer)}
    cifar = {"x": zeros(50_000, 32, 32, 3, of=byte), "y": zeros(50_000, of=integer)}
    task_m = {"x": zeros(60_000, 784, of=real), "y": zeros(60_000, of=integer)}
    digits = {"x": zeros(1600, 8, 8, of=real), "y": zeros(1600, of=integer)}
    classifier, characters = fc.tasks.classifier, fc.tasks.next_character

    def cnn(make: Callable[[Callable, int], fc.extend.Algorithm]) -> Case:
        return of_model(fc.models.CNN(62), classifier, zeros(1, 28, 28, 1, of=real), emnist, make=make)

    def private(loss: Callable, cohort: int) -> fc.extend.Algorithm:
        link = fc.uplink.chain(fc.uplink.quantile_clip(0.5, bits_noise=1.0), fc.uplink.gaussian(1.0))
        return fc.fedavg(loss, CLIPPED, uplink=link, reducer=fc.reduce.fixed_mean(cohort))

    def on_grid(loss: Callable, cohort: int) -> fc.extend.Algorithm:
        link = fc.uplink.chain(fc.uplink.clip_by_global_norm(1.0), fc.uplink.integer_grid())
        return fc.fedavg(loss, CLIPPED, uplink=link, reducer=fc.reduce.modular_sum(cohort))

    def sparse(loss: Callable, cohort: int) -> fc.extend.Algorithm:
        return fc.fedavg(loss, CLIPPED, uplink=fc.uplink.error_feedback(fc.compression.top_k(0.01)))

    return {
        "digits": of_model(fc.models.MLP((128,), 10), classifier, zeros(1, 8, 8, of=real), digits),
        "mlp": of_model(fc.models.MLP((200, 200), 10), classifier, zeros(1, 784, of=real), task_m, per_client=60),
        "cnn": cnn(lambda loss, cohort: fc.fedavg(loss, CLIPPED)),
        "resnet": of_model(fc.models.ResNet(10), classifier, zeros(1, 32, 32, 3, of=real), cifar),
        "lstm": of_model(fc.models.CharLSTM(128), characters, text[1], text[0]),
        "transformer": of_model(fc.models.Transformer(128), characters, text[1], text[0]),
        "scaffold": cnn(lambda loss, cohort: fc.scaffold(loss, CLIPPED)),
        "gaussian": cnn(private),
        "grid": cnn(on_grid),
        "median": cnn(lambda loss, cohort: fc.fedavg(loss, CLIPPED, reducer=fc.reduce.median())),
        "top_k": cnn(sparse),
    }


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["like"])
@dataclasses.dataclass(frozen=True)
class Ungathered(Resident):
    """The first examples in place of those asked for: libtpu's profile aborts at a gather of a v5e."""

    def __getitem__(self, index: Any) -> Any:
        """As many examples as ``index`` has numbers, from one slice, which depends on ``index`` lest it be constant."""

        def take(x: Any, like: Any) -> Any:
            taken = x[: index.size].reshape(*index.shape, -1) if like.shape else x.reshape(-1)[: index.size]
            taken = jnp.where(index.reshape(index.shape + (1,) * len(like.shape[:1])) < 0, 0, taken)
            held = (taken.dtype, like.dtype) == (np.int32, np.float32)
            taken = jax.lax.bitcast_convert_type(taken, like.dtype) if held else taken
            return (taken[..., : math.prod(like.shape)] if like.shape else taken).reshape(index.shape + like.shape)

        rows, treedef = jax.tree.flatten(self.rows)
        return jax.tree.unflatten(treedef, [take(x, like) for x, like in zip(rows, self.like, strict=True)])


def without_gathers() -> None:
    """Has this process trace no gathers: the first row for any row, and sums over the classes for a label's logit."""

    def take_along_axis(x: Any, index: Any, axis: int) -> Any:
        classes = jnp.arange(x.shape[axis]).reshape([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])
        return jnp.sum(jnp.where(classes == index, x, 0), axis, keepdims=True)

    def dynamic_index_in_dim(x: Any, index: Any, axis: int = 0, keepdims: bool = True) -> Any:
        first = jnp.asarray(x)[:1] if keepdims else jnp.asarray(x)[0]
        return jnp.where(index < 0, jnp.zeros_like(first), first)

    jnp.take_along_axis, jax.lax.dynamic_index_in_dim = take_along_axis, dynamic_index_in_dim


def lowered(case: Case, devices: Sequence[Any], width: int, rounds: int = 4, gathers: bool = True) -> Any:
    """What ``fc.train`` sends to these devices, in cohorts of two chunks a device; nothing is computed."""
    size = next(iter(case.examples.values())).shape[0]
    data = fc.FederatedData(case.examples, np.append(np.arange(0, size, case.per_client), size))
    cohort = 2 * len(devices) * width
    algorithm = case.make(case.loss, cohort)
    ids = [np.arange(cohort) % data.num_clients] * rounds
    options: dict[str, Any] = {"num_devices": len(devices), "width": width, "population": ()}
    planned = fc.extend.plan_rounds(data, ids, fc.extend.LocalWork(20), seed=0, first_round=0, **options)

    def shapes(*lead: int) -> Callable[[Any], Any]:
        return lambda x: jax.ShapeDtypeStruct((*lead, *np.shape(x)), x.dtype)

    params = jax.eval_shape(case.init, jax.random.key(0))
    kept = jax.eval_shape(algorithm.init_client, params)
    rows = jax.eval_shape(lambda x: Resident.of(x, devices[0].platform), data.examples)
    rows = rows if gathers else Ungathered(rows.rows, rows.like)
    on_each = shapes(len(devices))
    state = jax.tree.map(shapes(*planned.ids.shape), kept)
    cohorts = dataclasses.replace(planned, state=state, population=jax.tree.map(on_each, rows))
    server = jax.tree.map(on_each, jax.eval_shape(algorithm.init, params))
    step = fc.extend.placement.pmap_rounds(algorithm, tuple(devices))
    return step.lower(server, cohorts, jax.eval_shape(lambda: jax.random.key(0)), rounds)


def forward_flops(case: Case) -> float:
    """Multiplications and additions of the model's products on a batch of 20, loops of known length unrolled."""
    batch = {k: jax.ShapeDtypeStruct((20, *x.shape[1:]), x.dtype) for k, x in case.examples.items()}
    params = jax.eval_shape(case.init, jax.random.key(0))
    return _flops(jax.make_jaxpr(lambda p, b: case.loss(p, b, None))(params, batch).jaxpr)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * out.size * np.prod([equation.invars[0].aval.shape[d] for d in contracted])
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * out.size * kernel.size / outputs
        counts = list(map(_flops, jax.extend.core.jaxprs_in_params(equation.params)))
        # Branches are the platforms' forms of one layer: the model's own arithmetic is the least of them.
        inside = min(counts) if equation.primitive.name == "cond" else sum(counts)
        total += equation.params.get("length", 1) * inside
    return total


def measure(name: str, chip: str, width: int, profiles: str | None, keep: str | None) -> dict[str, Any]:
    """Compiles one round for one chip or slice; the figures of its row."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=SMALLEST.get(chip, chip)).devices
    case, began = cases()[name], time.perf_counter()
    if not (gathers := not (profiles and chip.startswith("v5e"))):
        without_gathers()
    params = jax.tree.map(lambda x: zeros(*x.shape, of=x.dtype), jax.eval_shape(case.init, jax.random.key(0)))
    width = width or on_accelerator(devices[0], params)
    compiled = lowered(case, devices[:1] if chip in SMALLEST else devices, width, gathers=gathers).compile()
    seconds, memory, text = time.perf_counter() - began, compiled.memory_analysis(), compiled.as_text()
    program = hlo.Program(text)
    step = program.step()
    if keep:
        pathlib.Path(keep).mkdir(parents=True, exist_ok=True)
        (pathlib.Path(keep) / f"{name}_{chip.replace(':', '_')}_{width}.txt").write_text(text)
    if profiles:
        return {"llo": program.cycles(step, llo_profile(pathlib.Path(profiles))) / width}
    return {
        "round": name,
        "chip": chip,
        "width": width,
        "seconds": seconds,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "hlo": program.cycles(step) / width,
        "copies": program.copies(step) / max(1, program.cycles(step)),
        "largest": program.largest_copy(),
        "made": program.largest_in_loops(),
        "flops": 3 * forward_flops(case),
    }


def llo_profile(directory: pathlib.Path) -> dict[str, int]:
    """Cycles of each instruction that libtpu profiled."""
    found = {}
    for file in directory.iterdir():
        text = file.read_text(errors="replace")
        name, cycles = re.search(r'hlo_op_name: "([^"]*)"', text), re.search(r"estimated_cycles: (\d+)", text)
        if name:
            found[name[1]] = int(cycles[1]) if cycles else 0
    return found


def row_of(name: str, chip: str, arguments: argparse.Namespace, profile: bool) -> dict[str, Any]:
    """The figures of a row, from one process or two; with an ``error`` where the first fails."""
    row = in_process(name, chip, arguments)
    if "error" not in row and profile:
        row |= {k: v for k, v in in_process(name, chip, arguments, profile=True).items() if k == "llo"}
    return row


def in_process(name: str, chip: str, arguments: argparse.Namespace, profile: bool = False) -> dict[str, Any]:
    """``measure`` in a process of its own, which ends after ``--seconds``; an ``error`` where it fails."""
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | ENVIRONMENT
        if profile:
            flags = f"--xla_tpu_check_llo_types=false --xla_jf_dump_static_llo_profile_to={directory}"
            environment["LIBTPU_INIT_ARGS"] = flags
        command = [sys.executable, __file__, f"--child={name}", f"--chips={chip}", f"--width={arguments.width}"]
        command += [f"--profiles={directory}"] * profile + [f"--keep={arguments.keep}"] * bool(arguments.keep)
        which = {"round": name, "chip": chip}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.seconds, env=environment)
        except subprocess.TimeoutExpired:
            return which | {"error": f"not in {arguments.seconds} s"}
        if done.returncode:
            return which | {"error": ([x for x in done.stderr.splitlines() if "Error" in x] or ["it failed"])[-1][:200]}
        return json.loads(done.stdout.splitlines()[-1])


COLUMNS = "round", "chips", "width", "compile, s", "arguments, MiB", "temporaries, MiB"
COLUMNS += "HLO cycles", "LLO cycles", "copies", "peak", "largest copy in a loop, MiB"
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in row:
        return f"| {row['round']} | {row['chip']} | | {row['error']} |" + " |" * (len(COLUMNS) - 4)
    mib = {k: f"{row[k] / 2**20:,.1f}" for k in ("arguments", "temporaries", "largest")}
    peak = row["flops"] / (row.get("llo") or row["hlo"]) / PEAK[row["chip"].split(":")[0]]
    llo = f"{row['llo']:,.0f}" if "llo" in row else ""
    cells = [
        row["round"],
        row["chip"],
        str(row["width"]),
        f"{row['seconds']:.0f}",
        mib["arguments"],
        mib["temporaries"],
    ]
    cells += [f"{row['hlo']:,.0f}", llo, f"{row['copies']:.0%}", f"{peak:.0%}", mib["largest"]]
    return f"| {' | '.join(cells)} |"


def write(row: str) -> None:
    """Puts a row between the marks of ``benchmarks/README.md``, in place of the one of its round and chips."""
    before, rest = README.read_text().split(MARKS[0])
    table, after = rest.split(MARKS[1])
    of_same = row.split("|")[1:3]
    rows = [row if old.split("|")[1:3] == of_same else old for old in table.strip().splitlines()[2:]]
    rows += [row] * (row not in rows)
    README.write_text("\n".join([before + MARKS[0], HEAD, *rows, MARKS[1] + after]))


def main() -> None:
    """Compiles what the flags ask for, prints a table, and writes each row down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rounds by name, joined by commas; by default all")
    parser.add_argument("--chips", default=",".join(CHIPS), help="v4, v5e, v6e: one chip; v5e:2x2, v5e:2x4 ...: slices")
    parser.add_argument("--width", type=int, default=0, help="clients trained at once; by default as fc.train")
    parser.add_argument("--profile", action="store_true", help="take the LLO profile of all rounds, not of a few")
    parser.add_argument("--seconds", type=int, default=600, help="the longest that one compilation may take")
    parser.add_argument("--write", action="store_true", help="put each row into benchmarks/README.md; always for all")
    parser.add_argument("--keep", help="a directory for the text of the compiled programs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--profiles", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        row = measure(arguments.child, arguments.chips, arguments.width, arguments.profiles, arguments.keep)
        print(json.dumps(row))
        return
    names, chips = list(cases()), arguments.chips.split(",")
    only = arguments.only.split(",") if arguments.only else names
    if unknown := set(only) - set(names):
        parser.error(f"--only: there is no round {sorted(unknown)[0]!r}; there are {', '.join(names)}")
    if unknown := {chip for chip in chips if chip.split(":")[0] not in PEAK}:
        parser.error(f"--chips: {sorted(unknown)[0]!r} is none of {', '.join(PEAK)}")
    if importlib.util.find_spec("libtpu") is None:
        parser.error("libtpu is missing: make tpu installs it, or pip install 'libtpu==0.0.42.*'")
    whole = not arguments.only and chips == list(CHIPS) and not arguments.width
    print(HEAD, flush=True)
    for name in only:
        for chip in chips:
            profile = arguments.profile or ((whole or arguments.write) and (name, chip) in PROFILED)
            row = line(row_of(name, chip, arguments, profile))
            print(row, flush=True)
            if whole or arguments.write:
                write(row)


if __name__ == "__main__":
    main()
