"""Trains every algorithm, link and reducer of the registry in several processes, and compares with one process.

  python benchmarks/processes.py                        # 2 and 4 processes of 2 devices, against 4 and 8 devices of one
  python benchmarks/processes.py --processes=2 --only=uplink/
  python benchmarks/processes.py --exact                # with reduce.exact_mean, to the last bit

The cases are those of ``same_bits_cases.py``, eight rounds each, a few in a launch. Each difference, the largest
between final parameters, goes to ``processes.json``, and a case that stands there is not run again: without the file
all are. XLA compiles in haste unless ``--optimised`` asks for the programs that users run.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from same_bits import QUICK
from same_bits_cases import CASES, write_data

ROOT = pathlib.Path(__file__).resolve().parents[1]
KINDS = ("algorithm", "uplink", "mechanism", "downlink", "reducer")
AVERAGED = ("algorithm", "uplink", "downlink")  # kinds whose reducer is free
ROUNDS, DEVICES, LIMIT = 8, 2, 1e-6
TOGETHER = 8  # cases in a launch
RECORD = pathlib.Path(__file__).with_suffix(".json")
FAILED = "failed"  # what stands in place of parameters, with the reason


def cases(exact: bool, only: str) -> dict[str, list[str]]:
    """The flags of each case."""
    kinds = AVERAGED if exact else KINDS
    found = {name: case["lines"][0] for name, case in CASES.items() if name.split("/")[0] in kinds and only in name}
    return {f"exact {name}": exactly(flags) for name, flags in found.items()} if exact else found


def exactly(flags: list[str]) -> list[str]:
    """The flags with an exact mean. One of fixed width, since another width is another program."""
    noise = any(word in flag for flag in flags for word in ("gaussian", "integer_grid", "skellam"))
    return [*flags, f"--reducer=exact_mean({'denominator=4' * noise})", "--clients_per_chunk=1"]


def work(todo: pathlib.Path, out: pathlib.Path, several: bool) -> None:
    """Trains the cases of a file, in this process and in those that were launched with it."""
    sys.path.insert(0, str(ROOT))
    import gc

    import jax
    from absl import flags

    from experiments.config import binary
    from experiments.config import problem as flagged

    assert flagged.FLAGS is flags.FLAGS  # the import defines the flags
    binary.configure_jax(None, "auto" if several else None)
    for name, line in json.loads(todo.read_text()).items():
        flags.FLAGS.unparse_flags()
        for flag in flags.FLAGS:
            flags.FLAGS[flag].unparse()
        flags.FLAGS(["processes.py", *line, f"--rounds={ROUNDS}"])
        if jax.process_index() == 0:
            write(out, name, {FAILED: np.array("the process died")})
        arrays = train()
        if jax.process_index() == 0:
            write(out, name, arrays)
        del arrays
        gc.collect()
        jax.clear_caches()  # or XLA has as many memory mappings as Linux allows


def train() -> dict[str, np.ndarray]:
    """The final parameters of the flags' run, or why there are none."""
    import jax
    import numpy as np
    from absl.flags import FLAGS

    import fedjax_clip as fc
    from experiments.config import problem
    from fedjax_clip.core import tree

    try:
        asked = problem.read()
        result = fc.train(
            problem.build_algorithm(asked.task, asked.uplink, asked.cohort_size),
            asked.task.data,
            problem.initial(asked.task, FLAGS.seed),
            rounds=ROUNDS,
            sampler=asked.sampler,
            **problem.local_work(),
            seed=FLAGS.seed,
            devices=problem.devices(),
            clients_per_chunk=FLAGS.clients_per_chunk,
            rounds_per_dispatch=FLAGS.rounds_per_dispatch,
        )
    except fc.InvalidInput as error:
        return {FAILED: np.array(str(error))}
    return {name: np.asarray(x) for name, x in tree.flatten_with_names(jax.device_get(result.params)).items()}


def write(out: pathlib.Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    np.savez(out / f"{name.replace('/', '.')}.npz", **arrays)


def read(out: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    with np.load(out / f"{name.replace('/', '.')}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def run(
    keep: pathlib.Path, wanted: dict[str, list[str]], processes: int, devices: int, optimised: bool
) -> pathlib.Path:
    """Trains what is missing of the cases by so many processes; returns the directory of their parameters."""
    out = keep / f"{processes}x{devices}"
    out.mkdir(exist_ok=True)
    data = keep / "data"
    if not data.exists():
        data.mkdir()
        write_data(data)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    if not optimised:
        environment["XLA_FLAGS"] = " ".join(QUICK)
    worker = [sys.executable, str(pathlib.Path(__file__).resolve()), "--worker", str(out)]
    launch = [sys.executable, "-m", "experiments.launch", f"--processes={processes}", f"--devices={devices}", "--"]
    while todo := {
        name: flags for name, flags in wanted.items() if not (out / f"{name.replace('/', '.')}.npz").exists()
    }:
        (out / "todo.json").write_text(json.dumps(todo))
        began = time.perf_counter()
        several = ["--several"] if processes > 1 else []
        code = subprocess.run([*(launch if several else []), *worker, *several], env=environment, cwd=data).returncode
        done = sum((out / f"{name.replace('/', '.')}.npz").exists() for name in todo)
        print(
            f"{processes} processes of {devices} devices: {done} cases in {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        if code and not done:
            sys.exit(f"no case could be trained: exit code {code}")
    return out


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float | str:
    """The largest difference of parameters, or in words what differs besides."""
    if FAILED in one or FAILED in other:
        told = [str(x[FAILED]) if FAILED in x else "" for x in (one, other)]
        return "both refuse" if all(told) else f"only {'several' if told[1] else 'one'}: {told[0] or told[1]}"
    if one.keys() != other.keys():
        return "other parameters"
    return max(float(np.max(np.abs(one[name] - other[name]), initial=0)) for name in one)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="2,4", help="How many, 2 devices each.")
    parser.add_argument("--only", default="", help="Only cases with this in their names.")
    parser.add_argument("--exact", action="store_true", help="With reduce.exact_mean; then nothing may differ.")
    parser.add_argument("--optimised", action="store_true", help="Compile as users do.")
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--several", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker / "todo.json", given.worker, given.several)
        return 0
    wanted, counts = cases(given.exact, given.only), [int(x) for x in given.processes.split(",")]
    column = "{} optimised" if given.optimised else "{}"
    found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for processes in counts:
        left = [name for name in wanted if column.format(processes) not in found.get(name, {})]
        for names in (left[i : i + TOGETHER] for i in range(0, len(left), TOGETHER)):
            told = compared({name: wanted[name] for name in names}, processes, given.optimised)
            for name, value in told.items():
                found.setdefault(name, {})[column.format(processes)] = value
            RECORD.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    print(f"| case | {' | '.join(f'{n} processes' for n in counts)} |\n|---|{'---|' * len(counts)}")
    shown = {name: [found[name][column.format(n)] for n in counts] for name in wanted}
    for name, values in shown.items():
        print(f"| {name} | {' | '.join(f'{x:.1e}' if isinstance(x, float) else x for x in values)} |")
    values = [x for row in shown.values() for x in row]
    good = [x == "both refuse" or (isinstance(x, float) and x <= (0.0 if given.exact else LIMIT)) for x in values]
    largest = max((x for x in values if isinstance(x, float)), default=0.0)
    refused = values.count("both refuse")
    print(
        f"\n{len(shown)} cases: {sum(good) - refused} of {len(good) - refused} comparisons within "
        f"{0.0 if given.exact else LIMIT:g}, largest {largest:.1e}; {refused} refused by both"
    )
    return 0 if all(good) else 1


def compared(wanted: dict[str, list[str]], processes: int, optimised: bool) -> dict[str, float | str]:
    """The difference of each case between so many processes and one."""
    with tempfile.TemporaryDirectory() as directory:
        train = functools.partial(run, pathlib.Path(directory), wanted, optimised=optimised)
        alone = train(processes=1, devices=processes * DEVICES)
        together = train(processes=processes, devices=DEVICES)
        return {name: difference(read(alone, name), read(together, name)) for name in wanted}


if __name__ == "__main__":
    sys.exit(main())
