"""Candidates copied from where the end of a text occurred before: in references, the prompt or the text, or
in earlier answers, if such are kept.

How likely a copied token is right depends on the length of the context that its place shares with the draft
(including tokens already copied), and on whether the places agree. A state is a list of places, the longest
contexts first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from .acceptance import Candidates, Kind
from .draft_tree import Sources
from .method import DraftContext
from .suffix_index import BORDER, Match, SuffixIndex

PLACES = 8  # places considered, at most; more of them gain nothing
# Acceptance rates of a copied token after a context of 1, 2, 3-4, 5-8, 9-16, 17 and more tokens: between what
# was measured on edits and on code. AGREED: all places of such a context continue alike, or there is one.
AGREED = (0.25, 0.55, 0.8, 0.9, 0.95, 0.97)
DIVIDED = (0.2, 0.4, 0.5, 0.7, 0.85, 0.9)
# The same of earlier answers, as measured on questions like earlier ones; contexts have 3 tokens or more.
AGREED_EARLIER = (0.1, 0.3, 0.5, 0.6, 0.85, 0.95)
DIVIDED_EARLIER = (0.1, 0.25, 0.4, 0.55, 0.7, 0.9)
SOURCE, EARLIER = "copy", "answer"  # what copies are counted as, and those from earlier answers
PRIOR: dict[Kind, float] = {
    (source, size, agreed): rate
    for source, agreed, rates in (
        (SOURCE, True, AGREED),
        (SOURCE, False, DIVIDED),
        (EARLIER, True, AGREED_EARLIER),
        (EARLIER, False, DIVIDED_EARLIER),
    )
    for size, rate in enumerate(rates)
}

Places = Sequence[tuple[int, int]]  # place, length of the context it shares with the draft


class Index(Protocol):
    """Texts in which the end of a request's text is looked up. See `SuffixIndex`."""

    @property
    def end(self) -> int: ...

    def token(self, place: int) -> int: ...

    def extend(self, tokens: Sequence[int]) -> None: ...

    def find(self, most: int) -> list[Match]: ...


class NgramCopies:
    """Copies from the texts of an index, as a `draft_tree.Source`."""

    def __init__(self, index: Index, prompt: Sequence[int], trigger: int = 1, source: str = SOURCE) -> None:
        """index: it knows the prompt. trigger: the shortest context that counts. source: what the candidates
        are counted as."""
        self.index = index
        self.trigger = trigger
        self.source = source
        self.length = len(prompt)

    def read(self, tokens: Sequence[int]) -> Places:
        """The state at the end of the text so far."""
        self.index.extend(tokens[self.length :])
        self.length = len(tokens)
        found = self.index.find(PLACES)
        return [match for match in found if match.length >= self.trigger]

    def candidates(self, state: Places) -> list[Candidates]:
        """Candidates for each size of context, the largest first."""
        if not state:
            return []
        tokens = [self.index.token(place) for place, _ in state]
        size = _size(state[0][1])
        if tokens.count(tokens[0]) == len(tokens) and _size(state[-1][1]) == size:
            return [Candidates((self.source, size, True), {tokens[0]: 1.0})]
        counts: dict[int, Counter[int]] = {}
        for token, (_, length) in zip(tokens, state, strict=True):
            counts.setdefault(_size(length), Counter())[token] += 1
        return [
            Candidates(
                (self.source, size, len(own) == 1),
                {token: count / own.total() for token, count in own.items()},
            )
            for size, own in counts.items()
        ]

    def follow(self, state: Places, token: int) -> Places:
        """The places that go on with this token, one further."""
        if not state:
            return state
        at, end = self.index.token, self.index.end
        return [
            (place + 1, length + 1)
            for place, length in state
            if at(place) == token and place + 1 < end and at(place + 1) != BORDER
        ]


class LongestFirst(Sources):
    """Copies from several indexes, those with the longest contexts first."""

    def candidates(self, state: Sequence[Places]) -> Sequence[Candidates]:
        found = super().candidates(state)
        return sorted(found, key=_longest_first) if all(state) else found


def copies(context: DraftContext, trigger: int = 1) -> NgramCopies | LongestFirst:
    """Copies from all that a request may copy from. trigger: as of `NgramCopies`."""
    own = NgramCopies(SuffixIndex(context.references, context.prompt), context.prompt, trigger)
    if context.answers is None:
        return own
    return LongestFirst(own, NgramCopies(context.answers, context.prompt, trigger, EARLIER))


def _longest_first(candidates: Candidates) -> int:
    size = candidates.kind[1]
    assert isinstance(size, int)
    return -size


def _size(length: int) -> int:
    """The class of a context, as in AGREED."""
    return min((length - 1).bit_length(), len(AGREED) - 1)
