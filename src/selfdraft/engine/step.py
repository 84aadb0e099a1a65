"""What one step of the loop decided, and the walk that decides it.

The model says which token it would pick after each row. The walk starts at row 0 and goes on while
the pick is a child of the current row. The rows it passes are kept, their picks are emitted. What is
emitted is always the model's own pick: a draft only decides how many picks one forward yields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .tree import Tree


@dataclass(frozen=True)
class Step:
    """One step of one request.

    tree: the rows that ran. picks: the token with the best score after each row with an ordinary id; these
    rows come first. Each is drawn when it is asked for, so ask for what is used only. score: gives the
    `scores`. path: rows accepted, root first (never empty unless row 0 is
    still in flight). in_flight: rows still inside the model, whose picks are early ones; only looped models
    leave any. mask_scores: [masks, ids], scores at the mask rows under the last accepted row, of the ids that
    masks predict (`Lookahead.vocabulary`): the tokens after the text as it stands now. None where there are
    no such rows, or the text has ended."""

    tree: Tree
    score: Callable[[], Tensor]
    picks: Sequence[int]
    path: Sequence[int]
    in_flight: Sequence[int]
    mask_scores: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """Processed logits plus the noise of each row's position, [rows, vocabulary] float32 or float64; -inf
        where the sampler excludes a token. Of the rows with ordinary ids. They are computed when they are
        asked for, until the next step."""
        return self.score()

    @property
    def has_masks(self) -> bool:
        """True if mask tokens were among the rows."""
        return len(self.tree) > len(self.picks)

    @property
    def emitted(self) -> list[int]:
        """The tokens this step adds to the text."""
        return [self.picks[row] for row in self.path]


def accept(tree: Tree, picks: Sequence[int], done: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Walk the tree along the model's picks; (path, in_flight).

    A row that is not done has no pick yet: the walk stops before it, and it stays in flight with
    everything below it. Nor has one that is not finite, whose pick is -1: there the walk just stops.
    """
    path: list[int] = []
    row: int | None = 0
    while row is not None and done[row] and picks[row] >= 0:
        path.append(row)
        row = tree.child(row, picks[row])
    return path, tree.below(row) if row is not None and not done[row] else []
