"""Answers to train on: the same rows however they were made, resumed as if never stopped, never a bad one."""

from __future__ import annotations

import ast
import copy
import gzip
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import selfdraft
from selfdraft import LLM, SamplingParams
from selfdraft._common.repetition import fresh
from selfdraft.errors import InvalidOption, TrainingDataError
from selfdraft.train import shards
from selfdraft.train.distill import Distillation, Progress, Recipe, asked
from selfdraft.train.prompts import Prompts
from selfdraft.train.shards import MANIFEST, Row, Shards

from conftest import Run, tiny_llama

TEXTS = [f"def f{i}(a, b):\n    return a {'+' * (i % 3 + 1)} b  # {'x' * i}\n" for i in range(9)]
POSIX = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog"}
RECIPE = Recipe(max_new_tokens=40, greedy_share=0.4, seed=3)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def llm(tokenizer: PreTrainedTokenizerFast) -> LLM:
    return tiny(torch.bfloat16, tokenizer)


def tiny(dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast) -> LLM:
    made = LLM(tiny_llama(dtype), "plain", tokenizer=tokenizer)
    made.name = "tiny"
    return made


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return lines(tmp_path / "prompts.jsonl", *({"prompt": text, "form": "code"} for text in TEXTS))


Tell = Callable[[Progress], None]


def distil(
    llm: LLM,
    file: str,
    out: Path,
    recipe: Recipe = RECIPE,
    tell: Tell | None = None,
    **how: Any,
) -> list[dict[str, Any]]:
    """The rows of a run, by index."""
    prompts = Prompts([file])
    kept = Shards(out, asked(llm, prompts, recipe), how.pop("shard", 4))
    try:
        Distillation(llm, prompts, recipe, kept, **how).run(tell or (lambda progress: None))
    finally:
        kept.close()
    return rows(out)


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for path in shards.shards(out) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda row: row["index"])


def after(count: int, error: BaseException) -> Tell:
    def tell(progress: Progress) -> None:
        if progress.rows == count:
            raise error

    return tell


def test_rows_do_not_depend_on_what_runs_beside_them(llm: LLM, file: str, tmp_path: Path) -> None:
    alone = distil(llm, file, tmp_path / "alone", batch=1)
    assert [row["index"] for row in alone] == list(range(9))
    assert {row["temperature"] for row in alone} == {0.0, 0.8}
    assert len({row["seed"] for row in alone}) == 9
    assert distil(llm, file, tmp_path / "batch", batch=4) == alone
    assert distil(llm.using("llma"), file, tmp_path / "llma", batch=3, shard=100) == alone
    assert distil(llm, file, tmp_path / "other", replace(RECIPE, seed=4)) != alone
    assert [len(path.read_text().splitlines()) for path in shards.shards(tmp_path / "batch")] == [4, 4, 1]


def test_rows_are_what_generate_says(llm: LLM, file: str, tmp_path: Path) -> None:
    for row in distil(llm, file, tmp_path / "out", replace(RECIPE, cut_loops=False)):
        options = {"temperature": row["temperature"], "seed": row["seed"], "max_new_tokens": 40}
        result = llm.generate(TEXTS[row["index"]], **options)
        assert row["prompt"] == llm.encode(TEXTS[row["index"]])
        assert (row["answer"], row["finish_reason"]) == (result.ids, result.finish_reason)


class Looping(Recipe):
    """Every other answer has two tokens to choose from: a random model hardly repeats itself."""

    def params(self, index: int) -> SamplingParams:
        return replace(super().params(index), logit_bias={5: 30.0, 6: 30.0} if index % 2 else {})


def test_answers_end_where_they_loop(llm: LLM, file: str, tmp_path: Path) -> None:
    recipe = Looping(max_new_tokens=150)
    whole = distil(llm, file, tmp_path / "whole", replace(recipe, cut_loops=False))
    seen: list[int] = []
    cut = distil(llm, file, tmp_path / "cut", recipe, lambda progress: seen.append(progress.tokens))
    for one, other in zip(whole, cut, strict=True):
        kept = fresh(one["answer"])
        assert other["answer"] == one["answer"][:kept]
        assert (other["finish_reason"] == "loop") == (kept < len(one["answer"]))
    loops = sum(row["finish_reason"] == "loop" for row in cut)
    assert 0 < loops < len(cut), "both kinds are there"
    assert shards.manifest(tmp_path / "cut")["summary"]["loops_cut"] == loops
    assert seen[-1] < sum(len(row["answer"]) for row in whole), "and are not generated to the end"


@pytest.mark.parametrize("at", [1, 4, 6])
def test_interrupted_and_resumed_is_as_if_never_stopped(llm: LLM, file: str, tmp_path: Path, at: int) -> None:
    whole = distil(llm, file, tmp_path / "whole")
    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        distil(llm, file, out, tell=after(at, KeyboardInterrupt()), batch=3)
    assert len(rows(out)) == at
    assert shards.manifest(out)["summary"] is None
    last = shards.shards(out)[-1]
    written = last.read_bytes()
    last.write_bytes(written + b'{"index":8,"prompt":[0,5')
    told: list[int] = []
    assert distil(llm, file, out, tell=lambda progress: told.append(progress.rows), batch=2) == whole
    assert len(told) == 9 - at, "finished rows are not generated again"
    assert last.read_bytes().startswith(written)
    assert [len(path.read_text().splitlines()) for path in shards.shards(out)] == [4, 4, 1]
    assert shards.manifest(out)["summary"]["rows"] == 9
    assert [start["rows_found"] for start in shards.manifest(out)["starts"]] == [0, at]
    again = distil(llm, file, out, tell=lambda progress: pytest.fail("all rows are there"))
    assert again == whole


def test_a_limit_can_be_raised(llm: LLM, file: str, tmp_path: Path) -> None:
    whole = distil(llm, file, tmp_path / "whole")
    out, summaries = tmp_path / "out", []
    assert distil(llm, file, out, limit=3) == whole[:3]
    assert shards.manifest(out)["summary"]["rows"] == 3
    assert whole == distil(
        llm, file, out, tell=lambda progress: summaries.append(shards.manifest(out)["summary"])
    )
    assert summaries == [None] * 6, "a run under way has no summary"


def test_the_share_of_greedy_answers() -> None:
    for share in (0.0, 0.25, 1.0):
        temperatures = [Recipe(greedy_share=share).params(index).temperature for index in range(2000)]
        assert abs(temperatures.count(0.0) / 2000 - share) < 0.03
        assert set(temperatures) <= {0.0, 0.8}


def test_drafters_get_the_references(llm: LLM, tmp_path: Path) -> None:
    quoted = llm.generate(TEXTS[0], max_new_tokens=40).text
    file = lines(tmp_path / "quoting.jsonl", {"prompt": TEXTS[0], "references": [quoted]})
    recipe = Recipe(max_new_tokens=40, greedy_share=1)
    distil(llm.using("llma", {"faithful": True}), file, tmp_path / "out", recipe)
    assert shards.manifest(tmp_path / "out")["summary"]["tokens_per_forward"] > 1.5


def test_prompts_that_do_not_fit_are_left_out(llm: LLM, tmp_path: Path) -> None:
    file = lines(tmp_path / "long.jsonl", {"prompt": "x " * 300}, {"prompt": "x"})
    assert [row["index"] for row in distil(llm, file, tmp_path / "out")] == [1]
    assert shards.manifest(tmp_path / "out")["summary"]["too_long"] == 1


def test_a_full_disk_loses_nothing(
    llm: LLM, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all, out = shards.write_all, tmp_path / "out"

    def full(target: Any, data: bytes) -> None:
        if len(rows(out)) == 5:
            target.write(data[:20])
            raise OSError(28, "No space left on device")
        write_all(target, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_all", full)
        with pytest.raises(TrainingDataError, match=r"shard-00001.jsonl: No space left.* 5 finished rows"):
            distil(llm, file, out)
        assert len(rows(out)) == 5, "the half line is taken back"
        before = (out / MANIFEST).read_bytes()
        with pytest.raises(TrainingDataError, match=MANIFEST):
            distil(llm, file, out)
        assert [path.name for path in sorted(out.iterdir())] == [
            MANIFEST,
            "shard-00000.jsonl",
            "shard-00001.jsonl",
        ]
        assert (out / MANIFEST).read_bytes() == before
    assert distil(llm, file, out) == distil(llm, file, tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 4}, "seed: 3 there, 4 asked for"),
        ({"temperature": 0.7}, "temperature"),
        ({"max_new_tokens": 39}, "max_new_tokens"),
        ({"cut_loops": False}, "cut_loops"),
        ({}, "prompts.sha256"),
    ],
)
def test_another_runs_folder_is_refused(
    llm: LLM, file: str, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    distil(llm, file, tmp_path / "out", limit=1)
    if not change:
        file = lines(tmp_path / "others.jsonl", *({"prompt": text + "#"} for text in TEXTS))
    with pytest.raises(TrainingDataError, match=f"another run .*{says}"):
        distil(llm, file, tmp_path / "out", replace(RECIPE, **change))


def test_another_models_folder_is_refused(llm: LLM, file: str, tmp_path: Path) -> None:
    distil(llm, file, tmp_path / "out", limit=1)
    other = tiny(torch.float64, llm.tokenizer)
    with pytest.raises(TrainingDataError, match=r"dtype: .*bfloat16.* there.*; numerics"):
        distil(other, file, tmp_path / "out")


def test_one_process_writes_at_a_time(llm: LLM, file: str, tmp_path: Path) -> None:
    held = Shards(tmp_path / "out", asked(llm, Prompts([file]), RECIPE), 4)
    with pytest.raises(TrainingDataError, match="another process"):
        distil(llm, file, tmp_path / "out")
    held.close()
    assert len(distil(llm, file, tmp_path / "out")) == 9


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0}, "greedy_share=1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"greedy_share": 1.1}, "greedy_share"),
    ],
)
def test_recipes_that_cannot_be(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidOption, match=says):
        Recipe(**values)


def test_prompts_come_from_everywhere(tmp_path: Path) -> None:
    first = lines(tmp_path / "one.jsonl", {"id": 1, "prompt": "a", "references": ["r", "s"]})
    chats = [{"chat": [{"role": "user", "content": "b"}]}, {"chat": [{"role": "user", "content": "c"}]}]
    parquet = tmp_path / "two.parquet"
    datasets.Dataset.from_list(chats).to_parquet(str(parquet))
    saved = tmp_path / "three"
    datasets.Dataset.from_dict({"chat": ["d"]}).save_to_disk(str(saved))
    folder = tmp_path / "four"
    folder.mkdir()
    lines(folder / "data.jsonl", {"chat": "e"})
    joined = Prompts([first]), Prompts([str(parquet), str(saved), str(folder)], "chat")
    assert [(one.text, one.references) for one in map(joined[0].__getitem__, range(1))] == [("a", ["r", "s"])]
    found = [joined[1][index] for index in range(4)]
    assert [(one.messages[0]["content"] if one.messages else one.text) for one in found] == list("bcde")
    assert joined[0].conversation is None
    assert joined[1].conversation == chats[0]["chat"]
    assert Prompts([first]).sha256 == joined[0].sha256 != joined[1].sha256


def test_the_same_prompts_in_any_format_are_the_same(tmp_path: Path) -> None:
    made = [{"prompt": "a", "references": ["r"]}, {"prompt": "b", "references": []}]
    plain = lines(tmp_path / "one.jsonl", *made)
    datasets.Dataset.from_list(made).to_parquet(str(tmp_path / "two.parquet"))
    (tmp_path / "three.json").write_text(json.dumps(made))
    (tmp_path / "four.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    others = ("two.parquet", "three.json", "four.jsonl.gz")
    found = {Prompts([str(tmp_path / name)]).sha256 for name in others}
    assert found == {Prompts([plain]).sha256}
    both = Prompts([plain, str(tmp_path / "two.parquet")])
    assert [both[index].text for index in range(4)] == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("content", "column", "says"),
    [
        ([{"text": "a"}], None, "no column 'prompt'; name one of text"),
        ([{"prompt": "a"}], "question", "no column 'question'"),
        ([{"prompt": "a"}, {"prompt": ""}], None, "row 2: the prompt is empty"),
        ([{"prompt": 7}], None, "row 1: give a text, or messages.* 7"),
        ([{"messages": [{"role": "user"}]}], None, "row 1: give a text, or messages"),
        ([{"prompt": "a", "references": [5]}], None, "row 1: references"),
    ],
)
def test_rows_that_are_no_prompts(
    tmp_path: Path, content: list[object], column: str | None, says: str
) -> None:
    file = lines(tmp_path / "bad.jsonl", *content)
    with pytest.raises(TrainingDataError, match=says):
        Prompts([file], column)


def test_sources_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prom')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("a")
    for name in ("missing.jsonl", "missing/folder", "broken.jsonl", "empty.jsonl", "notes.txt"):
        with pytest.raises(TrainingDataError, match=name):
            Prompts([str(tmp_path / name)])
    with pytest.raises(TrainingDataError, match="no/such-set cannot be read"):
        Prompts(["no/such-set"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "table.parquet").write_text("")
    with pytest.raises(TrainingDataError, match=r"selfdraft\[train\]"):
        Prompts([str(tmp_path / "table.parquet")])


def test_trainers_read_rows_in_the_order_of_prompts(llm: LLM, file: str, tmp_path: Path) -> None:
    made = distil(llm, file, tmp_path / "out", batch=4)
    read = shards.read(tmp_path / "out")
    assert read.rows.column_names == ["index", "prompt", "answer", "temperature"]
    assert read.rows["prompt"][:] == [row["prompt"] for row in made]
    assert read.rows["answer"][:] == [row["answer"] for row in made]
    asked_for = read.manifest["asked"]
    prints, ids = [asked_for["fingerprint"]], (asked_for["vocabulary"], asked_for["tokenizer"])
    shards.check_model(read.manifest, prints, *ids)
    shards.check_model(read.manifest, ["0" * 64, *prints], *ids)
    with pytest.raises(
        TrainingDataError, match="tokenizer of tiny, with a vocabulary of 320; the model's has 9"
    ):
        shards.check_model(read.manifest, prints, 9, ids[1])
    with pytest.raises(TrainingDataError, match="answers of tiny with the fingerprint"):
        shards.check_model(read.manifest, ["0" * 64], *ids)
    with pytest.raises(TrainingDataError, match="ids of another tokenizer"):
        shards.check_model(read.manifest, prints, ids[0], "0" * 64)


def damage(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the second row of the first shard."""

    def act(folder: Path) -> None:
        path = shards.shards(folder)[0]
        all_lines = path.read_text().splitlines()
        row = json.loads(all_lines[1])
        changed = change(row)
        all_lines[1] = changed if isinstance(changed, str) else json.dumps(row)
        path.write_text("\n".join(all_lines) + "\n")

    return act


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda folder: [path.unlink() for path in shards.shards(folder)], "no shards"),
        (lambda folder: shards.shards(folder)[1].write_text(""), "shard-00001.jsonl is empty"),
        (damage(lambda row: '{"index": 3, "pro'), "shard-00000.jsonl, line 2: not JSON"),
        (damage(lambda row: "7"), "shard-00000.jsonl, line 2: no column 'index'"),
        (damage(lambda row: row.pop("answer")), "line 2: no column 'answer'"),
        (damage(lambda row: row.update(answer=[])), "line 2: 'answer' must be token ids"),
        (damage(lambda row: row.update(prompt="def")), "line 2: 'prompt' must be token ids"),
        (
            damage(lambda row: row.update(prompt=[4, 320])),
            "'prompt' holds 320, outside the vocabulary of 320",
        ),
        (damage(lambda row: row.update(answer=[-1, 4])), "'answer' holds -1, outside"),
        (damage(lambda row: row.update(temperature="warm")), "line 2: 'temperature' must be a number"),
        (damage(lambda row: row.update(index=0)), "two rows of index 0"),
        (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST}: No such file"),
        (lambda folder: (folder / MANIFEST).write_text("{"), f"{MANIFEST} is not JSON"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), f"{MANIFEST} does not say which model"),
    ],
)
def test_damaged_folders_are_not_trained_on(
    llm: LLM, file: str, tmp_path: Path, act: Callable[[Path], object], says: str
) -> None:
    distil(llm, file, tmp_path / "out", replace(RECIPE, max_new_tokens=3))
    act(tmp_path / "out")
    with pytest.raises(TrainingDataError, match=says):
        shards.read(tmp_path / "out")


WORDS = ("-n", "20", "--batch", "4", "--dtype", "bfloat16")


def test_command(command: Run, folder: Path, file: str, tmp_path: Path) -> None:
    words = ("distill", "--prompts", file, "--model", str(folder), *WORDS, "--out", str(tmp_path / "out"))
    code, out, err = command(*words, "--method", "llma", "--option", "block=6", "--limit", "5", "--json")
    assert code == 0, err
    record = json.loads(out.splitlines()[-1])
    assert (record["rows"], record["new_rows"]) == (5, 5)
    assert record["tokens_per_forward"] >= 1
    code, out, err = command(*words)
    assert code == 0
    assert "5 rows are there" in err
    assert "9 rows" in out
    assert "in this run 4 rows" in out
    assert len(shards.read(tmp_path / "out").rows) == 9
    code, _, err = command(*words, "--seed", "1")
    assert code == 2
    assert "seed: 0 there, 1 asked for" in err
    assert len(err.strip().splitlines()) == 1


CHAT = "{% for m in messages %}<|bos|>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture
def chatting(tokenizer: PreTrainedTokenizerFast) -> LLM:
    """A model whose tokenizer has a chat template."""
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = CHAT
    return tiny(torch.bfloat16, templated)


def test_text_prompts_go_through_the_chat_template(chatting: LLM, file: str, tmp_path: Path) -> None:
    recipe = replace(RECIPE, max_new_tokens=4)
    for row in distil(chatting, file, tmp_path / "chat", recipe, limit=3):
        text = f"<|bos|>user: {TEXTS[row['index']]}\nassistant:"
        assert row["prompt"] == chatting.tokenizer.encode(text, add_special_tokens=False)
    for row in distil(chatting, file, tmp_path / "raw", replace(recipe, raw=True), limit=3):
        assert row["prompt"] == chatting.tokenizer.encode(TEXTS[row["index"]])
    asked_for = [shards.manifest(tmp_path / name)["asked"]["chat"] for name in ("chat", "raw")]
    assert asked_for == [True, False]
    with pytest.raises(TrainingDataError, match="chat: true there, false asked for"):
        distil(chatting, file, tmp_path / "chat", replace(recipe, raw=True))


def test_without_a_template_raw_is_no_other_run(llm: LLM, file: str) -> None:
    prompts = Prompts([file])
    assert asked(llm, prompts, RECIPE) == asked(llm, prompts, replace(RECIPE, raw=True))


def test_command_needs_no_datasets_for_json_lines(
    command: Run, folder: Path, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    out = tmp_path / "out"
    code, _, err = command("distill", "-p", file, "--model", str(folder), "-n", "4", "--out", str(out))
    assert code == 0, err
    assert len(rows(out)) == 9


def test_modules_that_only_posix_has_are_imported_where_they_are_used() -> None:
    """At the top of a file they would make the command fail to start on Windows."""
    found = []
    for path in Path(selfdraft.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}: {name}" for name in names if name in POSIX]
    assert not found


def test_command_takes_messages(command: Run, folder: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "chats.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    words = ("distill", "-p", file, "--model", str(folder), *WORDS, "--out", str(tmp_path / "out"))
    code, _, err = command(*words)
    assert code == 2
    assert "chat template" in err
    assert not (tmp_path / "out").exists()


def test_sigterm_keeps_what_there_is(
    command: Run, folder: Path, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add = tmp_path / "out", Shards.add

    def terminated(self: Shards, row: Row) -> None:
        add(self, row)
        if len(self.done) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Shards, "add", terminated)
    code, _, err = command("distill", "-p", file, "--model", str(folder), *WORDS, "--out", str(out))
    assert code == 128 + signal.SIGTERM
    assert len(rows(out)) == 3
    assert f"3 rows are kept in {out}" in err
    assert signal.getsignal(signal.SIGTERM) is before
