"""The engine behind `AsyncLLM`: one loop that takes requests from a queue and reports what each step brought.

It runs in a thread of the caller's process or is the main loop of a process of its own; both speak the same
messages. Whatever goes wrong in one request is that request's end.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

from . import drafting
from .drafting.acceptance import DraftCount, added
from .encoding import Prompt
from .engine.engine import check_early
from .engine.request import Request, TokenLogprob
from .errors import EngineClosed, GrammarError, InvalidOption, SelfdraftError
from .llm import LLM
from .outputs import Completion
from .params import SamplingParams
from .sampling.grammar import Grammar, Guide


@dataclass(frozen=True)
class Inquiry:
    """What one request asks. See `AsyncLLM.submit`."""

    ids: Sequence[int]
    params: SamplingParams
    references: Sequence[Prompt] = ()
    method: str | None = None
    sample: int = 0
    salt: str = ""
    timeout: float | None = None
    grammar: Grammar | None = None
    chat: bool = False
    """The prompt went through the chat template."""


@dataclass(frozen=True)
class Submit:
    number: int
    inquiry: Inquiry


@dataclass(frozen=True)
class Cancel:
    number: int


@dataclass(frozen=True)
class Close:
    """Take no more requests; those under way may go on for so many seconds."""

    grace: float


@dataclass(frozen=True)
class Compiled:
    """The grammar that a request waited for, or why there is none."""

    submit: Submit
    guide: Guide | SelfdraftError


Command = Submit | Cancel | Close | Compiled


@dataclass(frozen=True)
class Facts:
    """What a caller has to know of the model, once it is loaded."""

    name: str
    context: int
    vocab_size: int
    eos_ids: frozenset[int]
    method: str
    weights: str
    grade: str
    route: str
    kv_tokens: int | None
    """How many tokens the memory for keys and values holds; None where it grows as it is needed."""


@dataclass(frozen=True)
class Fresh:
    """What one request gained in a step."""

    number: int
    ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    end: Completion | SelfdraftError | None = None
    """The whole answer, once it has ended; the error, where the request could not begin."""


@dataclass(frozen=True)
class Stats:
    """The state of an engine, and what it has done so far."""

    running: int = 0
    waiting: int = 0
    kv_tokens: int | None = None
    kv_tokens_used: int | None = None
    """Of what the running requests hold."""
    steps: int = 0
    seconds: float = 0.0
    """Time of the steps."""
    rows: int = 0
    """Rows that the steps ran, of trees and of prompts."""
    prompt_tokens: int = 0
    """Of the requests that ended."""
    reused_tokens: int = 0
    """Those of them that were remembered and not read again."""
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    sources: Mapping[str, DraftCount] = field(default_factory=dict)
    """Draft tokens by where they are from, of the methods that say so."""
    preemptions: int = 0


@dataclass(frozen=True)
class Report:
    """What a step brought, to all requests."""

    fresh: Sequence[Fresh]
    stats: Stats


@dataclass
class EngineLoop:
    """Runs the requests of a model."""

    llm: LLM
    send: Callable[[Report], None]
    commands: queue.SimpleQueue[Command] = field(default_factory=queue.SimpleQueue)
    live: dict[int, tuple[Request, Inquiry, int]] = field(default_factory=dict)
    """By number: the request, what it asked, and how many tokens were sent."""
    stats: Stats = field(default_factory=Stats)
    _compiling: dict[int, bool] = field(default_factory=dict)
    """Requests whose grammar is being compiled, by number: have they been cancelled meanwhile?"""
    _compiler: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="selfdraft-grammars")
    )
    _methods: dict[str, LLM] = field(default_factory=dict)

    def run(self) -> None:
        """Serve until a `Close` comes. Requests that are under way then end as cancelled, if time runs
        out."""
        closing: float | None = None
        while True:
            idle = not self.live and (closing is None or bool(self._compiling))
            try:
                command = self.commands.get(block=idle) if self._asked() else None
            except queue.Empty:
                command = None
            if isinstance(command, Close):
                closing = time.monotonic() + command.grace
            elif command is not None:
                self._obey(command, closing is not None)
                continue
            waited_for = self.live or self._compiling
            if closing is not None and (not waited_for or time.monotonic() >= closing):
                self._cancel_all()
                self._compiler.shutdown(wait=False, cancel_futures=True)
                return
            if self.live:
                self._step()

    def _asked(self) -> bool:
        """True if a command is there, or nothing else is to be done."""
        return not self.live or not self.commands.empty()

    def _obey(self, command: Submit | Cancel | Compiled, closing: bool) -> None:
        if isinstance(command, Cancel):
            self._cancel(command.number)
        elif isinstance(command, Compiled):
            cancelled = self._compiling.pop(command.submit.number)
            self._begin(command.submit, command.guide)
            if cancelled:
                self._cancel(command.submit.number)
        elif closing:
            self._begin(command, EngineClosed("the engine is closing and takes no more requests"))
        elif command.inquiry.grammar is not None:
            self._compiling[command.number] = False
            self._compiler.submit(self._compile, command, command.inquiry.grammar)
        else:
            self._begin(command)

    def _compile(self, command: Submit, grammar: Grammar) -> None:
        """Compile a request's grammar, in a thread of its own: no step waits for it."""
        try:
            guide: Guide | SelfdraftError = self.llm.load_grammars().guide(grammar)
        except SelfdraftError as error:
            guide = error
        except BaseException as error:  # a panic of llguidance is no Exception; the request must not wait on
            guide = GrammarError(f"the grammar could not be compiled: {type(error).__name__}: {error}")
        self.commands.put(Compiled(command, guide))

    def _begin(self, command: Submit, guide: Guide | SelfdraftError | None = None) -> None:
        """Let a request join the engine, or report the error that it has met."""
        asked = command.inquiry
        try:
            if isinstance(guide, SelfdraftError):
                raise guide
            request = self._llm(asked.method).submit(
                asked.ids,
                asked.references,
                asked.params,
                sample=asked.sample,
                salt=asked.salt,
                timeout=asked.timeout,
                grammar=guide,
            )
            self.live[command.number] = (request, asked, 0)
        except SelfdraftError as error:
            self.send(Report([Fresh(command.number, end=error)], self._now()))

    def _cancel(self, number: int) -> None:
        if number in self._compiling:
            self._compiling[number] = True
        elif number in self.live:
            self.llm.engine.cancel(self.live[number][0])
            self._report()

    def _llm(self, method: str | None) -> LLM:
        """The model with a method of that name; None: with its own."""
        if method is None or method == self.llm.method_name:
            return self.llm
        if method not in self._methods:
            check_early(drafting.resolve(method)[0], self.llm.model)  # before another form of it is loaded
            other = self.llm.using(method)
            if other.engine is not self.llm.engine:
                raise InvalidOption(
                    f"method {method!r} needs another form of the model, which is not loaded; load with it",
                    option="method",
                )
            self._methods[method] = other
        return self._methods[method]

    def _step(self) -> None:
        start = time.perf_counter()
        self.llm.engine.step()
        took = time.perf_counter() - start
        self.stats = replace(self.stats, steps=self.stats.steps + 1, seconds=self.stats.seconds + took)
        self._report()

    def _report(self) -> None:
        with self.llm.engine.lock:  # other threads may step it, too
            report = Report(self._fresh(), self._now())
        self.send(report)

    def _fresh(self) -> list[Fresh]:
        fresh = []
        for number, (request, asked, sent) in list(self.live.items()):
            ended = request.finish_reason is not None
            if request.added == sent and not ended:
                continue
            ids, start = request.tokens[len(request.prompt) + sent :], sent
            end = self._llm(asked.method).completion(request, asked.chat) if ended else None
            fresh.append(Fresh(number, ids, request.logprobs[start:], end))
            if ended:
                del self.live[number]
                self._count(request)
            else:
                self.live[number] = (request, asked, sent + len(ids))
        return fresh

    def _count(self, request: Request) -> None:
        steps, had = len(request.runs), self.stats
        self.stats = replace(
            had,
            prompt_tokens=had.prompt_tokens + len(request.prompt),
            reused_tokens=had.reused_tokens + request.reused,
            generated_tokens=had.generated_tokens + request.added,
            drafted_tokens=had.drafted_tokens + request.rows - steps,
            accepted_tokens=had.accepted_tokens + max(0, request.added - steps),
            sources=added(had.sources, request.sources),
        )

    def _now(self) -> Stats:
        scheduler, pool = self.llm.engine.scheduler, self.llm.engine.pool
        used = None if pool.tokens is None or pool.free is None else pool.tokens - pool.free
        return replace(
            self.stats,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_tokens=pool.tokens,
            kv_tokens_used=used,
            rows=self.llm.engine.rows,
            preemptions=scheduler.preemptions,
        )

    def _cancel_all(self) -> None:
        for request, *_ in self.live.values():
            self.llm.engine.cancel(request)
        if self.live:
            self._report()


def facts(llm: LLM) -> Facts:
    return Facts(
        name=llm.name,
        context=llm.model.context,
        vocab_size=llm.model.vocab_size,
        eos_ids=frozenset(llm.eos_ids),
        method=llm.method_name,
        weights=llm.model.weights_label,
        grade=llm.model.grade,
        route=llm.route,
        kv_tokens=llm.engine.pool.tokens,
    )


def prepare_grammars(llm: LLM) -> None:
    """Let the first request with a grammar find all that it needs. Where there can be no grammars, each such
    request is told."""
    with suppress(InvalidOption):
        llm.load_grammars()


def serve(connection: Connection, model: str, options: Mapping[str, Any], grammars: bool) -> None:
    """The main function of an engine's own process: load the model, say what it is (`Facts`, or the error),
    then answer commands with reports until a `Close` comes or the other end is gone."""
    try:
        llm = LLM(model, **options)
    except SelfdraftError as error:
        connection.send(error)
        return
    if grammars:
        prepare_grammars(llm)
    connection.send(facts(llm))
    loop = EngineLoop(llm, connection.send)

    def listen() -> None:
        while True:
            try:
                command = connection.recv()
            except (EOFError, OSError):  # nobody is there to answer
                command = Close(0.0)
            loop.commands.put(command)
            if isinstance(command, Close):
                return

    threading.Thread(target=listen, daemon=True).start()
    with suppress(BrokenPipeError, ConnectionResetError):  # the other end is gone
        loop.run()
