"""Do sampled tokens follow the distribution that transformers' own logits processors define?

Two tests per setting. With a vocabulary of eight tokens: a chi-square test of many picks. With the model's
own next-token distributions: the total variation between picks and probabilities, compared with what the
same number of independent draws shows. Both use the noise of many positions, as a text does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..params import SamplingParams
from ..sampling.gumbel import NoiseSource
from ..sampling.sampler import Sampler

SETTINGS: tuple[dict[str, float], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
)
ALPHA = 1e-5  # chance of a false alarm, per test
PICKS = 10_000
BATCH = 500  # positions per call, so that a large vocabulary fits


@dataclass(frozen=True)
class Fit:
    """What was found at one setting."""

    setting: Mapping[str, float]
    # p-value of the chi-square test.
    p: float
    # Total variation on the model's distributions.
    variation: float
    # Its mean over independent draws.
    expected: float
    # What independent draws exceed with a chance of ALPHA at most.
    limit: float

    @property
    def holds(self) -> bool:
        return self.p >= ALPHA and self.variation <= self.limit


def fits(logits: Tensor, seed: int, picks: int = 2_000, source: NoiseSource | None = None) -> list[Fit]:
    """Test all settings on next-token logits of the model, [rows, vocabulary]. generate: how it makes
    noise."""
    return [_fit(setting, logits.float(), seed, picks, source) for setting in SETTINGS]


def _fit(
    setting: Mapping[str, float], logits: Tensor, seed: int, picks: int, source: NoiseSource | None
) -> Fit:
    params = SamplingParams.read({**setting, "seed": seed})
    small = torch.tensor([2.0, 1.4, 0.9, 0.3, 0.0, -0.4, -1.0, -2.0])
    p = _chi_square(_counts(params, small, PICKS, source), _probabilities(setting, small))
    rows = [_variation(params, row, _probabilities(setting, row), picks, source) for row in logits]
    variation, expected, limit = max(rows, key=lambda row: row[0] - row[2])
    return Fit(dict(setting), p, variation, expected, limit)


def _counts(params: SamplingParams, logits: Tensor, picks: int, source: NoiseSource | None) -> Tensor:
    sampler = Sampler(params, (), len(logits), logits.device, source=source)
    counts = torch.zeros(len(logits), dtype=torch.float64)
    for start in range(0, picks, BATCH):
        positions = range(start, min(start + BATCH, picks))
        scores = sampler.draw(logits.expand(len(positions), -1), positions)
        counts += scores.argmax(-1).bincount(minlength=len(logits)).cpu()
    return counts


def _probabilities(setting: Mapping[str, float], logits: Tensor) -> Tensor:
    """As transformers computes them, except that tokens which tie with the last one kept are kept too."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(setting["temperature"])])
    if "top_k" in setting:
        chain.append(TopKLogitsWarper(int(setting["top_k"])))
    if "top_p" in setting:
        chain.append(TopPLogitsWarper(setting["top_p"]))
    if "min_p" in setting:
        chain.append(MinPLogitsWarper(setting["min_p"]))
    ids = torch.zeros(1, 1, dtype=torch.long, device=logits.device)
    processed = cast(Any, chain)(ids, logits[None].clone())[0]
    kept = logits >= logits[cast(Tensor, processed).isfinite()].min()
    scaled = (logits.double() / setting["temperature"]).masked_fill(~kept, -math.inf)
    return scaled.softmax(-1).cpu()


def _chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """p-value; 0 if a token of probability 0 was picked."""
    possible = probabilities > 0
    if counts[~possible].sum() > 0:
        return 0.0
    expected = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2)) if len(expected) > 1 else 1.0


def _variation(
    params: SamplingParams, logits: Tensor, probabilities: Tensor, picks: int, source: NoiseSource | None
) -> tuple[float, float, float]:
    """Total variation of the picks; its mean and a limit for the same number of independent draws.

    One draw moves the total variation by at most 1 / picks, so by McDiarmid's inequality it exceeds its
    mean by t with chance exp(-2 picks t^2) at most.
    """
    found = (_counts(params, logits, picks, source) / picks - probabilities).abs().sum() / 2
    generator = torch.Generator().manual_seed(params.seed or 0)
    draws = [
        torch.multinomial(probabilities, picks, replacement=True, generator=generator).bincount(
            minlength=len(probabilities)
        )
        for _ in range(20)
    ]
    spread = torch.stack([(draw / picks - probabilities).abs().sum() / 2 for draw in draws])
    slack = (-torch.tensor(ALPHA).log() / (2 * picks)).sqrt()
    return float(found), float(spread.mean()), float(spread.mean() + slack)
