"""Does a method change a text of this model on this machine?

Plain decoding is the reference. The answers of the method, and of two drafters that are bad on purpose (one
proposes random trees, one hides the right tokens between wrong ones), are compared with it token by token:
alone and in a mixed batch, greedy and sampled, and ended early at tokens inside them. A looped model gets a
third bad drafter, which rearranges the rows in flight. An adapter is in the model throughout, except for
plain decoding. Plain decoding itself is compared with transformers' `generate`. `verdict` says what a
difference means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch

from ..drafting import create
from ..drafting.method import Method
from ..llm import LLM
from ..models.decoder import Decoder
from ..models.loading import AnyModel
from ..models.transformers import TransformersModel
from ..params import SamplingParams
from .adversaries import Garbage, Oracle, Restless
from .baseline import generated, rounding
from .compare import Case, Check, answer, batch, drafted, ends, logits_after
from .distribution import fits
from .verdict import Compared, Float64Copy, Verification, judge

FILTERS: dict[str, Any] = {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8}


@dataclass(frozen=True)
class Effort:
    """How much is compared."""

    # Tokens per answer.
    max_new_tokens: int
    # Seeds at temperature 0.8, beside the greedy answer and one with all filters.
    seeds: int
    # Tokens sampled from each of the model's distributions.
    picks: int
    # Prompts whose next-token distribution is sampled from.
    distributions: int


QUICK = Effort(max_new_tokens=16, seeds=1, picks=500, distributions=1)
THOROUGH = Effort(max_new_tokens=48, seeds=2, picks=2_000, distributions=2)


def verify(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    effort: Effort = THOROUGH,
    seed: int = 0,
    references: Sequence[Sequence[int]] = (),
    report: Callable[[str], None] = lambda line: None,
    against: tuple[Decoder, TransformersModel] | None = None,
) -> Verification:
    """Compare a method with plain decoding on prompts of token ids.

    references: token ids that drafters may copy from. report: called with a line that says what is compared
    next. against: the decoder and transformers' forward on the same float32 weights, for a model that runs on
    the decoder: plain decoding of the first is then compared with `generate` of the second.
    """
    model, method = llm.model, llm.method
    cases = _cases(prompts, llm.eos_ids, effort, seed, references)
    checks = _checks(method, model)
    plains: list[Sequence[int]] = []
    found: dict[str, list[Any]] = {name: [] for name in checks}
    for number, case in enumerate(cases, start=1):
        report(f"answer {number} of {len(cases)}")
        plains.append(answer(model.base, create("plain"), case))
        for name, check in checks.items():
            found[name].append((case, check(model, case, plains[-1])))
    report("all answers again, four at a time in one batch")
    together: Compared = list(zip(cases, batch(model, method, cases, plains), strict=True))
    greedy = [(c, p) for c, p in zip(cases, plains, strict=True) if c.params.temperature == 0]
    moved, theirs = 0.0, None
    if isinstance(model, TransformersModel):
        report("rounding of this model on this machine")
        moved = rounding(model, [[*case.prompt, *text] for case, text in zip(cases, plains, strict=True)])
        report("transformers' generate")
        theirs = [(case, generated(model, case, plain)) for case, plain in greedy]
    elif against is not None:
        report("transformers' generate, in float32")
        decoder, other = against
        texts = [answer(decoder, create("plain"), case) for case, _ in greedy]
        both = [[*case.prompt, *text] for (case, _), text in zip(greedy, texts, strict=True)]
        moved = rounding(other, both)
        theirs = [(case, generated(other, case, text)) for (case, _), text in zip(greedy, texts, strict=True)]
    report("the distribution of sampled tokens")
    logits = torch.stack([logits_after(model, case, []) for case, _ in greedy[: effort.distributions]])
    drawn = fits(logits, seed, effort.picks, model.noise)

    float64 = Float64Copy(model)
    bound = 0.0 if model.numerics == "exact" else 2 * moved
    results = [
        judge(name, pairs, bound, partial(float64.check_differs, checks[name], pairs))
        for name, pairs in found.items()
    ]
    results.append(judge("batch", together, bound, partial(float64.batch_differs, method, cases)))
    generate = None
    if against is not None and theirs is not None:
        generate = judge("generate", theirs, 2 * moved, lambda: False)
    elif theirs is not None:
        check = cast(Check, generated)
        generate = judge("generate", theirs, 2 * moved, partial(float64.check_differs, check, theirs))
    return Verification(results, generate, drawn, moved)


def _cases(
    prompts: Sequence[Sequence[int]],
    eos_ids: frozenset[int],
    effort: Effort,
    seed: int,
    references: Sequence[Sequence[int]],
) -> list[Case]:
    """Each prompt with each way of sampling."""
    greedy = SamplingParams(max_new_tokens=effort.max_new_tokens, eos=tuple(sorted(eos_ids)), seed=0)
    sampled = [replace(greedy, temperature=0.8, seed=seed + i) for i in range(effort.seeds)]
    ways = [greedy, *sampled, replace(greedy, temperature=0.9, seed=seed, **FILTERS)]
    return [Case(i, tuple(p), way, references) for i, p in enumerate(prompts) for way in ways]


def _checks(method: Method, model: AnyModel) -> dict[str, Check]:
    vocabulary = model.vocab_size
    checks: dict[str, Check] = {
        "method": drafted("method", lambda plain: method),
        "garbage": drafted("garbage", lambda plain: Garbage(vocabulary=vocabulary)),
        "bushy": drafted("bushy", lambda plain: Oracle(plain, vocabulary=vocabulary)),
        "ends": ends,
    }
    if model.loops is not None and model.adapter is None:  # mask tokens do not run by stages
        checks["in flight"] = drafted("in flight", lambda plain: Restless(plain, vocabulary=vocabulary))
    return checks
