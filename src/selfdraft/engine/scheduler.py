"""Which requests run in a step: by memory, by a budget of rows, first come first served.

A request waits until the memory holds what it has to read. Once it is admitted, its prompt is read in chunks
beside the steps of those that decode, as many rows as a step may be made longer by (`MAX_STALL`). Where
memory runs out, drafts go first; then the youngest request gives its memory back and waits in front of the
others. Its text is read again later and goes on as if nothing had happened, since numerics are exact and
noise is keyed by position."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..drafting.answers import EarlierAnswers
from ..errors import InvalidOption, KVMemoryExhausted, QueueFull
from ..models.protocol import Pool
from .request import Request
from .tree import Tree

MAX_STALL = 2.0
"""Times as long as without it that a step may take in which a part of a prompt is read."""
MIN_CHUNK = 4
"""Rows of prompts that are read in a step where it has as many left, however long they make it."""
ROOM = 16
"""Tokens by which each running request must be able to grow before another one is admitted."""


@dataclass(frozen=True)
class Limits:
    """What an engine may use. Raises InvalidOption for a value that cannot be kept."""

    kv_memory: int | None = None
    """Bytes of keys and values. None: a gibibyte, or what a text as long as the model's context needs, but at
    most half of the memory that is free."""
    max_requests: int = 64
    """Requests that run at a time; further ones wait."""
    max_rows: int = 512
    """Rows of one forward: trees of drafts and chunks of prompts together."""
    max_queue: int | None = None
    """Requests that wait, at most; None: any number."""
    earlier_answers: int = 0
    """Tokens of answers that are kept for later requests of the same salt to draft from (with `auto` and
    `llma`), 40 to 56 bytes each and some 300 an answer; 0: none. How fast an answer comes then tells whether
    it was given before."""

    def __post_init__(self) -> None:
        for name, least in (
            ("kv_memory", 1),
            ("max_requests", 1),
            ("max_rows", 1),
            ("max_queue", 0),
            ("earlier_answers", 0),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise InvalidOption(f"{name} must be at least {least}; got {value!r}", option=name)

    def check_queue(self, there: int) -> None:
        """Raises QueueFull where no request may join so many that run or wait."""
        if self.max_queue is not None and there >= self.max_requests + self.max_queue:
            raise QueueFull(f"{there} requests run or wait already, as many as may; try again later")


class Scheduler:
    """The requests of an engine, waiting and running."""

    def __init__(self, limits: Limits, pool: Pool, ragged: bool, answers: EarlierAnswers | None) -> None:
        """ragged: prompts are read beside decoding requests, in the same forward. answers: where answers are
        kept for later requests; None: nowhere."""
        self.limits, self.pool, self.ragged, self.answers = limits, pool, ragged, answers
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In the order in which they were admitted."""
        self.preemptions = 0

    @property
    def requests(self) -> list[Request]:
        return [*self.running, *self.waiting]

    def check(self, prompt: Sequence[int]) -> None:
        """Raises QueueFull where no request may wait any more, and KVMemoryExhausted for a prompt that the
        memory never holds."""
        self.limits.check_queue(len(self.running) + len(self.waiting))
        if self.pool.tokens is not None and len(prompt) >= self.pool.tokens:
            raise KVMemoryExhausted(
                f"the prompt has {len(prompt)} tokens, and the memory for keys and values holds "
                f"{self.pool.tokens}; raise kv_memory"
            )

    def sweep(self) -> None:
        """Requests that have ended leave; those past their deadline end."""
        now = time.monotonic()
        for request in self.requests:
            if request.finish_reason is None and request.deadline is not None and now >= request.deadline:
                request.finish_reason = "deadline"
            if request.finish_reason is not None:
                self.leave(request)

    def leave(self, request: Request) -> None:
        """One that has ended gives its memory back. Its answer is kept, unless it failed."""
        if request in self.running:
            self.running.remove(request)
            request.close()
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            return
        if self.answers is not None and request.error is None:
            self.answers.add(request.salt, request.emitted)

    def admit(self) -> None:
        """Let those that wait begin, as long as there is memory for all that they have to read."""
        most = min(self.limits.max_requests, self.limits.max_rows)  # each has a row in every step
        while self.waiting and len(self.running) < most:
            request = self.waiting[0]
            if any(other.reads_what(request) for other in self.running):
                return
            request.open(self.pool)
            free, needed = self.pool.free, len(request.tokens) - request.length
            if free is not None and free < needed + ROOM * len(self.running):
                request.close()
                return
            request.reserve(len(request.tokens))
            self.running.append(self.waiting.popleft())

    @property
    def ready(self) -> list[Request]:
        """Those that decode."""
        return [request for request in self.running if request.ready]

    def fit(self, request: Request, tree: Tree, rows: int) -> Tree | None:
        """The tree that a request may run beside `rows` rows that others need: without its drafts where rows
        or memory are short. None if it has to wait or has ended, because there is none for its last token."""
        if request.pending is None and not self._holds(request, tree, rows):
            tree = tree.prune(0)
        while not request.reserve(request.length + 1):
            youngest = self.running[-1]
            if youngest is request and len(self.running) == 1:
                request.fail(
                    KVMemoryExhausted(
                        f"a text of {len(request.tokens)} tokens fills the memory for keys and values, "
                        f"which holds {self.pool.tokens} tokens; raise kv_memory"
                    )
                )
                return None
            self._preempt(youngest)
            if youngest is request:
                return None
        return tree

    def chunks(
        self, rows: int, history: int, cost: Callable[[int, int], float]
    ) -> list[tuple[Request, Sequence[int]]]:
        """Parts of prompts to read beside `rows` rows of trees. history: tokens before these, on average.
        cost: what a step of so many rows behind so long a history takes."""
        readers = [request for request in self.running if not request.ready]
        if not readers:
            return []
        budget = self._budget(rows, history, readers[0].length, cost)
        chosen = []
        for request in readers:
            part = request.unread(budget)
            if not part:
                break
            chosen.append((request, part))
            budget -= len(part)
            if not self.ragged:
                break
        return chosen

    def _holds(self, request: Request, tree: Tree, rows: int) -> bool:
        """True if rows and memory suffice for all of a tree."""
        return rows + len(tree) <= self.limits.max_rows and request.reserve(request.length + len(tree))

    def _budget(self, rows: int, history: int, read: int, cost: Callable[[int, int], float]) -> int:
        """Rows of prompts in a step. read: tokens before the first of them."""
        most = self.limits.max_rows - rows
        if not rows or not self.ragged or most <= MIN_CHUNK:
            return most
        limit, least = MAX_STALL * cost(rows, history), MIN_CHUNK
        while most - least > 1:  # the most rows that keep to the limit
            middle = (least + most) // 2
            mean = (rows * history + middle * (read + middle // 2)) // (rows + middle)
            least, most = (middle, most) if cost(rows + middle, mean) <= limit else (least, middle)
        return least

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        request.close()
        self.waiting.appendleft(request)
        self.preemptions += 1
