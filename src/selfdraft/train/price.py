"""What tuning costs: how the tuned model's text differs from the base's, on held-out prompts.

A tuned model says other things than its base; a draft method that needs one has a price, and it is stated.
The loss on what people wrote says how good a model of language is left; where the two models' likeliest
tokens agree says how far it went; and the share of text behind the first repetition says whether it began to
loop, which speeds drafting up and is worth nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .._common.repetition import fresh
from ..drafting import create
from ..drafting.method import Method
from ..engine.engine import Engine
from ..engine.request import Limits, Request
from ..models.transformers import TransformersModel


@dataclass(frozen=True)
class Price:
    """loss: nats per token of the prompts. agreement: share of places in them where both models' likeliest
    tokens are the same. repeated: share of the tokens of greedy answers behind the first repetition. Each of
    the base and of the tuned model."""

    tokens: int
    loss: tuple[float, float]
    agreement: float
    repeated: tuple[float, float]


def price(
    base: TransformersModel, tuned: TransformersModel, prompts: Iterable[Sequence[int]], limits: Limits
) -> Price:
    """Measured on prompts of token ids."""
    sums, same, count = [0.0, 0.0], 0, 0
    texts = [list(prompt) for prompt in prompts]
    for text in texts:
        if len(text) < 2:
            continue
        told = torch.tensor(text[1:], device=base.device)
        logits = [model.reference(text)[:-1].float() for model in (base, tuned)]
        for i, own in enumerate(logits):
            sums[i] += float(torch.nn.functional.cross_entropy(own, told, reduction="sum"))
        same += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        count += len(told)
    return Price(
        count,
        (sums[0] / max(1, count), sums[1] / max(1, count)),
        same / max(1, count),
        (_repeated(base, texts, limits), _repeated(tuned, texts, limits)),
    )


def answered(
    model: TransformersModel, method: Method, prompts: Iterable[Sequence[int]], limits: Limits
) -> list[Request]:
    """Requests with greedy answers to prompts, all at once."""
    engine = Engine(model)
    requests = [engine.submit(prompt, method, limits=limits) for prompt in prompts]
    while engine.requests:
        engine.step()
    return requests


def _repeated(model: TransformersModel, prompts: Sequence[Sequence[int]], limits: Limits) -> float:
    answers = [list(one.emitted) for one in answered(model, create("plain"), prompts, limits)]
    return 1 - sum(fresh(answer) for answer in answers) / max(1, sum(map(len, answers)))
