"""What steps cost: read off a table, measured once, never below the cost of fewer rows."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdraft import Engine, Limits
from selfdraft.drafting.method import DraftContext
from selfdraft.drafting.plain import Plain, PlainDrafter
from selfdraft.models import step_cost as cost
from selfdraft.models.step_cost import StepTimes
from selfdraft.models.transformers import TransformersModel

from runs import random_prompt


def test_between_and_beyond_what_was_measured() -> None:
    times = StepTimes({1: 2.0, 5: 4.0, 9: 12.0})
    assert [times(rows) for rows in (1, 3, 5, 7, 9, 11)] == [1.0, 1.5, 2.0, 4.0, 6.0, 8.0]


@given(st.dictionaries(st.integers(2, 50), st.floats(0.1, 9), min_size=1), st.floats(0.1, 9))
def test_more_rows_never_cost_less(seconds: dict[int, float], one: float) -> None:
    times = StepTimes({1: one, **seconds})
    costs = [times(rows) for rows in range(1, 80)]
    assert costs[0] == 1.0
    assert all(b > a - 1e-9 for a, b in pairwise(costs))


class Curious(Plain):
    """Plain decoding that asks what steps cost."""

    def drafter(self, context: DraftContext) -> PlainDrafter:
        self.cost = context.cost
        return PlainDrafter()


def test_drafters_are_told_the_cost_for_those_who_run(
    exact: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three requests, a row more of each is three rows more; measured once per model."""
    calls = []

    def measured(model: TransformersModel, rows: object) -> StepTimes:
        calls.append(model)
        return StepTimes({1: 1.0, 2: 2.0, 100: 100.0})

    monkeypatch.setattr("selfdraft.models.transformers.step_times", measured)
    monkeypatch.setattr(exact, "_times", None)
    engine, method = Engine(exact), Curious()
    requests = [engine.submit(random_prompt(9, i), method, limits=Limits(9)) for i in range(3)]
    assert method.cost(4) == pytest.approx(4.0)
    while not all(request.ready for request in requests):
        engine.step()
    assert method.cost(4) == pytest.approx(4.0)
    monkeypatch.setattr(exact, "_times", StepTimes({1: 1.0, 3: 1.0, 12: 7.0}))
    assert method.cost(4) == pytest.approx(7.0), "twelve rows in units of three"
    assert calls == [exact]


def test_a_real_model_is_measured(exact: TransformersModel) -> None:
    times = cost.step_times(exact, exact.rows)
    assert times.costs[0] == 1.0
    assert times.rows[0] == 1
    assert times(64) >= times(8) >= 1.0
