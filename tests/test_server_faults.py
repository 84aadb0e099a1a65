"""Faults through a running server: each ends its own request with the right error, and no other notices."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from selfdraft.async_llm import AsyncLLM, Process
from selfdraft.engine.request import Request
from selfdraft.errors import DraftError
from selfdraft.server import run
from serving import Running, served

from conftest import TEXT, tiny_llama

COMPLETIONS = "/v1/completions"
BAD = 300
"""The token whose embedding is not a number; texts do not hold it."""
METHODS = """
from dataclasses import dataclass

from selfdraft import Tree


@dataclass(frozen=True)
class NoDrafter:
    def drafter(self, context):
        raise RuntimeError("no drafter")


@dataclass(frozen=True)
class Failing:
    at: str

    def drafter(self, context):
        return FailingDrafter(self.at)


class FailingDrafter:
    def __init__(self, at):
        self.at, self.steps = at, 0

    def propose(self, tokens):
        if self.steps < 3:
            return Tree.chain([tokens[-1]])
        if self.at == "propose":
            raise RuntimeError("propose failed")
        return "no tree" if self.at == "tree" else Tree.chain([tokens[-1]])

    def observe(self, step):
        self.steps += 1
        if self.at == "observe" and self.steps > 3:
            raise KeyError("observe failed")


def Propose():
    return Failing("propose")


def NoTree():
    return Failing("tree")


def Observe():
    return Failing("observe")
"""
ERRORS = {
    "no-drafter": ("DraftError", "no drafter"),
    "bad-propose": ("DraftError", "propose failed"),
    "bad-tree": ("InvalidTree", "must return a Tree"),
    "bad-observe": ("DraftError", "observe failed"),
}
"""Methods of a package of others -> the error's code, and what its message says."""


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as made:
        yield made


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, patch: pytest.MonkeyPatch
) -> Iterator[Running]:
    """A server as `selfdraft serve` has it: the engine is a process of its own. One token
    of the model is broken, and methods that fail are installed."""
    packages = tmp_path_factory.mktemp("packages")
    (packages / "failing.py").write_text(METHODS)
    info = packages / "failing-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: failing\nVersion: 1\n")
    named = zip(ERRORS, ("NoDrafter", "Propose", "NoTree", "Observe"), strict=True)
    lines = [f"{name} = failing:{made}" for name, made in named]
    (info / "entry_points.txt").write_text("\n".join(["[selfdraft.methods]", *lines]))
    patch.setattr(sys, "path", [str(packages), *sys.path])  # a process that is spawned gets the same
    patch.delenv("SELFDRAFT_KERNELS")
    folder = tmp_path_factory.mktemp("models") / "broken"
    model = tiny_llama(torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    never = {"logit_bias": {BAD: -100.0}}
    with served(AsyncLLM.load(str(folder), process=True), names=("tiny",), sampling=never) as it:
        yield it


def neighbour(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    start = draw.randrange(len(TEXT) - 40)
    return {
        "model": "tiny",
        "prompt": TEXT[start : start + 30],
        "max_tokens": 60,
        "ignore_eos": True,
        "temperature": draw.choice([0, 0.8]),
        "seed": seed,
    }


def test_small_packets_are_sent_at_once(running: Running) -> None:
    with connect(running) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(100)
        for each in running.server.server_state.connections:
            served_by = each.transport.get_extra_info("socket")
            assert served_by.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def unharmed(running: Running, fault: Callable[[], None], times: int = 3) -> bool:
    """True if requests that run beside a fault have the texts that they have alone, and so has one after
    it."""

    def text(seed: int) -> str:
        answer: str = running.post(COMPLETIONS, **neighbour(seed))["choices"][0]["text"]
        return answer

    alone = [text(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(text, seed) for seed in range(4)]
        for _ in range(times):
            fault()
        together = [each.result() for each in beside]
    return alone == together and text(0) == alone[0]


@pytest.mark.parametrize("method", ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_method_that_fails(running: Running, method: str, stream: bool) -> None:
    code, said = ERRORS[method]

    def fault() -> None:
        asked = {**neighbour(9), "method": method}
        if stream and method != "no-drafter":  # it fails in the fourth step, when the answer has begun
            *events, failed, done = running.events(COMPLETIONS, **asked)
            assert events
            assert done == "[DONE]"
        else:
            status, failed, _ = running.request("POST", COMPLETIONS, {**asked, "stream": stream})
            assert status == 500
        assert (failed["error"]["code"], failed["error"]["type"]) == (code, "server_error")
        assert said in failed["error"]["message"]

    assert unharmed(running, fault)


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_that_is_not_a_number(running: Running, stream: bool) -> None:
    def fault() -> None:
        for prompt in ([5, 6, BAD], [BAD, *range(5, 40)]):
            asked = {"model": "tiny", "prompt": prompt, "stream": stream, "logprobs": 2}
            status, failed, _ = running.request("POST", COMPLETIONS, asked)
            assert (status, failed["error"]["code"]) == (500, "NotFinite")

    assert unharmed(running, fault)


def test_a_token_that_is_not_a_number_in_an_answer(running: Running) -> None:
    """The model chooses it: the step after has no pick. The part before it has been sent."""
    asked = {**neighbour(9), "logit_bias": {str(BAD): 100}, "logprobs": 2}
    *_, failed, done = running.events(COMPLETIONS, **asked)
    assert (failed["error"]["code"], done) == ("NotFinite", "[DONE]")
    assert unharmed(running, lambda: None)


def test_a_fault_that_reaches_its_neighbours_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a request that fails ends those beside it."""
    fail = Request.fail
    with served(AsyncLLM.load(str(folder)), names=("tiny",)) as running:
        engine = running.serving.llm._runner._loop.llm.engine  # type: ignore[union-attr]

        def fail_all(self: Request, error: Any) -> None:
            for request in engine.scheduler.running:
                fail(request, error)

        monkeypatch.setattr(Request, "fail", fail_all)
        monkeypatch.setattr(Request, "propose", _slow(Request.propose))

        def fault() -> None:
            time.sleep(0.05)
            running.request("POST", COMPLETIONS, {**neighbour(9), "method": "plain", "prompt": "fail"})

        with pytest.raises(AssertionError):
            unharmed(running, fault)


def _slow(propose: Any) -> Any:
    def slow(self: Request) -> Any:
        time.sleep(0.002)
        if len(self.prompt) < 8:
            raise DraftError("as planted")
        return propose(self)

    return slow


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_killed_engine_is_started_again(running: Running) -> None:
    runner = running.serving.llm._runner
    assert isinstance(runner, Process)
    alone = running.post(COMPLETIONS, **neighbour(1))["choices"]
    with ThreadPoolExecutor(1) as pool:
        asked = {**neighbour(2), "max_tokens": 200, "n": 8}
        under_way = pool.submit(running.request, "POST", COMPLETIONS, asked)
        while not running.serving.llm.stats.running:
            time.sleep(0.005)
        os.kill(runner._process.pid or 0, signal.SIGKILL)
        status, failed, _ = under_way.result(10)
    assert (status, failed["error"]["code"]) == (503, "engine_closed")
    deadline = time.monotonic() + 60
    while (answer := running.request("POST", COMPLETIONS, neighbour(1)))[0] == 503:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert answer[0] == 200
    assert answer[1]["choices"] == alone


def connect(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=20)


def closed(connection: socket.socket) -> bool:
    """True if the other end closes it, maybe after an answer."""
    with connection, suppress(ConnectionError):
        try:
            while connection.recv(65536):
                pass
        except TimeoutError:
            return False
    return True


def test_heads_that_come_byte_by_byte(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow-loris: a byte now and then does not buy more time."""
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.4)
    late = [connect(running) for _ in range(50)]

    def drip() -> None:
        for connection in late:
            with suppress(ConnectionError):  # it has been closed
                connection.sendall(b"G")
        time.sleep(0.15)

    assert unharmed(running, drip, 4)
    assert all([closed(connection) for connection in late])


def test_sockets_that_are_half_open(running: Running) -> None:
    """Clients that stop sending, never read, or vanish with a reset."""
    data = json.dumps({**neighbour(3), "max_tokens": 200, "n": 4, "stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    left: list[socket.socket] = []

    def fault() -> None:
        for sent, how in ((head + data, "stop"), (head + data[:9], "stop"), (head + data, "reset")):
            connection = connect(running)
            connection.sendall(sent)
            if how == "stop":
                connection.shutdown(socket.SHUT_WR)
                left.append(connection)
            else:
                time.sleep(0.02)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                connection.close()

    assert unharmed(running, fault)
    assert all([closed(connection) for connection in left])
    deadline = time.monotonic() + 10
    while running.serving.llm.stats.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running.serving.llm.stats.running, "they hold nothing"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_ten_megabytes(running: Running, chunked: bool) -> None:
    def fault() -> None:
        connection = HTTPConnection("127.0.0.1", running.port, timeout=20)
        parts = (b'{"model": "tiny", "prompt": "', *[b"a" * 2**20] * 10, b'"}')
        headers = {} if chunked else {"Content-Length": str(sum(map(len, parts)))}
        with suppress(ConnectionError):  # it is refused before it was sent whole
            connection.request("POST", COMPLETIONS, iter(parts), headers, encode_chunked=chunked)
        response = connection.getresponse()
        assert (response.status, json.load(response)["error"]["code"]) == (413, "body_too_large")
        connection.close()

    assert unharmed(running, fault, 1)


def random_json(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(5 if depth > 2 else 7)
    if kind == 6:
        return {draw.choice(KEYS): random_json(draw, depth + 1) for _ in range(draw.randrange(4))}
    if kind == 5:
        return [random_json(draw, depth + 1) for _ in range(draw.randrange(4))]
    return (None, draw.random() < 0.5, draw.randint(-3, 10**6), draw.gauss(0, 9), draw.choice(KEYS))[kind]


KEYS = [
    "messages",
    "prompt",
    "content",
    "role",
    "n",
    "stop",
    "tools",
    "type",
    "\ud800",
    "\x00",
    "",
    "a" * 300,
]


def test_a_thousand_random_bodies(running: Running) -> None:
    """JSON of all shapes, whole objects and single bytes changed, to every endpoint."""
    draw = random.Random(7)
    paths = ["/v1/chat/completions", COMPLETIONS, "/v1/responses", "/tokenize", "/detokenize"]
    base = {"model": "tiny", "prompt": "a", "input": "a", "tokens": [5], "messages": []}

    def body() -> bytes:
        if draw.random() < 0.3:
            return json.dumps(random_json(draw)).encode()
        changed = base | {draw.choice([*KEYS, *base]): random_json(draw) for _ in range(draw.randrange(3))}
        data = bytearray(json.dumps({k: v for k, v in changed.items() if draw.random() < 0.9}).encode())
        if draw.random() < 0.3:
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data[:-1]) + b', "max_tokens": 2, "max_output_tokens": 2}'

    def fault() -> None:
        connection = HTTPConnection("127.0.0.1", running.port, timeout=20)
        for _ in range(500):
            sent = body()
            connection.request("POST", draw.choice(paths), sent, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            assert response.status in (200, 400, 404), (sent, answer)
            assert response.status == 200 or set(answer["error"]) >= {"message", "type", "param", "code"}
        connection.close()

    assert unharmed(running, fault, 2)
