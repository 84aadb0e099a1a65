"""What steps cost: read off a table, measured once, never below the cost of fewer rows."""

from __future__ import annotations

import copy
import itertools
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdraft import Engine, Method, Tree
from selfdraft.drafting.mask_tree import GroupDrafter
from selfdraft.drafting.method import DraftContext
from selfdraft.drafting.plain import Plain, PlainDrafter
from selfdraft.engine.load import Load
from selfdraft.models import step_cost
from selfdraft.models.numerics import RowRange
from selfdraft.models.step_cost import StepTimes
from selfdraft.models.transformers import TransformersModel
from selfdraft.verify.adversaries import Oracle

from adapting import adapter
from conftest import tiny_llama
from runs import greedy, random_prompt, run


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


@dataclass(frozen=True)
class Chains:
    """Drafts three tokens of a text at a time."""

    text: Sequence[int]

    def drafter(self, context: DraftContext) -> Chainer:
        return Chainer(self.text, len(context.prompt))


@dataclass
class Chainer(PlainDrafter):
    text: Sequence[int]
    start: int

    def propose(self, tokens: Sequence[int]) -> Tree:
        at = len(tokens) - self.start
        return Tree.chain([tokens[-1], *self.text[at : at + 3]])


def costs_beside(model: TransformersModel, *others: Method) -> Callable[[int], float]:
    """What rows cost a request that runs beside others, after a few steps of all."""
    engine, method, prompt = Engine(model), Curious(), random_prompt(9, 1)
    requests = [engine.submit(prompt, one, greedy(30)) for one in (*others, method)]
    while any(len(request.runs) < 3 for request in requests):
        engine.step()
    return method.cost


def test_costs_count_the_rows_of_all_requests(
    exact: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside two others three rows more make the step of six longer, for all three; measured once per
    model."""
    calls = []

    def measured(model: TransformersModel, *_: object) -> StepTimes:
        calls.append(model)
        return StepTimes({0: {1: 1.0, 2: 2.0, 100: 100.0}})

    monkeypatch.setattr("selfdraft.models.transformers.step_times", measured)
    monkeypatch.setattr(exact, "step_times", None)
    assert costs_beside(exact)(4) == pytest.approx(4.0)
    assert costs_beside(exact, Plain(), Plain())(4) == pytest.approx(1 + 3 * (6 / 3 - 1))
    monkeypatch.setattr(exact, "step_times", StepTimes({0: {1: 1.0, 3: 1.0, 12: 7.0}}))
    assert costs_beside(exact, Plain(), Plain())(4) == pytest.approx(1 + 3 * (3 / 1 - 1))
    assert calls == [exact]


def test_rows_cost_what_others_leave_of_those_that_are_free(
    exact: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where 16 rows take the time of one, a draft beside few others is free, however few of them draft; where
    they fill the step with drafts, the same draft costs, and more where theirs are accepted."""
    right = run(exact, Plain(), random_prompt(9, 1)).emitted
    monkeypatch.setattr(exact, "step_times", StepTimes({0: {1: 1.0, 16: 1.0, 32: 2.0}}))
    assert costs_beside(exact, *[Plain()] * 7)(9) == 1.0
    rejected = costs_beside(exact, *[Chains([token + 1 for token in right])] * 3)(9)
    accepted = costs_beside(exact, *[Chains(right)] * 3)(9)
    assert 1.0 < rejected < accepted


def test_counting_all_as_if_they_drafted_as_much_is_seen(
    exact: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Load,
        "draft_cost",
        lambda self, rows: self.time(rows * (self._others[0] + 1)) / self.time(self._others[0] + 1),
    )
    with pytest.raises(AssertionError):
        test_rows_cost_what_others_leave_of_those_that_are_free(exact, monkeypatch)


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
    monkeypatch.setattr(step_cost, "_preemptions", lambda: 0)
    monkeypatch.setattr(step_cost, "_measured_busy", {})
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


def test_what_was_measured_on_a_busy_machine_is_not_kept(
    double: TransformersModel, measurements: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = itertools.count(step=1000)
    monkeypatch.setattr(step_cost, "_preemptions", lambda: next(taken))
    assert [started(double).cost(2) for _ in range(2)] == [2.0, 2.0]
    assert not (tmp_path / "cache" / "step_times").exists()
    step_cost._measured_busy.clear()  # as in a new process
    monkeypatch.setattr(step_cost, "_preemptions", lambda: 7)
    assert [started(double).cost(2) for _ in range(2)] == [3.0, 3.0]
    assert len(measurements) == 2
    assert len(list((tmp_path / "cache" / "step_times").iterdir())) == 1


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


def test_an_old_table_is_measured_anew(
    double: TransformersModel, measurements: list[Any], tmp_path: Path
) -> None:
    started(double).cost(2)
    (table,) = (tmp_path / "cache" / "step_times").iterdir()
    for days, expected in ((20, 2.0), (40, 3.0), (0, 3.0)):
        before = time.time() - 86400 * days
        if days:
            os.utime(table, (before, before))
        assert started(double).cost(2) == expected


def test_a_folder_that_cannot_be_written_does_no_harm(
    double: TransformersModel, measurements: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path / "file"))
    assert started(double).cost(2) == 2.0
    assert started(double).cost(2) == 3.0


def steps(times: StepTimes, ratio: float, seed: int = 0) -> None:
    """Steps of one and of eight rows in turn, the latter so many times as long, on a machine whose other work
    comes and goes, with one step in ten held up."""
    rng, load = random.Random(seed), 1.0
    for i in range(500):
        load = min(8.0, max(1.0, load * rng.uniform(0.8, 1.25)))
        held_up = 20.0 if rng.random() < 0.1 else 1.0
        wide = i % 3 == 0
        times.observe(8 if wide else 1, 0, load * held_up * (ratio if wide else 1.0), False)


@pytest.mark.parametrize("ratio", [1.0, 1.5, 30.0])
@pytest.mark.parametrize("taken", [0, 1000])
def test_what_steps_have_shown_is_kept(
    double: TransformersModel,
    measurements: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    ratio: float,
    taken: int,
) -> None:
    """With the table, if that is kept: not where other work took the cores while it was measured. The table
    says that eight rows cost eight times as much as one."""
    preemptions = itertools.count(step=taken)
    monkeypatch.setattr(step_cost, "_preemptions", lambda: next(preemptions))
    model = started(double)
    assert model.cost(8) == 8.0
    assert model.step_times is not None
    steps(model.step_times, ratio * 8)
    shown = 1 + 7 * min(step_cost.MOST, (ratio * 8 - 1) / 7)
    assert model.cost(8) == pytest.approx(shown, rel=0.05)
    assert started(double).cost(8) == pytest.approx(shown, rel=0.05)
    step_cost._measured_busy.clear()  # as in a new process
    assert started(double).cost(8) == pytest.approx(15.0 if taken else shown, rel=0.05)
    assert len(measurements) == 1 + (taken > 0)


def unmoved() -> None:
    """Steps take what the table says, on a machine whose other work comes and goes."""
    times = StepTimes({0: {1: 1.0, 8: 2.0}})
    for seed in range(20):
        steps(times, 2.0, seed)
        assert times(8) == pytest.approx(2.0, rel=0.1)


def test_a_busy_machine_changes_no_costs() -> None:
    unmoved()


def test_comparing_with_an_idle_machine_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: wide steps are compared with the first narrow one, when nothing else ran."""
    observe = StepTimes.observe

    def late(self: StepTimes, rows: int, history: int, seconds: float, masks: bool) -> None:
        self._last = 1, 0, 1.0, False
        observe(self, rows, history, seconds, masks)

    monkeypatch.setattr(StepTimes, "observe", late)
    with pytest.raises(AssertionError):
        unmoved()


def followed() -> None:
    """Eight rows take 2 times what one takes, where 1.5 were measured, and two 1.2 where 1.1 were."""
    times = StepTimes({0: {1: 1.0, 2: 1.1, 8: 1.5}, 1000: {1: 1.5, 8: 2.0}})
    rng, load = random.Random(1), 1.0
    for i in range(400):
        load = min(8.0, max(1.0, load * rng.uniform(0.9, 1.1)))
        rows = (1, 8, 1, 2)[i % 4]
        times.observe(rows, 0, load * {1: 1.0, 2: 1.2, 8: 2.0}[rows], False)
    assert times(8) == pytest.approx(2.0, rel=0.05)
    assert times(2) == pytest.approx(1.2, rel=0.05)
    assert times(8, 1000) == pytest.approx(2.5, rel=0.05)
    assert [times(1), times(1, 1000), times.measured(8)] == [1.0, 1.5, 1.5]


def test_costs_follow_what_steps_take() -> None:
    followed()


def masks_followed() -> None:
    """Mask tokens add 0.75 to what eight rows take, which is 2 where 1.5 was measured."""
    times = StepTimes({0: {1: 1.0, 8: 1.5}}, masks=0.1)
    rng, load = random.Random(1), 1.0
    for i in range(400):
        load = min(8.0, max(1.0, load * rng.uniform(0.9, 1.1)))
        rows, masks = ((1, False), (8, False), (1, False), (8, True), (8, True))[i % 5]
        times.observe(rows, 0, load * ((2.0 if rows > 1 else 1.0) + 0.75 * masks), masks)
    assert times(8) == pytest.approx(2.0, rel=0.05)
    assert times.mask_cost == pytest.approx(0.75, rel=0.1)


def test_the_cost_of_mask_tokens_follows() -> None:
    masks_followed()


def test_mask_tokens_that_count_as_rows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    observe = StepTimes.observe
    monkeypatch.setattr(StepTimes, "observe", lambda self, *given: observe(self, *given[:3], False))
    with pytest.raises(AssertionError):
        masks_followed()


def test_costs_that_do_not_follow_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cost, "CORRECTED", 10**6)
    with pytest.raises(AssertionError):
        followed()


def test_mask_tokens_have_a_cost_of_their_own(
    exact: TransformersModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here 3 times what as many ordinary rows cost. Where it is high, no mask is run."""

    def times(model: object, cache: object, trees: dict[int, Tree]) -> dict[int, float]:
        return {name: 1.0 if len(tree) == name else 4.0 for name, tree in trees.items()}

    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path))
    monkeypatch.setattr(step_cost, "_times", times)
    monkeypatch.setattr("selfdraft.models.transformers.step_times", step_cost.step_times)
    assert exact.mask_cost() == 0
    adapted = exact.adapted(adapter(exact, 3, 0, 4, 24))
    assert adapted.mask_cost() == 3.0
    assert exact.adapted(adapter(exact, 3, 0, 4, 24)).mask_cost() == 3.0, "as kept"
    assert Load(lambda rows, history: 2.0, lambda: 3.0).mask_cost() == 1.5
    look = adapted.lookahead
    assert look is not None
    masks = []
    for cost in (0.0, 50.0):
        drafter = GroupDrafter(look, lambda rows: 1.0, 64, lambda cost=cost: cost)
        masks.append(sum(len(drafter.propose([1])) for _ in range(20)))
    assert masks[0] > 20 == masks[1]


def test_steps_that_read_prompts_are_not_compared(
    exact: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(exact, "observe", lambda rows, *_: seen.append(rows))
    right = run(exact, Plain(), random_prompt(9, 1)).emitted
    del seen[:]
    request = run(exact, Oracle(right, depth=3), random_prompt(9, 1))
    assert sum(seen) == request.rows
    assert len(seen) == len(request.runs)
