"""Jacobi decoding in several blocks against a plain re-telling of what was published (Jacobi Forcing)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from selfdraft import DraftContext, Engine, SamplingParams, Step, Tree
from selfdraft.drafting import blocks, create
from selfdraft.drafting.blocks import BlockDrafter
from selfdraft.drafting.jacobi import Jacobi
from selfdraft.drafting.plain import Plain
from selfdraft.engine.scheduler import Limits
from selfdraft.engine.step import accept
from selfdraft.errors import InvalidOption
from selfdraft.models.transformers import TransformersModel

import faults
from faults import Patch
from runs import greedy, random_prompt, run, sampled

PROMPT = [3, 1, 4, 1, 5]
LENGTH = 300


def pick(text: Sequence[int]) -> int:
    """A model of few habits, so that n-grams come again and draft tokens come true before their time."""
    return random.Random(f"{text[-2:]} {len(text) // 40}").randrange(9)


def decoded(method: Jacobi) -> tuple[list[int], list[int]]:
    """A text, and how many tokens each pass emitted."""
    drafter = method.drafter(DraftContext(PROMPT))
    text, runs = list(PROMPT), []
    while len(text) < LENGTH:
        tree = drafter.propose(text)
        lines: list[list[int]] = [[]]
        for token, parent in list(zip(tree.tokens, tree.parents, strict=True))[1:]:
            lines.append([*lines[parent], token])
        picks = [pick([*text, *line]) for line in lines]
        path, in_flight = accept(tree, picks, [True] * len(tree))
        step = Step(tree, lambda: torch.empty(0), picks, path, in_flight)
        drafter.observe(step)
        text += step.emitted
        runs.append(len(path))
    return text, runs


def retold(n: int, most: int, spawn: float, recycled: int) -> tuple[list[int], list[int]]:
    """The published way: blocks as lists of draft tokens, candidates run one by one, the best one taken."""
    dice, text, runs = random.Random(0), list(PROMPT), []
    flight: list[list[int]] = []  # of each block the tokens that are run
    tails: list[list[int]] = []
    while len(text) < LENGTH:
        if not flight:
            flight, done = [[text[-1], *dice.choices(text, k=n - 1)]], 0
        elif len(flight) < most and done >= spawn * n:
            flight.append((flight[0] + dice.choices(text, k=n - len(flight[0])))[:n])
        own = [token for block in flight for token in block]
        lines = [own]
        for tail in tails:
            if text[-1] in tail:
                lines.append(([text[-1], *tail[tail.index(text[-1]) + 1 :]])[: len(flight[0])])
        after = [[pick([*text, *line[1 : i + 1]]) for i in range(len(line))] for line in lines]
        rights = [
            1 + [*(a == b for a, b in zip(line[1:], then, strict=False)), False].index(False)
            for line, then in zip(lines, after, strict=True)
        ]
        kept = max(rights)
        best = [i for i, right in enumerate(rights) if right == kept]
        whole = [i for i in best if not any(own_part(lines[i], lines[j]) for j in best if j != i)]
        line, then = lines[(whole or best)[0]], after[(whole or best)[0]]
        line, then = line + own[len(line) :], then + after[0][len(then) :]
        tails = [flight[0][1:], *tails][:recycled]
        text += then[:kept]
        runs.append(kept)
        start = len(own) - len(flight[-1])
        same = start
        while same < len(own) and (same == 0 or line[same] == then[same - 1]):
            same += 1
        done = n - len(flight[-1]) + same - start
        new = [then[i - 1] for i in range(kept, len(own))]
        sizes = [len(block) for block in flight]
        while sizes and kept >= sizes[0]:
            kept -= sizes.pop(0)
        flight = []
        for i, size in enumerate(sizes):
            size -= kept if i == 0 else 0
            flight.append(new[:size])
            new = new[size:]
    return text, runs


def own_part(short: Sequence[int], long: Sequence[int]) -> bool:
    return len(short) < len(long) and list(long[: len(short)]) == list(short)


CASES = [(6, 1, 0.85, 0), (6, 2, 0.5, 0), (12, 2, 0.85, 0), (5, 3, 0.4, 0), (8, 1, 0.85, 4), (8, 2, 0.6, 4)]


def as_published() -> None:
    for n, most, spawn, recycled in CASES:
        options: dict[str, Any] = {"spawn": spawn} if most > 1 else {}
        method = Jacobi(n, faithful=True, blocks=most, recycled=recycled, **options)
        assert decoded(method) == retold(n, most, spawn, recycled), method


def test_blocks_converge_as_published() -> None:
    as_published()
    passes = [len(retold(*case)[1]) for case in ((8, 1, 0.85, 0), (8, 2, 0.6, 0), (8, 2, 0.6, 4))]
    assert passes == sorted(passes, reverse=True), "each of them saves passes"
    assert passes[0] > passes[2]


def never_spawned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockDrafter, "_settled", lambda self, step, line: 0)


def emitted_alone_is_settled(patch: pytest.MonkeyPatch) -> None:
    """Of a block that is not the first nothing counts as settled."""
    settled = BlockDrafter._settled
    patch.setattr(
        BlockDrafter,
        "_settled",
        lambda self, step, line: settled(self, step, line) if len(self.left) == 1 else 0,
    )


def branches_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(blocks, "_with_branch", lambda tree, tokens: tree)


def branch_below_equal_siblings(patch: pytest.MonkeyPatch) -> None:
    """A branch does not share the rows that are there already, so the walk does not find it."""
    patch.setattr(blocks, "_with_branch", lambda tree, tokens: tree.hang(0, tokens) if tokens else tree)


def branch_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The new draft tokens are those of the blocks' own rows, also where the walk took a branch."""
    patch.setattr(blocks, "_line", lambda step: list(range(max(step.tree.depth) + 1)))


def block_does_not_shrink(patch: pytest.MonkeyPatch) -> None:
    observe = BlockDrafter.observe

    def whole(self: BlockDrafter, step: Step) -> None:
        observe(self, step)
        self.left = [self.block for _ in self.left]

    patch.setattr(BlockDrafter, "observe", whole)


@pytest.mark.parametrize(
    "fault",
    [
        never_spawned,
        emitted_alone_is_settled,
        branches_left_out,
        branch_below_equal_siblings,
        branch_forgotten,
        block_does_not_shrink,
    ],
)
def test_other_blocks_are_seen(fault: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        as_published()


def cut_like_retold() -> None:
    """A block of which each pass runs some rows only, against a plain re-telling: a row takes the pick after
    the row before it where that ran, and stays as it was elsewhere. Two blocks keep their length alike."""
    for most in (1, 2):
        dice = random.Random(most)
        options: dict[str, Any] = {"blocks": 2, "spawn": 0.2} if most > 1 else {}
        drafter = Jacobi(6, faithful=True, **options).drafter(DraftContext(PROMPT))
        assert isinstance(drafter, BlockDrafter)
        text, cut, widest = list(PROMPT), 0, 0
        expected: list[int] = []
        while len(text) < LENGTH:
            tree = drafter.propose(text)
            widest = max(widest, len(tree))
            assert len(tree) == sum(drafter.left)
            assert list(tree.tokens[: len(expected)]) == expected
            ran = tree.prune(dice.randrange(len(tree)))
            cut += len(ran) < len(tree)
            picks = [pick([*text, *ran.tokens[1 : row + 1]]) for row in range(len(ran))]
            path, in_flight = accept(ran, picks, [True] * len(ran))
            drafter.observe(Step(ran, lambda: torch.empty(0), picks, path, in_flight))
            expected = [tree.tokens[0], *picks, *tree.tokens[len(ran) + 1 :]][: len(tree)][len(path) :]
            text += [picks[row] for row in path]
        assert cut > 20
        assert widest > 6 * (most - 1)


def test_blocks_keep_their_length_where_rows_are_left_out() -> None:
    cut_like_retold()


def rows_that_did_not_run_are_lost(patch: pytest.MonkeyPatch) -> None:
    observe = BlockDrafter.observe

    def wrong(self: BlockDrafter, step: Step) -> None:
        self.drafts = self.drafts[: len(step.tree) - 1]
        observe(self, step)

    patch.setattr(BlockDrafter, "observe", wrong)


def test_lost_rows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_that_did_not_run_are_lost(monkeypatch)
    with pytest.raises(AssertionError):
        cut_like_retold()


def test_text_that_a_grammar_forces_does_not_lengthen_a_block() -> None:
    drafter = BlockDrafter(4, random.Random(0))
    tree = drafter.propose(PROMPT).prune(0).hang(0, [5, 6, 7, 8, 9])
    drafter.observe(Step(tree, lambda: torch.empty(0), [5, 6, 1, 2, 3, 4], [0, 1], []))
    assert drafter.propose([*PROMPT, 5, 6]) == Tree.chain([6, 1])


def test_a_line_is_that_of_the_walk_and_then_of_the_blocks() -> None:
    """Also where a grammar left some of the blocks' rows out, so that a branch is longer than they are."""

    def line(tree: Tree, path: Sequence[int]) -> Sequence[int]:
        return blocks._line(Step(tree, lambda: torch.empty(0), [0] * len(tree), path, []))

    cut = Tree((1, 2, 7, 8, 9, 10), (-1, 0, 0, 2, 3, 4))
    assert line(cut, [0]) == [0, 1]
    assert line(cut, [0, 1]) == [0, 1]
    assert line(cut, [0, 2]) == [0, 2, 3, 4, 5]
    whole = Tree.chain([1, 2, 3, 4]).hang(0, [7, 8])
    assert line(whole, [0]) == [0, 1, 2, 3]
    assert line(whole, [0, 4]) == [0, 4, 5, 3]


def drafted_is_plain(model: TransformersModel, params: SamplingParams) -> None:
    """Alone and in a batch, with rows that were accepted."""
    method = Jacobi(6, faithful=True, blocks=2, spawn=0.3, recycled=4)
    prompts = [random_prompt(12, seed) for seed in range(3)]
    plain = [run(model, Plain(), prompt, params).emitted for prompt in prompts]
    alone = [run(model, method, prompt, params) for prompt in prompts]
    assert [request.emitted for request in alone] == plain
    assert max(request.rows / len(request.runs) for request in alone) > 6, "a second block was spawned"
    assert sum(len(request.runs) for request in alone) < sum(map(len, plain))
    engine = Engine(model)
    batch = [engine.submit(prompt, method, params) for prompt in prompts]
    while engine.requests:
        engine.step()
    assert [request.emitted for request in batch] == plain
    engine = Engine(model, Limits(max_rows=9))
    short = [engine.submit(prompt, method, params) for prompt in prompts]
    while engine.requests:
        engine.step()
    assert [request.emitted for request in short] == plain


def unverified(patch: pytest.MonkeyPatch) -> None:
    """Where there is a second block the walk takes one draft token more than came true."""

    def wrong(tree: Tree, picks: Sequence[int], done: Sequence[bool]) -> tuple[list[int], list[int]]:
        path, in_flight = accept(tree, picks, done)
        more = tree.below(path[-1])[1:2] if len(tree) > 6 else []
        return [*path, *more], in_flight

    faults.replace_function(patch, accept, wrong)


@pytest.mark.parametrize("params", [greedy(), sampled(0.8, seed=2)], ids=["greedy", "sampled"])
def test_drafted_is_plain(
    exact: TransformersModel, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted_is_plain(exact, params)
    unverified(monkeypatch)
    with pytest.raises(AssertionError):
        drafted_is_plain(exact, params)


@pytest.mark.parametrize(
    ("options", "wish"),
    [
        ({"blocks": 0, "faithful": True}, "blocks"),
        ({"blocks": 2}, "faithful=true"),
        ({"recycled": 4}, "faithful=true"),
        ({"recycled": -1, "faithful": True}, "recycled"),
        ({"spawn": 0, "blocks": 2, "faithful": True}, "spawn"),
        ({"spawn": 1.1, "blocks": 2, "faithful": True}, "spawn"),
        ({"spawn": 0.5, "faithful": True}, "blocks=2"),
        ({"block": 600}, "block=600, .* make 600 rows .* limit is 512"),
        ({"block": 513, "faithful": True}, "make 513 rows"),
        ({"block": 128, "faithful": True, "blocks": 4, "recycled": 4}, "make 1020 rows"),
        ({"faithful": True, "blocks": 33}, "block=16, blocks=33 .* make 528 rows"),
    ],
)
def test_options_that_cannot_be_honoured(options: dict[str, Any], wish: str) -> None:
    with pytest.raises(InvalidOption, match=wish):
        create("jacobi", options)


def test_options_by_name() -> None:
    given = {"faithful": "true", "blocks": "2", "spawn": "0.5", "recycled": "4"}
    assert create("jacobi", given) == Jacobi(faithful=True, blocks=2, spawn=0.5, recycled=4)
    for most in (Jacobi(512), Jacobi(512, faithful=True), Jacobi(128, faithful=True, blocks=4)):
        assert most.drafter(DraftContext(PROMPT))
