"""Proves that a refactoring changed nothing but places: short runs of all that the flags can name, and their bits.

  python benchmarks/same_bits.py record before.json                   # before the first move; killed, it goes on
  python benchmarks/same_bits.py compare before.json                  # after the last
  python benchmarks/same_bits.py compare before.json --only=uplink/   # the cases with this in their names

Each case is a command line of a binary, such as ``experiments.run``, in ``same_bits_cases.py``; nothing else of
the project is imported or named. Of a run directory are kept the SHA-256 of the final parameters, some of their values,
and the same of the metrics. XLA compiles in haste unless ``record --optimised`` asks for the programs that users run.
Bits depend on the machine and on the versions of JAX and Python: compare where you have recorded.
"""

import argparse
import contextlib
import functools
import gc
import hashlib
import importlib.util
import io
import json
import math
import os
import pathlib
import platform
import re
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any
from unittest import mock

import absl.flags
import matplotlib.figure
import numpy as np
from same_bits_cases import CASES, REFUSED, SAME, write_data

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEAVY = ("jax", "optax", "flax.linen", "orbax.checkpoint", "scipy.stats", "matplotlib.pyplot", "tensorboardX", "pandas")
QUICK = (  # XLA makes programs that run slowly, soon
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
)
PER_PROCESS = 30  # cases, before XLA has as many memory mappings as Linux allows
SHOWN = 32  # values kept of the parameters, evenly spaced
CLOCKS = {"seconds"}  # what a row says of the machine


def main() -> int:
    """Records or compares; 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--only", default="", help="Only the cases with this in their names.")
    parser.add_argument("--optimised", action="store_true", help="Record the programs that users run.")
    parser.add_argument("--keep", type=pathlib.Path, help="An empty directory, to keep the run directories in.")
    given = parser.parse_args()
    known = json.loads(given.file.read_text()) if given.what == "compare" or given.file.exists() else None
    optimised = known["about"]["xla"] == "optimised" if known else given.optimised
    names = [name for name in CASES if given.only in name]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    prepare(optimised)
    machine = about(optimised)
    if given.what == "record":
        known = known or {"about": machine, "cases": {}}
        if known["about"] != machine:
            parser.error(f"{given.file} was recorded with other versions: name another file")
        names = [name for name in names if not as_expected(name, known["cases"])]  # goes on where it was killed

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = given.keep.absolute() if given.keep else pathlib.Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        write_data(place)
        begun = time.perf_counter()
        for some in run_cases(names, place):
            found |= some
            print(f"\r{len(found)} of {len(names)} cases, {list(some)[-1]:<60}", end="", file=sys.stderr, flush=True)
            if given.what == "record":
                known["cases"] |= some
                beside = given.file.with_name(given.file.name + ".new")
                beside.write_text(json.dumps(known, indent=1) + "\n")
                beside.replace(given.file)
        print(f"\n{len(found)} cases in {time.perf_counter() - begun:.0f} s, of the library in {ROOT}")
        if not given.only and (names := not_covered(place)):
            print(f"  no case has {', '.join(names)}")

    if given.what == "record":
        return check(known["cases"])
    return max(check(found), compare(known, {"about": machine, "cases": found}))


def as_expected(name: str, cases: Mapping[str, Any]) -> bool:
    """Whether a case is there, and ran or was refused as it should."""
    return name in cases and cases[name]["exit"] == (2 if name in REFUSED else 0)


def check(cases: Mapping[str, Any]) -> int:
    """Prints what is wrong whatever was before; 1 if anything is."""
    failed = [name for name in cases if not as_expected(name, cases)]
    for name in failed:
        print(f"  FAILED {name}: exit code {cases[name]['exit']}: {cases[name].get('said', '')}")
    there = [(a, b) for a, b in SAME.items() if a in cases and b in cases]
    unequal = [(a, b) for a, b in there if not same(cases[a], cases[b], "params")]
    for first, second in unequal:
        print(f"  UNEQUAL {first} and {second} should end with the same parameters")
    return 1 if failed or unequal else 0


def prepare(optimised: bool) -> None:
    """Imports what is heavy and not ours, and makes the project of this clone importable from anywhere."""
    here = pathlib.Path(__file__).resolve().parent
    sys.path[:] = [str(ROOT), *(path for path in sys.path if pathlib.Path(path or ".").resolve() not in (here, ROOT))]
    os.environ["MPLBACKEND"] = "Agg"
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    if not optimised:
        quick = [*QUICK, *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else [])]
        os.environ["XLA_FLAGS"] = " ".join([*quick, os.environ.get("XLA_FLAGS", "")])
    for name in HEAVY:
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed; cases that need it fail", file=sys.stderr)
    matplotlib.figure.Figure.savefig = lambda *args, **kwargs: None  # pictures take longer than the rounds
    gc.set_threshold(100_000)


def run_cases(names: list[str], place: pathlib.Path) -> Iterator[dict[str, Any]]:
    """What the cases end with, ``{name: ...}``, some at a time: those of one process.

    A process has cases of one binary and one number of devices.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        groups.setdefault((CASES[name]["binary"], CASES[name]["devices"]), []).append(name)
    for (binary, devices), left in groups.items():
        while left:
            code = fork(functools.partial(work, left[:PER_PROCESS], f"experiments.{binary}", devices, place))
            some = dict(map(json.loads, (place / "done.jsonl").read_text().splitlines()))
            if code:  # it died in the middle of the next
                some[left[len(some)]] = {"exit": code, "said": "the process died"}
            yield some
            left = left[len(some) :]


def fork(act: Callable[[], None]) -> int:
    """Runs ``act`` in a process of its own, which ends with this one; its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise


def work(names: list[str], module: str, devices: int, place: pathlib.Path) -> None:
    """Runs cases one after the other, and appends what each ends with to ``done.jsonl``."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    os.chdir(place)
    sys.path.insert(1, str(place / "packages"))
    read = {"experiments.run": read_run, "experiments.sweep": read_sweep}.get(module, read_bench)
    with (place / "done.jsonl").open("w") as done:
        for name in names:
            case, workdir = CASES[name], place / "runs" / name
            for file, content in case["files"].items():
                workdir.mkdir(parents=True, exist_ok=True)
                (workdir / file).write_bytes(content)
                (workdir / file).chmod(0o600)
            for flags in case["lines"]:
                code, said = call(module, [*flags, f"--workdir={workdir}"])
                if code:
                    break
            result = (
                {"exit": code, "said": said.splitlines()[-1] if said else ""} if code else {"exit": 0, **read(workdir)}
            )
            done.write(json.dumps([name, result]) + "\n")
            done.flush()


def call(module: str, line: list[str]) -> tuple[int, str]:
    """``python -m module line`` in this process: its exit code and what it wrote."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    for name in list(absl.flags.FLAGS):
        if absl.flags.FLAGS.find_module_defining_flag(name) == spec.origin:  # as runpy has argv[0]
            delattr(absl.flags.FLAGS, name)  # the module runs again, and defines it again
        else:
            absl.flags.FLAGS[name].unparse()
    output, code = io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [module, *line]),
        mock.patch.dict(os.environ),  # a binary adds to XLA_FLAGS, on which compiled programs depend
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except Exception:
            code = 1
            traceback.print_exc()
    return code, output.getvalue().strip()


def read_run(workdir: pathlib.Path) -> dict[str, Any]:
    """The digests of a run's parameters, of its rows and of its clients' scores."""
    with np.load(workdir / "params.npz") as arrays:
        params = {name: arrays[name] for name in sorted(arrays.files)}
    digest = hashlib.sha256()
    for name, x in params.items():
        digest.update(f"{name} {x.dtype.str} {x.shape} ".encode() + np.ascontiguousarray(x).tobytes())
    flat = np.concatenate([x.ravel() for x in params.values()]).astype(np.float64)
    values = flat[:: max(1, math.ceil(flat.size / SHOWN))]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: x for name, x in sorted(row.items()) if name not in CLOCKS} for row in rows]
    found = {
        "params": {"sha256": digest.hexdigest(), "values": [float(np.linalg.norm(flat)), *values.tolist()]},
        "metrics": {"sha256": hashed(rows), "last": rows[-1]},
    }
    if (workdir / "clients.npz").exists():
        with np.load(workdir / "clients.npz") as arrays:
            found["clients"] = {"sha256": hashed({name: arrays[name].tolist() for name in sorted(arrays.files)})}
    return found


def read_sweep(workdir: pathlib.Path) -> dict[str, Any]:
    """The digests of a sweep's scores, which stand for the parameters, of all its metrics, and of its table."""
    trials = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    trials.sort(key=lambda trial: (trial["point"], trial["seed"], trial["fold"]))
    rows = [{name: x for name, x in sorted(trial["metrics"].items()) if name not in CLOCKS} for trial in trials]
    scores = [math.nan if x is None else x for row in rows for name, x in row.items() if name.startswith("eval/")]
    return {
        "params": {"sha256": hashed(scores), "values": scores},
        "metrics": {"sha256": hashed(rows), "last": rows[-1]},
        "table": {"sha256": hashed((workdir / "table.md").read_text())},
    }


def read_bench(workdir: pathlib.Path) -> dict[str, Any]:
    """The digest of a benchmark's entries but for times and for hashes of programs, in place of parameters."""
    entries = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    kept = [{k: x for k, x in entry.items() if k != "config" and not k.endswith("seconds")} for entry in entries]
    values = [float(x) for x in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", json.dumps(kept))]
    return {"params": {"sha256": hashed(kept), "values": values}}


def hashed(value: Any) -> str:
    """SHA-256 of JSON, whose floats are exact."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def same(first: Mapping[str, Any], second: Mapping[str, Any], part: str) -> bool:
    """Whether two cases have the same bits in a part, or both lack it."""
    return first.get(part, {}).get("sha256") == second.get(part, {}).get("sha256")


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Prints what differs; 1 if anything does."""
    for name, value in before["about"].items():
        if value != after["about"].get(name):
            print(f"  CAUTION: {name} was {value}, is {after['about'].get(name)}: bits may differ for that alone")
    old, new = before["cases"], after["cases"]
    both = [name for name in new if name in old]
    wrong = 0
    for name in both:
        was, now = old[name], new[name]
        parts = [part for part in ("metrics", "clients", "table") if not same(was, now, part)]
        if was["exit"] != now["exit"]:
            found = f"DIFFERS {name}: exit code {was['exit']} -> {now['exit']}: {now.get('said') or was.get('said')}"
        elif not same(was, now, "params"):
            found = f"DIFFERS {name}: parameters, by {relative(was['params']['values'], now['params']['values'])}"
        elif parts:
            found = f"differs in {' and '.join(parts)}, the parameters are equal: {name}{_metrics(was, now)}"
        else:
            continue
        wrong += 1
        print(f"  {found}")
    equal = sum(old[n]["exit"] == new[n]["exit"] and same(old[n], new[n], "params") for n in both)
    print(f"{len(both)} cases compared, {equal} with equal parameters, {len(both) - wrong} equal in all")
    if gone := [name for name in old if name not in CASES]:
        print(f"  recorded, and no case now: {', '.join(gone)}")
    if added := [name for name in new if name not in old]:
        print(f"  not recorded: {', '.join(added)}")
    return 1 if wrong or gone else 0


def relative(was: list[float], now: list[float]) -> str:
    """The largest difference of the values over the largest value."""
    if len(was) != len(now):
        return f"their number: {len(was)} -> {len(now)} values"
    a, b = np.array(was), np.array(now)
    scale = np.nanmax(np.abs(a), initial=0) or 1.0
    if np.any(np.isfinite(a) != np.isfinite(b)):
        return "values that are not finite"
    largest = np.nanmax(np.abs(a - b), initial=0) / scale
    return f"{largest:.1e} of the largest value" if largest else "nothing in the values kept: names, shapes or others"


def _metrics(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs in the last rows."""
    a, b = was.get("metrics", {}).get("last", {}), now.get("metrics", {}).get("last", {})
    named = [f"-{name}" for name in a if name not in b] + [f"+{name}" for name in b if name not in a]
    named += [f"{name} {a[name]!r} -> {b[name]!r}" for name in a if name in b and a[name] != b[name]]
    return f": {', '.join(named[:6])}" if named else ""


def not_covered(place: pathlib.Path) -> list[str]:
    """Names in ``--help`` that no case uses."""
    fork(lambda: (place / "help").write_text(call("experiments.run", ["--help"])[1]))
    listed = set(re.findall(r"^    (\w+)\(", (place / "help").read_text(), re.MULTILINE))
    if not listed:
        return ["what --help lists, which cannot be read"]
    text = "\n".join(flag for case in CASES.values() for line in case["lines"] for flag in line)
    return sorted(listed - set(re.findall(r"\w+", text)))


def about(optimised: bool) -> dict[str, str]:
    """What bits depend on besides the code."""
    packages = {name: version(name) for name in ("jax", "jaxlib", "numpy", "optax")}
    info = pathlib.Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    processor = f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores"
    xla = "optimised" if optimised else "quick"
    return {"python": platform.python_version(), **packages, "processor": processor, "xla": xla}


if __name__ == "__main__":
    sys.exit(main())
