"""The recipe on made-up data: the same result twice, resumed as if never stopped."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import tokenizer as tokens
from data import prepare
from documents import DataError, documents, rename
from evaluate import evaluate, loops
from export import export, latest
from optimizer import rate
from pretrain import CheckpointError, Job, train
from prompts import KINDS, LONGEST, make
from settings import Evaluation, Run, Settings, SettingsError, Shape, Source, Stage, load, parse
from stream import Mixture, open_shards
from watch import Progress, Watch, newest, progress_of
from windows import WindowsError, dataset, held_windows, train_windows

FUNCTION = 'def add_{0}(count, other):\n    """Add {0}."""\n'
BODY = "    total_{0} = count + other\n    return total_{0} * {0}\n"


def write_sets(folder: Path) -> None:
    base = {"licence": "MIT", "repo": "some/where"}
    files = [
        {**base, "path": f"{n}.py", "text": FUNCTION.format(n) + BODY.format(n)} for n in range(90)
    ]
    functions = [
        {**base, "path": f"{n}.py", "prompt": FUNCTION.format(n), "response": BODY.format(n)}
        for n in range(90)
    ]
    for name, rows in {"files": files, "functions": functions}.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)


def small() -> Settings:
    given = load()
    return replace(
        given,
        shape=Shape(1, 16, 2, 1, 8, 32, 64, 10000.0),
        tokenizer=replace(given.tokenizer, entries=300, sample_mb={"code": 1}),
        data=replace(given.data, shard_mb=0.002, held_out=0.2),
        sources={
            "code": Source("file", ["files"]),
            "renames": Source("rename", ["functions"], aligned=True),
        },
        stages=[
            Stage("copy", 256, 32, {"code": 40, "renames": 60}),
            Stage("mixed", 0, 64, {"code": 70, "renames": 30}),
        ],
        batch=replace(given.batch, tokens_per_step=128, micro_tokens=64),
        schedule=replace(given.schedule, warmup_steps=2),
        run=Run(compile=False, threads=0, log_seconds=0.0, checkpoint_seconds=1e9, keep=2),
        evaluation=Evaluation(2, ["code"], 32, 2, 2, 2, 4, 2, 8, 1, 4, 0),
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pico")
    write_sets(folder)
    prepare(small(), folder, folder / "shards")
    return folder / "shards"


def test_settings_name_the_unknown_key() -> None:
    with pytest.raises(SettingsError, match="lairs"):
        parse({"shape": {"lairs": 8}})


@given(text=st.text())
def test_tokenizer_gives_every_text_back(shards: Path, text: str) -> None:
    encoder = tokens.read(shards / "tokenizer")
    ids = encoder(text.replace("<|", ""))["input_ids"]
    assert ids[0] == 0
    assert 1 not in ids
    assert encoder.decode(ids[1:]) == text.replace("<|", "")
    assert sum(tokens.byte_lengths(encoder)[id] for id in ids) == len(
        text.replace("<|", "").encode()
    )


def test_data_are_the_same_twice_and_hold_the_documents(shards: Path, tmp_path: Path) -> None:
    prepare(small(), shards.parent, tmp_path / "again")
    assert (tmp_path / "again" / "index.json").read_text() == (shards / "index.json").read_text()
    code = open_shards(shards)["code"]
    assert len(code.parts) > 1
    encoder = tokens.read(shards / "tokenizer")
    second = code.read(int(code.starts[1]), int(code.starts[2] - code.starts[1]))
    assert (second[0], second[-1]) == (0, 1)
    assert str(encoder.decode(second[1:-1])).startswith("def add_")


def test_held_out_documents_are_not_trained_on(shards: Path) -> None:
    splits = [open_shards(shards, split)["code"] for split in ("train", "held")]
    documents = [
        {part.tobytes() for part in np.split(shard.read(0, shard.total), shard.starts[1:])}
        for shard in splits
    ]
    assert documents[0]
    assert documents[1]
    assert not documents[0] & documents[1]


def test_aligned_windows_start_at_documents_and_skip_none(shards: Path) -> None:
    source = open_shards(shards)["renames"]
    length = int(np.diff(source.starts).max()) * 2
    windows = source.windows(length)
    assert set(windows) <= set(source.starts)
    assert (np.diff(windows) <= length).all()


def test_stream_continues_where_it_was(shards: Path) -> None:
    settings, opened = small(), open_shards(shards)
    whole = iter(Mixture(opened, settings, settings.stages))
    batches = [next(whole)["input_ids"] for _ in range(30)]
    assert [batch.shape[1] for batch in batches[3:5]] == [32, 64]
    for done in (1, 4, 17):
        rest = iter(Mixture(opened, settings, settings.stages, start=done * 64))
        assert torch.equal(next(rest)["input_ids"], batches[done])


def test_windows_are_those_of_the_stream(shards: Path) -> None:
    settings = small()
    made = train_windows(settings, shards, 6 * 64, 64, 3 * 64, None)
    stream = iter(Mixture(open_shards(shards), settings, settings.stages[-1:], start=3 * 64))
    assert [window.tolist() for window in made] == [
        next(stream)["input_ids"][0].tolist() for _ in range(6)
    ]
    assert train_windows(settings, shards, 2 * 64, 64, 4 * 64, None)[0].tolist() == made[1].tolist()
    assert len(train_windows(settings, shards, 100, 32, 0, "copy")[2]) == 32
    assert dataset(made)["input_ids"][0] == made[0].tolist()
    held = open_shards(shards, "held")["code"]
    assert all(
        any(np.array_equal(window, held.read(int(at), 64)) for at in held.windows(64))
        for window in held_windows(shards, 64, 2)
    )
    with pytest.raises(WindowsError, match="no stage 'other'"):
        train_windows(settings, shards, 64, 64, 0, "other")
    with pytest.raises(WindowsError, match="are no window"):
        train_windows(settings, shards, 63, 64, 0, None)


def test_a_round_holds_each_source_by_its_weight(shards: Path) -> None:
    settings = small()
    order = Mixture(open_shards(shards), settings, settings.stages).order(1, 7)
    assert {name: order.count(name) for name in order} == settings.stages[1].weights


def test_a_pause_is_not_work(tmp_path: Path) -> None:
    watch = Watch(small(), Progress(), tmp_path / "log.jsonl", dict)
    for took in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 500.0, 2.0):
        watch.count(took)
    assert watch.progress == Progress(tokens=8 * 128, seconds=9.0)


def test_rate_warms_up_stays_and_decays_to_zero() -> None:
    stable, decayed = rate(10), rate(10, (100, 50))
    assert [stable(step) for step in (0, 9, 10, 10**6)] == [0.1, 1.0, 1.0, 1.0]
    assert decayed(99) == 1.0
    assert decayed(100) > decayed(101) > decayed(149) > decayed(150) == 0.0


def test_rename_changes_one_name_only() -> None:
    row = {"prompt": FUNCTION.format(3), "response": BODY.format(3)}
    text = rename(row)
    assert text is not None
    assert text == rename(row)
    ask, old, new = text.split("\n\n", 1)[0], *text.split("\n\n", 1)[1].split("\n```\n\n")
    name, other = ask.replace("`", "").split()[-3::2]
    assert new.replace(other, name).removesuffix("\n```") == old


def test_loops_are_seen() -> None:
    assert loops([9, 8, *[1, 2, 3] * 16])
    assert not loops(list(range(60)))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_resumed_run_is_the_whole_run(shards: Path, tmp_path: Path, name: str) -> None:
    settings = small()
    settings = replace(settings, optimizer=replace(settings.optimizer, name=name))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings, Job(whole, shards, steps=5))
    train(settings, Job(parts, shards, steps=2))
    assert train(settings, Job(parts, shards, steps=5)).tokens == 5 * 128
    one, other = (
        load_file(path / "stable" / "checkpoint-5" / "model.safetensors") for path in (whole, parts)
    )
    for key, value in one.items():
        torch.testing.assert_close(other[key], value)


def test_decay_branches_off_and_is_exported(shards: Path, tmp_path: Path) -> None:
    settings = small()
    with pytest.raises(CheckpointError, match="pretrain first"):
        train(settings, Job(tmp_path, shards, decay_steps=3))
    train(settings, Job(tmp_path, shards, steps=2))
    train(settings, Job(tmp_path, shards, decay_steps=3))
    assert newest(tmp_path / "stable") == tmp_path / "stable" / "checkpoint-2"
    assert latest(tmp_path) == tmp_path / "decay-2" / "checkpoint-5"
    lines = (tmp_path / "decay-2" / "log.jsonl").read_text().splitlines()
    rates = [line["learning_rate"] for line in map(json.loads, lines) if "loss" in line]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * rates[0]
    export(settings, latest(tmp_path), shards, tmp_path / "out", data=None)
    assert progress_of(tmp_path / "out").tokens == 5 * 128
    card = (tmp_path / "out" / "README.md").read_text()
    assert "In the last 3 steps the learning rate fell to zero." in card
    again = train(settings, Job(tmp_path / "next", shards, tmp_path / "out", steps=1))
    assert again.tokens == 6 * 128
    (tmp_path / "decay-2" / "decay.json").write_text("8")
    export(settings, latest(tmp_path), shards, tmp_path / "early", data=None)
    card = (tmp_path / "early" / "README.md").read_text()
    assert "an interim state, after 3 of a decay's 8 steps" in card
    assert "fell to zero" not in card


def write_exams(folder: Path) -> None:
    """Evaluation sets whose prompts fit the small context."""
    asked, said = 'def add(a):\n    """A."""\n', "    return a\n"
    edit = f"Edit: b\n\n```python\n{asked}```"
    sets: dict[str, dict[str, object]] = {
        "py_code_main": {"text": FUNCTION.format(3) + BODY.format(3)},
        "py_functions": {"prompt": asked, "response": said * 30},
        "py_edits": {"prompt": edit, "response": f"```python\n{said}```"},
        "humaneval/HumanEval": {
            "prompt": asked,
            "entry_point": "add",
            "test": "def check(candidate):\n    assert candidate(1) == 1",
        },
        "mbpp/mbpp": {
            "task_id": 11,
            "text": "A.",
            "code": asked + said,
            "test_setup_code": "",
            "test_list": ["assert add(1) == 1"],
        },
    }
    for name, row in sets.items():
        path = folder / "eval" / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for _ in range(3))


def test_card_holds_figures_curve_and_samples(shards: Path, tmp_path: Path) -> None:
    settings = small()
    settings = replace(settings, run=replace(settings.run, checkpoint_seconds=0.0))
    train(settings, Job(tmp_path, shards, steps=9))
    write_exams(tmp_path)
    export(settings, latest(tmp_path), shards, tmp_path / "out", tmp_path)
    card = (tmp_path / "out" / "README.md").read_text()
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (figures["humaneval_tasks"], figures["mbpp_passed"], figures["mbpp_tasks"]) == (2, 0, 2)
    assert f"{9 * 128:,} tokens seen, {9 * 128:,} of them in this run, in 0.00 hours" in card
    assert f"| bits per byte, files | {figures['bits_per_byte_py_code_main']} | 0.95 or" in card
    assert "| MBPP, pass@1 | 0 of 2 (0.0 %) | |" in card
    law = json.loads((tmp_path / "out" / "curve.json").read_text())["laws"]["code"]
    assert f"| {law['measured']:.4f} | {law['predicted']:.4f} |" in card
    assert (tmp_path / "out" / "curve.png").is_file()
    assert card.count("\nAnswer 1, ") == 3
    assert "\n````text\nEdit: b\n\n```python\n" in card
    assert "mbpp_tasks" not in evaluate(tmp_path / "out", tmp_path, settings)
    assert progress_of(tmp_path / "out").tokens == 9 * 128


def test_a_checkpoint_may_go_while_it_is_exported(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small(), Job(tmp_path, shards, steps=2))
    checkpoint = latest(tmp_path)

    def overtaken(*_: object, **__: object) -> dict[str, float]:
        shutil.rmtree(checkpoint)
        return {}

    monkeypatch.setattr("export.evaluate", overtaken)
    monkeypatch.setattr("export.samples", lambda *_: {})
    export(small(), checkpoint, shards, tmp_path / "out", tmp_path)
    assert f"{2 * 128} tokens seen" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def every_form(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One set of each form, with texts long enough to break off."""
    folder = tmp_path_factory.mktemp("forms")
    long = [
        "".join(FUNCTION.format(n * k) + BODY.format(n * k) for k in range(2, 9)) for n in range(90)
    ]
    sets = {
        "files": [{"text": text} for text in long],
        "english": [{"text": f"# {text}"} for text in long],
        "functions": [
            {"prompt": FUNCTION.format(n), "response": BODY.format(n)} for n in range(90)
        ],
        "edits": [
            {"prompt": f"Edit {n}: {text * (1 + n % 2 * 20)}", "response": text}
            for n, text in enumerate(long)
        ],
        "pairs": [{"prompt": f"What is {n}?", "response": "It is."} for n in range(90)],
        "dialogues": [{"turns": [f"User: {n}"] * 40} for n in range(90)],
    }
    for name, rows in sets.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as out:
            for n, row in enumerate(rows):
                row |= {"licence": "MIT", "repo": "some/where", "path": f"{n}.py"}
                out.write(json.dumps(row) + "\n")
    return folder


def test_prompts_are_trained_on_and_the_same_twice(shards: Path, every_form: Path) -> None:
    forms = {"code": "file", "english": "file", "functions": "function"}
    forms |= {"edits": "pair", "pairs": "pair", "dialogues": "dialogue"}
    sources = {name: Source(form, [name.replace("code", "files")]) for name, form in forms.items()}
    settings, encoder = replace(small(), sources=sources), tokens.read(shards / "tokenizer")
    made = make(settings, every_form, encoder, 50, seed=0)
    assert made == make(settings, every_form, encoder, 50, seed=0)
    assert made != make(settings, every_form, encoder, 50, seed=1)
    whole = {
        kind.form: {held: [d.text for d in found if d.held_out == held] for held in (True, False)}
        for kind in KINDS
        if (found := list(documents(settings.sources[kind.source], every_form, settings.data)))
    }
    for row in made:
        held, trained = (whole[row["form"]][held] for held in (True, False))
        assert any(text.startswith(row["prompt"]) and text != row["prompt"] for text in trained)
        assert row["form"] == "dialogue" or not any(text.startswith(row["prompt"]) for text in held)
        least = {kind.form: kind.tokens[0] for kind in KINDS if kind.tokens}.get(row["form"], 0)
        assert least <= len(encoder(row["prompt"])["input_ids"]) <= LONGEST
        assert row["form"] in ("edit", "function", "pair") or row["prompt"].endswith("\n")
    counts = {kind.form: sum(row["form"] == kind.form for row in made) for kind in KINDS}
    assert counts == {kind.form: 50 * kind.share // 100 for kind in KINDS}
    with pytest.raises(DataError, match=r"only \d+ prompts of form 'edit'"):
        make(settings, every_form, encoder, 500, seed=0)
