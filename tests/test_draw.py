"""Penalties, bias and early ends == transformers' own processors, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from selfdraft import Sampler
from selfdraft.errors import InvalidOption
from selfdraft.sampling.processors import Draw

CPU, SIZE = torch.device("cpu"), 12
ids = st.lists(st.integers(0, SIZE - 1), max_size=8)


@given(ids.filter(bool), ids, st.lists(ids, min_size=1, max_size=4), st.integers(0, 6), st.integers(0, 99))
@hypothesis_settings(max_examples=60, deadline=None)
def test_as_transformers_row_by_row(
    prompt: list[int], answer: list[int], tails: list[list[int]], least: int, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(len(tails), SIZE)
    sampler = Sampler(repetition_penalty=1.4, logit_bias={3: 1.5, 4: -math.inf})
    draw = Draw(sampler, prompt, SIZE, CPU, {1, 2}, least)
    for token in answer:
        draw.take([token])
    theirs = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(3,): 1.5, (4,): -math.inf}),
            RepetitionPenaltyLogitsProcessor(1.4),
            MinNewTokensLengthLogitsProcessor(len(prompt), least, [1, 2], device="cpu"),
        ]
    )
    wanted = [
        theirs(torch.tensor([[*prompt, *answer, *tail]]), row[None].clone())[0]
        for row, tail in zip(logits, tails, strict=True)
    ]
    assert torch.equal(draw.scores(logits, tails), torch.stack(wanted))


@given(ids, st.lists(ids, min_size=1, max_size=4))
@hypothesis_settings(max_examples=60, deadline=None)
def test_presence_and_frequency_count_the_answer(answer: list[int], tails: list[list[int]]) -> None:
    """OpenAI's definition: off once if a token occurs, and off again for each time it does."""
    draw = Draw(Sampler(presence_penalty=0.5, frequency_penalty=0.25), [7, 7, 8], SIZE, CPU)
    draw.take(answer)
    scores = draw.scores(torch.zeros(len(tails), SIZE), tails)
    for row, tail in zip(scores.tolist(), tails, strict=True):
        text = [*answer, *tail]
        assert row == [-(0.5 * (token in text) + 0.25 * text.count(token)) for token in range(SIZE)]


def test_rows_together_have_the_bits_of_rows_alone() -> None:
    """Whatever the tree, and whether tokens were committed or are ancestors."""
    torch.manual_seed(0)
    size = 5_001
    logits = torch.randn(6, size)
    text = torch.randint(0, size, (40,)).tolist()
    for options in (
        {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "presence_penalty": 0.1},
        {"logit_bias": {5: 0.3}, "repetition_penalty": 0.7, "temperature": 0.7, "top_k": 50, "top_p": 0.9},
    ):
        sampler = Sampler(**options, seed=3)  # type: ignore[arg-type]
        whole = Draw(sampler, [1, 2], size, CPU, {9}, least=50)
        whole.take(text[:30])
        scores = whole.scores(logits, [text[30 : 30 + i] for i in range(6)])
        for i in range(6):
            alone = Draw(sampler, [1, 2], size, CPU, {9}, least=50)
            alone.take(text[: 30 + i])
            assert torch.equal(alone.scores(logits[i : i + 1], [()])[0], scores[i])


def test_noise_for_drafters_is_what_the_scores_hold() -> None:
    draw = Draw(Sampler(0.5, seed=4), [1, 2, 3], SIZE, CPU)
    flat = draw.scores(torch.zeros(1, SIZE), [[5, 5]])[0]  # the token at index 5 of the text
    assert draw.noise(5, [0, 7]) == pytest.approx([float(flat[0]) / 0.5, float(flat[7]) / 0.5])
    assert draw.noise(40, [1]) != draw.noise(41, [1])
    assert torch.equal(draw.scores(torch.zeros(1, SIZE), [[5, 5]])[0], flat), "looking ahead forgets nothing"
    assert Draw(Sampler(), [1], SIZE, CPU).noise(3, [1, 2]) == [0.0, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {SIZE: 1.0}},
        {"logit_bias": {-1: 1.0}},
    ],
)
def test_values_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(options))):
        Draw(Sampler(**options), [1], SIZE, CPU)  # type: ignore[arg-type]
