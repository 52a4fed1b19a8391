"""Shared code of the benchmarks' binaries: flags, start and stop."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags

from experiments.config import binary, outside
from fedjax_clip.core.types import InvalidInput

ShouldStop = Callable[[], bool]
OUTSIDE = re.compile(r"[^\W\d]\w*\.[^\W\d]")  # in a component: a function of ``--import``'s


class Names(flags.ArgumentParser):
    """Names joined by commas; one of ``--import``'s may have arguments, ``my_module.rule(1, b=2)``."""

    def parse(self, argument: Any) -> list[str]:
        return split(argument) if isinstance(argument, str) else list(argument)


def split(text: str) -> list[str]:
    """The parts of a text between the commas that are outside of brackets and quotes.

    Example:
      >>> split("celgc, my_module.rule(1, 'a,b')")
      ['celgc', "my_module.rule(1, 'a,b')"]
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += letter
        if quote or letter in "\"'":
            quote = "" if letter == quote else quote or letter
        else:
            depth += (letter in "([") - (letter in ")]")
    return [part.strip() for part in parts if part.strip()]


def define_names(name: str, default: Sequence[str] | None, text: str) -> None:
    """Defines a flag of names, among which may be functions of ``--import``'s."""
    flags.DEFINE(Names(), name, None if default is None else list(default), text)


def define_flags(workdir: str, quick: str) -> None:
    """Defines the shared flags; not on import, because other binaries have flags of the same names."""
    flags.DEFINE_string("workdir", workdir, "Where results and report are written.")
    flags.DEFINE_boolean("quick", False, f"{quick}: to see that it runs.")
    outside.define_flag()


def run(main: Callable[[flags.FlagValues, ShouldStop], Any], doc: str, describe: Callable[[], str]) -> NoReturn:
    """Runs ``main(flags, should_stop)`` on one device; a Ctrl-C lets it finish what it computes.

    Args:
      main: the benchmark.
      doc, describe: the beginning and the end of ``--help``.
    """

    def started() -> None:
        binary.configure_jax(1)
        outside.load()
        stopping = binary.Stopping()
        main(flags.FLAGS, stopping)
        stopping.leave()

    binary.run(started, doc, describe)


def check_names(flag: str, kind: str, names: Sequence[str], valid: Mapping[str, Any]) -> None:
    """Refuses a name that is not valid, and an empty list; a name of ``--import``'s, with a dot, is not looked at.

    Raises:
      InvalidInput: either; the sentence names the nearest valid name.
    """
    if not names:
        raise InvalidInput(f"{flag}: give at least one {kind} of {', '.join(valid)}.")
    for name in names:
        if name not in valid and not OUTSIDE.search(name):
            close = difflib.get_close_matches(name, valid, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidInput(f"{flag}: unknown {kind} {name!r}{hint} (valid: {', '.join(valid)}).")
