"""Models that a user has loaded already: wrapped, quantised, and still the user's afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from selfdraft import LLM
from selfdraft.drafting.plain import Plain
from selfdraft.errors import InvalidOption, ModelUnsupported
from selfdraft.models.transformers import TransformersModel
from selfdraft.verify.adversaries import Oracle

from architectures import WORKING, build
from conftest import tiny_llama
from runs import greedy, random_prompt, run

PROMPT = random_prompt(30, 1)


@torch.inference_mode()
def generated(model: torch.nn.Module, new: int = 12) -> list[int]:
    """What transformers' own loop makes of the prompt."""
    ids = torch.tensor([PROMPT])
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "min_new_tokens": new}
    text: list[int] = model.generate(input_ids=ids, do_sample=False, **given)[0].tolist()  # type: ignore[operator]
    return text[len(PROMPT) :]


def drafted(model: TransformersModel, answer: Sequence[int]) -> list[int]:
    """The text when its own continuation is proposed, among wrong ones."""
    return list(run(model, Oracle(answer), PROMPT, greedy(len(answer))).emitted)


def test_an_object_is_what_its_folder_is(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    by_object = LLM(model, tokenizer=tokenizer).generate("def add", max_new_tokens=8)
    assert by_object.model == "llama"
    assert by_object.ids == LLM(str(folder)).generate("def add", max_new_tokens=8).ids


def test_what_an_object_needs(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidOption, match="tokenizer"):
        LLM(tiny_llama())
    with pytest.raises(InvalidOption, match="dtype"):
        LLM(tiny_llama(), tokenizer=tokenizer, dtype="float32")
    with pytest.raises(ModelUnsupported, match="Linear is not a model"):
        LLM(torch.nn.Linear(2, 2), tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt_oss", "cohere2", "opt"])
def test_the_model_stays_the_users(kind: str) -> None:
    """`generate` gives the same before and after, a second load too; and so do we."""
    model = build(kind, WORKING[kind])
    before = generated(model)
    ours = TransformersModel(model, "fast")
    assert drafted(ours, before) == before
    assert generated(model) == before
    assert drafted(TransformersModel(model, "fast"), before) == before


def lora(model: PreTrainedModel) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    wrapped: torch.nn.Module = peft.get_peft_model(model, config)
    return wrapped


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks the model in an old way
def test_an_adapter_of_peft_is_at_work() -> None:
    plain = generated(tiny_llama(torch.float64))
    model = lora(tiny_llama(torch.float64))
    adapted = generated(model)
    assert adapted != plain
    assert drafted(TransformersModel(model), adapted) == adapted
    exact = TransformersModel(lora(tiny_llama(torch.bfloat16)), "exact")
    text = list(run(exact, Plain(), PROMPT, greedy(12)).emitted)
    assert drafted(exact, text) == text


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_prompts_of_peft_are_refused() -> None:
    """Their virtual tokens are in no tree."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ModelUnsupported, match="llama"):
        TransformersModel(peft.get_peft_model(tiny_llama(), config))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_rows_that_are_quantised_together_are_refused() -> None:
    """One scale for all rows of a call makes each depend on its company: no text could be kept."""
    model = tiny_llama()
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    for numerics in ("exact", "fast", None):
        with pytest.raises(ModelUnsupported, match="does not verify a tree"):
            TransformersModel(quantised, numerics)  # type: ignore[arg-type]


SHIPPED = {  # as Qwen ships them
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.05,
    "stop_strings": ["x"],
}


def test_sampling_settings_of_a_model_are_named_once(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """They are not applied: a request alone says how it samples."""
    plain = LLM(tiny_llama(), "plain", tokenizer=tokenizer)
    assert caplog.records == [], "a model without such settings says nothing"
    model = tiny_llama()
    model.generation_config.update(**SHIPPED)
    llm = LLM(model, "plain", tokenizer=tokenizer)
    for one in (llm, llm.using("jacobi")):
        assert one.generate("def", max_new_tokens=8).ids == plain.generate("def", max_new_tokens=8).ids
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("selfdraft", "WARNING")
    for name, value in SHIPPED.items():
        assert f"{name}={value}" in record.getMessage()
