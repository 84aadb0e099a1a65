"""Which draft tokens are run: the tree with the most expected tokens per measured time.

A drafter says, for any point of a draft, which candidates it has there, the likeliest kinds first
(`Source.candidates`). Each kind has an acceptance rate, given that no earlier kind at this point was right:
the escapes of prediction by partial matching (Cleary and Witten, IEEE Trans. Commun. 1984), with rates that
are learned while drafting. Rows are taken in the order of the probability that the walk reaches them, which
is the product of the rates along their path. Of this order the step runs as many as yield most expected
tokens per unit of time. A tree of one row proposes nothing. All sizes are compared, since the cost of a step
may jump.

When sampling, the noise of future positions is known. A token of probability q with Gumbel noise g is picked
if log q + g exceeds the scores of all others, whose maximum is a Gumbel variable located at log(1 - q): with
probability exp(-(1 - q)/q exp(-g)). The probability that the token is picked lies between q and that.

Candidates are compared with the tokens that came, also where they were not run, so that a drafter which
proposes nothing goes on learning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Generic, Protocol, TypeVar

from ..engine.tree import Tree
from .acceptance import AcceptanceStats, Budget, Candidates

S = TypeVar("S")

# An acceptance rate is a mean over points where the model is certain (noise changes nothing there) and points
# where it is undecided. This is the share of the latter, between what edits (0.2) and code (0.6) showed.
UNDECIDED = 0.5
MIN_REACHED = 0.02  # rows that the walk reaches less often are not considered
MARGIN = 1.02  # a draft must promise so many times the tokens of plain decoding in the same time


class Source(Protocol[S]):
    """Where a drafter has its candidates from. A state is a point of a draft, in terms of the source."""

    def candidates(self, state: S) -> Sequence[Candidates]:
        """What may come next, the likelier kinds first."""

    def follow(self, state: S, token: int) -> S:
        """The point after one of the candidates."""


@dataclass(slots=True)
class Node(Generic[S]):
    """A point of a draft."""

    token: int
    parent: int  # index of the node above; -1 for the root
    depth: int
    reached: float  # probability that the walk comes here
    state: S
    candidates: Sequence[Candidates]
    children: dict[int, Node[S]] = field(default_factory=dict)  # by token


class DraftTreeBuilder(Generic[S]):
    """Builds the trees of one request, and learns from what was accepted."""

    def __init__(
        self,
        source: Source[S],
        rates: AcceptanceStats,
        cost: Callable[[int], float],
        noise: Callable[[int, Sequence[int]], Sequence[float]] | None,
        max_rows: int,
    ) -> None:
        """noise: as `DraftContext.noise`; None when greedy. max_rows: of one step."""
        self.source, self.rates, self.noise, self.max_rows = source, rates, noise, max_rows
        self.known_noise: dict[int, dict[int, float]] = {}  # position -> token -> noise
        self.budget = Budget(cost)
        self.root: Node[S] | None = None

    def tree(self, tokens: Sequence[int], state: S) -> Tree:
        """The rows to run after the text so far, the most probable first."""
        self.budget.begin()
        self.known_noise = {at: noise for at, noise in self.known_noise.items() if at >= len(tokens)}
        nodes = self._grow(tokens, state)
        return Tree(tuple([node.token for node in nodes]), tuple([node.parent for node in nodes]))

    def learn(self, emitted: Sequence[int], rows: int) -> None:
        """Compare the candidates along the path with the tokens that a step of so many rows emitted."""
        self.budget.settle(len(emitted), rows)
        node = self.root
        for token in emitted:
            if node is None:
                return
            for kind, shares in node.candidates:
                self.rates.learn(kind, token in shares)
                if token in shares:
                    break
            node = node.children.get(token)
        self.root = None

    def _grow(self, tokens: Sequence[int], state: S) -> list[Node[S]]:
        """Nodes in the order of their probability to be reached, as many as pay; parents come first."""
        self.root = Node(tokens[-1], -1, 0, 1.0, state, self.source.candidates(state))
        nodes = [self.root]
        queue: list[tuple[float, int, int, int]] = []  # minus reached, order of arrival, parent, token
        costs = list(map(self.budget.cost, range(1, self.max_rows + 1)))
        best, rows, promised, order = MARGIN, 1, 1.0, 0
        while True:
            node, count = nodes[-1], len(nodes)
            for token, chance in self._chances(node, len(tokens)):
                if chance * node.reached >= MIN_REACHED:
                    order += 1
                    heappush(queue, (-chance * node.reached, order, count - 1, token))
            if not queue or count == self.max_rows:
                return nodes[:rows]
            reached, _, parent, token = heappop(queue)
            # No larger tree can be better: not if each further row were reached as often as this one.
            if all(promised - reached * i <= best * cost for i, cost in enumerate(costs[count:], 1)):
                return nodes[:rows]
            promised -= reached
            if promised > best * costs[count] and self.budget.affords(count + 1):
                best, rows = promised / costs[count], count + 1
            above = nodes[parent]
            state = self.source.follow(above.state, token)
            node = Node(token, parent, above.depth + 1, -reached, state, self.source.candidates(state))
            above.children[token] = node
            nodes.append(node)

    def _chances(self, node: Node[S], length: int) -> Iterable[tuple[int, float]]:
        """The candidates at a node, each with the probability that it is picked there."""
        chances: dict[int, float] = {}
        left = 1.0
        for kind, shares in node.candidates:
            rate = self.rates[kind] * left
            for token, share in shares.items():
                chances[token] = chances.get(token, 0.0) + rate * share
            left -= rate
        if self.noise is None or not chances:
            return chances.items()
        noise = self._noise(length + node.depth, list(chances))
        return [
            (token, chance + UNDECIDED * (wins(chance, noise[token]) - chance))
            for token, chance in chances.items()
        ]

    def _noise(self, position: int, tokens: Sequence[int]) -> Mapping[int, float]:
        known = self.known_noise.setdefault(position, {})
        missing = [token for token in tokens if token not in known]
        if missing:
            assert self.noise is not None
            known.update(zip(missing, self.noise(position, missing), strict=True))
        return known


def wins(chance: float, noise: float) -> float:
    """Probability that a token of probability `chance` is picked where this Gumbel noise is added to it."""
    chance = min(max(chance, 1e-9), 1 - 1e-9)
    return math.exp(-(1 - chance) / chance * math.exp(-noise))
