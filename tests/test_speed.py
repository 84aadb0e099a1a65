"""Tokens at several depths: whatever is in in_flight, the text is that of the full depth."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import selfdraft
from selfdraft import DraftContext, Engine, Method, Request, SamplingParams, Step, Tree
from selfdraft.drafting import create
from selfdraft.drafting.method import Loops
from selfdraft.drafting.plain import Plain
from selfdraft.drafting.speed import CHOSEN, Depth, Speed, SpeedDrafter
from selfdraft.engine.request import FinishReason
from selfdraft.engine.tree import matches
from selfdraft.errors import InvalidOption, InvalidTree, ModelUnsupported
from selfdraft.llm import LLM
from selfdraft.models import numerics
from selfdraft.models.adapters.adapter import AdapterConfig
from selfdraft.models.loading import drive
from selfdraft.models.looped import lanes, stages
from selfdraft.models.looped.lanes import StageLane, StageLanes
from selfdraft.models.transformers import TransformersModel
from selfdraft.train.student import fresh
from selfdraft.verify import verify
from selfdraft.verify.adversaries import Oracle, Restless

from looping import agreeing, tiny_looped
from runs import greedy, random_prompt, run, sampled

EACH = [
    Speed(),
    Speed(spawn=1),
    Speed(spawn=2),
    Speed(spawn=3),
    Speed(spawn=1, revise=False),
    Speed(spawn=1, second=True),
    Speed(spawn=1, gate=0.3),
    Speed(spawn=1, second=True, block=4),
]
TEMPERATURES = (0.0, 0.8)


@pytest.fixture(scope="module")
def looped() -> TransformersModel:
    return drive(tiny_looped(torch.bfloat16))


@pytest.fixture(scope="module")
def looped64() -> TransformersModel:
    return drive(tiny_looped(torch.float64))


@pytest.fixture(scope="module")
def spawning(tokenizer: Any) -> LLM:
    return LLM(tiny_looped(torch.bfloat16), Speed(spawn=1), tokenizer=tokenizer)


def together(
    model: TransformersModel, asked: Sequence[tuple[Method, Sequence[int], SamplingParams]]
) -> list[Request]:
    engine = Engine(model)
    requests = [engine.submit(prompt, method, params) for method, prompt, params in asked]
    while engine.requests:
        engine.step()
    return requests


Asked = Sequence[tuple[Sequence[int], SamplingParams]]


@pytest.fixture(scope="module")
def eight(looped: TransformersModel) -> tuple[Asked, Sequence[Sequence[int]]]:
    """What is asked with eight seeds, greedy and sampled in turn, and plain decoding's answers."""
    asked = [
        (random_prompt(1 + 7 * seed, seed), sampled(TEMPERATURES[seed % 2], seed, 14)) for seed in range(8)
    ]
    return asked, [one.emitted for one in together(looped, [(Plain(), *one) for one in asked])]


@pytest.mark.parametrize("method", EACH, ids=str)
def test_speed_is_plain(
    looped: TransformersModel, method: Method, eight: tuple[Asked, Sequence[Sequence[int]]]
) -> None:
    """Alone and four at a time, with eight seeds."""
    asked, plain = eight
    alone = [run(looped, method, *one).emitted for one in asked]
    assert alone == plain
    for i in (0, 4):
        four = together(looped, [(method, *one) for one in asked[i : i + 4]])
        assert [request.emitted for request in four] == plain[i : i + 4]


@pytest.mark.parametrize(
    ("dtype", "loops", "ouro"),
    [
        (torch.bfloat16, 2, False),
        (torch.bfloat16, 4, True),
        (torch.float32, 2, True),
        (torch.float32, 4, False),
        (torch.float64, 2, False),
        (torch.float64, 4, True),
    ],
)
def test_speed_is_plain_for_every_kind(dtype: torch.dtype, loops: int, ouro: bool) -> None:
    """Each pair of a dtype, a number of passes and a kind."""
    model = drive(tiny_looped(dtype, loops=loops, ouro=ouro))
    for temperature in TEMPERATURES:
        prompt, params = random_prompt(20, 3), sampled(temperature, 5, 10)
        plain = run(model, Plain(), prompt, params).emitted
        for spawn in range(1, loops + 1):
            assert run(model, Speed(spawn=spawn), prompt, params).emitted == plain
        assert run(model, Restless(plain), prompt, params).emitted == plain


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_mixed_batch_is_its_requests_alone(looped: TransformersModel, temperature: float) -> None:
    """Whole trees of other methods stay in in_flight beside early drafts, and are done all at once."""
    oracle = Oracle(run(looped, Plain(), random_prompt(9, 7), sampled(temperature, 7, 16)).emitted)
    methods: list[Method] = [Speed(spawn=1), create("jacobi"), Plain(), create("llma"), oracle]
    asked = [
        (method, random_prompt(9, 3 + i), sampled(temperature, 3 + i, 16)) for i, method in enumerate(methods)
    ]
    alone = [run(looped, *one) for one in asked]
    mixed = together(looped, asked)
    assert [request.emitted for request in mixed] == [request.emitted for request in alone]
    plain = run(looped, Plain(), *asked[2][1:])
    assert (mixed[2].forwards, mixed[2].runs) == (plain.forwards, plain.runs), "stages are parts of a forward"


def test_requests_join_and_leave_while_others_are_in_flight(looped: TransformersModel) -> None:
    engine = Engine(looped)
    first = engine.submit(random_prompt(30, 1), Speed(spawn=1), greedy(60))
    second = engine.submit(random_prompt(12, 2), Speed(spawn=1), greedy(9))
    for _ in range(20):
        engine.step()
    third = engine.submit(random_prompt(30, 1)[:25], Speed(spawn=1), greedy(20))
    while not third.finish_reason:
        engine.step()
    told = [*third.prompt, *third.emitted, 9]
    fourth = engine.submit(told, Speed(spawn=1), greedy(20))
    while engine.requests:
        engine.step()
    for request in (first, second, third, fourth):
        params = greedy(len(request.emitted))
        assert request.emitted == run(looped, Plain(), request.prompt, params).emitted
    assert third.reused == 24
    assert fourth.reused >= 25, "of the first, which is in flight still"


@given(seed=st.integers(0, 2**32), temperature=st.sampled_from(TEMPERATURES), length=st.integers(1, 24))
@settings(max_examples=10, deadline=None)
def test_no_drafter_changes_a_text(
    looped: TransformersModel, seed: int, temperature: float, length: int
) -> None:
    prompt, params = random_prompt(length, seed), sampled(temperature, seed, 14)
    plain = run(looped, Plain(), prompt, params).emitted
    for answer in ((), plain):
        assert run(looped, Restless(answer), prompt, params).emitted == plain
    asked = [(Restless(plain), prompt, params), (Speed(spawn=1), prompt, params)]
    assert [request.emitted for request in together(looped, asked)] == [plain, plain]


def by_index(patch: pytest.MonkeyPatch) -> None:
    """Rows in in_flight are taken for what stands at their place now (the prototype's fault)."""
    patch.setattr(lanes, "matches", lambda tree, held: {i: i for i in range(min(len(tree), len(held)))})


def by_token(patch: pytest.MonkeyPatch) -> None:
    """Rows in in_flight are compared by their own token alone."""

    def same(tree: Tree, held: Tree) -> dict[int, int]:
        return {
            row: held.tokens.index(token) for row, token in enumerate(tree.tokens) if token in held.tokens
        }

    patch.setattr(lanes, "matches", same)


def not_moved(patch: pytest.MonkeyPatch) -> None:
    """Keys and values of rows in in_flight stay where they were when the rows get another order."""
    patch.setattr(StageLanes, "rearrange", lambda *_: None)


def not_kept(patch: pytest.MonkeyPatch) -> None:
    """Of what is kept only the accepted rows are moved."""
    move = StageLanes.move
    patch.setattr(StageLanes, "move", lambda self, lane, rows: move(self, lane, rows[:1]))


def wrong_pass(patch: pytest.MonkeyPatch) -> None:
    """All rows read and write the keys and values of the first pass."""
    stage = StageLanes.stage

    def first(self: StageLanes, sheets: Sequence[int], slots: torch.Tensor) -> Any:
        return stage(self, [sheet - sheet % self.loops for sheet in sheets], slots)

    patch.setattr(StageLanes, "stage", first)


def early_commit(patch: pytest.MonkeyPatch) -> None:
    """A row is done one pass before the last."""
    forward = stages.StagedModel.forward

    def hasty(self: Any, trees: Any, caches: Any, passes: int | None = None, _: Any = None) -> Any:
        rows = forward(self, trees, caches, passes)
        if passes is not None:
            held = [[made >= self.loops.count - 1 for made in cache.in_flight.passes] for cache in caches]
            rows = type(rows)(rows.hidden, rows.start, held)
        return rows

    patch.setattr(stages.StagedModel, "forward", hasty)


FEW = dict.fromkeys(range(5, 11), 12.0)  # so that tokens come back, at other places
AGAIN = [(random_prompt(12, seed), sampled(0.8, seed, 24, logit_bias=FEW)) for seed in range(4)]


@pytest.fixture(scope="module")
def again(looped: TransformersModel) -> Sequence[Sequence[int]]:
    """Plain decoding's answers to those, which are drafted right without a fault."""
    plain = [run(looped, Plain(), *one).emitted for one in AGAIN]
    assert restless_is(looped, plain)
    return plain


def restless_is(looped: TransformersModel, plain: Sequence[Sequence[int]]) -> bool:
    pairs = zip(AGAIN, plain, strict=True)
    return all(run(looped, Restless(text), *one).emitted == text for one, text in pairs)


@pytest.mark.parametrize("fault", [by_index, by_token, not_moved, not_kept, wrong_pass, early_commit])
def test_each_fault_changes_a_text(
    looped: TransformersModel, again: Sequence[Sequence[int]], fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert not restless_is(looped, again)


def test_the_probe_sees_stages_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_pass(monkeypatch)
    with pytest.raises(ModelUnsupported, match="run by stages"):
        drive(tiny_looped(torch.float32), "fast")


@pytest.mark.parametrize("rows", numerics.RANGES, ids=str)
def test_calls_of_a_stage_keep_within_the_range_of_rows(rows: numerics.RowRange) -> None:
    model = copy.copy(drive(tiny_looped(torch.float64)))
    assert isinstance(model, stages.StagedModel)
    model.rows = rows
    for loops in (2, 3, 6, 40):
        for requests in range(1, 14):
            spans = model._calls(requests * loops)
            assert [at for span in spans for at in range(*span)] == list(range(requests * loops))
            for first, last in spans:
                for start, stop in rows.pieces(2, last - first):
                    assert rows.least <= (stop - start) * (last - first) <= rows.most


@pytest.mark.parametrize("rows", [numerics.RowRange(8, 8), numerics.RowRange(4, 16)], ids=str)
def test_more_sheets_than_a_call_may_have(looped64: TransformersModel, rows: numerics.RowRange) -> None:
    narrow = copy.copy(looped64)
    narrow.rows = rows
    asked = [(Restless(), random_prompt(9, seed), sampled(0.8, seed, 12)) for seed in range(7)]
    plain = [run(looped64, Plain(), *one[1:]).emitted for one in asked]
    assert [request.emitted for request in together(narrow, asked)] == plain


class Deaf:
    """Raises once when it is told of a step; requests behind it in the list do not hear of theirs either."""

    early = True

    def __init__(self) -> None:
        self.told = 0

    def drafter(self, context: DraftContext) -> Deaf:
        return self

    def propose(self, tokens: Sequence[int]) -> Tree:
        return Tree.chain(tokens[-1:])

    def observe(self, step: Step) -> None:
        self.told += 1
        if self.told == 8:
            raise KeyError("once")


def test_a_stage_that_was_not_heard_of_costs_time_only(looped: TransformersModel) -> None:
    engine = Engine(looped)
    deaf = Deaf()
    engine.submit(random_prompt(5, 1), deaf, greedy(20))
    request = engine.submit(random_prompt(9, 2), Speed(spawn=1), greedy(30))
    while deaf.told < 8:
        with contextlib.suppress(KeyError):
            engine.step()
    while engine.requests:
        engine.step()
    assert request.emitted == run(looped, Plain(), request.prompt, greedy(30)).emitted


def test_requests_ask_of_early_drafts_what_they_ask_of_others(
    looped: TransformersModel, spawning: LLM
) -> None:
    """Stop strings, a least length, log-probabilities; and what goes on from one that was cancelled."""
    plain = spawning.using("plain")
    text = plain.generate("def add", max_new_tokens=24, ignore_eos=True, temperature=0.7, seed=4).text
    for asked in ({"stop": text[9:11]}, {"min_new_tokens": 9, "logprobs": 2}, {"logprobs": 0, "n": 3}):
        both = [
            one.generate("def add", max_new_tokens=24, temperature=0.7, seed=4, **asked)
            for one in (spawning, plain)
        ]
        fast, slow = [result if isinstance(result, list) else [result] for result in both]
        for one, other in zip(fast, slow, strict=True):
            same = ("text", "ids", "logprobs", "finish_reason")
            assert [getattr(one, name) for name in same] == [getattr(other, name) for name in same]
    engine = Engine(looped)
    begun = engine.submit(random_prompt(20, 3), Speed(spawn=1), greedy(40))
    for _ in range(15):
        engine.step()
    engine.cancel(begun)
    again = engine.submit([*begun.tokens[:22], 7], Speed(spawn=1), greedy(9))
    while engine.requests:
        engine.step()
    assert again.emitted == run(looped, Plain(), again.prompt, greedy(9)).emitted
    assert again.reused == 22, "what the cancelled one had read and written"


def test_verify_asks_for_flights_where_there_are_any(
    looped: TransformersModel, exact: TransformersModel
) -> None:
    assert "in flight" in verify._checks(Plain(), looped)
    assert "in flight" not in verify._checks(Plain(), exact)
    adapted = looped.adapted(fresh(looped, AdapterConfig(masks=2)))
    assert "in flight" not in verify._checks(Plain(), adapted), "masks do not run by stages"
    with pytest.raises(ModelUnsupported, match="load without"):
        Engine(adapted).submit([3, 4], Speed())


def test_logits_by_stages_are_those_of_whole_forwards(
    looped: TransformersModel, looped64: TransformersModel
) -> None:
    text = random_prompt(40, 2)
    for model in (looped, looped64):
        (whole,) = numerics.logits_behind(model, [Tree.chain(text[9:])], [text[:9]])
        by_stages = numerics.staged_logits(model, text[:9], text[9:])
        if model.numerics == "exact":
            assert torch.equal(by_stages, whole), "every bit"
        else:
            torch.testing.assert_close(by_stages, whole)


@pytest.mark.parametrize("loops", [2, 3, 5])
def test_where_all_passes_agree_each_stage_yields_a_token(loops: int) -> None:
    model = drive(agreeing(loops=loops))
    request = run(model, Speed(spawn=1), random_prompt(6, 1), greedy(30))
    assert request.runs == [0] * (loops - 1) + [1] * 30, "filled once"
    assert request.forwards == (30 + loops - 1) / loops
    assert request.rows == sum(min(i, loops, 31 - max(0, i - loops + 1)) for i in range(1, 30 + loops))


def test_spawning_later_takes_as_many_stages_a_token() -> None:
    model = drive(agreeing(loops=4))
    for spawn in (1, 2, 3, 4):
        request = run(model, Speed(spawn=spawn), random_prompt(6, 1), greedy(20))
        assert len(request.runs) == 4 + 19 * spawn
    chosen = run(model, Speed(), random_prompt(6, 1), greedy(20))
    assert len(chosen.runs) == 23, "the first pass is as good as the last"


def test_streamed_pieces_are_the_text(spawning: LLM) -> None:
    stream = spawning.stream("def add(a, b):", max_new_tokens=24, ignore_eos=True)
    pieces = list(stream)
    assert [token for piece in pieces for token in piece.ids] == list(stream.result.ids)
    assert "".join(piece.text for piece in pieces) == stream.result.text
    plain = spawning.using("plain").generate("def add(a, b):", max_new_tokens=24, ignore_eos=True)
    assert stream.result.ids == plain.ids


def test_the_hook_of_generate_takes_it() -> None:
    model, ids = tiny_looped(torch.float32), torch.tensor([random_prompt(8, 1)])
    asked = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    own = model.generate(ids, **asked)
    assert torch.equal(model.generate(ids, custom_generate=selfdraft.hook(method="speed"), **asked), own)


@pytest.mark.parametrize("ends", ["length", "context", "eos"])
def test_ends_while_rows_are_in_flight(looped: TransformersModel, ends: FinishReason) -> None:
    prompt, params = random_prompt(240 if ends == "context" else 20, 6), greedy(100)
    if ends == "length":
        params = greedy(20)
    elif ends == "eos":
        params = greedy(30, eos=(run(looped, Plain(), prompt, greedy(12)).emitted[11],))
    plain = run(looped, Plain(), prompt, params)
    assert plain.finish_reason == ends
    for method in (Speed(spawn=1), Speed(spawn=1, second=True), Restless()):
        fast = run(looped, method, prompt, params)
        assert (fast.emitted, fast.finish_reason) == (plain.emitted, ends), method


def test_penalties_and_filters(looped: TransformersModel) -> None:
    params = sampled(0.9, 3, top_k=20, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.5)
    prompt = random_prompt(20, 8)
    plain = run(looped, Plain(), prompt, params).emitted
    for method in (Speed(spawn=1), Restless(plain)):
        assert run(looped, method, prompt, params).emitted == plain


def test_a_row_beyond_the_context_is_refused(looped: TransformersModel) -> None:
    cache = looped.pool().open()
    history = random_prompt(254, 1)
    looped.forward([Tree.chain(history)], [cache])
    cache.keep(range(254), [])
    looped.forward([Tree.chain([5, 6])], [cache], 1)
    cache.keep([], range(2))
    with pytest.raises(InvalidTree, match="position 256; the model's context is 256"):
        looped.forward([Tree.chain([5, 6, 7])], [cache], 1)


def test_a_model_that_shares_no_layers_is_refused(exact: TransformersModel, folder: Path) -> None:
    with pytest.raises(ModelUnsupported, match="shares none: it needs a looped one"):
        Engine(exact).submit([3, 4], Speed())
    with pytest.raises(ModelUnsupported, match="selfdraft train speed"):
        LLM(str(folder), "speed")


@pytest.mark.parametrize("options", [{"spawn": -1}, {"gate": 1.5}, {"block": 0}, {"spawn": "x"}])
def test_options_that_cannot_be_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOption):
        create("speed", options)


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=8), st.lists(st.integers(0, 7), max_size=8), st.randoms()
)
def test_rows_match_where_the_path_of_tokens_is_the_same(
    tokens: list[int], hung: list[int], dice: random.Random
) -> None:
    def tree() -> Tree:
        own = [dice.choice(tokens) for _ in range(1 + len(hung))]
        return Tree(tuple(own), (-1, *(at % (i + 1) for i, at in enumerate(dice.sample(hung, len(hung))))))

    def path(tree: Tree, row: int) -> list[int]:
        return [] if row < 0 else [*path(tree, tree.parents[row]), tree.tokens[row]]

    new, held = tree(), tree()
    paths = [path(held, row) for row in range(len(held))]
    same = matches(new, held)
    for row in range(len(new)):
        if row in same:
            assert path(held, same[row]) == path(new, row)
        elif len({*map(tuple, paths)}) == len(paths):  # of equal siblings the first one counts
            assert path(new, row) not in paths


def test_what_a_lane_holds_in_flight_moves_with_it(looped: TransformersModel) -> None:
    """Another lane that is closed gives its place to the last one, whatever that has under way."""
    text = random_prompt(20, 5)
    (whole,) = numerics.logits_behind(looped, [Tree.chain(text[10:])], [text[:10]])
    pool = looped.pool()
    other, lane = pool.open(), pool.open()
    for cache in (other, lane):
        looped.forward([Tree.chain(text[:10])], [cache])
        cache.keep(range(10), [])
    looped.forward([Tree.chain(text[10:12])], [lane], 2)
    lane.keep([], range(2))
    other.close()
    assert isinstance(lane, StageLane)
    assert lane.index == 0
    rows = looped.forward([Tree.chain(text[10:12])], [lane], 1)
    assert rows.done == [[True, True]]
    assert torch.equal(looped.head(rows, [[0, 1]])[0], whole[:2])


# The drafter by itself


def drafter(**options: Any) -> SpeedDrafter:
    made = Speed(**({"spawn": 1} | options)).drafter(DraftContext([7], loops=Loops(3)))
    assert isinstance(made, SpeedDrafter)
    return made


def stage(made: SpeedDrafter, picks: Sequence[int], path: Sequence[int] = (), sure: float = 9.0) -> Tree:
    """Let the drafter see a stage of its tree; what it proposes next. All rows behind the path are in
    in_flight."""
    tree = made.propose([made.grown.tokens[0] if made.grown is not None else 7])
    row = path[-1] if path else -1
    top = tree.child(row, picks[row]) if path else 0
    in_flight = tree.below(top) if top is not None else []
    scores = torch.zeros(len(tree), 10)
    scores[range(len(tree)), list(picks)] = sure
    made.observe(Step(tree, lambda: scores, picks, path, in_flight))
    return made.propose([tree.tokens[0] if not path else picks[path[-1]]])


def test_the_next_token_starts_at_once_and_is_flushed_where_a_pick_changes() -> None:
    made = drafter()
    assert stage(made, [1]) == Tree.chain([7, 1])
    assert stage(made, [1, 2]) == Tree.chain([7, 1, 2])
    assert stage(made, [1, 2, 3], path=[0]) == Tree.chain([1, 2, 3])
    assert stage(made, [5, 3, 4]) == Tree.chain([1, 5]), "as published, at the first disagreement"
    assert stage(made, [5, 6]) == Tree.chain([1, 5, 6])


def test_without_revision_the_full_depth_decides() -> None:
    made = drafter(revise=False)
    for picks, tree in (([1], [7, 1]), ([4, 2], [7, 1, 2]), ([4, 2, 3], None)):
        if tree is not None:
            assert stage(made, picks) == Tree.chain(tree)
    assert stage(made, [4, 2, 3], path=[0]) == Tree.chain([4]), (
        "the pick is not in in_flight: all of it is lost"
    )


def test_a_second_proposal_stands_beside_the_first() -> None:
    made = drafter(second=True)
    assert stage(made, [1]) == Tree.chain([7, 1])
    assert stage(made, [4, 2]) == Tree((7, 1, 4, 2), (-1, 0, 0, 1))
    assert stage(made, [5, 2, 6, 3]).tokens == (7, 1, 4, 2, 6, 3), "and there is no third"


def test_unsure_picks_do_not_start() -> None:
    assert stage(drafter(gate=0.5), [1], sure=9.0) == Tree.chain([7, 1])
    assert stage(drafter(gate=0.5), [1], sure=0.5) == Tree.chain([7])


def test_the_depth_is_chosen_by_time() -> None:
    """Stages a token by hand: 0.5 * 1 + 0.4 * 2 + 0.1 * 3 = 1.6, 0.9 * 2 + 0.1 * 3 = 2.1, 3."""
    agreed = Loops(3, (0.5, 0.9, 1.0))
    assert Depth(agreed, lambda rows: 1.0, 0).spawn == 1
    assert Depth(agreed, lambda rows: 1 + (rows > 2), 0).spawn == 2, "1.6 * 2 > 2.1"
    assert Depth(agreed, float, 0).spawn == 3, "1.6 * 3 > 2.1 * 2 > 3"
    assert Depth(agreed, float, 2).spawn == 2
    learning = Depth(Loops(3), lambda rows: 1.0 + 0.3 * (rows - 1), 0)
    assert learning.spawn == 1
    for _ in range(40):
        learning.learn([4, 5, 5])
    assert math.isclose(learning.right[0] / learning.seen, 1 / 41)
    assert learning.choose() == 2, "2 * 1.6 > 2 * 1.3"


def test_the_depth_follows_what_was_seen_on_the_way() -> None:
    """An agreement that was measured elsewhere is outweighed, in time, by this text's own picks."""
    agreed = Loops(3, [0.95, 0.97, 1.0])
    depth = Depth(agreed, lambda rows: 1 + 0.3 * (rows - 1), 0)
    assert depth.spawn == 1
    for _ in range(8 * CHOSEN):
        depth.learn([5, 7, 7])  # the first pass is wrong, the second right
        depth.count()
    assert depth.spawn == 2
    fixed = Depth(agreed, lambda rows: 1 + 0.3 * (rows - 1), 1)
    for _ in range(8 * CHOSEN):
        fixed.learn([5, 7, 7])
        fixed.count()
    assert fixed.spawn == 1


def test_a_depth_that_is_never_chosen_anew_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Depth, "count", lambda self: None)
    with pytest.raises(AssertionError):
        test_the_depth_follows_what_was_seen_on_the_way()
