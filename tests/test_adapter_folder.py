"""Adapters on disk: what is loaded is what was saved; other weights of the base's shape take it with a note,
and all else is refused by name. Those in the package are found by name and hold what they must."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from selfdraft import LLM, Engine, Tree
from selfdraft.drafting.bita import Bita
from selfdraft.drafting.space import Space
from selfdraft.errors import AdapterError
from selfdraft.models.adapters import folder as adapter_folder
from selfdraft.models.adapters.adapter import Adapter
from selfdraft.models.adapters.fingerprint import fingerprint
from selfdraft.models.adapters.folder import CONFIG, WEIGHTS
from selfdraft.models.transformers import TransformersModel

from adapting import adapter
from conftest import VOCABULARY, Run, tiny_llama
from runs import random_prompt

PARTS = [(0, 0, 0), (16, 0, 0), (0, 4, 0), (4, 4, 32)]
DRAFTS_WITH = {"bita": "bita", "space": "space", "space-tuned": "space-tuned", "cllm": "jacobi"}
QUESTIONS = ["Why is the sky blue?", "What is 12 times 3?", "Say that I am late.", "Name two rivers."]
ODDS = {"hazard": [[0.1] * 14] * 3, "onward": [[0.5, 0.4, 0.3]]}


@torch.inference_mode()
def ahead(model: TransformersModel, adapter: Adapter) -> torch.Tensor:
    adapted = model.adapted(adapter)
    tree = Tree.chain(random_prompt(5, 1)).hang(4, range(VOCABULARY, VOCABULARY + 3))
    rows = adapted.forward([tree], [adapted.pool().open()])
    return adapted.mask_logits(rows, [[5, 6, 7]], [9], lambda i, offset, row: 7)[0]


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_what_is_loaded_is_what_was_saved(
    exact: TransformersModel, parts: tuple[int, ...], tmp_path: Path
) -> None:
    made = adapter(exact, 3, *parts)
    made.odds = ODDS
    adapter_folder.save(tmp_path, made, exact, "bita", "tiny", {"steps": 7})
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    found = adapter_folder.load(str(tmp_path), exact)
    assert (found.config, found.odds) == (made.config, ODDS)
    for part in made.parameters():
        part.copy_(part.bfloat16())
    for (name, part), (other, read) in zip(made.named_parameters(), found.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(part, read)
        assert not read.requires_grad
    assert torch.equal(ahead(exact, made), ahead(exact, found))
    about = json.loads((tmp_path / CONFIG).read_text())["selfdraft"]
    assert (about["method"], about["base_name"], about["steps"]) == ("bita", "tiny", 7)


def test_one_folder_serves_the_base_in_every_dtype(
    exact: TransformersModel, double: TransformersModel, tmp_path: Path
) -> None:
    """The models of the fixtures differ by rounding to bfloat16 alone."""
    made = adapter(exact, 3, 4, 4, 32)
    adapter_folder.save(tmp_path, made, exact, "bita", "tiny", {})
    wide = adapter_folder.load(str(tmp_path), double)
    assert {part.dtype for part in wide.parameters()} == {torch.float64}
    near = ahead(exact, adapter_folder.load(str(tmp_path), exact)).double()
    error = (near - ahead(double, wide)).norm() / near.norm()
    assert error < 0.1


def test_a_fingerprint_is_of_a_checkpoint_not_of_its_loading(tmp_path: Path) -> None:
    model = tiny_llama(torch.bfloat16)
    first = fingerprint(model)
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
        assert fingerprint(loaded) == first
    wrapped = TransformersModel(model)
    assert fingerprint(wrapped.model) == first
    assert fingerprint(wrapped.adapted(adapter(wrapped, 3, 4, 4)).model) == first
    assert fingerprint(tiny_llama(torch.float64)) == first


def changed_weight(model: LlamaForCausalLM) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[5, 3] *= 1.01


def swapped_weights(model: LlamaForCausalLM) -> None:
    layer = model.model.layers[0].self_attn
    layer.k_proj, layer.v_proj = layer.v_proj, layer.k_proj


def changed_config(model: LlamaForCausalLM) -> None:
    model.config.rms_norm_eps *= 10


def changed_rope(model: LlamaForCausalLM) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500.0}


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings so far; each is said once in a process."""
    adapter_folder._warn.cache_clear()
    return lambda: [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]


@pytest.mark.parametrize("change", [changed_weight, swapped_weights, changed_config, changed_rope])
@pytest.mark.parametrize("gated", [True, False])
def test_other_weights_of_the_same_shape_take_an_adapter_with_one_note(
    exact: TransformersModel,
    change: Callable[[LlamaForCausalLM], None],
    gated: bool,
    tmp_path: Path,
    notes: Callable[[], list[str]],
) -> None:
    folder = tmp_path / "theirs"
    adapter_folder.save(folder, adapter(exact, 3, 0, 4, gated=gated), exact, "bita", "tiny", {})
    adapter_folder.load(str(folder), exact)
    assert notes() == []
    model = tiny_llama(torch.bfloat16)
    change(model)
    other = TransformersModel(model, "fast")
    for _ in range(2):
        adapter_folder.load(str(folder), other)
    (note,) = notes()
    assert "theirs was trained for other weights ('tiny')" in note
    assert ("the text is the model's own" if gated else "the text is that of these weights tuned") in note


def other_shapes() -> list[dict[str, int]]:
    return [{"vocab_size": VOCABULARY + 8}, {"hidden_size": 128}, {"num_hidden_layers": 3}]


@pytest.mark.parametrize("changes", other_shapes(), ids=str)
@pytest.mark.parametrize("parts", PARTS[:2], ids=str)
def test_a_model_of_another_shape_or_vocabulary_is_refused(
    exact: TransformersModel, changes: dict[str, int], parts: tuple[int, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    adapter_folder.save(folder, adapter(exact, 3, *parts), exact, "bita", "tiny", {})
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), **changes})
    other = TransformersModel(LlamaForCausalLM(config).bfloat16(), "fast")
    with pytest.raises(
        AdapterError, match=r"theirs was trained for 'tiny', a model of another shape \(voc"
    ) as e:
        adapter_folder.load(str(folder), other)
    for size in changes.values():
        assert str(size) in str(e.value)


def test_shapes_that_are_not_compared_are_seen(
    exact: TransformersModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_folder, "shape", lambda model: {})
    with pytest.raises(pytest.fail.Exception):
        test_a_model_of_another_shape_or_vocabulary_is_refused(exact, other_shapes()[0], PARTS[0], tmp_path)


def test_a_shipped_adapter_is_found_by_name_and_listed(
    exact: TransformersModel,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Run,
) -> None:
    monkeypatch.setattr(adapter_folder, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    made = adapter(exact, 3, 0, 4)
    adapter_folder.save(tmp_path / "shipped" / "tiny-space", made, exact, "space", "tiny", {})
    other = TransformersModel(LlamaForCausalLM(LlamaConfig(vocab_size=9, num_hidden_layers=1)), "fast")
    assert list(adapter_folder.shipped()) == list(adapter_folder.shipped(exact)) == ["tiny-space"]
    assert adapter_folder.shipped(other) == {}
    facts = json.loads(command("info", str(folder), "--json")[1])
    assert facts["shipped adapters"] == ["tiny-space"]
    model = LLM(str(folder), "space", adapter="tiny-space")
    assert model.adapter == "tiny-space"
    drafted = model.generate("def add(", max_new_tokens=8)
    assert drafted.ids == model.using("plain").generate("def add(", max_new_tokens=8).ids
    for wrong in (lambda: LLM(str(folder), "space", adapter="space"), lambda: LLM(str(folder), "space")):
        with pytest.raises(AdapterError, match="tiny-space"):
            wrong()

    adapter_folder.save(tmp_path / "tiny-space", adapter(exact, 2), exact, "space", "mine", {})
    assert adapter_folder.load("tiny-space", exact).config.masks == 2
    (tmp_path / "tiny-space" / CONFIG).unlink()
    with pytest.raises(AdapterError, match="the folder here goes before the shipped adapter"):
        adapter_folder.load("tiny-space", exact)


@pytest.mark.parametrize("name", adapter_folder.shipped())
def test_a_shipped_folder_is_whole_small_and_says_what_it_is(name: str) -> None:
    path = adapter_folder.shipped()[name]
    assert (path / WEIGHTS).stat().st_size <= 6_000_000
    about = json.loads((path / CONFIG).read_text())["selfdraft"]
    assert set(about["shape"]) == {"vocabulary", "hidden", "layers"}
    assert len(about["odds"].get("hazard", ())) == about["masks"]
    assert about["masks"] or about["odds"]["ahead"]
    card = (path / "README.md").read_text()
    assert card.count(name) >= 2
    assert "## Data" in card
    assert "## Measured" in card
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", card):
        assert (path / picture).is_file()
    for text in (card, (path / CONFIG).read_text()):
        assert not re.search(r"[\s\"'`(]/\w+/", text), "a path of somebody's machine"


@pytest.mark.parametrize("name", adapter_folder.shipped())
@pytest.mark.usefixtures("with_kernels")
def test_with_a_shipped_adapter_the_text_is_that_of_plain_decoding(name: str) -> None:
    """On the model that it was trained for, alone and in a batch, greedy and sampled."""
    record = json.loads((adapter_folder.shipped()[name] / CONFIG).read_text())["selfdraft"]
    llm = LLM(record["base_name"], DRAFTS_WITH[record["method"]], adapter=name)
    assert llm.model.grade == ("base" if record["gated"] else "tuned")
    plain = llm.using("plain")
    for temperature in (0.0, 0.8):
        asked = {"temperature": temperature, "seed": 3, "max_new_tokens": 16}
        expected = [answer.ids for answer in plain.generate(QUESTIONS, **asked)]
        batch = llm.generate(QUESTIONS, **asked)
        assert [answer.ids for answer in batch] == expected
        assert llm.generate(QUESTIONS[0], **asked).ids == expected[0]
    assert sum(answer.forwards for answer in batch) < sum(answer.tokens for answer in batch)


@pytest.mark.usefixtures("with_kernels")
def test_drafts_taken_unverified_are_seen_with_a_shipped_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_branch(tree: Tree, picks: Sequence[int], done: object) -> tuple[list[int], list[int]]:
        path = [0]
        for row in range(1, len(picks)):
            if tree.parents[row] == path[-1]:
                path.append(row)
        return path, []

    monkeypatch.setattr("selfdraft.engine.request.accept", first_branch)
    with pytest.raises(AssertionError):
        test_with_a_shipped_adapter_the_text_is_that_of_plain_decoding("smollm2-bita")


def config(**changes: Any) -> Callable[[Path], None]:
    """Other values in the config: of peft's by their names, of ours under "selfdraft"."""

    def change(folder: Path) -> None:
        record = json.loads((folder / CONFIG).read_text())
        for name, value in changes.items():
            (record if name in record else record["selfdraft"])[name] = value
        (folder / CONFIG).write_text(json.dumps(record))

    return change


def weights(**changes: Any) -> Callable[[Path], None]:
    """Other tensors; None: one less."""

    def change(folder: Path) -> None:
        tensors = {**load_file(folder / WEIGHTS), **changes}
        save_file({name: part for name, part in tensors.items() if part is not None}, folder / WEIGHTS)

    return change


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: folder.joinpath(name).write_bytes(content) and None


def cut(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"no {CONFIG}"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "no folder": (shutil.rmtree, "no adapter folder"),
    "not JSON": (written(CONFIG, b"{"), f"{CONFIG} is not one"),
    "not text": (written(CONFIG, b"\xff\xfe"), f"{CONFIG} is not one"),
    "a list": (written(CONFIG, b"[]"), f"{CONFIG} is not one"),
    "peft's own": (written(CONFIG, b'{"r": 4}'), f"{CONFIG} is not one.*selfdraft"),
    "no number of masks": (written(CONFIG, b'{"selfdraft": {}}'), f"{CONFIG} is not one.*masks"),
    "0 masks": (config(masks=0), "masks is 0"),
    "masks in words": (config(masks="three"), "masks"),
    "prefix below 0": (config(prefix=-1), "prefix"),
    "other odds": (config(odds={"hazard": "high"}), "odds"),
    "empty weights": (written(WEIGHTS, b""), f"{WEIGHTS} cannot be read"),
    "cut weights": (cut, f"{WEIGHTS} cannot be read"),
    "no mask tokens": (weights(mask_tokens=None), "disagree about mask_tokens"),
    "more masks": (config(masks=4), "mask_tokens has shape"),
    "shared masks": (config(distinct=False), "mask_tokens has shape"),
    "narrow masks": (weights(mask_tokens=torch.zeros(3, 32)), "mask_tokens has shape"),
    "flat masks": (weights(mask_tokens=torch.tensor(1.0)), "mask_tokens has shape"),
    "longer prefix": (config(prefix=8), "prefix.0.keys has shape"),
    "no prefix": (config(prefix=0), "disagree about prefix.0.keys"),
    "less prefix": (weights(**{"prefix.1.keys": None}), "disagree about prefix.1.keys"),
    "other rank": (config(r=8), "lora_A.weight has shape"),
    "fewer layers": (config(target_modules=["q_proj"]), "disagree about .*down_proj"),
    "unknown layers": (config(target_modules=["fc1"]), "no linear layer fc1"),
    "no sampler head": (config(sampler=0), "disagree about sampler_head"),
    "more tensors": (weights(extra=torch.zeros(1)), "disagree about extra"),
    "not a number": (weights(mask_tokens=torch.full((3, 64), torch.nan)), "mask_tokens.*not finite"),
    "other shape": (config(base="0" * 64, shape={"vocabulary": 9}), "another shape .vocabulary 9. than"),
    "no shape": (config(base=None, shape=None), "another shape .which it does not say. than"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_by_name(exact: TransformersModel, fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    adapter_folder.save(folder, adapter(exact, 3, 4, 4, 32), exact, "bita", "tiny", {})
    adapter_folder.load(str(folder), exact)
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(AdapterError, match=message) as error:
        adapter_folder.load(str(folder), exact)
    assert "mine" in str(error.value) or fault == "unknown layers"


@pytest.mark.parametrize("source", ["./nothing", "nothing", "a/b/c", "/nothing/here"])
def test_a_name_that_is_nothing_is_refused(exact: TransformersModel, source: str) -> None:
    with pytest.raises(AdapterError, match=f"no adapter folder {source}"):
        adapter_folder.load(source, exact)


def test_a_hub_that_is_not_reached_is_named(exact: TransformersModel) -> None:
    with pytest.raises(AdapterError, match="some/where: neither a folder here"):
        adapter_folder.load("some/where", exact)


def test_methods_and_adapters_that_do_not_go_together(
    exact: TransformersModel, folder: Path, tmp_path: Path
) -> None:
    mine = str(tmp_path / "mine")
    adapter_folder.save(Path(mine), adapter(exact, 3, 4, 4), exact, "bita", "tiny", {})
    for method in ("plain", "llma", "jacobi"):
        with pytest.raises(AdapterError, match=f"mine.*{method}.*without one"):
            LLM(str(folder), method, adapter=mine)
    for method in ("bita", "space"):
        with pytest.raises(AdapterError, match=f"method '{method}' drafts with an adapter"):
            LLM(str(folder), method)
    for own in (Bita(), Space()):
        with pytest.raises(AdapterError, match="came without one"):
            Engine(exact).submit([5], own)
    model = LLM(str(folder), "bita", adapter=mine)
    drafted = model.generate("def add(", max_new_tokens=8)
    assert drafted.ids == model.using("plain").generate("def add(", max_new_tokens=8).ids
    with pytest.raises(AdapterError, match="drafts with an adapter"):
        model.using("space")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks the model in an old way
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'selfdraft'")  # which it passes over
@pytest.mark.parametrize("prefix", [0, 4])
def test_peft_reads_the_lora_of_a_folder(exact: TransformersModel, prefix: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = adapter(exact, 3, prefix, 4)
    adapter_folder.save(tmp_path, made, exact, "space", "tiny", {})
    wrapped = peft.PeftModel.from_pretrained(tiny_llama(torch.float32), tmp_path)
    found = {
        name.removeprefix(adapter_folder.PEFT): module.get_delta_weight("default")
        for name, module in wrapped.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert sorted(found) == made.names
    for name, low in zip(made.names, made.lora, strict=True):
        delta = made.config.scale * low.b.bfloat16().float() @ low.a.bfloat16().float()
        torch.testing.assert_close(found[name], delta)
