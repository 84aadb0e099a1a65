"""What rows of a draft cost where other requests run in the same step.

A step of r rows takes T(r), measured (`models.step_cost`). Beside others that run R rows and get E tokens a
step, a request with n rows of which p tokens are expected makes E + p tokens in T(R + n). That beats its own
plain step, E + 1 tokens in T(R + 1), if p is above

    1 + (E + 1) * (T(R + n) / T(R + 1) - 1).

This is the cost of n rows: the time by which the step of all gets longer, in units of the time in which all
make one token. Alone it is T(n) / T(1). Where rows are free it is 1, whoever else runs. Where each row takes
its time, it grows with the requests that wait for it, so that drafts fade as rows fill. The others count with
the rows that they ran last: one that finds nothing to draft with one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .request import Request

HISTORY_STEP = 256
"""Lengths of history whose costs are taken to be equal."""


class Load:
    """The rows and tokens of the requests that decode, and what steps of them take."""

    def __init__(
        self, cost: Callable[[int, int], float], mask_cost: Callable[[], float] = lambda: 0.0
    ) -> None:
        """cost: of a step, by its rows and the tokens before them. mask_cost: what mask tokens add. See
        `models.protocol.Model`."""
        self.cost, self._mask_cost = cost, mask_cost
        self.history = 0
        """Tokens before the rows, on average."""
        self.rows = 0
        """Of the present step, as far as its trees are known, else of the last one."""
        self._tokens = 0.0
        """A step, on average."""
        self._others = 0, 0.0
        """Rows and tokens of all but the request whose costs are asked for."""

    def begin(self, requests: Sequence[Request]) -> None:
        """Called before a step of the requests that decode."""
        self.history = sum(request.length for request in requests) // max(1, len(requests))
        self.rows = sum(request.width for request in requests)
        self._tokens = sum(request.pace for request in requests)

    def ask(self, request: Request) -> None:
        """Whose costs are asked for next."""
        self._others = max(0, self.rows - request.width), max(0.0, self._tokens - request.pace)

    def draft_cost(self, rows: int) -> float:
        """What so many rows of the request cost; one: 1."""
        others, tokens = self._others
        return 1 + (tokens + 1) * (self.time(others + rows) / self.time(others + 1) - 1)

    def mask_cost(self) -> float:
        """What mask tokens among the rows of the request add, in the same units."""
        others, tokens = self._others
        return (tokens + 1) * self._mask_cost() / self.time(others + 1)

    def time(self, rows: int) -> float:
        """What a step of so many rows takes, as `cost`, behind the present history."""
        return self.cost(rows, self.history // HISTORY_STEP * HISTORY_STEP)
