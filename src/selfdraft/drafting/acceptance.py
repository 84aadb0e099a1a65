"""How often draft tokens are accepted, and what a text may lose by drafting.

Acceptance rates are learned while a text is drafted, by the kind of candidate. A request may start with what
the requests before it on the same engine have learned (`SharedAcceptance`). Rates are estimates, so what a
text can lose is bounded (`Budget`): a draft is run only if it could fail altogether and be paid for by what
drafts have gained in this text, plus a small initial credit and a little more for each step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PRIOR_COUNT = 8.0  # outcomes that a prior rate counts for
MEMORY = 64.0  # outcomes of a kind that count in a request, about; older ones fade
SHARED_MEMORY = 1024.0  # and over all requests
CREDIT = 1.0  # time that drafts may lose in all, in units of a step of one row,
CREDIT_PER_STEP = 0.02  # and more of it for each step
COST_STEPS = 32  # steps for which a cost is remembered; requests that join or leave may change it


Kind = tuple[Hashable, ...]
"""Why a token is a candidate: the name of its source, and what its chance depends on. Never a token."""


class AcceptanceStats:
    """Acceptance rates by kind of candidate: running means that start at a prior."""

    def __init__(self, prior: Mapping[Kind, float], memory: float = MEMORY) -> None:
        """memory: outcomes of a kind that count, about; older ones fade."""
        self.memory = memory
        # Kind -> how many candidates of it were accepted, and how many there were.
        self.counts = {kind: [rate * PRIOR_COUNT, PRIOR_COUNT] for kind, rate in prior.items()}

    def __getitem__(self, kind: Kind) -> float:
        accepted, made = self.counts[kind]
        return accepted / made

    def learn(self, kind: Kind, accepted: bool) -> None:
        count = self.counts[kind]
        fade = min(1.0, self.memory / (count[1] + 1))
        count[0] = (count[0] + accepted) * fade
        count[1] = (count[1] + 1) * fade


class SharedAcceptance:
    """Acceptance rates over all requests of an engine, which owns it: what a new request starts with.

    It holds two numbers per kind of candidate and nothing of a text. Threads may share it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: dict[Hashable, AcceptanceStats] = {}

    def start(self, name: Hashable, prior: Mapping[Kind, float]) -> StartedStats:
        """The rates of a new request, which also go on to later ones. name: of the requests that learn
        together. prior: the rates at first."""
        with self._lock:
            table = self._tables.setdefault(name, AcceptanceStats(prior, SHARED_MEMORY))
            table.counts = AcceptanceStats(prior).counts | table.counts
            return StartedStats({kind: table[kind] for kind in prior}, table, self._lock)


class StartedStats(AcceptanceStats):
    """Rates of one request that started with those of the requests before it."""

    def __init__(self, prior: Mapping[Kind, float], shared: AcceptanceStats, lock: threading.Lock) -> None:
        super().__init__(prior)
        self._shared, self._lock = shared, lock

    def learn(self, kind: Kind, accepted: bool) -> None:
        super().learn(kind, accepted)
        with self._lock:
            self._shared.learn(kind, accepted)


class Candidates(NamedTuple):
    """Tokens one of which may come next, drafted for the same reason."""

    kind: Kind  # whose acceptance rate says how likely it is that one of them comes next
    shares: Mapping[int, float]  # token -> its share of that rate; they sum to 1
    drawn: bool = False  # when sampling: were they chosen with the noise of their position?


@dataclass
class DraftCount:
    """Draft tokens of one source."""

    drafted: int = 0
    """How many were verified."""
    accepted: int = 0

    def __add__(self, other: DraftCount) -> DraftCount:
        return DraftCount(self.drafted + other.drafted, self.accepted + other.accepted)


NONE = DraftCount()


def added(one: Mapping[str, DraftCount], other: Mapping[str, DraftCount]) -> dict[str, DraftCount]:
    """The sums by source."""
    return {name: one.get(name, NONE) + other.get(name, NONE) for name in {**one, **other}}


class Budget:
    """The time of one request: what rows cost, and how much drafts may still lose.

    The unit of time is a step of one row.
    """

    def __init__(self, cost: Callable[[int], float], mask_cost: Callable[[], float] = lambda: 0.0) -> None:
        """cost: of so many rows. mask_cost: what it adds if there are mask tokens among them."""
        self.measured, self.mask_cost = cost, mask_cost
        self.costs = {1: cost(1)}  # asked here, so that a first measurement does not fall into a step
        self.table: Sequence[float] = ()
        self.least: dict[tuple[int, float], float] = {}
        self.reading: float | None = None
        self.steps = 0
        self.credit = CREDIT

    def begin(self) -> None:
        """Called when a step begins."""
        self.steps += 1
        if self.steps % COST_STEPS == 0:
            self.costs.clear()
            self.least.clear()
            self.table, self.reading = (), None

    def cost(self, rows: int, masks: bool = False) -> float:
        """The time of a step with so many rows, and with mask tokens among them or without; remembered for a
        few steps, since it is asked often."""
        cost = self.costs.get(rows)
        if cost is None:
            cost = self.costs[rows] = self.measured(rows)
        if not masks:
            return cost
        if self.reading is None:
            self.reading = self.mask_cost()
        return cost + self.reading

    def costs_to(self, rows: int) -> Sequence[float]:
        """The costs of 1 to so many rows, and perhaps more."""
        if len(self.table) < rows:
            self.table = [self.cost(count) for count in range(1, rows + 1)]
        return self.table

    def least_chance(self, rows: int, margin: float) -> float:
        """Where no draft token has a higher chance to be accepted, no tree of up to so many rows makes
        `margin` times the tokens of plain decoding in its time."""
        least = self.least.get((rows, margin))
        if least is None:
            costs = enumerate(self.costs_to(rows)[1:rows], 1)
            least = min(((margin * cost - 1) / i for i, cost in costs), default=1.0)
            self.least[rows, margin] = least
        return least

    def affords(self, rows: int, masks: bool = False) -> bool:
        """Is the credit enough for a step of so many rows whose draft is rejected altogether?"""
        return self.cost(rows, masks) - 1 <= self.credit

    def settle(self, tokens: int, rows: int, masks: bool) -> None:
        """Account for a step of so many rows that emitted so many tokens."""
        self.credit += CREDIT_PER_STEP + tokens - self.cost(rows, masks)
