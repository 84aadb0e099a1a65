"""What transformers itself computes: its `generate`, and how far its logits move by rounding.

Neither uses our forward, cache or masks, so a fault of ours cannot hide in what it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..models.transformers import TransformersModel
from ..models.transformers_inputs import CACHE
from .compare import Case, Comparison, follow

TEXTS = 8  # texts on which rounding is measured, about


@torch.inference_mode()
def rounding(model: TransformersModel, texts: Sequence[Sequence[int]], texts_read: int = TEXTS) -> float:
    """The largest difference between transformers' logits of a token read with the whole text, and read
    one token at a time. Both are right, so two right answers may differ by as much; 0 where all bits agree.

    Measured on the texts that are compared, prompt and answer: on about `texts_read` of them, spread evenly.
    """
    with _own_attention(model):
        return max(_rounding_of(model, text) for text in texts[:: max(1, len(texts) // texts_read)])


def _rounding_of(model: TransformersModel, text: Sequence[int]) -> float:
    ids = torch.tensor([list(text)], device=model.device)
    whole = model.model(input_ids=ids, use_cache=False).logits[0]
    cache, alone = None, []
    for at in range(ids.shape[1]):
        out = model.model(input_ids=ids[:, at : at + 1], use_cache=True, **{CACHE: cache})
        cache = out[CACHE]
        alone.append(out.logits[0, -1])
    return float((whole - torch.stack(alone)).abs().max())


def generated(model: TransformersModel, case: Case, plain: Sequence[int]) -> Comparison:
    """Plain decoding's text against that of transformers' `generate`, greedy and with its cache."""

    def again(start: int) -> Sequence[int]:
        ids = torch.tensor([[*case.prompt, *plain[:start]]], device=model.device)
        settings = GenerationConfig(
            max_new_tokens=len(plain) - start,
            do_sample=False,
            eos_token_id=list(case.params.eos or ()) or None,
            pad_token_id=next(iter(case.params.eos or ()), 0),
        )
        with _own_attention(model):
            out = model.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return cast(Tensor, out)[0, ids.shape[1] :].tolist()

    return follow("generate", model, case, plain, again)


@contextmanager
def _own_attention(model: TransformersModel) -> Iterator[None]:
    """Run the model with the attention it came with, and without the defaults of its generation config,
    which may add logits processors that this comparison does not ask for."""
    config, model.model.generation_config = model.model.generation_config, GenerationConfig()
    try:
        with model.attending(model.own_attention):
            yield
    finally:
        model.model.generation_config = config
