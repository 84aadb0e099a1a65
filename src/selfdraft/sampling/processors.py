"""Logits to processed logits: penalties and filters, as functions of rows of logits.

Filters follow transformers' order (top-k, top-p, min-p) and cut by value, so that equal logits stay or go
together, whatever the shape of the tensor they come in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..params import SamplingParams

HEAD = 256
"""top-p looks among this many largest logits before it sorts all of them."""


def penalise(logits: Tensor, params: SamplingParams, counts: Tensor, seen: Tensor) -> Tensor:
    """Logits with the penalties for tokens that the text has already.

    logits: [rows, vocabulary]. counts: how often each token occurs in the answer before the row; seen:
    whether it occurs there or in the prompt; both [rows or 1, vocabulary].
    """
    repetition = params.repetition_penalty
    if repetition != 1:
        less = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(seen, less, logits)
    if params.presence_penalty or params.frequency_penalty:
        logits = logits - (params.frequency_penalty * counts + params.presence_penalty * counts.sign())
    return logits


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits of [rows, vocabulary] with the tokens at -inf that top_k, top_p and min_p exclude."""
    if 0 < params.top_k < logits.shape[-1]:
        floor = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -math.inf)
    if params.top_p < 1:
        logits = logits.masked_fill(logits < _nucleus(logits, params), -math.inf)
    if params.min_p > 0:
        floor = logits.amax(-1, keepdim=True) + params.temperature * math.log(params.min_p)
        logits = logits.masked_fill(logits < floor, -math.inf)
    return logits


def _nucleus(logits: Tensor, params: SamplingParams) -> Tensor:
    """Smallest logit of the nucleus, [rows, 1]: the tokens above it fall short of top_p.

    In float64, since sums of other rounding for one row than for several could move the edge.
    """
    total = (logits.double() / params.temperature).logsumexp(-1, keepdim=True)
    for count in (min(HEAD, logits.shape[-1]), logits.shape[-1]):
        largest = logits.topk(count).values
        reached = (largest.double() / params.temperature - total).exp().cumsum(-1) >= params.top_p
        if count == logits.shape[-1] or bool(reached[:, -1].all()):
            break
    last = torch.where(reached.any(-1), reached.int().argmax(-1), count - 1)
    return largest.gather(-1, last[:, None])
