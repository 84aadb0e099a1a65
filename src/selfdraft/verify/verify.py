"""The promise, put to the test: does a method change a text of this model on this machine?

Texts of the method, of a drafter that proposes garbage and of a bushy tree with decoys are compared with
plain decoding, alone and in a mixed batch, greedy and sampled, and cut at tokens inside them; those of a
looped model also with a drafter that never leaves what is in in_flight alone. An adapter is
in the model throughout, but for plain decoding, which is compared with Hugging Face's `generate`. Each
difference is judged:

- exact: there is none;
- tie-bounded: each lies within what this model's own rounding can do here (twice the row noise: how far
  transformers' logits of the same token differ between a forward over the whole text and one token by
  token), and the same comparison in float64 has none;
- broken: anything else.

The noise is measured on transformers' own forward and cache, so a fault of ours cannot widen its bound.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..drafting import create
from ..drafting.method import Method
from ..engine.request import Limits
from ..errors import ModelUnsupported
from ..llm import LLM
from ..models.drive import drive
from ..models.transformers import TransformersModel
from ..models.transformers_inputs import CACHE
from ..sampling.sampler import Sampler
from .adversaries import Garbage, Oracle, Restless
from .compare import Case, Check, Comparison, Difference, answer, batch, drafted, ends, follow, logits_after
from .distribution import Fit, fits

Verdict = Literal["exact", "tie-bounded", "broken"]
Progress = Callable[[Sequence[Case]], Iterable[Case]]


@dataclass(frozen=True)
class Judged:
    """One check over all cases. Compared and differing are tokens."""

    check: str
    compared: int
    differences: Sequence[Difference]
    verdict: Verdict
    gone_in_float64: bool | None  # None: nothing to look into


@dataclass(frozen=True)
class Verification:
    """checks: the method's texts and the adversaries'. generate: plain against transformers, greedy."""

    checks: Sequence[Judged]
    generate: Judged
    distribution: Sequence[Fit]
    row_noise: float

    @property
    def verdict(self) -> Verdict:
        """The worst of the checks. Rounding differences to `generate`, which has numerics of its own, do
        not count; a difference to it that rounding does not explain does, and so does a wrong
        distribution."""
        verdicts = {judged.verdict for judged in self.checks}
        wrong = self.generate.verdict == "broken" or not all(fit.holds for fit in self.distribution)
        if "broken" in verdicts or wrong:
            return "broken"
        return "tie-bounded" if "tie-bounded" in verdicts else "exact"

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        checks = [asdict(judged) for judged in (*self.checks, self.generate)]
        return {
            "verdict": self.verdict,
            "compared": sum(judged.compared for judged in self.checks),
            "differences": sum(len(judged.differences) for judged in self.checks),
            "row_noise": self.row_noise,
            "checks": checks,
            "distribution": [asdict(fit) | {"holds": fit.holds} for fit in self.distribution],
        }


def verify(
    generator: LLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 48,
    seeds: int = 2,
    seed: int = 0,
    references: Sequence[Sequence[int]] = (),
    progress: Progress = lambda cases: cases,
) -> Verification:
    """Put a generator's method to the test on prompts of token ids.

    Each prompt is answered greedily, at temperature 0.8 with `seeds` seeds from `seed` on, and once with
    all filters and a repetition penalty. references: ids that drafters may copy from. progress: wraps the
    list of cases, to show how far it is.
    """
    model = generator.model
    sampled = [Sampler(0.8, seed=seed + i) for i in range(seeds)]
    filters: dict[str, Any] = {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8}
    samplers = [Sampler(), *sampled, Sampler(0.9, **filters, seed=seed)]
    limits = Limits(max_new_tokens, generator.eos)
    cases = [Case(i, tuple(p), s, limits, references) for i, p in enumerate(prompts) for s in samplers]
    plain_method = create("plain")
    plains: list[Sequence[int]] = []
    found: dict[str, list[tuple[Case, Comparison]]] = {}
    checks = _checks(generator.method, model)
    for case in progress(cases):
        plains.append(answer(model.base, plain_method, case))
        for name, check in checks.items():
            found.setdefault(name, []).append((case, check(model, case, plains[-1])))
    together = batch(model, generator.method, cases, plains)
    noise = row_noise(model, [[*case.prompt, *text] for case, text in zip(cases, plains, strict=True)])
    twin = _Twin(model)
    bound = 0.0 if model.numerics == "exact" else 2 * noise  # exact numerics allow no difference
    judged = [_judge(n, pairs, bound, partial(_repeat, checks[n], pairs, twin)) for n, pairs in found.items()]
    mixed = list(zip(cases, together, strict=True))
    judged.append(_judge("batch", mixed, bound, partial(_batch_again, generator.method, cases, twin)))
    greedy = [(c, p) for c, p in zip(cases, plains, strict=True) if c.sampler.temperature == 0]
    against = [(case, _generated(model, case, plain)) for case, plain in greedy]
    generate = _judge("generate", against, 2 * noise, partial(_repeat, _generated, against, twin))
    logits = torch.stack([logits_after(model, case, []) for case, _ in greedy[:2]])
    return Verification(judged, generate, fits(logits, seed), noise)


def _checks(method: Method, model: TransformersModel) -> dict[str, Check]:
    vocabulary = model.vocab_size
    checks: dict[str, Check] = {
        "method": drafted("method", lambda plain: method),
        "garbage": drafted("garbage", lambda plain: Garbage(vocabulary=vocabulary)),
        "bushy": drafted("bushy", lambda plain: Oracle(plain, vocabulary=vocabulary)),
        "ends": ends,
    }
    if model.loops is not None and model.adapter is None:  # masks do not run by stages
        checks["in flight"] = drafted("in flight", lambda plain: Restless(plain, vocabulary=vocabulary))
    return checks


@torch.inference_mode()
def row_noise(model: TransformersModel, texts: Sequence[Sequence[int]], most: int = 8) -> float:
    """Largest difference between transformers' logits of a token read with the whole text and alone.

    On the texts that are compared, prompt and answer, of which it takes `most` or so, spread evenly.

    Both use transformers' forward, cache and masks; ours are not involved. 0 where all bits agree.
    """
    with _their_attention(model):
        return max(_noise_of(model, text) for text in texts[:: max(1, len(texts) // most)])


def _noise_of(model: TransformersModel, text: Sequence[int]) -> float:
    ids = torch.tensor([list(text)], device=model.device)
    whole = model.model(input_ids=ids, use_cache=False).logits[0]
    cache, alone = None, []
    for at in range(ids.shape[1]):
        out = model.model(input_ids=ids[:, at : at + 1], use_cache=True, **{CACHE: cache})
        cache = out[CACHE]
        alone.append(out.logits[0, -1])
    return float((whole - torch.stack(alone)).abs().max())


@contextmanager
def _their_attention(model: TransformersModel) -> Iterator[None]:
    """Let the attention that the model came with run meanwhile, without the defaults of the model's
    generation config, which may bring processors that nobody asked for."""
    config, model.model.generation_config = model.model.generation_config, GenerationConfig()
    try:
        with model.attending(model.own_attention):
            yield
    finally:
        model.model.generation_config = config


def _generated(model: TransformersModel, case: Case, plain: Sequence[int]) -> Comparison:
    """Plain's text against that of transformers' `generate`, greedy and cached."""

    def again(start: int) -> Sequence[int]:
        ids = torch.tensor([[*case.prompt, *plain[:start]]], device=model.device)
        settings = GenerationConfig(
            max_new_tokens=len(plain) - start,
            do_sample=False,
            eos_token_id=list(case.limits.eos) or None,
            pad_token_id=next(iter(case.limits.eos), 0),
        )
        with _their_attention(model):
            out = model.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return cast(Tensor, out)[0, ids.shape[1] :].tolist()

    return follow("generate", model, case, plain, again)


class _Twin:
    """The same model in float64, made when it is first needed."""

    def __init__(self, model: TransformersModel) -> None:
        self._of = model
        self._made: TransformersModel | None = None

    def model(self) -> TransformersModel:
        if self._made is None:
            made = drive(copy.deepcopy(self._of.base.model).double(), "fast")
            adapter = self._of.adapter
            self._made = made if adapter is None else made.adapted(copy.deepcopy(adapter).double())
        return self._made


def _judge(
    name: str, pairs: Sequence[tuple[Case, Comparison]], bound: float, again: Callable[[], bool]
) -> Judged:
    """The verdict of one check. again: does the same in float64 find anything?"""
    compared = sum(comparison.compared for _, comparison in pairs)
    differences = [d for _, comparison in pairs for d in comparison.differences]
    if not differences:
        return Judged(name, compared, [], "exact", None)
    gone = all(abs(d.margin) <= bound for d in differences)
    try:
        gone = gone and not again()
    except ModelUnsupported:  # the probe refuses the model in float64: nothing is explained by rounding
        gone = False
    return Judged(name, compared, differences, "tie-bounded" if gone else "broken", gone)


def _repeat(check: Check, pairs: Sequence[tuple[Case, Comparison]], twin: _Twin) -> bool:
    """Does a check find anything in float64 on the cases where it found something?"""
    model, plain = twin.model(), create("plain")
    cases = [case for case, comparison in pairs if comparison.differences]
    return any(check(model, case, answer(model.base, plain, case)).differences for case in cases)


def _batch_again(method: Method, cases: Sequence[Case], twin: _Twin) -> bool:
    """Does the whole batch differ from its requests alone in float64?"""
    model, plain = twin.model(), create("plain")
    plains = [answer(model.base, plain, case) for case in cases]
    return any(comparison.differences for comparison in batch(model, method, cases, plains))
