"""Adapters: parameters trained beside a frozen model. A gated adapter affects the rows of mask tokens alone.

Four parts, each optional but the first. Embeddings of the mask tokens (BiTA, arXiv 2401.12522, section 3.2;
SPACE, 2402.11809). A soft prefix: keys and values in the first slots of every lane of the cache (`kv_cache`),
without rotation, visible to mask rows alone (BiTA, 3.1). LoRA on linear layers, gated to mask rows (Samragh
et al., "Your LLM Knows the Future", 2507.11851). A sampler head (the same, 3.2): the token before a mask's
own is not known when the mask runs; when its logits are read it is, or the previous mask's prediction stands
in for it, and two small layers condition the mask on it. Rows of ordinary tokens keep the bits that they have
without an adapter, so drafting with one cannot change a text.

LoRA that is not gated changes every row: the result is another, tuned model (CLLM, arXiv 2403.00835; SPACE as
published). For decoding it is merged into weights of the copy's own. What is left of the adapter (mask
tokens, prefix, sampler head) then works on the tuned model.

An adapter works on a shallow copy of the model: other module objects around the same weights. Hooks on the
copy's embedding and linear layers add the trained parts. The user's model is not touched, several adapters
can be active at the same time, and dropping the copy unloads the adapter. The forward says which rows carry
mask tokens, for the time of one call (`Gate`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...drafting.method import Lookahead
from ...errors import AdapterError, InvalidOption
from ..kv_cache import Pair
from ..protocol import PickMask

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROWS = 12  # of a forward that shows which layers run on rows


@dataclass(frozen=True)
class AdapterConfig:
    """The parts of an adapter and their sizes."""

    masks: Annotated[int, Ge(0)] = 3  # number of mask tokens: how many tokens ahead drafts reach
    distinct: bool = True  # has each mask token an embedding of its own?
    prefix: Annotated[int, Ge(0)] = 0  # slots of the soft prefix in each layer; 0: none
    rank: Annotated[int, Ge(0)] = 0  # of LoRA; 0: none
    alpha: float | None = None  # LoRA is scaled by alpha / rank; None: by 1
    # Last parts of the names of the linear layers with LoRA; none: all of them, for a new adapter.
    targets: tuple[str, ...] = ()
    sampler: Annotated[int, Ge(0)] = 0  # width of the sampler head; 0: none
    gated: bool = True  # does LoRA work on mask rows alone? Else the model is tuned
    filler: Annotated[int, Ge(0)] | None = None  # see `Lookahead.filler`

    def __post_init__(self) -> None:
        if not self.masks and (self.gated or self.prefix or self.sampler):
            raise InvalidOption("masks is 0: an adapter without mask tokens is LoRA alone, not gated")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank


class LowRank(torch.nn.Module):
    """What LoRA adds to one linear layer. a: [rank, in], b: [out, rank], zero at first."""

    def __init__(self, rank: int, features: tuple[int, int]) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(rank, features[0]) * features[0] ** -0.5)
        self.b = torch.nn.Parameter(torch.zeros(features[1], rank))


class SamplerHead(torch.nn.Module):
    """What a token says about the next one, beside what a mask says.

    inner: [width, 2 * hidden]; outer: [hidden, width], zero at first.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner = torch.nn.Parameter(torch.randn(width, 2 * hidden) * (2 * hidden) ** -0.5)
        self.outer = torch.nn.Parameter(torch.zeros(hidden, width))

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Hidden states of masks, [rows, hidden], with the embedding of the token before the one that each
        is about brought in; of the same dtype."""
        both = torch.cat([_unit(hidden), _unit(embedded)], -1).to(self.inner.dtype)
        more = linear(silu(linear(both, self.inner)), self.outer)
        return hidden + more.to(hidden.dtype)


def read_in_turn(
    index: Sequence[Sequence[int]],
    tokens: Sequence[int],
    pick: PickMask,
    read: Callable[[Sequence[Sequence[int]], Sequence[int]], Sequence[Tensor]],
) -> list[list[Tensor]]:
    """Logits of mask rows, mask after mask: a sampler head sees what the one before is taken to predict.

    index, tokens, pick: as `protocol.Model.mask_logits` has them. read: logits of at most one row of each
    request, [1, vocabulary] for each that has one; its second argument holds the token before for each of
    these.
    """
    previous = list(tokens)
    made: list[list[Tensor]] = [[] for _ in index]
    for offset in range(max(len(own) for own in index)):
        live = [i for i, own in enumerate(index) if len(own) > offset]
        found = read([own[offset : offset + 1] for own in index], [previous[i] for i in live])
        for i, row in zip(live, found, strict=True):
            made[i].append(row)
            previous[i] = pick(i, offset, row) if offset + 1 < len(index[i]) else -1
    return made


def _unit(rows: Tensor) -> Tensor:
    """Each row at root mean square 1: embeddings and hidden states are of very different sizes."""
    rows = rows.float()
    return rows * (rows.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Adapter(torch.nn.Module):
    """The trained parts, float32 while they are trained.

    masks: [masks or 1, hidden], embeddings. keys, values: per layer that keeps any, [heads, prefix, size].
    sampler: the sampler head, if any. lora: by the name of the layer in the model. odds, vocabulary: see
    `Lookahead`; the latter is int32 on the CPU.
    tuning_cost: what tuning with it costs, see `train.tuning_cost`; None if unknown.
    Made at random, for a model with embeddings of size `hidden`, layers that keep keys and values shaped
    like `pairs`, and such linear `layers` to change; `adapter_folder` loads one.
    """

    def __init__(
        self,
        config: AdapterConfig,
        hidden: int,
        pairs: Sequence[Pair | None],
        layers: Mapping[str, tuple[int, int]],
    ) -> None:
        super().__init__()
        self.config = config
        self.odds: Mapping[str, Sequence[Sequence[float]]] = {}
        self.vocabulary: Tensor | None = None
        self.tuning_cost: Mapping[str, Any] | None = None
        count = config.masks if config.distinct else min(1, config.masks)
        self.masks = torch.nn.Parameter(torch.randn(count, hidden) * 0.02)
        self.kept: dict[int, str] = {}
        self.keys, self.values = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        for layer, pair in enumerate(pairs):
            if pair is None or not config.prefix:
                continue
            self.kept[layer] = str(layer)
            for mine, like in zip((self.keys, self.values), pair, strict=True):
                part = torch.randn(like.shape[0], config.prefix, like.shape[2]) * 0.02
                mine[str(layer)] = torch.nn.Parameter(part)
        self.sampler = SamplerHead(config.sampler, hidden) if config.sampler else None
        self.names = sorted(layers)
        self.lora = torch.nn.ModuleList(LowRank(config.rank, layers[name]) for name in self.names)

    def pairs(self) -> list[Pair | None]:
        """Keys and values of the prefix, per layer."""
        last = max(self.kept, default=-1)
        return [
            (self.keys[self.kept[i]], self.values[self.kept[i]]) if i in self.kept else None
            for i in range(last + 1)
        ]

    def drafting(self) -> Adapter:
        """Itself without LoRA, which is in the weights: what is left to draft with."""
        tensors = {id(part): part for part in self.parameters()}
        rest = copy.deepcopy(self, cast(dict[int, Any], tensors))
        rest.config = replace(self.config, rank=0, alpha=None, targets=(), gated=True)
        rest.names, rest.lora = [], torch.nn.ModuleList()
        return rest

    def lookahead(self, vocabulary: int) -> Lookahead | None:
        """What it drafts with in a model with so many ids of its own; None if with nothing."""
        if not self.config.masks and self.config.filler is None:
            return None
        ids = tuple(range(vocabulary, vocabulary + self.config.masks))
        predicted = None if self.vocabulary is None else tuple(self.vocabulary.tolist())
        return Lookahead(ids, self.odds, self.config.filler, predicted)

    @property
    def size(self) -> int:
        """Trained parameters."""
        return sum(part.numel() for part in self.parameters())


class Gate(threading.local):
    """Which rows of the current call carry mask tokens.

    Each thread has its own, so that several can run one model at the same time.
    """

    def __init__(self) -> None:
        self.mask_tokens: Tensor | None = None  # index of each row's mask token, [lanes, rows], -1 for none
        self.first = 0  # the first column that holds one
        self.all = False  # do all rows from there on?
        self.open_rows = torch.empty(0)  # which of them do, [lanes, rows, 1] bool

    @contextmanager
    def open(self, mask_tokens: Tensor | None) -> Iterator[None]:
        """For the time of one call. None: no row carries a mask token."""
        if mask_tokens is not None:
            rows = mask_tokens >= 0
            self.mask_tokens = mask_tokens
            self.first = int(rows.any(0).int().argmax())
            own = rows[:, self.first :]
            self.all = bool(own.all())
            self.open_rows = own[..., None]
        try:
            yield
        finally:
            self.mask_tokens = None


def attach(model: PreTrainedModel, adapter: Adapter) -> tuple[PreTrainedModel, Gate]:
    """A twin of the model, same weights, with an adapter in it, and the gate that opens it.

    Raises AdapterError for a LoRA layer that the model does not have, or that is of another size.
    """
    twin, gate = share(model), Gate()
    twin.get_input_embeddings().register_forward_hook(_embed(adapter, gate))
    scale = adapter.config.scale
    for name, module, low in _changed(twin, adapter):
        hook = _add(name, low, scale, gate) if adapter.config.gated else _tune(low, scale)
        module.register_forward_hook(hook)
    return twin, gate


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A twin of the model with LoRA added to its weights, of which it has its own; the others are shared.

    Raises AdapterError as `attach`, and for weights that are quantised.
    """
    twin, scale = share(model), adapter.config.scale
    for name, module, low in _changed(twin, adapter):
        weight = cast(Tensor, getattr(module, "weight", None))
        check_float(name, weight)
        more = scale * (low.b.double() @ low.a.double())  # so that all machines round to the same weights
        tuned = weight.double() + (more.T if isinstance(module, Conv1D) else more)
        module.weight = torch.nn.Parameter(tuned.to(weight.dtype), requires_grad=False)
    return twin


def check_float(name: str, weight: Tensor | None) -> None:
    """See that weights are numbers that can be added to. Raises AdapterError."""
    if weight is None or weight.dtype not in FLOATS:
        raise AdapterError(
            f"{name} is quantised: tune the model as it was before that, and quantise the tuned one"
        )


def _changed(twin: PreTrainedModel, adapter: Adapter) -> Iterator[tuple[str, torch.nn.Module, LowRank]]:
    """The layers that get LoRA. Raises AdapterError for one that is not there, or of another size."""
    modules = dict(twin.named_modules())
    for name, part in zip(adapter.names, adapter.lora, strict=True):
        low = cast(LowRank, part)
        if name not in modules or features(modules[name]) != (low.a.shape[1], low.b.shape[0]):
            raise AdapterError(
                f"the adapter changes layer {name}, which the model has not, or of another size"
            )
        yield name, modules[name], low


def share(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in other module objects: parameters and buffers are shared, hooks and config are not."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def linear_layers(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Linear layers by name, with their sizes in and out, whose names end in one of `targets`.

    Raises AdapterError for a target without any, or that does not run on the rows of a text.
    """
    if not targets:
        return {}
    inner = {name: size for name, module in _inner(model) if (size := features(module)) is not None}
    found = targeted(model.config.model_type, inner, targets)
    fit = all_targets(model)
    wrong = [target for target in targets if target not in fit]
    if wrong:
        raise AdapterError(
            f"{model.config.model_type}: {wrong[0]} does not run on the rows of a text, like the experts "
            f"of a mixture; linear layers that do: {', '.join(fit)}"
        )
    return found


def targeted(
    kind: str, layers: Mapping[str, tuple[int, int]], targets: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Those of the linear layers whose names end in one of `targets`. kind: of the model.

    Raises AdapterError for a target without any.
    """
    last = {name: name.split(".")[-1] for name in layers}
    missing = [target for target in targets if target not in last.values()]
    if missing:
        known = ", ".join(sorted(set(last.values()))) or "none"
        raise AdapterError(f"{kind} has no linear layer {missing[0]}; its linear layers: {known}")
    return {name: layers[name] for name in layers if last[name] in targets}


def all_targets(model: PreTrainedModel) -> tuple[str, ...]:
    """Last parts of the names of all linear layers, but for those that do not run on the rows of a text, as
    the experts of a mixture. Raises AdapterError where there are none."""
    ran: dict[str, bool] = {}

    def note(name: str) -> Any:
        def hook(module: object, args: object, output: object) -> None:
            ran[name] = ran.get(name, True) and _shape(output) in ((1, ROWS), (ROWS,))

        return hook

    modules = [(name, module) for name, module in _inner(model) if features(module) is not None]
    handles = [module.register_forward_hook(note(name)) for name, module in modules]
    try:
        with torch.no_grad():  # of different tokens, which no expert has all
            model(input_ids=torch.arange(ROWS, device=model.device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    wrong = {name.split(".")[-1] for name, fits in ran.items() if not fits}
    targets = {name.split(".")[-1] for name in ran} - wrong
    if not targets:
        raise AdapterError(f"{model.config.model_type} has no linear layers that LoRA could be gated on")
    return tuple(sorted(targets))


def _inner(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """Modules that run with the rows of a text: what makes logits of them comes later, and for few."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    holds = (part for part in model.children() if part is not embedding and embedding in set(part.modules()))
    inside = set(next(holds, model).modules()) - {output}
    return [(name, module) for name, module in model.named_modules() if module in inside]


def _shape(output: object) -> tuple[int, ...] | None:
    """Of the rows of a layer's output; None where it is no such thing."""
    return tuple(output.shape[:-1]) if isinstance(output, Tensor) else None


def features(module: torch.nn.Module) -> tuple[int, int] | None:
    """Sizes in and out of a linear layer, quantised ones among them; None for what is none."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    if isinstance(module, torch.nn.Linear) or type(module).__name__.startswith("Linear"):
        sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
        return cast(tuple[int, int], sizes) if None not in sizes else None
    return None


def _embed(adapter: Adapter, gate: Gate) -> Any:
    """The hook that gives mask rows their embeddings."""

    def hook(module: object, args: object, output: Tensor) -> Tensor | None:
        if gate.mask_tokens is None:
            return None
        table = adapter.masks.to(output.dtype)
        which = gate.mask_tokens.clamp(0, len(table) - 1)
        return torch.where((gate.mask_tokens >= 0)[..., None], table[which], output)

    return hook


def _tune(low: LowRank, scale: float) -> Any:
    """The hook that adds a low-rank part to all rows of a linear layer, while it learns."""

    def hook(module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inner = args[0]
        more = linear(linear(inner, low.a.to(inner.dtype)), low.b.to(inner.dtype))
        return output + more.view(output.shape) * scale

    return hook


def _add(name: str, low: LowRank, scale: float, gate: Gate) -> Any:
    """The hook that adds a low-rank part to the mask rows of a linear layer.

    The other rows are selected, not multiplied by zero: their bits stay, and a NaN cannot leak into them.
    """

    def hook(module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if gate.mask_tokens is None:
            return None
        lanes, rows = gate.mask_tokens.shape
        if _shape(output) not in ((lanes, rows), (lanes * rows,)):  # the latter: all lanes in one
            raise AdapterError(
                f"layer {name} runs on {_shape(output)} rows, the text has {(lanes, rows)}; leave it out of "
                "the targets"
            )
        inner = args[0].view(lanes, rows, -1)[:, gate.first :]
        own = output.view(lanes, rows, -1)[:, gate.first :]
        if torch.is_grad_enabled():  # it learns, on mask rows alone, in the model's dtype
            more = linear(linear(inner, low.a.to(inner.dtype)), low.b.to(inner.dtype))
            return (own + more * scale).view(output.shape)
        # In its own dtype, in which a CPU takes a fraction of the time for so few rows.
        flat = (inner[0] if lanes == 1 else inner.flatten(0, 1)).to(low.a.dtype)
        more = ((flat @ low.a.T) @ low.b.T).view(own.shape)
        if scale != 1:
            more = more * scale
        if gate.all:
            own.add_(more)
        else:
            own.copy_(torch.where(gate.open_rows, own + more, own))
        return None

    return hook
