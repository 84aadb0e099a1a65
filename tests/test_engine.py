"""Drafted == plain, batch == single, cached == fresh, and the ends where plain decoding would stop."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selfdraft import Engine, Method, Request, SamplingParams, Step, Tree
from selfdraft.drafting.jacobi import Jacobi
from selfdraft.drafting.llma import Llma
from selfdraft.drafting.plain import Plain
from selfdraft.engine.scheduler import Limits
from selfdraft.engine.tree import MAX_DRAFT
from selfdraft.errors import DraftError, InvalidPrompt, InvalidTree
from selfdraft.models import attention
from selfdraft.models.numerics import RowRange
from selfdraft.models.transformers import TransformersModel
from selfdraft.verify.adversaries import Garbage, Oracle

from conftest import tiny_llama
from runs import greedy, random_prompt, run, sampled

WAYS = [greedy(), sampled(0.8, seed=3), sampled(1.5, top_k=40, top_p=0.9, min_p=0.01, seed=4)]
PROMPT = random_prompt(30, seed=1)
Act = Callable[[Any], Any] | None


def drafts(answer: Sequence[int]) -> list[Method]:
    return [Llma(trigger=1, block=8), Jacobi(6), Garbage(), Oracle(answer)]


@pytest.mark.parametrize("model", ["exact", "exact32", "double"])
@pytest.mark.parametrize("params", WAYS, ids=["greedy", "sampled", "filtered"])
def test_drafted_is_plain(model: str, params: SamplingParams, request: pytest.FixtureRequest) -> None:
    target = request.getfixturevalue(model)
    plain = run(target, Plain(), PROMPT, params)
    assert len(plain.emitted) == 40
    for method in drafts(plain.emitted):
        drafted = run(target, method, PROMPT, params, references=[plain.emitted[3:30]])
        assert drafted.emitted == plain.emitted, method
        assert sum(drafted.runs) == 40
    assert len(drafted.runs) < 25, "the oracle's right rows must be accepted"


@pytest.mark.parametrize("model", ["exact", "exact32", "double"])
def test_batch_is_single(model: str, request: pytest.FixtureRequest) -> None:
    """Requests of all methods, lengths and sampling parameters, joining and leaving as others run."""
    target = request.getfixturevalue(model)
    dice = random.Random(0)
    cases = []
    for seed in range(9):
        prompt = random_prompt(dice.randint(1, 90), seed)
        params = replace(WAYS[seed % 3], max_new_tokens=dice.randint(1, 40))
        alone = run(target, Plain(), prompt, params).emitted
        cases.append((prompt, drafts(alone)[seed % 4], params, alone))
    engine, joined = Engine(target), []
    for prompt, method, params, _ in cases:
        joined.append(engine.submit(prompt, method, params))
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
        engine.submit(random_prompt(9 + i, i), Oracle(answers[i], depth=4 + i), greedy(40)) for i in range(7)
    ]
    while engine.requests:
        engine.step()
    assert [request.emitted for request in requests] == answers


def test_two_readers_of_one_engine_miss_nothing(exact: TransformersModel) -> None:
    engine = Engine(exact)
    requests = [engine.submit(random_prompt(9, i), Jacobi(4), greedy(20)) for i in range(2)]
    readers = [engine.run(request) for request in requests]
    seen: list[list[int]] = [[], []]
    for _ in range(30):
        for reader, got in zip(readers, seen, strict=True):
            got += next(reader, [])
    assert seen == [request.emitted for request in requests]


class Fragile:
    """Plain decoding that does something at its fourth step: a method and its drafter in one."""

    def __init__(self, propose: Act = None, observe: Act = None) -> None:
        self.acts = {"propose": propose, "observe": observe}
        self.calls = {"propose": 0, "observe": 0}

    def drafter(self, context: object) -> Fragile:
        return self

    def _act(self, verb: str, given: Any) -> Any:
        self.calls[verb] += 1
        act = self.acts[verb]
        return act(given) if act is not None and self.calls[verb] == 4 else None

    def propose(self, tokens: Sequence[int]) -> Tree:
        return cast(Tree, self._act("propose", tokens)) or Tree.chain(tokens[-1:])

    def observe(self, step: Step) -> None:
        self._act("observe", step)


def raises(given: object) -> None:
    raise KeyError("fragile")


def append(tokens: Any) -> None:
    tokens.append(5)


@pytest.mark.parametrize(
    ("fragile", "says", "kept"),
    [
        (Fragile(propose=raises), "Fragile.propose raised KeyError: 'fragile'", 3),
        (Fragile(observe=raises), "Fragile.observe raised KeyError: 'fragile'", 4),
        (Fragile(propose=append), "Fragile.propose raised AttributeError", 3),
    ],
    ids=["propose", "observe", "appends to the text"],
)
def test_a_drafter_that_fails_harms_nobody_else(
    exact: TransformersModel, fragile: Fragile, says: str, kept: int
) -> None:
    """Its own request ends with an error that names it; what it has emitted stays, and is plain's."""
    prompts = [random_prompt(9, i) for i in range(3)]
    right = [run(exact, Plain(), prompt, greedy(1 + 9 * (i > 0))).emitted for i, prompt in enumerate(prompts)]
    engine = Engine(exact)
    short = engine.submit(prompts[0], Plain(), greedy(1))
    failing = engine.submit(prompts[1], fragile, greedy(10))
    other = engine.submit(prompts[2], Plain(), greedy(10))
    while engine.requests:
        engine.step()
        assert all(s.ready for s in engine.requests if s.runs), "the root rule holds after a failure"
    assert [short.emitted, other.emitted] == [right[0], right[2]]
    assert [short.finish_reason, other.finish_reason] == ["length", "length"]
    assert [short.error, other.error] == [None, None]
    assert failing.finish_reason == "error"
    assert type(failing.error) is DraftError
    assert says in str(failing.error)
    assert list(failing.emitted) == list(right[1][:kept])
    engine.cancel(failing)  # after its end it is no error
    assert failing.finish_reason == "error"


def test_a_reader_gets_the_tokens_and_then_the_error(exact: TransformersModel) -> None:
    engine, seen = Engine(exact), []
    reader = engine.run(engine.submit(PROMPT, Fragile(propose=raises)))
    for _ in range(3):
        seen += next(reader)
    with pytest.raises(DraftError, match="Fragile") as caught:
        next(reader)
    assert seen == list(run(exact, Plain(), PROMPT, greedy(3)).emitted)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_method_without_a_drafter_leaves_the_engine_alone(exact: TransformersModel) -> None:
    class Broken:
        def drafter(self, context: object) -> Fragile:
            raise KeyError("broken")

    engine = Engine(exact)
    with pytest.raises(DraftError, match=r"Broken\.drafter raised KeyError"):
        engine.submit(PROMPT, Broken())
    assert not engine.requests
    assert not any(layer.buffers() for layer in engine.pool.own)  # type: ignore[attr-defined]


def test_what_a_drafter_does_to_a_step_changes_nothing(exact: TransformersModel) -> None:
    def scribble(step: Any) -> None:
        step.scores.zero_()
        step.path.clear()

    engine = Engine(exact)
    methods: list[Method] = [Fragile(observe=scribble), Plain()]
    requests = [engine.submit(PROMPT, method, greedy(10)) for method in methods]
    while engine.requests:
        engine.step()
    assert [request.emitted for request in requests] == [run(exact, Plain(), PROMPT, greedy(10)).emitted] * 2


def test_leaving_early_disturbs_nobody(exact: TransformersModel) -> None:
    engine = Engine(exact)
    requests = [engine.submit(random_prompt(9, i), Jacobi(4), greedy(30)) for i in range(4)]
    for _ in range(5):
        engine.step()
    engine.cancel(requests[1])
    engine.cancel(requests[0])
    while engine.requests:
        engine.step()
    for i in (2, 3):
        assert requests[i].emitted == run(exact, Plain(), random_prompt(9, i), greedy(30)).emitted
    assert requests[0].finish_reason == "cancelled"
    assert requests[0].emitted


def test_plain_is_generate() -> None:
    model = tiny_llama()
    prompt = torch.tensor([PROMPT])
    mask = torch.ones_like(prompt)
    theirs = model.generate(prompt, attention_mask=mask, max_new_tokens=60, do_sample=False)[0]
    ours = run(TransformersModel(model, "fast"), Plain(), PROMPT, greedy(60, eos=(1,)))
    assert ours.tokens == theirs.tolist()


def test_prefill_in_pieces_is_prefill_at_once(
    exact32: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(exact32, Plain(), PROMPT)
    assert whole.prefills == 1
    monkeypatch.setattr("selfdraft.engine.engine.Limits", lambda: Limits(max_rows=7))
    pieces = run(exact32, Plain(), PROMPT)
    assert pieces.prefills == 5
    assert pieces.emitted == whole.emitted


def test_root_rule(exact: TransformersModel) -> None:
    engine = Engine(exact)
    request = engine.submit(PROMPT, Garbage(), greedy(20))
    engine.step()
    while request.finish_reason is None:
        assert request.length == len(request.tokens) - 1
        engine.step()


def ends(
    model: TransformersModel, answer: Sequence[int], params: SamplingParams, prompt: Sequence[int] = PROMPT
) -> list[Request]:
    return [run(model, method, prompt, params) for method in (Plain(), *drafts(answer))]


def test_eos_inside_a_draft(exact: TransformersModel) -> None:
    answer = run(exact, Plain(), PROMPT).emitted
    for eos in (answer[0], answer[11], answer[25]):
        first = answer.index(eos) + 1
        for request in ends(exact, answer, greedy(40, eos=(eos,))):
            assert request.emitted == answer[:first]
            assert request.finish_reason == "eos"


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_max_new_tokens(exact: TransformersModel, count: int) -> None:
    answer = run(exact, Plain(), PROMPT).emitted
    for request in ends(exact, answer, greedy(count)):
        assert request.emitted == answer[:count]
        assert request.finish_reason == "length"


def test_end_of_context(exact: TransformersModel) -> None:
    prompt = random_prompt(245, seed=5)
    plain = run(exact, Plain(), prompt)
    assert len(plain.tokens) == 256
    for request in ends(exact, plain.emitted, greedy(40), prompt):
        assert request.tokens == plain.tokens
        assert request.finish_reason == "context"


def test_bad_prompts(exact: TransformersModel) -> None:
    for prompt in ([], random_prompt(256, 0), [3, 320], [-1]):
        with pytest.raises(InvalidPrompt):
            Engine(exact).submit(prompt, Plain())


LAST = PROMPT[-1]


@pytest.mark.parametrize(
    ("proposed", "says"),
    [
        (Tree.chain([5]), "row 0 must carry"),
        (Tree.chain([LAST, 320]), "outside the vocabulary"),
        (Tree.chain([LAST, -1]), "outside the vocabulary"),
        (None, "must return a Tree; got None"),
        ([LAST, 5], "must return a Tree; got \\["),
        (Tree((float(LAST),), (-1,)), "not integers"),  # type: ignore[arg-type]
        (Tree((LAST, 5.0), (-1, 0)), "not integers"),  # type: ignore[arg-type]
        (Tree((LAST, True), (-1, 0)), "not integers"),
        (Tree((LAST, 5), (-1, 0.0)), "not integers"),  # type: ignore[arg-type]
        (Tree((LAST, *[5] * 5000), (-1, *[0] * 5000)), "5001 rows; the limit is 512"),
    ],
)
def test_a_drafter_that_breaks_the_rules_is_named(
    exact: TransformersModel, proposed: object, says: str
) -> None:
    class Rogue(Fragile):
        def propose(self, tokens: object) -> Tree:
            return cast(Tree, proposed)

    engine = Engine(exact)
    rogue, other = engine.submit(PROMPT, Rogue()), engine.submit(PROMPT, Plain(), greedy(5))
    start = time.perf_counter()
    while engine.requests:
        engine.step()
    assert time.perf_counter() - start < 5, "what is refused costs no work"
    assert (rogue.finish_reason, rogue.emitted) == ("error", [])
    assert type(rogue.error) is InvalidTree
    assert re.search(says, str(rogue.error))
    assert "Rogue" in str(rogue.error)
    assert (other.finish_reason, other.added) == ("length", 5)


def test_a_drafter_may_propose_as_many_rows_as_the_limit(exact: TransformersModel) -> None:
    rows = MAX_DRAFT - 1
    tree = Tree((LAST, *range(2, 2 + 300), *[5] * (rows - 300)), (-1, *[0] * rows))

    class Wide(Fragile):
        def propose(self, tokens: Sequence[int]) -> Tree:
            return replace(tree, tokens=(tokens[-1], *tree.tokens[1:]))

    drafted = run(exact, Wide(), PROMPT, greedy(3))
    assert drafted.emitted == run(exact, Plain(), PROMPT, greedy(3)).emitted
    assert drafted.rows >= MAX_DRAFT


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
        request = engine.submit(random_prompt(length, 0), method, greedy(100))
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
