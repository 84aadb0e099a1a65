"""What the checks at load refuse, and what they measure."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
)
from transformers.models.mistral import modeling_mistral

from selfdraft import Tree
from selfdraft.errors import ModelUnsupported
from selfdraft.models.head import Tail
from selfdraft.models.numerics import RANGES, RowRange
from selfdraft.models.transformers import TransformersModel

from conftest import tiny_llama


def test_a_model_that_cannot_verify_a_tree_is_refused_by_name() -> None:
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=320)
    with pytest.raises(ModelUnsupported, match="bloom"):
        TransformersModel(BloomForCausalLM(config))


def test_a_wrong_tree_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TransformersModel.layout

    def blind(self: TransformersModel, *args: Any) -> Any:
        laid = layout(self, *args)
        return replace(laid, seen=laid.seen.zero_())

    monkeypatch.setattr(TransformersModel, "layout", blind)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        with pytest.raises(ModelUnsupported, match="does not verify a tree"):
            TransformersModel(tiny_llama(dtype))


class Scaled(torch.nn.Module):
    """An output layer that the model's own forward does not use alone."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(hidden)  # type: ignore[no-any-return]


def test_logits_made_outside_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the base model runs apart where it can; else the whole forward does."""
    model: PreTrainedModel = tiny_llama()
    head = model.lm_head
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: Scaled(head))
    apart = TransformersModel(model)
    assert isinstance(apart._head, Tail)
    assert apart._base is model.model
    logits = some_logits(apart)
    monkeypatch.setattr(Tail, "__call__", lambda self, hidden: 2 * head(hidden))
    whole = TransformersModel(model)
    assert whole._base is model
    assert whole.vocab_size == 320
    assert torch.equal(some_logits(whole), logits)


def some_logits(model: TransformersModel) -> torch.Tensor:
    rows = model.forward([Tree.chain([3, 4, 5])], [model.pool().open()])
    return model.head(rows, [range(3)])[0]


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def mistral(window: int | None) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, sliding_window=window, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).double()


def keeps_its_window(patch: pytest.MonkeyPatch, size: int) -> None:
    """A forward that has its window from somewhere else than the config."""
    make = modeling_mistral.create_sliding_window_causal_mask

    def fixed(config: MistralConfig, **rest: Any) -> Any:
        config = copy.deepcopy(config)
        config.sliding_window = size
        return make(config=config, **rest)

    patch.setattr(modeling_mistral, "create_sliding_window_causal_mask", fixed)


def test_windows_are_probed_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of thousands costs no more to probe than a short one; the config is as it was."""
    lengths: list[int] = []
    own = TransformersModel.reference

    def spy(self: TransformersModel, tokens: Sequence[int], *rest: Any) -> torch.Tensor:
        lengths.append(len(tokens))
        return own(self, tokens, *rest)

    monkeypatch.setattr(TransformersModel, "reference", spy)
    model = TransformersModel(mistral(4096), "fast")
    assert max(lengths) < 32
    assert [kind.size for kind in model.kinds.values()] == [4096]
    assert model.model.config.sliding_window == 4096


def test_windows_that_cannot_be_made_short_are_probed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    keeps_its_window(monkeypatch, 40)
    assert [kind.size for kind in TransformersModel(mistral(40), "fast").kinds.values()] == [40]
    with pytest.raises(ModelUnsupported, match="does not verify a tree"):
        TransformersModel(mistral(60), "fast")
    with pytest.raises(ModelUnsupported, match="windows of 4096 tokens are too long to probe"):
        TransformersModel(mistral(4096), "fast")


def test_no_window_no_rule() -> None:
    assert [kind.size for kind in TransformersModel(mistral(None), "fast").kinds.values()] == [None]


def test_frequencies_that_switch_with_length_bound_the_context() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    config = Phi3Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=320,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters=rope | {"original_max_position_embeddings": 64},
        pad_token_id=0,
    )
    assert TransformersModel(AutoModelForCausalLM.from_config(config)).context == 64


def test_row_ranges() -> None:
    assert RowRange(1, 32).pieces(5) == [(0, 5)]
    assert RowRange(4, 32).pieces(1) == [(0, 4)]
    assert RowRange(4, 32).pieces(33) == [(0, 32), (32, 36)]
    assert RowRange(16, 32).pieces(1, lanes=3) == [(0, 6)]
    assert RowRange(16, 32).pieces(25, lanes=3) == [(0, 10), (10, 20), (20, 26)]
    assert RowRange(1, 32).pieces(3, lanes=32) == [(0, 1), (1, 2), (2, 3)]
    assert [RowRange(16, 32).together(n) for n in (1, 3, 16, 17, 40)] == [1, 3, 16, 17, 32]
    assert [RowRange(8, 8).together(n) for n in (1, 3, 4, 7, 9)] == [1, 2, 4, 4, 8]


@given(st.sampled_from(RANGES), st.integers(1, 80), st.integers(1, 70))
def test_every_call_stays_in_range(rows: RowRange, width: int, lanes: int) -> None:
    together = rows.together(lanes)
    pieces = rows.pieces(width, together)
    assert pieces[0][0] == 0
    assert pieces[-1][1] >= width
    assert all(b == c for (_, b), (c, _) in pairwise(pieces))
    assert all(rows.least <= (b - a) * together <= rows.most for a, b in pieces)


def test_kernels_that_change_bits_with_the_row_count_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where calls of fewer than five rows round differently, the range starts at eight; where every count
    does in its own way, each call has one and the same; where nothing repeats, exact is refused."""
    linear = torch.nn.Linear.forward
    calls = count()

    def few_rows_differ(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return linear(self, x) * (1.01 if x.flatten(0, -2).shape[0] < 5 else 1)

    def all_differ(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return linear(self, x) * (1 + x.flatten(0, -2).shape[0] / 100)

    def nothing_repeats(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return linear(self, x) * (1 + next(calls) % 7 / 100)

    monkeypatch.setattr(torch.nn.Linear, "forward", few_rows_differ)
    assert TransformersModel(tiny_llama(torch.bfloat16)).rows == RowRange(8, 32)
    monkeypatch.setattr("selfdraft.models.transformers.check_tree", lambda model: None)
    monkeypatch.setattr(torch.nn.Linear, "forward", all_differ)
    assert TransformersModel(tiny_llama(torch.bfloat16)).rows == RowRange(8, 8)
    monkeypatch.setattr(torch.nn.Linear, "forward", nothing_repeats)
    with pytest.raises(ModelUnsupported, match="numerics"):
        TransformersModel(tiny_llama(torch.bfloat16), "exact")
    with pytest.warns(UserWarning, match="exact"):
        model = TransformersModel(tiny_llama(torch.bfloat16))
    assert (model.numerics, model.rows) == ("fast", RowRange())
