"""An AsyncLLM in a thread, until the real one is there."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from selfdraft import LLM, Engine
from selfdraft.errors import QueueFull


@dataclass(frozen=True)
class Progress:
    ids: Sequence[int]
    logprobs: Any


class Ticket:
    def __init__(self, owner: FakeAsyncLLM, request: Any, loop: Any, llm: LLM) -> None:
        self.owner, self.request, self.llm = owner, request, llm
        self.loop = loop
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.done = loop.create_future()
        self.seen = 0

    async def __aiter__(self):  # type: ignore[no-untyped-def]
        while (item := await self.queue.get()) is not None:
            yield item

    async def result(self) -> Any:
        completion = await asyncio.shield(self.done)
        if completion.error is not None:
            raise completion.error
        return completion

    def cancel(self) -> None:
        with self.owner.lock:
            self.owner.engine.cancel(self.request)
        self.owner.publish(self)

    def put(self, item: Any) -> None:
        self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


class FakeAsyncLLM:
    def __init__(self, llm: LLM, max_queue: int = 64, delay: float = 0.0) -> None:
        self.llm, self.max_queue, self.delay = llm, max_queue, delay
        self.engine = Engine(llm.model)
        self.tokenizer, self.name, self.eos_ids = llm.tokenizer, llm.name, llm.eos_ids
        self.context, self.vocab_size = llm.model.context, llm.model.vocab_size
        self.lock = threading.RLock()
        self.tickets: list[Ticket] = []
        self.closed = False
        self.counts = dict.fromkeys(
            ("prompt_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens"), 0
        )
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def loop(self) -> None:
        while not self.closed:
            with self.lock:
                if self.engine.requests:
                    self.engine.step()
                for ticket in list(self.tickets):
                    self.publish(ticket)
            time.sleep(self.delay or 0.0002)

    def publish(self, ticket: Ticket) -> None:
        with self.lock:
            if ticket not in self.tickets:
                return
            request = ticket.request
            ids = list(request.emitted)[ticket.seen :]
            if ids:
                ticket.put(Progress(ids, request.logprobs[ticket.seen :]))
                ticket.seen += len(ids)
            if request.finish_reason is not None:
                self.tickets.remove(ticket)
                ticket.put(None)
                completion = ticket.llm.completion(request, False)
                ticket.loop.call_soon_threadsafe(ticket.done.set_result, completion)
                self.counts["prompt_tokens"] += completion.prompt_tokens
                self.counts["generated_tokens"] += completion.tokens

    def submit(
        self,
        ids: Any,
        params: Any,
        *,
        references: Any = (),
        method: Any = None,
        sample: int = 0,
        deadline: Any = None,
        salt: str = "",
        grammar: Any = None,
    ) -> Ticket:
        llm = self.llm.using(method) if method else self.llm
        with self.lock:
            if len(self.tickets) >= self.max_queue:
                raise QueueFull("the queue is full")
            request = llm.submit(self.engine, ids, references, params, sample)
            ticket = Ticket(self, request, asyncio.get_running_loop(), llm)
            self.tickets.append(ticket)
            return ticket

    def stats(self) -> Any:
        return SimpleNamespace(
            running=len(self.engine.requests), waiting=0, pages_used=0, pages_total=0, **self.counts
        )

    async def aclose(self, grace: float = 0) -> None:
        self.closed = True
