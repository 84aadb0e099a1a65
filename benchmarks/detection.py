"""How often `verify` finds a planted fault, and how often it cries wolf.

    PYTHONPATH=tests python benchmarks/detection.py

Each fault of tests/faults.py is planted for 10 seeds, exact and fast; 20 runs are clean. Tiny random
models in bfloat16. The last line is JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from rich.progress import track

from selfdraft import LLM
from selfdraft.models.transformers import TransformersModel
from selfdraft.verify.verify import verify

from conftest import VOCABULARY, tiny_llama
from drafting import random_prompt
from faults import FAULTS


def main() -> None:
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    generators = {n: generator(TransformersModel(tiny_llama(torch.bfloat16), n)) for n in ("exact", "fast")}
    for seed in track(range(10), "planted faults"):
        for name, target in generators.items():
            for fault in FAULTS:
                with pytest.MonkeyPatch.context() as patch:
                    fault(patch)
                    found[f"{fault.__name__}, {name}"] += verdict(target, seed) == "broken"
    clean = [verdict(t, 1000 + i) for i in track(range(10), "clean runs") for t in generators.values()]
    record = {"found of 10": dict(found), "clean runs": Counter(clean)}
    for name, count in found.items():
        print(f"{name:25} {count}")
    print(json.dumps(record))


class Nothing:
    """Stands in for a tokenizer: prompts here are ids."""

    eos_token_id = None


def generator(model: TransformersModel) -> LLM:
    model.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    stand_in: Any = Nothing()
    return LLM(model, stand_in, "jacobi")


def verdict(target: LLM, seed: int) -> str:
    prompts = [random_prompt(15, 10 * seed + i, VOCABULARY) for i in range(2)]
    return verify(target, prompts, max_new_tokens=24, seeds=1, seed=seed).verdict


if __name__ == "__main__":
    main()
