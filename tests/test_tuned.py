"""Tuned models: what is drafted is plain decoding's of the same tuned weights, the base stays as it is, and
the merged weights are those that LoRA describes. Each planted fault is seen."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from selfdraft import LLM, Engine, Method, Request
from selfdraft.drafting.auto import Auto
from selfdraft.drafting.jacobi import Jacobi
from selfdraft.drafting.llma import Llma
from selfdraft.drafting.plain import Plain
from selfdraft.drafting.space import SpaceTuned
from selfdraft.errors import AdapterError, InvalidOption
from selfdraft.models.adapters import adapter as parts
from selfdraft.models.adapters import folder as adapter_folder
from selfdraft.models.adapters.adapter import Adapter, AdapterConfig, LowRank, linear_layers
from selfdraft.models.transformers import MARK, TransformersModel

from adapting import LAYERS, Helped, MaskOracle
from conftest import Run, tiny_llama
from runs import greedy, random_prompt, run, sampled

PROMPT = random_prompt(30, seed=1)
WAYS = {"greedy": greedy(16), "sampled": sampled(0.8, 3, 16)}


def tuner(
    model: TransformersModel, masks: int = 0, prefix: int = 0, sampler: int = 0, rank: int = 4
) -> Adapter:
    """A random adapter that changes the model, in the dtype in which one is loaded."""
    config = AdapterConfig(masks, True, prefix, rank, 1.5 * rank, LAYERS, sampler, gated=False)
    torch.manual_seed(0)
    made = Adapter(config, model.width, model.read([0]), linear_layers(model.model, config.targets))
    with torch.no_grad():
        for part in made.parameters():
            part.copy_(torch.randn_like(part) * 0.3)
    return made.to(torch.float64 if model.dtype == torch.float64 else torch.float32).requires_grad_(False)


def methods(answer: Any) -> list[Method]:
    """Some that draft with masks come first."""
    masked = [Helped(SpaceTuned(), answer), Helped(SpaceTuned(faithful=True), answer), MaskOracle(answer)]
    return [
        *masked,
        SpaceTuned(),
        Jacobi(12),
        Jacobi(8, faithful=True),
        Llma(trigger=1, block=8),
        Auto(),
        Plain(),
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["exact", "exact32", "double"])
@pytest.mark.parametrize("shape", [(0,), (3, 4, 16)], ids=str)
def test_drafted_is_plain_of_the_tuned_weights(
    shape: tuple[int, ...], model: str, way: str, request: pytest.FixtureRequest
) -> None:
    base: TransformersModel = request.getfixturevalue(model)
    before = run(base, Plain(), PROMPT, WAYS[way]).emitted
    tuned = base.adapted(tuner(base, *shape))
    plain = run(tuned.base, Plain(), PROMPT, WAYS[way]).emitted
    assert plain != before, "the adapter must change the text, or nothing is tested"
    for method in methods(plain)[0 if shape[0] else 4 :]:
        assert run(tuned, method, PROMPT, WAYS[way]).emitted == plain, method
    assert run(base, Plain(), PROMPT, WAYS[way]).emitted == before


@pytest.mark.parametrize("model", ["exact", "double"])
def test_batch_is_single(model: str, request: pytest.FixtureRequest) -> None:
    base: TransformersModel = request.getfixturevalue(model)
    tuned = base.adapted(tuner(base, 3, 4, 16))
    dice = random.Random(0)
    alone, waiting = [], []
    for seed in range(8):
        prompt = random_prompt(dice.randint(1, 70), seed)
        params = replace(WAYS["sampled" if seed % 2 else "greedy"], max_new_tokens=dice.randint(1, 24))
        alone.append(run(tuned.base, Plain(), prompt, params).emitted)
        waiting.append((prompt, methods(alone[-1])[seed], params))
    engine, joined = Engine(tuned), list[Request]()
    while waiting or engine.requests:
        while waiting and len(engine.requests) < 4:
            joined.append(engine.submit(*waiting.pop(0)))
        engine.step()
    assert [request.emitted for request in joined] == alone


def merged_as_peft_does(folder: Path, base: TransformersModel) -> None:
    """The weights of a saved adapter, merged here and by peft, and LoRA left beside them, say the same."""
    adapter_folder.save(folder, tuner(base), base, "cllm", "tiny", {})
    loaded = adapter_folder.load(str(folder), base)
    tuned = base.adapted(loaded)
    theirs: Any = PeftModel.from_pretrained(tiny_llama(torch.float64), folder)
    peft = cast(LlamaForCausalLM, theirs.merge_and_unload())
    for name in loaded.names:
        torch.testing.assert_close(
            tuned.model.get_submodule(name).weight, peft.get_submodule(name).weight.to(tuned.dtype)
        )
    logits = tuned.reference(PROMPT)
    torch.testing.assert_close(logits, peft(torch.tensor([PROMPT])).logits[0])
    torch.testing.assert_close(base.learning(loaded).reference(PROMPT), logits)
    assert not torch.allclose(logits, base.reference(PROMPT))


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments", "ignore:.*is_gradient_checkpointing")
def test_merged_weights_are_peft_s(double: TransformersModel, tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in double.model.named_parameters()}
    merged_as_peft_does(tmp_path / "mine", double)
    for name, weight in double.model.named_parameters():
        assert torch.equal(weight, before[name]), name


def merged_twice(patch: pytest.MonkeyPatch) -> None:
    merge = parts.merge
    patch.setattr(
        "selfdraft.models.transformers.merge", lambda model, adapter: merge(merge(model, adapter), adapter)
    )


def one_layer_left_out(patch: pytest.MonkeyPatch) -> None:
    changed = parts._changed
    patch.setattr(parts, "_changed", lambda *given: list(changed(*given))[1:])


def in_the_base(patch: pytest.MonkeyPatch) -> None:
    """The shared tensors are written to."""

    def merge(model: Any, adapter: Adapter) -> Any:
        with torch.no_grad():
            for _, module, low in parts._changed(model, adapter):
                module.weight += adapter.config.scale * low.b @ low.a
        return parts.share(model)

    patch.setattr("selfdraft.models.transformers.merge", merge)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments", "ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("fault", [merged_twice, one_layer_left_out, in_the_base])
def test_wrong_merges_are_seen(
    fault: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = TransformersModel(tiny_llama(torch.float64), "fast")
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        merged_as_peft_does(tmp_path / "mine", base)


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Path:
    """An adapter that tunes the saved model, without masks."""
    model = LLM(str(folder)).model
    adapter_folder.save(tmp_path / "mine", tuner(model), model, "cllm", str(folder), {})
    return tmp_path / "mine"


def test_the_grade_is_told(folder: Path, saved: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tuned = LLM(str(folder), "jacobi", adapter=str(saved))
    result = tuned.generate("def add(", max_new_tokens=12)
    base = tuned.using("plain").generate("def add(", max_new_tokens=12)
    assert (result.grade, base.grade) == ("tuned", "tuned")
    assert result.ids == base.ids, "without an adapter a tuned model stays tuned"
    again = tuned.using("llma", adapter=str(saved)).generate("def add(", max_new_tokens=12)
    assert again.ids == result.ids, "an adapter is put into the model as it was loaded"
    untouched = LLM(str(folder), "plain").generate("def add(", max_new_tokens=12)
    assert untouched.grade == "base"
    assert untouched.ids != result.ids
    again = tuned.using("jacobi", {"faithful": True}).generate("def add(", max_new_tokens=12)
    assert (again.ids, again.grade) == (result.ids, "tuned")
    loaded = tuned.model.loaded.model
    loaded.config._attn_implementation = "sdpa"
    setattr(loaded.config, MARK, {"method": "cllm"})
    assert LLM(loaded, tokenizer=tokenizer).model.grade == "tuned"


def test_what_does_not_go_together_is_refused(folder: Path, saved: Path, double: TransformersModel) -> None:
    with pytest.raises(AdapterError, match="no mask tokens, with which method 'space-tuned' drafts"):
        LLM(str(folder), "space-tuned", adapter=str(saved))
    with pytest.raises(AdapterError, match="drafts with an adapter"):
        LLM(str(folder), "space-tuned")
    for wrong in ({"gated": True}, {"prefix": 4}, {"sampler": 8}):
        with pytest.raises(InvalidOption, match="masks is 0"):
            AdapterConfig(**{"masks": 0, "rank": 4, "gated": False, **wrong})
    adapter = tuner(double)
    cast(LowRank, adapter.lora[0]).a = torch.nn.Parameter(torch.zeros(4, 5))
    with pytest.raises(AdapterError, match="or of another size"):
        double.adapted(adapter)
    quantised = TransformersModel(tiny_llama(torch.float64), "fast")
    layer = quantised.model.get_submodule(tuner(double).names[0])
    for coarse in (torch.int8, torch.float8_e4m3fn):
        layer.weight = torch.nn.Parameter(layer.weight.to(coarse), requires_grad=False)
        with pytest.raises(AdapterError, match="is quantised"):
            parts.merge(quantised.model, tuner(double))
    with pytest.raises(AdapterError, match="is quantised"):
        quantised.copied(torch.float32)


def test_verify_compares_with_the_tuned_weights(folder: Path, saved: Path, command: Run) -> None:
    words = ("--model", str(folder), "--method", "jacobi", "--adapter", str(saved), "-n", "8", "--seeds", "1")
    code, said, err = command("verify", *words)
    assert code == 0, err
    assert "exact" in said.splitlines()[-1]
    code, said, _ = command("generate", "def add(", *words[:6], "-n", "4", "--json")
    assert code == 0
    assert '"grade": "tuned"' in said


def test_another_way_to_draft_with_the_same_masks(folder: Path, tmp_path: Path) -> None:
    model = LLM(str(folder)).model
    tuned = tuner(model, masks=3)
    adapter_folder.save(tmp_path / "mine", tuned, model, "space-tuned", str(folder), {})
    one = LLM(str(folder), "space-tuned", adapter=str(tmp_path / "mine"))
    other = one.using("space-tuned", {"faithful": True})
    assert one.generate("def", max_new_tokens=9).ids == other.generate("def", max_new_tokens=9).ids
    assert other.model.grade == "tuned"


def test_the_bench_compares_with_plain_of_the_same_weights(
    folder: Path, saved: Path, command: Run, tmp_path: Path
) -> None:
    (tmp_path / "few.jsonl").write_text('{"prompt": "def add("}\n{"prompt": "class Stack:"}\n')
    out = tmp_path / "out"
    words = (
        "bench",
        "--file",
        str(tmp_path / "few.jsonl"),
        "--model",
        str(folder),
        "--repeats",
        "1",
        "-n",
        "8",
    )
    code, said, err = command(*words, "-m", f"jacobi:adapter={saved}", "-m", "llma", "--out", str(out))
    assert code == 0, err
    report = json.loads((out / "report.json").read_text())
    arms = report["suites"]["few"]["arms"]
    plain = f"plain:adapter={saved}"
    assert list(arms) == ["plain", plain, f"jacobi:adapter={saved}", "llma", "generate"]
    assert [arm["grade"] for arm in arms.values()] == ["base", "tuned", "tuned", "base", "base"]
    assert [arm["plain"] for arm in arms.values()] == ["plain", plain, plain, "plain", "plain"]
    for name, arm in arms.items():
        assert arm["identity"]["identical"] == arm["identity"]["of"] == 2, name
    assert set(report["run"]["tuned"]) == {plain, f"jacobi:adapter={saved}"}
    assert "is that of tuned weights" in " ".join(said.split())
