"""How many threads a step runs on: one where another process keeps a core busy.

Threads of a step wait for each other, so a core that is shared makes all of them late. What a step takes on
one thread is known after a try; where several take longer than that, the next steps run on one, and several
are tried again from time to time. The bits do not depend on the number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SUSPECT = 1.4
"""A step this many times as long as the shortest seen of as many rows may be crowded."""
PATIENCE = 3
"""Steps in a row that look crowded before one thread is tried; four times as many after each try in vain, as
where only the history has grown."""
MOST_PATIENCE = 1000
ALONE = 32
"""Steps on one thread before several are tried again."""


class Crowding:
    """Chooses the threads of steps, and learns from their times."""

    def __init__(self, threads: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.threads = threads
        self._clock = clock
        self._best: dict[int, float] = {}  # by rows: the shortest step on all threads
        self._suspicious = self._alone = 0
        self._patience = PATIENCE
        self._late = 0.0  # the last step on all threads that looked crowded

    def run(self, rows: int, step: Callable[[int], None]) -> None:
        """Run a step of so many rows; step gets the number of threads."""
        threads = 1 if self._alone > 0 else self.threads
        start = self._clock()
        step(threads)
        took = self._clock() - start
        if self.threads == 1:
            return
        if threads == 1:
            self._alone -= 1
            if self._alone == ALONE - 1:
                helps = took < self._late
                self._alone = self._alone if helps else 0
                self._patience = PATIENCE if helps else min(MOST_PATIENCE, 4 * self._patience)
            return
        best = self._best[rows] = min(took, self._best.get(rows, took))
        self._suspicious = self._suspicious + 1 if took > SUSPECT * best else 0
        if self._suspicious >= self._patience:
            self._suspicious, self._alone, self._late = 0, ALONE, took
