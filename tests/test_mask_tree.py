"""Trees with mask groups: which rows they take, what they learn, and the layouts as published."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdraft import DraftContext, Step, Tree
from selfdraft.drafting.acceptance import Budget
from selfdraft.drafting.bita import Bita
from selfdraft.drafting.draft_tree import Node
from selfdraft.drafting.mask_tree import (
    HAZARDS,
    SOURCE,
    FixedDrafter,
    GroupDrafter,
    MaskCandidates,
    Plan,
    candidates,
)
from selfdraft.drafting.method import Lookahead
from selfdraft.drafting.space import Space
from selfdraft.engine.engine import _group
from selfdraft.errors import AdapterError

VOCABULARY = 50
LOOK = Lookahead((50, 51, 52))


def cheap(rows: int) -> float:
    return 1 + 0.03 * (rows - 1)


def sure(tokens: Sequence[int], strength: float = 12.0) -> torch.Tensor:
    """Scores that are nearly sure of these tokens."""
    scores = torch.zeros(len(tokens), VOCABULARY)
    scores[range(len(tokens)), list(tokens)] = strength
    return scores


def replay(
    drafter: GroupDrafter, right: Callable[[int], bool], steps: int, strength: float = 12.0
) -> list[Tree]:
    """The text counts upwards; masks that were run guess it, or something else where not `right`."""
    text, trees = [0], []
    for step in range(steps):
        tree = drafter.propose(text)
        trees.append(tree)
        count = sum(token < VOCABULARY for token in tree.tokens)
        picks = [(text[-1] + depth + 1) % VOCABULARY for depth in tree.depth[:count]]
        path = [0]
        while (child := tree.child(path[-1], picks[path[-1]])) is not None:
            path.append(child)
        text += [picks[row] for row in path]
        masks = len(_group(Step(tree, lambda: torch.empty(0), picks, path, []), count))
        ahead = [(text[-1] + 1 + i + (0 if right(step) else 7)) % VOCABULARY for i in range(masks)]
        drafter.observe(
            Step(tree, lambda: torch.empty(0), picks, path, [], sure(ahead, strength) if ahead else None)
        )
    return trees


def test_masks_stand_behind_all_other_rows() -> None:
    for tree in replay(GroupDrafter(LOOK, cheap, 64), lambda step: step % 3 > 0, 60):
        assert sorted(tree.tokens, key=lambda token: token >= VOCABULARY) == list(tree.tokens)


def test_right_guesses_are_run_to_the_end_with_masks_behind_them() -> None:
    trees = replay(GroupDrafter(LOOK, cheap, 64), lambda step: True, 80)
    last = trees[-1]
    spine = [row for row, token in enumerate(last.tokens) if token < VOCABULARY and row]
    assert len(spine) >= 3
    deepest = max(row for row in spine if last.depth[row] == 3)
    assert sum(last.visible[row, deepest] for row in range(len(last))) == 4  # itself and three masks


def stands_on_the_trunk() -> None:
    """Candidates stand below the likeliest ones alone; and only there do their rates learn."""
    drafter, trees = GroupDrafter(LOOK, lambda rows: 1.0, 64), 0
    for seed in range(20):
        torch.manual_seed(seed)
        scores = torch.randn(3, VOCABULARY) * 3
        drafter.observe(Step(Tree.chain([1]), torch.empty(0), [2], [0], [], scores))
        tree, first = drafter.propose([1, 2]), scores.argmax(-1).tolist()
        for row in range(1, tree.ordinary(VOCABULARY)):
            above = tree.visible[row].nonzero().flatten().tolist()[1:-1]
            assert [tree.tokens[i] for i in above] == first[: len(above)]
        trees += max(tree.depth[: tree.ordinary(VOCABULARY)]) > 1
        counts = {kind: list(count) for kind, count in drafter.builder.rates.counts.items()}
        second = [2, scores[0].topk(2).indices[1].item(), first[1]]
        drafter.observe(Step(Tree.chain(second[:2]), torch.empty(0), second[1:], [0, 1], []))
        changed = {kind for kind, count in drafter.builder.rates.counts.items() if count != counts[kind]}
        assert changed
        assert not any(kind[:2] == (SOURCE, 1) for kind in changed)
    assert trees > 10


def test_candidates_stand_below_the_likeliest_ones() -> None:
    stands_on_the_trunk()


def test_children_off_the_trunk_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskCandidates, "follow", lambda self, state, token: state + 1)
    with pytest.raises(AssertionError):
        stands_on_the_trunk()


def test_wrong_guesses_end_in_silence_that_is_broken_now_and_then() -> None:
    trees = replay(GroupDrafter(LOOK, cheap, 64), lambda step: False, 400)
    late = [len(tree) for tree in trees[200:]]
    assert 4 in late  # a probe: the masks of the root
    assert late.count(1) > len(late) / 2
    assert sum(cheap(rows) - 1 for rows in late) < 0.03 * len(late)


def test_what_was_lost_is_learned_again() -> None:
    drafter = GroupDrafter(LOOK, cheap, 64)
    replay(drafter, lambda step: False, 300)
    assert len(replay(drafter, lambda step: True, 200)[-1]) > 6


def test_rows_follow_their_cost() -> None:
    """Where rows are dear fewer are run, where they are free as many as allowed."""

    def rows(slope: float, most: int = 64) -> int:
        drafter = GroupDrafter(LOOK, lambda n: 1 + slope * (n - 1), most)
        return len(replay(drafter, lambda step: step % 4 > 0, 120, strength=4.0)[-1])

    assert rows(0.3) < rows(0.03) <= rows(0.001)
    assert rows(0.001, most=5) <= 5


@pytest.mark.parametrize("expected", [0.3, 1.5])
def test_masks_must_pay_against_plain_decoding(expected: float) -> None:
    """From the first step, whatever drafting was expected to make: plain decoding makes a token per time."""
    drafter = GroupDrafter(LOOK, lambda rows: 1 + 0.5 * (rows - 1), 64)  # a row costs more than FIRST_ONWARD
    drafter.builder.expected[:] = [8 * expected, 8.0]
    assert len(drafter.propose([1])) == 1


@given(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=5), st.floats(0.01, 0.2), st.floats(0.5, 2.5))
def test_no_chain_with_masks_is_worth_more(chances: list[float], slope: float, rate: float) -> None:
    """Of all lengths of a chain, with as many masks behind each of its rows as there may be, the plan has
    the best, up to what a price taken for constant can tell: here the cost is linear, so it is exact."""
    reach = [0.5, 0.3]

    def cost(rows: int) -> float:
        return 1 + slope * (rows - 1)

    budget = Budget(cost)
    budget.credit = math.inf
    plan: Plan[None] = Plan(budget, rate, reach)
    reached = [1.0, *itertools.accumulate(chances, lambda a, b: a * b)]
    for depth, share in enumerate(reached):
        plan.add(Node(depth, depth - 1, depth, share, "copy", None))
    gains = [share - rate * slope for share in reach]

    def value(length: int, masks: Sequence[int]) -> float:
        ends = [reached[i] - (reached[i + 1] if i + 1 < length else 0) for i in range(length)]
        future = sum(end * sum(gains[:count]) for end, count in zip(ends, masks, strict=True))
        return sum(reached[:length]) + future - rate * cost(length + sum(masks))

    best = max(
        value(length, masks)
        for length in range(1, len(reached) + 1)
        for masks in itertools.product(range(3), repeat=length)
    )
    nodes, masks = plan.best(64)
    assert value(len(nodes), masks) == pytest.approx(best, abs=1e-9)


def test_a_hazard_is_the_share_of_what_is_left() -> None:
    scores = torch.log(torch.tensor([[0.6, 0.3, 0.06, 0.04] + [1e-9] * 46]))
    kinds = [one.kind for one in candidates(scores)[0]]
    assert [one.token for one in candidates(scores)[0]][:4] == [0, 1, 2, 3]
    bounds = [(0.0, *HAZARDS)[kind] for kind in kinds[:3]]
    assert bounds[0] <= 0.6 <= bounds[0] + 0.1
    assert bounds[1] <= 0.75 <= bounds[1] + 0.1  # 0.3 of 0.4


@pytest.mark.parametrize(
    ("method", "masks", "nodes"),
    [
        (Bita(faithful=True), 3, 12),
        (Bita(faithful=True), 4, 14),
        (Bita(faithful=True, tree="half"), 3, 15),
        (Bita(faithful=True, tree="full", width=2), 3, 2 + 4 + 8),
        (Space(faithful=True), 5, 5),
    ],
)
def test_layouts_have_the_published_size(method: Bita | Space, masks: int, nodes: int) -> None:
    """N candidates and N + 1 groups: BiTA's 12 + 3 * 13 = 51 rows beside the root, SPACE's k (k + 2) = 35."""
    look = Lookahead(tuple(range(50, 50 + masks)))
    drafter = method.drafter(DraftContext([1], lookahead=look))
    first = drafter.propose([1])
    assert first.tokens == (1, *look.ids)  # nothing to verify yet
    drafter.observe(Step(first, lambda: torch.empty(0), [2], [0], [], torch.rand(masks, VOCABULARY)))
    tree = drafter.propose([1, 2])
    assert len(tree) == 1 + nodes + masks * (nodes + 1)
    for row in range(nodes + 1):
        group = [i for i in range(nodes + 1, len(tree)) if tree.parents[i] == row]
        assert len(group) == 1  # the first mask of its group, the others under it
        assert max(tree.depth[i] for i in range(len(tree)) if tree.visible[i, group[0]]) == (
            tree.depth[row] + masks
        )


def test_the_trunk_holds_the_first_guesses() -> None:
    """Upper triangle: under the first guess of each offset stand the next offset's; the others are leaves."""
    drafter = Bita(faithful=True).drafter(DraftContext([1], lookahead=LOOK))
    drafter.observe(Step(Tree.chain([1]), lambda: torch.empty(0), [2], [0], [], sure([10, 20, 30])))
    tree = drafter.propose([1, 2])
    by_depth = {d: [i for i in range(13) if tree.depth[i] == d] for d in range(4)}
    assert [len(by_depth[d]) for d in range(4)] == [1, 5, 4, 3]
    assert [tree.tokens[by_depth[d][0]] for d in (1, 2, 3)] == [10, 20, 30]
    for d in (2, 3):
        assert {tree.parents[i] for i in by_depth[d]} == {by_depth[d - 1][0]}


def published(method: Bita | Space, masks: int) -> set[tuple[int, ...]]:
    """The paths of candidates, as (offset, rank) numbered 10 * (offset + 1) + rank: SPACE's only chain; of
    BiTA's Figure 3 all candidates of an offset, under the first candidates of the offsets before it."""
    if isinstance(method, Space):
        return {tuple(10 * (offset + 1) for offset in range(deep + 1)) for deep in range(masks)}
    if method.tree == "full":
        ranks = [range(10 * offset + 10, 10 * offset + 10 + method.width) for offset in range(masks)]
        return {path for deep in range(masks) for path in itertools.product(*ranks[: deep + 1])}
    narrower = method.tree == "upper-triangle"
    return {
        (*(10 * (above + 1) for above in range(offset)), 10 * (offset + 1) + rank)
        for offset in range(masks)
        for rank in range(method.width - offset * narrower)
    }


LAYOUTS = [
    Space(faithful=True),
    Bita(faithful=True),
    Bita(faithful=True, tree="half"),
    Bita(faithful=True, tree="full", width=2),
]


def as_published(method: Bita | Space) -> None:
    """Every candidate stands where the paper has it, with the token of its own rank."""
    drafter = method.drafter(DraftContext([1], lookahead=LOOK))
    scores = torch.zeros(3, VOCABULARY)
    for offset in range(3):
        scores[offset, 10 * (offset + 1) : 10 * (offset + 1) + 9] = torch.arange(9, 0, -1.0)
    drafter.observe(Step(Tree.chain([1]), torch.empty(0), [2], [0], [], scores))
    tree = drafter.propose([1, 2])
    paths = []
    for row in range(1, tree.ordinary(VOCABULARY)):
        above = tree.visible[row].nonzero().flatten().tolist()
        paths.append(tuple(tree.tokens[i] for i in above[1:]))
    assert len(paths) == len(set(paths))
    assert set(paths) == published(method, 3)


@pytest.mark.parametrize("method", LAYOUTS, ids=str)
def test_candidates_stand_as_published(method: Bita | Space) -> None:
    as_published(method)


Nodes = Sequence[tuple[int, int, int]]


def hung_flat(nodes: Nodes) -> Nodes:
    """All candidates stand under the root."""
    return [(0, offset, rank) for _, offset, rank in nodes]


def of_one_rank(nodes: Nodes) -> Nodes:
    """All candidates are the likeliest ones."""
    return [(parent, offset, 0) for parent, offset, _ in nodes]


def of_wrong_rank(nodes: Nodes) -> Nodes:
    """Leaves have the candidate one rank further down."""
    return [(parent, offset, rank + (rank > 0)) for parent, offset, rank in nodes]


def with_leaves_elsewhere(nodes: Nodes) -> Nodes:
    """Candidates of the second offset stand under the second candidate of the first."""
    return [(2 if offset == 1 else parent, offset, rank) for parent, offset, rank in nodes]


@pytest.mark.parametrize("fault", [hung_flat, of_one_rank, of_wrong_rank, with_leaves_elsewhere])
def test_candidates_elsewhere_are_seen(
    fault: Callable[[Nodes], Nodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    init = FixedDrafter.__init__
    monkeypatch.setattr(FixedDrafter, "__init__", lambda self, look, nodes: init(self, look, fault(nodes)))
    method = LAYOUTS[0] if fault is hung_flat else LAYOUTS[1]
    with pytest.raises(AssertionError):
        as_published(method)


@pytest.mark.parametrize("method", [Bita(), Space(), Bita(faithful=True), Space(faithful=True)])
def test_without_an_adapter_it_says_what_to_do(method: Bita | Space) -> None:
    with pytest.raises(AdapterError, match="train"):
        method.drafter(DraftContext([1]))
