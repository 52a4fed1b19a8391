"""The rounds that ``fc.train`` sends to a GPU, compiled for an H100 on a machine that has none: what XLA makes of them.

  make gpu-aot                                  # installs JAX's CUDA plugin into .venv-gpu, writes the page's table
  make gpu-aot ARGS="--only=CNN"                # rounds with this in their names, printed only
  make gpu-aot ARGS="--only=CNN --kernels"      # the kernels of a local step, one by one
  make gpu-aot ARGS="--width=10"                # clients that the device trains at once

A kernel is an instruction of the optimised program that the GPU starts: a fusion, a product, a convolution, a sort.
Kernels of a loop inside a step (an LSTM's) count as often as the loop turns. The bare step beside it gathers a batch,
takes the gradient, clips it by its norm and subtracts it, by JAX and optax alone, in a loop of known length. Every
client has the same number of examples. Autotuning is off, because it needs a device: which algorithm computes a product
is therefore not a device's choice. Nothing here is a time.
"""

import argparse
import collections
import dataclasses
import importlib.util
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}  # before JAX starts
os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies

import fedjax_clip as fc
from fedjax_clip.core.loops import Loops
from fedjax_clip.core.resident import Resident
from fedjax_clip.core.types import PerExampleLoss, PyTree

HERE = pathlib.Path(__file__).parent
README = HERE / "README.md"
MARKS = "<!-- make gpu-aot -->", "<!-- end of make gpu-aot -->"
ROUNDS, COHORT, STEPS = 4, 10, 5  # in a dispatch, in a round, of a client
CLIENT_TX = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1))
COPIES = {"copy", "copy-start"}
NOT_KERNELS = COPIES | {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "after-all", "opt-barrier"),
    *("while", "conditional", "call", "partition-id", "replica-id", "all-reduce-done", "all-gather-done", "async-done"),
}


class Model(NamedTuple):
    """A loss, its initial parameters as shapes, a population of shapes, and the batch size of a client's step."""

    loss: PerExampleLoss
    params: PyTree
    data: fc.FederatedData
    batch: int


class Program(NamedTuple):
    """What a compiled program is made of; loops by their depth: 1 rounds, 2 clients, 3 local steps."""

    kernels: dict[int, int]
    copies: dict[int, int]
    unknown: int
    mebibytes: float
    seconds: float
    text: str


def clients(of: dict[str, np.ndarray], batch: int) -> fc.FederatedData:
    """Clients of ``STEPS`` batches each."""
    n = len(next(iter(of.values())))
    return fc.FederatedData(of, np.arange(0, n + 1, STEPS * batch))


def images(module: Any, shape: tuple[int, ...], dtype: type, number: int, batch: int = 20) -> Model:
    """A classifier of images that are zeros."""
    data = clients({"x": np.zeros((number, *shape), dtype), "y": np.zeros(number, np.int32)}, batch)
    return Model(fc.tasks.classifier(module), parameters(module, jnp.zeros((1, *shape))), data, batch)


def text(module: Any, number: int = 10_000, batch: int = 4) -> Model:
    """A model of the next character of 80, on texts of zeros."""
    data = clients({"text": np.zeros((number, 81), np.uint8)}, batch)
    return Model(fc.tasks.next_character(module), parameters(module, jnp.zeros((1, 80), jnp.int32)), data, batch)


def parameters(module: Any, sample: jax.Array) -> PyTree:
    shapes = jax.eval_shape(module.init, jax.random.key(0), sample)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def mlp() -> Model:
    return images(fc.models.MLP((128,), 10), (8, 8, 1), np.float32, 15_000)


def cnn() -> Model:
    return images(fc.models.CNN(62), (28, 28, 1), np.uint8, 100_000)


def resnet() -> Model:
    return images(fc.models.ResNet(100), (24, 24, 3), np.uint8, 50_000)


def lstm() -> Model:
    return text(fc.models.CharLSTM(90))


def transformer() -> Model:
    return text(fc.models.Transformer(90))


def algorithms() -> dict[str, tuple[Callable[[], Model], Callable[[PerExampleLoss], fc.extend.Algorithm]]]:
    """The rounds of the table: a model, and the algorithm of its loss."""

    def fedavg(*links: fc.uplink.Uplink, reducer: fc.reduce.Reducer | None = None) -> Callable:
        options = {"uplink": fc.uplink.chain(*links)} if links else {}
        return lambda loss: fc.fedavg(loss, CLIENT_TX, reducer=reducer or fc.reduce.weighted_mean(), **options)

    fixed, clip = fc.reduce.fixed_mean(COHORT), fc.uplink.clip_by_global_norm(1.0)
    grid = fc.uplink.integer_grid(16), fc.reduce.modular_sum(COHORT)
    feedback = fc.uplink.error_feedback(fc.compression.top_k(0.01))
    return {
        "MLP of digits": (mlp, fedavg()),
        "EMNIST CNN, 100,000 images": (cnn, fedavg()),
        "ResNet-18": (resnet, fedavg()),
        "CharLSTM": (lstm, fedavg()),
        "Transformer": (transformer, fedavg()),
        "MLP, SCAFFOLD": (mlp, lambda loss: fc.scaffold(loss, CLIENT_TX)),
        "MLP, quantile clip and Gaussian": (
            mlp,
            fedavg(fc.uplink.quantile_clip(bits_noise=COHORT / 20), fc.uplink.gaussian(1.0), reducer=fixed),
        ),
        "MLP, integer grid": (mlp, fedavg(clip, grid[0], reducer=grid[1])),
        "MLP, median": (mlp, fedavg(reducer=fc.reduce.median())),
        "MLP, top-k with error feedback": (mlp, fedavg(feedback)),
    }


def compiled_rounds(of: Model, algorithm: fc.extend.Algorithm, device: jax.Device, width: int) -> Program:
    """The program of ``fc.train`` for a block of rounds; nothing but shapes is needed."""

    def shapes(*lead: int) -> Callable[[Any], Any]:
        return lambda x: jax.ShapeDtypeStruct((*lead, *np.shape(x)), x.dtype)

    planned = fc.extend.plan_rounds(
        of.data,
        [fc.data.sampling.uniform(COHORT * width).sample(of.data.sizes, 0, r) for r in range(ROUNDS)],
        fc.extend.LocalWork(of.batch),
        seed=0,
        first_round=0,
        width=width,
        population=(),
        loops=Loops(packed=True, buckets=(), whole=True),
    )
    state = jax.tree.map(shapes(*planned.ids.shape), jax.eval_shape(algorithm.init_client, of.params))
    population = jax.tree.map(shapes(1), Resident.of(of.data.examples, "gpu"))
    server = jax.tree.map(shapes(1), jax.eval_shape(algorithm.init, of.params))
    step = fc.extend.placement.pmap_rounds(algorithm, [device])
    cohorts = dataclasses.replace(planned, state=state, population=population)
    return compiled(lambda: step.lower(server, cohorts, jax.eval_shape(lambda: jax.random.key(0)), ROUNDS), 3)


def compiled_bare(of: Model, device: jax.Device) -> Program:
    """Local steps of one client by JAX and optax alone."""
    client_tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))

    def steps(params, examples, rows):
        def body(i, params):
            batch = jax.tree.map(lambda x: x[rows[i]], examples)
            gradient = jax.grad(lambda params: jnp.mean(of.loss(params, batch, None)[0]))(params)
            updates, _ = client_tx.update(gradient, client_tx.init(params), params)
            return optax.apply_updates(params, updates)

        return jax.lax.fori_loop(0, STEPS, body, params)

    here = jax.sharding.SingleDeviceSharding(device)
    function = jax.jit(steps, donate_argnums=0, in_shardings=here)
    rows = np.zeros((STEPS, of.batch), np.int32)
    return compiled(lambda: function.trace(of.params, of.data.examples, rows).lower(lowering_platforms=("cuda",)), 1)


def compiled(lower: Callable[[], Any], steps_at: int) -> Program:
    """Compiles, and reads the program's loops, of which those over local steps lie so deep."""
    began = time.perf_counter()
    program = lower().compile()
    seconds = time.perf_counter() - began
    parts = computations(program.as_text())
    loops = list(loops_of(parts, parts["ENTRY"], 1))
    kernels: dict[int, int] = {}
    copies: dict[int, int] = {}
    for depth, body, _ in loops:
        below = depth >= steps_at  # a round's and a client's kernels are those outside of the loops below
        kernels[depth] = max(kernels.get(depth, 0), count(parts, body, lambda op: op not in NOT_KERNELS, below))
        copies[depth] = max(copies.get(depth, 0), count(parts, body, COPIES.__contains__, below))
    unknown = sum(turns is None for _, _, turns in loops)
    mebibytes = program.memory_analysis().temp_size_in_bytes / 2**20
    return Program(kernels, copies, unknown, mebibytes, seconds, program.as_text())


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation of a program's text, and of its entry by the name ENTRY."""
    parts: dict[str, list[str]] = collections.defaultdict(list)
    name = ""
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = "ENTRY" if start[1] else start[2]
        elif " = " in line:
            parts[name].append(line)
    return parts


def opcode(line: str) -> str:
    """``add`` of ``%x = f32[2]{0} add(...)``; the type may be a tuple in parentheses."""
    found = re.search(r" = (?:\(.*?\)|\S+) ([a-z][\w\-]*)\(", line)
    return found[1] if found else ""


def called(line: str) -> list[str]:
    """The computations that a loop, a branch or a call runs, in its own stream of kernels."""
    named = re.findall(r"(?:body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
    listed = re.search(r"branch_computations=\{([^}]*)\}", line)
    return named + (re.findall(r"[\w.\-]+", listed[1]) if listed else [])


def turns_of(line: str) -> int | None:
    """How often a loop turns, if XLA knows."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    return int(found[1]) if found else None


def loops_of(parts: dict[str, list[str]], body: list[str], depth: int) -> Iterator[tuple[int, list[str], int | None]]:
    """``(depth, body, turns)`` of all loops below."""
    for line in body:
        if opcode(line) == "while":
            inside = parts[called(line)[0]]
            yield depth, inside, turns_of(line)
            yield from loops_of(parts, inside, depth + 1)
        elif opcode(line) in ("call", "conditional"):
            for name in called(line):
                yield from loops_of(parts, parts[name], depth)


def count(parts: dict[str, list[str]], body: list[str], counts: Callable[[str], bool], loops: bool) -> int:
    """Instructions that count in a body and in what it calls, those of loops in it once for each turn."""
    total = 0
    for line in body:
        op = opcode(line)
        if op in ("call", "conditional"):
            total += max((count(parts, parts[name], counts, loops) for name in called(line)), default=0)
        elif op == "while":
            total += (turns_of(line) or 1) * count(parts, parts[called(line)[0]], counts, loops) if loops else 0
        else:
            total += counts(op)
    return total


def kernels_of(program: Program) -> Iterator[str]:
    """The kernels of a local step: what each computes for, and its result."""
    parts = computations(program.text)
    for depth, body, _ in loops_of(parts, parts["ENTRY"], 1):
        for line in body if depth == 3 else ():
            if opcode(line) not in NOT_KERNELS - COPIES:
                name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
                purpose = re.search(r'op_name="([^"]*)"', line)
                shape = re.sub(r"\{[^}]*\}", "", rest.split(f" {opcode(line)}(")[0])
                yield f"{name:<40} {shape:<40} {purpose[1].rsplit('closed_call/', 1)[-1] if purpose else ''}"


COLUMNS = "round", "kernels a step", "of a bare step", "copies a step", "kernels a client", "copies a client"
COLUMNS += "loops of unknown length", "temporaries, MiB", "compile, s"
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def line_of(name: str, program: Program, bare: Program) -> str:
    """A row of the table."""
    cells = [
        name,
        program.kernels[3],
        bare.kernels[1],
        program.copies[3],
        program.kernels[2],
        program.copies[2],
        program.unknown,
    ]
    return f"| {' | '.join(map(str, cells))} | {program.mebibytes:.1f} | {program.seconds:.0f} |"


def main() -> None:
    """Compiles what the flags ask for, prints a table, and writes it down if it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the rounds with this in their names; by default all")
    parser.add_argument("--kernels", action="store_true", help="list the kernels of a local step, too")
    parser.add_argument("--width", type=int, default=1, help="clients that the device trains at once")
    arguments = parser.parse_args()
    chosen = {name: case for name, case in algorithms().items() if arguments.only in name}
    if not chosen:
        parser.error(f"--only: there is no round {arguments.only!r}; there are {'; '.join(algorithms())}")
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        parser.error("JAX's CUDA plugin is missing: make gpu-aot installs it, or pip install 'jax[cuda12]'")
    target = (HERE / "h100.txtpb").read_text()
    h100 = topologies.get_topology_desc("h100", "cuda", target_config=target, topology="1x1x1").devices[0]
    bare: dict[Callable, Program] = {}
    rows = []
    print(HEAD, flush=True)
    for name, (make, algorithm) in chosen.items():
        of = make()
        bare[make] = bare.get(make) or compiled_bare(of, h100)
        program = compiled_rounds(of, algorithm(of.loss), h100, arguments.width)
        rows.append(line_of(name, program, bare[make]))
        print(rows[-1], flush=True)
        if arguments.kernels:
            print(*kernels_of(program), sep="\n", flush=True)
    if not arguments.only and arguments.width == 1:
        before, rest = README.read_text().split(MARKS[0])
        README.write_text("\n".join([before + MARKS[0], HEAD, *rows, MARKS[1] + rest.split(MARKS[1])[1]]))


if __name__ == "__main__":
    main()
