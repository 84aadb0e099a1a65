"""Noise against published vectors, scores against transformers' own processors, picks against the
distribution they claim."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from selfdraft import Sampler
from selfdraft.errors import InvalidOption
from selfdraft.sampling.gumbel import Noise, gumbel, philox

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    """The known-answer vectors of the authors' Random123 library."""
    got = philox([torch.tensor(word) for word in counter], key[1] << 32 | key[0])
    assert [int(word) for word in got] == words


def test_noise_does_not_depend_on_how_it_is_asked_for() -> None:
    alone = torch.cat([gumbel(9, 2, [p], 103, CPU) for p in range(40)])
    assert torch.equal(gumbel(9, 2, range(40), 103, CPU), alone)
    stream = Noise(9, 2)
    for positions in ([5, 6, 7], [0], [39, 15, 16, 15], [3]):
        assert torch.equal(stream.at(positions, 103, CPU), alone[positions])
    assert torch.equal(gumbel(9, 2, [3], 50, CPU)[0], alone[3, :50])
    for other in (gumbel(8, 2, [3], 103, CPU), gumbel(9, 1, [3], 103, CPU), gumbel(9, 2, [4], 103, CPU)):
        assert not torch.equal(other[0], alone[3])
    assert not torch.equal(gumbel(9 + 2**40, 2, [3], 103, CPU)[0], alone[3])


def test_noise_is_gumbel() -> None:
    noise = gumbel(1, 0, range(64), 4096, CPU).double()
    assert abs(noise.mean() - 0.5772156649) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.3, "top_p": 0.999},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 300, "top_p": 0.95, "min_p": 0.001},
    ],
)
def test_filters_are_those_of_transformers(options: dict[str, float]) -> None:
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(0)) * 3
    chain = LogitsProcessorList([TemperatureLogitsWarper(options["temperature"])])
    if "top_k" in options:
        chain.append(TopKLogitsWarper(int(options["top_k"])))
    if "top_p" in options:
        chain.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        chain.append(MinPLogitsWarper(options["min_p"]))
    theirs = chain(torch.zeros(6, 1, dtype=torch.long), logits.clone())
    sampler = Sampler(**options)  # type: ignore[arg-type]
    noise = gumbel(0, 0, range(6), 700, CPU) * options["temperature"]
    ours = (sampler.scores(logits, range(6)) - noise) / options["temperature"]
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours.clamp(min=-99), theirs.clamp(min=-99), rtol=1e-4, atol=1e-4)


def test_scores_of_a_row_do_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(9, 400, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # many ties
    for sampler in (Sampler(), Sampler(0.8, top_k=7, seed=1), Sampler(0.8, top_p=0.6, min_p=0.01, seed=1)):
        whole = sampler.scores(logits, range(9))
        for row in range(9):
            assert torch.equal(sampler.scores(logits[row : row + 1], [row])[0], whole[row])
        reverse = sampler.scores(logits.flip(0), range(8, -1, -1))
        assert torch.equal(reverse.flip(0), whole)


def test_ties_go_to_the_first_token() -> None:
    logits = torch.zeros(3, 1000)
    logits[:, [700, 33, 512]] = 1.0
    assert Sampler().scores(logits, range(3)).argmax(-1).tolist() == [33] * 3


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_picks_follow_the_distribution(options: dict[str, float]) -> None:
    """Chi-square over an enumerated vocabulary, 20,000 picks; the limit has a tail of about 1e-6."""
    logits = torch.tensor([[1.0, 0.2, -0.5, 2.0, 0.0, -3.0]])
    sampler = Sampler(0.8, seed=11, **options)  # type: ignore[arg-type]
    scores = sampler.scores(logits.expand(20_000, -1), range(20_000))
    counts = scores.argmax(-1).bincount(minlength=6).double()
    filtered = sampler._filter(logits)[0]
    expected = torch.softmax(filtered.double() / 0.8, -1) * 20_000
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < 40


def test_neighbouring_positions_are_independent() -> None:
    picks = Sampler(1.0, seed=5).scores(torch.zeros(20_000, 2), range(20_000)).argmax(-1).tolist()
    pairs = torch.zeros(4)
    for a, b in pairwise(picks):
        pairs[2 * a + b] += 1
    assert ((pairs - 5_000) ** 2 / 5_000).sum() < 40


def test_one_sampler_serves_several_vocabularies() -> None:
    sampler = Sampler(1.0, seed=3)
    wide = sampler.scores(torch.zeros(2, 50), [4, 5])
    sampler.scores(torch.zeros(2, 20), [4, 5])
    assert torch.equal(sampler.scores(torch.zeros(2, 50), [4, 5]), wide)


def test_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    cold = Sampler(1e-30, seed=1).scores(logits, range(50))
    assert torch.equal(cold.argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": math.nan},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": math.nan},
        {"seed": -1},
        {"seed": 2**64},
        {"sample": -1},
    ],
)
def test_values_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(options))):
        Sampler(**options)  # type: ignore[arg-type]
