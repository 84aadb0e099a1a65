"""A law of the loss: L = E + A S1^-a - C S2 (Tissue et al. 2024, arXiv 2408.11029).

S1 and S2 are the areas under and left by the learning rate (logs.py), here in millions of tokens;
at a constant rate S1 is the tokens seen D and S2 is 0, which leaves L(D) = E + A D^-a. For each
exponent of a grid the other three follow by least squares with none of them below zero, so there
is no start to choose and no local minimum to end in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from logs import Floats, Point

UNIT = 1e6  # tokens
EXPONENTS = np.arange(0.02, 1.5, 0.005)


@dataclass(frozen=True)
class Law:
    """E: what is left of the loss after endless training. A: at S1 = 1 M tokens, above E. C: the
    fall for 1 M tokens of S2. Losses in the unit of what was fitted."""

    floor: float
    scale: float
    exponent: float
    annealing: float

    def __call__(self, forward: Floats, annealed: Floats) -> Floats:
        """The loss where S1 and S2 are these, in tokens."""
        weights = np.array([self.floor, self.scale, self.annealing])
        found: Floats = terms(forward, annealed, self.exponent) @ weights
        return found


def terms(forward: Floats, annealed: Floats, exponent: float) -> Floats:
    """What E, A and C are the weights of, one column each."""
    columns = [np.ones_like(forward), (forward / UNIT) ** -exponent, -annealed / UNIT]
    return np.stack(columns, axis=1)


def least_squares(columns: Floats, values: Floats) -> tuple[float, Floats]:
    """Squared error and weights, none below zero: the best of all subsets of the columns."""
    found = [(float(values @ values), np.zeros(columns.shape[1]))]
    for size in range(1, columns.shape[1] + 1):
        for kept in map(list, combinations(range(columns.shape[1]), size)):
            weights = np.zeros(columns.shape[1])
            weights[kept] = np.linalg.lstsq(columns[:, kept], values, rcond=None)[0]
            if (weights >= 0).all():
                found.append((float(np.square(columns @ weights - values).sum()), weights))
    return min(found, key=lambda one: one[0])


def fit(points: Sequence[Point], losses: Floats) -> Law:
    """The law nearest to these losses. Without a decay among the points C is 0."""
    forward = np.array([point.forward for point in points])
    annealed = np.array([point.annealed for point in points])
    found = []
    for exponent in EXPONENTS:
        error, weights = least_squares(terms(forward, annealed, exponent), losses)
        found.append((error, float(exponent), weights.tolist()))
    _, exponent, (floor, scale, annealing) = min(found)
    return Law(floor, scale, exponent, annealing)
