"""llama.cpp's own server, `llama-server`, asked over HTTP: greedy, with an n-gram drafter of its or without.

The program is found by the environment variable SELFDRAFT_LLAMA_SERVER, or as `llama-server` on the path. It
runs with one slot and its own defaults (flash attention where it is faster, keys and values in float16; in
float32 where the other arms compute in that), and every prompt is read anew. `ngram-mod` and `ngram-cache`
remember earlier answers, so for them every answer gets a server that has just started; else a repeated prompt
would be drafted from its own answer.

The server streams token by token, and says with each how many tokens it has drafted and accepted so far,
which makes the steps. Streaming takes it 1 or 2 % of its time.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

NAME = "llama-server"
REMEMBERING = ("ngram-mod", "ngram-cache")
GREEDY = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1}
TOKEN_BY_TOKEN = {"stream": True, "return_tokens": True, "timings_per_token": True}
SPARE = 8
"""Tokens of context that it wants beyond a prompt and its answer."""
PATIENCE = 600.0
"""Seconds in which it has to load a model."""


def program() -> str:
    """Where the server is. Raises FileNotFoundError."""
    asked = os.environ.get("SELFDRAFT_LLAMA_SERVER") or NAME
    found = shutil.which(os.path.expanduser(asked))
    if found is None:
        raise FileNotFoundError(f"no program {asked!r}")
    return found


def versions() -> dict[str, str]:
    """What the program says of itself."""
    said = subprocess.run([program(), "--version"], capture_output=True, text=True, check=True)
    lines = dict(line.split(": ", 1) for line in (said.stderr + said.stdout).splitlines() if ": " in line)
    return {"python": platform.python_version(), NAME: lines.get("version", "unknown")}


def drafting(spelled: str) -> list[str]:
    """Flags of a drafter: `ngram-simple:size-n=4,size-m=16` -> --spec-type and sizes."""
    kind, _, sizes = spelled.partition(":")
    pairs = [one.split("=") for one in sizes.split(",") if one]
    return [
        *(("--spec-type", kind) if kind else ()),
        *(w for k, v in pairs for w in (f"--spec-{kind}-{k}", v)),
    ]


class Engine:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.forgets = settings["ngram"].partition(":")[0] not in REMEMBERING
        threads = str(settings["threads"])
        self.words = [program(), "--model", settings["model"], "--parallel", "1", "--no-ui", "--offline"]
        self.words += ["--ctx-size", str(settings["context"] + SPARE), "--log-verbosity", "2"]
        self.words += ["--threads", threads, "--threads-batch", threads, *drafting(settings["ngram"])]
        if settings["dtype"] == "float32":
            self.words += ["--cache-type-k", "f32", "--cache-type-v", "f32"]
        self.used = False
        self._start()

    def prepare(self) -> int:
        """Be ready for an answer; the process that will make it."""
        if self.used and not self.forgets:
            self.process.kill()
            self.process.wait()
            self._start()
        self.used = True
        return self.process.pid

    def _start(self) -> None:
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen([*self.words, "--port", str(self.port)], stdin=subprocess.DEVNULL)
        until = time.monotonic() + PATIENCE
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{NAME} did not start (code {self.process.poll()})")
            time.sleep(0.02)

    def _healthy(self) -> bool:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
        except OSError:
            return False

    def steps(self, prompt: list[int], length: int, eos: list[int]) -> Iterator[tuple[list[int], int]]:
        """Token by token. The tokens of a step come one after another, the first with the step's rows."""
        asked = {"prompt": prompt, "n_predict": length, "cache_prompt": False, **GREEDY}
        made = drafted = accepted = left = 0  # left: accepted tokens of this step that have not come yet
        with self._posted("/completion", {**asked, **TOKEN_BY_TOKEN}) as response:
            for event in events(response):
                told = event["timings"]
                for token in self._tokens(event, told["predicted_n"] - made):
                    rows = 0
                    if left:
                        left -= 1
                    else:
                        rows = 1 + told.get("draft_n", 0) - drafted + (0 if made else told["prompt_n"] - 1)
                        left = told.get("draft_n_accepted", 0) - accepted
                        drafted, accepted = told.get("draft_n", 0), told.get("draft_n_accepted", 0)
                    made += 1
                    yield [token], rows

    def _tokens(self, event: dict[str, Any], count: int) -> list[int]:
        """The tokens of an event. It names the last one only, also where several make up one character; those
        before it are read from the text, or the last one stands for them."""
        (last,) = event["tokens"]
        if count == 1:
            return [last]
        with self._posted("/tokenize", {"content": event["content"]}) as response:
            tokens: list[int] = json.load(response)["tokens"]
        return tokens if len(tokens) == count else [last] * count

    @contextmanager
    def _posted(self, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """Its response. Raises RuntimeError for an error."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)) as connection:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{NAME}: status {response.status}: {response.read().decode()}")
            yield response


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Those of a stream that bring tokens."""
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if line.startswith(b"data: ") and data != b"[DONE]":
            event = json.loads(data)
            if "timings" not in event:
                raise RuntimeError(f"{NAME} wrote {data.decode():.200}")
            if event.get("tokens"):
                yield event
