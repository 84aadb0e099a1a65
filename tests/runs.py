"""Runs to compare."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from selfdraft import Engine, Method, Request, SamplingParams
from selfdraft.models.protocol import Model
from selfdraft.sampling.stopping import Stop

TOKENS = 40


def greedy(tokens: int = TOKENS, **others: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=tokens, seed=0, **others)


def sampled(temperature: float = 0.8, seed: int = 0, tokens: int = TOKENS, **others: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=tokens, temperature=temperature, seed=seed, **others)


def run(
    model: Model,
    method: Method,
    prompt: Sequence[int],
    params: SamplingParams | None = None,
    references: Sequence[Sequence[int]] = (),
    *,
    eos_ids: Collection[int] = (),
    stop: Stop | None = None,
) -> Request:
    """One request on an engine of its own, to its end."""
    engine = Engine(model)
    request = engine.submit(prompt, method, params or greedy(), references, eos_ids=eos_ids, stop=stop)
    for _ in engine.run(request):
        pass
    return request


def random_prompt(length: int, seed: int, vocabulary: int = 320) -> list[int]:
    return random.Random(seed).choices(range(2, vocabulary), k=length)


def script(path: str) -> ModuleType:
    """A script of the checkout, as a module. path: from the checkout's folder."""
    file = Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
