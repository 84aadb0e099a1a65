"""The command line as a user meets it: figures, errors in one line, exit codes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from selfdraft import Chunk, Engine
from selfdraft.cli.paint import printer

from conftest import Run

FIGURES = {
    "model",
    "method",
    "grade",
    "text",
    "tokens",
    "forwards",
    "tokens_per_forward",
    "seconds",
    "tokens_per_second",
    "finish_reason",
}


def test_generate_json(command: Run, folder: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference.txt"
    reference.write_text("def add(a, b):\n    return a + b\n")
    code, out, _ = command(
        *("generate", "def add", "--model", str(folder), "--method", "llma", "--option", "block=6"),
        *("--reference", str(reference), "-n", "20", "--compare", "--json"),
    )
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    assert set(record) >= FIGURES | {"plain", "identical"}
    assert set(record["plain"]) >= FIGURES
    assert record["identical"] is True
    assert record["plain"]["text"] == record["text"]
    assert (record["tokens"], record["method"], record["plain"]["method"]) == (20, "llma", "plain")


def test_generate_takes_every_parameter(command: Run, folder: Path) -> None:
    model = ("--model", str(folder), "-n", "12")
    code, out, _ = command(
        *("generate", "def add", *model, "--json", "--temperature", "0.8", "--seed", "3", "--samples", "2"),
        *("--repetition-penalty", "1.2", "--presence-penalty", "0.1", "--frequency-penalty", "0.1"),
        *("--logit-bias", "5=-inf", "--logit-bias", "6=1.5", "--min-new-tokens", "3", "--ignore-eos"),
        *("--logprobs", "2", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01"),
    )
    assert code == 0
    records = json.loads(out.splitlines()[-1])
    assert [record["sample"] for record in records] == [0, 1]
    assert all(len(record["logprobs"]) == record["tokens"] == 12 for record in records)
    assert all(5 not in [top["token"] for top in record["logprobs"]] for record in records)
    code, out, _ = command("generate", "def add", *model, "--samples", "2", "--temperature", "1")
    assert "--- sample 1" in out
    text = json.loads(command("generate", "def add", *model, "--json")[1].splitlines()[-1])["text"]
    stop = next(char for char in text[2:] if char.isascii())
    record = json.loads(command("generate", "def add", *model, "--json", "--stop", stop)[1].splitlines()[-1])
    assert (record["text"], record["finish_reason"]) == (text[: text.index(stop)], "stop")


def records(out: str) -> Any:
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def chatty(folder: Path, tmp_path: Path) -> Path:
    """The same model with a chat template."""
    made = tmp_path / "chatty"
    shutil.copytree(folder, made)
    (made / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    return made


def test_generate_asks_through_the_chat_template(command: Run, chatty: Path) -> None:
    model = ("--model", str(chatty), "-n", "5", "--json")
    told = records(command("generate", "hello", *model)[1])
    brief = records(command("generate", "hello", *model, "--system", "brief")[1])
    for chat, text in ((told, "[hello]"), (brief, "[brief][hello]")):
        raw = records(command("generate", text, *model, "--raw")[1])
        assert (chat["chat"], raw["chat"]) == (True, False)
        assert chat["prompt_tokens"] == raw["prompt_tokens"] - 1, "no <bos> added"
    code, _, err = command("generate", "hello", *model, "--system", "brief", "--raw")
    assert (code, "--system" in err) == (2, True)


def test_generate_reads_prompts_from_everywhere(command: Run, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("class Stack")
    tail = ("--model", str(folder), "-n", "8", "--temperature", "0.7", "--seed", "5", "--json")
    records = [
        json.loads(command("generate", *words, *tail, stdin="class Stack")[1].splitlines()[-1])
        for words in (("class Stack",), ("--file", str(file)), ("-",), ("class Stack", "--method", "plain"))
    ]
    assert len({record["text"] for record in records}) == 1
    assert all(record["seed"] == 5 for record in records)


def test_generate_for_people(command: Run, folder: Path) -> None:
    code, out, _ = command("generate", "def add", "--model", str(folder), "-n", "12", "--compare")
    assert code == 0
    assert "speed-up" in out
    assert "yes" in out
    assert "base" in out


def test_info(command: Run, folder: Path) -> None:
    assert json.loads(command("info", str(folder), "--json")[1])["type"] == "llama"
    assert "llama" in command("info", str(folder))[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--method", "medusa"], "medusa"),
        (["--option", "block"], "NAME=VALUE"),
        (["--option", "window=3"], "window"),
        (["--adapter", "none"], "none"),
        (["--reference", "no-such-file"], "no-such-file"),
        (["--max-new-tokens", "-1"], "-1"),
        (["--temperature", "nan"], "nan"),
        (["--seed", "-4", "--temperature", "1"], "--seed must be"),
        (["--dtype", "int3"], "int3"),
        (["--file", "also.txt"], "one prompt"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(command: Run, folder: Path, words: list[str], says: str) -> None:
    words = words if "--model" in words else [*words, "--model", str(folder)]
    code, out, err = command("generate", "x", *words)
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err


def test_empty_and_long_prompts(command: Run, folder: Path) -> None:
    for words, stdin in (("",), ""), (("-",), ""), (("-",), "word " * 400), ((), ""):
        code, _, err = command("generate", *words, "--model", str(folder), stdin=stdin)
        assert code == 2
        assert "prompt" in err


def test_unknown_flags_exit_2(command: Run) -> None:
    assert command("generate", "x", "--beams", "4")[0] == 2


def test_ctrl_c_prints_what_there_is(command: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = Engine.step, 0

    def interrupted(self: Engine) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    code, out, _ = command("generate", "def add", "--model", str(folder), "--method", "plain", "--json")
    assert code == 130
    record: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert record["tokens"] == 5
    assert record["finish_reason"] == "cancelled"


def test_text_is_printed_as_it_is() -> None:
    out = io.StringIO()
    show = printer(out)
    for chunk in (Chunk([1, 2], "if x:\n\treturn"), Chunk([3], "\t1\r\f[bold]"), None):
        show(chunk)
    assert out.getvalue() == "if x:\n\treturn\t1\r\f[bold]\n"
