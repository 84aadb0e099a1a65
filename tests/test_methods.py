"""The methods against plain re-tellings of what was published."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdraft import LLM, DraftContext, Drafter, Engine, Method, SamplingParams, Step, Tree, hook
from selfdraft.drafting import available, create, resolve
from selfdraft.drafting.acceptance import AcceptanceStats, Budget
from selfdraft.drafting.auto import Auto
from selfdraft.drafting.jacobi import Jacobi, JacobiDrafter, Picks, Point
from selfdraft.drafting.llma import Llma
from selfdraft.drafting.plain import Plain
from selfdraft.engine.engine import _group
from selfdraft.engine.step import accept
from selfdraft.errors import InvalidOption, UnknownMethod
from selfdraft.models.transformers import TransformersModel

from runs import greedy, random_prompt, run, sampled

ids = st.lists(st.integers(0, 3), max_size=14)


def published_llma(
    references: Sequence[Sequence[int]], generated: Sequence[int], n: int, k: int
) -> list[int]:
    """Longest suffix first, first reference first, first occurrence first."""
    for length in range(min(5, len(generated)), n - 1, -1):
        for reference in references:
            for start in range(len(reference) - length + 1):
                if list(reference[start : start + length]) == list(generated[-length:]):
                    return list(reference[start + length : start + length + k - 1])
    return []


@given(st.lists(ids, min_size=1, max_size=3), ids, st.integers(1, 3), st.integers(1, 8))
def test_llma_copies_as_published(references: list[list[int]], generated: list[int], n: int, k: int) -> None:
    prompt = [9, 9]
    drafter = Llma(trigger=n, block=k, faithful=True).drafter(DraftContext(prompt, references))
    tree = drafter.propose([*prompt, *generated])
    assert list(tree.tokens[1:]) == published_llma(references, generated, n, k)


def test_llma_takes_the_prompt_where_there_is_no_reference() -> None:
    drafter = Llma(block=3, faithful=True).drafter(DraftContext([4, 5, 6, 7]))
    assert drafter.propose([4, 5, 6, 7]).tokens == (7,), "the prompt's own tail does not trigger"
    assert drafter.propose([4, 5, 6, 7, 5]).tokens == (5, 6, 7)


@pytest.mark.parametrize("params", [greedy(), sampled(0.8, seed=2)])
def test_jacobi_converges_as_published(exact: TransformersModel, params: SamplingParams) -> None:
    """The published block, iterated by plain calls of `pick`, needs as many passes and settles as many
    tokens in each."""
    prompt, block = random_prompt(12, seed=6), 5
    answer = run(exact, Plain(), prompt, params).emitted
    request = run(exact, Jacobi(block, faithful=True), prompt, params)

    def pick(text: Sequence[int]) -> int:
        return run(exact, Plain(), [*prompt, *text], replace(params, max_new_tokens=1)).emitted[0]

    dice, text, runs = random.Random(params.seed), [], []
    while len(text) < 20:
        guess = [None, *dice.choices([*prompt, *text], k=block - 1)]
        while guess:
            after = [pick([*text, *guess[1 : i + 1]]) for i in range(len(guess))]
            settled = 1
            while settled < len(guess) and guess[settled] == after[settled - 1]:
                settled += 1
            text += after[:settled]
            runs.append(settled)
            guess = [None, *after[settled:-1]] if settled < len(guess) else []
    assert text == answer[: len(text)]
    assert request.runs[: len(runs)] == runs


def cost(rows: int) -> float:
    """As pico's here: pieces of 32 rows."""
    return 1 + 0.019 * (rows - 1) + 0.5 * ((rows - 1) // 32)


def replay(
    drafter: Drafter,
    prompt: Sequence[int],
    answer: Sequence[int],
    right: float = 0.0,
    mask_scores: Callable[[int], torch.Tensor] | None = None,
) -> Replay:
    """A drafter against a model that gives this answer, and off its path the right token with a
    probability, as weights tuned for consistency do. mask_scores: of so many mask tokens under a row; their
    ids are twice the vocabulary's size and more."""
    dice = random.Random(0)
    text, out = list(prompt), Replay()
    while len(text) < len(prompt) + len(answer):
        todo = answer[len(text) - len(prompt) :]
        tree = drafter.propose(text).prune(len(todo) - 1)
        on = [True]
        for token, parent, depth in list(zip(tree.tokens, tree.parents, tree.depth, strict=True))[1:]:
            on.append(on[parent] and token == todo[depth - 1])
        count = tree.ordinary(2 * VOCABULARY)
        guessed = [on[row] or dice.random() < right for row in range(count)]
        picks = [todo[d] if good else VOCABULARY for d, good in zip(tree.depth, guessed, strict=False)]
        path, in_flight = accept(tree, picks, [True] * len(tree))
        step = Step(tree, lambda: torch.empty(0), picks, path, in_flight)
        masks = len(_group(step, count))
        if mask_scores is not None and masks:
            step = replace(step, mask_scores=mask_scores(masks))
        drafter.observe(step)
        text += step.emitted
        out.runs.append(len(path))
        out.rows.append(len(tree))
    assert text == [*prompt, *answer]
    return out


@dataclass
class Replay:
    runs: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens per time of a plain step."""
        return sum(self.runs) / sum(cost(rows) for rows in self.rows)


def noise_text(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=length)


VOCABULARY = 1000


def test_llma_copies_more_the_longer_the_match_and_the_better_it_went() -> None:
    reference, prompt = noise_text(400, 0), [VOCABULARY, VOCABULARY + 1]

    def rows(learned: Sequence[int], match: int) -> int:
        """After a text that drafts were tried on, and a match of that length."""
        drafter = Llma().drafter(DraftContext(prompt, [reference], cost=cost))
        replay(drafter, prompt, learned)
        drafter.builder.budget.credit = math.inf  # type: ignore[attr-defined]
        return len(drafter.propose([*prompt, *learned, VOCABULARY + 2, *reference[50 : 50 + match]]))

    good, bad = (
        reference[100:300],
        [token for at in range(0, 400, 9) for token in (reference[at], VOCABULARY + 3)],
    )
    assert rows([], 0) == 1
    assert rows([], 1) < rows([], 3) <= rows([], 20)
    assert rows(bad, 1) < rows([], 1) <= rows(good, 1)
    drafter = Llma().drafter(DraftContext(prompt, [reference], cost=cost))
    assert replay(drafter, prompt, good).speed > 8


def test_llma_is_silent_in_vain() -> None:
    """Every token has occurred, and never goes on alike: the published form drafts at each step."""
    few = random.Random(1).choices(range(40), k=700)
    context = DraftContext(few[:400], cost=cost)
    assert replay(Llma().drafter(context), few[:400], few[400:]).speed > 0.98
    assert replay(Llma(faithful=True).drafter(context), few[:400], few[400:]).speed < 0.9


def test_llma_merges_places_into_a_tree() -> None:
    text = [5, 6, 7, 8, 1, 5, 6, 9, 8, 2]
    tree = Llma().drafter(DraftContext([3], [text, text])).propose([3, 5, 6])
    assert {tree.child(0, 7), tree.child(0, 9)} < set(range(1, len(tree)))
    assert tree.child(tree.child(0, 7) or 0, 8)


def test_llma_takes_the_candidate_that_the_noise_favours() -> None:
    reference = [5, 6, 7, 1, 5, 6, 8, 1, 5, 6, 7, 2]

    def noise(position: int, tokens: Sequence[int]) -> Sequence[float]:
        assert position >= 3
        return [3.0 if token == 8 else 0.0 for token in tokens]

    greedy = Llma().drafter(DraftContext([3], [reference], cost=cost))
    sampled = Llma().drafter(DraftContext([3], [reference], temperature=1.0, noise=noise, cost=cost))
    assert greedy.propose([3, 5, 6]).tokens[1:2] in ((7,), ())
    assert sampled.propose([3, 5, 6]).tokens[1] == 8


def test_jacobi_does_not_lose_on_ordinary_weights() -> None:
    text = noise_text(600, 2)
    context = DraftContext(text[:100], cost=cost)
    assert replay(Jacobi().drafter(context), text[:100], text[100:], right=0.02).speed > 0.96
    assert replay(Jacobi(faithful=True).drafter(context), text[:100], text[100:], right=0.02).speed < 0.92


@pytest.mark.parametrize(("right", "rows"), [(0.5, 4), (0.85, 12), (0.97, 18)])
def test_jacobi_opens_its_window_as_far_as_guesses_come_true(right: float, rows: int) -> None:
    text = noise_text(600, 3)
    context = DraftContext(text[:100], cost=cost)
    mine = replay(Jacobi().drafter(context), text[:100], text[100:], right)
    published = replay(Jacobi(faithful=True).drafter(context), text[:100], text[100:], right)
    assert statistics.median(mine.rows) >= rows
    assert mine.speed > 0.95 * published.speed if right < 0.9 else mine.speed > 1.1 * published.speed


def test_jacobi_refills_its_window_from_discarded_tails() -> None:
    """What the model picked after two tokens off the text is a candidate where the two come again."""
    text = list(range(60))
    drafter = JacobiDrafter(8, DraftContext(text))
    first = drafter.propose(text)
    assert len(first) == 8, "rows cost nothing here"
    picks = [100 + row for row in range(8)]
    drafter.observe(Step(first, torch.empty(0), picks, [0], []))
    text.append(picks[0])
    for token in first.tokens[6:]:
        tree = drafter.propose(text)
        drafter.observe(Step(tree, torch.empty(0), [token] * len(tree), [0], []))
        text.append(token)
    assert drafter.propose(text).child(0, picks[7]) is not None


def no_row_without_a_pick_is_drafted() -> None:
    """Row 1 is not finite, so it has no pick: -1 is no token."""
    picks = Picks([0.5] * 7)
    picks.read([1, 1])
    picks.remember(Step(Tree.chain([1, 2, 3]), lambda: torch.empty(0), [5, -1, 7], [0], []))
    found = {token for at in (3, 4) for one in picks.candidates(Point(at, (1, 2))) for token in one.shares}
    assert (found, picks.pool) == ({7}, {(2, 3): 7})


def test_a_row_without_a_pick_is_not_drafted() -> None:
    no_row_without_a_pick_is_drafted()


def test_a_pick_that_is_none_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    remember = Picks.remember

    def as_any_token(self: Picks, step: Step) -> None:
        remember(self, replace(step, picks=[abs(pick) for pick in step.picks]))

    monkeypatch.setattr(Picks, "remember", as_any_token)
    with pytest.raises(AssertionError):
        no_row_without_a_pick_is_drafted()


def test_a_pool_that_stays_empty_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    remember = Picks.remember

    def forget(self: Picks, step: Step) -> None:
        remember(self, step)
        self.pool.clear()

    monkeypatch.setattr(Picks, "remember", forget)
    with pytest.raises(AssertionError):
        test_jacobi_refills_its_window_from_discarded_tails()


def test_a_window_that_learns_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AcceptanceStats, "learn", lambda self, kind, accepted: None)
    with pytest.raises(AssertionError):
        test_jacobi_opens_its_window_as_far_as_guesses_come_true(0.97, 18)
    monkeypatch.setattr(Budget, "affords", lambda self, rows: True)
    with pytest.raises(AssertionError):
        test_llma_is_silent_in_vain()


@pytest.mark.parametrize("params", [greedy(), sampled(0.8, seed=2)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "method", [Llma(), Llma(faithful=True), Jacobi(), Jacobi(faithful=True), Auto()], ids=repr
)
def test_drafted_is_plain_alone_and_in_a_batch(
    exact: TransformersModel, method: Method, params: SamplingParams
) -> None:
    prompts = [random_prompt(12, seed) for seed in range(3)]
    plain = [run(exact, Plain(), prompt, params).emitted for prompt in prompts]
    given = [plain[0][:20], plain[1][5:]]
    alone = [run(exact, method, prompt, params, references=given) for prompt in prompts]
    assert [request.emitted for request in alone] == plain
    engine = Engine(exact)
    batch = [engine.submit(prompt, method, params, given) for prompt in prompts]
    while engine.requests:
        engine.step()
    assert [request.emitted for request in batch] == plain
    if isinstance(method, Llma):
        assert len(alone[0].runs) < 40


def test_names_and_options() -> None:
    assert {"plain", "llma", "jacobi"} <= set(available())
    assert create("llma", {"block": "7"}) == Llma(block=7)
    with pytest.raises(UnknownMethod, match=r"medusa.*jacobi, llma, plain"):
        create("medusa")
    for options in ({"block": 0}, {"block": "many"}, {"window": 3}):
        with pytest.raises(InvalidOption, match="llma"):
            create("llma", options)


@pytest.mark.parametrize("options", ["block=3", ["block=3"], [("block", 3)], 3])
def test_options_that_are_no_mapping(options: Any) -> None:
    for ask in (lambda: resolve("llma", options), lambda: hook("llma", options=options)):
        with pytest.raises(InvalidOption, match="mapping"):
            ask()


@pytest.mark.parametrize("method", [Llma, None, 3, object(), ["llma"]])
def test_what_is_no_method_is_named_at_once(method: Any) -> None:
    """Before the model is looked for."""
    for ask in (lambda: resolve(method), lambda: LLM("no/such/model", method), lambda: hook(method)):
        with pytest.raises(InvalidOption, match=r"give a name \(.*llma.*\) or an object"):
            ask()


def test_a_method_and_its_name() -> None:
    assert resolve("llma", {"block": 3}) == (Llma(block=3), "llma")
    assert resolve(Llma(block=3)) == (Llma(block=3), "llma")
    with pytest.raises(InvalidOption, match="has its own"):
        resolve(Llma(), {"block": 3})
