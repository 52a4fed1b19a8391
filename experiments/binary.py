"""What every binary shares: flags that fail with one sentence, and a Ctrl-C that saves."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags

from fedjax_clip.typing import InvalidInput


def run(main: Callable[[], None]) -> NoReturn:
    """Runs ``main()`` under absl; bad input ends in one sentence on stderr and exit code 2."""

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except (flags.Error, OSError) as error:
            _fail(" ".join(str(error).split()))
        if flags.FLAGS["help"].value or flags.FLAGS["helpshort"].value:
            app.usage(shorthelp=True, writeto_stdout=True, detailed_error=None, exitcode=0)
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}: flags are written --name=value.")
        return rest

    def guarded(argv: list[str]) -> None:
        try:
            main()
        except InvalidInput as error:
            _fail(str(error))
        except KeyboardInterrupt:
            print("\nInterrupted before the first round was done; nothing was lost.", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=parse)
    raise AssertionError("app.run exits")


class Stopping:
    """Turns SIGINT and SIGTERM into a question that the driver asks after each round; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


def host_devices(count: int | None) -> None:
    """On a CPU, ``count`` XLA devices, or one a core; to be called before JAX computes anything."""
    import jax

    jax.config.update("jax_num_cpu_devices", count or len(os.sched_getaffinity(0)))


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
