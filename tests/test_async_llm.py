"""Many callers, one engine, in a thread or a process of its own: the texts of the library, and clean ends."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfdraft import LLM, SamplingParams
from selfdraft.async_llm import AsyncLLM, Process
from selfdraft.drafting.acceptance import DraftCount
from selfdraft.engine.engine import Engine
from selfdraft.engine.scheduler import Limits
from selfdraft.engine_loop import EngineLoop
from selfdraft.errors import (
    EngineClosed,
    InvalidOption,
    InvalidPrompt,
    ModelNotFound,
    ModelUnsupported,
    QueueFull,
)
from selfdraft.sampling.grammar import Grammar, Grammars, Guide

PROMPTS = ["def add", "class Tree", "for i in", "return self"]


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), "llma")


@pytest.fixture(scope="module", params=["thread", "process"])
def served(request: pytest.FixtureRequest, folder: Path) -> Iterator[AsyncLLM]:
    limits, process = Limits(earlier_answers=1000), request.param == "process"
    with AsyncLLM.load(str(folder), process=process, method="llma", limits=limits) as made:
        yield made
        left = made.submit([5, 6], params(0, max_new_tokens=240, ignore_eos=True))
    assert left.wait().finish_reason == "cancelled"
    if isinstance(made._runner, Process):
        assert not made._runner._process.is_alive(), "no child is left"


def params(i: int, **others: Any) -> SamplingParams:
    return SamplingParams(
        **{"max_new_tokens": 20, "temperature": 0.8 * (i % 2), "seed": i, "logprobs": 1, **others}
    )


def test_callers_get_what_the_library_says(served: AsyncLLM, llm: LLM) -> None:
    tickets = [
        served.submit(served.prompt_ids(PROMPTS[i % 4]), params(i), method=("llma", "jacobi", "plain")[i % 3])
        for i in range(12)
    ]
    for i, ticket in enumerate(tickets):
        pieces = list(ticket)
        right = llm.generate(PROMPTS[i % 4], params(i))
        assert [token for piece in pieces for token in piece.ids] == right.ids
        assert [one.token for piece in pieces for one in piece.logprobs] == right.ids
        assert ticket.wait().text == right.text
        assert ticket.wait().finish_reason == right.finish_reason
    assert served.stats.running == 0
    assert served.stats.generated_tokens >= 12


def test_earlier_answers_stay_with_the_engine(served: AsyncLLM, llm: LLM) -> None:
    """An answer that comes again is drafted from the first one, and not where another salt asks for it."""

    def drafted(salt: str) -> int:
        before = served.stats.sources.get("answer", DraftCount()).drafted
        ticket = served.submit(served.prompt_ids(PROMPTS[0]), params(1), salt=salt)
        assert ticket.wait().ids == llm.generate(PROMPTS[0], params(1)).ids
        return served.stats.sources.get("answer", DraftCount()).drafted - before

    first, other, again = (drafted(salt) for salt in ("one", "two", "one"))
    assert first == other == 0
    if not isinstance(served._runner, Process):  # there rows cost what they cost, and drafts may not pay
        assert again > 0


def test_event_loops_are_not_held_up(served: AsyncLLM, llm: LLM) -> None:
    async def read(i: int) -> list[int]:
        ticket = served.submit(served.prompt_ids(PROMPTS[i]), params(i))
        ids = [token async for piece in ticket for token in piece.ids]
        assert ids == (await ticket.result()).ids
        return ids

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*[read(i) for i in range(4)])

    assert asyncio.run(all_of_them()) == [llm.generate(PROMPTS[i], params(i)).ids for i in range(4)]


def test_a_slow_reader_misses_nothing(served: AsyncLLM, llm: LLM) -> None:
    slow = served.submit(served.prompt_ids(PROMPTS[0]), params(1))
    served.submit(served.prompt_ids(PROMPTS[1]), params(2, max_new_tokens=60)).wait()
    pieces = [piece.ids for piece in slow]
    assert len(pieces) == 1, "what came meanwhile is one piece"
    assert pieces[0] == llm.generate(PROMPTS[0], params(1)).ids


def test_cancelled_within_a_step(served: AsyncLLM) -> None:
    ticket = served.submit(served.prompt_ids(PROMPTS[0]), params(0, max_new_tokens=200, ignore_eos=True))
    for _ in ticket:
        ticket.cancel()
    result = ticket.wait()
    assert result.finish_reason == "cancelled"
    assert result.tokens < 200


def test_bad_requests_are_refused_at_once(served: AsyncLLM) -> None:
    with pytest.raises(InvalidPrompt, match="empty"):
        served.submit([], params(0))
    with pytest.raises(InvalidPrompt, match="context"):
        served.submit([5] * 1000, params(0))
    with pytest.raises(InvalidOption, match="logit_bias"):
        served.submit([5], params(0, logit_bias={99999: 1.0}))
    with pytest.raises(InvalidOption, match="timeout"):
        served.submit([5], params(0), timeout=-1.0).wait()


def test_a_method_that_the_model_cannot_run_loads_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one request would hold up all others while another form of the model is loaded, each time."""
    monkeypatch.setattr(LLM, "using", lambda *_: 1 / 0)
    with AsyncLLM.load(llm) as served, pytest.raises(ModelUnsupported, match="looped"):
        served.submit([5, 6], params(0), method="speed").wait()


def test_the_queue_has_an_end(folder: Path) -> None:
    limits = Limits(max_requests=1, max_queue=1)
    with AsyncLLM.load(str(folder), limits=limits) as served:
        long = params(0, max_new_tokens=200, ignore_eos=True)
        tickets = [served.submit([5, 6], long) for _ in range(2)]
        with pytest.raises(QueueFull, match="try again later"):
            served.submit([5, 6], long)
        for ticket in tickets:
            ticket.cancel()
            ticket.wait()
        served.submit([5, 6], params(0)).wait()


def test_what_cannot_be_sent_takes_no_place_in_the_queue(
    served: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: object) -> None:
        raise TypeError("cannot pickle")

    monkeypatch.setattr(served._runner, "tell", fail)
    with pytest.raises(TypeError, match="pickle"):
        served.submit([5, 6], params(0))
    assert not served._tickets


def test_closing_lets_requests_finish_or_ends_them(folder: Path) -> None:
    for grace in (30.0, 0.0):
        served = AsyncLLM.load(str(folder))
        ticket = served.submit([5, 6], params(0, max_new_tokens=240, ignore_eos=True))
        next(iter(ticket))
        served.close(grace=grace)
        with pytest.raises(EngineClosed):
            served.submit([5, 6], params(0))
        assert ticket.wait().finish_reason == ("length" if grace else "cancelled")
    assert not any(thread.name == "selfdraft-engine" for thread in threading.enumerate())


def test_a_process_that_dies_is_started_again(served: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks meanwhile is not held up."""
    runner, may_start = served._runner, threading.Event()
    if not isinstance(runner, Process):
        pytest.skip("of processes")
    start = runner._start
    monkeypatch.setattr(runner, "_start", lambda: may_start.wait(60) and start())
    right = served.submit([5, 6], params(0)).wait().ids
    lost = served.submit([5, 6], params(0, max_new_tokens=240, ignore_eos=True))
    next(iter(lost))
    assert runner._process.pid is not None
    os.kill(runner._process.pid, signal.SIGKILL)
    with pytest.raises(EngineClosed, match="exit code -9"):
        lost.wait()
    with pytest.raises(EngineClosed, match="started again"):
        served.submit([5, 6], params(0))
    lost.cancel()
    may_start.set()
    for _ in range(600):
        try:
            again = served.submit([5, 6], params(0)).wait()
            break
        except EngineClosed:
            time.sleep(0.1)
    assert again.ids == right


def test_a_model_that_cannot_be_loaded() -> None:
    for process in (False, True):
        with pytest.raises(ModelNotFound):
            AsyncLLM.load("./no/such/model", process=process)


def test_an_engine_that_breaks_ends_its_requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = AsyncLLM.load(str(folder))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(Engine, "step", lambda self: 1 / 0)
    ticket = served.submit([5, 6], params(0))
    with pytest.raises(EngineClosed, match="ZeroDivisionError"):
        ticket.wait()
    with pytest.raises(EngineClosed):
        served.submit([5, 6], params(0))
    served.close()


@pytest.mark.parametrize("before", [True, False])
def test_the_vocabulary_is_read_before_requests_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Without `grammars` the first request that has one lets it be read."""
    pytest.importorskip("llguidance", reason="the extra serve is not installed")
    read_by = []
    read = Grammars.__init__

    def note(self: Grammars, *given: Any) -> None:
        read_by.append(threading.current_thread().name)
        read(self, *given)

    monkeypatch.setattr(Grammars, "__init__", note)
    with AsyncLLM.load(str(folder), grammars=before) as served:
        for _ in range(2):
            ticket = served.submit([5, 6], params(0), grammar=Grammar("regex", "(a|b){3}"))
            assert set(ticket.wait().text) <= {"a", "b"}
    assert len(read_by) == 1
    assert read_by[0].startswith("selfdraft-grammars") != before


def in_the_engine(loop: EngineLoop) -> None:
    """The fault: grammars are compiled by the thread that steps."""
    loop._compiler = SimpleNamespace(  # type: ignore[assignment]
        submit=lambda compile, *given: compile(*given), shutdown=lambda **_: None
    )


@pytest.mark.parametrize("fault", [False, True])
def test_no_request_waits_for_the_grammar_of_another(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, fault: bool
) -> None:
    """Requests that come after it begin, run and end while a grammar is compiled; one that is cancelled
    meanwhile ends as such; an unsound one is its own request's error."""
    pytest.importorskip("llguidance", reason="the extra serve is not installed")
    go, compiled = threading.Event(), []
    guide = Grammars.guide

    def slow(self: Grammars, grammar: Grammar) -> Guide:
        go.wait(1.0)
        compiled.append(grammar)
        return guide(self, grammar)

    with AsyncLLM.load(llm) as served:
        if fault:
            in_the_engine(served._runner._loop)
        monkeypatch.setattr(Grammars, "guide", slow)
        first = served.submit([5, 6], params(0), grammar=Grammar("regex", "(a|b){3}"))
        left = served.submit([5, 6], params(0), grammar=Grammar("regex", "c{3}"))
        wrong = served.submit([5, 6], params(0), grammar=Grammar("regex", "("))
        other = served.submit([5, 6], params(0)).wait()
        assert bool(compiled) == fault
        left.cancel()
        go.set()
        assert set(first.wait().text) <= {"a", "b"}
        assert fault or left.wait().finish_reason == "cancelled"
        with pytest.raises(InvalidOption, match="regular expression"):
            wrong.wait()
        assert list(other.ids) == list(llm.generate([5, 6], params(0)).ids)
