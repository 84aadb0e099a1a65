"""Drafted against plain, token by token, past the first difference.

Where a drafted text leaves the plain one, the difference is noted and the drafted request starts again
from the plain text up to there, so that every token of the plain text is compared in the same context.
The noise is keyed by position, hence the same after the restart.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..drafting import create
from ..drafting.method import DraftContext, Method
from ..engine.engine import Engine
from ..engine.request import Limits, Request
from ..engine.step import Step
from ..engine.tree import Tree
from ..models.transformers import TransformersModel
from ..sampling.processors import Draw
from ..sampling.sampler import Sampler
from .adversaries import Garbage, Oracle

MOST = 20  # differences noted per text; a broken one has no end of them


@dataclass(frozen=True)
class Case:
    """One text to compare: its prompt, its sampler, its limits. index: of the prompt in the set.
    references: what drafters may copy from."""

    index: int
    prompt: Sequence[int]
    sampler: Sampler
    limits: Limits
    references: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Difference:
    """A token that is not plain decoding's.

    position: in the answer. expected: plain's token, got: the other's; None where one text has ended.
    margin: how far plain's score of `expected` lies above that of `got`, or how far `got` lies behind the
    edge of a filter that excludes it; ulps: the same in units in the
    last place of the logit, in the model's dtype. reproduces: does plain decoding, started afresh from the
    text before, pick `expected` again?
    """

    check: str
    case: int
    temperature: float
    seed: int
    position: int
    expected: int | None
    got: int | None
    margin: float
    ulps: float
    reproduces: bool


@dataclass(frozen=True)
class Comparison:
    """What one check found on one case."""

    compared: int
    differences: Sequence[Difference]


Check = Callable[[TransformersModel, Case, Sequence[int]], Comparison]


def answer(model: TransformersModel, method: Method, case: Case) -> Sequence[int]:
    """The tokens that a method emits, alone in an engine."""
    engine = Engine(model)
    request = engine.submit(case.prompt, method, case.sampler, case.limits, case.references)
    for _ in engine.run(request):
        pass
    return request.emitted


def drafted(name: str, make: Callable[[Sequence[int]], Method]) -> Check:
    """The check that a method's text is plain's. make: the method, given plain's text."""

    def check(model: TransformersModel, case: Case, plain: Sequence[int]) -> Comparison:
        method = make(plain)

        def again(start: int) -> Sequence[int]:
            return answer(model, method, _from(case, plain, start))

        return follow(name, model, case, plain, again)

    return check


def ends(model: TransformersModel, case: Case, plain: Sequence[int]) -> Comparison:
    """Texts that end inside a draft, at tokens that plain's text holds, end where plain's would."""
    dice = random.Random(case.sampler.seed)
    found: list[Difference] = []
    compared = 0
    for eos in dice.sample(sorted(set(plain)), min(4, len(set(plain)))):
        right = plain[: plain.index(eos) + 1]
        cut = replace(case, limits=Limits(case.limits.max_new_tokens, frozenset([eos])))
        got = answer(model, Oracle(plain, vocabulary=model.vocab_size), cut)
        compared += len(right)
        if list(got) != list(right):
            at = next((i for i, (a, b) in enumerate(zip(right, got, strict=False)) if a != b), len(right))
            found.append(_difference("ends", model, cut, [*right, None], at, _at(got, at)))
    return Comparison(compared, found)


def batch(
    model: TransformersModel, method: Method, cases: Sequence[Case], plains: Sequence[Sequence[int]]
) -> list[Comparison]:
    """All cases in one engine, four at a time, the method and others mixed; against their texts alone."""
    engine = Engine(model)
    waiting = list(range(len(cases)))
    joined: dict[int, Request] = {}
    kinds: list[Callable[[Sequence[int]], Method]] = [
        lambda _: method,
        lambda _: create("plain"),
        lambda _: method,
        lambda plain: Oracle(plain, vocabulary=model.vocab_size),
        lambda _: Garbage(vocabulary=model.vocab_size),
    ]
    while waiting or engine.requests:
        if waiting and len(engine.requests) < 4:
            i = waiting.pop()
            case, chosen = cases[i], kinds[i % len(kinds)](plains[i])
            joined[i] = engine.submit(case.prompt, chosen, case.sampler, case.limits, case.references)
        engine.step()
    return [_first("batch", model, cases[i], plains[i], joined[i].emitted) for i in range(len(cases))]


def follow(
    check: str,
    model: TransformersModel,
    case: Case,
    plain: Sequence[int],
    again: Callable[[int], Sequence[int]],
) -> Comparison:
    """Compare with plain's text; `again(start)` gives the other text behind plain's first `start` tokens."""
    found: list[Difference] = []
    start = 0
    while start < len(plain) and len(found) < MOST:
        first = _first(check, model, case, plain, [*plain[:start], *again(start)])
        found += first.differences
        start = first.compared
    return Comparison(min(start, len(plain)), found)


class _Watch:
    """Plain decoding that remembers its last scores; a method and its drafter in one, for one request."""

    scores: Tensor

    def drafter(self, context: DraftContext) -> _Watch:
        return self

    def propose(self, tokens: Sequence[int]) -> Tree:
        return Tree.chain(tokens[-1:])

    def observe(self, step: Step) -> None:
        self.scores = step.scores[0]


def logits_after(model: TransformersModel, case: Case, text: Sequence[int]) -> Tensor:
    """Logits of the token behind prompt and text, by plain decoding started afresh, [vocabulary]."""
    watch = _Watch()
    answer(model, watch, replace(_from(case, text, len(text)), sampler=Sampler(), limits=Limits(1)))
    return watch.scores  # greedy scores are the logits


def _first(
    check: str, model: TransformersModel, case: Case, plain: Sequence[int], other: Sequence[int]
) -> Comparison:
    length = max(len(plain), len(other))
    at = next((i for i in range(length) if _at(plain, i) != _at(other, i)), None)
    if at is None:
        return Comparison(len(plain), [])
    return Comparison(at + 1, [_difference(check, model, case, plain, at, _at(other, at))])


def _difference(
    check: str, model: TransformersModel, case: Case, plain: Sequence[int | None], at: int, got: int | None
) -> Difference:
    expected = _at(plain, at)
    before = [token for token in plain[:at] if token is not None]
    margin, ulps, reproduces = math.inf, math.inf, False
    if expected is not None and got is not None:
        logits = logits_after(model, case, before)
        text = [*case.prompt, *before]
        scores = _scores(case.sampler, text, logits)
        margin = _margin(case.sampler, text, logits, expected, got)
        size = max(abs(float(logits[expected])), abs(float(logits[got])), 1e-30)
        ulps = margin / (2.0 ** math.floor(math.log2(size)) * torch.finfo(model.dtype).eps)
        reproduces = int(scores.argmax()) == expected
    seed = case.sampler.seed
    where = (case.index, case.sampler.temperature, seed, at)
    return Difference(check, *where, expected, got, margin, ulps, reproduces)


def _scores(sampler: Sampler, text: Sequence[int], logits: Tensor) -> Tensor:
    """Scores of the token behind a text, [vocabulary]."""
    return Draw(sampler, text, len(logits), logits.device).scores(logits[None], [()])[0]


def _margin(sampler: Sampler, text: Sequence[int], logits: Tensor, expected: int, got: int) -> float:
    """How far logits would have to move for `got` to be picked: by its score, or past a filter's edge."""
    scores = _scores(sampler, text, logits)
    if scores[got].isfinite():
        return float(scores[expected] - scores[got])
    unfiltered = _scores(replace(sampler, top_k=0, top_p=1.0, min_p=0.0), text, logits)
    processed = _scores(replace(sampler, temperature=0.0), text, logits)
    short = processed[scores.isfinite()].min() - processed[got]
    return float(torch.maximum(unfiltered[expected] - unfiltered[got], short))


def _from(case: Case, plain: Sequence[int], start: int) -> Case:
    """The case with plain's first tokens as part of its prompt. Of the penalties, only repetition takes
    prompt and answer alike, so only that may be set."""
    left = Limits(max(1, case.limits.max_new_tokens - start), case.limits.eos)
    return replace(case, prompt=[*case.prompt, *plain[:start]], limits=left)


def _at(text: Sequence[int | None], position: int) -> int | None:
    return text[position] if position < len(text) else None
