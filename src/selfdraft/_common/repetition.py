"""Where a text begins to repeat itself.

A model that loops makes every method that copies look good, because a loop is drafted without a miss.
Figures are therefore also computed up to the first repetition. It is defined on token ids: a sequence of
1 to 64 tokens that occurs three times in a row, and as many more times as it takes to fill 8 tokens, so that
ordinary runs (three closing brackets, an indentation) do not count. The first repetition is the one that is
complete first; among those complete at the same token, the one with the shortest sequence. The text is kept
up to the end of the first copy of that sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

PERIOD = 64
"""Longest sequence searched for, in tokens."""
TIMES = 3
"""How often the sequence must occur in a row."""
FILL = 8
"""Tokens that the copies must fill together, at least."""


def fresh(ids: Sequence[int]) -> int:
    """How many tokens the text has before its first repetition; all of them if it has none."""
    return _fresh(tuple(ids))


@lru_cache(maxsize=4096)  # arms and repeats mostly produce the same text
def _fresh(ids: tuple[int, ...]) -> int:
    streak = [0] * (PERIOD + 1)  # per period: for how many tokens the text has equalled itself that far back
    for end, token in enumerate(ids):
        for period in range(1, min(PERIOD, end) + 1):
            streak[period] = streak[period] + 1 if ids[end - period] == token else 0
            if streak[period] >= max(TIMES * period, FILL) - period:
                return end + 1 - streak[period]
    return len(ids)
