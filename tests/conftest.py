"""The tests run on one host device, except those in tests/laws/devices, which test_devices.py starts with eight."""

import contextlib
import gc
import importlib.util
import os
import pathlib
import re
import signal
import sys
import zlib

import jax
import pytest
from absl import flags
from compiling import compile_quickly

compile_quickly()
gc.set_threshold(100_000)  # tracing allocates so much that a sixth of its time went into looking for garbage
DEVICES = int(os.environ.get("FEDJAX_CLIP_TEST_DEVICES", "1"))
jax.config.update("jax_num_cpu_devices", DEVICES)
collect_ignore = [] if DEVICES > 1 else ["laws/devices"]


def pytest_addoption(parser):
    parser.addoption(
        "--laws-over",
        metavar="MODULE.NAME",
        help="Run tests/laws over algorithms, links or clips of your own, joined by commas, in place of the library's.",
    )

    parser.addoption(
        "--sample",
        type=int,
        default=1,
        metavar="N",
        help="Run one test in N, at least one of each file: of an entry of the laws all, or none.",
    )


def pytest_configure(config):
    if names := config.getoption("--laws-over"):
        sys.path.insert(0, os.getcwd())
        import outside

        try:
            outside.only_outside(names)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None


def entry_of(nodeid):
    """The entry of the laws that a test is about, or nothing."""
    entry = re.search(r"[\[-]@(.+)\]$", nodeid)
    return entry and entry[1]


def sampled(items, one_in):
    """One test in so many, the same in every run."""
    chosen, files = set(), {}
    for item in items:
        files.setdefault(item.nodeid.partition("::")[0], []).append(item)
    for tests in files.values():
        lucky = [i for i in tests if zlib.crc32((entry_of(i.nodeid) or i.nodeid).encode()) % one_in == 0]
        chosen.update(lucky or tests[:1])
    return chosen


def pytest_collection_modifyitems(config, items):
    """Leaves the laws over what is from outside, if something is, and a sample, if one is asked for."""
    if (one_in := config.getoption("--sample")) > 1:
        few = sampled(items, one_in)
        config.hook.pytest_deselected(items=[item for item in items if item not in few])
        items[:] = [item for item in items if item in few]
    if names := config.getoption("--laws-over"):
        chosen = names.split(",")
        of = [
            getattr(item, "callspec", None) and str(item.callspec.params.get("name")).split(", ")[0] for item in items
        ]
        config.hook.pytest_deselected(items=[item for item, name in zip(items, of, strict=True) if name not in chosen])
        items[:] = [item for item, name in zip(items, of, strict=True) if name in chosen]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives one worker all tests of an ``@entry``, or else of a file, because they share compiled programs.

    pytest-xdist's own groups have no effect under pytest 9.2 (pytest-dev/pytest-xdist#1386).
    """
    from xdist.scheduler import LoadScopeScheduling

    class Sharing(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return entry_of(nodeid) or nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # or test_devices.py, the longest of one test, comes last
    return Sharing(config, log)


@contextlib.contextmanager
def counted_compilations():
    """A list that grows with every program compiled."""
    seen = []
    event = "/jax/core/compile/backend_compile_duration"

    def listen(name, seconds, **_):
        if name == event:
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def compilations():
    """How many programs are compiled."""
    with counted_compilations() as seen:
        yield seen


@pytest.fixture(scope="session")
def since_mappings_were_counted():
    with counted_compilations() as seen:
        yield seen


@pytest.fixture(autouse=True)
def few_mappings(since_mappings_were_counted):
    """Forgets compiled programs before Linux's limit of 65,530 memory mappings, at which XLA aborts the process.

    A program has about ten. To count them takes up to 20 ms, which is too much after every test.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if len(since_mappings_were_counted) > 100 and maps.exists():
        since_mappings_were_counted.clear()
        if maps.read_bytes().count(b"\n") > 30_000:
            jax.clear_caches()


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are built, but not rendered, which takes two thirds of a short run; returns the function that renders."""
    from experiments.config import rundir
    from fedjax_clip.core import files

    def save_picture(path, figure):
        with files.replacing(path) as file:
            file.write(b"\x89PNG")

    render = rundir.save_picture
    monkeypatch.setattr(rundir, "save_picture", save_picture)
    return render


@pytest.fixture
def binaries(tmp_path, monkeypatch, capsys, unrendered):
    """Runs a binary in this process, in an empty directory: ``("run", *flags) -> (exit code, stdout, stderr)``."""
    from experiments import audit, export, predict, report, run, sweep
    from experiments.config import binary, registry

    options = {
        "audit": (audit, {"notes": registry.describe, "without": ("distributed", "metric", "scores")}),
        "run": (run, {"notes": registry.describe}),
        "sweep": (sweep, {"notes": sweep.describe, "without": sweep.UNUSED}),
        "report": (report, {"operands": True}),
        "predict": (predict, {"operands": True}),
        "export": (export, {"operands": True}),
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(binary, "configure_jax", lambda *arguments: None)  # the number is fixed in a process

    def call(name, *arguments):
        module, how = options[name]
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(SystemExit) as exit, monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
            binary.run(module.main, module.__doc__, **how)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for flag in flags.FLAGS:
            flags.FLAGS[flag].unparse()
        return exit.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def kills():
    specification = importlib.util.spec_from_file_location(
        "kills", pathlib.Path(__file__).parents[1] / "benchmarks/kills.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
