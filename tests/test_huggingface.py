"""`model.generate` with the hook == `model.generate` without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TextStreamer
from transformers.generation import LogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

import selfdraft
from selfdraft.errors import InvalidOption, InvalidPrompt, InvalidReference
from selfdraft.integrations.transformers import Hook
from selfdraft.models.transformers import Numerics

from conftest import tiny_llama
from runs import random_prompt


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(torch.float64)


@pytest.fixture(scope="module")
def fast() -> Hook:
    return selfdraft.hook("jacobi")


def left_padded(*lengths: int) -> dict[str, torch.Tensor]:
    rows = [random_prompt(length, seed) for seed, length in enumerate(lengths)]
    ids = torch.tensor([[1] * (max(lengths) - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (max(lengths) - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7, "min_new_tokens": 9, "sequence_bias": {(1,): 9.0, (7,): 2.0}},
        {"eos_token_id": [5, 9, 11, *range(60, 90)], "suppress_tokens": [44, 45]},
        {"min_length": 26, "eos_token_id": list(range(100))},
        {"renormalize_logits": True, "return_dict_in_generate": True},
    ],
)
def test_greedy_ids_are_those_of_generate(
    model: LlamaForCausalLM, fast: Hook, settings: dict[str, Any]
) -> None:
    inputs = left_padded(19, 7, 12)
    theirs = model.generate(**inputs, do_sample=False, max_new_tokens=24, **settings)
    ours = model.generate(**inputs, do_sample=False, max_new_tokens=24, custom_generate=fast, **settings)
    if settings.get("return_dict_in_generate"):
        theirs, ours = theirs.sequences, ours.sequences
    assert torch.equal(ours, theirs)


def test_samples_are_those_of_the_package(model: LlamaForCausalLM, fast: Hook) -> None:
    """A seed from torch's generator; rows are samples; plain and drafted agree."""
    inputs = left_padded(9)
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "max_new_tokens": 20,
        "num_return_sequences": 3,
    }

    def sample(hook: Hook, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return model.generate(**inputs, custom_generate=hook, **settings).tolist()  # type: ignore[no-any-return]

    first = sample(fast, 1)
    assert first == sample(selfdraft.hook("plain"), 1)
    assert first != sample(fast, 2)
    assert len({tuple(row) for row in first}) == 3


class Third(StoppingCriteria):
    """Ends at the third token divisible by three."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return (input_ids[:, 9:] % 3 == 0).sum(1) >= 3


def test_stopping_criteria_are_asked_after_every_token(model: LlamaForCausalLM, fast: Hook) -> None:
    inputs = left_padded(9)
    settings: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "stopping_criteria": [Third()]}
    theirs = model.generate(**inputs, **settings)
    assert theirs.shape[1] < 39
    assert torch.equal(model.generate(**inputs, custom_generate=fast, **settings), theirs)


class Collect(TextStreamer):
    """A streamer that keeps what it would print."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


def test_its_own_streamer_and_stop_strings(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    inputs = left_padded(9)
    theirs, ours = Collect(tokenizer), Collect(tokenizer)
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    out = model.generate(**inputs, **asked, streamer=theirs)
    model.generate(
        **inputs, **asked, custom_generate=selfdraft.hook(tokenizer=tokenizer, streamer=ours, numerics="fast")
    )
    assert ours.text == theirs.text != ""
    text = tokenizer.decode(out[0, 9:])
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    halted = model.generate(**inputs, **asked, custom_generate=selfdraft.hook(tokenizer=tokenizer, stop=stop))
    assert stop in tokenizer.decode(halted[0, 9:])
    assert torch.equal(halted, out[:, : halted.shape[1]])
    assert halted.shape[1] < out.shape[1]


class Odd(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 3}, "num_beams=3"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"logits_processor": [Odd()]}, "Odd"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
        ({"typical_p": 0.5, "do_sample": True}, "Typical"),
        ({"sequence_bias": {(3, 4): 1.0}}, "single tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    model: LlamaForCausalLM, fast: Hook, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidOption, match=named):
        model.generate(**left_padded(9), max_new_tokens=4, custom_generate=fast, **settings)


def test_bad_input(model: LlamaForCausalLM, fast: Hook, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidOption, match="tokenizer"):
        selfdraft.hook(stop="x")
    with pytest.raises(InvalidOption, match="tokenizer"):
        selfdraft.hook(references=["x"])
    for references in (b"text", [b"text"], ["a\udc80"]):
        with pytest.raises(InvalidReference):
            selfdraft.hook(references=references, tokenizer=tokenizer)  # type: ignore[arg-type]
    ids = torch.tensor([[5, 6, 7, 1]])
    with pytest.raises(InvalidPrompt, match="left"):
        model.generate(
            ids, attention_mask=torch.tensor([[1, 1, 1, 0]]), max_new_tokens=3, custom_generate=fast
        )
    streaming = selfdraft.hook(streamer=TextStreamer(tokenizer))
    with pytest.raises(InvalidOption, match="one prompt"):
        model.generate(**left_padded(5, 5), max_new_tokens=3, custom_generate=streaming)


def test_the_model_is_left_as_it_was_for_its_own_generate(model: LlamaForCausalLM, fast: Hook) -> None:
    inputs, config = left_padded(19, 7), GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=1)
    fresh = tiny_llama(torch.float64).generate(**inputs, generation_config=config)
    model.generate(**inputs, generation_config=config, custom_generate=fast)
    assert torch.equal(model.generate(**inputs, generation_config=config), fresh)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_the_attention_of_the_user_stays(numerics: Numerics) -> None:
    """Whatever it is, also where it changes between two calls."""
    model, hook = tiny_llama(torch.bfloat16), selfdraft.hook("jacobi", numerics=numerics)
    asked: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    texts = []
    for own in ("sdpa", "eager", "eager", "sdpa"):
        model.set_attn_implementation(own)
        theirs = model.generate(**left_padded(9), **asked)
        texts.append(model.generate(**left_padded(9), **asked, custom_generate=hook).tolist())
        assert model.config._attn_implementation == own
        assert torch.equal(model.generate(**left_padded(9), **asked), theirs)
    assert texts == [texts[0]] * 4


def test_the_attention_stays_where_the_hook_fails(model: LlamaForCausalLM) -> None:
    own = model.config._attn_implementation
    asked: dict[str, Any] = {"max_new_tokens": 3, "stopping_criteria": [Confident()]}
    with pytest.raises(InvalidOption):
        model.generate(**left_padded(9), **asked, custom_generate=selfdraft.hook())
    assert model.config._attn_implementation == own


def test_settings_that_a_model_ships() -> None:
    """Those of sampling reach the hook; `stop_strings` have to be None, as its docstring says."""
    model = tiny_llama(torch.float64)
    shipped: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}
    model.generation_config.update(**shipped, repetition_penalty=1.05, stop_strings=["x"])
    asked: dict[str, Any] = {**left_padded(9), "max_new_tokens": 12, "custom_generate": selfdraft.hook()}
    with pytest.raises(ValueError, match="stop"):
        model.generate(**asked)
    assert "stop_strings" in str(selfdraft.hook.__doc__)

    def sample(model: LlamaForCausalLM, **settings: Any) -> list[list[int]]:
        torch.manual_seed(1)
        return model.generate(**asked, **settings).tolist()  # type: ignore[no-any-return]

    model.generation_config.stop_strings = None
    bare = tiny_llama(torch.float64)
    assert sample(model) == sample(bare, **shipped, repetition_penalty=1.05)
    assert sample(model) != sample(bare, do_sample=True)


class Wide(StoppingCriteria):
    """Ends by the length of what it sees, padding included; says so with a plain bool."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> bool:  # type: ignore[override]
        return input_ids.shape[1] >= 25


class Confident(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return scores.amax(-1) > 99  # type: ignore[no-any-return]


def test_criteria_see_padded_rows(model: LlamaForCausalLM, fast: Hook) -> None:
    inputs = left_padded(19, 7)
    asked: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    ours = model.generate(**inputs, **asked, stopping_criteria=[Wide()], custom_generate=fast)
    assert torch.equal(ours, model.generate(**inputs, **asked, stopping_criteria=[Wide()]))
    with pytest.raises(InvalidOption, match="Confident"):
        model.generate(**inputs, **asked, stopping_criteria=[Confident()], custom_generate=fast)


def test_positions_and_penalties_of_another_kind_are_refused(model: LlamaForCausalLM, fast: Hook) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    asked: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3}
    with pytest.raises(InvalidOption, match="position_ids"):
        model.generate(ids, position_ids=torch.tensor([[1, 2, 30, 40]]), custom_generate=fast, **asked)
    partial = RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=2)
    with pytest.raises(InvalidOption, match="ignores a part"):
        model.generate(ids, logits_processor=[partial], custom_generate=fast, **asked)


def test_the_end_of_the_context_is_told(fast: Hook) -> None:
    short = tiny_llama(torch.float64, context=24)
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.warns(UserWarning, match="context of 24"):
        out = short.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, custom_generate=selfdraft.hook()
        )
    assert out.shape[1] == 24
