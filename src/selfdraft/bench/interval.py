"""Medians, and their bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

DRAWS = 2000


def quantile(values: Sequence[float], at: float) -> float | None:
    """The quantile at a share between 0 and 1, interpolated between neighbours. None without values."""
    if not values:
        return None
    ordered = sorted(values)
    place = at * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median(values: Sequence[float]) -> float | None:
    return quantile(values, 0.5)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % bootstrap interval of the median, with a fixed seed. None for fewer than two values.

    With few values the interval may be too narrow by chance; at least 100 are advised.
    """
    if len(values) < 2:
        return None
    dice = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=dice)
    medians = torch.tensor(values, dtype=torch.float64)[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
