"""Mask groups: drafts of a model's own adapter, verified in the pass that draws up the next ones.

A row of the text and each candidate may have a group behind it: a chain of mask tokens, whose scores are
guesses at the tokens after the next one (SPACE, arXiv 2402.11809; BiTA, 2401.12522). The group under the
row at which the walk ends is looked at, and what it guesses are the candidates of the next tree.

Which rows are worth their time (a sparse tree, as in PPD, arXiv 2405.18628, section 4, but grown anew at
every step, from how sure the model is here):

- A candidate is a bet. Its kind is its offset and its hazard: the share of the probability that the scores
  leave after the candidates before it. How often bets of a kind win was counted when the adapter was
  calibrated and is learned on (`AcceptanceStats`). The scores have the noise of sampling in them, so a kind
  means the same at every temperature.
- Guesses at one offset are the same under every parent, so a path's probability is a product, and nodes
  come in the order of it.
- A mask under a node pays in the next step, if the walk ends at that node. How often the guesses of an
  offset come to be accepted is learned too, an offset that is not tried going along with the last one that
  is; it is discounted by the probability of that end, and by the row that the guess will need.
- Of all sizes the one is taken whose tokens, now and by its masks, exceed by most what its measured time
  would bring at this text's own rate.

What a text can lose is bounded as elsewhere (`worth.Budget`): masks must be within the budget, candidates
need not be, since what they cost was granted with the masks that guessed them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from heapq import heappop, heappush
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from torch import Tensor

from ..engine.step import Step
from ..engine.tree import Tree
from ..errors import AdapterError
from .draft_tree import LEAST, AcceptanceStats, Budget
from .method import DraftContext, Lookahead

WIDTH = 6  # candidates looked at per offset
HAZARDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # bounds of the kinds
ODDS = "hazard"  # the name of their odds in an adapter, [offset][kind]
ONWARD = (
    "onward"  # and of the masks': how often a walk that comes to an offset goes on through it, [0][offset]
)
TRUST = 0.7  # of the hazard itself, where nothing was calibrated: guesses are surer than right
FIRST = 0.4  # and how often walks are taken to go on there
PACE = 8.0  # steps that the rate expected at first counts for
CREDIT = 2.0  # steps that drafts may lose at first: some rounds of masks and of what they guess
PROBING = 0.01  # share of the time that goes to masks when they do not seem to pay


class Guess(NamedTuple):
    """A candidate at one offset."""

    token: int
    kind: int


class Node(NamedTuple):
    """A point of a draft. reached: probability that the walk comes here."""

    token: int
    parent: int
    depth: int
    reached: float


def lookahead(context: DraftContext, method: str) -> Lookahead:
    """The mask tokens of the request's model. Raises AdapterError where it has none."""
    if context.lookahead is None or not context.lookahead.ids:
        raise AdapterError(
            f"method {method!r} drafts with an adapter, and this model came without one: give a folder "
            f"(adapter=..., --adapter), or train one with `selfdraft train {method}`"
        )
    return context.lookahead


def guesses(scores: Tensor) -> list[list[Guess]]:
    """Candidates by offset, the likeliest first. scores: [masks, vocabulary]."""
    likely = scores.softmax(-1).topk(min(WIDTH, scores.shape[-1]))
    found = []
    for tokens, shares in zip(likely.indices.tolist(), likely.values.tolist(), strict=True):
        left, row = 1.0, []
        for token, share in zip(tokens, shares, strict=True):
            row.append(Guess(token, bisect_right(HAZARDS, share / left if left > share else 1.0)))
            left -= share
        found.append(row)
    return found


class GroupDrafter:
    """Sparse trees. most: rows of a step, at most."""

    def __init__(self, look: Lookahead, cost: Callable[[int], float], most: int) -> None:
        self.ids, self.most = tuple(look.ids), most
        self.budget = Budget(cost, CREDIT)
        offsets = range(len(self.ids))
        odds = _known(look, ODDS, len(self.ids), len(middles())) or [
            [TRUST * at for at in middles()] for _ in offsets
        ]
        onward = (_known(look, ONWARD, 1, len(self.ids)) or [[FIRST] * len(self.ids)])[0]
        prior: dict[Hashable, float] = {(i, kind): p for i in offsets for kind, p in enumerate(odds[i])}
        self.odds = AcceptanceStats(prior | dict(enumerate(onward)))  # of bets; of going on through an offset
        self.pace = [
            PACE * (1 + sum(accumulate(onward, mul))),
            PACE * self.budget.cost(2 + 3 * len(self.ids)),
        ]
        self.ahead: list[list[Guess]] = []
        self.nodes: list[Node] = []
        self.probing = 0.0

    def propose(self, tokens: Sequence[int]) -> Tree:
        self.budget.begin()
        self.nodes, masks = self._plan(tokens[-1])
        ids = [node.token for node in self.nodes]
        parents = [node.parent for node in self.nodes]
        for row, count in enumerate(masks):
            if count:
                parents += [row, *range(len(ids), len(ids) + count - 1)]
                ids += self.ids[:count]
        return Tree(tuple(ids), tuple(parents))

    def observe(self, step: Step) -> None:
        emitted = step.emitted
        rows = len(step.tree)
        self.budget.settle(len(emitted), rows)
        self.pace = [self.pace[0] + len(emitted), self.pace[1] + self.budget.cost(rows)]
        for i, offered in enumerate(self.ahead[: len(emitted)]):
            last = i + 1 == len(self.ahead)
            for offset in range(i, len(self.ids) if last else i + 1):
                self.odds.learn(offset, len(emitted) > i + 1)
            self._learn(i, offered, emitted[i])
        self.ahead = [] if step.mask_scores is None else guesses(step.mask_scores)

    def _learn(self, offset: int, offered: Sequence[Guess], token: int) -> None:
        for guess in offered:
            self.odds.learn((offset, guess.kind), guess.token == token)
            if guess.token == token:
                return

    def _plan(self, last: int) -> tuple[list[Node], list[int]]:
        """The nodes worth their rows, and how many masks each has behind it."""
        reach = list(accumulate((self.odds[i] for i in range(len(self.ids))), mul))
        plan = Plan(self.budget, self.pace[0] / self.pace[1], reach)
        plan.add(Node(last, -1, 0, 1.0))
        chances = [self._chances(i, offered) for i, offered in enumerate(self.ahead)]
        queue: list[tuple[float, int, int, int]] = []  # minus reached, order of arrival, parent, token
        order = 0
        while True:
            node, count = plan.nodes[-1], len(plan.nodes)
            for token, chance in chances[node.depth] if node.depth < len(chances) else ():
                if chance * node.reached >= LEAST:
                    order += 1
                    heappush(queue, (-chance * node.reached, order, count - 1, token))
            if not queue or count + 1 > self.most or -queue[0][0] * plan.worth < plan.price:
                break
            reached, _, parent, token = heappop(queue)
            plan.add(Node(token, parent, plan.nodes[parent].depth + 1, -reached))
        return self._probe(*plan.best(self.most))

    def _chances(self, offset: int, offered: Sequence[Guess]) -> list[tuple[int, float]]:
        left, chances = 1.0, []
        for token, kind in offered:
            odds = self.odds[offset, kind]
            chances.append((token, left * odds))
            left *= 1 - odds
        return chances

    def _probe(self, nodes: list[Node], masks: list[int]) -> tuple[list[Node], list[int]]:
        """The plan; where it is to stay silent, now and then masks to learn from."""
        if any(masks) or len(nodes) > 1:
            return nodes, masks
        self.probing += PROBING
        rows = 1 + len(self.ids)
        extra = self.budget.cost(rows) - 1
        if extra > self.probing or not self.budget.affords(rows) or rows > self.most:
            return nodes, masks
        self.probing -= extra
        return nodes, [len(self.ids)]


class Plan:
    """A tree that grows node by node, with the masks that its nodes are worth.

    rate: tokens per time of this text so far; time is in steps of one row. reach: how often the guesses of
    each offset are accepted, where there are any.
    """

    def __init__(self, budget: Budget, rate: float, reach: Sequence[float]) -> None:
        self.budget, self.rate = budget, rate
        width = 2 + 2 * len(reach)
        slope = (budget.cost(2 * width) - budget.cost(width)) / width
        self.price = rate * slope  # of one more row, in tokens
        self.gains = [share - self.price for share in reach]
        self.totals = [0.0]  # by how many masks there are
        for gain in self.gains:
            self.totals.append(self.totals[-1] + max(0.0, gain))
        self.worth = 1 + self.totals[-1]  # of a node that is reached for sure, at most
        self.nodes: list[Node] = []
        self.ends: list[float] = []  # probability that the walk ends there
        self.value, self.rows = 0.0, 0
        self.scores: list[tuple[float, int]] = []  # by number of nodes: what exceeds the rate, and the rows

    def add(self, node: Node) -> None:
        if node.parent >= 0:
            self._count(node.parent, -1)
            self.ends[node.parent] -= node.reached
            self._count(node.parent, 1)
        self.nodes.append(node)
        self.ends.append(node.reached)
        self._count(len(self.nodes) - 1, 1)
        self.value += node.reached
        self.rows += 1
        self.scores.append((self.value - self.rate * self.budget.cost(self.rows), self.rows))

    def best(self, most: int) -> tuple[list[Node], list[int]]:
        """Nodes, and masks of each: of the sizes with at most so many rows the best. New masks must be within
        the budget; what masks have guessed already is paid for, and run without new ones if need be."""
        found, count, masked = -math.inf, 1, False
        for i, (score, rows) in enumerate(self.scores, start=1):
            if score > found and rows <= most and self.budget.affords(rows):
                found, count, masked = score, i, True
        promised = 0.0
        for i, node in enumerate(self.nodes[:most], start=1):
            promised += node.reached
            score = promised - self.rate * self.budget.cost(i)
            if score > found:
                found, count, masked = score, i, False
        if not masked:
            return self.nodes[:count], [0] * count
        ends = [node.reached for node in self.nodes[:count]]
        for node in self.nodes[1:count]:
            ends[node.parent] -= node.reached
        return self.nodes[:count], [self._masks(end) for end in ends]

    def _count(self, node: int, sign: int) -> None:
        """Take what a node's masks are worth, and cost, into the sums, or out of them."""
        masks = self._masks(self.ends[node])
        self.value += sign * self.ends[node] * self.totals[masks]
        self.rows += sign * masks

    def _masks(self, end: float) -> int:
        count = 0
        while count < len(self.gains) and end * self.gains[count] > self.price:
            count += 1
        return count


def _known(look: Lookahead, name: str, rows: int, columns: int) -> Sequence[Sequence[float]] | None:
    """Odds that an adapter was calibrated to; None where it was not, or by another count of kinds."""
    table = look.odds.get(name, ())
    return table if [len(row) for row in table] == [columns] * rows else None


def middles() -> list[float]:
    """The middle of each kind of hazard."""
    return [(a + b) / 2 for a, b in zip((0.0, *HAZARDS), (*HAZARDS, 1.0), strict=True)]


class FixedDrafter:
    """Draws up the same tree at every step, as published.

    nodes: in order, each (parent, offset, rank): the guess of that rank at that offset, under the node of
    that index, of which 0 is the last token. Every one of them has a whole group of masks under it.
    """

    def __init__(self, look: Lookahead, nodes: Sequence[tuple[int, int, int]]) -> None:
        self.ids, self.nodes = tuple(look.ids), nodes
        self.width = 1 + max((rank for _, _, rank in nodes), default=0)
        self.ahead: list[list[int]] = []

    def propose(self, tokens: Sequence[int]) -> Tree:
        # At first nothing is known, towards the end of the text not every offset; nodes come by offset.
        nodes = [node for node in self.nodes if node[1] < len(self.ahead)]
        known = [self.ahead[offset][rank] for _, offset, rank in nodes]
        tree = Tree((tokens[-1], *known), (-1, *(parent for parent, _, _ in nodes)))
        for row in range(len(tree)):
            tree = tree.hang(row, self.ids)
        return tree

    def observe(self, step: Step) -> None:
        self.ahead = [] if step.mask_scores is None else step.mask_scores.topk(self.width).indices.tolist()
