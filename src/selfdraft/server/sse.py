"""Answers to clients that may go away: server-sent events, and work that ends when nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import dump

WRITE_SECONDS = 60.0
"""A client that takes nothing for so long is cut off."""
DONE = b"data: [DONE]\n\n"
Result = TypeVar("Result")


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event. name: its type, where clients look at that."""
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + dump(data) + b"\n\n"


class EventStream(Response):
    """Events sent as they come. `close` is called at the end, and at once when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        self.events = events
        self.close = close
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client that went away is not an error: nobody is there to be told.
        try:
            await unless_gone(receive, self._send(send))
        except (ClientDisconnect, TimeoutError, OSError):
            return
        finally:
            self.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self.events:
            async with asyncio.timeout(WRITE_SECONDS):  # `wait_for` may swallow a cancellation
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which is cancelled when the client goes away: then raises ClientDisconnect."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
