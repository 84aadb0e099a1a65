"""The student: an adapter that is trained on the kind of trees that it will draft in.

A sequence is a tree: the text as a chain, with a group of mask tokens under each anchor. It uses the layout
and the attention masks of decoding (`models.transformers_inputs`), so a mask row sees the same in training
and in decoding. The text runs first, without the adapter and without gradients, and leaves its keys and
values; its hidden states give the model's own distribution at the target positions, once for all masks that
aim there. Then the mask rows run, some groups at a time behind the text that they see. Only they have
gradients, so nothing is stored for the frozen weights.

The loss of a mask is a cross-entropy, either with the next token (as both papers publish) or with the model's
own distribution (distillation, as in PPD, arXiv 2405.18628, section 4). Its weight is decay ** offset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any, Literal, cast

import torch
import transformers
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from ..engine.tree import Tree
from ..errors import AdapterError
from ..models import transformers_inputs
from ..models.adapters import folder as adapter_folder
from ..models.adapters.adapter import Adapter, AdapterConfig, all_targets, linear_layers
from ..models.kv_cache import Pair
from ..models.transformers import TransformersModel

IGNORED = -100  # the label of a mask without a target
PIECE = (64, 8192)  # rows of logits at a time, on a CPU, in whose cache they stay, and elsewhere
ROWS = (512, 16384)  # of masks in one forward, on a CPU and elsewhere


@dataclass(frozen=True)
class Loss:
    """The loss of mask tokens."""

    # The target: the model's own distribution (distill) or the next token (tokens).
    kind: Literal["distill", "tokens"] = "distill"
    # Weight of each offset relative to the one before.
    decay: Annotated[float, Gt(0), Le(1)] = 0.9
    # Share of the soft prefix's values that are left out at random in each forward.
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0


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
    """The KV cache of one training forward: the adapter's prefix, and the rows of the first call, which it
    keeps for later calls."""

    def __init__(self, adapter: Adapter | None, dropout: float = 0.0) -> None:
        super().__init__(layers=[])
        self.pairs = adapter.pairs() if adapter is not None else []
        self.dropout = dropout  # of the prefix
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def behind(self, text: Tape, length: int) -> Tape:
        """This tape behind the first rows of a text that has run."""
        self.kept = {layer: (k[:, :, :length], v[:, :, :length]) for layer, (k, v) in text.kept.items()}
        return self

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        before = [self.kept[layer_idx]] if layer_idx in self.kept else []
        pair = self.pairs[layer_idx] if layer_idx < len(self.pairs) else None
        if pair is not None:
            lanes = key_states.shape[0]
            fixed = [
                torch.nn.functional.dropout(part.to(key_states.dtype), self.dropout).expand(lanes, -1, -1, -1)
                for part in pair
            ]
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
        hits = torch.full_like(labels, IGNORED)
        known = labels[..., 0] != IGNORED
        used = known.any(0)
        used[0] = True
        first = anchors.masked_fill(~known, ids.shape[1] - 1).amin(1, keepdim=True)
        anchors = torch.where(known, anchors, first)[:, used]
        labels = labels[:, used]
        text, masks = self.hidden(ids, anchors)
        states = self.model.apply_sampler_head(masks.flatten(0, 1), self._told(ids, anchors))
        shares, aims = self._own(text, anchors)
        told = labels.flatten()
        weights = self.loss.decay ** torch.arange(labels.shape[-1], device=ids.device)
        weights = weights.expand(labels.shape).flatten() * (told != IGNORED)
        weights = weights / weights.sum().clamp(min=1e-6)
        targets = None if self.loss.kind == "distill" else told.clamp(min=0)
        loss, best = cross_entropy(states, self.model.output, weights, shares, aims, targets)
        right = (best == shares.argmax(-1)[aims]).long().masked_fill(told == IGNORED, IGNORED)
        hits[:, used] = right.view(labels.shape)
        return {"loss": loss, "hits": hits}

    def scores(self, ids: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all masks, and the model's own at their positions, without gradients; float32,
        [lanes * groups * masks, vocabulary]."""
        text, masks = self.hidden(ids, anchors)
        states = self.model.apply_sampler_head(masks.flatten(0, 1), self._told(ids, anchors))
        lane, true = self._places(text, anchors)
        with torch.no_grad():
            own = self.model.output(text[lane, true].flatten(0, 2)).float()
        return self.model.output(states).float(), own

    @torch.no_grad()
    def as_decoded(self, ids: Tensor, anchors: Tensor) -> Tensor:
        """Logits of all masks as in decoding, where the sampler head sees the text's token at the first mask
        of a group, and the prediction of the mask before at the others. As `scores`, of the ids that the
        masks predict."""
        _, masks = self.hidden(ids, anchors)
        size = self.adapter.config.masks
        before, made = self._told(ids, anchors)[::size], []
        for states in masks.view(-1, size, masks.shape[-1]).unbind(1):
            states = self.model.apply_sampler_head(states, before)
            made.append(self.model.drafted(self.model.output(states)).float())
            before = made[-1].argmax(-1)
            if self.adapter.vocabulary is not None:
                before = self.adapter.vocabulary.to(before.device)[before].long()
        return torch.stack(made, 1).flatten(0, 1)

    def hidden(self, ids: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the text, [lanes, length, hidden], without gradients, as far as masks aim, and of
        the mask rows, [lanes, groups * masks, hidden]."""
        masks, lanes = self.adapter.config.masks, len(ids)
        length = min(ids.shape[1], int(anchors.max()) + masks + 1)
        text, tape = self._read(ids[:, :length])
        groups = max(1, ROWS[ids.device.type != "cpu"] // (lanes * masks))
        hung = [self._hung(ids, part, tape) for part in anchors.split(groups, 1)]
        return text, torch.cat(hung, 1)

    @torch.no_grad()
    def _read(self, ids: Tensor) -> tuple[Tensor, Tape]:
        """Hidden states of a text without the adapter, and its keys and values."""
        base, tape = self.model.base, Tape(None)
        length = ids.shape[1]
        laid = base.layout([Tree.chain(text) for text in ids.tolist()], [0] * len(ids), length, length)
        made = transformers_inputs.kind_masks(base.kinds, laid.seen, laid.positions)
        return base.call(laid, made, tape, 0, length), tape

    def _hung(self, ids: Tensor, anchors: Tensor, text: Tape) -> Tensor:
        """Hidden states of the masks of some groups, [lanes, groups * masks, hidden].

        They are laid out as in decoding: behind a history up to the first anchor in trees of the rest of the
        text that they see, and of the groups, which alone are run.
        """
        model = self.model
        assert model.lookahead is not None
        group, fixed = tuple(model.lookahead.ids), self.adapter.config.prefix
        start, stop = int(anchors.min()), int(anchors.max()) + 1
        pairs = zip(ids[:, start:stop].tolist(), (anchors - start).tolist(), strict=True)
        trees = [anchored(rows, where, group) for rows, where in pairs]
        width = len(trees[0])
        laid = model.layout(trees, [start] * len(trees), width, fixed + start + width)
        made = transformers_inputs.kind_masks(model.kinds, laid.seen, laid.positions, fixed)
        tape = Tape(self.adapter, self.loss.dropout if self.training else 0.0).behind(text, stop)
        return model.call(laid, made, tape, stop - start, width)

    def _places(self, text: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Lane, and the row of the text whose pick a mask is to predict, [lanes, groups, masks]."""
        true = anchors[..., None] + 1 + torch.arange(self.adapter.config.masks, device=anchors.device)
        lane = torch.arange(len(anchors), device=anchors.device)[:, None, None]
        return lane, true.clamp(max=text.shape[1] - 1)

    def _told(self, ids: Tensor, anchors: Tensor) -> Tensor:
        """The token before the one that each mask predicts, [lanes * groups * masks]."""
        return ids[self._places(ids, anchors)].flatten()

    @torch.no_grad()
    def _own(self, text: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own distributions, float32 [places, vocabulary], and which of them each mask is to
        predict, [lanes * groups * masks]: neighbouring anchors have most of them in common."""
        lane, true = self._places(text, anchors)
        places, index = torch.unique((lane * text.shape[1] + true).flatten(), return_inverse=True)
        rows = text.flatten(0, 1)[places].split(PIECE[text.device.type != "cpu"])
        return torch.cat([self.model.output(part).float().softmax(-1) for part in rows]), index


class CrossEntropy(torch.autograd.Function):
    """Cross-entropies of predicted distributions with their targets, summed with weights, and the likeliest
    tokens.

    Logits are made in pieces, which stay in a processor's cache, and their gradients are taken at once: a
    whole vocabulary for each of a thousand masks would pass through memory several times.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Callable[[Tensor], Tensor],
        weights: Tensor,
        shares: Tensor,
        aims: Tensor,
        labels: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """states: [rows, hidden], from which `head` makes logits. weights, aims: [rows]. shares: target
        distributions, [places, vocabulary], of which `aims` are the indices; or labels: target tokens,
        [rows]. Returns the loss, and tokens [rows]."""
        loss, best = weights.new_zeros(()), []
        slopes: list[Tensor] = []
        size = PIECE[states.device.type != "cpu"]
        for start in range(0, len(states), size):
            piece = slice(start, start + size)
            with torch.enable_grad():
                mine = states[piece].detach().requires_grad_()
                made = head(mine)
            logits = made.detach().float()
            total = logits.logsumexp(-1)
            best.append(logits.argmax(-1))
            if labels is None:
                target = shares[aims[piece]]
                agreed = torch.linalg.vecdot(target, logits)
            else:
                own = labels[piece, None]
                agreed = logits.gather(-1, own)[:, 0]
            loss = loss + ((total - agreed) * weights[piece]).sum()
            if ctx.needs_input_grad[0]:
                slope = logits.sub_(total[:, None]).exp_()
                if labels is None:
                    slope.sub_(target)
                else:
                    slope.scatter_add_(-1, own, slope.new_full((), -1.0).expand(own.shape))
                slope.mul_(weights[piece, None])
                slopes += torch.autograd.grad(made, mine, slope.to(made.dtype))
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        tokens = torch.cat(best)
        ctx.mark_non_differentiable(tokens)
        return loss, tokens

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return slopes * slope.to(slopes.dtype), None, None, None, None, None


cross_entropy = cast(Callable[..., tuple[Tensor, Tensor]], CrossEntropy.apply)
