"""Filters == transformers' own; equal logits stay or go together, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from selfdraft import SamplingParams
from selfdraft.sampling.processors import HEAD, filtered


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.3, "top_p": 0.999},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 300, "top_p": 0.95, "min_p": 0.001},
    ],
)
def test_filters_are_those_of_transformers(options: dict[str, float]) -> None:
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(0)) * 3
    chain = LogitsProcessorList([TemperatureLogitsWarper(options["temperature"])])
    if "top_k" in options:
        chain.append(TopKLogitsWarper(int(options["top_k"])))
    if "top_p" in options:
        chain.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        chain.append(MinPLogitsWarper(options["min_p"]))
    theirs = chain(torch.zeros(6, 1, dtype=torch.long), logits.clone())
    ours = filtered(logits, SamplingParams.read(options)) / options["temperature"]
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours.clamp(min=-99), theirs.clamp(min=-99), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.01}])
def test_a_row_is_filtered_as_it_is_alone(options: dict[str, float]) -> None:
    """With many ties: those at the edge stay, so that no order decides."""
    logits = torch.randn(9, 400, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    params = SamplingParams.read({"temperature": 0.8, **options})
    whole = filtered(logits, params)
    assert torch.equal(torch.cat([filtered(row[None], params) for row in logits]), whole)
    kept = whole.isfinite()
    edge = whole.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
    assert torch.equal(kept, logits >= edge)


def test_a_nucleus_may_be_wider_than_what_is_looked_at_first() -> None:
    logits = torch.zeros(1, 4 * HEAD).index_fill(1, torch.arange(HEAD), 1e-3)
    kept = filtered(logits, SamplingParams(temperature=1.0, top_p=0.9)).isfinite()
    assert int(kept.sum()) == 4 * HEAD, "equal logits stay together"
