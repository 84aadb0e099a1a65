"""scripts/training_prompts.py: a mix of all kinds, short enough, from which whole domains are held out."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from selfdraft import LLM

import runs

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
PROSE = "\n\n".join(
    f"The {word} is a thing that many people know, and some do not. " * 5 for word in ("cat", "dog")
)
CODE = "\n".join(f"def function_{i}(a, b):\n" + "    a += b\n" * 30 for i in range(8))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return runs.script("scripts/training_prompts.py")


@pytest.fixture(scope="module")
def chat_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "chat"
    shutil.copytree(folder, path)
    tokenizer = LLM(str(folder), "plain").tokenizer
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of the shapes that the script reads, each with its own words."""
    path = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (path / name).parent.mkdir(exist_ok=True)
        with gzip.open(path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    pairs = ("py_functions", "py_edits", "gsm8k_train", "openstax_qa", "neetcode_explain", "tldr_commands")
    for name in (*pairs, "wikisql_train", "spider_train"):
        write(name, [{"prompt": f"A question of {name}, number {i}?"} for i in range(40)])
    for name in ("sgd_train", "taskmaster4"):
        turns = ["User: One tea, please.", "Assistant: With milk?", "User: No."]
        write(name, [{"turns": [f"{turn} {name} {i}" for turn in turns]} for i in range(40)])
    write("py_code_educational", [{"text": CODE}] * 20)
    for name in ("openstax_biology", "openstax_psychology", "docs_pip"):
        write(
            f"text/{name}", [{"text": f"A {name[-5:]} title {i}\n\n{name} {i}: {PROSE}"} for i in range(20)]
        )
    return path


def made(
    script: ModuleType, data: Path, model: Path, out: Path, *more: str
) -> dict[str, list[dict[str, Any]]]:
    words = [
        "--data",
        str(data),
        "--out",
        str(out),
        "--model",
        str(model),
        "--count",
        "200",
        "--longest",
        "900",
        *more,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["training_prompts.py", *words])
        script.main()
    names = ("train", "held_out")
    return {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in names
    }


def mixed(script: ModuleType, data: Path, model: Path, out: Path) -> None:
    found = made(script, data, model, out)
    kinds = Counter(row["kind"] for row in found["train"])
    assert len(kinds) == 13
    assert max(kinds.values()) == kinds["worked problem"]
    llm = LLM(str(model), "plain")
    for row in found["train"] + found["held_out"]:
        assert row["messages"][-1]["role"] == "user"
        assert len(llm.prompt_ids(None, row["messages"])) <= 900
    texts = {name: json.dumps([row["messages"] for row in rows]) for name, rows in found.items()}
    for name in ("spider_train", "taskmaster4", "psychology"):
        assert name in texts["held_out"]
        assert name not in texts["train"]


def test_prompts_are_mixed_and_domains_are_held_out(
    script: ModuleType, data: Path, chat_folder: Path, tmp_path: Path
) -> None:
    mixed(script, data, chat_folder, tmp_path / "one")
    made(script, data, chat_folder, tmp_path / "two")
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_model_writes_prompts_of_its_own(
    script: ModuleType, data: Path, chat_folder: Path, tmp_path: Path
) -> None:
    """It goes on from the template's opening; what it does not end is left out."""
    made(script, data, chat_folder, tmp_path)
    openings = [json.loads(line) for line in (tmp_path / "openings.jsonl").read_text().splitlines()]
    assert openings == [{"prompt": "user: "}] * 40
    llm, folder = LLM(str(chat_folder), "plain"), tmp_path / "written"
    folder.mkdir()
    texts = {"return a + b": "eos", "def push(self": "length"}
    rows = [{"answer": llm.encode(text, special=False), "finish_reason": why} for text, why in texts.items()]
    (folder / "shard-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = made(script, data, chat_folder, tmp_path, "--written", str(folder))["train"]
    own = [row["messages"] for row in found if row["kind"] == "the model's own"]
    assert own == [[{"role": "user", "content": "return a + b"}]]


def test_a_text_that_is_not_held_out_is_seen(
    script: ModuleType, data: Path, chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "HELD_OUT_TEXTS", ("docs_pip",))
    with pytest.raises(AssertionError):
        mixed(script, data, chat_folder, tmp_path)
