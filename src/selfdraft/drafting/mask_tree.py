"""Mask groups: drafts of a model's own adapter, verified in the pass that produces the next ones.

Each row of a tree may have a group under it: a chain of mask tokens, whose scores predict the tokens after
the next one (SPACE, arXiv 2402.11809; BiTA, 2401.12522). The group under the row at which the walk ends is
read, and its best tokens are the candidates of the next tree.

Which rows are run (a sparse tree, as in PPD, arXiv 2405.18628, section 4, but grown anew at every step, from
how confident the model is here):

- The kind of a candidate is its offset and its hazard: its share of the probability that is left after the
  candidates before it. The acceptance rate of each kind was counted when the adapter was calibrated, and goes
  on being learned (`AcceptanceStats`). Scores include the sampling noise, so a kind means the same at every
  temperature.
- The candidates of an offset were predicted with the likeliest ones of the offsets before it in mind (a
  sampler head is told them), and rarely follow others: 0.61 as the first below the likeliest, 0.22 below
  another. So they stand below the likeliest alone, the trunk, as in the trees of BiTA. The probability of a
  path is the product along it, and nodes come in the order of it.
- A mask under a node pays in the next step, if the walk ends at that node. How often the candidates of an
  offset come to be accepted is learned too, an offset that is not tried being treated like the last one that
  is. The gain is discounted by the probability of that end, and by the cost of the row that the candidate
  will need.
- Of all sizes the one is taken whose tokens, now and by its masks, exceed by most what its measured time
  would yield at this text's own rate.

What a text can lose is bounded (`Budget`): new masks must be within the budget. Candidates need not be, since
their cost was granted with the masks that predicted them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import accumulate, chain
from operator import mul
from typing import Generic, NamedTuple

from torch import Tensor

from ..engine.step import Step
from ..engine.tree import Tree
from ..errors import AdapterError
from .acceptance import AcceptanceStats, Budget, Candidates, Kind
from .draft_tree import DraftTreeBuilder, Node, S, Source, TreeDrafter
from .method import DraftContext, Lookahead, Noise

SOURCE = "mask"
WIDTH = 6  # candidates per offset
HAZARDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # bounds of the kinds
ODDS = "hazard"  # the name of the calibrated rates in an adapter, [offset][kind]
ONWARD = "onward"  # and of how often a walk that comes to an offset goes on through it, [0][offset]
TRUST = 0.7  # rate per hazard where nothing was calibrated: hazards are overconfident
FIRST_ONWARD = 0.4  # and the rate of going on through an offset there
PRIOR_STEPS = 8.0  # steps that the rate expected at first counts for
PROBING = 0.01  # share of the time that goes to masks when they do not seem to pay


class Candidate(NamedTuple):
    """A draft token of one offset."""

    token: int
    kind: int  # class of its hazard, see HAZARDS


def lookahead(context: DraftContext, method: str) -> Lookahead:
    """The mask tokens of the request's model. Raises AdapterError where it has none."""
    if context.lookahead is None or not context.lookahead.ids:
        raise AdapterError(
            f"method {method!r} drafts with an adapter, and this model came without one: give a folder "
            f"(adapter=..., --adapter), or train one with `selfdraft train {method}`"
        )
    return context.lookahead


def candidates(scores: Tensor, vocabulary: Sequence[int] | None = None) -> list[list[Candidate]]:
    """Candidates by offset, the likeliest first. scores: [masks, ids of the vocabulary]; see `Lookahead`."""
    likely = scores.softmax(-1).topk(min(WIDTH, scores.shape[-1]))
    found = []
    for tokens, shares in zip(ids_of(likely.indices, vocabulary), likely.values.tolist(), strict=True):
        left, row = 1.0, []
        for token, share in zip(tokens, shares, strict=True):
            row.append(Candidate(token, bisect_right(HAZARDS, share / left if left > share else 1.0)))
            left -= share
        found.append(row)
    return found


def ids_of(index: Tensor, vocabulary: Sequence[int] | None) -> list[list[int]]:
    """The ids that stand at these places of the vocabulary that masks predict."""
    places: list[list[int]] = index.tolist()
    return places if vocabulary is None else [[vocabulary[at] for at in row] for row in places]


class MaskCandidates:
    """What the masks behind the end of a text predict, as a `draft_tree.Source`. A state is the offset of the
    next token, or None off the trunk."""

    def __init__(self, look: Lookahead) -> None:
        offsets = range(len(look.ids))
        odds = _known(look, ODDS, len(offsets), len(hazard_middles())) or [
            [TRUST * at for at in hazard_middles()] for _ in offsets
        ]
        onward = (_known(look, ONWARD, 1, len(offsets)) or [[FIRST_ONWARD] * len(offsets)])[0]
        self.prior: dict[Kind, float] = {
            **{(SOURCE, i, kind): rate for i in offsets for kind, rate in enumerate(odds[i])},
            # By offset, how often the walk goes on through a candidate of the masks.
            **{(ONWARD, i): rate for i, rate in enumerate(onward)},
        }
        self.vocabulary = look.vocabulary
        self.offered: list[list[Candidates]] = []  # by offset, the likeliest first
        self.trunk: list[int] = []  # the likeliest token of each offset

    def read(self, tokens: Sequence[int]) -> int | None:
        return 0

    def candidates(self, state: int | None) -> Sequence[Candidates]:
        return () if state is None or state >= len(self.offered) else self.offered[state]

    def follow(self, state: int | None, token: int) -> int | None:
        on = state is not None and state < len(self.trunk) and self.trunk[state] == token
        return state + 1 if on and state is not None else None

    def predict(self, scores: Tensor | None) -> None:
        """Take the candidates of the next tree from these scores, as of `Step`; None: there are none. They
        include the noise of their positions."""
        found = [] if scores is None else candidates(scores, self.vocabulary)
        self.trunk = [offered[0].token for offered in found]
        self.offered = [
            [Candidates((SOURCE, i, kind), {token: 1.0}, drawn=True) for token, kind in offered]
            for i, offered in enumerate(found)
        ]


class MaskTreeBuilder(DraftTreeBuilder[S]):
    """Builds trees with groups of masks under the nodes where they pay."""

    def __init__(
        self,
        source: Source[S],
        masks: MaskCandidates,
        look: Lookahead,
        rates: AcceptanceStats,
        cost: Callable[[int], float],
        noise: Noise | None,
        max_rows: int,
        mask_cost: Callable[[], float],
    ) -> None:
        """source: of all candidates. masks: the part of it, or it itself, that the masks predict. The others
        as of `DraftTreeBuilder`."""
        super().__init__(source, rates, cost, noise, max_rows, mask_cost)
        self.masks, self.ids = masks, tuple(look.ids)
        self.expected = [
            PRIOR_STEPS * (1 + sum(self._reach())),
            PRIOR_STEPS * self.budget.cost(2 + 3 * len(self.ids), True),
        ]
        self.groups: Sequence[int] = ()  # how many masks stand under each node
        self.probing = 0.0

    def tree(self, tokens: Sequence[int]) -> Tree:
        tree = super().tree(tokens)
        ids, parents = list(tree.tokens), list(tree.parents)
        for row, count in enumerate(self.groups):
            if count:
                parents += [row, *range(len(ids), len(ids) + count - 1)]
                ids += self.ids[:count]
        return Tree(tuple(ids), tuple(parents))

    def learn(self, step: Step) -> Sequence[Hashable]:
        accepted = super().learn(step)
        tokens = len(step.emitted)
        took = self.budget.cost(len(step.tree), step.has_masks)
        self.expected = [self.expected[0] + tokens, self.expected[1] + took]
        pending = len(self.masks.offered)
        for i in range(min(pending, tokens)):
            through = i < len(accepted) and accepted[i] == SOURCE
            for offset in range(i, len(self.ids) if i + 1 == pending else i + 1):
                self.rates.learn((ONWARD, offset), through)
        return accepted

    @property
    def max_node_value(self) -> float:
        """Tokens gained by a row that is always reached and has all masks under it."""
        return 1 + sum(self._reach())

    def _reach(self) -> list[float]:
        """By offset, how often a walk goes on through candidates of the masks as far as that."""
        return list(accumulate((self.rates[ONWARD, i] for i in range(len(self.ids))), mul))

    def _sized(self, growing: Iterator[Node[S]]) -> Sequence[Node[S]]:
        """The nodes that pay for their rows; with `groups`. Where neither masks nor their candidates are run,
        sizes are compared as without masks."""
        rate = max(1.0, self.expected[0] / self.expected[1])  # plain decoding makes 1
        plan: Plan[S] = Plan(self.budget, rate, self._reach())
        grown: list[Node[S]] = []
        for node in growing:
            grown.append(node)
            if plan.nodes and node.reached * plan.max_node_value < plan.row_value:
                break
            plan.add(node)
        nodes: Sequence[Node[S]]
        nodes, self.groups = plan.best(self.max_rows)
        if not any(self.groups) and all(node.source != SOURCE for node in nodes):
            nodes = super()._sized(chain(grown, growing))
            self.groups = [] if len(nodes) > 1 else [self._probe()]
        return nodes

    def _probe(self) -> int:
        """Masks under a row that is alone: none, but now and then all of them, to learn from."""
        self.probing += PROBING
        rows = 1 + len(self.ids)
        extra = self.budget.cost(rows, True) - 1
        if extra > self.probing or not self.budget.affords(rows, True) or rows > self.max_rows:
            return 0
        self.probing -= extra
        return len(self.ids)


class GroupDrafter(TreeDrafter):
    """Drafts sparse trees with groups of masks."""

    def __init__(
        self,
        look: Lookahead,
        cost: Callable[[int], float],
        most: int,
        mask_cost: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """most: rows of a step, at most. cost, mask_cost: as of `Budget`."""
        self.masks = MaskCandidates(look)
        rates = AcceptanceStats(self.masks.prior)
        given = look, rates, cost, None, most, mask_cost
        super().__init__(MaskTreeBuilder(self.masks, self.masks, *given))

    def observe(self, step: Step) -> None:
        super().observe(step)
        self.masks.predict(step.mask_scores)


class Plan(Generic[S]):
    """A tree that grows node by node, with the masks that pay under its nodes.

    Time is in steps of one row.
    """

    def __init__(self, budget: Budget, rate: float, reach: Sequence[float]) -> None:
        """rate: tokens per time of this text so far. reach: by offset, how often its candidates are accepted,
        where there are any."""
        self.budget, self.rate = budget, rate
        width = 2 + 2 * len(reach)
        slope = (budget.cost(2 * width) - budget.cost(width)) / width
        self.row_value = rate * slope  # what one more row costs, in tokens at this rate
        self.gains = [share - self.row_value for share in reach]
        self.totals = [0.0]  # gain by the number of masks under a node
        for gain in self.gains:
            self.totals.append(self.totals[-1] + max(0.0, gain))
        self.max_node_value = 1 + self.totals[-1]  # tokens gained by a node that is always reached, at most
        self.nodes: list[Node[S]] = []
        self.ends: list[float] = []  # probability that the walk ends there
        self.value, self.rows = 0.0, 0
        self.scores: list[tuple[float, int]] = []  # by number of nodes: what exceeds the rate, and the rows

    def add(self, node: Node[S]) -> None:
        if node.parent >= 0:
            self._count(node.parent, -1)
            self.ends[node.parent] -= node.reached
            self._count(node.parent, 1)
        self.nodes.append(node)
        self.ends.append(node.reached)
        self._count(len(self.nodes) - 1, 1)
        self.value += node.reached
        self.rows += 1
        cost = self.budget.cost(self.rows, self.rows > len(self.nodes))
        self.scores.append((self.value - self.rate * cost, self.rows))

    def best(self, most: int) -> tuple[list[Node[S]], list[int]]:
        """Nodes, and the number of masks under each, of the best size with at most so many rows.

        All must be within the budget, except for pending candidates of masks: they were paid for with the
        masks that predicted them, and are verified even when no new masks fit the budget.
        """
        found, count, masked = -math.inf, 1, False
        for i, (score, rows) in enumerate(self.scores, start=1):
            if score > found and rows <= most and self.budget.affords(rows, rows > i):
                found, count, masked = score, i, True
        promised, unpaid = 0.0, 0
        for i, node in enumerate(self.nodes[:most], start=1):
            promised += node.reached
            unpaid += node.source != SOURCE
            score = promised - self.rate * self.budget.cost(i)
            if score > found and self.budget.affords(unpaid):
                found, count, masked = score, i, False
        if not masked:
            return self.nodes[:count], [0] * count
        ends = [node.reached for node in self.nodes[:count]]
        for node in self.nodes[1:count]:
            ends[node.parent] -= node.reached
        return self.nodes[:count], [self._masks(end) for end in ends]

    def _count(self, node: int, sign: int) -> None:
        """Add what the masks under a node gain and cost to the sums, or take it out of them."""
        masks = self._masks(self.ends[node])
        self.value += sign * self.ends[node] * self.totals[masks]
        self.rows += sign * masks

    def _masks(self, end: float) -> int:
        count = 0
        while count < len(self.gains) and end * self.gains[count] > self.row_value:
            count += 1
        return count


def _known(look: Lookahead, name: str, rows: int, columns: int) -> Sequence[Sequence[float]] | None:
    """Rates of a calibrated adapter; None where it was not calibrated, or with another number of kinds."""
    table = look.odds.get(name, ())
    return table if [len(row) for row in table] == [columns] * rows else None


def hazard_middles() -> list[float]:
    """The middle of each class of hazards."""
    return [(a + b) / 2 for a, b in zip((0.0, *HAZARDS), (*HAZARDS, 1.0), strict=True)]


class FixedDrafter:
    """Drafts a tree of the same shape at every step, as published."""

    def __init__(self, look: Lookahead, nodes: Sequence[tuple[int, int, int]]) -> None:
        """nodes: in order, each (parent, offset, rank): the candidate of that rank at that offset, under the
        node of that index, of which 0 is the last token. Each has a whole group of masks under it."""
        self.ids, self.nodes, self.vocabulary = tuple(look.ids), nodes, look.vocabulary
        self.width = 1 + max((rank for _, _, rank in nodes), default=0)
        self.candidates: list[list[int]] = []

    def propose(self, tokens: Sequence[int]) -> Tree:
        # In the first step there are no candidates, near the end of the text not of every offset.
        nodes = [node for node in self.nodes if node[1] < len(self.candidates)]
        known = [self.candidates[offset][rank] for _, offset, rank in nodes]
        tree = Tree((tokens[-1], *known), (-1, *(parent for parent, _, _ in nodes)))
        for row in range(len(tree)):
            tree = tree.hang(row, self.ids)
        return tree

    def observe(self, step: Step) -> None:
        scores = step.mask_scores
        best = None if scores is None else scores.topk(self.width).indices
        self.candidates = [] if best is None else ids_of(best, self.vocabulary)
