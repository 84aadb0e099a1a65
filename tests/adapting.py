"""Adapters to draft with: random ones, whose every part is at work; drafters that use them although they know
the answer; and the logits that mask rows must have, from the definitions alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from selfdraft import DraftContext, Drafter, Method, Step, Tree
from selfdraft.drafting.acceptance import DraftCount
from selfdraft.drafting.method import free
from selfdraft.models.adapters.adapter import Adapter, AdapterConfig, LowRank
from selfdraft.models.adapters.folder import Base
from selfdraft.models.transformers_inputs import CACHE
from selfdraft.verify.adversaries import Oracle

LAYERS = ("q_proj", "down_proj")


def adapter(
    model: Base,
    masks: int = 3,
    prefix: int = 0,
    rank: int = 0,
    sampler: int = 0,
    seed: int = 0,
    distinct: bool = True,
    targets: Sequence[str] = LAYERS,
    gated: bool = True,
) -> Adapter:
    """A random adapter of a model, in the dtype in which one is loaded."""
    alpha, targets = (1.5 * rank, tuple(targets)) if rank else (None, ())
    config = AdapterConfig(masks, distinct, prefix, rank, alpha, targets, sampler, gated)
    torch.manual_seed(seed)
    made = Adapter(config, *model.adapter_shape(config.targets))
    with torch.no_grad():
        for part in made.parameters():
            part.copy_(torch.randn_like(part) * 0.5)
    return made.to(torch.float64 if model.dtype == torch.float64 else torch.float32).requires_grad_(False)


@torch.no_grad()
def defined(model: PreTrainedModel, adapter: Adapter, text: Sequence[int], previous: Sequence[int]) -> Tensor:
    """Logits of a whole group of masks under the last row of a text, [masks, vocabulary].

    By transformers' own forward: the text first; then, behind prefix and text, the masks alone, with the LoRA
    merged into the weights, a mask that is written down here, and the sampler head, which sees the tokens
    before theirs (previous), in front of the output layer.
    """
    config, length = adapter.config, len(text)
    cache = DynamicCache()
    model(input_ids=torch.tensor([list(text)]), **{CACHE: cache})
    tuned = copy.deepcopy(model)
    for name, part in zip(adapter.names, adapter.lora, strict=True):
        low = cast(LowRank, part)
        tuned.get_submodule(name).weight += config.scale * low.b @ low.a
    for layer, pair in zip(cache.layers, adapter.pairs(), strict=False):
        if pair is not None:
            layer.keys = torch.cat([pair[0][None], cast(Tensor, layer.keys)], 2)
            layer.values = torch.cat([pair[1][None], cast(Tensor, layer.values)], 2)
    at = length + torch.arange(config.masks)[:, None]  # positions of the masks
    slot = torch.arange(length + config.masks)

    def seen(window: int) -> Tensor:
        hidden = (slot > at) | (slot <= at - window)
        past = torch.zeros(config.masks, config.prefix, dtype=torch.bool)
        return torch.cat([past, hidden], 1).double()[None, None] * torch.finfo(torch.float64).min

    window = getattr(model.config, "sliding_window", None) or 10**9
    kinds: Sequence[str] = getattr(model.config, "layer_types", None) or ()
    mask: Any = seen(window)
    if len(set(kinds)) > 1:
        mask = {"sliding_attention": seen(window), "full_attention": seen(10**9)}
    if (head := adapter.sampler) is not None:
        before = model.get_input_embeddings()(torch.tensor([list(previous)]))

        def apply_head(module: object, args: tuple[Tensor]) -> Tensor:
            both = [x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (args[0], before)]
            inner = torch.cat(both, -1) @ head.inner.T
            return args[0] + (inner * inner.sigmoid()) @ head.outer.T

        tuned.get_output_embeddings().register_forward_pre_hook(apply_head)
    rows = adapter.masks.expand(config.masks, -1)[None]
    out = tuned(inputs_embeds=rows, attention_mask=mask, position_ids=at.T, **{CACHE: cache})
    return cast(Tensor, out.logits[0])


@dataclass
class Observed:
    """What a drafter observed after a step, and the whole text then."""

    text: Sequence[int]
    step: Step

    @property
    def group(self) -> int:
        """How many masks there were under the last row accepted, in the chain that begins first."""
        return len(list(self._chain(self.step.path[-1])))

    def _chain(self, row: int) -> Iterator[int]:
        tree, known = self.step.tree, len(self.step.picks)
        under = [mask for mask in range(known, len(tree)) if tree.parents[mask] == row]
        if under:
            yield under[0]
            yield from self._chain(under[0])


@dataclass
class MaskOracle:
    """Proposes the answer in a bushy tree, with groups of masks under random rows, their rows in any order.
    Records every step it observes."""

    adapted: ClassVar[bool] = True
    answer: Sequence[int]
    observed: list[Observed] = field(default_factory=list)

    def drafter(self, context: DraftContext) -> MaskOracleDrafter:
        return MaskOracleDrafter(self, context, Oracle(self.answer).drafter(context))


@dataclass
class MaskOracleDrafter:
    method: MaskOracle
    context: DraftContext
    oracle: Drafter
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    text: Sequence[int] = ()

    def propose(self, tokens: Sequence[int]) -> Tree:
        assert self.context.lookahead is not None
        self.text = list(tokens)
        tree, ids = self.oracle.propose(tokens), self.context.lookahead.ids
        groups = [(row, ids[: self.dice.randint(1, len(ids))]) for row in range(len(tree)) for _ in range(2)]
        groups = [group for group in groups if self.dice.random() < 0.5]
        while groups:
            row, left = groups.pop(self.dice.randrange(len(groups)))
            tree = tree.hang(row, left[:1])
            if len(left) > 1:
                groups.append((len(tree) - 1, left[1:]))
        return tree

    def observe(self, step: Step) -> None:
        self.method.observed.append(Observed([*self.text, *step.emitted], step))


@dataclass
class Helped:
    """A method whose mask scores are corrected, most of them and to some rank, so that its trees are walked.
    Rows cost nothing, so that its trees are large."""

    adapted: ClassVar[bool] = True
    method: Method
    answer: Sequence[int]

    def drafter(self, context: DraftContext) -> HelpedDrafter:
        return HelpedDrafter(self, len(context.prompt), self.method.drafter(replace(context, cost=free)))


@dataclass
class HelpedDrafter:
    method: Helped
    start: int
    drafter: Drafter
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    length: int = 0

    @property
    def sources(self) -> Mapping[Hashable, DraftCount]:
        return getattr(self.drafter, "sources", {})

    def propose(self, tokens: Sequence[int]) -> Tree:
        self.length = len(tokens)
        return self.drafter.propose(tokens)

    def observe(self, step: Step) -> None:
        if step.mask_scores is not None:
            right = self.method.answer[self.length + len(step.emitted) - self.start :]
            scores = step.mask_scores.clone()
            for row, token in zip(scores, right, strict=False):
                first, second, third = row.topk(3).values
                row[token] = self.dice.choice([first + 5, first + 5, (first + second) / 2, third])
            step = replace(step, mask_scores=scores)
        self.drafter.observe(step)
