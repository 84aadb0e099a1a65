"""`selfdraft serve` as a command: it announces itself, answers, ends in order, and says what was wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from selfdraft.async_llm import AsyncLLM
from selfdraft.cli.serve import memory
from selfdraft.engine.scheduler import Limits
from selfdraft.errors import InvalidOption

from conftest import Run

MAIN = "from selfdraft.cli import main\nif __name__ == '__main__': main()\n"


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_server_from_its_start_to_its_end(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    words = ["serve", "--model", str(folder), "--alias", "tiny", "--port", "0", "--default", "temperature=0"]
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    env.pop("SELFDRAFT_KERNELS", None)  # the decoder needs no check when it is loaded
    process = subprocess.Popen(
        [sys.executable, str(script), *words], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert process.stdout is not None
        announced = process.stdout.readline()
        address = re.search(r"serves tiny at (http://127\.0\.0\.1:\d+)", announced)
        assert address, announced
        body = json.dumps({"model": "tiny", "prompt": "def add", "max_tokens": 4}).encode()
        request = urllib.request.Request(
            f"{address[1]}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] > 0
        started = children(process.pid)
        assert started
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        deadline = time.monotonic() + 20
        while any(map(alive, started)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(alive, started))
    finally:
        process.kill()
        process.communicate()


def test_a_port_in_use_is_one_line(command: Run, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, err = command("serve", "--model", str(folder), "--port", port)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert port in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kv-memory", "much"), "--kv-memory"),
        (("--earlier-answers", "9" * 20), "earlier_answers"),
        (("--default", "temperatur=1"), "temperatur"),
        (("--default", "temperature=-1"), "temperature"),
        (("--method", "nothing"), "nothing"),
        (("--model", "no/such/folder"), "no/such/folder"),
    ],
)
def test_mistakes_are_one_line(command: Run, folder: Path, words: tuple[str, ...], said: str) -> None:
    model = () if words[0] == "--model" else ("--model", str(folder))
    code, _, err = command("serve", *model, "--port", "0", *words)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_the_engine_is_a_process_that_has_its_grammars(
    command: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def load(model: str, **options: object) -> None:
        asked.update(options)
        raise InvalidOption("not now")

    monkeypatch.setattr(AsyncLLM, "load", load)
    assert command("serve", "--model", str(folder), "--port", "0", "--earlier-answers", "5000")[0] == 2
    assert (asked["process"], asked["grammars"]) == (True, True)
    assert asked["limits"] == Limits(earlier_answers=5000)


def test_sizes_of_memory() -> None:
    assert [memory(text) for text in (None, "1024", "1K", "1.5M", "2GiB")] == [
        None,
        1024,
        1024,
        3 << 19,
        2 << 30,
    ]
    with pytest.raises(InvalidOption):
        memory("0")
