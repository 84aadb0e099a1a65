"""The student: an adapter that is trained on the kind of trees that it will draft in.

A sequence is a tree: the text as a chain, with a group of mask tokens under each anchor. It uses the layout
and the attention masks of decoding (`models.transformers_inputs`), so a mask row sees the same in training
and in decoding. The text runs first, without gradients, and leaves its keys and values; its hidden states
give the model's own distribution at the target positions. Then the mask rows run. Only they have gradients,
so nothing is stored for the frozen weights.

The loss of a mask is a cross-entropy, either with the next token (as both papers publish) or with the model's
own distribution (distillation, as in PPD, arXiv 2405.18628, section 4). Its weight is decay ** offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any, Literal, cast

import torch
import transformers
from annotated_types import Gt, Le
from torch import Tensor

from ..engine.tree import Tree
from ..errors import AdapterError
from ..models import transformers_inputs
from ..models.adapters import folder as adapter_folder
from ..models.adapters.adapter import Adapter, AdapterConfig, all_targets, linear_layers
from ..models.kv_cache import Pair
from ..models.transformers import TransformersModel

IGNORED = -100  # the label of a mask without a target


@dataclass(frozen=True)
class Loss:
    """The loss of mask tokens."""

    # The target: the model's own distribution (distill) or the next token (tokens).
    kind: Literal["distill", "tokens"] = "distill"
    # Weight of each offset relative to the one before.
    decay: Annotated[float, Gt(0), Le(1)] = 0.9


def fresh(model: TransformersModel, config: AdapterConfig, seed: int = 0) -> Adapter:
    """An untrained adapter. Embeddings are near the mean, prefix keys as large as the model's own, prefix
    values small; LoRA and sampler head change nothing yet. Raises AdapterError if a part does not fit the
    model."""
    torch.manual_seed(seed)
    embedding = cast(torch.nn.Module, model.model.get_input_embeddings())
    sample = torch.randint(model.vocab_size, (1, min(64, model.context)), device=model.device)
    with torch.no_grad():
        own = embedding(sample)[0].float()
    hidden = getattr(model.model.config.get_text_config(), "hidden_size", model.width)
    if config.sampler and hidden != model.width:
        raise AdapterError(
            f"{model.name}: hidden states of size {hidden}, embeddings of {model.width}; a sampler head "
            "needs one size for both: train without one"
        )
    if config.rank and not config.targets:
        config = replace(config, targets=all_targets(model.model))
    layers = linear_layers(model.model, config.targets if config.rank else ())
    pairs = model.read(sample[0].tolist())
    adapter = Adapter(config, model.width, pairs, layers).to(model.device)
    with torch.no_grad():
        adapter.masks.copy_(own.mean(0) + 0.1 * own.std(0) * torch.randn_like(adapter.masks))
        for i, layer in adapter.kept.items():
            keys, values = cast(Pair, pairs[i])
            adapter.keys[layer].copy_(torch.randn_like(adapter.keys[layer]) * keys.float().std())
            adapter.values[layer].copy_(torch.randn_like(adapter.values[layer]) * values.float().std() * 0.1)
    return adapter


def started(source: str | None, model: TransformersModel, config: AdapterConfig) -> Adapter | None:
    """The adapter to start from, if any, ready to be trained. Its base may be other weights of the same
    shapes, such as an earlier state of the model. Raises AdapterError for an adapter of another kind than the
    config."""
    if source is None:
        return None
    adapter = adapter_folder.load(source, model, bound=False)
    if _kind(adapter.config) != _kind(config):
        raise AdapterError(
            f"start: {source} is an adapter of another kind ({_kind(adapter.config)}) than is trained here "
            f"({_kind(config)}); give one that the same command made"
        )
    return adapter.float().requires_grad_()


def _kind(config: AdapterConfig) -> str:
    """The parts of an adapter, in words."""
    lora = f"LoRA {'gated to masks' if config.gated else 'on all rows'}"
    there = {"masks": config.masks, "a prefix": config.prefix, lora: config.rank}
    return ", ".join(name for name, count in there.items() if count)


def anchored(text: Sequence[int], anchors: Sequence[int], group: Sequence[int]) -> Tree:
    """The tree of one sequence: `group` is added under each row of the text that is an anchor."""
    first, size = len(text), len(group)
    starts = range(first, first + size * len(anchors), size)
    hung = ((anchor, *range(at, at + size - 1)) for anchor, at in zip(anchors, starts, strict=True))
    tokens = (*text, *tuple(group) * len(anchors))
    return Tree(tokens, (*range(-1, first - 1), *chain.from_iterable(hung)))


class Tape(transformers.Cache):
    """The KV cache of one training forward: the adapter's prefix, the rows of the first call, which it keeps,
    and the rows of a later call."""

    def __init__(self, adapter: Adapter | None) -> None:
        super().__init__(layers=[])
        self.pairs = adapter.pairs() if adapter is not None else []
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        before = [self.kept[layer_idx]] if layer_idx in self.kept else []
        pair = self.pairs[layer_idx] if layer_idx < len(self.pairs) else None
        if pair is not None:
            lanes = key_states.shape[0]
            fixed = [part.to(key_states.dtype).expand(lanes, -1, -1, -1) for part in pair]
            before.insert(0, (fixed[0], fixed[1]))
        if layer_idx not in self.kept:
            self.kept[layer_idx] = key_states, value_states
        return (
            torch.cat([*(keys for keys, _ in before), key_states], 2),
            torch.cat([*(values for _, values in before), value_states], 2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Student(torch.nn.Module):
    """An adapter in its model, and the loss. Its only parameters are the adapter's."""

    def __init__(self, model: TransformersModel, adapter: Adapter, loss: Loss) -> None:
        super().__init__()
        self.adapter = adapter
        self.loss = loss
        self._model = [model.adapted(adapter)]  # in a list, so that the frozen weights are not registered

    @property
    def model(self) -> TransformersModel:
        return self._model[0]

    def dense(self) -> list[torch.nn.Parameter]:
        """Parameters of LoRA and sampler head; the others are embeddings and prefixes."""
        parts: list[torch.nn.Module | None] = [self.adapter.lora, self.adapter.sampler]
        return [one for part in parts if part is not None for one in part.parameters()]

    def forward(self, ids: Tensor, anchors: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss, and for each mask whether its first candidate is the model's pick.

        ids: [lanes, length], of text. anchors: [lanes, groups], rows of it. labels: [lanes, groups, masks],
        the target tokens, IGNORED if there is none. hits: [lanes, groups, masks], 1, 0, or IGNORED.
        """
        scores, own = self.scores(ids, anchors)
        size, flat = labels.shape[-1], labels.flatten()
        weights = (self.loss.decay ** torch.arange(size, device=ids.device)).repeat(len(flat) // size)
        weights = weights * (flat != IGNORED)
        aim = flat.clamp(min=0) if self.loss.kind == "tokens" else own.softmax(-1)
        each = torch.nn.functional.cross_entropy(scores, aim, reduction="none")
        hits = (scores.argmax(-1) == own.argmax(-1)).long().masked_fill(flat == IGNORED, IGNORED)
        loss = (each * weights).sum() / weights.sum().clamp(min=1e-6)
        return {"loss": loss, "hits": hits.view(labels.shape)}

    def scores(self, ids: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all masks, and the model's own at their positions, without gradients; float32,
        [lanes * groups * masks, vocabulary]."""
        text, masks = self.hidden(ids, anchors)
        lanes = torch.arange(len(ids), device=ids.device)[:, None, None]
        true = anchors[..., None] + 1 + torch.arange(self.adapter.config.masks, device=ids.device)
        with torch.no_grad():
            own = self.model.output(text[lanes, true.clamp(max=ids.shape[1] - 1)].flatten(0, 2)).float()
        before = ids[lanes, true.clamp(max=ids.shape[1] - 1)].flatten()
        return self.model.output(self.model.apply_sampler_head(masks.flatten(0, 1), before)).float(), own

    def hidden(self, ids: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the text, [lanes, length, hidden], without gradients, and of the mask rows,
        [lanes, groups * masks, hidden]."""
        model, length = self.model, ids.shape[1]
        assert model.lookahead is not None
        group = tuple(model.lookahead.ids)
        pairs = zip(ids.tolist(), anchors.tolist(), strict=True)
        trees = [anchored(text, where, group) for text, where in pairs]
        width, fixed = len(trees[0]), self.adapter.config.prefix
        laid = model.layout(trees, [0] * len(trees), width, fixed + width)
        made = transformers_inputs.kind_masks(model.kinds, laid.seen, laid.positions, fixed)
        tape = Tape(self.adapter)
        with torch.no_grad():
            seen = {name: mask[..., : fixed + length] for name, mask in made.items()}
            text = model.call(laid, seen, tape, 0, length)
        return text, model.call(laid, made, tape, length, width)
