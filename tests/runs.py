"""Runs to compare."""

from __future__ import annotations

import random
from collections.abc import Sequence

from selfdraft import Engine, Limits, Method, Request, Sampler
from selfdraft.models.protocol import Model


def run(
    model: Model,
    method: Method,
    prompt: Sequence[int],
    sampler: Sampler | None = None,
    limits: Limits | None = None,
    references: Sequence[Sequence[int]] = (),
) -> Request:
    """One request on an engine of its own, to its end."""
    engine = Engine(model)
    request = engine.submit(prompt, method, sampler, limits or Limits(40), references)
    for _ in engine.run(request):
        pass
    return request


def random_prompt(length: int, seed: int, vocabulary: int = 320) -> list[int]:
    return random.Random(seed).choices(range(2, vocabulary), k=length)
