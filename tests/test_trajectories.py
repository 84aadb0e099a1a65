"""Trajectories: the states of the definition, whatever ran beside them and wherever it stopped."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from selfdraft import LLM, DraftContext, SamplingParams, Step
from selfdraft._common.repetition import fresh
from selfdraft.drafting.plain import Plain
from selfdraft.engine.scheduler import Limits
from selfdraft.errors import InvalidOption, TrainingDataError
from selfdraft.models.transformers import TransformersModel
from selfdraft.sampling.sampler import Sampler
from selfdraft.train import shards, trajectories
from selfdraft.train.distill import Progress, Recipe, asked
from selfdraft.train.prompts import Prompts
from selfdraft.train.shards import Row, Shards
from selfdraft.train.trajectories import Recorded, Recorder, Recording, convergence, watch

from conftest import VOCABULARY, Run, tiny_llama
from runs import greedy, random_prompt, run

TEXTS = [f"def f{i}(a, b):\n    return a {'+' * (i % 3 + 1)} b  # {'x' * i}\n" for i in range(7)]
RECIPE = Recipe(max_new_tokens=37, seed=3, cut_loops=False)  # 37: no multiple of a block
SHORT = replace(RECIPE, max_new_tokens=17)

Patch = Callable[[pytest.MonkeyPatch], None]
JsonRow = dict[str, Any]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    """The weights of `double` in a model of transformers alone."""
    return tiny_llama(torch.float64)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return written(tmp_path / "prompts.jsonl", TEXTS)


def written(path: Path, texts: Sequence[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def plain(tokenizer: PreTrainedTokenizerFast) -> LLM:
    return LLM(tiny_llama(torch.float64), "plain", tokenizer=tokenizer)


@pytest.fixture
def llms(plain: LLM) -> Callable[[int], LLM]:
    return lambda block: plain.using(Recorded(block))


Recorders = Callable[[int], LLM]


def record(
    llm: LLM,
    file: str,
    out: Path,
    recipe: Recipe = RECIPE,
    tell: Callable[[Progress], None] = lambda progress: None,
    **how: Any,
) -> list[JsonRow]:
    """The rows of a run, by index."""
    assert isinstance(llm.method, Recorded)
    prompts = Prompts([file])
    about = {"block": llm.method.block, "augment": how.get("augment", False)}
    kept = Shards(out, {**asked(llm, prompts, recipe), **about}, 3)
    try:
        Recording(llm, prompts, recipe, kept, **how).run(tell)
    finally:
        kept.close()
    return rows(out)


def rows(out: Path) -> list[JsonRow]:
    found = [json.loads(line) for path in shards.shards(out) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda row: row["index"])


@torch.no_grad()
def mapped(
    model: LlamaForCausalLM, text: list[int], state: Sequence[int], params: SamplingParams
) -> list[int]:
    """The state after this one: what a whole forward, without a cache, picks in the place of each token."""
    whole = [*text, *state]
    logits = model(torch.tensor([whole]), use_cache=False).logits[0, len(text) - 1 : -1]
    for token, value in params.logit_bias.items():
        logits[:, token] += value
    sampler = Sampler(params, text, VOCABULARY, logits.device)
    return sampler.draw(logits, range(len(text), len(whole))).argmax(-1).tolist()


def right(model: LlamaForCausalLM, row: JsonRow, block: int, params: SamplingParams) -> None:
    """A row is the definition's: each block begins with what `jacobi` as published draws, each state is
    mapped to the next, and the text to itself."""
    text, dice = list(row["prompt"]), random.Random(params.seed)
    aims = [row["answer"][i : i + block] for i in range(0, len(row["answer"]), block)]
    assert len(row["states"]) == len(aims)
    for aim, states in zip(aims, row["states"], strict=True):
        path = [*states, aim]
        assert path[0][: block - 1] == dice.choices(text, k=block - 1)[: len(aim)]
        assert set(path[0]) <= set(text)
        assert aim not in states
        for state, following in pairwise([*path, aim]):
            assert mapped(model, text, state, params) == following
        text += aim


def settles(row: JsonRow, block: int) -> None:
    """What holds of any row: states are as long as their block, and each has more of the text than the one
    before it, in one piece from the start."""
    for i, states in enumerate(row["states"]):
        aim = row["answer"][i * block : (i + 1) * block]
        assert all(len(state) == len(aim) for state in states)
        settled = [*(agreed(state, aim) for state in states), len(aim)]
        assert all(after > before for before, after in pairwise(settled))


def agreed(state: Sequence[int], aim: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(state, aim, strict=True)) if a != b), len(aim))


@pytest.mark.parametrize("block", [2, 5, 16])
@pytest.mark.parametrize("greedy_share", [1.0, 0.0], ids=["greedy", "drawn"])
def test_states_are_those_of_whole_forwards_without_a_cache(
    reference: LlamaForCausalLM,
    llms: Recorders,
    file: str,
    tmp_path: Path,
    block: int,
    greedy_share: float,
) -> None:
    llm, recipe = llms(block), replace(RECIPE, greedy_share=greedy_share)
    made = record(llm, file, tmp_path / "out", recipe, limit=2)
    assert any(len(row["answer"]) == 37 for row in made), "with a short block at the end"
    assert {row["temperature"] for row in made} == {0.0 if greedy_share else 0.8}
    for row in made:
        right(reference, row, block, recipe.params(row["index"]))
        settles(row, block)
        plain = run(
            llm.model,
            Plain(),
            row["prompt"],
            recipe.params(row["index"]),
            eos_ids=llm.eos_ids,
        )
        assert (row["answer"], row["finish_reason"]) == (plain.emitted, plain.finish_reason)


def first_state_left_out(patch: pytest.MonkeyPatch) -> None:
    propose = Recorder.propose

    def wrong(self: Recorder, tokens: Sequence[int]) -> Any:
        begins = not self.inner.left
        tree = propose(self, tokens)
        if begins:
            self.blocks[-1] = []
        return tree

    patch.setattr(Recorder, "propose", wrong)


def observing(patch: pytest.MonkeyPatch, note: Callable[[Recorder, Step], list[int]]) -> None:
    """Another state is noted after a pass."""

    def wrong(self: Recorder, step: Step) -> None:
        self.inner.observe(step)
        self.known += step.emitted
        self.blocks[-1].append(note(self, step))

    patch.setattr(Recorder, "observe", wrong)


def last_pick_dropped(patch: pytest.MonkeyPatch) -> None:
    observing(patch, lambda self, step: [*self.known, *step.picks[len(step.path) : -1]])


def right_prefix_lost(patch: pytest.MonkeyPatch) -> None:
    observing(patch, lambda self, step: [*step.emitted, *step.picks[len(step.path) :]])


def guesses_for_picks(patch: pytest.MonkeyPatch) -> None:
    """What ran is noted again, not what the model made of it."""
    observing(patch, lambda self, step: [*self.known, *step.tree.tokens[1:][len(step.path) - 1 :]])


def not_cut(patch: pytest.MonkeyPatch) -> None:
    """States run on behind the end of the answer."""

    def wrong(blocks: Any, answer: Sequence[int], block: int) -> Any:
        starts = range(0, len(answer), block)
        aims = [list(answer[start : start + block]) for start in starts]
        return [
            [state for state in mine if list(state[: len(aim)]) != aim]
            for mine, aim in zip(blocks, aims, strict=False)
        ]

    patch.setattr(trajectories, "states", wrong)


def dice_not_the_requests(patch: pytest.MonkeyPatch) -> None:
    """All requests draw from the same dice."""
    dice, begin = random.Random(0), Recorder.__init__

    def wrong(self: Recorder, block: int, context: DraftContext) -> None:
        begin(self, block, context)
        self.inner.dice = self.dice = dice

    patch.setattr(Recorder, "__init__", wrong)


@pytest.mark.parametrize(
    "fault",
    [
        first_state_left_out,
        last_pick_dropped,
        right_prefix_lost,
        guesses_for_picks,
        not_cut,
        dice_not_the_requests,
    ],
)
@pytest.mark.parametrize("greedy_share", [1.0, 0.0], ids=["greedy", "drawn"])
def test_wrong_states_are_seen(
    reference: LlamaForCausalLM,
    llms: Recorders,
    file: str,
    tmp_path: Path,
    fault: Patch,
    greedy_share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = replace(SHORT, greedy_share=greedy_share)
    fault(monkeypatch)
    (row,) = record(llms(5), file, tmp_path / "out", recipe, limit=1)
    with pytest.raises(AssertionError):
        right(reference, row, 5, recipe.params(0))


@pytest.mark.parametrize("fault", [last_pick_dropped, right_prefix_lost, not_cut])
def test_states_that_do_not_settle_are_seen(
    llms: Recorders, file: str, tmp_path: Path, fault: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    (row,) = record(llms(5), file, tmp_path / "out", limit=1)
    with pytest.raises(AssertionError):
        settles(row, 5)


@pytest.mark.parametrize("augment", [False, True])
def test_rows_do_not_depend_on_what_runs_beside_them(
    tokenizer: PreTrainedTokenizerFast, file: str, tmp_path: Path, augment: bool
) -> None:
    model = tiny_llama(torch.bfloat16)
    beside(LLM(model, Recorded(5), tokenizer=tokenizer, numerics="exact"), file, tmp_path, augment)


def beside(llm: LLM, file: str, tmp_path: Path, augment: bool = False) -> None:
    alone = record(llm, file, tmp_path / "alone", SHORT, batch=1, augment=augment)
    assert [row["index"] for row in alone] == [*range(7)]
    assert {row["temperature"] for row in alone} == {0.0, 0.8}
    assert record(llm, file, tmp_path / "batch", SHORT, batch=4, augment=augment) == alone


def test_blocks_of_a_large_batch_run_whole(llms: Recorders, tmp_path: Path) -> None:
    """40 blocks of 64 are more rows than an engine runs by default; in a batch, and for the card."""
    large, texts = llms(64), [f"def f{i}(a):" for i in range(40)]
    one = written(tmp_path / "many.jsonl", texts)
    alone = record(large, one, tmp_path / "alone", batch=1)
    assert record(large, one, tmp_path / "batch", batch=40) == alone
    assert isinstance(large.model, TransformersModel)
    prompts = [large.encode(text) for text in texts]
    for at, row in enumerate(watch(large.model, prompts, 64, greedy(37))):
        if at % 8 == 7:
            assert [row] == watch(large.model, [prompts[at]], 64, greedy(37))


def short_of_rows(llms: Recorders, file: str, out: Path, patch: pytest.MonkeyPatch) -> None:
    """Passes may run one row of a block alone. States are whole, and lose nothing of the text."""
    patch.setattr(Recorded, "limits", lambda self, requests: Limits(max_rows=13))
    made = record(llms(5), file, out / "short", batch=7)
    for row in made:
        for i, states in enumerate(row["states"]):
            aim = row["answer"][i * 5 : (i + 1) * 5]
            assert all(len(state) == len(aim) for state in states)
            settled = [agreed(state, aim) for state in states]
            assert settled == sorted(settled)
    augmented = record(llms(5), file, out / "augmented", batch=7, augment=True)
    assert [row["answer"] for row in augmented] == [row["answer"] for row in made]


def test_states_are_whole_where_rows_are_short(
    llms: Recorders, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_rows(llms, file, tmp_path / "right", monkeypatch)
    observing(
        monkeypatch, lambda self, step: [*self.known, *step.picks[len(step.path) :]]
    )  # the rest is lost
    with pytest.raises(AssertionError):
        short_of_rows(llms, file, tmp_path / "wrong", monkeypatch)


def test_blocks_longer_than_a_draft_are_refused() -> None:
    with pytest.raises(InvalidOption, match="block=513"):
        Recorded(513)


@pytest.mark.parametrize("at", [1, 5])
def test_interrupted_and_resumed_is_as_if_never_stopped(
    llms: Recorders, file: str, tmp_path: Path, at: int
) -> None:
    resumed(llms(5), file, tmp_path, at)


def resumed(llm: LLM, file: str, tmp_path: Path, at: int) -> None:
    def stop(progress: Progress) -> None:
        if progress.rows == at:
            raise KeyboardInterrupt

    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        record(llm, file, out, SHORT, stop, batch=3, augment=True)
    assert len(rows(out)) == at
    with shards.shards(out)[-1].open("a") as last:
        last.write('{"index":6,"prompt":[0,5],"states":[[[5')
    whole = record(llm, file, tmp_path / "whole", SHORT, augment=True)
    assert record(llm, file, out, SHORT, batch=2, augment=True) == whole
    assert shards.read(out).rows["states"][:] == [row["states"] for row in whole]


def test_rows_that_depend_on_others_are_seen(
    llms: Recorders, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice_not_the_requests(monkeypatch)
    with pytest.raises(AssertionError):
        beside(llms(5), file, tmp_path)
    with pytest.raises(AssertionError):
        resumed(llms(5), file, tmp_path / "resumed", 3)


def ended(llms: Recorders, reference: LlamaForCausalLM, file: str, tmp_path: Path) -> None:
    """An answer whose end of text stands within a block."""
    (long,) = record(llms(16), file, tmp_path / "long", replace(RECIPE, greedy_share=1), limit=1)
    at = next(i for i in range(17, 31) if long["answer"][i] not in long["answer"][:i])
    llm = llms(16)
    llm.eos_ids = frozenset([long["answer"][at]])
    recipe = replace(RECIPE, greedy_share=1)
    (row,) = record(llm, file, tmp_path / "short", recipe, limit=1)
    assert (row["answer"], row["finish_reason"]) == (long["answer"][: at + 1], "eos")
    assert row["states"][0] == long["states"][0]
    assert {len(state) for state in row["states"][1]} == {at + 1 - 16}
    right(reference, row, 16, recipe.params(0))


def test_an_end_of_text_within_a_block_cuts_all_its_states(
    reference: LlamaForCausalLM, llms: Recorders, file: str, tmp_path: Path
) -> None:
    ended(llms, reference, file, tmp_path)


def test_states_behind_the_end_are_seen(
    reference: LlamaForCausalLM,
    llms: Recorders,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    not_cut(monkeypatch)
    with pytest.raises(AssertionError):
        ended(llms, reference, file, tmp_path)


class Looping(Recipe):
    """Of three answers one has eight tokens to choose from, and one a single token: a random model hardly
    repeats itself."""

    def params(self, index: int) -> SamplingParams:
        few = ({}, dict.fromkeys(range(5, 13), 30.0), {5: 30.0})[index % 3]
        return replace(super().params(index), logit_bias=few)


def loops(llms: Recorders, reference: LlamaForCausalLM, file: str, tmp_path: Path) -> None:
    """Answers are cut where they loop; of those in which there is nothing to learn no states are kept."""
    recipe = Looping(max_new_tokens=60, greedy_share=1, seed=3)
    cut = record(llms(5), file, tmp_path / "cut", recipe)
    whole = record(llms(5), file, tmp_path / "whole", replace(recipe, cut_loops=False))
    for row, full in zip(cut, whole, strict=True):
        kept = fresh(full["answer"])
        assert row["answer"] == full["answer"][:kept]
        looped = kept < len(full["answer"])
        for one, bad in ((row, looped and kept < 5), (full, same(full["answer"]))):
            assert (one["finish_reason"] == "degenerate") == bad
            assert ("states" in one) == (not bad)
            assert (one["finish_reason"] == "loop") == (looped and one is row and not bad)
        if row["finish_reason"] != "degenerate":
            right(reference, row, 5, recipe.params(row["index"]))
    for out, made in (("cut", cut), ("whole", whole)):
        reasons = Counter(row["finish_reason"] for row in made)
        summary = shards.manifest(tmp_path / out)["summary"]
        assert 2 <= reasons["degenerate"] == summary["degenerate"] < 7
        assert reasons["loop"] == summary["loops_cut"]
        assert bool(reasons["loop"]) == (out == "cut"), "there are some"
        assert (summary["rows"], summary["tokens"]) == (7, sum(len(row["answer"]) for row in made))
        assert shards.read(tmp_path / out).rows["states"][:] == [row.get("states") for row in made]


def same(answer: Sequence[int]) -> bool:
    return any(len({*answer[i : i + 10]}) == 1 for i in range(len(answer) - 9))


def test_answers_end_where_they_loop(
    reference: LlamaForCausalLM, llms: Recorders, file: str, tmp_path: Path
) -> None:
    loops(llms, reference, file, tmp_path)


def nothing_degenerate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trajectories, "degenerate", lambda row, block: False)


@pytest.mark.parametrize("fault", [not_cut, nothing_degenerate])
def test_loops_not_cut_are_seen(
    reference: LlamaForCausalLM,
    llms: Recorders,
    file: str,
    tmp_path: Path,
    fault: Patch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        loops(llms, reference, file, tmp_path)


@pytest.mark.parametrize(
    ("answer", "reason", "is_so"),
    [
        ([7] * 10 + [*range(20)], "length", True),
        ([*range(20), *[7] * 10], "eos", True),
        ([7] * 9 + [8] + [7] * 9, "length", False),
        ([1, 2, 3], "loop", True),
        ([1, 2, 3, 4], "loop", False),
        ([1, 2, 3], "eos", False),
    ],
)
def test_degenerate_answers(answer: list[int], reason: str, is_so: bool) -> None:
    assert trajectories.degenerate(Row(0, [1], answer, 0.0, 0, reason), 4) == is_so


def mended() -> None:
    """Of many blocks, what `augmented` may do and what it must not."""
    touched = set()
    for seed in range(200):
        dice = random.Random(seed)
        aim = dice.choices(range(5), k=12)
        block = [dice.choices(range(5), k=12) for _ in range(seed % 8)]
        before = [list(state) for state in block]
        made = trajectories.augmented(block, aim, random.Random(seed))
        assert made == trajectories.augmented(block, aim, random.Random(seed))
        assert block == before, "what it was given is not its own"
        assert made[-1:] == block[-1:]
        for state, now in zip(block, made, strict=True):
            wrong = [i for i in range(12) if state[i] != aim[i]]
            changed = [i for i in range(12) if state[i] != now[i]]
            assert all(now[i] == aim[i] for i in changed)
            assert wrong[:1] not in (changed[:1], [[]])
            assert len(changed) <= len(wrong) / 2
            touched.add(len(changed))
    assert touched == {*range(max(touched) + 1)}
    assert len(touched) > 3


def test_augmented_states_have_wrong_tokens_put_right() -> None:
    mended()
    block = [[1] * 30, [2] * 30, [3] * 30]
    made = {str(trajectories.augmented(block, [4] * 30, random.Random(seed))) for seed in range(20)}
    assert len(made) > 10, "other dice, other tokens"


def augmenting(patch: pytest.MonkeyPatch, first: int, last: int | None, token: int = 0) -> None:
    """Which wrong tokens may change, in which states, and what they become beside right."""

    def wrong(block: Sequence[Sequence[int]], aim: Sequence[int], dice: random.Random) -> list[list[int]]:
        made = [list(state) for state in block]
        for state in made[:last]:
            places = [i for i, (a, b) in enumerate(zip(state, aim, strict=True)) if a != b][first:]
            for i in dice.sample(places, dice.randint(0, len(places) // 2)):
                state[i] = aim[i] + token
        return made

    patch.setattr(trajectories, "augmented", wrong)


def test_the_honest_one_of_these_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    augmenting(monkeypatch, 1, -1)
    mended()


@pytest.mark.parametrize(("first", "last", "token"), [(0, -1, 0), (1, None, 0), (1, -1, 1)])
def test_wrong_augmenting_is_seen(
    first: int, last: int | None, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmenting(monkeypatch, first, last, token)
    with pytest.raises(AssertionError):
        mended()


def test_augmented_rows_differ_in_their_states_alone(llms: Recorders, file: str, tmp_path: Path) -> None:
    made = record(llms(16), file, tmp_path / "made", augment=True)
    plain = record(llms(16), file, tmp_path / "plain")
    assert made != plain
    assert [{**row, "states": 0} for row in made] == [{**row, "states": 0} for row in plain]
    for row in made:
        settles(row, 16)


BLOCKS: list[JsonRow] = [
    {
        "answer": [1, 2, 3, 4, 5, 6],
        "states": [
            [[9, 9, 3, 9], [1, 9, 3, 4], [1, 2, 3, 9]],  # the 4 turns wrong again, the 3 has come to stay
            [[9, 6]],  # two at once; shorter, so not in the progress
        ],
    },
    {"answer": [7, 7, 7, 8], "states": [[]]},  # drawn as it ends
]


def counted() -> None:
    found = convergence(BLOCKS, 4)
    assert found.blocks == 3
    assert found.tokens == pytest.approx((4 + 2 + 4) / 3)
    assert found.passes == pytest.approx((3 + 1 + 0) / 3)
    assert found.fast_forwarded == pytest.approx((1 + 1 + 0) / 3)
    assert found.stationary == pytest.approx(1 / 3)
    assert found.progress == [0.5, 0.625, 0.875, 1.0]


def test_convergence_by_hand() -> None:
    counted()
    nothing = asdict(convergence([], 4))
    assert nothing.pop("progress") == []
    assert set(nothing.values()) == {0}


def counting(
    patch: pytest.MonkeyPatch, stays: Callable[[Any, int, int], bool], least: int, one: int = 1
) -> None:
    """stays: of the states, when one counts and which token. least: the first state that counts. one: of the
    tokens gained in a pass so many are not fast-forwarded."""

    def wrong(known: Sequence[Sequence[bool]]) -> tuple[int, int, int, int]:
        prefix = [trajectories._prefix(row) for row in known]
        gained = sum(max(0, after - before - one) for before, after in pairwise(prefix))
        told = {
            i
            for j in range(least, len(known))
            for i in range(prefix[j] + 1, len(known[j]))
            if stays(known, j, i)
        }
        return len(known[0]), len(known) - 1, gained, len(told)

    patch.setattr(trajectories, "_count", wrong)


def to_the_end(known: Any, j: int, i: int) -> bool:
    return all(row[i] for row in known[j:])


def test_the_honest_count_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    counting(monkeypatch, to_the_end, 1)
    counted()


@pytest.mark.parametrize(
    ("stays", "least", "one"),
    [(lambda known, j, i: known[j][i], 1, 1), (lambda known, j, i: True, 1, 1), (to_the_end, 1, 0)],
    ids=["turns wrong again", "all behind a wrong one", "each gained"],
)
def test_wrong_counts_are_seen(stays: Any, least: int, one: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counting(monkeypatch, stays, least, one)
    with pytest.raises(AssertionError):
        counted()


def test_watched_answers_are_recorded_ones(reference: LlamaForCausalLM, double: TransformersModel) -> None:
    prompts = [random_prompt(12, seed) for seed in range(2)]
    for prompt, row in zip(prompts, watch(double, prompts, 5, greedy(37)), strict=True):
        assert row["answer"] == run(double, Plain(), prompt, greedy(37)).emitted
        right(reference, {"prompt": prompt, **row}, 5, greedy())


ASKED = {"model": "tiny", "fingerprint": "0" * 64, "vocabulary": VOCABULARY, "eos": [1]}
ROW = Row(0, [4, 5], [6, 7, 8], 0.0, 1, "length", [[[9, 9], [6, 9]], [[5]]])


def folder_of(out: Path, block: int | None = 2, **changed: Any) -> Path:
    """Two rows by hand, a shard each; of the second some entries are given, and those of None left out."""
    about = {} if block is None else {"block": block, "augment": False}
    kept = Shards(out, {**ASKED, **about}, 1)
    kept.note(summary=None)
    kept.add(ROW)
    kept.add(replace(ROW, index=1, seed=2))
    kept.close()
    path = shards.shards(out)[1]
    row = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({name: value for name, value in row.items() if value is not None}) + "\n")
    return out


@pytest.mark.parametrize(
    "states",
    [
        [[[9, 9]], [[5, 5]]],
        [[[9, 9], [6]], [[5]]],
        [[[9, 9]]],
        [[[9, 9]], [[5]], []],
        [[[9, 320]], [[5]]],
        [[[9, -1]], [[5]]],
        [[[9, True]], [[5]]],
        [[[9, 1.0]], [[5]]],
        [[[9, None]], [[5]]],
        [[[9, [9]]], [[5]]],
        [[9, 9], [5]],
        [["99"], [[5]]],
        [{}, [[5]]],
        ["", [[5]]],
        {"0": [], "1": []},
        "ab",
        7,
    ],
    ids=str,
)
def test_states_that_are_none_are_not_trained_on(tmp_path: Path, states: object) -> None:
    out = folder_of(tmp_path / "out", states=states)
    says = "shard-00001.jsonl, line 1: 'states' must be those of 2 blocks of 2 token ids"
    with pytest.raises(TrainingDataError, match=says):
        shards.read(out)
    for _ in range(2):  # what is refused is not locked either
        with pytest.raises(TrainingDataError, match=says):
            Shards(out, {**ASKED, "block": 2, "augment": False}, 1)


def test_rows_without_states(tmp_path: Path) -> None:
    bare = folder_of(tmp_path / "bare", states=None)
    with pytest.raises(
        TrainingDataError, match=r"shard-00001.jsonl, line 1: no column 'states'.*trajectories"
    ):
        shards.read(bare)
    degenerate = folder_of(tmp_path / "degenerate", states=None, finish_reason="degenerate")
    assert shards.read(degenerate).rows["states"][:] == [ROW.states, None]
    whole = shards.read(folder_of(tmp_path / "whole"))
    assert whole.rows["states"][:] == [ROW.states, ROW.states]
    assert whole.manifest["asked"]["block"] == 2
    plain = shards.read(folder_of(tmp_path / "distilled", block=None, states=None)).rows
    assert plain.column_names == ["index", "prompt", "answer", "temperature"]
    assert plain["answer"][:] == [[6, 7, 8]] * 2


def test_an_empty_shard(tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out")
    shards.shards(out)[1].write_text("")
    with pytest.raises(TrainingDataError, match=r"shard-00001\.jsonl is empty"):
        shards.read(out)
    again = Shards(out, {**ASKED, "block": 2, "augment": False}, 1)
    assert again.done == {0}
    again.add(replace(ROW, index=1))
    again.close()
    assert len(shards.read(out).rows) == 2


@pytest.fixture
def words(folder: Path, file: str, tmp_path: Path) -> tuple[str, ...]:
    asked_for = ("--prompts", file, "--model", str(folder), "-n", "20", "--batch", "4", "--out")
    return ("trajectories", *asked_for, str(tmp_path / "out"))


def test_command(command: Run, words: tuple[str, ...], tmp_path: Path) -> None:
    words = (*words, "--block", "6")
    code, out, err = command(*words, "--limit", "3", "--json")
    assert code == 0, err
    record = json.loads(out.splitlines()[-1])
    assert (record["rows"], record["new_rows"], record["degenerate"]) == (3, 3, 0)
    assert record["tokens"] == sum(len(row["answer"]) for row in rows(tmp_path / "out"))
    assert record["out"] == str(tmp_path / "out")
    assert record["tokens_per_forward"] >= 1
    code, out, err = command(*words)
    assert code == 0, err
    assert "3 rows are there" in err
    assert "7 rows" in out
    assert "0 degenerate" in out
    assert "in this run 4 rows" in out
    assert len(shards.read(tmp_path / "out").rows) == 7
    for row in rows(tmp_path / "out"):
        settles(row, 6)


def test_command_refuses_other_folders(command: Run, words: tuple[str, ...], tmp_path: Path) -> None:
    words = (*words, "--block", "6")
    assert command(*words, "--limit", "1")[0] == 0
    before = rows(tmp_path / "out")
    for more, says in (
        (("--block", "5"), "block: 6 there, 5 asked for"),
        (("--augment",), "augment: false there, true asked for"),
        (("--seed", "1"), "seed: 0 there, 1 asked for"),
    ):
        code, _, err = command(*words, *more)
        assert code == 2
        assert f"holds another run ({says})" in err
        assert len(err.splitlines()) == 1
    assert rows(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--block", "256"), "--block 256: the model's context is 256 tokens; give a smaller"),
        (("--block", "1"), "--block"),
        (("--temperature", "0"), "temperature must be above 0"),
    ],
)
def test_command_refuses_options(
    command: Run, words: tuple[str, ...], tmp_path: Path, more: tuple[str, ...], says: str
) -> None:
    code, _, err = command(*words, *more)
    assert code == 2
    assert says in err
    assert not (tmp_path / "out").exists()


def test_folders_of_distill_and_of_trajectories_are_not_each_others(
    command: Run, words: tuple[str, ...], tmp_path: Path
) -> None:
    assert command("distill", *words[1:], "--limit", "1")[0] == 0
    code, _, err = command(*words)
    assert code == 2
    assert "holds another run (block: " in err
    assert command(*words[:-1], str(tmp_path / "other"), "--limit", "1")[0] == 0
    code, _, err = command("distill", *words[1:-1], str(tmp_path / "other"))
    assert code == 2
    assert "holds another run" in err


def test_ctrl_c_keeps_what_there_is(
    command: Run, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, add = (*words, "--numerics", "exact"), Shards.add

    def stop(self: Shards, row: Row) -> None:
        if len(self.done) == 3:
            raise KeyboardInterrupt
        add(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "add", stop)
        code, _, err = command(*words)
    assert code == 130
    assert "3 rows are kept" in err
    kept = rows(tmp_path / "out")
    assert len(kept) == 3
    assert command(*words)[0] == 0
    assert command(*words[:-3], str(tmp_path / "whole"), *words[-2:])[0] == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")
    assert all(row in rows(tmp_path / "out") for row in kept)
