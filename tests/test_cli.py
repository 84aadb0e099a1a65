"""The command line as a user meets it: figures, errors in one line, exit codes."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.status import Status

from selfdraft import LLM, Chunk, Completion, Engine
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
    assert len(record["ids"]) == 20
    assert record["ids"] == record["plain"]["ids"]
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


def test_figures_are_of_what_is_known_and_fit_a_terminal(
    command: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --compare there is no speed-up to show; no heading is cut."""
    monkeypatch.setenv("COLUMNS", "80")
    words = ("generate", "def add", "--model", str(folder), "-n", "12")
    alone, compared = command(*words)[1], command(*words, "--compare")[1]
    assert "speed-up" not in alone
    assert "identical" not in alone
    table = [line for line in compared.splitlines() if line[:1] in "┏┃┡│└"]
    assert table
    assert max(map(len, table)) <= 80
    for heading in ("method", "tokens", "forwards", "forward", "tokens/s", "speed-up", "identical"):
        assert heading in compared
    assert "…" not in compared


def test_a_note_where_sampling_has_no_effect(command: Run, folder: Path) -> None:
    words = ("generate", "def", "--model", str(folder), "-n", "3", "--json")
    flags = ("--top-k", "5", "--top-p", "0.9", "--min-p", "0.1", "--seed", "3")
    code, _, err = command(*words, *flags)
    assert code == 0
    assert err.count("note:") == 1
    assert "--top-k, --top-p, --min-p, --seed have no effect at temperature 0" in err
    assert "--seed has no effect" in command(*words, "--seed", "3")[2]
    assert "note:" not in command(*words, *flags, "--temperature", "1")[2]
    assert "note:" not in command(*words)[2]


def test_a_hint_where_the_template_is_left_out(
    command: Run, chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "completion", empty(LLM.completion))
    words = ("generate", "def", "--model", str(chatty), "-n", "1")
    assert "without --raw its chat template is applied" in command(*words, "--raw")[2]
    assert "note:" not in command(*words)[2]


def empty(completion: Callable[..., Completion]) -> Callable[..., Completion]:
    return lambda *given: replace(completion(*given), text="")


def test_what_goes_on_is_said_before_the_first_token(
    command: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Status, "start", lambda self: said.append(str(self.status)))
    update = Status.update

    def note(self: Status, status: str, **given: Any) -> None:
        said.append(status)
        update(self, status, **given)

    monkeypatch.setattr(Status, "update", note)
    command("generate", "def", "--model", str(folder), "-n", "3", "--compare")
    plain = "running plain decoding for comparison"
    assert said == [f"loading {folder}", "measuring step times", plain, "reading the prompt"]
    said.clear()
    command("generate", "def", "--model", str(folder), "-n", "3", "--samples", "2", "--temperature", "1")
    assert said[-1] == "generating 2 answers"


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours(environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    screen = Screen()
    printer(screen)(Chunk([1, 2], "two tokens"))
    assert ("\x1b[" in screen.getvalue()) == coloured


def test_info(command: Run, folder: Path, tmp_path: Path) -> None:
    """Every id that ends a text is shown, also one that config.json alone declares."""
    path = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": [7, 9]}))
    facts = json.loads(command("info", str(path), "--json")[1])
    assert (facts["type"], facts["end-of-text ids"]) == ("llama", [1, 7, 9])
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
        (["--temperature", "nan"], "--temperature must be"),
        (["--temperature", "1e300"], "--temperature must be"),
        (["--presence-penalty", "1e300"], "--presence-penalty must be"),
        (["--logit-bias", "a=b"], "--logit-bias takes ID=VALUE"),
        (["--logit-bias", "400=1"], "--logit-bias: no token id 400"),
        (["--samples", "2"], "--samples 2 needs a --temperature"),
        (["--logprobs", "2"], "--logprobs needs --json"),
        (["--stop", "<|eos|>\n"], "--stop: "),
        (["--eos", "400"], "--eos: no token id 400"),
        (["--eos", "4", "--ignore-eos"], "--eos must be"),
        (["--stop", "a\udc80"], "--stop is not valid UTF-8"),
        (["--system", "a\udc80"], "--system is not valid UTF-8"),
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


def test_a_prompt_that_is_not_utf8(command: Run, folder: Path, tmp_path: Path) -> None:
    """An argument of other bytes reaches Python as lone surrogates, which standard input may hold, too."""
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    for words, stdin in (
        (("caf\udce9",), ""),
        (("-",), "caf\udce9"),
        (("--file", str(tmp_path / "latin1.txt")), ""),
        (("x", "--reference", str(tmp_path / "latin1.txt")), ""),
    ):
        code, out, err = command("generate", *words, "--model", str(folder), stdin=stdin)
        assert (code, out) == (2, "")
        assert len(err.strip().splitlines()) == 1


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
