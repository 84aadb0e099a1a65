"""Many callers, one engine: submit, stream, cancel.

The engine runs in a thread (of a library's user) or in a process of its own (of a server: a busy Python
thread beside it would make its steps longer, and a crash there is only an error here). Both have this
interface. A process that dies ends its requests with an error and is started again."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from .encoding import Prompt, PromptEncoder
from .engine.engine import check_prompt
from .engine.request import TokenLogprob
from .engine.scheduler import Limits
from .engine_loop import (
    Cancel,
    Close,
    Command,
    EngineLoop,
    Facts,
    Inquiry,
    Report,
    Stats,
    Submit,
    facts,
    prepare_grammars,
    serve,
)
from .errors import EngineClosed, SelfdraftError
from .llm import LLM
from .models.loading import DEFAULT_MODEL, load_tokenizer
from .outputs import Completion
from .params import SamplingParams
from .sampling.grammar import Grammar
from .sampling.sampler import check_params
from .sampling.stopping import StopStrings


@dataclass(frozen=True)
class Progress:
    """What a request gained since it was last looked at."""

    ids: Sequence[int]
    logprobs: Sequence[TokenLogprob]
    """One for each id, where they were asked for."""


class Ticket:
    """One request under way: iterate over its `Progress` (`for`, or `async for`), then ask for the `result`.

    A reader who is slow holds nobody up: what came meanwhile is one piece.
    """

    def __init__(self, number: int, cancel: Callable[[int], None]) -> None:
        self.number = number
        self._cancel = cancel
        self._changed = threading.Condition()
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._end: Completion | SelfdraftError | None = None
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def cancel(self) -> None:
        """Let the request end within one step; what it has emitted stays readable."""
        if self._end is None:
            with suppress(EngineClosed):  # then it has lost its requests
                self._cancel(self.number)

    def __iter__(self) -> Iterator[Progress]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ids or self._end is not None)
                piece = self._take()
            if piece is None:
                self._raise()
                return
            yield piece

    async def __aiter__(self) -> AsyncIterator[Progress]:
        while True:
            with self._changed:
                piece, ended = self._take(), self._end is not None
                event = None if piece is not None or ended else self._sleep()
            if piece is not None:
                yield piece
            elif event is not None:
                await event.wait()
            else:
                self._raise()
                return

    def wait(self) -> Completion:
        """The whole answer, once it has ended. Raises the error that ended it, if one did."""
        with self._changed:
            self._changed.wait_for(lambda: self._end is not None)
        return self._result()

    async def result(self) -> Completion:
        """The same, without holding up an event loop."""
        while True:
            with self._changed:
                event = None if self._end is not None else self._sleep()
            if event is None:
                return self._result()
            await event.wait()

    def add(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        with self._changed:
            self._ids += ids
            self._logprobs += logprobs
            self._wake()

    def finish(self, end: Completion | SelfdraftError) -> None:
        with self._changed:
            if self._end is None:
                self._end = end
                self._wake()

    def _take(self) -> Progress | None:
        if not self._ids:
            return None
        piece = Progress(self._ids, self._logprobs)
        self._ids, self._logprobs = [], []
        return piece

    def _sleep(self) -> asyncio.Event:
        event = asyncio.Event()
        self._sleepers.append((asyncio.get_running_loop(), event))
        return event

    def _wake(self) -> None:
        self._changed.notify_all()
        for loop, event in self._sleepers:
            with suppress(RuntimeError):  # that loop has been closed
                loop.call_soon_threadsafe(event.set)
        self._sleepers.clear()

    def _raise(self) -> None:
        error = self._end if isinstance(self._end, SelfdraftError) else self._end and self._end.error
        if error:
            raise error

    def _result(self) -> Completion:
        self._raise()
        assert isinstance(self._end, Completion)
        return self._end


class AsyncLLM(PromptEncoder):
    """A model behind a queue, for any number of callers in any threads or event loops.

        llm = AsyncLLM.load("smollm2")
        ticket = llm.submit(llm.prompt_ids("Why is the sky blue?"), SamplingParams(max_new_tokens=100))
        async for piece in ticket: ...
        print((await ticket.result()).text)

    Attributes: tokenizer, name, facts (of the model), stats (of the engine, after its last step), limits.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, limits: Limits, start: Callable[[AsyncLLM], Runner]
    ) -> None:
        """start: starts the engine; see `load`."""
        self.tokenizer, self.limits = tokenizer, limits
        self.stats = Stats()
        self.observe: Callable[[Stats], None] = lambda stats: None
        """Called after each step, in the thread that reads the engine's reports."""
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        self._closed = False
        self._runner = start(self)
        self.facts = self._runner.facts
        self.name = self.facts.name

    @classmethod
    def load(
        cls,
        model: str | LLM = DEFAULT_MODEL,
        *,
        process: bool = False,
        limits: Limits | None = None,
        grammars: bool = False,
        **options: Any,
    ) -> Self:
        """Load a model, or take one that is loaded; options as those of `LLM`.

        process: run the engine in a process of its own; a script then keeps its main code under
        `if __name__ == "__main__":`, since the new process imports it. grammars: prepare for grammars now, so
        that the first request with one holds up nobody; see `LLM.load_grammars`. Raises as `LLM`.
        """
        limits = limits or Limits()
        if process and not isinstance(model, LLM):
            tokenizer, given = load_tokenizer(model), {**options, "limits": limits}
            return cls(tokenizer, limits, lambda self: Process(model, given, grammars, self))
        loaded = model if isinstance(model, LLM) else LLM(model, limits=limits, **options)
        if grammars:
            prepare_grammars(loaded)
        return cls(loaded.tokenizer, loaded.engine.limits, lambda self: Thread(loaded, self))

    def submit(
        self,
        ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        references: Sequence[Prompt] = (),
        method: str | None = None,
        sample: int = 0,
        salt: str = "",
        timeout: float | None = None,
        grammar: Grammar | None = None,
        chat: bool = False,
    ) -> Ticket:
        """Let a request join; returns at once.

        method: another drafting method than the model's own, by name. sample: keys the noise, beside the
        seed. salt: requests of different salts share no text and no memory. timeout: seconds after which it
        ends in any case. grammar: what the text must follow. chat: the prompt went through the chat template,
        for the result.

        Raises QueueFull and EngineClosed; InvalidPrompt, InvalidReference and InvalidOption for what can be
        seen at once. Other errors are the ticket's."""
        params = params or SamplingParams()
        quoted = self.references(references)
        check_prompt(ids, quoted, self.facts.vocab_size, self.facts.context)
        check_params(params, self.facts.vocab_size, params.end_ids(self.facts.eos_ids), sample)
        if params.stop_strings:
            StopStrings(self.tokenizer, params.stop_strings)
        asked = Inquiry(ids, params, quoted, method, sample, salt, timeout, grammar, chat)
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine was closed and takes no more requests")
            self.limits.check_queue(len(self._tickets))
            ticket = Ticket(next(self._numbers), lambda number: self._runner.tell(Cancel(number)))
            self._tickets[ticket.number] = ticket
        try:
            self._runner.tell(Submit(ticket.number, asked))
        except BaseException:
            self._tickets.pop(ticket.number, None)
            raise
        return ticket

    def close(self, grace: float = 0.0) -> None:
        """Take no more requests; let those under way go on for so many seconds, cancel them, and end the
        engine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with suppress(EngineClosed):
            self._runner.tell(Close(grace))
        self._runner.join(grace)
        self.lose(EngineClosed("the engine was closed"))

    async def aclose(self, grace: float = 0.0) -> None:
        """The same, without holding up an event loop."""
        await asyncio.to_thread(self.close, grace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive(self, report: Report) -> None:
        """Hand out what a step brought."""
        self.stats = report.stats
        for fresh in report.fresh:
            ticket = self._tickets.get(fresh.number)
            if ticket is None:
                continue
            if fresh.ids:
                ticket.add(fresh.ids, fresh.logprobs)
            if fresh.end is not None:
                self._tickets.pop(fresh.number, None)
                ticket.finish(fresh.end)
        self.observe(report.stats)

    def lose(self, error: SelfdraftError) -> None:
        """End all requests that are under way."""
        with self._lock:
            lost, self._tickets = self._tickets, {}
        for ticket in lost.values():
            ticket.finish(error)


class Thread:
    """An engine in a thread of this process."""

    def __init__(self, llm: LLM, owner: AsyncLLM) -> None:
        self.facts = facts(llm)
        self._loop = EngineLoop(llm, owner.receive)
        self._owner = owner
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="selfdraft-engine", daemon=True)
        self._thread.start()

    def tell(self, command: Command) -> None:
        if self._ended:
            raise EngineClosed("the engine's thread has ended")
        self._loop.commands.put(command)

    def join(self, grace: float) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run()
        except BaseException as error:
            self._ended = True  # first, so that nothing is told that nobody hears
            self._owner.lose(EngineClosed(f"the engine failed: {type(error).__name__}: {error}"))
            raise


class Process:
    """An engine in a process of its own, which is started again when it dies."""

    def __init__(self, model: str, options: Mapping[str, Any], grammars: bool, owner: AsyncLLM) -> None:
        self._arguments, self._owner = (model, options, grammars), owner
        self._sending = threading.Lock()
        self._ending = self._starting = False
        self._start()
        self._reader = threading.Thread(target=self._read, name="selfdraft-reports", daemon=True)
        self._reader.start()

    def tell(self, command: Command) -> None:
        self._ending = self._ending or isinstance(command, Close)
        try:
            if self._starting:  # nobody waits for that here: an event loop may be calling
                raise ConnectionError("it is loading the model")
            with self._sending:
                self._connection.send(command)
        except OSError as error:
            raise EngineClosed("the engine's process died and is being started again; try again") from error

    def join(self, grace: float) -> None:
        self._process.join(grace + 10)
        if self._process.is_alive():
            self._process.kill()
        self._reader.join(10)

    def _start(self) -> None:
        """Raises what loading the model raises, and EngineClosed if the process dies meanwhile."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, *self._arguments), name="selfdraft-engine", daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            first = self._connection.recv()
        except EOFError as error:
            self._process.join()
            code = self._process.exitcode
            raise EngineClosed(
                f"the process died while it loaded {self._arguments[0]} (exit code {code})"
            ) from error
        if isinstance(first, SelfdraftError):
            raise first
        self.facts: Facts = first

    def _read(self) -> None:
        while True:
            try:
                self._owner.receive(self._connection.recv())
            except (EOFError, OSError):
                self._process.join()
                if self._ending:
                    return
                code, self._starting = self._process.exitcode, True
                self._owner.lose(
                    EngineClosed(f"the engine's process died (exit code {code}); it is being started again")
                )
                try:
                    self._start()
                except (SelfdraftError, OSError) as error:
                    self._ending = True
                    self._owner.lose(EngineClosed(f"the engine could not be started again: {error}"))
                    return
                self._starting = False
                if self._ending:  # closed meanwhile
                    self._process.kill()


Runner = Thread | Process
