"""Where the end of a text has stood before: in references, in the prompt, in the text itself.

All of it is one sequence of ids, references first, each behind a -1 that nothing matches, then the
prompt and the text that grows. A *place* is an index into it with a token; what stands before the place
is its context. What is there at the start is sorted once: places in the order of their contexts read
backwards (a suffix array of the reversed sequence, after Manber and Myers' prefix doubling, SIAM J.
Comput. 1993), up to REACH tokens. The places after the last n tokens of the text are then one range of
that order, and each token further back narrows it by bisection. 8 bytes a token, int32, and a table of the
ranges of single tokens, some 150 bytes each.

What is generated later is kept by its n-grams of a few lengths: one entry of each a token, O(1).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

REACH = 32  # tokens of context that places are sorted and compared by, at most; a power of two
GRAMS = (8, 3, 1)  # context lengths that the growing text is kept by
BORDER = -1


class Match(NamedTuple):
    """A place whose context ends like the text: the last `length` tokens are equal, up to REACH."""

    place: int
    length: int


class SuffixIndex:
    """The sequence and its index. start: where the prompt begins in it; all before are references."""

    def __init__(self, references: Sequence[Sequence[int]], prompt: Sequence[int]) -> None:
        self.ids = array("i", [BORDER])
        for reference in references:
            self.ids.extend(reference)
            self.ids.append(BORDER)
        self.token = self.ids.__getitem__
        """The token at a place, or BORDER."""
        self.start = len(self.ids)
        self.ids.extend(prompt)
        self.order = _sorted(np.array(self.ids, np.int32))
        self.after = self._after()
        self.recent: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens. The place of each one becomes known."""
        ids, recent = self.ids, self.recent
        for token in tokens:
            place = len(ids)
            for gram in GRAMS:
                if place - gram >= self.start:
                    recent[tuple(ids[place - gram :])].append(place)
            ids.append(token)

    @property
    def end(self) -> int:
        """The place behind all others."""
        return len(self.ids)

    def find(self, most: int) -> list[Match]:
        """Places after contexts like the end of the text, the longest first, at most `most`."""
        found = [*islice(self._lately(), most), *islice(self._before(most), most)]
        found.sort(key=lambda match: -match.length)
        return found[:most]

    def _lately(self) -> Iterator[Match]:
        """Among what was generated, the latest first."""
        seen: set[int] = set()
        for gram in GRAMS:
            for place in reversed(self.recent.get(tuple(self.ids[-gram:]), ())):
                if place not in seen:
                    seen.add(place)
                    yield Match(place, self._common(place, gram))

    def _before(self, most: int) -> Iterator[Match]:
        """Among references and prompt: the places of the longest context, then those of shorter ones.

        Where a context has more than `most`, a sample of them, evenly spread.
        """
        ranges = self._ranges()
        inner = range(0)
        for length in range(len(ranges), 0, -1):
            outer = ranges[length - 1]
            step = 1 + max(0, len(outer) - len(inner) - 1) // most
            sides = (range(outer.start, inner.start), range(inner.stop, outer.stop)) if inner else (outer,)
            for place in (self.order[at] for side in sides for at in side[::step]):
                yield Match(place, self._common(place, length) if len(outer) == 1 else length)
            inner = outer

    def _ranges(self) -> list[range]:
        """Ranges of the order: places after the last token, the last two, and so on to a single place."""
        ids, order = self.ids, self.order
        first = self.after.get(ids[-1])
        if first is None:
            return []
        ranges = [first]
        low, high = first.start, first.stop
        for back in range(2, REACH + 1):
            token = ids[-back]
            if token == BORDER or high - low == 1:
                break
            if ids[order[low] - back] != token or ids[order[high - 1] - back] != token:
                low = bisect_left(order, token, low, high, key=lambda place: ids[place - back])
                high = bisect_right(order, token, low, high, key=lambda place: ids[place - back])
                if low == high:
                    break
            ranges.append(range(low, high))
        return ranges

    def _after(self) -> dict[int, range]:
        """For each token the range of the order whose places stand after it."""
        before = np.array(self.ids, np.int32)[np.array(self.order, np.intp) - 1]
        tokens, first = np.unique(before, return_index=True)
        borders = pairwise([*first.tolist(), len(before)])
        return {token: range(*ends) for token, ends in zip(tokens.tolist(), borders, strict=True)}

    def _common(self, place: int, length: int) -> int:
        """How many tokens before the place equal the end of the text, if `length` are known to."""
        ids, apart = self.ids, len(self.ids) - place
        at = place - 1 - length
        least = place - REACH
        while at >= least and ids[at] == ids[at + apart] != BORDER:
            at -= 1
        return place - 1 - at


def _sorted(ids: NDArray[np.int32]) -> array[int]:
    """Places that have a token and a context, in the order of their contexts read backwards."""
    places = len(ids)
    rank = np.zeros(places, np.int64)  # of the context of each place by its last `reach` tokens; 0: none
    rank[1:] = ids[:-1] + 2
    order = np.argsort(rank)
    reach = 1
    while reach < REACH:
        further = np.zeros(places, np.int64)
        further[reach:] = rank[:-reach]
        rank *= rank.max() + 1
        rank += further
        order = np.argsort(rank)
        inorder = rank[order]
        rank[order] = np.cumsum(np.r_[1, inorder[1:] != inorder[:-1]])
        reach *= 2
    order = order[(order > 0)]
    order = order[(ids[order] != BORDER) & (ids[order - 1] != BORDER)]
    return array("i", order.astype(np.int32).tobytes())
