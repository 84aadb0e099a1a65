"""Where a text begins to loop.

A looping model flatters every method that copies: a loop is drafted without fail. So figures are also
taken up to the first repetition. It is defined on token ids: a sequence of 1 to 64 tokens that stands
three times in a row, and as often again as it takes to fill 8 tokens, so that ordinary runs (a closing
bracket three times, an indentation) do not count. The repetition found is the one that is complete
first; among those complete at the same token, the one with the shortest sequence. The text is kept up
to the end of that sequence's first copy: what comes after it is not new.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

PERIOD = 64  # longest sequence looked for
TIMES = 3  # how often it must stand in a row
FILL = 8  # tokens the copies must fill together, at least


def fresh(ids: Sequence[int]) -> int:
    """How many tokens stand before the text's first repetition; all, if it has none."""
    return _fresh(tuple(ids))


@lru_cache(maxsize=4096)  # arms and repeats mostly give the same text
def _fresh(ids: tuple[int, ...]) -> int:
    streak = [0] * (PERIOD + 1)  # per period: how long the text has equalled itself that far back
    for end, token in enumerate(ids):
        for period in range(1, min(PERIOD, end) + 1):
            streak[period] = streak[period] + 1 if ids[end - period] == token else 0
            if streak[period] >= max(TIMES * period, FILL) - period:
                return end + 1 - streak[period]
    return len(ids)
