"""A tree against its definition, by brute force."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdraft import Step, Tree
from selfdraft.engine.step import accept
from selfdraft.errors import InvalidTree


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    rows = draw(st.integers(1, 12))
    parents = [-1, *(draw(st.integers(0, row - 1)) for row in range(1, rows))]
    return Tree(tuple(draw(st.integers(0, 3)) for _ in range(rows)), tuple(parents))


def path_to(tree: Tree, row: int) -> list[int]:
    path = [row]
    while tree.parents[path[0]] >= 0:
        path.insert(0, tree.parents[path[0]])
    return path


@given(trees())
def test_shape(tree: Tree) -> None:
    for row in range(len(tree)):
        path = path_to(tree, row)
        assert tree.depth[row] == len(path) - 1
        assert tree.visible[row].nonzero().flatten().tolist() == path
        assert tree.below(row) == [other for other in range(len(tree)) if row in path_to(tree, other)]


@given(trees(), st.integers(0, 4))
def test_prune_keeps_the_shallow_rows(tree: Tree, depth: int) -> None:
    pruned = tree.prune(depth)
    stay = [row for row in range(len(tree)) if tree.depth[row] <= depth]
    texts = [[tree.tokens[r] for r in path_to(tree, row)] for row in stay]
    assert [[pruned.tokens[r] for r in path_to(pruned, row)] for row in range(len(pruned))] == texts


@given(trees(), st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_accept_walks_the_picks(tree: Tree, picks: list[int]) -> None:
    path, in_flight = accept(tree, picks, [True] * len(tree))
    assert in_flight == []
    assert path[0] == 0
    for row, child in pairwise(path):
        assert tree.parents[child] == row
        assert tree.tokens[child] == picks[row]
        twins = [r for r, t in enumerate(tree.tokens) if (tree.parents[r], t) == (row, picks[row])]
        assert child == min(twins)
    assert all((tree.parents[r], tree.tokens[r]) != (path[-1], picks[path[-1]]) for r in range(1, len(tree)))


def test_a_row_in_flight_has_no_pick() -> None:
    tree = Tree.chain([7, 8, 9]).hang(1, [5])
    assert accept(tree, [8, 9, 0, 0], [True, False, False, False]) == ([0], [1, 2, 3])
    assert accept(tree, [8, 9, 0, 0], [False] * 4) == ([], [0, 1, 2, 3])


def test_hang() -> None:
    tree = Tree.chain([1, 2]).hang(0, [3, 4])
    assert tree == Tree((1, 2, 3, 4), (-1, 0, 0, 2))
    assert Step(tree, lambda: torch.zeros(4, 1), [2, 6, 7, 8], [0, 1], []).emitted == [2, 6]


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, -1), (-1, 0, 3)])
def test_not_a_tree(parents: tuple[int, ...]) -> None:
    with pytest.raises(InvalidTree):
        Tree((0,) * len(parents), parents)
    with pytest.raises(InvalidTree):
        Tree((1, 2), (-1,))
