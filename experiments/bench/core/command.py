"""Shared code of the benchmarks' binaries: flags, start and stop."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags

from experiments.config import binary
from fedjax_clip.core.types import InvalidInput

ShouldStop = Callable[[], bool]


def define_flags(workdir: str, quick: str) -> None:
    """Defines the shared flags; not on import, because other binaries have flags of the same names."""
    flags.DEFINE_string("workdir", workdir, "Where results and report are written.")
    flags.DEFINE_boolean("quick", False, f"{quick}: to see that it runs.")


def run(main: Callable[[flags.FlagValues, ShouldStop], Any], doc: str, describe: Callable[[], str]) -> NoReturn:
    """Runs ``main(flags, should_stop)`` on one device; a Ctrl-C lets it finish what it computes.

    Args:
      main: the benchmark.
      doc, describe: the beginning and the end of ``--help``.
    """

    def started() -> None:
        binary.configure_jax(1)
        stopping = binary.Stopping()
        main(flags.FLAGS, stopping)
        stopping.leave()

    binary.run(started, doc, describe)


def check_names(flag: str, kind: str, names: Sequence[str], valid: Mapping[str, Any]) -> None:
    """Refuses a name that is not valid, and an empty list.

    Raises:
      InvalidInput: either; the sentence names the nearest valid name.
    """
    if not names:
        raise InvalidInput(f"{flag}: give at least one {kind} of {', '.join(valid)}.")
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidInput(f"{flag}: unknown {kind} {name!r}{hint} (valid: {', '.join(valid)}).")
