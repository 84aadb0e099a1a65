"""From prompts to an adapter that drafts, by the command line alone; and what it says when it cannot."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from selfdraft.cli.train import BITA, CLLM, SPACE_TUNED

from conftest import TEXT, Run

pytestmark = pytest.mark.usefixtures("short_answers")
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


def published_flags(about: str) -> list[str]:
    """The options that a command's help names as the published training."""
    found = re.search(r"published\s+training\s+is\s+`([^`]+)`", about)
    assert found is not None
    return found[1].split()


def trains_as_published(
    command: Run, method: str, folder: Path, prompts: Path, tmp_path: Path, *more: str
) -> None:
    """With the options that the help names nothing differs; with one more the card says what."""
    data, make = tmp_path / "data", "trajectories" if method == "cllm" else "distill"
    words = ["--prompts", str(prompts), "--model", str(folder), "--out", str(data), "-n", "24"]
    words += ["--greedy-share", "1"] if method != "space-tuned" else []
    words += ["--block", "8"] if method == "cllm" else []
    assert command(make, *words)[0] == 0
    flags = published_flags({"bita": BITA, "space-tuned": SPACE_TUNED, "cllm": CLLM}[method])
    out, small = tmp_path / "out", SMALL[:8]
    words = ["--model", str(folder), "--data", str(data), "--out", str(out), *small, *flags, *more]
    code, _, err = command("train", method, *words)
    assert code == 0, err
    assert "The settings of the training are the published ones." in (out / "README.md").read_text()


@pytest.mark.parametrize("method", ["bita", "space-tuned", "cllm"])
def test_the_published_training_is_what_the_help_says(
    command: Run, folder: Path, prompts: Path, tmp_path: Path, method: str
) -> None:
    trains_as_published(command, method, folder, prompts, tmp_path)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("bita", ("--sampler-head", "8")),
        ("space-tuned", ("--anchors", "2")),
        ("cllm", ("--smoothing", "0")),
    ],
)
def test_another_training_is_not_called_published(
    command: Run, folder: Path, prompts: Path, tmp_path: Path, method: str, more: tuple[str, str]
) -> None:
    with pytest.raises(AssertionError):
        trains_as_published(command, method, folder, prompts, tmp_path, *more)
    field = {"--sampler-head": "sampler", "--anchors": "anchors", "--smoothing": "smoothing"}[more[0]]
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(rf"The training is not the published one: \w+\.{field} [\d.]+ \(published: ", card)


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
