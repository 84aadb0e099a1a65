"""The package's student with the fast forward below it, and its counterparts that tune the model.

`FastStudent` takes the loss, the sampler head and the calibration from `selfdraft.train.student`. Only how
rows run is another: masks are laid out by tensors on the device, not by trees, and see the same (a test
compares them).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout

from selfdraft.models.adapters.adapter import Adapter
from selfdraft.models.transformers import TransformersModel
from selfdraft.train.student import IGNORED, Loss, Student, cross_entropy

from .llama import Llama, Text, masked_attention

GROUPS = 16  # the number of groups is padded to a multiple of it, so that few shapes are compiled
PASSES = 3  # noisy blocks make fewer passes than this through the student, each number as often
KEPT_ROWS = 8192  # of a step whose divergence from the base is taken


class FastStudent(Student):
    """An adapter that is gated to mask rows."""

    def __init__(self, model: TransformersModel, adapter: Adapter, loss: Loss, fast: Llama) -> None:
        super().__init__(model, adapter, loss)
        self.fast = fast
        self.size = adapter.config.masks  # rows of a group

    def read(self, ids: Tensor) -> Text:
        with torch.no_grad():
            return self.fast.read(ids)

    def hidden(self, ids: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        text = self.read(ids)
        masks = self.adapter.masks.to(self.fast.dtype).expand(self.size, -1)
        return text.hidden, self.hung(text, masks.expand(*anchors.shape, -1, -1), anchors)

    def hung(self, text: Text, embedded: Tensor, anchors: Tensor) -> Tensor:
        """Hidden states of rows under anchors, [lanes, groups * size, hidden]. embedded: [lanes, groups,
        size, hidden]. A row sees the soft prefix, the text up to its anchor, and the rows of its group before
        it."""
        lanes, groups = anchors.shape
        more = -groups % GROUPS
        anchors = torch.cat([anchors, anchors[:, -1:].expand(-1, more)], 1)
        x = torch.cat([embedded, embedded[:, -1:].expand(-1, more, -1, -1)], 1).flatten(1, 2)
        prefix = self.adapter.config.prefix
        fold = self.fast.heads // self.fast.kv_heads
        mask = sight(anchors, self.size, text.hidden.shape[1], prefix, x.dtype).repeat(1, 1, fold, 1)
        positions = (anchors[..., None] + 1 + torch.arange(self.size, device=x.device)).flatten()
        share = self.loss.dropout if self.training else 0.0
        fixed = [
            pair and tuple(dropout(part.to(x.dtype), share) for part in pair) for pair in self.adapter.pairs()
        ]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, *own = (part.transpose(1, 2) for part in (q, k, v))
            parts = [text.pairs[layer], tuple(own)]
            if prefix:
                parts.insert(0, tuple(part.expand(lanes, -1, -1, -1) for part in fixed[layer]))
            keys, values = (torch.cat(part, 2) for part in zip(*parts, strict=True))
            return masked_attention(q, keys, values, mask).transpose(1, 2).flatten(2)

        made = self.fast.run(x, positions, attend, self.fast.lora(self.adapter))
        return made[:, : groups * self.size].contiguous()

    def forward(
        self, ids: Tensor, anchors: Tensor, labels: Tensor, ends: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As the package's. ends: length of each text, [lanes]; here without a use."""
        return super().forward(ids, anchors, labels)


def sight(anchors: Tensor, size: int, length: int, prefix: int, dtype: torch.dtype) -> Tensor:
    """What rows under anchors see, additive, [lanes, 1, rows, prefix + length + rows]."""
    lanes, groups = anchors.shape
    row = torch.arange(groups * size, device=anchors.device)
    above = torch.arange(length, device=anchors.device) <= anchors.repeat_interleave(size, 1)[..., None]
    own = (row[:, None] // size == row // size) & (row <= row[:, None])
    seen = torch.cat([above.new_ones(lanes, len(row), prefix), above, own.expand(lanes, -1, -1)], -1)
    return torch.zeros(seen.shape, dtype=dtype, device=anchors.device).masked_fill_(~seen, -torch.inf)[
        :, None
    ]


class TunedFastStudent(FastStudent):
    """LoRA on all rows: masks learn what the tuned text says, and the text is kept near the base's. keep:
    weight of that divergence."""

    def __init__(
        self, model: TransformersModel, adapter: Adapter, loss: Loss, fast: Llama, keep: float
    ) -> None:
        super().__init__(model, adapter, loss, fast)
        self.keep = keep
        self.text: Text | None = None  # of the forward under way

    def read(self, ids: Tensor) -> Text:
        self.text = self.fast.read(ids, self.fast.lora(self.adapter))
        return self.text

    def forward(
        self, ids: Tensor, anchors: Tensor, labels: Tensor, ends: Tensor | None = None
    ) -> dict[str, Tensor]:
        return self.with_kept(super().forward(ids, anchors, labels), ids, ends)

    def with_kept(self, found: dict[str, Tensor], ids: Tensor, ends: Tensor | None) -> dict[str, Tensor]:
        """The loss with the divergence of the text's rows from the base's, in nats, on some of them."""
        assert self.text is not None
        assert ends is not None
        with torch.no_grad():
            base = self.fast.read(ids).hidden.flatten(0, 1)
            there = torch.arange(ids.shape[1], device=ids.device) < ends[:, None] - 1
            chance = torch.rand(there.shape, device=ids.device) * there
            rows = chance.flatten().topk(min(there.numel(), KEPT_ROWS)).indices
            weights = there.flatten()[rows].float()
            weights /= weights.sum().clamp(min=1)
            shares = self.model.output(base[rows]).float().softmax(-1)
            floor = -(torch.special.xlogy(shares, shares).sum(-1) * weights).sum()
        states, self.text = self.text.hidden.flatten(0, 1)[rows], None
        aims = torch.arange(len(rows), device=ids.device)
        loss, _ = cross_entropy(states, self.model.output, weights, shares, aims, None)
        kept = loss - floor
        return found | {"loss": found["loss"] + self.keep * kept, "kept": kept.detach()}


class BlockStudent(TunedFastStudent):
    """CLLM: noisy blocks under anchors, states that the student itself comes to from the filler, learn what
    the text says there (global consistency, on policy). block: tokens of one."""

    def __init__(
        self, model: TransformersModel, adapter: Adapter, loss: Loss, fast: Llama, keep: float, block: int
    ) -> None:
        super().__init__(model, adapter, loss, fast, keep)
        self.size = block

    def _places(self, text: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        true = anchors[..., None] + 1 + torch.arange(self.size, device=anchors.device)
        lane = torch.arange(len(anchors), device=anchors.device)[:, None, None]
        return lane, true.clamp(max=text.shape[1] - 1)

    def forward(
        self, ids: Tensor, anchors: Tensor, labels: Tensor, ends: Tensor | None = None
    ) -> dict[str, Tensor]:
        text = self.read(ids)
        right = ids[self._places(ids, anchors)]
        state = self.noisy(text, right, anchors)
        hidden = self.hung(text, self.fast.embedding[state], anchors).flatten(0, 1)
        counted = ((state != right).cumsum(-1) > 0) & (labels != IGNORED)  # rows before see the text alone
        weights = counted.flatten().float()
        shares, aims = self._own(text.hidden, anchors)
        scaled = weights / weights.sum().clamp(min=1)
        loss, best = cross_entropy(hidden, self.model.output, scaled, shares, aims, None)
        hits = (best == shares.argmax(-1)[aims]).long().view(labels.shape).masked_fill(~counted, IGNORED)
        return self.with_kept({"loss": loss, "hits": hits}, ids, ends)

    @torch.no_grad()
    def noisy(self, text: Text, right: Tensor, anchors: Tensor) -> Tensor:
        """States of blocks, [lanes, groups, size]: up to two passes from one known token and filler."""
        filler = self.adapter.config.filler
        assert filler is not None
        state = torch.full_like(right, filler)
        state[..., 0] = right[..., 0]
        for _ in range(int(torch.randint(PASSES, ()))):
            hidden = self.hung(text, self.fast.embedding[state], anchors).flatten(0, 1)
            picks = torch.cat([self.model.output(part).argmax(-1) for part in hidden.split(KEPT_ROWS)])
            state = torch.cat([state[..., :1], picks.view(state.shape)[..., :-1]], -1)
            known = torch.randint(1, 2 * self.size, anchors.shape, device=state.device)[..., None]
            state = state.masked_fill(torch.arange(self.size, device=state.device) >= known, filler)
        return state
