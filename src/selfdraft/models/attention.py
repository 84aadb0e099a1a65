"""Attention over the static buffers, through transformers' attention interface.

Two things differ from transformers' own SDPA path. Grouped query heads are folded into rows, so that
keys and values are never repeated. And the computation runs in the dtype of the keys: the buffers of
exact mode hold float64, in which the order of the keys no longer survives rounding to the model's
dtype, so that a row's bits do not depend on where its ancestors lie.

Capped scores and attention sinks, which SDPA lacks, are computed step by step, from the same folded rows; so
is attention with gradients on a CPU.

A model that transformers itself drives (`model.generate`, training) works with it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from ..errors import ModelUnsupported

NAME = "selfdraft"
FOLD = 32  # rows up to which folding the heads pays on a CPU (docs/LOG.md); on CUDA it always does


@contextmanager
def keeping(model: PreTrainedModel) -> Iterator[None]:
    """Leave a model with the attention implementation that it has now, whatever drives it meanwhile."""
    own = model.config._attn_implementation
    try:
        yield
    finally:
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **extra: Any,
) -> tuple[Tensor, None]:
    """query: [batch, heads, rows, dim]; key, value: [batch, kv_heads, slots, dim]; attention_mask:
    additive or bool [batch, 1, rows, slots], None is causal. extra: softcap, a bound of the scores; s_aux,
    [heads], the scores of the sinks. Returns [batch, rows, heads, dim]."""
    if extra.get("position_bias") is not None:
        raise ModelUnsupported("its attention adds a bias by position, which is not supported")
    softcap, sinks = extra.get("softcap"), extra.get("s_aux")
    dtype = query.dtype
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    query = query.to(key.dtype)
    # On a CPU the gradients of SDPA's fused kernel take twice the time of the products themselves.
    learns = query.requires_grad and not query.is_cuda
    if softcap is not None or sinks is not None or learns:
        scores = _scores(query, key, attention_mask, scaling, softcap)
        out = _read(scores, value, sinks, dropout)
    elif attention_mask is None or (rows > FOLD and not key.is_cuda):
        causal = attention_mask is None and rows > 1
        out = scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, causal, scale=scaling, enable_gqa=groups > 1
        )
    else:
        folded = query.reshape(batch, key.shape[1], groups * rows, dim)
        mask = attention_mask.repeat(1, 1, groups, 1) if rows > 1 else attention_mask
        out = scaled_dot_product_attention(folded, key, value, mask, dropout, scale=scaling)
        out = out.reshape(batch, heads, rows, value.shape[-1])
    return out.transpose(1, 2).to(dtype).contiguous(), None


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """[batch, heads, rows, slots], capped and masked."""
    batch, heads, rows, dim = query.shape
    folded = query.reshape(batch, key.shape[1], -1, dim) @ key.transpose(2, 3)
    scores = folded.reshape(batch, heads, rows, -1) * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        slots = scores.shape[-1]
        mask = torch.ones(rows, slots, dtype=torch.bool, device=scores.device).tril(slots - rows)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def _read(scores: Tensor, value: Tensor, sinks: Tensor | None, dropout: float) -> Tensor:
    """What the rows read, [batch, heads, rows, dim]. A sink is one more score in each head's softmax,
    behind which there is no value."""
    batch, heads, rows, slots = scores.shape
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(batch, -1, rows, 1)
        scores = torch.cat([scores, sink], -1)
    least = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=least)[..., :slots].to(value.dtype)
    weights = torch.dropout(weights, dropout, train=dropout > 0)
    out = weights.reshape(batch, value.shape[1], -1, slots) @ value
    return out.reshape(batch, heads, rows, value.shape[-1])


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
