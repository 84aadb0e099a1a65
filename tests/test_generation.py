"""`generate` and `stream` on a saved model, and every way that loading can fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from selfdraft import LLM, errors
from selfdraft.drafting.jacobi import Jacobi


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), "plain")


def test_methods_agree_and_are_counted(llm: LLM) -> None:
    plain = llm.generate("def add", max_new_tokens=30)
    assert plain.method == "plain"
    assert plain.tokens == plain.forwards == len(plain.ids) == 30
    assert plain.tokens_per_forward == plain.rows_per_forward == 1
    assert (plain.grade, plain.numerics, plain.dtype) == ("base", "exact", "bfloat16")
    drafted = llm.using("llma", {"block": 6}).generate(
        "def add", references=[plain.text, plain.ids], max_new_tokens=30
    )
    assert drafted.text == plain.text
    assert drafted.ids == plain.ids
    assert sum(drafted.runs) == drafted.tokens == 30
    assert drafted.forwards == len(drafted.runs) < 30
    assert drafted.tokens_per_forward == 30 / drafted.forwards


def test_same_seed_same_text(llm: LLM) -> None:
    first = llm.generate("class", temperature=1.0, max_new_tokens=20)
    again = llm.using(Jacobi(5)).generate("class", temperature=1.0, max_new_tokens=20, seed=first.seed)
    assert again.ids == first.ids
    assert again.method == "jacobi"
    assert llm.generate("class", temperature=1.0, max_new_tokens=20).seed != first.seed


def test_several_prompts_run_as_a_batch(llm: LLM) -> None:
    prompts = ["def add", "class Stack:\n", "return"]
    together = llm.using("jacobi").generate(prompts, max_new_tokens=25)
    assert [r.ids for r in together] == [llm.generate(p, max_new_tokens=25).ids for p in prompts]


def test_stream_is_generate(llm: LLM) -> None:
    stream = llm.using("jacobi").stream("def add", max_new_tokens=30)
    chunks = list(stream)
    whole = llm.generate("def add", max_new_tokens=30)
    assert "".join(chunk.text for chunk in chunks) == stream.result.text == whole.text
    assert [token for chunk in chunks for token in chunk.ids] == whole.ids


def test_a_stream_that_is_left_keeps_what_there_is(llm: LLM) -> None:
    stream = llm.stream("def add", max_new_tokens=30)
    for count, _ in enumerate(stream, start=1):
        if count == 4:
            break
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.tokens == 4


def test_a_stream_that_was_left_stays_left(llm: LLM) -> None:
    stream = llm.stream("def add", max_new_tokens=30)
    next(iter(stream))
    assert [chunk for chunk in stream if chunk.ids][1:] == []


def test_bad_requests(llm: LLM) -> None:
    for prompt, options in (
        ("", {}),
        ([], {}),
        ("x" * 600, {}),
        ("x", {"max_new_tokens": 0}),
        ("x", {"max_new_tokens": -3}),
        ("x", {"temperature": float("nan")}),
        ("x", {"temperature": "hot"}),
        ("x", {"beams": 4}),
        (("a", "b"), {}),
    ):
        with pytest.raises((errors.InvalidPrompt, errors.InvalidOption)):
            llm.generate(prompt, **options)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidReference):
        llm.generate("x", references="one text")


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


def test_a_model_that_is_not_there(tmp_path: Path, folder: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "owner/none", str(folder / "config.json")):
        with pytest.raises(errors.ModelNotFound, match=r"none|config\.json"):
            LLM(name)
    with pytest.raises(errors.ModelCorrupt, match=r"config\.json"):
        LLM(str(tmp_path))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_folder(folder: Path, tmp_path: Path, file: str, damage: str) -> None:
    broken = copy(folder, tmp_path)
    if damage == "cut":
        (broken / file).write_bytes((broken / file).read_bytes()[:60])
    else:
        (broken / file).unlink()
    with pytest.raises(errors.ModelCorrupt, match="model"):
        LLM(str(broken))


def test_a_missing_weight_is_not_made_up(folder: Path, tmp_path: Path) -> None:
    broken = copy(folder, tmp_path)
    weights = load_file(broken / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.ModelCorrupt, match="1 weights are missing"):
        LLM(str(broken))


def test_a_model_of_an_unknown_type(folder: Path, tmp_path: Path) -> None:
    strange = copy(folder, tmp_path)
    config = json.loads((strange / "config.json").read_text()) | {"model_type": "abacus"}
    (strange / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.ModelUnsupported, match="abacus"):
        LLM(str(strange))


def test_bad_settings(folder: Path) -> None:
    for options, error in (
        ({"method": "medusa"}, errors.UnknownMethod),
        ({"adapter": "none"}, errors.AdapterError),
        ({"dtype": "int8"}, errors.InvalidOption),
        ({"device": "abacus"}, errors.InvalidOption),
        ({"device": "cuda:77"}, errors.InvalidOption),
        ({"numerics": "wrong"}, errors.InvalidOption),
        ({"method": Jacobi(), "options": {"block": 3}}, errors.InvalidOption),
    ):
        with pytest.raises(error):
            LLM(str(folder), **options)  # type: ignore[arg-type]


def test_dtype_and_numerics(folder: Path) -> None:
    loaded = LLM(str(folder), dtype="float64")
    assert loaded.model.dtype == torch.float64
    assert loaded.model.numerics == "fast"
