"""Looped models made from the layers of ordinary ones. Wrong layers are seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from selfdraft.errors import InvalidOption, ModelUnsupported
from selfdraft.models.looped import retrofit
from selfdraft.models.looped.config import Shape
from selfdraft.models.looped.retrofit import blank, share, sources
from selfdraft.models.transformers import MARK

from conftest import tiny_llama

IDS = torch.arange(2, 26)[None]


def test_the_weightiest_neurons_stay() -> None:
    """Where the others weigh nothing, the narrow model says the same."""
    wide = tiny_llama()
    idle = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:32]
    with torch.no_grad():
        for layer in wide.model.layers:
            layer.mlp.up_proj.weight[idle] *= 1e-9
    narrow = share(wide, Shape(2, 1), intermediate=96)
    assert narrow.config.intermediate_size == 96
    torch.testing.assert_close(narrow(IDS).logits, wide(IDS).logits)
    for width in (0, 129):
        with pytest.raises(InvalidOption, match="intermediate must be from 1 to the model's own 128"):
            share(wide, Shape(2, 1), intermediate=width)
    with pytest.raises(InvalidOption, match="keeps the width"):
        share(narrow, Shape(2, 2), intermediate=64)


@pytest.mark.parametrize("rule", ["step", "average"])
def test_all_layers_and_one_loop_are_the_checkpoint(rule: Any) -> None:
    model, ids = tiny_llama(), torch.arange(2, 42)[None]
    same = share(model, Shape(2, 1), rule)
    assert torch.equal(same(ids).logits, model(ids).logits)
    assert not torch.equal(share(model, Shape(2, 2), rule)(ids).logits, model(ids).logits)


def test_wrong_layers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not the checkpoint's, or in another order."""
    mean = retrofit._mean
    monkeypatch.setattr(
        retrofit, "_mean", lambda states: mean([{k: -w for k, w in s.items()} for s in states])
    )
    with pytest.raises(AssertionError):
        test_all_layers_and_one_loop_are_the_checkpoint("step")
    monkeypatch.undo()
    monkeypatch.setattr(retrofit, "sources", lambda *given: sources(*given)[::-1])
    with pytest.raises(AssertionError):
        test_all_layers_and_one_loop_are_the_checkpoint("step")


def test_layers_by_rule() -> None:
    assert sources(8, 1, "step") == [[0]]
    assert sources(8, 2, "step") == [[0], [7]]
    assert sources(8, 4, "step") == [[0], [2], [5], [7]]
    assert sources(3, 6, "step") == [[0], [0], [1], [1], [2], [2]]
    assert sources(3, 6, "average") == sources(3, 6, "step")
    assert sources(8, 3, "average") == [[0, 3, 6], [1, 4, 7], [2, 5]]
    model = tiny_llama()
    first, second = (layer.mlp.up_proj.weight for layer in model.model.layers)
    (mean,) = share(model, Shape(1, 4), "average").model.layers
    torch.testing.assert_close(mean.mlp.up_proj.weight, (first + second) / 2)
    assert torch.equal(share(model, Shape(1, 4), "step").model.layers[0].mlp.up_proj.weight, first)


def test_what_is_taken_over_and_what_is_marked() -> None:
    model = tiny_llama(torch.bfloat16)
    looped = share(model, Shape(1, 3))
    assert looped.dtype == torch.bfloat16
    assert torch.equal(looped.lm_head.weight, model.lm_head.weight)
    assert torch.equal(looped.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert getattr(looped.config, MARK)["method"] == "speed"
    looped.config.exit_agreement = [0.5, 0.7, 1.0]
    again = share(looped, Shape(1, 5))
    assert again.config.num_hidden_layers == 5
    assert again.config.exit_agreement is None
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), looped.parameters(), strict=True))
    fresh = blank(looped.config, Shape(2, 2))
    assert not hasattr(fresh.config, MARK)
    assert fresh.config.hidden_size == model.config.hidden_size


def test_what_cannot_be_shared_is_named() -> None:
    model = tiny_llama()
    for unique, loops in ((0, 2), (2, 0), (-1, 2)):
        with pytest.raises(InvalidOption, match="at least 1"):
            share(model, Shape(unique, loops))
    with pytest.raises(ModelUnsupported, match="a looped model with unique 2 cannot go on with 1"):
        share(share(model, Shape(2, 2)), Shape(1, 2))
    config = MistralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    with pytest.raises(ModelUnsupported, match="MistralForCausalLM cannot be looped: that needs the layers"):
        share(MistralForCausalLM(config), Shape(1, 2))
    with pytest.raises(ModelUnsupported, match="MistralConfig has others"):
        blank(config, Shape(1, 2))
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.ones(2, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ModelUnsupported, match="quantised"):
        share(model, Shape(1, 2))
