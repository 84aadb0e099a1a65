"""`selfdraft chat`: turns and commands, on standard input."""

from __future__ import annotations

from pathlib import Path

from conftest import TEXT, Run


def test_turns_and_commands(command: Run, chatty: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text(TEXT)
    lines = [
        "def add",
        f"/reference {notes}",
        "/reset",
        "def add",
        "/stats",
        "/method plain",
        "/reset",
        "def add",
    ]
    model = ("--model", str(chatty), "-n", "12", "--seed", "3", "--temperature", "0.7")
    code, out, err = command("chat", *model, stdin="\n".join([*lines, "/stats", "/quit", "never"]))
    assert code == 0
    assert "commands" in err
    first, second, third = _answers(out)
    assert first == second == third != ""
    assert "auto" in out
    assert "plain" in out


def _answers(out: str) -> list[str]:
    """The answers between the tables of figures."""
    before, _, rest = out.partition("┏")
    middle = rest.rpartition("┏")[0].rpartition("weights.\n")[2]
    size = len(before) // 2
    return [before[:size], before[size:], middle]


def test_mistakes_are_told_and_the_talk_goes_on(command: Run, chatty: Path) -> None:
    lines = ["/method nothing", "/reference no/such/file", "/stats", "/what", "", "a"]
    code, out, err = command("chat", "--model", str(chatty), "-n", "4", stdin="\n".join(lines))
    assert code == 0
    assert "no method 'nothing'" in err
    assert "no/such/file" in err
    assert "no answer yet" in err
    assert "/reference FILE" in err
    assert out.strip()


def test_a_model_without_a_template_is_refused(command: Run, folder: Path) -> None:
    code, _, err = command("chat", "--model", str(folder))
    assert code == 2
    assert "has no chat template" in err
