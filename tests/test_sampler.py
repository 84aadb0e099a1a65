"""Scores == transformers' own processors row by row; picks follow the distribution they claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from selfdraft import SamplingParams
from selfdraft.errors import InvalidOption
from selfdraft.params import MAX_MAGNITUDE as BIG
from selfdraft.sampling.processors import filtered
from selfdraft.sampling.sampler import Sampler

from runs import greedy, sampled

CPU, SIZE = torch.device("cpu"), 12
ids = st.lists(st.integers(0, SIZE - 1), max_size=8)


def draw(params: SamplingParams, logits: Tensor, positions: Sequence[int]) -> Tensor:
    return Sampler(params, (), logits.shape[-1], CPU).draw(logits, positions)


@given(ids.filter(bool), ids, st.lists(ids, min_size=1, max_size=4), st.integers(0, 6), st.integers(0, 99))
@hypothesis_settings(max_examples=60, deadline=None)
def test_as_transformers_row_by_row(
    prompt: list[int], answer: list[int], tails: list[list[int]], least: int, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(len(tails), SIZE)
    params = greedy(repetition_penalty=1.4, logit_bias={3: 1.5, 4: -math.inf}, min_new_tokens=least)
    sampler = Sampler(params, prompt, SIZE, CPU, {1, 2})
    for token in answer:
        sampler.take([token])
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
    assert torch.equal(sampler.scores(logits, tails), torch.stack(wanted))


@given(ids, st.lists(ids, min_size=1, max_size=4))
@hypothesis_settings(max_examples=60, deadline=None)
def test_presence_and_frequency_count_the_answer(answer: list[int], tails: list[list[int]]) -> None:
    """OpenAI's definition: off once if a token occurs, and off again for each time it does."""
    sampler = Sampler(greedy(presence_penalty=0.5, frequency_penalty=0.25), [7, 7, 8], SIZE, CPU)
    sampler.take(answer)
    scores = sampler.scores(torch.zeros(len(tails), SIZE), tails)
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
        params = SamplingParams.read({**options, "seed": 3, "min_new_tokens": 50})
        whole = Sampler(params, [1, 2], size, CPU, {9})
        whole.take(text[:30])
        scores = whole.scores(logits, [text[30 : 30 + i] for i in range(6)])
        for i in range(6):
            alone = Sampler(params, [1, 2], size, CPU, {9})
            alone.take(text[: 30 + i])
            assert torch.equal(alone.scores(logits[i : i + 1], [()])[0], scores[i])


def test_noise_for_drafters_is_what_the_scores_hold() -> None:
    sampler = Sampler(sampled(0.5, seed=4), [1, 2, 3], SIZE, CPU)
    flat = sampler.scores(torch.zeros(1, SIZE), [[5, 5]])[0]  # the token at index 5 of the text
    assert sampler.noise(5, [0, 7]) == pytest.approx([float(flat[0]) / 0.5, float(flat[7]) / 0.5])
    assert sampler.noise(40, [1]) != sampler.noise(41, [1])
    assert torch.equal(sampler.scores(torch.zeros(1, SIZE), [[5, 5]])[0], flat), "nothing is forgotten"
    assert Sampler(greedy(), [1], SIZE, CPU).noise(3, [1, 2]) == [0.0, 0.0]


def test_scores_of_a_row_do_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(9, 400, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # many ties
    for params in (greedy(), sampled(0.8, top_k=7, seed=1), sampled(0.8, top_p=0.6, min_p=0.01, seed=1)):
        whole = draw(params, logits, range(9))
        for row in range(9):
            assert torch.equal(draw(params, logits[row : row + 1], [row])[0], whole[row])
        reverse = draw(params, logits.flip(0), range(8, -1, -1))
        assert torch.equal(reverse.flip(0), whole)


def test_ties_go_to_the_first_token() -> None:
    logits = torch.zeros(3, 1000)
    logits[:, [700, 33, 512]] = 1.0
    assert draw(greedy(), logits, range(3)).argmax(-1).tolist() == [33] * 3


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_picks_follow_the_distribution(options: dict[str, float]) -> None:
    """Chi-square over an enumerated vocabulary, 20,000 picks; the limit has a tail of about 1e-6."""
    logits = torch.tensor([[1.0, 0.2, -0.5, 2.0, 0.0, -3.0]])
    params = sampled(0.8, seed=11, **options)
    scores = draw(params, logits.expand(20_000, -1), range(20_000))
    counts = scores.argmax(-1).bincount(minlength=6).double()
    expected = torch.softmax(filtered(logits, params)[0].double() / 0.8, -1) * 20_000
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < 40


def test_neighbouring_positions_are_independent() -> None:
    picks = draw(sampled(1.0, seed=5), torch.zeros(20_000, 2), range(20_000)).argmax(-1).tolist()
    pairs = torch.zeros(4)
    for a, b in pairwise(picks):
        pairs[2 * a + b] += 1
    assert ((pairs - 5_000) ** 2 / 5_000).sum() < 40


def test_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    cold = draw(sampled(1e-30, seed=1), logits, range(50))
    assert torch.equal(cold.argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize(("seed", "sample"), [(2**64 - 1, 0), (0, 2**32 - 1)])
def test_every_seed_and_sample_has_noise_of_its_own(seed: int, sample: int) -> None:
    logits = torch.zeros(1, 50)
    ours, other = (Sampler(sampled(1.0, seed=s), (), 50, CPU, sample=n) for s, n in ((seed, sample), (0, 0)))
    assert not torch.equal(ours.draw(logits, [0]), other.draw(logits, [0]))


def test_without_a_seed_each_sampler_draws_one() -> None:
    seeds = {Sampler(SamplingParams(), (), SIZE, CPU).seed for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"logit_bias": {SIZE: 1.0}}, "logit_bias: no token id 12"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: no token id -1"),
        ({"eos": (3, SIZE)}, "eos: no token id 12"),
        ({"logprobs": SIZE + 1}, "logprobs must be from 0 to 12"),
        ({"logit_bias": dict.fromkeys(range(SIZE), -math.inf)}, "bans every token"),
        ({"logit_bias": dict.fromkeys(range(2, SIZE), -math.inf), "min_new_tokens": 1}, "bans every token"),
    ],
)
def test_what_this_vocabulary_cannot_honour(options: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidOption, match=says) as caught:
        Sampler(SamplingParams.read(options), [1], SIZE, CPU, {0, 1})
    assert caught.value.option == next(iter(options))
    with pytest.raises(InvalidOption, match="sample"):
        Sampler(SamplingParams(), [1], SIZE, CPU, sample=-1)


def test_one_token_that_is_not_banned_is_picked() -> None:
    bans = dict.fromkeys([token for token in range(SIZE) if token != 7], -math.inf)
    for params in (greedy(logit_bias=bans), sampled(1.5, top_k=3, logit_bias=bans)):
        assert Sampler(params, [1], SIZE, CPU).scores(torch.randn(1, SIZE), [()]).argmax() == 7


@pytest.mark.parametrize("temperature", [0.0, 1 / BIG, 1.0, BIG])
@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": BIG, "frequency_penalty": BIG},
        {"presence_penalty": -BIG, "frequency_penalty": -BIG},
        {"repetition_penalty": BIG},
        {"repetition_penalty": 1 / BIG},
        {"logit_bias": {3: BIG, 4: -BIG, 5: -math.inf}},
    ],
)
def test_the_largest_numbers_allowed_give_scores(temperature: float, options: dict[str, object]) -> None:
    """None is NaN, and not all are excluded."""
    for filters in ({}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.1}):
        params = SamplingParams.read({"temperature": temperature, "seed": 1, **options, **filters})
        sampler = Sampler(params, [1, 3], SIZE, CPU)
        sampler.take([2, 2, 4])
        scores = sampler.scores(torch.linspace(-40, 40, SIZE).expand(2, -1), [(), (5, 5, 6)])
        assert not scores.isnan().any()
        assert scores.isfinite().any(-1).all()
