"""The snippets of docs/serving.md run against a server, as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from selfdraft import LLM, AsyncLLM
from serving import TEMPLATE, Running, served

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    llm = LLM(str(folder))
    llm.tokenizer.chat_template = TEMPLATE
    with served(AsyncLLM.load(llm), names=("smollm2",)) as it:
        yield it


def snippets(language: str, running: Running) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert found
    return [code.replace(ADDRESS, f"http://127.0.0.1:{running.port}") for code in found]


def test_curl(running: Running) -> None:
    for code in snippets("bash", running):
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert '"finish_reason"' in done.stdout


def test_python(running: Running) -> None:
    for code in snippets("python", running):
        package = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)[0]
        if subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True).returncode:
            continue  # of the clients, openai alone comes with the extra dev
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_the_page_names_what_there_is(running: Running) -> None:
    _, page, _ = running.request("GET", "/openapi.json")
    for path in page["paths"]:
        assert path.removeprefix("/v1").split("/{")[0] in PAGE
    flags = set(re.findall(r"(--[a-z][a-z-]+)", PAGE))
    help = subprocess.run(
        [sys.executable, "-c", "from selfdraft.cli import main; main()", "serve", "--help"],
        capture_output=True,
        text=True,
        env={"COLUMNS": "200", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        check=True,
    ).stdout
    assert {flag for flag in flags if flag not in help} == set()
