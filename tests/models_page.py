"""docs/models.md: what the conformance tests see of each model type. `make models` writes the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.utils import logging

from selfdraft import Tree
from selfdraft.models import attention
from selfdraft.models.adapters.adapter import all_targets
from selfdraft.models.head import Tail
from selfdraft.models.transformers import TransformersModel

from architectures import REFUSED, WINDOW, WORKING, build

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def features(kind: str) -> str:
    """A row of the page: what was seen while the probe ran."""
    seen: set[str] = set()
    scores, read = attention._scores, attention._read

    def spy_scores(*args: Any) -> Tensor:
        seen.update(["capped scores"] if args[-1] is not None else [])
        return scores(*args)

    def spy_read(*args: Any) -> Tensor:
        seen.update(["sinks"] if args[2] is not None else [])
        return read(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_scores", spy_scores)
        patch.setattr(attention, "_read", spy_read)
        model = TransformersModel(build(kind, WORKING[kind]), "fast")
    kinds = {name.split("_")[0] or "sliding" if k.size else "full" for name, k in model.kinds.items()}
    head = "whole forward" if model._base is model.model else "output layer"
    if isinstance(model._head, Tail):
        head = "output layer and what follows it"
    lora = ", ".join(f"`{target}`" for target in all_targets(model.model))
    parts = [f"`{kind}`", ", ".join(sorted(kinds)), ", ".join(sorted(seen)), head, wide(kind), lora]
    return f"| {' | '.join(parts)} |"


def wide(kind: str) -> str:
    """Do its layers take keys in float64, as exact numerics need it?"""
    model = TransformersModel(build(kind, WORKING[kind], torch.float32), "fast")
    model.numerics = "exact"
    try:
        model.forward([Tree.chain(range(4))], [model.pool().open()])
    except RuntimeError:
        return "no"
    return "if the rows allow"


def refusal(kind: str) -> str:
    reason, extra = REFUSED[kind]
    why = {
        "keep a state": "layers that keep a running state",
        "does not verify a tree": "other logits than its own forward, silently",
        "does not take a tree": "its forward raises",
    }[reason]
    given = ", ".join(f"`{name}`" for name in extra if name in ("alibi",))
    return f"| `{kind}`{' with ' + given if given else ''} | {why} |"


def page() -> str:
    works = "\n".join(features(kind) for kind in sorted(WORKING))
    refused = "\n".join(refusal(kind) for kind in sorted(REFUSED))
    return TEMPLATE.format(
        version=transformers.__version__, count=len(WORKING), works=works, refused=refused, window=WINDOW
    )


TEMPLATE = """\
# Models

Written by `make models`; `make conformance` compares. transformers {version}.

Whether a model can be used is measured when it is loaded, not looked up: the logits of a tree of tokens
are compared with the model's own forward of its branches, and what differs is refused with the reason.
So a type that is missing here may well work. The {count} types of the first table were tried as tiny
random models, every weight moved, windows of {window} tokens, in float64: trees behind histories of
several windows, two requests together, branches kept and built upon, and a text.

- layers: whether they see all of the text (full), a sliding window or a chunk. Mixed types get one mask each.
- scores: capped (Gemma 2), and attention sinks (GPT-OSS).
- logits: from the rows asked for alone. "What follows" are scales, caps and such, by the model's own code.
- exact: whether exact numerics are possible, if at some number of rows every row keeps its bits; that is
  measured at load and differs by machine and dtype. "No": the layers compute with cached keys in the model's
  own dtype, by code of their own. Mixtures of experts change row counts by routing and often keep no bits.
- LoRA: linear layers that adapters can change for the rows of mask tokens (`train space --target`). With
  each type adapters were trained a step, with mask tokens, soft prefix and sampler head, and with LoRA on
  all these layers: every part learned, masks said the same in training and decoding, and a text drafted with
  them was the model's own.

| type | layers | scores | logits | exact | LoRA |
|---|---|---|---|---|---|
{works}

Types that were tried and are refused:

| type | why |
|---|---|
{refused}
"""


if __name__ == "__main__":
    logging.set_verbosity_error()
    PAGE.write_text(page())
