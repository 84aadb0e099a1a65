"""What steps cost: read off a table, measured once, never below the cost of fewer rows."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdraft import Engine
from selfdraft.drafting.method import DraftContext
from selfdraft.drafting.plain import Plain, PlainDrafter
from selfdraft.models import step_cost
from selfdraft.models.numerics import RowRange
from selfdraft.models.step_cost import StepTimes
from selfdraft.models.transformers import TransformersModel

from conftest import tiny_llama
from runs import greedy, random_prompt


def test_between_and_beyond_what_was_measured() -> None:
    times = StepTimes({0: {1: 2.0, 5: 4.0, 9: 12.0}})
    assert [times(rows) for rows in (1, 3, 5, 7, 9, 11)] == [1.0, 1.5, 2.0, 4.0, 6.0, 8.0]


@given(st.dictionaries(st.integers(2, 50), st.floats(0.1, 9), min_size=1), st.floats(0.1, 9))
def test_more_rows_never_cost_less(seconds: dict[int, float], one: float) -> None:
    times = StepTimes({0: {1: one, **seconds}})
    costs = [times(rows) for rows in range(1, 80)]
    assert costs[0] == 1.0
    assert all(b > a - 1e-9 for a, b in pairwise(costs))


class Curious(Plain):
    """Plain decoding that asks what steps cost."""

    def drafter(self, context: DraftContext) -> PlainDrafter:
        self.cost = context.cost
        return PlainDrafter()


def test_costs_count_the_rows_of_all_requests(
    exact: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three requests, a row more of each is three rows more; measured once per model."""
    calls = []

    def measured(model: TransformersModel, *_: object) -> StepTimes:
        calls.append(model)
        return StepTimes({0: {1: 1.0, 2: 2.0, 100: 100.0}})

    monkeypatch.setattr("selfdraft.models.transformers.step_times", measured)
    monkeypatch.setattr(exact, "step_times", None)
    engine, method = Engine(exact), Curious()
    requests = [engine.submit(random_prompt(9, i), method, greedy(9)) for i in range(3)]
    assert method.cost(4) == pytest.approx(4.0)
    while not all(request.ready for request in requests):
        engine.step()
    assert method.cost(4) == pytest.approx(4.0)
    monkeypatch.setattr(exact, "step_times", StepTimes({0: {1: 1.0, 3: 1.0, 12: 7.0}}))
    engine = Engine(exact)
    requests = [engine.submit(random_prompt(9, i), method, greedy(9)) for i in range(3)]
    while not all(request.ready for request in requests):
        engine.step()
    engine.step()
    assert method.cost(4) == pytest.approx(7.0), "twelve rows in units of three"
    assert calls == [exact]


def test_a_real_model_is_measured(exact: TransformersModel) -> None:
    times = step_cost.measure(exact, exact.rows)
    assert times(1) == 1.0
    assert times(64) >= times(8) >= 1.0
    assert times.histories == [192], "its cache cannot pretend to hold more"


def test_a_longer_history_costs_more() -> None:
    times = StepTimes({100: {1: 1.0, 8: 2.0, 64: 9.0}, 500: {1: 2.0, 8: 6.0}})
    assert [times(1, history) for history in (0, 100, 200, 500, 900)] == [1.0, 1.0, 1.25, 2.0, 3.0]
    assert [times(8, history) for history in (0, 300, 900)] == [2.0, 4.0, 10.0]
    assert times(64, 100) == 9.0


def test_given_times_are_not_measured(measurements: list[Any]) -> None:
    model = TransformersModel(tiny_llama(torch.float64), "fast", StepTimes({0: {1: 1.0, 2: 1.5}}))
    assert model.cost(3) == pytest.approx(2.0)
    assert not measurements


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The models that were measured, with a cache folder of its own and the real `step_times`."""
    seen: list[Any] = []

    def measure(model: Any, rows: object) -> StepTimes:
        seen.append(model)
        return StepTimes({0: {1: 1.0, 2: 1.0 + len(seen)}})

    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(step_cost, "measure", measure)
    monkeypatch.setattr("selfdraft.models.transformers.step_times", step_cost.step_times)
    return seen


def started(double: TransformersModel, **changes: Any) -> TransformersModel:
    """The same model as a new process would have it."""
    again = copy.copy(double)
    again.step_times = None
    for name, value in changes.items():
        setattr(again, name, value)
    return again


def test_a_second_start_measures_nothing(double: TransformersModel, measurements: list[Any]) -> None:
    assert [started(double).cost(2) for _ in range(3)] == [2.0, 2.0, 2.0]
    assert len(measurements) == 1


def test_another_model_or_machine_is_measured(
    double: TransformersModel, measurements: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    started(double).cost(2)
    started(double, numerics="exact").cost(2)
    started(double, rows=RowRange(8, 8)).cost(2)
    started(double, model=tiny_llama(torch.float32)).cost(2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    started(double).cost(2)
    assert len(measurements) == 5


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"identity": "x", "seconds": {"1": 1, "2": 2}}', "\x00\xff"]
)
def test_a_damaged_or_stale_table_is_measured_anew(
    double: TransformersModel, measurements: list[Any], tmp_path: Path, text: str
) -> None:
    started(double).cost(2)
    (table,) = (tmp_path / "cache" / "step_times").iterdir()
    table.write_bytes(text.encode("latin1"))
    assert started(double).cost(2) == 3.0
    assert started(double).cost(2) == 3.0, "it was written again"
    assert len(measurements) == 2


def test_a_folder_that_cannot_be_written_does_no_harm(
    double: TransformersModel, measurements: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path / "file"))
    assert started(double).cost(2) == 2.0
    assert started(double).cost(2) == 3.0
