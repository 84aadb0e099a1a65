"""Which guesses are worth a row: trees by expected tokens per measured time.

A drafter says, for any point of a draft, what it would bet on there, best first (`Source.bets`). A bet
names tokens of which one comes next with the odds of the bet's kind, given that no earlier bet won: the
escapes of prediction by partial matching (Cleary and Witten, IEEE Trans. Commun. 1984), with odds that
are learned while drafting. Rows are taken in the order of the probability that the walk reaches them,
which is the product of their chances; of this order the step runs as many as yield most expected tokens
per unit of time. One row is silence. All sizes are compared, since a step's cost may jump.

When sampling, the noise of future positions is known. A token of probability q with Gumbel noise g is
picked if log q + g exceeds the scores of all others, whose maximum is a Gumbel variable located at
log(1 - q): with probability exp(-(1 - q)/q exp(-g)). Its chance lies between q and that.

AcceptanceStats are estimates, so what a text can lose is bounded: a draft must be able to fail altogether and
be paid for by what drafts have gained in this text, with a little to begin with and a little for each step.

What a draft bet on is compared with what came, also where it was not worth a row, so that silence
does not end learning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Generic, NamedTuple, Protocol, TypeVar

from ..engine.tree import Tree

S = TypeVar("S")

# AcceptanceStats are a mean over points where the model is sure, right or wrong, which noise does not change,
# and points where it is in two minds: the share of the latter, between what edits (0.2) and code (0.6)
# showed.
UNDECIDED = 0.5
LEAST = 0.02  # rows that are reached less often are not looked at
MARGIN = 1.02  # a draft must promise so many times the tokens of silence in the same time
CREDIT = 0.3  # time that drafts may lose in all, in steps of one row,
SHARE = 0.02  # and more of it for each step
WEIGHT = 8.0  # outcomes that a prior counts for
STEPS = 16  # for which a cost is remembered; requests that join or leave may change it
MEMORY = 64.0  # outcomes of a kind that count, about; older ones fade


class AcceptanceStats:
    """How often bets of a kind are won: a running mean that starts at its prior."""

    def __init__(self, prior: Mapping[Hashable, float]) -> None:
        self.counts = {kind: [odds * WEIGHT, WEIGHT] for kind, odds in prior.items()}  # won, made

    def __getitem__(self, kind: Hashable) -> float:
        won, made = self.counts[kind]
        return won / made

    def learn(self, kind: Hashable, won: bool) -> None:
        count = self.counts[kind]
        fade = min(1.0, MEMORY / (count[1] + 1))
        count[0] = (count[0] + won) * fade
        count[1] = (count[1] + 1) * fade


class Candidates(NamedTuple):
    """One of some tokens comes next. shares: how the bet's odds are shared among them; sums to 1."""

    kind: Hashable
    shares: Mapping[int, float]


class Source(Protocol[S]):
    """What a drafter guesses from. A state is a point of a draft, in terms of the source."""

    def bets(self, state: S) -> Sequence[Candidates]:
        """What comes next, the likelier kinds first."""

    def follow(self, state: S, token: int) -> S:
        """The point after a token that was bet on."""


@dataclass(slots=True)
class Node(Generic[S]):
    """A point of a draft. reached: probability that the walk comes here."""

    token: int
    parent: int
    depth: int
    reached: float
    state: S
    bets: Sequence[Candidates]
    children: dict[int, Node[S]] = field(default_factory=dict)


class Budget:
    """The time of one request, in steps of one row: what rows cost, and what drafts may still lose."""

    def __init__(self, cost: Callable[[int], float], credit: float = CREDIT) -> None:
        self.measured = cost
        self.costs = {1: cost(1)}  # asked here, so that a first measurement does not fall into a step
        self.asked = 0
        self.credit = credit

    def begin(self) -> None:
        """A step begins."""
        self.asked += 1
        if self.asked % STEPS == 0:
            self.costs.clear()

    def cost(self, rows: int) -> float:
        """What so many rows cost; remembered for a few steps, since it is asked often."""
        cost = self.costs.get(rows)
        if cost is None:
            cost = self.costs[rows] = self.measured(rows)
        return cost

    def affords(self, rows: int) -> bool:
        """May a step of so many rows turn out to be in vain?"""
        return self.cost(rows) - 1 <= self.credit

    def settle(self, tokens: int, rows: int) -> None:
        """A step of so many rows has emitted so many tokens."""
        self.credit += SHARE + tokens - self.cost(rows)


class DraftTreeBuilder(Generic[S]):
    """The trees of one request. most: rows of a step, at most. noise: None when greedy."""

    def __init__(
        self,
        source: Source[S],
        odds: AcceptanceStats,
        cost: Callable[[int], float],
        noise: Callable[[int, Sequence[int]], Sequence[float]] | None,
        most: int,
    ) -> None:
        self.source, self.odds, self.noise, self.most = source, odds, noise, most
        self.known: dict[int, dict[int, float]] = {}
        self.budget = Budget(cost)
        self.root: Node[S] | None = None

    def tree(self, tokens: Sequence[int], state: S) -> Tree:
        """The rows worth running after the text so far, the surest first."""
        self.budget.begin()
        self.known = {position: noise for position, noise in self.known.items() if position >= len(tokens)}
        nodes = self._grow(tokens, state)
        return Tree(tuple([node.token for node in nodes]), tuple([node.parent for node in nodes]))

    def learn(self, emitted: Sequence[int], rows: int) -> None:
        """Compare the bets along the path with what came, in a step of so many rows."""
        self.budget.settle(len(emitted), rows)
        node = self.root
        for token in emitted:
            if node is None:
                return
            for kind, shares in node.bets:
                self.odds.learn(kind, token in shares)
                if token in shares:
                    break
            node = node.children.get(token)
        self.root = None

    def _grow(self, tokens: Sequence[int], state: S) -> list[Node[S]]:
        """Nodes in the order of their probability to be reached, as many as pay; parents come first."""
        self.root = Node(tokens[-1], -1, 0, 1.0, state, self.source.bets(state))
        nodes = [self.root]
        queue: list[tuple[float, int, int, int]] = []  # minus reached, order of arrival, parent, token
        later = [(most, self.budget.cost(most)) for most in (self.most // 2, self.most) if most > 1]
        best, rows, promised, order = MARGIN, 1, 1.0, 0
        while True:
            node, count = nodes[-1], len(nodes)
            for token, chance in self._chances(node, len(tokens)):
                if chance * node.reached >= LEAST:
                    order += 1
                    heappush(queue, (-chance * node.reached, order, count - 1, token))
            if not queue or count == self.most:
                return nodes[:rows]
            reached, _, parent, token = heappop(queue)
            next_cost = self.budget.cost(count + 1)
            if promised - reached <= best * next_cost and all(
                promised - reached * (rows_then - count) <= best * cost_then for rows_then, cost_then in later
            ):
                return nodes[:rows]
            promised -= reached
            if promised > best * next_cost and self.budget.affords(count + 1):
                best, rows = promised / next_cost, count + 1
            above = nodes[parent]
            state = self.source.follow(above.state, token)
            node = Node(token, parent, above.depth + 1, -reached, state, self.source.bets(state))
            above.children[token] = node
            nodes.append(node)

    def _chances(self, node: Node[S], length: int) -> Iterable[tuple[int, float]]:
        """Tokens that are bet on at a node, each with the probability that it is picked there."""
        chances: dict[int, float] = {}
        left = 1.0
        for kind, shares in node.bets:
            odds = self.odds[kind] * left
            for token, share in shares.items():
                chances[token] = chances.get(token, 0.0) + odds * share
            left -= odds
        if self.noise is None or not chances:
            return chances.items()
        noise = self._noise(length + node.depth, list(chances))
        return [
            (token, chance + UNDECIDED * (wins(chance, noise[token]) - chance))
            for token, chance in chances.items()
        ]

    def _noise(self, position: int, tokens: Sequence[int]) -> Mapping[int, float]:
        known = self.known.setdefault(position, {})
        missing = [token for token in tokens if token not in known]
        if missing:
            assert self.noise is not None
            known.update(zip(missing, self.noise(position, missing), strict=True))
        return known


def wins(chance: float, noise: float) -> float:
    """Probability that a token of probability `chance` is picked where this Gumbel noise is added to it."""
    chance = min(max(chance, 1e-9), 1 - 1e-9)
    return math.exp(-(1 - chance) / chance * math.exp(-noise))
