"""A server of a tiny model in a thread, and requests to it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from fastapi import FastAPI

from selfdraft.server import run
from selfdraft.server.app import create_app
from selfdraft.server.serving import Options, Serving

TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }}{% endfor %}</tools>"
    '<tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}'
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking %}<think>{% else %}{# <think></think> #}{% endif %}"
    "{% endif %}"
)


@dataclass
class Running:
    """A server that runs."""

    port: int
    serving: Serving
    server: run.Server
    app: FastAPI

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers. body: bytes as they are, anything else as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            text = response.read()
            kind = response.getheader("content-type", "")
            shown = json.loads(text) if kind.startswith("application/json") else text.decode()
            return response.status, shown, {k.lower(): v for k, v in response.getheaders()}
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a request that must succeed."""
        status, answer, _ = self.request("POST", path, {"model": self.serving.names[0], **body})
        assert status == 200, answer
        return answer

    def events(self, path: str, **body: Any) -> list[Any]:
        """The data of a streamed answer's events; the last one is `[DONE]` where the API says so."""
        status, text, _ = self.request("POST", path, {"model": self.serving.names[0], **body, "stream": True})
        assert status == 200, text
        lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def open(self, path: str, **body: Any) -> socket.socket:
        """A socket on which a request was sent and nothing was read."""
        data = json.dumps({"model": self.serving.names[0], **body}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection


@contextmanager
def served(llm: Any, grace: float = 1.0, **options: Any) -> Iterator[Running]:
    """Serve a model until the block ends."""
    listening = run.bind("127.0.0.1", 0)
    app = create_app(llm, Options(**options))
    server = run.server(app, grace)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        yield Running(listening.getsockname()[1], app.state.serving, server, app)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
