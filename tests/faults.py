"""Faults to plant, each in one place; what they break must be seen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from selfdraft import Step, Tree
from selfdraft.engine import engine, request
from selfdraft.models import kv_cache as cache
from selfdraft.models import transformers_inputs
from selfdraft.models.adapters import adapter
from selfdraft.models.adapters.adapter import Gate
from selfdraft.models.kv_cache import Lane, Lanes
from selfdraft.models.transformers import TransformersModel
from selfdraft.sampling.gumbel import Noise
from selfdraft.sampling.processors import filtered
from selfdraft.sampling.sampler import Sampler

Patch = Callable[[pytest.MonkeyPatch], None]


def replace_function(patch: pytest.MonkeyPatch, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Replace a function of the package in each module that has imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("selfdraft.") and vars(module).get(old.__name__) is old:
            patch.setattr(module, old.__name__, new)


def tree_mask(patch: pytest.MonkeyPatch) -> None:
    """Rows see their elder siblings."""
    patch.setattr(Tree, "visible", property(lambda tree: torch.ones(len(tree), len(tree)).tril().bool()))


def rows_kept(patch: pytest.MonkeyPatch) -> None:
    """Accepted rows are not moved to the end of the history."""
    patch.setattr(Lanes, "move", lambda self, lane, path: None)


def positions(patch: pytest.MonkeyPatch) -> None:
    """Positions count rows instead of depth."""
    layout = TransformersModel.layout

    def shifted(
        self: TransformersModel, trees: Sequence[Tree], lengths: Sequence[int], width: int, *rest: Any
    ) -> Any:
        laid = layout(self, trees, lengths, width, *rest)
        return replace(laid, positions=torch.arange(width)[None] + torch.tensor(lengths)[:, None])

    patch.setattr(TransformersModel, "layout", shifted)


def noise_key(patch: pytest.MonkeyPatch) -> None:
    """Noise drawn in call order."""
    at = Noise.at

    def in_call_order(self: Noise, positions: Sequence[int], *rest: Any) -> torch.Tensor:
        start = getattr(self, "drawn", positions[0])  # one row a step: the positions themselves
        self.drawn = start + len(positions)  # type: ignore[attr-defined]
        return at(self, range(start, start + len(positions)), *rest)

    patch.setattr(Noise, "at", in_call_order)


def eos_cut(patch: pytest.MonkeyPatch) -> None:
    """The end of text is looked for in the last emitted token alone."""
    patch.setattr(request, "first_end", lambda tokens, eos: len(tokens) - 1 if tokens[-1] in eos else None)


def filters(patch: pytest.MonkeyPatch) -> None:
    """Filters are skipped where several rows are scored at once."""
    replace_function(
        patch, filtered, lambda logits, params: logits if len(logits) > 1 else filtered(logits, params)
    )


def penalties(patch: pytest.MonkeyPatch) -> None:
    """Penalties count the text, but not a row's ancestors in the tree."""
    patch.setattr(Sampler, "_before", lambda self, tails: (self._counts[None], self._seen[None]))


FAULTS = [tree_mask, rows_kept, positions, noise_key, eos_cut, filters, penalties]


# Of adapters. What decoding and training have in common is seen by comparing with the definitions alone.


def _laid(patch: pytest.MonkeyPatch, change: Callable[[TransformersModel, Any], Any]) -> None:
    layout = TransformersModel.layout
    patch.setattr(TransformersModel, "layout", lambda self, *given: change(self, layout(self, *given)))


def _fixed(model: TransformersModel) -> int:
    return model.adapter.config.prefix if model.adapter is not None else 0


def prefix_for_all(patch: pytest.MonkeyPatch) -> None:
    """Rows of ordinary tokens see the prefix, too."""

    def show(model: TransformersModel, laid: Any) -> Any:
        laid.seen[..., : _fixed(model)] = 0
        return laid

    _laid(patch, show)


def prefix_in_windows(patch: pytest.MonkeyPatch) -> None:
    """Layers with a window do not see the prefix."""
    make = transformers_inputs.kind_masks

    def hide(kinds: Any, seen: torch.Tensor, positions: torch.Tensor, fixed: int = 0) -> Any:
        made = {name: mask.clone() for name, mask in make(kinds, seen, positions, fixed).items()}
        for name, kind in kinds.items():
            if kind.size is not None:
                made[name][..., :fixed] = torch.finfo(seen.dtype).min
        return made

    replace_function(patch, make, hide)


def mask_positions(patch: pytest.MonkeyPatch) -> None:
    """Mask tokens stand one place further."""

    def shift(model: TransformersModel, laid: Any) -> Any:
        return (
            laid
            if laid.mask_tokens is None
            else replace(laid, positions=laid.positions + (laid.mask_tokens >= 0))
        )

    _laid(patch, shift)


def mask_positions_count_prefix(patch: pytest.MonkeyPatch) -> None:
    """Positions of mask tokens count the prefix."""

    def shift(model: TransformersModel, laid: Any) -> Any:
        more = 0 if laid.mask_tokens is None else _fixed(model) * (laid.mask_tokens >= 0)
        return replace(laid, positions=laid.positions + more)

    _laid(patch, shift)


def one_embedding(patch: pytest.MonkeyPatch) -> None:
    """All mask tokens have the embedding of the first."""
    _laid(
        patch,
        lambda _, laid: (
            laid if laid.mask_tokens is None else replace(laid, mask_tokens=laid.mask_tokens.clamp(max=0))
        ),
    )


def lora_for_all(patch: pytest.MonkeyPatch) -> None:
    """LoRA works on all rows of a call that has mask tokens."""
    opened = Gate.open

    @contextmanager
    def whole(self: Gate, which: torch.Tensor | None) -> Iterator[None]:
        with opened(self, which):
            self.first, self.all = 0, True
            yield

    patch.setattr(Gate, "open", whole)


def lora_multiplied(patch: pytest.MonkeyPatch) -> None:
    """Rows of ordinary tokens get LoRA times zero."""

    def times(where: torch.Tensor, more: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return own + (more - own) * where if where.dtype == torch.bool else own

    patch.setattr(adapter.torch, "where", times)


def not_numbers(patch: pytest.MonkeyPatch) -> None:
    """What is not a number stays in the buffers."""
    patch.setattr(cache, "finite_", lambda part: part)


def masks_kept(patch: pytest.MonkeyPatch) -> None:
    """Of the last row accepted the first mask token's keys and values are kept."""
    forward, keep = TransformersModel.forward, Lane.keep

    def note(self: TransformersModel, trees: Sequence[Tree], lanes: Sequence[Any], *rest: Any) -> Any:
        for tree, lane in zip(trees, lanes, strict=True):
            known = [row for row, token in enumerate(tree.tokens) if token >= self.vocab_size]
            lane.under = {tree.parents[row]: row for row in known}
        return forward(self, trees, lanes, *rest)

    def keep_mask(self: Any, path: Sequence[int], in_flight: Sequence[int]) -> None:
        keep(self, [*path[:-1], self.under.get(path[-1], path[-1])], in_flight)

    patch.setattr(TransformersModel, "forward", note)
    patch.setattr(Lane, "keep", keep_mask)


def group_of_the_root(patch: pytest.MonkeyPatch) -> None:
    """The masks under the root are looked at, wherever the walk ended."""
    group = engine._group

    def first(step: Step, count: int) -> Sequence[int]:
        own = group(step, count)
        return group(replace(step, path=[0]), count)[: len(own)] or own

    patch.setattr(engine, "_group", first)


def noise_behind(patch: pytest.MonkeyPatch) -> None:
    """All masks have the noise of the next position."""
    patch.setattr(
        Sampler,
        "mask_scores",
        lambda self, logits: self._scores(logits, [()] * len(logits), [self.length] * len(logits)),
    )


def sampler_head_sees_token_zero(patch: pytest.MonkeyPatch) -> None:
    """The sampler head sees token 0 instead of what the mask before predicts."""
    patch.setattr(Sampler, "candidate", lambda self, offset, logits: 0)


def sampler_head_noise_shifted(patch: pytest.MonkeyPatch) -> None:
    """The token that the sampler head sees is chosen with the noise of the position after."""
    candidate = Sampler.candidate
    patch.setattr(Sampler, "candidate", lambda self, offset, logits: candidate(self, offset + 1, logits))


def lane_cleared(patch: pytest.MonkeyPatch) -> None:
    """A lane that is opened anew is cleared whole, its prefix, too."""
    opened = Lanes.open

    @torch.inference_mode()
    def clear(self: Lanes, *given: Any) -> Lane:
        lane = opened(self, *given)
        for layer in self.own:
            for buffer in layer.buffers():
                buffer[lane.index :].zero_()
        return lane

    patch.setattr(Lanes, "open", clear)


def lane_released(patch: pytest.MonkeyPatch) -> None:
    """The lane that moves into a free place leaves the end of its history behind, as long as the prefix."""
    release = Lanes.release

    def short(self: Lanes, lane: Lane) -> None:
        fixed, self.fixed = self.fixed, 0
        release(self, lane)
        self.fixed = fixed

    patch.setattr(Lanes, "release", short)


def lane_copied(patch: pytest.MonkeyPatch) -> None:
    """A copy of a lane lacks as much."""
    copy = Lanes.copy

    def short(self: Lanes, source: int, target: int, length: int) -> None:
        copy(self, source, target, max(0, length - self.fixed))

    patch.setattr(Lanes, "copy", short)


def lanes_grown_by_copies(patch: pytest.MonkeyPatch) -> None:
    """Lanes that a copy adds beyond its own have no prefix."""
    copy = Lanes.copy

    def bare(self: Lanes, *given: int) -> None:
        prefixes = [layer.prefix for layer in self.own]
        for layer in self.own:
            layer.prefix = (None, None)
        copy(self, *given)
        for layer, prefix in zip(self.own, prefixes, strict=True):
            layer.prefix = prefix

    patch.setattr(Lanes, "copy", bare)


def lanes_grown(patch: pytest.MonkeyPatch) -> None:
    """Lanes that are added have no prefix."""
    grow = Lanes._grow
    patch.setattr(
        Lanes, "_grow", lambda self, buffer, lanes, slots, prefix: grow(self, buffer, lanes, slots, None)
    )
