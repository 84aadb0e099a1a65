"""Any Hugging Face causal language model with ordinary attention, through transformers' own forward.

One forward carries one tree per request: rows padded to the widest tree (a pad row repeats row 0), positions
from the depth, and an additive attention mask built from the tree, from which each kind of layer gets its own
(`transformers_inputs`). The base model runs first. The head runs later and only on the rows asked for,
because with a large vocabulary it decides the speed.

Numerics. "fast" runs all rows in one call. "exact" gives every row the same bits whatever the tree,
the batch or the step: attention in float64, and every call of the model within a range of row counts
in which the machine's matrix kernels were seen to agree (`row_range`). Wider forwards run in
pieces, parents first; a piece sees the earlier ones in the cache.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from .._common.machine import weights_sha256
from ..drafting.method import Lookahead, Loops
from ..engine.tree import Tree
from ..errors import InvalidOption, ModelUnsupported
from ..sampling.gumbel import NoiseSource
from . import attention
from .adapters.adapter import Adapter, Gate, attach, check_float, linear_layers, merge, read_in_turn
from .adapters.fingerprint import fingerprint
from .conformance import check_tree, context_length, naming_the_model
from .head import Head, split
from .kv_cache import Lane, Lanes, Pair
from .numerics import RowRange, row_range
from .protocol import Cache, PickMask, Rows
from .step_cost import StepTimes, step_times
from .transformers_inputs import CACHE, Layout, cache_name, kind_masks, layer_kinds, layout, mask_rows

Numerics = Literal["exact", "fast"]
Grade = Literal["base", "tuned"]
MARK = "selfdraft_tuned"  # an entry of the config of a model whose weights were tuned to draft for themselves


@dataclass(frozen=True)
class TransformersRows:
    """What one forward computed."""

    hidden: Tensor  # hidden states, [rows, hidden], of all requests
    start: Sequence[int]  # where the rows of each request begin
    done: Sequence[Sequence[bool]]  # per request and row: has it passed the whole model?

    picks = None

    @property
    def finite(self) -> list[list[bool]]:
        finite = self.hidden.isfinite().all(-1).tolist()
        return [finite[at : at + len(own)] for at, own in zip(self.start, self.done, strict=True)]

    def of(self, requests: Sequence[int]) -> TransformersRows:
        return TransformersRows(
            self.hidden, [self.start[i] for i in requests], [self.done[i] for i in requests]
        )


class TransformersModel:
    """A transformers model behind the engine's interface.

    model: a transformers model, or a peft model around one with an active adapter. It stays the caller's.
    numerics: "exact" or "fast"; None is exact on the CPU in up to 32 bits where it is possible, else fast.
    step_times: what steps cost; None reads or measures it when it is first asked for. The model's attention
    implementation is set to this package's. Raises ModelUnsupported where the model does not verify trees, or
    not exactly although that was asked for.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        numerics: Numerics | None = None,
        step_times: StepTimes | None = None,
    ) -> None:
        self._given = model.eval()
        self.model: Any = transformers_model(model)  # its class mixes in more than its type says
        self.device = self.model.device
        self.dtype = self.model.dtype
        self.context = context_length(self.model)
        self.numerics: Numerics = "fast"  # until `row_range` has found exact to be possible
        self.rows = RowRange()  # the whole range, until a narrower one is found
        self.loaded = self  # the model that `adapted` started from
        self.base = self  # the model whose output is reproduced: itself, or with merged adapter weights
        self.adapter: Adapter | None = None
        about: Mapping[str, Any] = getattr(self.model.config, MARK, None) or {}
        filler = about.get("filler")
        self.lookahead = None if filler is None else Lookahead((), about.get("odds", {}), filler)
        self.grade: Grade = "tuned" if about else "base"
        self.tuning_cost: Mapping[str, Any] | None = about.get("tuning_cost")
        self._gate = Gate()
        self.step_times = step_times
        own = self.model.config._attn_implementation
        self.own_attention: str = "eager" if own == attention.NAME else own  # as the model came here
        with naming_the_model(self.model, "its forward is not that of a causal language model"):
            self.kinds = layer_kinds(self.model)
            self.model.set_attn_implementation(attention.NAME)
            self.vocab_size, self._base, self._head = self._split()
            self._cache_name = cache_name(self._base.forward) or CACHE
        self._settle(numerics)

    @property
    def name(self) -> str:
        return str(self.model.config.model_type)

    noise: NoiseSource | None = None
    ragged = False

    @property
    def config(self) -> PretrainedConfig:
        return cast(PretrainedConfig, self.model.config)

    @property
    def generation_config(self) -> GenerationConfig | None:
        return cast(GenerationConfig | None, getattr(self.model, "generation_config", None))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return int(self.model.num_parameters())

    @property
    def weights_label(self) -> str:
        """The format in which the weights are held."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a forward reads: all except an untied input embedding. Looped layers count
        once per pass."""
        table = self.model.get_input_embeddings().weight
        head = self.model.get_output_embeddings()
        tied = head is not None and getattr(head, "weight", None) is table
        total = _bytes(self.model.parameters())
        if self.loops is not None:
            total += (self.loops.count - 1) * _bytes(self.model.model.layers.parameters())
        return total if tied else total - table.numel() * table.element_size()

    def weights_sha256(self) -> str:
        """SHA-256 of the configuration and of all weights as they were loaded."""
        return weights_sha256(self.model)

    @property
    def loops(self) -> Loops | None:
        return None

    @property
    def width(self) -> int:
        """Of an embedding."""
        token = torch.zeros(1, dtype=torch.long, device=self.device)
        return int(self.model.get_input_embeddings()(token).shape[-1])

    def pool(self, memory: int | None = None) -> Lanes:
        if memory is not None:
            raise InvalidOption(
                f"kv_memory={memory}: this model runs through transformers' forward, "
                "whose cache grows as it is needed",
                option="kv_memory",
            )
        return Lanes(*self._stored())

    def _stored(self) -> tuple[torch.dtype | None, Sequence[Pair | None]]:
        """What a cache holds: its dtype, and what stands before every history."""
        prefix = self.adapter.pairs() if self.adapter is not None else ()
        return torch.float64 if self.numerics == "exact" else None, prefix

    def fingerprint(self) -> str:
        """That of the weights; see `adapters.fingerprint`."""
        return fingerprint(self.model)

    def adapter_shape(
        self, targets: Sequence[str]
    ) -> tuple[int, list[Pair | None], Mapping[str, tuple[int, int]]]:
        """What `Adapter` is made for: the size of an embedding, keys and values like those of each layer, and
        the linear layers with LoRA. Raises AdapterError for a target that it has not."""
        return self.width, self.read([0]), linear_layers(self.model, targets)

    def adapted(self, adapter: Adapter) -> TransformersModel:
        """This model with an adapter at work on the rows of its mask tokens; if it is not gated, with LoRA
        merged into the weights first. Other weights are shared, this object and its model stay as they are.
        Raises AdapterError where a part has no place in the model."""
        if adapter.config.gated:
            return self.learning(adapter)
        tuned = self._twin(merge(self.model, adapter))
        tuned.base, tuned.grade, tuned.tuning_cost = tuned, "tuned", adapter.tuning_cost
        if adapter.config.masks:  # which the tuned model itself does not take
            return tuned.adapted(adapter.drafting())
        tuned.lookahead = adapter.lookahead(self.vocab_size)
        return tuned

    def learning(self, adapter: Adapter) -> TransformersModel:
        """The same with LoRA beside the weights, gated or not, so that it can be trained."""
        model, gate = attach(self.model, adapter)
        twin = self._twin(model)
        twin.adapter, twin.lookahead, twin._gate = adapter, adapter.lookahead(self.vocab_size), gate
        return twin

    def copied(self, dtype: torch.dtype) -> TransformersModel:
        """The same model with weights of its own, in that dtype, which take gradients: to train all of it.
        Buffers, as rotations, stay as they are. Raises AdapterError for weights that are quantised."""
        model = copy.deepcopy(self.model)
        for name, weight in model.named_parameters():
            check_float(name, weight)
            weight.data = weight.data.to(dtype)
        twin = self._twin(model.requires_grad_())
        twin.dtype = dtype
        return twin

    def _twin(self, model: PreTrainedModel) -> TransformersModel:
        twin = copy.copy(self)
        twin.model = twin._given = model
        twin.step_times = None
        _, twin._base, twin._head = twin._split()
        return twin

    def read(self, tokens: Sequence[int]) -> list[Pair | None]:
        """Keys and values that a text leaves in each layer, [heads, tokens, size]; None: it keeps none."""
        pool = Lanes()
        self.forward([Tree.chain(tokens)], [pool.open()])
        kept = ((layer.keys, layer.values) for layer in pool.own)
        return [
            None
            if keys is None or values is None
            else (keys[0, :, : len(tokens)], values[0, :, : len(tokens)])
            for keys, values in kept
        ]

    @torch.inference_mode()
    def forward(
        self,
        trees: Sequence[Tree],
        caches: Sequence[Cache],
        stages: int | None = None,
        wanted: Sequence[int] | None = None,
    ) -> TransformersRows:
        lanes = cast(Sequence[Lane], caches)
        order = sorted(range(len(lanes)), key=lambda i: lanes[i].index)
        width = max(len(tree) for tree in trees)
        hidden = []
        for group in self._groups(order):
            hidden.append(self._run([trees[i] for i in group], [lanes[i] for i in group], width))
        together = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        return TransformersRows(
            together.flatten(0, 1),
            [width * order.index(i) for i in range(len(order))],
            [[True] * len(tree) for tree in trees],
        )

    def _groups(self, order: Sequence[int]) -> Iterator[Sequence[int]]:
        """Requests that one call can have together, in order."""
        while order:
            count = self.rows.together(len(order))
            yield order[:count]
            order = order[count:]

    def _run(self, trees: Sequence[Tree], lanes: Sequence[Lane], rows: int) -> Tensor:
        """Hidden states of these lanes, which are in order, [lanes, rows, hidden]."""
        pieces = self.rows.pieces(rows, len(lanes))
        width = pieces[-1][1]
        pool = lanes[0].lanes
        lengths = [lane.length for lane in lanes]
        slots = pool.bind(lanes, width)
        laid = self.layout(trees, lengths, width, slots, pool.dtype)
        made = kind_masks(self.kinds, laid.seen, laid.positions, pool.fixed)
        hidden = []
        for start, stop in pieces:
            pool.start = start
            hidden.append(self.call(laid, made, pool, start, stop))
        together = hidden[0] if len(hidden) == 1 else torch.cat(hidden, 1)
        finite = pool.finite()
        if finite is not None:  # what was mended in the cache stays visible in the row itself
            together = together.masked_fill(~finite[..., None], torch.nan)
        return together[:, :rows]

    def layout(
        self,
        trees: Sequence[Tree],
        lengths: Sequence[int],
        width: int,
        slots: int,
        dtype: torch.dtype | None = None,
    ) -> Layout:
        """What a forward over these trees takes, behind histories of these lengths; see `layout`."""
        fixed = self.adapter.config.prefix if self.adapter is not None else 0
        return layout(trees, lengths, width, slots, self.vocab_size, dtype or self.dtype, self.device, fixed)

    def call(
        self, laid: Layout, made: Mapping[str, Tensor], cache: transformers.Cache, start: int, stop: int
    ) -> Tensor:
        """Hidden states of some rows of a layout, with the masks made from it, [lanes, rows, hidden]."""
        with self._gate.open(laid.mask_tokens_of(start, stop)):
            output = self._base(
                input_ids=laid.ids[:, start:stop],
                position_ids=laid.positions[:, start:stop],
                attention_mask=mask_rows(made, start, stop),
                use_cache=True,
                **{self._cache_name: cache},
            )
        return cast(Tensor, output[0])

    def stepping(self) -> AbstractContextManager[None]:
        return nullcontext()

    def cost(self, rows: int, history: int = 0) -> float:
        if self.step_times is None:
            self.step_times = step_times(self, self.rows, self._shape())
        return self.step_times(rows, history)

    def mask_cost(self) -> float:
        self.cost(1)
        assert self.step_times is not None
        return self.step_times.mask_cost

    def observe(self, rows: int, history: int, seconds: float, masks: bool) -> None:
        if self.step_times is not None:
            self.step_times.observe(rows, history, seconds, masks)

    def _shape(self) -> Mapping[str, object]:
        """What the time of a step depends on: the shapes and dtypes of weights, and what else is computed."""
        layers = Counter(
            f"{type(part).__name__} {[(*w.shape, w.dtype) for w in part.parameters(recurse=False)]}"
            for part in self.model.modules()
        )
        adapter = None if self.adapter is None else asdict(self.adapter.config)
        return {"model": self.name, "layers": layers, "numerics": self.numerics, "adapter": adapter}

    @torch.inference_mode()
    def head(self, rows: Rows, index: Sequence[Sequence[int]]) -> list[Tensor]:
        logits = self.logits(_chosen(cast(TransformersRows, rows), index))
        return list(logits.split([len(own) for own in index]))

    @torch.inference_mode()
    def mask_logits(
        self, rows: Rows, index: Sequence[Sequence[int]], tokens: Sequence[int], pick: PickMask
    ) -> list[Tensor]:
        if self.adapter is None or self.adapter.sampler is None:
            return [self.drafted(own) for own in self.head(rows, index)]

        def read(asked: Sequence[Sequence[int]], before: Sequence[int]) -> Sequence[Tensor]:
            told = torch.tensor(list(before), device=self.device)
            hidden = self.apply_sampler_head(_chosen(cast(TransformersRows, rows), asked), told)
            return list(self.drafted(self.logits(hidden)).split(1))

        made = read_in_turn(index, tokens, pick, read)
        return [torch.cat(own) if own else torch.empty(0, self.vocab_size) for own in made]

    def drafted(self, logits: Tensor) -> Tensor:
        """Logits of the ids that masks predict, of those of all, [rows, vocabulary]."""
        ids = None if self.adapter is None else self.adapter.vocabulary
        return logits if ids is None else logits.index_select(-1, ids.to(logits.device))

    def apply_sampler_head(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Hidden states of mask rows, [rows, hidden], conditioned on the token before the one that each
        predicts, [rows] int64."""
        if self.adapter is None or self.adapter.sampler is None:
            return hidden
        embedded = self.model.get_input_embeddings()(previous)
        return cast(Tensor, self.adapter.sampler(hidden, embedded))

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary], in calls whose row count keeps the bits."""
        parts = []
        for start, stop in self.rows.pieces(len(hidden)):
            part = hidden[start:stop]
            pads = part[:1].expand(stop - start - len(part), -1)
            full = self._head(torch.cat([part, pads]) if len(pads) else part)
            parts.append(full[: len(part)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def output(self, hidden: Tensor) -> Tensor:
        """The same in one call, with gradients."""
        return self._head(hidden)

    @contextmanager
    def attending(self, implementation: str) -> Iterator[None]:
        """Meanwhile the model computes attention by another implementation, if it lets that be chosen."""
        chosen = self.model.config._attn_implementation == attention.NAME
        if chosen:
            self.model.set_attn_implementation(implementation)
        try:
            yield
        finally:
            if chosen:
                self.model.set_attn_implementation(attention.NAME)

    @torch.inference_mode()
    def reference(self, tokens: Sequence[int], attention: str | None = None) -> Tensor:
        """Logits of transformers' own forward, no cache or mask of ours, [tokens, vocabulary].

        attention: the implementation; None is the one the model came with.
        """
        ids = torch.tensor([list(tokens)], device=self.device)
        with self.attending(attention or self.own_attention):
            return cast(Tensor, self._given(input_ids=ids, use_cache=False).logits[0])

    @torch.inference_mode()
    def _split(self) -> tuple[int, Any, Head]:
        """The vocabulary's size; the parts that make hidden states and logits."""
        tokens = range(4)
        own = self.reference(tokens)
        with self.attending(self.own_attention):
            base, head = split(self.model, torch.tensor([tokens], device=self.device), own)
        return own.shape[-1], base, head

    def _settle(self, asked: Numerics | None) -> None:
        """Pass the probe, and find the row counts of exact numerics if they are wanted; where there are
        none, refuse if they were asked for, else go on without."""
        with naming_the_model(self.model, "its forward does not take a tree"):
            check_tree(self)
        if (asked or default_numerics(self.device, self.dtype)) == "fast":
            return
        self.numerics = "exact"
        try:
            with naming_the_model(
                self.model, "its attention does not take the float64 keys of exact numerics"
            ):
                self.rows = row_range(self)
        except ModelUnsupported as error:
            if asked == "exact":
                raise
            warnings.warn(f"{error}. Going on with fast numerics", stacklevel=4)
            self.numerics, self.rows = "fast", RowRange()


def transformers_model(loaded: torch.nn.Module) -> PreTrainedModel:
    """The model itself, or the one inside a peft wrapper, whose adapter stays active in it.

    Raises ModelUnsupported for any other object.
    """
    inside = cast(Any, loaded).get_base_model() if hasattr(loaded, "get_base_model") else loaded
    if not isinstance(inside, PreTrainedModel):
        raise ModelUnsupported(
            f"{type(loaded).__name__} is not a model; give a name, a transformers model, or a peft model "
            "around one"
        )
    return inside


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _chosen(rows: TransformersRows, index: Sequence[Sequence[int]]) -> Tensor:
    """Hidden states of the rows asked for, request by request, [rows, hidden]."""
    return rows.hidden[[start + row for start, own in zip(rows.start, index, strict=True) for row in own]]


def default_numerics(device: torch.device, dtype: torch.dtype) -> Numerics:
    """Exact on the CPU. Fast elsewhere, and in float64, whose rounding is too fine to show in a text."""
    return "exact" if device.type == "cpu" and dtype != torch.float64 else "fast"
