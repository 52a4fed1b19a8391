"""Ctrl-C that waits for a moment at which nothing is half done."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def held_back(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Holds the first Ctrl-C back: the block asks whether there was one. A second one ends it at once.

    A program that handles SIGINT itself goes on doing so, and so do threads other than the main one, where Python
    delivers no signals. What was held back and not asked for is raised when the block ends.

    Args:
      wanted: else nothing is held back.

    Example:
      >>> with held_back(True) as interrupted:
      ...   for round in range(3):
      ...     if interrupted():
      ...       break
    """
    came = False

    def handle(number: int, frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    main = threading.current_thread() is threading.main_thread()
    if not (wanted and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
