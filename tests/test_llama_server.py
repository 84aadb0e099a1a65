"""llama.cpp's server as a baseline: its stream becomes steps, and it ends with the bench. A program that
speaks its protocol stands for it; the last test asks the real one, where there is one."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import selfdraft
from selfdraft.bench import arm, peer
from selfdraft.bench.peer import Peer
from selfdraft.errors import PeerFailed, PeerUnavailable

from conftest import VOCABULARY, tiny_llama
from test_peers import counted, said, saved

PROMPT = [5, 6, 7, 8]
SETTINGS = {"model": "m.gguf", "dtype": "float32", "threads": 1, "context": 64, "lookup": 0, "ngram": ""}
SERVER = (
    f"#!{sys.executable}\n"
    + '''
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if sys.argv[1:] == ["--version"]:
    print("version: 7 (abc)")
    sys.exit()
if "--spec-ngram-simple-wrong" in sys.argv:
    sys.exit("error: invalid argument: --spec-ngram-simple-wrong")
open(sys.argv[0] + ".log", "a").write(json.dumps([os.getpid(), *sys.argv[1:]]) + "\\n")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"{}")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.answer(json.dumps({"tokens": [int(x) for x in asked["content"].split()]}).encode())
        self.answer(b"".join(b"data: " + json.dumps(e).encode() + b"\\n\\n" for e in stream(asked)))

    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def stream(asked):
    """Steps of 1, then, with a drafter, of 3 of 5 rows each; a token that 7 divides shows with the next."""
    assert asked["cache_prompt"] is False and asked["top_k"] == 1
    yield {"tokens": [], "content": "", "timings": {}}
    token, made, draft, accepted, held = asked["prompt"][-1], 0, 0, 0, ""
    while made < asked["n_predict"]:
        drafts = made and "--spec-type" in sys.argv
        draft, accepted = draft + 4 * drafts, accepted + 2 * drafts
        for _ in range(3 if drafts else 1):
            token, made = (token * 5 + 1) % 293, made + 1
            held += f" {token}"
            timings = {"prompt_n": len(asked["prompt"]), "predicted_n": made}
            timings |= {"draft_n": draft, "draft_n_accepted": accepted} if draft else {}
            if token % 7 or made >= asked["n_predict"]:
                yield {"tokens": [token], "content": held, "timings": timings}
                held = ""
            if made == asked["n_predict"]:
                return


HTTPServer(("127.0.0.1", int(flags["--port"])), Handler).serve_forever()
'''
)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that speaks the protocol of llama.cpp's server."""
    path = tmp_path / "llama-server"
    path.write_text(SERVER)
    path.chmod(0o755)
    monkeypatch.setenv("SELFDRAFT_LLAMA_SERVER", str(path))
    return path


@pytest.fixture
def made() -> Iterator[Callable[..., Peer]]:
    """Makes peers, and closes them."""
    peers: list[Peer] = []

    def make(ngram: str = "", eos: Sequence[int] = ()) -> Peer:
        settings = {**SETTINGS, "ngram": ngram}
        peers.append(Peer("llama-server", "llama_server", sys.executable, settings, frozenset(eos)))
        return peers[-1]

    yield make
    for one in peers:
        one.close()


def started(server: Path) -> list[list[Any]]:
    """Process and words of each server that was started."""
    return [json.loads(line) for line in Path(f"{server}.log").read_text().splitlines()]


def told(made: Callable[..., Peer]) -> list[tuple[list[int], ...]]:
    return [counted(made(ngram).answer(PROMPT, [], 8)) for ngram in ("", "ngram-simple")]


def test_its_stream_becomes_steps(server: Path, made: Callable[..., Peer]) -> None:
    ids = said(8)
    assert any(token % 7 == 0 for token in ids[:-1])  # one that comes with the next
    assert told(made) == [(ids, [1] * 8, [1] * 8), (ids, [1, 3, 3, 1], [1, 5, 5, 5])]
    (_, *words) = started(server)[-1]
    assert words[words.index("--spec-type") + 1] == "ngram-simple"
    answer = made(eos=[ids[3]]).answer(PROMPT, [], 8)
    assert list(answer.ids) == ids[:4]
    assert answer.peak is not None
    assert answer.peak > 1_000_000


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('1 + told.get("draft_n", 0) - drafted', '1 + told.get("draft_n", 0)'),
        ('told.get("draft_n_accepted", 0) - accepted', 'told.get("draft_n_accepted", 0)'),
        ("                        left -= 1\n", "                        pass\n"),
        ("return tokens if len(tokens) == count else [last] * count", "return [last]"),
        ('(0 if made else told["prompt_n"] - 1)', "0"),
    ],
)
def test_each_fault_of_the_steps_is_seen(
    old: str,
    new: str,
    server: Path,
    made: Callable[..., Peer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = told(made)
    monkeypatch.setattr(peer, "HERE", Path(shutil.copytree(peer.HERE, tmp_path / "peers")))
    source = peer.HERE / "llama_server.py"
    text = source.read_text()
    assert text.count(old) == 1
    source.write_text(text.replace(old, new))
    assert told(made) != right


@pytest.mark.parametrize(
    ("ngram", "servers"), [("", 1), ("ngram-map-k", 1), ("ngram-mod", 3), ("ngram-cache", 3)]
)
def test_no_answer_is_drafted_from_an_earlier_one(
    ngram: str, servers: int, server: Path, made: Callable[..., Peer]
) -> None:
    """Drafters that remember get a new server for each answer."""
    one = made(ngram)
    for _ in range(3):
        one.answer(PROMPT, [], 4)
    assert len(started(server)) == servers


def test_it_ends_with_its_bench(server: Path, made: Callable[..., Peer]) -> None:
    """Whether the bench closes it or is gone."""
    for ends in (Peer.close, lambda one: one.process.process.stdin.close()):
        one = made()
        one.answer(PROMPT, [], 4)
        pid = started(server)[-1][0]
        assert not gone(pid, 0.0)
        ends(one)
        assert gone(pid, 10.0)


def gone(pid: int, seconds: float) -> bool:
    """Whether a process has ended, or does within so many seconds."""
    until = time.monotonic() + seconds
    while True:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)


def test_what_goes_wrong(server: Path, made: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    assert peer.versions(arm.externals(["llama-server"]), {})["llama_server"]["llama-server"] == "7 (abc)"
    with pytest.raises(PeerFailed, match=r"invalid argument.*did not start"):
        made("ngram-simple:wrong=3").answer(PROMPT, [], 4)
    monkeypatch.setenv("SELFDRAFT_LLAMA_SERVER", str(server.parent / "nothing"))
    with pytest.raises(PeerUnavailable, match=r"no program '.*nothing'.*build it .*SELFDRAFT_LLAMA_SERVER="):
        made().answer(PROMPT, [], 4)


@pytest.mark.parametrize("name", ["llama-server", "llama-server-ngram-simple:size-n=2,size-m=4"])
def test_the_real_one_says_what_transformers_says(name: str, folder: Path, tmp_path: Path) -> None:
    wanted = arm.externals([name])
    try:
        peer.versions(wanted, {})
    except PeerUnavailable as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def whole(dtype: torch.dtype) -> transformers.PreTrainedModel:
        """Picks no halves of characters, whose ids a stream does not tell."""
        model = tiny_llama(dtype)
        halves = [token for token in range(VOCABULARY) if "\ufffd" in tokenizer.decode([token])]
        with torch.no_grad():
            model.lm_head.weight[halves] = 0.0
        return model

    source = saved(tmp_path / "tiny", folder, torch.float32, whole)
    llm = selfdraft.LLM(str(source), "plain", dtype="float32")
    prompt = llm.encode("def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n    return")
    plain = arm.drafted([], llm, selfdraft.SamplingParams())[0].answer(prompt, [], 40)
    (engine,) = peer.arms(wanted, {}, str(source), llm, len(prompt) + 40, tmp_path)
    try:
        answer = engine.answer(prompt, [], 40)
    finally:
        engine.close()
    assert list(answer.ids) == list(plain.ids)
    assert answer.rows[0] == 1  # the prompt was read anew
    assert all(run <= rows for run, rows in zip(answer.runs, answer.rows, strict=True))
    assert "ngram" in name or set(answer.runs) == {1}
