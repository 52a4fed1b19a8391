"""Shared code of the binaries: flags that fail with one sentence, and a Ctrl-C that saves."""

import io
import os
import pathlib
import re
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NoReturn

from absl import app, flags, logging

from experiments.config import distributed, outside
from fedjax_clip.core import files
from fedjax_clip.core.types import InvalidInput

MOST_FLAGS = 2**20  # bytes of a flag file
MOST_DEVICES = 128  # of a CPU: 300 XLA devices deadlock


def run(
    main: Callable[..., None],
    doc: str,
    notes: Callable[[], str] = lambda: "",
    operands: bool = False,
    without: Collection[str] = (),
) -> NoReturn:
    """Runs ``main()`` under absl; bad input ends in one sentence on stderr and exit code 2.

    Args:
      main: called once the flags are read.
      doc: the beginning of ``--help``.
      notes: the end of ``--help``.
      operands: whether ``main`` takes arguments besides flags; otherwise they are refused.
      without: flags of imported modules without an effect here: refused, and left out of ``--help``.
    """

    def parse(argv: list[str]) -> list[str]:
        if {"--help", "-help", "-h", "--h"} & set(argv):  # absl's own --help exits with 1
            print(f"{doc.strip()}\n\nFlags:\n{_flags_help(without)}\n\n{notes()}".rstrip())
            sys.exit(0)
        argv = [argv[0], *_expanded(argv[1:])]
        for name in filter(None, map(_foreign, argv[1:])):
            _fail(f"--{name} is no flag of this program: see --help.")
        try:
            rest = flags.FLAGS(argv)
        except (flags.Error, ValueError) as error:
            _fail(_reworded(" ".join(str(error).removeprefix("ERROR:: ").split())))
        if len(rest) > 1 and not operands:
            _fail(f"unexpected argument {rest[1]!r}: flags are written --name=value.")
        for name in without:
            if flags.FLAGS[name].present:
                _fail(f"--{name} has no effect here: leave it out.")
        logging.set_verbosity(logging.FATAL)  # libraries log errors that the exception repeats
        return rest

    def guarded(argv: list[str]) -> None:
        warnings.formatwarning = lambda message, *place, **line: f"warning: {message}\n"  # no line of code
        try:
            main(*argv[1:])
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("\nInterrupted before the first round was done; nothing was lost.", file=sys.stderr)
            distributed.leave(130)
        except BrokenPipeError:
            raise
        except Exception as error:
            if distributed.lost(error):
                print(f"error: {distributed.LOST}", file=distributed.stderr())
                distributed.leave(1)
            if (sentence := _sentence(error)) is not None:
                _fail(sentence)
            if distributed.alone():
                raise
            traceback.print_exc(file=distributed.stderr())
            distributed.leave(1)

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see experiments/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # shows file names that are not UTF-8, in place of an error
            stream.reconfigure(errors="backslashreplace")
    try:
        app.run(guarded, flags_parser=parse)
    except BrokenPipeError:  # the reader has closed the pipe, as head does
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python reports an error when it flushes
        sys.exit(128 + signal.SIGPIPE)
    raise AssertionError("app.run exits")


class Stopping:
    """Turns SIGINT and SIGTERM into a flag that the driver checks after each round; a second Ctrl-C ends at once.

    Args:
      told: whether other processes are told, and tell this one, where no driver makes them agree.
    """

    def __init__(self, told: bool = False) -> None:
        self.signal: int | None = None
        self.told = told and not distributed.alone()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        if self.told:
            self.signal = distributed.stopped(self.signal)
        return self.signal is not None

    def leave(self) -> None:
        """Ends a stopped benchmark with its signal's exit code; does nothing otherwise."""
        if self.signal:
            print("Stopped; the report has what was done, and the same command goes on from there.")
            sys.exit(128 + self.signal)

    def _handle(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


def configure_jax(cpu_devices: int | None, join: str | None = None) -> None:
    """Sets the number of XLA devices on a CPU (by default one for each core), and caches compiled programs.

    With ``join``, the value of ``--distributed``, this process becomes one of several (``distributed.join``).

    The cache is in ``$FEDJAX_CLIP_CACHE``, or ``~/.cache/fedjax_clip``. Call this before JAX computes anything. JAX's
    own environment variables take precedence: ``$JAX_COMPILATION_CACHE_DIR``, and ``$JAX_NUM_CPU_DEVICES`` unless
    ``cpu_devices`` is given. Only ``$JAX_TRANSFER_GUARD`` is overridden, because a binary's transfers are intended. XLA
    aborts if one CPU device waits 40 seconds for another, as it may with clients of unequal size, or half an hour for
    another process. Here it waits a day, unless ``$XLA_FLAGS`` sets another limit.

    Raises:
      InvalidInput: no device of the platforms that ``$JAX_PLATFORMS`` names, or other processes cannot be joined.
    """
    import jax

    waits = "call_terminate_timeout", "call_warn_stuck_timeout", "timeout"  # the last one for other processes
    patience = [f"--xla_cpu_collective_{name}_seconds={24 * 3600}" for name in waits]
    if jax.__version_info__ < (0, 13):  # an unknown flag would end the process
        os.environ["XLA_FLAGS"] = " ".join([*patience, os.environ.get("XLA_FLAGS", "")])  # the last setting counts
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cache = pathlib.Path(os.environ.get("FEDJAX_CLIP_CACHE") or "~/.cache/fedjax_clip").expanduser()
    defaults = {
        "jax_num_cpu_devices": min(cores or 1, MOST_DEVICES),
        "jax_compilation_cache_dir": str(cache / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    for name, value in defaults.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    if cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    jax.config.update("jax_transfer_guard", "allow")
    distributed.join(join)
    try:
        jax.local_devices()
    except Exception as error:  # JAX raises various types, for cuda an AssertionError without a message
        raise InvalidInput(
            f"JAX finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}: leave it unset, or "
            "install what the device needs, such as pip install 'fedjax_clip[cuda]'."
        ) from error
    distributed.silence()


def _flags_help(without: Collection[str]) -> str:
    """The project's flags in the order of their definition, each with its default."""
    modules = flags.FLAGS.flags_by_module_dict()
    workdir = str(flags.FLAGS.find_module_defining_flag("workdir"))
    project = workdir, outside.__name__, distributed.__name__, sys.argv[0]
    own = [f for name in dict.fromkeys(project) for f in modules.get(name, []) if f.name not in without]
    rows = [
        (f"  --{f.name}" + ("" if f.default in (None, []) else f"={f.default}"), (f.help or "").split(";\n")[0])
        for f in own
    ]
    indent = " " * 23
    return "\n".join(
        textwrap.fill(f"{head:<22} {text}" if len(head) < 23 else f"{head}  {text}", 110, subsequent_indent=indent)
        for head, text in rows
    )


def _expanded(arguments: Sequence[str], within: tuple[str, ...] = ()) -> Iterator[str]:
    """The arguments with each ``--flagfile`` replaced by the lines of its file, recursively, in place of absl."""
    left = iter(arguments)
    for argument in left:
        if found := re.fullmatch(r"--?flagfile(=(.*))?", argument, re.DOTALL):
            name = (found[2] if found[1] else next(left, "")).strip()
            if name in within:
                _fail(f"--flagfile={name} names itself, by way of {' and '.join(within)}.")
            yield from _expanded(_flag_lines(name), (*within, name))
        elif within and re.match(r"--?import(=|$)", argument):
            _fail(f"--flagfile={within[-1]} has --import, which runs code: write it on the command line.")
        else:
            yield argument


def _flag_lines(name: str) -> list[str]:
    """The flags in a file, one on each line; empty lines and lines that begin with ``#`` are skipped."""
    path = files.expanded(name)
    try:
        if path.exists() and not path.is_file():
            _fail(f"--flagfile={name} is no file.")
        if (size := path.stat().st_size) > MOST_FLAGS:
            _fail(f"--flagfile={name} has {size:,} bytes: that is no list of flags.")
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        _fail(f"--flagfile={name} cannot be read: {error.strerror}.")
    if "\0" in text:
        _fail(f"--flagfile={name} is not text.")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(("#", "//"))]


def _foreign(argument: str) -> str | None:
    """The name of a flag of absl itself. Those are refused: they run profilers and write files anywhere."""
    name = argument.lstrip("-").split("=")[0]
    for known in (name, name.removeprefix("no")) if argument.startswith("-") else ():
        if known == "undefok":  # accepts misspelt flags; absl stores it separately
            return known
        if known in flags.FLAGS:
            module = str(flags.FLAGS.find_module_defining_flag(known))
            return None if module.startswith(("experiments.", sys.argv[0])) else known
    return None


def _sentence(error: Exception) -> str | None:
    """What to say of an error; ``None`` for a fault of the program's, which shows its traceback."""
    if isinstance(error, InvalidInput):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: " * bool(error.filename) + f"{error.strerror or error}."
    if isinstance(error, (MemoryError, OverflowError)) or "RESOURCE_EXHAUSTED" in str(error):
        return _too_much(error)
    return outside.fault(error)


def _too_much(error: BaseException) -> str:
    detail = " ".join(str(error).split())[:200].rstrip(".")
    return f"this needs more memory than there is, or a number is too large{detail and f': {detail}'}."


def _reworded(complaint: str) -> str:
    """absl's message on a flag, without Python's wording for an invalid number."""
    found = re.fullmatch(r"flag --(\w+)=(.*): (invalid literal for int|could not convert string to float).*", complaint)
    return f"--{found[1]} must be a {'whole ' * ('int' in found[3])}number, not {found[2]}." if found else complaint


def _fail(sentence: str) -> NoReturn:
    """Ends with one sentence, which of several processes that fail alike only the first says."""
    if not distributed.follows() or not distributed.fail_together():
        print(f"error: {sentence}", file=distributed.stderr())
    distributed.leave(2)
