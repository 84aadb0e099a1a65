"""What tuning costs: how the text of a tuned model differs from that of its base, on held-out prompts.

A method that tunes the weights changes the text, so the change is measured: the loss on the prompts (how good
a language model is left), how often both models have the same most likely token, and the share of generated
tokens after the first repetition. A model that begins to loop is drafted faster, but its text is worthless.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .._common.repetition import fresh
from ..drafting import create
from ..drafting.method import Method
from ..engine.engine import Engine
from ..engine.request import Request
from ..engine.scheduler import Limits
from ..models.transformers import TransformersModel
from ..params import SamplingParams


@dataclass(frozen=True)
class TuningCost:
    """Pairs are of the base and of the tuned model."""

    # Tokens of the prompts that were measured.
    tokens: int
    # Mean loss on the prompts, in nats per token.
    loss: tuple[float, float]
    # Share of the positions at which both models have the same most likely token.
    agreement: float
    # Share of the tokens of greedy answers that come after the first repetition.
    repeated: tuple[float, float]


def measure(
    base: TransformersModel,
    tuned: TransformersModel,
    prompts: Iterable[Sequence[int]],
    params: SamplingParams,
) -> TuningCost:
    """Compare two models on prompts of token ids."""
    sums, same, count = [0.0, 0.0], 0, 0
    texts = [list(prompt) for prompt in prompts]
    for text in texts:
        if len(text) < 2:
            continue
        labels = torch.tensor(text[1:], device=base.device)
        logits = [model.reference(text)[:-1].float() for model in (base, tuned)]
        for i, own in enumerate(logits):
            sums[i] += float(torch.nn.functional.cross_entropy(own, labels, reduction="sum"))
        same += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        count += len(labels)
    return TuningCost(
        count,
        (sums[0] / max(1, count), sums[1] / max(1, count)),
        same / max(1, count),
        (_repeated(base, texts, params), _repeated(tuned, texts, params)),
    )


def answer_all(
    model: TransformersModel,
    method: Method,
    prompts: Iterable[Sequence[int]],
    params: SamplingParams,
    limits: Limits | None = None,
) -> list[Request]:
    """Finished requests with greedy answers to all prompts, decoded as one batch. limits: of the engine."""
    engine = Engine(model, limits)
    requests = [engine.submit(prompt, method, params) for prompt in prompts]
    while engine.requests:
        engine.step()
    return requests


def _repeated(model: TransformersModel, prompts: Sequence[Sequence[int]], params: SamplingParams) -> float:
    answers = [list(one.emitted) for one in answer_all(model, create("plain"), prompts, params)]
    return 1 - sum(fresh(answer) for answer in answers) / max(1, sum(map(len, answers)))
