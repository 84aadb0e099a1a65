"""Load on a running `selfdraft serve`, whether it grows, and what `prediction` saves on edits.

    python benchmarks/serve.py load --data DIR [--methods auto plain] [--llama-server PROGRAM] [--rounds 2]
    python benchmarks/serve.py soak [--requests 5000]
    python benchmarks/serve.py edits --data DIR --model qwen-coder.gguf [--items 60]

load: n clients, each of which asks again as soon as it is answered, in turn by every method and, on the same
GGUF file, of llama.cpp's `llama-server` with as many slots as clients (--llama-server, or the environment
variable SELFDRAFT_LLAMA_SERVER; with --llama-drafter also with n-gram drafters of its) and of
llama-cpp-python's server (--llama-python), which answers one request at a time. Chats, edits and summaries of
some 450 tokens, greedy; no run finds the prompts of another in the prefix cache. soak: short requests by 16
clients. edits: each edit by plain decoding, and by the method without and with `prediction`, one after
another; answers are kept in --out as they come, and the same command goes on from there. `quoted`: the prompt
holds the function that the prediction repeats. In the other cases it holds a signature. `known`: the
prediction is the body that a person wrote; `again`: the model's answer to the same request before a sentence
was added; `same`: its answer to this very request, which bounds what can be gained. Memory: of all processes
of a server, at its peak (Linux). The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import re
import secrets
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from selfdraft._common import machine
from selfdraft.bench import source, suite
from selfdraft.bench.peers.llama_server import drafting
from selfdraft.bench.stored import gguf_source

SUITES = ("mt_bench", "py_edits", "llma_cnndm")
LONGEST = 2_400
"""Characters of a prompt, at most: some 700 tokens."""
SERVE = "from selfdraft.cli import main; main()"
SLOTS = 64
"""Requests that llama.cpp's server works on at once, at most."""
ROOM = 1_024
"""Tokens of context for each of them."""
COUNTED: dict[str, Any] = {"stream_options": {"include_usage": True}}
ADDED = "Use descriptive names for variables."
"""What the second request of a case `again` says beside the first."""


@dataclass
class Served:
    """A server and where it listens."""

    port: int
    process: subprocess.Popen[str]

    def memory(self, what: str = "VmHWM") -> float:
        """MB of the server's processes: resident now (VmRSS) or at their peaks."""
        return sum(_memory(pid, what) for pid in _tree(self.process.pid)) / 1024


@dataclass
class Answer:
    """One streamed answer; seconds since the request."""

    text: str = ""
    first: float = 0.0
    last: float = 0.0
    chunks: int = 0
    final: Mapping[str, Any] = field(default_factory=dict)
    """`usage` and `selfdraft` of the last chunks."""

    @property
    def tokens(self) -> int:
        """llama-cpp-python's server counts none in a stream: it sends each token alone."""
        return int(self.final["usage"]["completion_tokens"]) if "usage" in self.final else self.chunks


@contextmanager
def selfdraft(model: str, *more: str) -> Iterator[Served]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, "serve", "--model", model, "--alias", "m", "--port", "0", *more],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r":(\d+) \(a page", process.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start")
            yield Served(int(found[1]), process)
        finally:
            process.terminate()


@contextmanager
def llama_server(program: str, model: str, clients: int, drafter: str) -> Iterator[Served]:
    """llama.cpp's server: a slot for each client, continuous batching, its prompt cache, defaults otherwise.
    drafter: as in the names of the bench's baselines; empty: none."""
    slots, threads = min(clients, SLOTS), str(torch.get_num_threads())
    words = [program, "-m", str(gguf_source(model) or model), "-np", str(slots), "-c", str(slots * ROOM)]
    words += ["-t", threads, "-tb", threads, "--cont-batching", *drafting(drafter), "--no-ui", "--offline"]
    with _listening(words, "/health") as served:
        yield served


@contextmanager
def llama_python(python: str, model: str) -> Iterator[Served]:
    """llama-cpp-python's server. Its default ends an answer when another request comes; here that waits."""
    threads = torch.get_num_threads()
    options = {"model": gguf_source(model) or model, "n_threads": threads, "n_ctx": 2048}
    options |= {"n_threads_batch": threads, "interrupt_requests": False, "logits_all": False}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words = [python, "-m", "llama_cpp.server", *words, "--model_alias", "m", "--verbose", "False"]
    with _listening(words, "/v1/models") as served:
        yield served


@contextmanager
def _listening(words: Sequence[str], path: str) -> Iterator[Served]:
    """A server that takes `--port`, once it answers at a path."""
    port, quiet = random.randrange(20_000, 30_000), subprocess.DEVNULL
    with subprocess.Popen([*words, "--port", str(port)], stdout=quiet, stderr=quiet, text=True) as process:
        try:
            _await(f"http://127.0.0.1:{port}{path}", process)
            yield Served(port, process)
        finally:
            process.terminate()


async def ask(port: int, message: str, **body: Any) -> Answer:
    """Stream one chat over a connection of its own."""
    sent = {"model": "m", "messages": [{"role": "user", "content": message}], "stream": True, **body}
    data = json.dumps(sent).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + data)
        answer = Answer()
        async for event in _events(reader):
            _take(answer, event, time.perf_counter() - start)
        return answer
    finally:
        writer.close()
        await writer.wait_closed()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The data of server-sent events, out of a body in chunks. Raises RuntimeError for an error."""
    status = (await reader.readline()).split()[1]
    while (await reader.readline()).strip():
        pass
    if status != b"200":
        raise RuntimeError(f"status {status.decode()}: {(await reader.read()).decode()}")
    held = b""
    while size := int(await reader.readline(), 16):
        held += (await reader.readexactly(size + 2))[:-2]
        *lines, held = held.split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data: ").strip()
            if line.startswith(b"data: ") and data != b"[DONE]":
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                yield event


def _take(answer: Answer, event: Mapping[str, Any], now: float) -> None:
    answer.final = {**answer.final, **{key: event[key] for key in ("usage", "selfdraft") if event.get(key)}}
    text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    if text:
        answer.text += text
        answer.first, answer.last = answer.first or now, now
        answer.chunks += 1


async def crowd(port: int, clients: int, messages: Sequence[str], **body: Any) -> tuple[float, list[Answer]]:
    """Ask all of it by so many clients at once; seconds and answers."""
    answers, left = [Answer()] * len(messages), iter(enumerate(messages))

    async def client() -> None:
        for index, message in left:
            answers[index] = await ask(port, message, **body)

    start = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(clients)])
    return time.perf_counter() - start, answers


def load(asked: argparse.Namespace) -> dict[str, Any]:
    """Figures by number of clients and way."""
    found: dict[str, Any] = {}
    peaks: dict[str, float] = {}
    with selfdraft(asked.model, *asked.serve) as own:
        for clients in asked.clients:
            messages = mixed(asked.data, max(asked.least, clients * asked.each))
            runs: dict[str, list[tuple[float, list[Answer]]]] = {}
            for _ in range(asked.rounds):
                for name in asked.methods:
                    body = {"method": name, "cache_salt": secrets.token_hex(8), **COUNTED}
                    runs.setdefault(name, []).append(_run(own.port, clients, messages, asked.tokens, body))
                for name, (start, body) in _others(asked, clients).items():
                    with start() as other:
                        run = _run(other.port, clients, messages, asked.tokens, body)
                        peaks[name] = max(other.memory(), peaks.get(name, 0.0))
                    runs.setdefault(name, []).append(run)
            texts = [[answer.text for answer in runs[name][0][1]] for name in asked.methods]
            found[str(clients)] = {name: figures(each) for name, each in runs.items()}
            found[str(clients)]["same texts"] = all(each == texts[0] for each in texts)
            for name, each in found[str(clients)].items():
                print(f"{clients:3} clients, {name:12}", each, flush=True)
        found["peak MB"] = {"selfdraft": own.memory(), **peaks}
    return found


def _others(
    asked: argparse.Namespace, clients: int
) -> dict[str, tuple[Callable[[], AbstractContextManager[Served]], dict[str, Any]]]:
    """Other servers: how they are started, for each round anew, since their caches know no salt; and what
    their requests say."""
    found: dict[str, tuple[Callable[[], AbstractContextManager[Served]], dict[str, Any]]] = {}
    if asked.llama_server:
        for drafter in ["", *asked.llama_drafter]:
            name = f"llama-server {drafter}".strip()
            found[name] = partial(llama_server, asked.llama_server, asked.model, clients, drafter), COUNTED
    if asked.llama_python:
        found["llama-cpp-python"] = partial(llama_python, asked.llama_python, asked.model), {}
    return found


def _run(
    port: int, clients: int, messages: Sequence[str], tokens: int, body: Mapping[str, Any]
) -> tuple[float, list[Answer]]:
    return asyncio.run(crowd(port, clients, messages, max_tokens=tokens, temperature=0, **body))


def figures(runs: Sequence[tuple[float, Sequence[Answer]]]) -> dict[str, float]:
    """Of all rounds together."""
    seconds, answers = sum(run[0] for run in runs), [answer for run in runs for answer in run[1]]
    firsts = [answer.first for answer in answers if answer.text]
    each = [(a.last - a.first) / (a.tokens - 1) for a in answers if a.tokens > 1]
    return {
        "requests/s": round(len(answers) / seconds, 3),
        "tokens/s": round(sum(answer.tokens for answer in answers) / seconds, 1),
        "first token p50, s": round(statistics.median(firsts), 3),
        "first token p95, s": round(_quantile(firsts, 0.95), 3),
        "time per token p95, ms": round(1e3 * _quantile(each, 0.95), 2),
    }


def soak(asked: argparse.Namespace) -> dict[str, Any]:
    """Resident memory after each tenth of the requests."""
    draw, sizes, answers = random.Random(0), [], 0
    # The prefix cache fills its memory and stays there: it is small, so that the first tenth does.
    with selfdraft(asked.model, *(asked.serve or ("--kv-memory", "64M"))) as own:
        part = max(1, asked.requests // 10)
        start = time.perf_counter()
        for tenth in range(10):
            words = [" ".join(str(draw.randrange(10**6)) for _ in range(8)) for _ in range(part)]
            _, made = asyncio.run(crowd(own.port, 16, words, max_tokens=8, seed=tenth))
            answers += sum(bool(answer.chunks) for answer in made)
            sizes.append(round(own.memory("VmRSS"), 1))
            print(f"{part * (tenth + 1)} requests: {sizes[-1]} MB", flush=True)
        seconds = time.perf_counter() - start
    grown = round(sizes[-1] - sizes[0], 1)
    return {"MB": sizes, "grew after the first tenth by MB": grown, "answers": answers, "s": seconds}


def edits(asked: argparse.Namespace) -> dict[str, Any]:
    """Plain decoding, the method, and the method with a prediction, by case."""
    rows: dict[str, list[dict[str, Answer]]] = {name: [] for name in asked.cases}
    with selfdraft(asked.model, "--default", "temperature=0", *asked.serve) as own:
        answers = Answers(own.port, asked)
        drawn = [cases(name, asked.data, asked.items, answers) for name in asked.cases]
        for done, group in enumerate(zip(*drawn, strict=False), 1):
            for name, (prompt, text) in zip(asked.cases, group, strict=True):
                prediction = {"prediction": {"type": "content", "content": text}}
                ways = {"plain": {"method": "plain"}, "without": {}, "with": prediction}
                rows[name].append({way: answers.to(prompt, body) for way, body in ways.items()})
            if done in (1, asked.items) or done % 10 == 0:
                found = {name: compared(each) for name, each in rows.items()}
                print("\n".join(f"{name}: {figures}" for name, figures in found.items()), flush=True)
    return found


class Answers:
    """Answers to edits, each measured once: they are read from a file, and kept in it as they come."""

    def __init__(self, port: int, asked: argparse.Namespace) -> None:
        self.port, self.tokens, self.file = port, asked.tokens, Path(asked.out)
        self.about = [asked.model, asked.tokens, asked.serve]
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.known = {key: Answer(**answer) for key, answer in map(json.loads, lines)}

    def to(self, prompt: str, body: Mapping[str, Any]) -> Answer:
        said = json.dumps([*self.about, prompt, body], sort_keys=True)
        key = hashlib.sha256(said.encode()).hexdigest()
        if key not in self.known:
            more = {"cache_salt": secrets.token_hex(8), **COUNTED, **body}
            self.known[key] = asyncio.run(ask(self.port, prompt, max_tokens=self.tokens, **more))
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, asdict(self.known[key])]) + "\n")
        return self.known[key]


def compared(rows: Sequence[Mapping[str, Answer]]) -> dict[str, Any]:
    """Medians over the edits; `decode` is the time from the first token to the last."""
    counts = [row["with"].final["usage"]["completion_tokens_details"] for row in rows]

    def median(way: str, since: str | None = None) -> float:
        times = [row[way].last - (getattr(row[way], since) if since else 0.0) for row in rows]
        return round(statistics.median(times), 3)

    def ratio(way: str) -> float:
        return round(statistics.median(row[way].last / row["with"].last for row in rows), 3)

    return {
        "edits": len(rows),
        "identical": sum(len({answer.text for answer in row.values()}) == 1 for row in rows),
        "median s": {way: median(way) for way in rows[0]},
        "decode, median s": {way: median(way, "first") for way in rows[0]},
        "tokens per forward": {
            way: round(statistics.median(r[way].final["selfdraft"]["tokens_per_forward"] for r in rows), 2)
            for way in rows[0]
        },
        "without / with, median of ratios": ratio("without"),
        "plain / with, median of ratios": ratio("plain"),
        "accepted": sum(count["accepted_prediction_tokens"] for count in counts),
        "rejected": sum(count["rejected_prediction_tokens"] for count in counts),
        "tokens": sum(row["with"].tokens for row in rows),
    }


def cases(name: str, data: str, count: int, answers: Answers) -> Iterator[tuple[str, str]]:
    """Prompts and predictions."""
    kind = suite.named("py_edits")
    if name != "quoted":
        kind = replace(suite.named("py_functions"), references=(suite.Part("response"),))
    items = [item for item in source.from_folder(kind, Path(data)).items if len(item.chat[0]) < LONGEST]
    for item in random.Random(0).sample(items, min(count, len(items))):
        prompt, text = item.chat[0], item.references[0]
        if name == "quoted":
            yield prompt, text
        elif name == "known":
            yield prompt, item.turns[0] + text
        else:
            asked = f"{prompt}\n\n{ADDED}" if name == "again" else prompt
            yield asked, answers.to(prompt, {}).text


def mixed(data: str, count: int) -> list[str]:
    """Prompts of all suites in turn."""
    found = []
    for name in SUITES:
        items = source.from_folder(suite.named(name), Path(data)).items
        found.append([item.chat[0] for item in items if len(item.chat[0]) <= LONGEST])
    return [found[i % len(SUITES)][i // len(SUITES) % 60] for i in range(count)]


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _await(address: str, process: subprocess.Popen[str]) -> None:
    """Wait until a server answers."""
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"no server at {address}")


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return [pid, *(below for child in children for below in _tree(child))]


def _memory(pid: int, what: str) -> int:
    """KB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(rf"^{what}:\s+(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="Other flags go to `selfdraft serve`."
    )
    parser.add_argument("what", choices=["load", "soak", "edits"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="data", help="folder of the benchmark sets")
    parser.add_argument("--methods", nargs="+", default=["auto", "plain"])
    parser.add_argument(
        "--llama-server", default=os.environ.get("SELFDRAFT_LLAMA_SERVER"), help="llama.cpp's program"
    )
    parser.add_argument(
        "--llama-drafter", nargs="+", default=[], help="such as ngram-simple:size-n=4,size-m=16"
    )
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python[server]")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--each", type=int, default=2, help="requests of a client")
    parser.add_argument("--least", type=int, default=12, help="requests of all clients, at least")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--out", default="edits.jsonl", help="file of the answers to edits")
    parser.add_argument("--cases", nargs="+", default=["quoted", "known", "again", "same"])
    asked, asked.serve = parser.parse_known_args()
    found = globals()[asked.what](asked)
    about = {"model": asked.model, "machine": machine.describe(torch.device("cpu")), "asked": vars(asked)}
    print(json.dumps({asked.what: found, **about}))


if __name__ == "__main__":
    main()
