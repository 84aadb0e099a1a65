"""The tuned student: the model itself is trained (CLLM, and SPACE as published), with one forward per step.

A sequence is a tree: the text as a chain, with branches of noisy tokens (CLLM) or of mask tokens (SPACE). It
uses the layout and the attention masks of decoding, so a row sees the same in training and in decoding. All
rows have gradients. The loss has two terms:

- draft: a branch row that sees a wrong token learns the distribution of the text row at its position, without
  gradients through that row (the global consistency loss of CLLM, arXiv 2403.00835, section 3.3.2, whose
  stop-gradient copy is this same student), or the next token (SPACE, 2402.11809). The local consistency loss
  has the next state of the block as its target.
- keep: the rows of the text keep the base model's distribution, or learn the next token (the autoregressive
  loss of both papers).

LoRA on all rows is trained, or all weights, in float32; products are in the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from ..engine.tree import Tree
from ..models import transformers_inputs
from ..models.adapters.adapter import Adapter
from ..models.transformers import TransformersModel
from .student import IGNORED, Tape

NO_ROW = -1


@dataclass(frozen=True)
class TunedLoss:
    """The two terms of the loss; see the module."""

    # Target of branch rows.
    draft: Literal["distill", "tokens"] = "distill"
    # Target of the rows of the text.
    keep: Literal["base", "tokens"] = "base"
    # Weight of keep relative to draft.
    weight: Annotated[float, Ge(0)] = 10.0
    # Weight of each branch row relative to the one before, from the first that sees a wrong token.
    decay: Annotated[float, Gt(0), Le(1)] = 1.0
    # One mean over the rows of the text and the branch rows together, as SPACE publishes it; else one each.
    joint: bool = False
    # Label smoothing where the text's rows learn the next token; CLLM's published code has 0.1.
    smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    # Share of the steps in which noisy blocks first make a pass through the student itself (on policy).
    refresh: Annotated[float, Ge(0), Le(1)] = 0.0
    # Token at the end of a block after such a pass; see `packed.NoiseConfig`.
    filler: int | None = None


class TunedStudent(torch.nn.Module):
    """A model in training, and its loss. Its parameters are the adapter's, and with `full` all weights."""

    def __init__(
        self, model: TransformersModel, adapter: Adapter, loss: TunedLoss, full: bool = False
    ) -> None:
        super().__init__()
        self.adapter, self.loss = adapter, loss
        self.lowered = full and model.dtype in (torch.bfloat16, torch.float16)
        learner = model.copied(torch.float32 if self.lowered else model.dtype) if full else model
        self.weights: torch.nn.Module | None = learner.model if full else None
        # In a list, so that frozen weights are not registered and the others only once.
        self._models = [model, learner, learner.learning(adapter)]

    @property
    def base(self) -> TransformersModel:
        """The model before training."""
        return self._models[0]

    @property
    def learner(self) -> TransformersModel:
        """The model whose weights are trained, without the adapter."""
        return self._models[1]

    @property
    def model(self) -> TransformersModel:
        """The learner with the adapter."""
        return self._models[2]

    def dense(self) -> list[torch.nn.Parameter]:
        """Parameters of LoRA, sampler head and weights; the others are embeddings and prefixes."""
        adapter = self.adapter
        parts: list[torch.nn.Module | None] = [adapter.lora, adapter.sampler, self.weights]
        return [one for part in parts if part is not None for one in part.parameters()]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state without second names of tied weights, which a checkpoint cannot hold."""
        named: dict[str, Any] = super().state_dict(*args, **kwargs)
        first = {part.data_ptr(): name for name, part in reversed(named.items()) if part.numel()}
        return {name: part for name, part in named.items() if first.get(part.data_ptr(), name) == name}

    def forward(
        self, tokens: Tensor, parents: Tensor, labels: Tensor, hung: Tensor, aims: Tensor
    ) -> dict[str, Tensor]:
        """The loss and its figures.

        hits: [lanes, groups, size], 1 or 0 where a branch row has a loss: is its most likely token that of
        its target row? The first such row of a group stands first; the rest is IGNORED. kept: [lanes], the
        mean loss of the text in nats, a divergence from the base or a cross-entropy.

        tokens, parents: [lanes, rows], of the tree; parents of padding rows are below -1. labels: [lanes,
        rows], the token after a row of the text; IGNORED for rows without a loss and for branches. hung,
        aims: [lanes, groups, size], branch rows and their target rows; NO_ROW if there is none.
        """
        if self.training and self.loss.refresh and float(torch.rand(())) < self.loss.refresh:
            tokens = self.passed(tokens, parents, hung, aims)
        hidden = self.hidden(tokens, parents)
        lanes, width, _ = hidden.shape
        lane = torch.arange(lanes, device=hidden.device)[:, None, None]
        first = lane * width
        counted = (aims != NO_ROW) & deviates(tokens, parents, hung, aims)[lane, hung.clamp(min=0)]
        rows, aim = (hung + first)[counted], (aims + first)[counted]
        flat, label = hidden.flatten(0, 1), labels.flatten()
        text = (label != IGNORED).nonzero().flatten()
        kept = self._kept(self.model.output(flat[text]).float(), tokens, parents, text, label[text])
        scores = self.model.output(self.model.apply_sampler_head(flat[rows], tokens.flatten()[aim])).float()
        with torch.no_grad():
            reference = self.model.output(flat[aim]).float()
        target = reference.softmax(-1) if self.loss.draft == "distill" else label[aim]
        each = torch.nn.functional.cross_entropy(scores, target, reduction="none", ignore_index=IGNORED)
        offset = (counted.cumsum(-1) - 1)[counted]  # in the group, from its first row with a loss
        weights = self.loss.decay**offset
        draft, count = (each * weights).sum(), weights.sum()
        hits = torch.full_like(aims, IGNORED)
        own, group, _ = counted.nonzero(as_tuple=True)
        hits[own, group, offset] = (scores.argmax(-1) == reference.argmax(-1)).long()
        home = text // width
        sums = torch.zeros(2, lanes, device=kept.device)
        sums[0].index_add_(0, home, kept.detach())
        sums[1].index_add_(0, home, torch.ones_like(kept))
        if self.loss.joint:
            loss = (draft + self.loss.weight * kept.sum()) / (count + len(kept))
        else:
            loss = draft / count.clamp(min=1e-6) + self.loss.weight * kept.mean()
        return {
            "loss": loss,
            "hits": hits,
            "kept": sums[0] / sums[1].clamp(min=1),
        }

    @torch.no_grad()
    def passed(self, tokens: Tensor, parents: Tensor, hung: Tensor, aims: Tensor) -> Tensor:
        """The tokens after one Jacobi pass. Each branch row gets the student's pick after its parent, or the
        text's token if everything before it is correct, because decoding would have committed that token."""
        hidden = self.hidden(tokens, parents)
        lane = torch.arange(len(tokens), device=tokens.device)[:, None, None].expand(hung.shape)
        lanes, rows, aim = (part[hung != NO_ROW] for part in (lane, hung, aims))
        above = parents[lanes, rows]
        guessed = (aim == NO_ROW) | deviates(tokens, parents, hung, aims)[lanes, above]
        picks = self.model.output(hidden[lanes, above]).argmax(-1)
        made = tokens.clone()
        made[lanes, rows] = torch.where(guessed, picks, tokens[lanes, aim.clamp(min=0)])
        if self.loss.filler is not None:
            size = hung.shape[-1]
            known = torch.randint(1, size + 1, (*hung.shape[:2], 1), device=hung.device)
            unknown = (hung != NO_ROW) & (torch.arange(size, device=hung.device) >= known)
            made[lane[unknown], hung[unknown]] = self.loss.filler
        return made

    def hidden(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Hidden states of all rows, [lanes, rows, hidden]."""
        with self._lowered():
            return _run(self.model, trees(tokens, parents), tokens.shape[1], self.adapter)

    def _kept(self, scores: Tensor, tokens: Tensor, parents: Tensor, text: Tensor, label: Tensor) -> Tensor:
        """The loss of the text. scores: [len(text), vocabulary]; text: indices of its rows in the batch."""
        if self.loss.keep == "tokens":
            smoothing = self.loss.smoothing
            return torch.nn.functional.cross_entropy(
                scores, label, reduction="none", label_smoothing=smoothing
            )
        with torch.no_grad():
            last = int((text % tokens.shape[1]).max()) + 1
            chains = [Tree.chain(row[:last]) for row in tokens.clamp(max=self.base.vocab_size - 1).tolist()]
            own = _run(self.base, chains, last, None)
            at = text // tokens.shape[1] * last + text % tokens.shape[1]
            known = self.base.output(own.flatten(0, 1)[at]).float().log_softmax(-1)
        return torch.nn.functional.kl_div(
            scores.log_softmax(-1), known, reduction="none", log_target=True
        ).sum(-1)

    @contextmanager
    def _lowered(self) -> Iterator[None]:
        """Run matrix products of float32 weights in the model's dtype."""
        if not self.lowered:
            yield
            return
        with torch.autocast(self.base.device.type, self.base.dtype):
            yield


def trees(tokens: Tensor, parents: Tensor) -> list[Tree]:
    """The trees of a batch, without padding rows."""
    found = []
    for mine, above in zip(tokens.tolist(), parents.tolist(), strict=True):
        count = sum(parent >= -1 for parent in above)
        found.append(Tree(tuple(mine[:count]), tuple(above[:count])))
    return found


def deviates(tokens: Tensor, parents: Tensor, hung: Tensor, aims: Tensor) -> Tensor:
    """Rows whose own or an earlier branch token differs from that of its target row, [lanes, rows]. Other
    branch rows see exactly what a row of the text sees, so they have nothing to learn."""
    lane = torch.arange(len(tokens), device=tokens.device)[:, None, None].expand(hung.shape)
    there = (hung != NO_ROW) & (aims != NO_ROW)
    lanes, rows, aim = lane[there], hung[there], aims[there]
    wrong = torch.zeros_like(tokens, dtype=torch.bool)
    wrong[lanes, rows] = tokens[lanes, rows] != tokens[lanes, aim]
    found = torch.zeros_like(wrong)
    for grown, mine, seen in zip(trees(tokens, parents), wrong, found, strict=True):
        seen[: len(grown)] = (grown.visible.to(mine.device) & mine[: len(grown)]).any(-1)
    return found


def _run(model: TransformersModel, grown: Sequence[Tree], width: int, adapter: Adapter | None) -> Tensor:
    """Hidden states of trees without history, [lanes, width, hidden]."""
    fixed = adapter.config.prefix if adapter is not None else 0
    laid = model.layout(grown, [0] * len(grown), width, fixed + width)
    made = transformers_inputs.kind_masks(model.kinds, laid.seen, laid.positions, fixed)
    return model.call(laid, made, Tape(adapter), 0, width)
