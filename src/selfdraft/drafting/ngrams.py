"""Candidates copied from where the end of a text occurred before, in references, the prompt or the text.

How likely a copied token is right depends on the length of the context that its place shares with the draft
(including tokens already copied), and on whether the places agree. A state is a list of places, the longest
contexts first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .acceptance import Candidates, Kind
from .suffix_index import BORDER, SuffixIndex

PLACES = 8  # places considered, at most; more of them gain nothing
# Acceptance rates of a copied token after a context of 1, 2, 3-4, 5-8, 9-16, 17 and more tokens: between what
# was measured on edits and on code. AGREED: all places of such a context continue alike, or there is one.
AGREED = (0.25, 0.55, 0.8, 0.9, 0.95, 0.97)
DIVIDED = (0.2, 0.4, 0.5, 0.7, 0.85, 0.9)
SOURCE = "copy"
PRIOR: dict[Kind, float] = {
    **{(SOURCE, size, True): rate for size, rate in enumerate(AGREED)},
    **{(SOURCE, size, False): rate for size, rate in enumerate(DIVIDED)},
}

Places = Sequence[tuple[int, int]]  # place, length of the context it shares with the draft


class NgramCopies:
    """Copies from references, a prompt and the text after it, as a `draft_tree.Source`.

    trigger: the shortest context that counts.
    """

    def __init__(self, references: Sequence[Sequence[int]], prompt: Sequence[int], trigger: int = 1) -> None:
        self.index = SuffixIndex(references, prompt)
        self.trigger = trigger
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
        ids = self.index.ids
        tokens = [ids[place] for place, _ in state]
        size = _size(state[0][1])
        if tokens.count(tokens[0]) == len(tokens) and _size(state[-1][1]) == size:
            return [Candidates((SOURCE, size, True), {tokens[0]: 1.0})]
        counts: dict[int, Counter[int]] = {}
        for token, (_, length) in zip(tokens, state, strict=True):
            counts.setdefault(_size(length), Counter())[token] += 1
        return [
            Candidates(
                (SOURCE, size, len(own) == 1), {token: count / own.total() for token, count in own.items()}
            )
            for size, own in counts.items()
        ]

    def follow(self, state: Places, token: int) -> Places:
        """The places that go on with this token, one further."""
        ids = self.index.ids
        end = len(ids)
        return [
            (place + 1, length + 1)
            for place, length in state
            if ids[place] == token and place + 1 < end and ids[place + 1] != BORDER
        ]


def _size(length: int) -> int:
    """The class of a context, as in AGREED."""
    return min((length - 1).bit_length(), len(AGREED) - 1)
