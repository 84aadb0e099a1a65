"""Running the server: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import socket
from asyncio import TimerHandle, Transport

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import InvalidOption
from .serving import Serving

HEADER_SECONDS = 10.0
"""How long the head of a request may take."""
KEEP_ALIVE_SECONDS = 30
LAST_SECONDS = 5.0
"""After the grace: what answers that were ended have to say it."""
LOG = logging.getLogger("selfdraft.server")


class Protocol(H11Protocol):
    """uvicorn's HTTP with a limit on how long a head may take, which uvicorn lacks, and without Nagle's
    algorithm, which holds a small packet back until the one before is acknowledged: up to 40 ms."""

    _late: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does it only for sockets that name their protocol; those of `create_server` do not.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        """Start the clock where a head is under way, unless it runs already; else stop it."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """uvicorn, ended in order: no new requests, those under way finish within the grace or end `abort`."""

    def __init__(self, config: uvicorn.Config, serving: Serving, grace: float) -> None:
        super().__init__(config)
        self._serving = serving
        self._grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._serving.draining = True
        ending = asyncio.get_running_loop().call_later(self._grace, self._serving.abort)
        await super().shutdown(sockets)
        ending.cancel()
        await self._serving.llm.aclose()


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises InvalidOption where that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise InvalidOption(
            f"cannot listen at {host}:{port}: {error}; give another --port or --host"
        ) from error


def server(app: FastAPI, grace: float) -> Server:
    """A server of the app. grace: seconds that answers have when it ends."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(grace + LAST_SECONDS),
        proxy_headers=False,
    )
    return Server(config, app.state.serving, grace)
