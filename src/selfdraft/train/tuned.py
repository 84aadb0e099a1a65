"""What is trained where the model itself changes: CLLM and SPACE as published, in one forward a step.

A sequence is a tree again: the text, a chain, and what hangs from it: blocks of noisy guesses (CLLM) or
groups of mask tokens (SPACE). It goes through the same layout and masks as a tree of decoding, so a row sees
in training what it sees later. All rows have gradients. Two losses are added:

- draft: a hung row that sees anything wrong should say what the row of the text at its place says, without
  gradients there (the global consistency loss of CLLM, arXiv 2403.00835, section 3.3.2, whose stop-gradient
  copy is this same student), or the token that came (SPACE, 2402.11809). The local form of the former has the
  next state of the block instead.
- keep: the text's own rows should say what they said before, by the base model's distribution, or the token
  that came (the autoregressive loss of both papers).

Trained is LoRA on all rows, or all weights, in float32, which run in the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from ..engine.tree import Tree
from ..models import transformers_inputs
from ..models.adapters.adapter import Adapter
from ..models.transformers import TransformersModel
from .student import IGNORED, Tape

NO_ROW = -1


@dataclass(frozen=True)
class TunedLoss:
    """draft, keep: what hung rows and the text's rows learn from, see above. weight: of keep, in that of
    draft. decay: weight of each hung row, in that of the one before it, from the first one of its group that
    sees anything wrong. refresh: share of steps before which each noisy block makes a pass by the student
    itself, so that it learns from states that it comes to (on policy); filler: what stands at the end of a
    block after it, as in `packed.NoiseConfig`."""

    draft: Literal["distill", "tokens"] = "distill"
    keep: Literal["base", "tokens"] = "base"
    weight: Annotated[float, Ge(0)] = 10.0
    decay: Annotated[float, Gt(0), Le(1)] = 1.0
    refresh: Annotated[float, Ge(0), Le(1)] = 0.0
    filler: int | None = None


class TunedStudent(torch.nn.Module):
    """A model that learns, and the losses. Its parameters are the adapter's, or with `full` all weights
    too."""

    def __init__(
        self, model: TransformersModel, adapter: Adapter, loss: TunedLoss, full: bool = False
    ) -> None:
        super().__init__()
        self.adapter, self.loss = adapter, loss
        self.lowered = full and model.dtype in (torch.bfloat16, torch.float16)
        learner = model.copied(torch.float32 if self.lowered else model.dtype) if full else model
        self.weights: torch.nn.Module | None = learner.model if full else None
        # In a list: frozen weights are no part of this module, and others are registered once.
        self._models = [model, learner, learner.learning(adapter)]

    @property
    def base(self) -> TransformersModel:
        """As it was before."""
        return self._models[0]

    @property
    def learner(self) -> TransformersModel:
        """The model whose weights learn, without the adapter."""
        return self._models[1]

    @property
    def model(self) -> TransformersModel:
        """The same with the adapter."""
        return self._models[2]

    def dense(self) -> list[torch.nn.Parameter]:
        """Parameters of matrices that rows go through; the others are embeddings and prefixes."""
        adapter = self.adapter
        parts: list[torch.nn.Module | None] = [adapter.lora, adapter.sampler, self.weights]
        return [one for part in parts if part is not None for one in part.parameters()]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Without the second names of weights that the model ties, which a checkpoint cannot hold."""
        named: dict[str, Any] = super().state_dict(*args, **kwargs)
        first = {part.data_ptr(): name for name, part in reversed(named.items()) if part.numel()}
        return {name: part for name, part in named.items() if first.get(part.data_ptr(), name) == name}

    def forward(
        self, tokens: Tensor, parents: Tensor, labels: Tensor, hung: Tensor, aims: Tensor
    ) -> dict[str, Tensor]:
        """The loss; hits: is a hung row's likeliest token that of its aim, [lanes, groups, size], 1, 0, or
        IGNORED, from the first row of a group that counts on; kept: of each lane the mean loss of its text's
        rows: what they diverge from the base, or the cross-entropy of what came, in nats.

        tokens, parents: [lanes, rows], of the tree; parents of rows that pad are below -1. labels: [lanes,
        rows], the token after a row of the text, IGNORED where the row does not count, and for hung ones.
        hung, aims: [lanes, groups, size], hung rows, and the rows that each should agree with; NO_ROW where
        there is none.
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
        offset = (counted.cumsum(-1) - 1)[counted]  # in the group, from its first row that counts
        weights = self.loss.decay**offset
        draft = (each * weights).sum() / weights.sum().clamp(min=1e-6)
        hits = torch.full_like(aims, IGNORED)
        own, group, _ = counted.nonzero(as_tuple=True)
        hits[own, group, offset] = (scores.argmax(-1) == reference.argmax(-1)).long()
        home = text // width
        sums = torch.zeros(2, lanes, device=kept.device)
        sums[0].index_add_(0, home, kept.detach())
        sums[1].index_add_(0, home, torch.ones_like(kept))
        return {
            "loss": draft + self.loss.weight * kept.mean(),
            "hits": hits,
            "kept": sums[0] / sums[1].clamp(min=1),
        }

    @torch.no_grad()
    def passed(self, tokens: Tensor, parents: Tensor, hung: Tensor, aims: Tensor) -> Tensor:
        """The tokens after one pass. Each hung row carries the student's pick after the row above it; behind
        a right prefix the text's own token, which decoding would have by then."""
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
        """The loss of the text's rows. scores: [len(text), vocabulary]; text: which rows of the batch."""
        if self.loss.keep == "tokens":
            return torch.nn.functional.cross_entropy(scores, label, reduction="none")
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
        """Meanwhile matrix products of float32 weights run in the model's dtype."""
        if not self.lowered:
            yield
            return
        with torch.autocast(self.base.device.type, self.base.dtype):
            yield


def trees(tokens: Tensor, parents: Tensor) -> list[Tree]:
    """Those of a batch, without the rows that pad."""
    found = []
    for mine, above in zip(tokens.tolist(), parents.tolist(), strict=True):
        count = sum(parent >= -1 for parent in above)
        found.append(Tree(tuple(mine[:count]), tuple(above[:count])))
    return found


def deviates(tokens: Tensor, parents: Tensor, hung: Tensor, aims: Tensor) -> Tensor:
    """Which rows see a hung token, their own or above them, that is not the one of its aim: the others see
    what a row of the text sees, and learn nothing. [lanes, rows]."""
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
    """Hidden states of trees without a history, [lanes, width, hidden]."""
    fixed = adapter.config.prefix if adapter is not None else 0
    laid = model.layout(grown, [0] * len(grown), width, fixed + width)
    made = transformers_inputs.kind_masks(model.kinds, laid.seen, laid.positions, fixed)
    return model.call(laid, made, Tape(adapter), 0, width)
