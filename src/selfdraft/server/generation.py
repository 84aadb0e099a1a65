"""The answers to one request: tickets of the engine, whose tokens become pieces of text here.

A whole answer is the pieces of a streamed one put together, so the two cannot differ.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from ..engine.request import TokenLogprob
from ..outputs import Completion
from ..params import SamplingParams
from ..sampling.detokenizer import Detokenizer
from ..sampling.stopping import StopStrings
from .metrics import Metrics

if TYPE_CHECKING:
    from ..async_llm import Ticket

FINISH = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
    "cancelled": "abort",
    "deadline": "abort",
}
"""The engine's reasons in OpenAI's words. `abort`: the server ended the answer."""


@dataclass(frozen=True)
class Token:
    """A token of an answer. offset: where its text begins in the answer, in characters."""

    id: int
    offset: int
    logprob: TokenLogprob | None


@dataclass(frozen=True)
class Piece:
    """What one event added to an answer."""

    index: int
    """Which of the request's answers."""
    text: str
    tokens: Sequence[Token]
    """Those whose text this piece begins to show."""
    count: int
    """Tokens that the engine had made since the piece before."""
    completion: Completion | None = None
    """Of the last piece."""


@dataclass(eq=False)
class Generation:
    """All answers of one request. tickets and prompts: one per answer."""

    endpoint: str
    tickets: list[Ticket]
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    """Of the first prompt; those of the others differ in `max_new_tokens` and the seed."""
    predicted: bool
    """The request named texts to copy from."""
    tokenizer: PreTrainedTokenizerBase
    metrics: Metrics
    completions: dict[int, Completion] = field(default_factory=dict)
    """Of the answers that have ended."""
    outcome: str | None = None
    """How the request ended."""
    _pieces: AsyncGenerator[Piece, None] = field(init=False)
    _first: Piece | None = None

    def __post_init__(self) -> None:
        self._pieces = self._run()

    async def begin(self) -> None:
        """Wait for the first piece. Raises what the engine says of a request that cannot begin."""
        self._first = await anext(self._pieces)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces of all answers as they come; the last one of each has its completion. Leaving early cancels
        them. Raises the error that ended one."""
        async with aclosing(self._pieces):
            if self._first is None:
                await self.begin()
            assert self._first is not None
            yield self._first
            async for piece in self._pieces:
                yield piece

    async def _run(self) -> AsyncGenerator[Piece, None]:
        start = last = perf_counter()
        try:
            async with aclosing(merge([self._answer(index) for index in range(len(self.tickets))])) as merged:
                async for piece in merged:
                    now = perf_counter()
                    if piece.completion is not None:
                        self.completions[piece.index] = piece.completion
                    elif start == last:
                        self.metrics.first_token.observe(now - start)
                    else:
                        self.metrics.token.observe((now - last) / max(1, piece.count))
                    last = now
                    yield piece
            reasons = {one.finish_reason for one in self.completions.values()}
            self.end("aborted" if reasons & {"cancelled", "deadline"} else "answered")
        except Exception:
            self.end("failed")
            raise
        finally:
            self.end("left")

    def end(self, outcome: str) -> None:
        """Count the request, once, and free what still runs."""
        if self.outcome is None:
            self.outcome = outcome
            self.metrics.requests.labels(self.endpoint, outcome).inc()
        self.cancel()

    def cancel(self) -> None:
        """The answers that still run end where they are."""
        for index, ticket in enumerate(self.tickets):
            if index not in self.completions:
                ticket.cancel()

    async def _answer(self, index: int) -> AsyncIterator[Piece]:
        ticket, prompt = self.tickets[index], self.prompts[index]
        text = Detokenizer(self.tokenizer, prompt)
        strings = self.params.stop_strings
        stop = StopStrings(self.tokenizer, strings) if strings else None
        watch = stop.watch(prompt) if stop is not None else None
        shown, pending = 0, ""  # characters shown, and text that may begin a stop string
        waiting: list[Token] = []
        made = count = 0
        async for progress in ticket:
            logprobs: Sequence[TokenLogprob | None] = progress.logprobs or [None] * len(progress.ids)
            for token, logprob in zip(progress.ids, logprobs, strict=True):
                waiting.append(Token(token, shown + len(pending), logprob))
                pending += text.add([token])
            safe = len(pending)
            if watch is not None and stop is not None:
                watch.find(progress.ids, self.params.min_new_tokens - made)
                safe = stop.safe(pending) if watch.cut is None else min(safe, watch.cut - shown)
            made, count = made + len(progress.ids), count + len(progress.ids)
            if safe > 0:
                shown, piece, pending = shown + safe, pending[:safe], pending[safe:]
                begun = sum(token.offset < shown for token in waiting)
                yield Piece(index, piece, waiting[:begun], count)
                waiting, count = waiting[begun:], 0
        completion = await ticket.result()
        rest = completion.text[shown:]
        if rest:
            begun = sum(token.offset < len(completion.text) for token in waiting)
            yield Piece(index, rest, waiting[:begun], count)
        yield Piece(index, "", (), 0, completion)


async def merge(sources: Sequence[AsyncIterator[Piece]]) -> AsyncGenerator[Piece, None]:
    """Items of all sources as they come. Raises the first error of one; the others are then closed."""
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(2 * len(sources))

    async def pump(source: AsyncIterator[Piece]) -> None:
        try:
            async for item in source:
                await queue.put(item)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    left = len(pumps)
    try:
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
