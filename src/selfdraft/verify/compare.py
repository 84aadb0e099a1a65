"""Compare drafted with plain decoding, token by token, beyond the first difference too.

Where the texts part, the difference is noted and the drafted request starts again from the plain text up to
there, so that every token is compared in the same context. Sampling noise is keyed by position, so it is the
same after the restart.
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
from ..engine.request import Request
from ..engine.step import Step
from ..engine.tree import Tree
from ..models.loading import AnyModel
from ..params import SamplingParams
from ..sampling.gumbel import NoiseSource
from ..sampling.sampler import Sampler
from .adversaries import Garbage, Oracle

MAX_DIFFERENCES = 20  # noted per text: a broken text differs everywhere


@dataclass(frozen=True)
class Case:
    """One text to compare."""

    # Of the prompt in the set.
    index: int
    prompt: Sequence[int]
    # With a seed, and the token ids that end the answer.
    params: SamplingParams
    # Token ids that drafters may copy from.
    references: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Difference:
    """A token that is not plain decoding's."""

    check: str
    # Index of the prompt.
    case: int
    temperature: float
    seed: int
    # In the answer.
    position: int
    # Plain decoding's token, and the other one; None where that text has ended.
    expected: int | None
    got: int | None
    # How far plain decoding's score of `expected` is above that of `got`; if a filter excludes `got`, how far
    # its logit is from passing the filter.
    margin: float
    # The margin in units in the last place of the logit, in the model's dtype.
    ulps: float
    # Whether plain decoding, started afresh from the text before, picks `expected` again.
    reproduces: bool


@dataclass(frozen=True)
class Comparison:
    """What one check found on one case."""

    compared: int
    differences: Sequence[Difference]


Check = Callable[[AnyModel, Case, Sequence[int]], Comparison]


def answer(model: AnyModel, method: Method, case: Case) -> Sequence[int]:
    """The tokens that a method emits, alone in an engine."""
    engine = Engine(model)
    request = engine.submit(case.prompt, method, case.params, case.references)
    for _ in engine.run(request):
        pass
    return request.emitted


def drafted(name: str, make: Callable[[Sequence[int]], Method]) -> Check:
    """The check that a method's text is plain decoding's. make: the method, given that text."""

    def check(model: AnyModel, case: Case, plain: Sequence[int]) -> Comparison:
        method = make(plain)

        def again(start: int) -> Sequence[int]:
            return answer(model, method, _from(case, plain, start))

        return follow(name, model, case, plain, again)

    return check


def ends(model: AnyModel, case: Case, plain: Sequence[int]) -> Comparison:
    """Make tokens of the plain text end it, so that the end lies inside a draft: the drafted text has to
    end at the same place."""
    dice = random.Random(case.params.seed)
    found: list[Difference] = []
    compared = 0
    for eos in dice.sample(sorted(set(plain)), min(4, len(set(plain)))):
        right = plain[: plain.index(eos) + 1]
        cut = replace(case, params=replace(case.params, eos=(eos,)))
        got = answer(model, Oracle(plain, vocabulary=model.vocab_size), cut)
        compared += len(right)
        if list(got) != list(right):
            at = next((i for i, (a, b) in enumerate(zip(right, got, strict=False)) if a != b), len(right))
            found.append(_difference("ends", model, cut, [*right, None], at, _at(got, at)))
    return Comparison(compared, found)


def batch(
    model: AnyModel, method: Method, cases: Sequence[Case], plains: Sequence[Sequence[int]]
) -> list[Comparison]:
    """Compare all cases in one engine, four at a time and with several methods mixed, with each case
    alone."""
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
            joined[i] = engine.submit(case.prompt, chosen, case.params, case.references)
        engine.step()
    return [_first("batch", model, cases[i], plains[i], joined[i].emitted) for i in range(len(cases))]


def follow(
    check: str,
    model: AnyModel,
    case: Case,
    plain: Sequence[int],
    again: Callable[[int], Sequence[int]],
) -> Comparison:
    """Compare with the plain text; `again(start)` gives the other text after its first `start` tokens."""
    found: list[Difference] = []
    start = 0
    while start < len(plain) and len(found) < MAX_DIFFERENCES:
        first = _first(check, model, case, plain, [*plain[:start], *again(start)])
        found += first.differences
        start = first.compared
    return Comparison(min(start, len(plain)), found)


class _KeepScores:
    """Plain decoding that keeps its last scores: a method and its drafter in one, for one request."""

    scores: Tensor

    def drafter(self, context: DraftContext) -> _KeepScores:
        return self

    def propose(self, tokens: Sequence[int]) -> Tree:
        return Tree.chain(tokens[-1:])

    def observe(self, step: Step) -> None:
        self.scores = step.scores[0]


def logits_after(model: AnyModel, case: Case, text: Sequence[int]) -> Tensor:
    """Logits of the token after prompt and text, by plain decoding started afresh, [vocabulary]."""
    keeper = _KeepScores()
    answer(model, keeper, replace(_from(case, text, len(text)), params=SamplingParams(max_new_tokens=1)))
    return keeper.scores  # greedy scores are the logits


def _first(check: str, model: AnyModel, case: Case, plain: Sequence[int], other: Sequence[int]) -> Comparison:
    length = max(len(plain), len(other))
    at = next((i for i in range(length) if _at(plain, i) != _at(other, i)), None)
    if at is None:
        return Comparison(len(plain), [])
    return Comparison(at + 1, [_difference(check, model, case, plain, at, _at(other, at))])


def _difference(
    check: str, model: AnyModel, case: Case, plain: Sequence[int | None], at: int, got: int | None
) -> Difference:
    expected = _at(plain, at)
    before = [token for token in plain[:at] if token is not None]
    margin, ulps, reproduces = math.inf, math.inf, False
    if expected is not None and got is not None:
        logits = logits_after(model, case, before)
        text = [*case.prompt, *before]
        scores = _scores(case.params, text, logits, model.noise)
        margin = _margin(case.params, text, logits, expected, got, model.noise)
        size = max(abs(float(logits[expected])), abs(float(logits[got])), 1e-30)
        ulps = margin / (2.0 ** math.floor(math.log2(size)) * torch.finfo(model.dtype).eps)
        reproduces = int(scores.argmax()) == expected
    where = (case.index, case.params.temperature, case.params.seed or 0, at)
    return Difference(check, *where, expected, got, margin, ulps, reproduces)


def _scores(
    params: SamplingParams, text: Sequence[int], logits: Tensor, source: NoiseSource | None
) -> Tensor:
    """Scores of the token after a text, [vocabulary]."""
    return Sampler(params, text, len(logits), logits.device, source=source).scores(logits[None], [()])[0]


def _margin(
    params: SamplingParams,
    text: Sequence[int],
    logits: Tensor,
    expected: int,
    got: int,
    source: NoiseSource | None,
) -> float:
    """How far logits would have to move for `got` to be picked: by its score, or past a filter's edge."""
    scores = _scores(params, text, logits, source)
    if scores[got].isfinite():
        return float(scores[expected] - scores[got])
    unfiltered = _scores(replace(params, top_k=0, top_p=1.0, min_p=0.0), text, logits, source)
    processed = _scores(replace(params, temperature=0.0), text, logits, source)
    short = processed[scores.isfinite()].min() - processed[got]
    return float(torch.maximum(unfiltered[expected] - unfiltered[got], short))


def _from(case: Case, plain: Sequence[int], start: int) -> Case:
    """The case with the first tokens of the plain text moved into its prompt. Only the repetition penalty
    treats prompt and answer alike, so no other penalty may be set."""
    left = replace(case.params, max_new_tokens=max(1, case.params.max_new_tokens - start))
    return replace(case, prompt=[*case.prompt, *plain[:start]], params=left)


def _at(text: Sequence[int | None], position: int) -> int | None:
    return text[position] if position < len(text) else None
