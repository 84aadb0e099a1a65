"""What the documents say runs: the README's commands and Python, and CONTRIBUTING's method."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import selfdraft
from selfdraft import cli, drafting

from conftest import TEXT, Run

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    fenced = re.findall(rf"^(`{{3,}}){language}\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    return [block for _, block in fenced]


def commands() -> list[str]:
    lines = "".join(blocks(README, "sh")).replace("\\\n", "").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "git ", "cd "))]


OWN = [line for line in commands() if "./my-" in line]  # a path of its own, from prompts to drafts
SHORT = [  # what a test may take of it
    ("distill", "-n", "12"),
    ("train bita", "--steps", "2", "--batch", "2", "--length", "64", "--anchors", "8"),
    ("generate", "-n", "12"),
    ("verify", "-n", "8", "--seeds", "0", "--prompts", "few.jsonl"),
    ("trajectories", "-n", "12", "--block", "4"),
    ("train cllm", "--steps", "2", "--batch", "2", "--length", "64", "--rank", "4"),
    ("bench", "-n", "8", "--prompts", "1", "--repeats", "1"),
    ("train speed", "--steps", "2", "--batch", "2", "--length", "16"),
    ("verify", "-n", "8", "--seeds", "0", "--prompts", "few.jsonl"),
]


def test_readme_path_from_prompts_to_drafts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(folder)
    rows = [json.dumps({"prompt": TEXT[i : i + 24]}) + "\n" for i in range(0, 60, 6)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    (tmp_path / "few.jsonl").write_text(rows[0])
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(12)))
    assert len(OWN) == len(SHORT)
    for line, (name, *short) in zip(OWN, SHORT, strict=True):
        words = shlex.split(line)[1:]
        assert " ".join(words).startswith(name)
        code, out, err = command(*words, *short)
        assert code == 0, err
        assert out


@pytest.mark.parametrize("line", [x for x in commands() if x.startswith("selfdraft") and x not in OWN])
def test_readme_commands_run(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text("def add(a, b):\n")
    (tmp_path / "old.py").write_text("def add(a, b):\n    return a + b\n")
    short = [] if "info" in line or "--help" in line else ["-n", "12"]
    monkeypatch.setattr(sys, "argv", [*shlex.split(line), *short])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert capsys.readouterr().out


def test_readme_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in commands() if line.startswith("make")]
    assert {"demo", "test"} <= set(targets)
    assert all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_readme_python_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_readme_names_every_method_and_folder() -> None:
    for method in drafting.available():
        assert f"`{method}`" in README
    tree = blocks(README, "text")[-1]
    for path in [*ROOT.glob("src/selfdraft/*.py"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.py")]:
        assert path.name in tree, path.name


def test_contributing_method_drafts(folder: Path) -> None:
    (code,) = blocks((ROOT / "CONTRIBUTING.md").read_text(), "python")
    scope: dict[str, object] = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), scope)
    generator = selfdraft.load(str(folder))
    echo = generator.using(scope["Echo"]())  # type: ignore[operator]
    assert echo.generate("aaa", max_new_tokens=9).ids == generator.generate("aaa", max_new_tokens=9).ids
