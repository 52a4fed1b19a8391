"""For libraries whose training loop is theirs: it runs in a thread and waits between laps."""

import threading
from collections.abc import Callable


class Paused:
    """Runs ``train(first_round, after_round)`` until it is stopped.

    ``train`` calls ``after_round()``, which returns whether to stop, when a round (or a dispatch of several) is done
    and nothing is in flight; ``count`` must by then have been raised by the rounds done.
    """

    def __init__(self, train: Callable[[int, Callable[[], bool]], None]):
        self.train, self.thread, self.error = train, None, None
        self.count = self.goal = 0
        self.go, self.finished, self.stopping = threading.Event(), threading.Event(), False

    def run(self, rounds: int) -> None:
        """Returns when this many further rounds are done."""
        self.goal = self.count + rounds
        self.finished.clear()
        if self.thread is None:
            self.stopping = False
            self.thread = threading.Thread(target=self._main, args=(self.count,), daemon=True)
            self.thread.start()
        else:
            self.go.set()
        self.finished.wait()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Ends ``train``; the next ``run`` starts it again at the round that comes next."""
        if self.thread is not None:
            self.stopping = True
            self.go.set()
            self.thread.join()
            self.thread = None

    def _after_round(self) -> bool:
        if self.count >= self.goal:
            self.go.clear()
            self.finished.set()
            self.go.wait()
        return self.stopping

    def _main(self, first_round: int) -> None:
        try:
            self.train(first_round, self._after_round)
        except Exception as error:
            self.error = error
        self.finished.set()
