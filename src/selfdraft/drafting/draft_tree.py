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
probability exp(-(1 - q)/q exp(-g)). The probability that the token is picked lies between q and that. Of
candidates that were chosen with that noise the rates hold as they are.

Candidates are compared with the tokens that came, also where they were not run, so that a drafter which
proposes nothing goes on learning. What was run is counted by source.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Generic, Protocol, TypeVar

from ..engine.step import Step
from ..engine.tree import Tree
from .acceptance import AcceptanceStats, Budget, Candidates, DraftCount

S = TypeVar("S")

# An acceptance rate is a mean over points where the model is certain (noise changes nothing there) and points
# where it is undecided. This is the share of the latter, between what edits (0.2) and code (0.6) showed.
UNDECIDED = 0.5
MIN_REACHED = 0.02  # rows that the walk reaches less often are not considered
MARGIN = 1.02  # a draft must promise so many times the tokens of plain decoding in the same time


class Source(Protocol[S]):
    """Where a drafter has its candidates from. A state is a point of a draft, in terms of the source."""

    def read(self, tokens: Sequence[int]) -> S:
        """The state at the end of the text so far."""

    def candidates(self, state: S) -> Sequence[Candidates]:
        """What may come next, the likelier kinds first."""

    def follow(self, state: S, token: int) -> S:
        """The point after one of the candidates."""


class Sources:
    """Several sources as one. At each point the candidates of the first source come first."""

    def __init__(self, *parts: Source[Any]) -> None:
        self.parts = parts

    def read(self, tokens: Sequence[int]) -> Sequence[Any]:
        return [part.read(tokens) for part in self.parts]

    def candidates(self, state: Sequence[Any]) -> Sequence[Candidates]:
        found: list[Candidates] = []
        for part, own in zip(self.parts, state, strict=True):
            found += part.candidates(own)
        return found

    def follow(self, state: Sequence[Any], token: int) -> Sequence[Any]:
        return [part.follow(own, token) for part, own in zip(self.parts, state, strict=True)]


@dataclass(slots=True)
class Node(Generic[S]):
    """A point of a draft."""

    token: int
    parent: int  # index of the node above; -1 for the root
    depth: int
    reached: float  # probability that the walk comes here
    source: Hashable  # that its token is from: of several the one whose candidates come first
    state: S
    candidates: Sequence[Candidates] = ()
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
        mask_cost: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """noise: as `DraftContext.noise`; None when greedy. max_rows: of a step. mask_cost: see `Budget`."""
        self.source, self.rates, self.noise, self.max_rows = source, rates, noise, max_rows
        self.known_noise: dict[int, dict[int, float]] = {}  # position -> token -> noise
        self.budget = Budget(cost, mask_cost)
        self.root: Node[S] | None = None
        self.counts: defaultdict[Hashable, DraftCount] = defaultdict(DraftCount)  # by source
        self.hung: Hashable = None  # source of the rows that a drafter hangs behind the trees

    def tree(self, tokens: Sequence[int]) -> Tree:
        """The rows to run after the text so far, the most probable first."""
        self.budget.begin()
        self.known_noise = {at: noise for at, noise in self.known_noise.items() if at >= len(tokens)}
        nodes = self._sized(self._grow(tokens))
        return Tree(tuple([node.token for node in nodes]), tuple([node.parent for node in nodes]))

    def learn(self, step: Step) -> Sequence[Hashable]:
        """Compare the candidates along the path with the tokens that a step emitted. Returns the sources of
        the draft tokens that were accepted."""
        emitted = step.emitted
        self.budget.settle(len(emitted), len(step.tree), step.has_masks)
        node = self.root
        for token in emitted:
            if node is None:
                break
            for kind, shares, _ in node.candidates:
                self.rates.learn(kind, token in shares)
                if token in shares:
                    break
            node = node.children.get(token)
        return self._count(step)

    def _count(self, step: Step) -> Sequence[Hashable]:
        """Count the draft tokens that ran by source; mask tokens, which stand behind them, are none. Returns
        the sources of those on the path."""
        tree, sources, nodes = step.tree, [self.hung], [self.root]
        for row in range(1, len(step.picks)):
            above = nodes[tree.parents[row]]
            node = None if above is None else above.children.get(tree.tokens[row])
            nodes.append(node)
            sources.append(self.hung if node is None else node.source)
            self.counts[sources[row]].drafted += 1
        accepted = [sources[row] for row in step.path[1:]]
        for source in accepted:
            self.counts[source].accepted += 1
        return accepted

    def _grow(self, tokens: Sequence[int]) -> Iterator[Node[S]]:
        """Nodes in the order of their probability to be reached, parents first. A node has candidates once
        the next one is asked for."""
        node = self.root = Node(tokens[-1], -1, 0, 1.0, None, self.source.read(tokens))
        nodes = [node]
        # Minus reached, order of arrival, parent, token, source.
        queue: list[tuple[float, int, int, int, Hashable]] = []
        order = 0
        while True:
            yield node
            node.candidates = self.source.candidates(node.state)
            if node is self.root and self._hopeless(node.candidates):
                return
            for token, (chance, source) in self._chances(node, len(tokens)).items():
                if chance * node.reached >= MIN_REACHED:
                    order += 1
                    heappush(queue, (-chance * node.reached, order, len(nodes) - 1, token, source))
            if not queue or len(nodes) == self.max_rows:
                return
            reached, _, parent, token, source = heappop(queue)
            above = nodes[parent]
            state = self.source.follow(above.state, token)
            node = above.children[token] = Node(token, parent, above.depth + 1, -reached, source, state)
            nodes.append(node)

    @property
    def max_node_value(self) -> float:
        """Tokens gained by a row that is always reached, at most."""
        return 1.0

    def _hopeless(self, candidates: Sequence[Candidates]) -> bool:
        """True if no tree can pay that begins with these candidates: this spares most of the work on a text
        that has nothing to draft. With noise one may win in spite of that, too seldom to look for it."""
        left = 1.0
        for kind, _, _ in candidates:
            left *= 1 - self.rates[kind]
        return (1 - left) * self.max_node_value <= self.budget.least_chance(self.max_rows, MARGIN)

    def _sized(self, growing: Iterator[Node[S]]) -> Sequence[Node[S]]:
        """As many nodes as pay."""
        nodes = [next(growing)]
        best, rows, promised = MARGIN, 1, 1.0
        for node in growing:
            count, costs = len(nodes), self.budget.costs_to(self.max_rows)
            # No larger tree can be better: not if each further row were reached as often as this one.
            rest = enumerate(costs[count:], 1)
            if all(promised + node.reached * i <= best * cost for i, cost in rest):
                break
            nodes.append(node)
            promised += node.reached
            if promised > best * costs[count] and self.budget.affords(count + 1):
                best, rows = promised / costs[count], count + 1
        return nodes[:rows]

    def _chances(self, node: Node[S], length: int) -> Mapping[int, tuple[float, Hashable]]:
        """The candidates at a node, each with the probability that it is picked there, and its source."""
        chances: dict[int, tuple[float, Hashable]] = {}
        undrawn: dict[int, float] = {}  # the part of a chance that is to be seen with the noise
        left = 1.0
        for kind, shares, drawn in node.candidates:
            rate = self.rates[kind] * left
            for token, share in shares.items():
                before, source = chances.get(token, (0.0, kind[0]))
                chances[token] = before + rate * share, source
                if not drawn and self.noise is not None:
                    undrawn[token] = undrawn.get(token, 0.0) + rate * share
            left -= rate
        if undrawn:
            noise = self._noise(length + node.depth, list(undrawn))
            for token, part in undrawn.items():
                chance, source = chances[token]
                chances[token] = chance + UNDECIDED * (wins(part, noise[token]) - part), source
        return chances

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


class TreeDrafter:
    """A drafter whose trees a builder makes."""

    def __init__(self, builder: DraftTreeBuilder[Any]) -> None:
        self.builder = builder

    @property
    def sources(self) -> Mapping[Hashable, DraftCount]:
        return self.builder.counts

    def propose(self, tokens: Sequence[int]) -> Tree:
        return self.builder.tree(tokens)

    def observe(self, step: Step) -> None:
        self.builder.learn(step)
