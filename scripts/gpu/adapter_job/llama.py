"""The forward of a Llama in plain torch, for training and sampling on a GPU, with the weights of the
package's model.

It is cut where its matrix products end: `enter` (norm, q/k/v, rotation) and `leave` (output, MLP) work on
flat rows, so `torch.compile` sees two functions with static shapes, whatever attention happens between them.
LoRA is an argument of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from selfdraft.models.adapters.adapter import Adapter

PRODUCTS = {  # by product the linear layers that it holds, one below the other
    "into": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
Lora = dict[str, list[tuple[Tensor, Tensor] | int]]
"""By product, for each of its layers a [rank, in] and b [out, rank], or the size of the output if it has
none."""


class Layer(NamedTuple):
    """Weights, [out, in]."""

    norm1: Tensor
    into: Tensor
    out: Tensor
    norm2: Tensor
    up: Tensor
    down: Tensor


class Text(NamedTuple):
    """Texts that were read."""

    hidden: Tensor
    """[lanes, length, hidden]"""
    pairs: list[tuple[Tensor, Tensor]]
    """By layer keys and values, [lanes, kv_heads, length, size]."""


@dataclass(frozen=True)
class Llama:
    """heads, kv_heads, size: of attention. head: [vocabulary, hidden]. frequencies: of the rotation, [size /
    2]."""

    layers: list[Layer]
    embedding: Tensor
    head: Tensor
    norm: Tensor
    heads: int
    kv_heads: int
    size: int
    eps: float
    frequencies: Tensor
    compiled: tuple[Any, Any] | None = None

    @staticmethod
    def of(model: Any) -> Llama:
        """The forward of a transformers model. Raises ValueError for another family than llama."""
        config = model.config
        if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
            raise ValueError(f"{config.model_type}: the job trains models of the type llama without biases")
        layers = []
        for layer in model.model.layers:
            parts = {
                name: torch.cat([layer.get_submodule(one).weight.detach() for one in own])
                for name, own in PRODUCTS.items()
            }
            norms = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()
            layers.append(Layer(norms[0], parts["into"], parts["out"], norms[1], parts["up"], parts["down"]))
        return Llama(
            layers,
            model.get_input_embeddings().weight.detach(),
            model.get_output_embeddings().weight.detach(),
            model.model.norm.weight.detach(),
            config.num_attention_heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            config.rms_norm_eps,
            model.model.rotary_emb.inv_freq.float(),
        )

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def with_compiled(self) -> Llama:
        """With row functions that are compiled: for the first number of rows, then once for all others."""
        torch._dynamo.config.recompile_limit = 64  # with and without gradients and LoRA
        return replace(self, compiled=(torch.compile(enter), torch.compile(leave)))

    def lora(self, adapter: Adapter) -> list[Lora] | None:
        """By layer what an adapter adds, in the model's dtype; None if nothing."""
        if not adapter.names:
            return None
        low = {
            name: (one.a.to(self.dtype), (adapter.config.scale * one.b).to(self.dtype))
            for name, one in zip(adapter.names, adapter.lora, strict=True)
        }
        sizes = {"self_attn.k_proj": self.kv_heads * self.size, "self_attn.v_proj": self.kv_heads * self.size}

        def part(layer: int, product: str, name: str) -> tuple[Tensor, Tensor] | int:
            whole, count = getattr(self.layers[layer], product), len(PRODUCTS[product])
            rows = sizes.get(name, self.heads * self.size if product == "into" else len(whole) // count)
            return low.get(f"model.layers.{layer}.{name}", rows)

        return [
            {product: [part(layer, product, name) for name in own] for product, own in PRODUCTS.items()}
            for layer in range(len(self.layers))
        ]

    def run(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        lora: list[Lora] | None = None,
    ) -> Tensor:
        """Hidden states of embedded rows, [lanes, rows, hidden]. positions: [lanes * rows]. attend: of a
        layer and its q, k, v, [lanes, rows, heads, size], to [lanes, rows, heads * size]."""
        first, last = self.compiled or (enter, leave)
        lanes, rows, width = x.shape
        angles = positions.view(-1, 1, 1).float() * self.frequencies
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        x = x.reshape(lanes * rows, width)
        split = [self.heads, self.kv_heads, self.kv_heads]
        for i, layer in enumerate(self.layers):
            more = lora[i] if lora else None
            qkv = first(x, layer.norm1, layer.into, cos, sin, split[0] + split[1], self.size, self.eps, more)
            q, k, v = qkv.view(lanes, rows, -1, self.size).split(split, 2)
            mixed = attend(i, q, k, v).reshape(lanes * rows, -1)
            x = last(x, mixed, layer.out, layer.norm2, layer.up, layer.down, self.eps, more)
        return rms_norm(x, (width,), self.norm, self.eps).view(lanes, rows, -1)

    def read(self, ids: Tensor, lora: list[Lora] | None = None) -> Text:
        """Texts, [lanes, length], padded at the end: no token sees a pad, since attention is causal."""
        pairs: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            pairs.append((k, v))
            k, v = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

        at = torch.arange(ids.shape[1], device=self.device).repeat(len(ids))
        return Text(self.run(self.embedding[ids], at, attend, lora), pairs)


def enter(
    x: Tensor,
    norm: Tensor,
    into: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotated: int,
    size: int,
    eps: float,
    lora: Lora | None,
) -> Tensor:
    """q, k and v of flat rows, [rows, heads of all three, size]; the first `rotated` heads are rotated."""
    x = rms_norm(x, (x.shape[-1],), norm, eps)
    out = linear(x, into) if lora is None else linear(x, into) + added(x, lora["into"])
    out = out.view(len(x), -1, size)
    a, b = out[:, :rotated].chunk(2, -1)
    return torch.cat([torch.cat([a * cos - b * sin, b * cos + a * sin], -1), out[:, rotated:]], 1)


def leave(
    x: Tensor,
    mixed: Tensor,
    out: Tensor,
    norm: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    lora: Lora | None,
) -> Tensor:
    """Flat rows after attention and MLP."""
    x = x + (linear(mixed, out) if lora is None else linear(mixed, out) + added(mixed, lora["out"]))
    y = rms_norm(x, (x.shape[-1],), norm, eps)
    both = linear(y, up) if lora is None else linear(y, up) + added(y, lora["up"])
    gate, value = both.chunk(2, -1)
    y = silu(gate) * value
    return x + (linear(y, down) if lora is None else linear(y, down) + added(y, lora["down"]))


def added(x: Tensor, parts: list[tuple[Tensor, Tensor] | int]) -> Tensor:
    """What LoRA adds to a product of flat rows."""
    return torch.cat(
        [
            x.new_zeros(len(x), part) if isinstance(part, int) else linear(linear(x, part[0]), part[1])
            for part in parts
        ],
        -1,
    )


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention with an additive mask, [lanes, 1, groups * rows, slots]; query heads of a group are folded
    into rows. q: [lanes, heads, rows, size]."""
    folded = q.reshape(len(q), k.shape[1], -1, q.shape[-1])
    return scaled_dot_product_attention(folded, k, v, mask).reshape(q.shape)
