"""The tests run on one host device, except those in tests/laws/devices, which test_devices.py starts with eight."""

import gc
import importlib.util
import os
import pathlib
import signal
import sys

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
        metavar="MODULE:NAME",
        help="Run tests/laws over algorithms, links or clips of your own, joined by commas, in place of the library's.",
    )


def pytest_configure(config):
    if names := config.getoption("--laws-over"):
        sys.path.insert(0, os.getcwd())
        import problems

        problems.only_outside(names)


@pytest.fixture(autouse=True)
def few_mappings():
    """Forgets compiled programs before Linux's limit of 65,530 memory mappings, at which XLA aborts the process."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def compilations():
    """How many programs are compiled."""
    seen = []
    event = "/jax/core/compile/backend_compile_duration"

    def listen(name, seconds, **_):
        if name == event:
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def binaries(tmp_path, monkeypatch, capsys):
    """Runs a binary in this process, in an empty directory: ``("run", *flags) -> (exit code, stdout, stderr)``."""
    from experiments import audit, report, run, sweep
    from experiments.config import binary, registry

    options = {
        "audit": (audit, {"notes": registry.describe}),
        "run": (run, {"notes": registry.describe}),
        "sweep": (sweep, {"notes": sweep.describe, "without": sweep.UNUSED}),
        "report": (report, {"operands": True}),
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(binary, "configure_jax", lambda count: None)  # the number is fixed in a process

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
