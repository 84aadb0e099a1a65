"""Drafted == plain, batch == single, cached == fresh, and the ends where plain decoding would stop."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selfdraft import Engine, Limits, Method, Request, Sampler, Tree
from selfdraft.drafting.jacobi import Jacobi
from selfdraft.drafting.llma import Llma
from selfdraft.drafting.plain import Plain
from selfdraft.errors import InvalidOption, InvalidPrompt, InvalidTree
from selfdraft.models import attention
from selfdraft.models.numerics import RowRange
from selfdraft.models.transformers import TransformersModel
from selfdraft.verify.adversaries import Garbage, Oracle

from conftest import tiny_llama
from runs import random_prompt, run

SAMPLERS = [Sampler(), Sampler(0.8, seed=3), Sampler(1.5, top_k=40, top_p=0.9, min_p=0.01, seed=4)]
PROMPT = random_prompt(30, seed=1)


def drafts(answer: Sequence[int]) -> list[Method]:
    return [Llma(trigger=1, block=8), Jacobi(6), Garbage(), Oracle(answer)]


@pytest.mark.parametrize("model", ["exact", "exact32", "double"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=["greedy", "sampled", "filtered"])
def test_drafted_is_plain(model: str, sampler: Sampler, request: pytest.FixtureRequest) -> None:
    target = request.getfixturevalue(model)
    plain = run(target, Plain(), PROMPT, sampler)
    assert len(plain.emitted) == 40
    for method in drafts(plain.emitted):
        drafted = run(target, method, PROMPT, sampler, references=[plain.emitted[3:30]])
        assert drafted.emitted == plain.emitted, method
        assert sum(drafted.runs) == 40
    assert len(drafted.runs) < 25, "the oracle's right rows must be accepted"


@pytest.mark.parametrize("model", ["exact", "exact32", "double"])
def test_batch_is_single(model: str, request: pytest.FixtureRequest) -> None:
    """Requests of all methods, lengths and samplers, joining and leaving as others run."""
    target = request.getfixturevalue(model)
    dice = random.Random(0)
    cases = []
    for seed in range(9):
        prompt, limits = random_prompt(dice.randint(1, 90), seed), Limits(dice.randint(1, 40))
        sampler = SAMPLERS[seed % 3]
        alone = run(target, Plain(), prompt, sampler, limits).emitted
        cases.append((prompt, drafts(alone)[seed % 4], sampler, limits, alone))
    engine, joined = Engine(target), []
    for prompt, method, sampler, limits, _ in cases:
        joined.append(engine.submit(prompt, method, sampler, limits))
        for _ in range(dice.randint(0, 4)):
            engine.step()
    while engine.requests:
        engine.step()
    assert [s.emitted for s in joined] == [alone for *_, alone in cases]


@pytest.mark.parametrize("rows", [RowRange(8, 8), RowRange(16, 16), RowRange(4, 16)])
def test_batch_is_single_in_narrow_calls(
    exact32: TransformersModel, rows: RowRange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that do not all go into one call, in pieces that do not divide their rows."""
    monkeypatch.setattr(exact32, "rows", rows)
    answers = [run(exact32, Plain(), random_prompt(9 + i, i)).emitted for i in range(7)]
    engine = Engine(exact32)
    requests = [
        engine.submit(random_prompt(9 + i, i), Oracle(answers[i], depth=4 + i), limits=Limits(40))
        for i in range(7)
    ]
    while engine.requests:
        engine.step()
    assert [request.emitted for request in requests] == answers


def test_two_readers_of_one_engine_miss_nothing(exact: TransformersModel) -> None:
    engine = Engine(exact)
    requests = [engine.submit(random_prompt(9, i), Jacobi(4), limits=Limits(20)) for i in range(2)]
    readers = [engine.run(request) for request in requests]
    seen: list[list[int]] = [[], []]
    for _ in range(30):
        for reader, got in zip(readers, seen, strict=True):
            got += next(reader, [])
    assert seen == [request.emitted for request in requests]


def test_a_drafter_that_fails_harms_nobody_else(exact: TransformersModel) -> None:
    class Fragile(Plain):
        def drafter(self, context: object) -> Fragile:  # type: ignore[override]
            return self

        def propose(self, tokens: Sequence[int]) -> Tree:
            return Tree.chain(tokens[-1:])

        def observe(self, step: object) -> None:
            raise KeyError("fragile")

    prompts = [random_prompt(9, i) for i in range(3)]
    right = [
        run(exact, Plain(), prompt, limits=Limits(1 + 9 * (i > 0))).emitted
        for i, prompt in enumerate(prompts)
    ]
    engine = Engine(exact)
    short = engine.submit(prompts[0], Plain(), limits=Limits(1))
    fragile = engine.submit(prompts[1], Fragile(), limits=Limits(10))
    other = engine.submit(prompts[2], Plain(), limits=Limits(10))
    failures = 0
    while engine.requests:
        try:
            engine.step()
        except KeyError:
            failures += 1
        assert all(s.ready for s in engine.requests if s.runs), "the root rule holds after a failure"
        if failures == 4:
            engine.cancel(fragile)
    assert [short.emitted, other.emitted] == [right[0], right[2]]
    assert list(fragile.emitted) == list(right[1][: len(fragile.emitted)])
    engine.cancel(fragile)  # a second time is no error


def test_leaving_early_disturbs_nobody(exact: TransformersModel) -> None:
    engine = Engine(exact)
    requests = [engine.submit(random_prompt(9, i), Jacobi(4), limits=Limits(30)) for i in range(4)]
    for _ in range(5):
        engine.step()
    engine.cancel(requests[1])
    engine.cancel(requests[0])
    while engine.requests:
        engine.step()
    for i in (2, 3):
        assert requests[i].emitted == run(exact, Plain(), random_prompt(9, i), limits=Limits(30)).emitted
    assert requests[0].finish_reason == "cancelled"
    assert requests[0].emitted


def test_plain_is_generate() -> None:
    model = tiny_llama()
    prompt = torch.tensor([PROMPT])
    mask = torch.ones_like(prompt)
    theirs = model.generate(prompt, attention_mask=mask, max_new_tokens=60, do_sample=False)[0]
    ours = run(TransformersModel(model, "fast"), Plain(), PROMPT, limits=Limits(60, frozenset([1])))
    assert ours.tokens == theirs.tolist()


def test_prefill_in_pieces_is_prefill_at_once(
    exact32: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(exact32, Plain(), PROMPT)
    assert whole.prefills == 1
    monkeypatch.setattr("selfdraft.engine.request.PREFILL", 7)
    pieces = run(exact32, Plain(), PROMPT)
    assert pieces.prefills == 5
    assert pieces.emitted == whole.emitted


def test_root_rule(exact: TransformersModel) -> None:
    engine = Engine(exact)
    request = engine.submit(PROMPT, Garbage(), limits=Limits(20))
    engine.step()
    while request.finish_reason is None:
        assert request.cache.length == len(request.tokens) - 1
        engine.step()
    assert request.cache.length == len(request.tokens) - 1


def ends(
    model: TransformersModel, answer: Sequence[int], limits: Limits, prompt: Sequence[int] = PROMPT
) -> list[Request]:
    return [run(model, method, prompt, limits=limits) for method in (Plain(), *drafts(answer))]


def test_eos_inside_a_draft(exact: TransformersModel) -> None:
    answer = run(exact, Plain(), PROMPT).emitted
    for eos in (answer[0], answer[11], answer[25]):
        first = answer.index(eos) + 1
        for request in ends(exact, answer, Limits(40, frozenset([eos]))):
            assert request.emitted == answer[:first]
            assert request.finish_reason == "eos"


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_max_new_tokens(exact: TransformersModel, count: int) -> None:
    answer = run(exact, Plain(), PROMPT).emitted
    for request in ends(exact, answer, Limits(count)):
        assert request.emitted == answer[:count]
        assert request.finish_reason == "length"


def test_end_of_context(exact: TransformersModel) -> None:
    prompt = random_prompt(245, seed=5)
    plain = run(exact, Plain(), prompt)
    assert len(plain.tokens) == 256
    for request in ends(exact, plain.emitted, Limits(40), prompt):
        assert request.tokens == plain.tokens
        assert request.finish_reason == "context"


def test_bad_prompts(exact: TransformersModel) -> None:
    for prompt in ([], random_prompt(256, 0), [3, 320], [-1]):
        with pytest.raises(InvalidPrompt):
            Engine(exact).submit(prompt, Plain())
    with pytest.raises(InvalidOption):
        Limits(0)


@pytest.mark.parametrize(
    "tree", [Tree.chain([5]), Tree.chain([PROMPT[-1], 320]), Tree.chain([PROMPT[-1], -1])]
)
def test_a_drafter_that_breaks_the_rules_is_named(exact: TransformersModel, tree: Tree) -> None:
    class Rogue:
        def drafter(self, context: object) -> Rogue:
            return self

        def propose(self, tokens: object) -> Tree:
            return tree

        def observe(self, step: object) -> None:
            pass

    engine = Engine(exact)
    engine.submit(PROMPT, Rogue())
    with pytest.raises(InvalidTree, match="Rogue"):
        engine.step()


class Work(TorchDispatchMode):
    """Counts the elements that all operations produce, attention apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" not in str(func):
            # What shares its input's memory, a slice of the buffers say, produces nothing.
            held = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            parts = out if isinstance(out, list | tuple) else [out]
            for part in (x for x in parts if isinstance(x, torch.Tensor)):
                if part.untyped_storage().data_ptr() not in held:
                    self.elements += part.numel()
        return out


@pytest.mark.parametrize("method", [Plain(), Jacobi(6, faithful=True)])
def test_no_work_grows_with_the_text(method: Method) -> None:
    """Apart from attention and the one mask it reads (rows x slots), a step at 1,900 tokens does what a
    step at 200 does."""
    model = TransformersModel(tiny_llama(context=2048), "fast")

    def work(length: int) -> int:
        engine = Engine(model)
        request = engine.submit(random_prompt(length, 0), method, limits=Limits(100))
        while not request.runs:
            engine.step()
        before = request.rows
        with Work() as count:
            engine.step()
        rows = request.rows - before
        # The mask is made once, and tiled over grouped heads in each layer where there are several rows.
        masks = 1 if rows == 1 else 1 + 2 * 2
        return (count.elements - engine.pool.reach * rows * masks) // rows

    work(200)  # what depends on a tree's shape alone is computed once per shape
    assert work(1900) == work(200)


def test_attention_is_the_same_folded_and_unfolded() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 32) for heads in (4, 2, 2))
    causal = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)[None, None].expand(2, -1, -1, -1)
    module = torch.nn.Identity()
    ours, _ = attention.attend(module, query, key, value, causal, 0.3)
    theirs, _ = attention.attend(module, query, key, value, None, 0.3)
    torch.testing.assert_close(ours, theirs)
