"""NaN and infinity end the requests that see them, in every build and format, and change no other bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig

from selfdraft import SamplingParams
from selfdraft.drafting.plain import Plain
from selfdraft.engine.engine import Engine
from selfdraft.engine.request import Request
from selfdraft.engine.tree import Tree
from selfdraft.errors import NotFinite
from selfdraft.models.decoder import Decoder, DecoderRows
from selfdraft.models.decoder_work import DecoderPool
from selfdraft.models.kernels import library as kernels
from selfdraft.models.weights import Stored
from selfdraft.verify.adversaries import Oracle

from runs import greedy, random_prompt, run, sampled
from test_decoder import BASE, BlockWeights, build, made

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # scales of infinity
BUILDS = kernels.builds()
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_1", "Q6_K")
BAD = 300
"""The token whose embedding is not finite; prompts are of lower ids."""
SHAPE = {**BASE, "num_hidden_layers": 3}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "capped": Gemma2Config(**SHAPE, query_pre_attn_scalar=48, tie_word_embeddings=False),
}
"""Caps of scores and logits make numbers of NaN and infinity."""
VALUES = (np.nan, np.inf, -np.inf)
Change = Callable[[Stored], None]
SCALES = {"Q8_0": (0, 2), "Q4_1": (0, 4), "Q5_1": (0, 4), "Q6_K": (208, 210)}
"""Where the halves of a block lie: its scale, and its minimum if it has one."""


@cache  # the same for each build, value and matrix
def sound_weights(config: str, kind: str) -> tuple[PreTrainedConfig, BlockWeights]:
    own = CONFIGS[config]
    if kind == "Q6_K":  # rows of whole blocks
        own = type(own)(
            **{**own.to_diff_dict(), "hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
        )
    return own, BlockWeights(made(own), kind, kind)


def with_change(sound: BlockWeights, matrix: str, change: Change) -> BlockWeights:
    found = sound.linear(matrix)
    changed = replace(found, rows=found.rows.copy())
    change(changed)
    twin = copy.copy(sound)
    twin.stored = {**sound.stored, matrix: changed}
    return twin


def in_row(row: int, value: float) -> Change:
    """Put a value into one row of a matrix: for a weight, or for the halves of a block."""

    def change(stored: Stored) -> None:
        if stored.kind in SCALES:
            first, last = SCALES[stored.kind]
            stored.rows[row, first:last].view(np.float16)[:] = value
        elif stored.kind == "BF16":
            stored.rows[row].view(np.uint16)[5] = np.float32(value).view(np.uint32) >> 16
        else:
            stored.rows[row].view(np.float16 if stored.kind == "F16" else np.float32)[5] = value

    return change


def decoder(name: str, kind: str, config: str, matrix: str = "", change: Change = lambda _: None) -> Decoder:
    own, weights = sound_weights(config, kind)
    if matrix:
        weights = with_change(weights, matrix, change)
    return Decoder(own, weights, build(name), threads=2)


def end(engine: Engine) -> None:
    while engine.requests:
        engine.step()


def failed(request: Request) -> bool:
    return request.finish_reason == "error" and isinstance(request.error, NotFinite)


def sound_text(model: Decoder, params: SamplingParams) -> tuple[list[int], list[int]]:
    """A prompt, and a text after it without the bad token; one that comes to it ends there."""
    for seed in range(5, 30):
        prompt, engine = random_prompt(40, seed, vocabulary=290), Engine(model)
        request = engine.submit(prompt, Plain(), params)
        end(engine)
        if not failed(request):
            return prompt, request.emitted
        assert request.emitted[-1] == BAD
    raise AssertionError("no text without the bad token")


def check_a_bad_token(model: Decoder) -> None:
    """In a prompt, at its end or before it; and as a draft token."""
    for params in (greedy(10), sampled(tokens=10)):
        sound, plain = sound_text(model, params)
        engine = Engine(model)
        prompts = [[*sound[:at], BAD, *sound[at:]] for at in (0, 10, len(sound))]
        bad = [engine.submit(prompt, Plain(), params) for prompt in prompts]
        good = engine.submit(sound, Oracle([BAD, *plain[1:]]), params)
        end(engine)
        assert all(failed(request) and not request.emitted for request in bad)
        assert good.emitted == plain


def check_a_bad_row(model: Decoder) -> None:
    """Rows that do not see it keep their bits; those that do are marked."""
    sound = random_prompt(40, seed=6, vocabulary=290)
    found = []
    for third in (7, BAD):
        cache = model.pool().open()
        model.forward([Tree.chain(sound)], [cache])
        cache.keep(range(len(sound)), [])
        tree = Tree((5, 6, 7, third, 8, 9, 10), (-1, 0, 1, 0, 3, 3, 0))
        rows = model.forward([tree], [cache], wanted=[7])
        found.append((model.head(rows, [range(7)])[0].clone(), rows.picks[0], rows.finite[0]))
    (before, picks, finite), (after, others, marks) = found
    apart = [0, 1, 2, 6]
    assert all(finite)
    assert torch.equal(after[apart], before[apart])
    assert [pick for row, pick in enumerate(picks) if row in apart] == [others[row] for row in apart]
    assert [row for row in range(7) if others[row] >= 0] == apart
    assert [row for row in range(7) if marks[row]] == apart


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILDS)
def test_a_token_that_is_not_finite(name: str, kind: str, config: str) -> None:
    for value in VALUES:
        model = decoder(name, kind, config, "model.embed_tokens.weight", in_row(BAD, value))
        check_a_bad_row(model)
    check_a_bad_token(model)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILDS)
def test_a_weight_that_is_not_finite(name: str, kind: str, config: str) -> None:
    """All rows see it, so no request gets a token."""
    layer = "model.layers.1."
    parts = ("self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    for i, matrix in enumerate(["lm_head", "lm_head", *(layer + part for part in parts)]):
        model = decoder(name, kind, config, f"{matrix}.weight", in_row(9, VALUES[i % 3]))
        engine = Engine(model)
        requests = [engine.submit(random_prompt(9, 1), Plain(), params) for params in (greedy(), sampled())]
        end(engine)
        assert all(failed(request) and not request.emitted for request in requests), matrix


def poison(request: Request, which: Literal["keys", "values"], value: float) -> None:
    """Put a value into a key or value that the request has in its cache."""
    pool = request.cache.pool
    assert isinstance(pool, DecoderPool)
    page, lane = request.cache.pages[0], 3
    dtype, stored = (np.float32, value)
    if pool.wide == 2:
        dtype, stored = np.uint16, int(np.float32(value).view(np.uint32) >> 16)
    flat = (
        getattr(pool, which)
        .view(dtype)
        .reshape(len(pool.keys), -1, pool.key_heads, pool.head_size * pool.page)
    )
    flat[page, 1, 0, 5 * pool.page + lane if which == "keys" else lane * pool.head_size + 5] = stored


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize("name", BUILDS)
def test_a_key_or_value_that_is_not_finite(name: str, kind: str, config: str) -> None:
    model = decoder(name, kind, config)
    prompts = [random_prompt(40, seed) for seed in range(2)]
    for params in (greedy(10), sampled(tokens=10)):
        expected = run(model, Plain(), prompts[0], params).emitted
        for which in ("keys", "values"):
            for value in VALUES:
                engine = Engine(model)
                good, bad = (engine.submit(prompt, Plain(), params) for prompt in prompts)
                while not bad.emitted:
                    engine.step()
                poison(bad, which, value)
                count = len(bad.emitted)
                end(engine)
                assert failed(bad), (which, value)
                assert len(bad.emitted) == count
                assert good.emitted == expected


def flags_ignored(patch: pytest.MonkeyPatch) -> None:
    """Sampled rows are taken without a look at their flags."""
    patch.setattr(DecoderRows, "finite", property(lambda rows: [[True] * count for count in rows.counts]))


def cache_laundered(patch: pytest.MonkeyPatch) -> None:
    """A row that is not finite leaves a key and value that look sound."""
    forward = Decoder.forward

    def laundered(self: Decoder, trees: Any, caches: Any, *others: Any, **named: Any) -> DecoderRows:
        rows = forward(self, trees, caches, *others, **named)
        for array in (caches[0].pool.keys, caches[0].pool.values):
            np.nan_to_num(array[:, :32].view(np.float32), copy=False)  # the pages in use
        return rows

    patch.setattr(Decoder, "forward", laundered)


@pytest.mark.parametrize("fault", [flags_ignored, cache_laundered])
def test_the_check_finds_faults(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(BUILDS[0], "F32", "llama", "model.embed_tokens.weight", in_row(BAD, np.nan))
    check_a_bad_token(model)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_a_bad_token(model)
