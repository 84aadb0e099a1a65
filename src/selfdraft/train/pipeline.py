"""How the early readouts of a looped model fare when it decodes: what `speed` gains, and what it revises.

`exits` measures agreement on given text. Here the model continues held-out windows itself, greedily, each
token starting on the pick after the first pass, as published. Answers count whole: one that repeats itself is
easy to draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..drafting.acceptance import DraftCount, added
from ..drafting.speed import Speed
from ..engine.engine import Engine
from ..models import attention
from ..models.looped.decoder import LoopedForCausalLM
from ..models.looped.stages import StagedModel
from ..params import SamplingParams
from .exits import evaluating
from .windows import IDS, spread

PROMPTS = 16  # windows that are continued
PROMPT, TOKENS = 32, 64  # tokens of each that are given, and that are added


@dataclass(frozen=True)
class Pipeline:
    """What was seen while it decoded."""

    prompts: int
    tokens: int
    tokens_per_forward: float
    # By early pass: share of the tokens for which its pick was the final one.
    agreement: list[float]
    # Tokens that started on an early pick, and the share of them that was flushed.
    started: int
    flushed: float


def decode(model: LoopedForCausalLM, rows: Any) -> Pipeline:
    """Continue windows with `speed`. The model must have more than one pass. Raises SelfdraftError if it does
    not decode, as with weights that are not finite."""
    chosen = rows.select(spread(len(rows), PROMPTS))
    sources: dict[str, DraftCount] = {}
    readouts: dict[str, DraftCount] = {}
    tokens, forwards = 0, 0.0
    with evaluating(model), attention.keeping(model), torch.inference_mode():
        engine = Engine(StagedModel(model, "fast"))
        for row in chosen:
            context = engine.model.context
            prompt = row[IDS][: min(PROMPT, context - 1)]
            room = context - len(prompt)
            request = engine.submit(
                prompt, Speed(spawn=1), SamplingParams(max_new_tokens=min(TOKENS, room), ignore_eos=True)
            )
            for _ in engine.run(request):
                pass
            tokens, forwards = tokens + request.added, forwards + request.forwards
            sources, readouts = added(sources, request.sources), added(readouts, request.readouts)
    total = sum(sources.values(), DraftCount())
    return Pipeline(
        len(chosen),
        tokens,
        round(tokens / forwards, 3),
        [round(count.accepted / count.drafted, 4) for count in readouts.values()],
        total.drafted,
        round(1 - total.accepted / max(1, total.drafted), 4),
    )
