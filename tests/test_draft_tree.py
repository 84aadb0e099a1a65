"""Trees by expected tokens per time: against exhaustive search, simulation, and silence."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from selfdraft import Step, Tree
from selfdraft.drafting import acceptance
from selfdraft.drafting.acceptance import AcceptanceStats, Budget, Candidates, Kind
from selfdraft.drafting.draft_tree import MARGIN, MIN_REACHED, DraftTreeBuilder, wins
from selfdraft.engine.step import accept


class Fixed:
    """A source of fixed candidates: path of tokens -> acceptance rates of those that may follow."""

    def __init__(self, chances: Mapping[tuple[int, ...], Mapping[int, float]]) -> None:
        self.chances = chances

    def rates(self) -> AcceptanceStats:
        return AcceptanceStats({(path, t): p for path, own in self.chances.items() for t, p in own.items()})

    def read(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return ()

    def candidates(self, state: tuple[int, ...]) -> Sequence[Candidates]:
        return [Candidates((state, token), {token: 1.0}) for token in self.chances.get(state, ())]

    def follow(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*state, token)


PATHS: list[tuple[int, ...]] = [(), (0,), (1,), (0, 0), (1, 0)]
chance = st.floats(0.01, 0.99)
trees = st.fixed_dictionaries({path: st.tuples(chance, chance) for path in PATHS})
LITTLE = {path: (0.5, 0.5) if path else (0.109375, 0.1328125) for path in PATHS}


def best_rate(source: Fixed, cost: Callable[[int], float], most: int) -> float:
    """Over all trees: expected tokens per time."""
    reached = {(): 1.0}
    for path in PATHS:
        first, second = source.chances[path][0], source.chances[path][1]
        reached[(*path, 0)] = reached[path] * first
        reached[(*path, 1)] = reached[path] * (1 - first) * second
    nodes = [path for path in reached if path]
    drafts = (
        rows
        for count in range(most)
        for rows in combinations(nodes, count)
        if all(row[:-1] in rows for row in rows if len(row) > 1)
    )
    return max((1 + sum(reached[row] for row in rows)) / cost(len(rows) + 1) for rows in drafts)


@given(trees, st.floats(MIN_REACHED, 0.5), st.floats(0, 2))
@example(LITTLE, 0.1015625, 1.0)  # two rows pay that do not pay alone, three do not
def test_no_tree_is_worth_more(
    given: Mapping[tuple[int, ...], Sequence[float]], slope: float, jump: float
) -> None:
    """Where silence is not as good; the cost jumps in the middle. A row costs what MIN_REACHED of a token is
    worth, at least: rows that are reached less often are not considered."""

    def cost(rows: int) -> float:
        return 1 + slope * (rows - 1) + jump * (rows > 3)

    source = Fixed({path: dict(enumerate(own)) for path, own in given.items()})
    builder = DraftTreeBuilder(source, source.rates(), cost, None, max_rows=5)
    builder.budget.credit = math.inf
    tree = builder.tree([5])
    reached, paths = [1.0], [()]
    for token, parent in list(zip(tree.tokens, tree.parents, strict=True))[1:]:
        first, second = given[paths[parent]]
        reached.append(reached[parent] * (first if token == 0 else (1 - first) * second))
        paths.append((*paths[parent], token))
    best, mine = best_rate(source, cost, most=5), sum(reached) / cost(len(tree))
    assert mine == pytest.approx(best, abs=1e-9) or (mine == 1 and best <= MARGIN + 1e-9)


def test_giving_up_too_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "least_chance", lambda self, rows, margin: 0.5)
    with pytest.raises(AssertionError):
        test_no_tree_is_worth_more()


def test_chances_under_known_noise_are_calibrated() -> None:
    """Tokens picked by log q + g: predicted chances come true, and the best of them beats the best q."""
    dice = np.random.default_rng(0)
    trials, vocabulary = 20_000, 12
    q = dice.dirichlet(np.full(vocabulary, 0.4), trials)
    noise = dice.gumbel(size=(trials, vocabulary))
    picked = (np.log(q) + noise).argmax(1)
    # Of two candidates each; the rest of the vocabulary is not known.
    chance = np.array([[wins(q[i, t], noise[i, t]) for t in (0, 1)] for i in range(trials)])
    came = picked[:, None] == np.arange(2)
    for low in np.arange(0, 1, 0.1):
        inside = (chance >= low) & (chance < low + 0.1)
        assert chance[inside].mean() == pytest.approx(came[inside].mean(), abs=0.04)
    by_chance, by_q = came[np.arange(trials), chance.argmax(1)], came[np.arange(trials), q[:, :2].argmax(1)]
    assert by_chance.mean() > 1.15 * by_q.mean()


def test_noise_that_is_not_heard_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "wins", lambda chance, noise: chance)
    with pytest.raises(AssertionError):
        test_chances_under_known_noise_are_calibrated()


def test_growth_asks_for_the_noise_of_the_right_position() -> None:
    asked: dict[int, set[int]] = {}

    def noise(position: int, tokens: Sequence[int]) -> Sequence[float]:
        assert not asked.get(position, set()) & set(tokens), "asked twice"
        asked.setdefault(position, set()).update(tokens)
        return [4.0 if token == 1 else -4.0 for token in tokens]

    source = Fixed({(): {0: 0.4, 1: 0.4}, (1,): {1: 0.9}})
    builder = DraftTreeBuilder(source, source.rates(), lambda rows: 1 + rows / 50, noise, max_rows=8)
    assert builder.tree([9, 9, 9]).tokens[:3] == (9, 1, 1)
    builder.tree([9, 9, 9])
    assert asked == {3: {0, 1}, 4: {1}} | {p: t for p, t in asked.items() if p > 4 or (p == 4 and t == {1})}


def taken(tree: Tree, picks: Sequence[int]) -> Step:
    """A step that walks a chain; picks: by depth."""
    made = [picks[depth] for depth in tree.depth[: len(picks)]]
    path, in_flight = accept(tree, [*made, *[-1] * (len(tree) - len(made))], [True] * len(tree))
    return Step(tree, lambda: torch.empty(0), made, path, in_flight)


def success_ends_silence() -> list[int]:
    """Rows of 60 steps of a drafter whose guesses, thought unlikely, always come."""
    source = Fixed({(): {1: 0.05}, (1,): {1: 0.9}})
    rates = source.rates()
    builder = DraftTreeBuilder(source, rates, lambda rows: 1 + rows / 10 - 1 / 10, None, max_rows=8)
    rows = []
    for _ in range(60):
        rows.append(len(tree := builder.tree([1])))
        builder.learn(taken(tree, [1, 1, 7]))
    return rows


def test_silence_does_not_end_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = success_ends_silence()
    assert rows[0] == 1
    assert rows[-1] == 3
    keep = DraftTreeBuilder.learn
    monkeypatch.setattr(
        DraftTreeBuilder, "learn", lambda self, step: keep(self, step) if len(step.tree) > 1 else ()
    )
    assert success_ends_silence()[-1] == 1, "without virtual learning"


def lost(steps: int) -> float:
    """Time that a drafter loses which is sure of itself and always wrong, in steps of one row."""
    source = Fixed({(): {1: 0.9}, (1,): {1: 0.9}})
    cost = lambda rows: 1 + rows / 8 - 1 / 8  # noqa: E731
    builder = DraftTreeBuilder(
        source, Sure({("never",): 0.0} | dict.fromkeys(source.rates().counts, 0.9)), cost, None, max_rows=8
    )
    total = 0.0
    for _ in range(steps):
        tree = builder.tree([1])
        builder.learn(taken(tree, [7]))
        total += cost(len(tree)) - 1
    return total


class Sure(AcceptanceStats):
    """Odds that learn nothing."""

    def learn(self, kind: Kind, accepted: bool) -> None:
        pass


def test_what_drafts_lose_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (1, 10, 100):
        assert 0 < lost(steps) <= acceptance.CREDIT + steps * acceptance.CREDIT_PER_STEP
    monkeypatch.setattr(Budget, "affords", lambda self, rows: True)
    assert lost(100) > 10


def test_odds_follow_what_happens() -> None:
    dice = random.Random(0)
    odds = AcceptanceStats({("kind",): 0.9})
    for _ in range(300):
        odds.learn(("kind",), dice.random() < 0.3)
    assert odds["kind",] == pytest.approx(0.3, abs=0.15)
    for _ in range(300):
        odds.learn(("kind",), True)
    assert odds["kind",] > 0.95
    assert odds.counts["kind",][1] <= acceptance.MEMORY
