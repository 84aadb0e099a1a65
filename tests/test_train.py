"""From prompts to an adapter that drafts, by the command line alone; and what it says when it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import TEXT, Run

SMALL = (
    "--steps",
    "6",
    "--every",
    "3",
    "--batch",
    "2",
    "--length",
    "64",
    "--anchors",
    "8",
    "--sampler-head",
    "8",
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": TEXT[i : i + 24]} for i in range(0, 96, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def answers(command: Run, folder: Path, prompts: Path, tmp_path: Path) -> Path:
    out = tmp_path / "answers"
    words = ("--prompts", str(prompts), "--model", str(folder), "--out", str(out), "-n", "24")
    assert command("distill", *words)[0] == 0
    return out


def train(
    command: Run, method: str, folder: Path, answers: Path, out: Path, *more: str
) -> tuple[int, str, str]:
    words = ("--model", str(folder), "--data", str(answers), "--out", str(out))
    return command("train", method, *words, *SMALL, *more)


@pytest.mark.parametrize(
    ("method", "more"),
    [("bita", ("--prefix", "4", "--loss", "tokens")), ("space", ("--rank", "4", "--target", "q_proj"))],
)
def test_from_prompts_to_drafts(
    command: Run, folder: Path, answers: Path, tmp_path: Path, method: str, more: tuple[str, ...]
) -> None:
    out = tmp_path / "adapter"
    code, said, err = train(command, method, folder, answers, out, *more, "--json")
    assert code == 0, err
    about = json.loads(said.splitlines()[-1])
    assert len(about["accuracy"]) == (3 if method == "bita" else 4)
    assert 0 < about["share"] < 0.2
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "acceptance.png",
        "run.json",
    }
    assert json.loads((out / "run.json").read_text())["starts"][0]["argv"][1] == "train"
    card = (out / "README.md").read_text()
    assert "lossless to the **base** weights" in card
    assert f"{about['trained']:,} parameters" in card

    words = ("--model", str(folder), "--method", method, "--adapter", str(out))
    code, said, _ = command("generate", "def add", *words, "-n", "16", "--compare", "--json")
    assert code == 0
    assert json.loads(said.splitlines()[-1])["identical"] is True

    again = json.loads(train(command, method, folder, answers, out, *more, "--json")[1].splitlines()[-1])
    assert again["accuracy"] == about["accuracy"]  # nothing was left to train


def test_verify_finds_an_adapter_exact(
    command: Run, folder: Path, answers: Path, tmp_path: Path, prompts: Path
) -> None:
    out = tmp_path / "adapter"
    assert train(command, "bita", folder, answers, out)[0] == 0
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts.read_text().splitlines(keepends=True)[:2]))
    words = ("--model", str(folder), "--method", "bita", "--adapter", str(out), "--prompts", str(few))
    code, said, _ = command("verify", *words, "-n", "12", "--seeds", "1", "--json")
    assert code == 0
    assert json.loads(said.splitlines()[-1])["verdict"] == "exact"


def test_an_adapter_goes_on_in_its_own_shape(
    command: Run, folder: Path, answers: Path, tmp_path: Path
) -> None:
    """Options that would give another one are not what the run, its log and its card are about."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(command, "space", folder, answers, first, "--masks", "2", "--rank", "3")[0] == 0
    code, said, err = train(command, "space", folder, answers, second, "--start", str(first), "--json")
    assert code == 0, err
    assert len(json.loads(said.splitlines()[-1])["accuracy"]) == 2
    card = (second / "README.md").read_text()
    assert "with 2 mask tokens" in card
    assert "LoRA of rank 3, gated" in card
    assert "It was trained further from an earlier adapter" in card


def test_another_run_is_not_continued(command: Run, folder: Path, answers: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    assert train(command, "bita", folder, answers, out)[0] == 0
    code, _, err = train(command, "bita", folder, answers, out, "--masks", "2")
    assert code == 2
    assert "masks" in err
    assert "another run" in err


def test_mistakes_are_named(command: Run, folder: Path, answers: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    for more, says in (
        (("--masks", "0"), "masks"),
        (("--decay", "0"), "decay"),
        (("--loss", "focal"), "'distill' or 'tokens'"),
        (("--rank", "4", "--target", "wqkv"), "wqkv"),
    ):
        code, _, err = train(command, "space", folder, answers, out, *more)
        assert code == 2, more
        assert says in err
    code, _, err = train(command, "bita", folder, tmp_path / "nothing", out)
    assert code == 2
    assert "nothing" in err
    other = tmp_path / "other"
    shutil.copytree(answers, other)
    held = json.loads((other / "distill.json").read_text())
    held["asked"]["fingerprint"] = "0" * 64
    (other / "distill.json").write_text(json.dumps(held))
    code, _, err = train(command, "bita", folder, other, out)
    assert code == 2
    assert "distill from the model itself" in err
    (answers / "shard-00000.jsonl").write_text("")
    code, _, err = train(command, "bita", folder, answers, out)
    assert code == 2
    assert "empty" in err
