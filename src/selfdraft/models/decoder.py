"""The decoder: one forward for the Llama family, configured, beneath which the CPU kernels run.

It reads a transformers configuration, and weights from a folder or a GGUF file (`weights`). `unsupported`
says what of a configuration it does not know; such models go through transformers' own forward
(`transformers`). Numerics are exact by construction: a row's bits depend on its own keys alone, so not on the
tree, the batch, the chunk of a prompt, the pages or the number of threads (see `kernels/cpu/attention.h`,
`products.h`).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..drafting.method import Lookahead, Loops
from ..engine.tree import Tree
from ..errors import InvalidTree, KVMemoryExhausted, ModelCorrupt, ModelUnsupported
from ..sampling.gumbel import Noise
from .adapters.adapter import Adapter, read_in_turn, targeted
from .adapters.fingerprint import stored_fingerprint
from .adapters.packed import PackedAdapter, Place, Sizes, TunedWeights
from .batch import Batch
from .kernels import structures
from .kernels.crowding import Crowding
from .kernels.library import FORMATS, WEIGHT_TYPES, Library
from .numerics import RowRange
from .paged_cache import PagedCache, PagePool, page_limit
from .protocol import Cache, PickMask, Rows
from .step_cost import StepTimes, step_times
from .transformers import MARK, Grade, Numerics
from .weights import GROUP, Stored, Weights

FUNCTIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
ACTIVATIONS = (8, 16)
"""Bits of the inputs of products with quantised weights."""
ROTATIONS = ("default", "linear", "llama3", "yarn")
TYPES = ("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "gemma2", "gemma3_text", "phi3", "olmo2")
"""Model types whose forward the tests have found equal to transformers'."""
PARTIAL_FLOATS = 1 << 22
MAX_TILE = 8
"""Rows that products take together, at most: inputs have room for whole tiles."""


def unsupported(config: PretrainedConfig) -> str | None:
    """What of a configuration the decoder does not know, in words; None if it knows all of it."""
    if config.model_type not in TYPES:
        return f"model type {config.model_type}"
    head = _head_size(config)
    if config.hidden_size % GROUP or config.intermediate_size % GROUP or head % 32 or head > 512:
        return f"hidden size {config.hidden_size}, inner size {config.intermediate_size}, head size {head}"
    if config.num_attention_heads * 8 > 64 * config.num_key_value_heads:
        return f"{config.num_attention_heads // config.num_key_value_heads} heads share a key head"
    if _activation(config) not in FUNCTIONS:
        return f"activation {_activation(config)}"
    for name, parameters in _rotations(config).items():
        kind = parameters.get("rope_type", "default")
        if kind not in ROTATIONS:
            return f"rotary positions of the type {kind}"
        if int(head * parameters.get("partial_rotary_factor", 1.0)) % 32:
            return f"rotation of a part of each head ({name})"
    if getattr(config, "quantization_config", None):
        return "quantised weights"
    return None


class Decoder:
    """A causal language model on the CPU kernels. See `protocol.Model`."""

    loops: Loops | None = None
    ragged = True
    numerics: Numerics = "exact"

    def __init__(
        self,
        config: PretrainedConfig,
        weights: Weights,
        library: Library,
        *,
        kind: str = "as-stored",
        activations: int = 8,
        generation_config: GenerationConfig | None = None,
        threads: int | None = None,
    ) -> None:
        """kind: the format in which linear layers run, one of `weights.WEIGHTS`, or f32. activations: bits of
        the inputs of products with quantised weights, 8 or 16. Raises ModelUnsupported, ModelCorrupt."""
        reason = unsupported(config)
        if reason is not None:
            raise ModelUnsupported(f"the decoder does not know {reason}")
        self.config, self.generation_config = config, generation_config
        self.library = library
        self.noise = KernelNoise(library)
        self.threads = threads or torch.get_num_threads()
        self.name = str(config.model_type)
        self.vocab_size = int(config.vocab_size)
        self.context = int(config.max_position_embeddings)
        self.device = torch.device("cpu")
        self.rows = RowRange()
        self.base = self.loaded = self
        """The model whose text is reproduced: this one, or that with merged adapter weights; and the one that
        `adapted` started from."""
        self.adapter: Adapter | None = None
        about: Mapping[str, Any] = getattr(config, MARK, None) or {}
        filler = about.get("filler")
        self.lookahead = None if filler is None else Lookahead((), about.get("odds", {}), filler)
        self.grade: Grade = "tuned" if about else "base"
        self.tuning_cost: Mapping[str, Any] | None = about.get("tuning_cost")
        self._packed: PackedAdapter | None = None
        self._weights, self._kind, self._activations = weights, kind, activations
        self._times: StepTimes | None = None
        self._crowding = Crowding(self.threads)
        self._built = _Build(config, weights, library, kind, self.threads)
        self.dtype = torch.float32 if self._built.wide == 4 else torch.bfloat16
        self.quantised = self._built.quantised
        self.weights_label = weights.label if kind == "as-stored" else kind
        if self.quantised:
            self.weights_label += f", {activations}-bit activations"
        self.weight_bytes = self._built.read_bytes
        self.parameters = self._built.parameters

    def weights_sha256(self) -> str:
        """SHA-256 of the configuration and of all weights as they are packed."""
        digest = hashlib.sha256(self.config.to_json_string().encode())
        for array in self._built.arrays.values():
            digest.update(array.data)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """That of the checkpoint; see `adapters.fingerprint`."""
        return stored_fingerprint(self.config, self.loaded._weights.vector)

    def adapter_shape(
        self, targets: Sequence[str]
    ) -> tuple[int, list[tuple[Tensor, Tensor]], Mapping[str, tuple[int, int]]]:
        """What `Adapter` is made for: the size of an embedding, keys and values like those of each layer, and
        the linear layers with LoRA. Raises AdapterError for a target that it has not."""
        built = self._built
        like = torch.empty(built.key_heads, 1, built.head_size)
        layers = {name: (place.ins, place.outs) for name, place in built.places.items()}
        return built.hidden, [(like, like)] * built.layers, targeted(self.name, layers, targets)

    def adapted(self, adapter: Adapter) -> Decoder:
        """This model with an adapter at work on the rows of its mask tokens; if it is not gated, with LoRA
        merged into the weights first, which are packed again. This object stays as it is. Raises AdapterError
        where a part has no place in the model."""
        if adapter.config.gated:
            twin = copy.copy(self)
            sizes = self._built.sizes(self.config)
            twin._packed = PackedAdapter(adapter, sizes, self._built.places, self.library)
            twin.adapter, twin.lookahead = adapter, adapter.lookahead(self.vocab_size)
            twin._times, twin._crowding = None, Crowding(self.threads)
            return twin
        tuned = Decoder(
            self.config,
            TunedWeights(self._weights, adapter, self._built.places),
            self.library,
            kind=self._kind,
            activations=self._activations,
            generation_config=self.generation_config,
            threads=self.threads,
        )
        tuned.loaded, tuned.grade, tuned.lookahead = self.loaded, "tuned", adapter.lookahead(self.vocab_size)
        tuned.tuning_cost = adapter.tuning_cost
        return tuned.adapted(adapter.drafting()) if adapter.config.masks else tuned

    @property
    def _masks(self) -> int:
        """Mask tokens of its adapter."""
        return 0 if self._packed is None else self._packed.masks

    @property
    def _beside(self) -> structures.Adapter | None:
        return None if self._packed is None else self._packed.structure

    def pool(self, memory: int | None = None) -> PagePool:
        built, page = self._built, self.library.page
        wide = 2 * built.layers * page * built.key_heads * built.head_size * built.wide
        pages = page_limit(memory, wide, -(-self.context // page))
        rank = 0 if self._packed is None else self._packed.rank
        work = Work(built, self.library, self.threads, self._activations, rank)
        return DecoderPool(built.layers, built.key_heads, built.head_size, built.wide, page, pages, work)

    def forward(
        self,
        trees: Sequence[Tree],
        caches: Sequence[Cache],
        stages: int | None = None,
        wanted: Sequence[int] | None = None,
    ) -> DecoderRows:
        paged = [cache for cache in caches if isinstance(cache, PagedCache)]
        for tree, cache in zip(trees, paged, strict=True):
            if not cache.reserve(cache.length + len(tree)):
                raise KVMemoryExhausted(
                    f"no memory for the keys and values of {len(tree)} rows; raise kv_memory"
                )
        counts = list(wanted or [0] * len(trees))
        batch = Batch(trees, paged, counts, self.library.block_rows, self.vocab_size, self._masks)
        self._check(trees, batch)
        pool = paged[0].pool
        assert isinstance(pool, DecoderPool)
        work = pool.work
        work.grow(batch.rows, batch.wanted)
        self._crowding.run(
            batch.rows,
            lambda threads: self.library.step(
                self._built.model, pool.memory, batch.structure, work.structure, self._beside, threads
            ),
        )
        work.steps += 1
        return DecoderRows(self, work, work.steps, batch.starts, [len(tree) for tree in trees], counts)

    def _check(self, trees: Sequence[Tree], batch: Batch) -> None:
        """Raises InvalidTree for what would make a kernel read or write outside of its arrays."""
        if batch.last_position >= self.context:
            raise InvalidTree(
                f"a row stands at position {batch.last_position}; the model's context is {self.context}"
            )
        if batch.outside:
            most = self.vocab_size + self._masks - 1
            masks = f", mask tokens included: {self._masks}" if self._masks else ""
            raise InvalidTree(f"token ids must be from 0 to {most}{masks}")
        most = self.library.tree_slots - 2 * self.library.page
        wide = [len(tree) for tree in trees if len(tree) > most and not tree.is_chain]
        if wide:
            raise InvalidTree(f"a tree has {wide[0]} rows; the limit is {most}")

    def head(self, rows: Rows, index: Sequence[Sequence[int]]) -> list[Tensor]:
        assert isinstance(rows, DecoderRows)
        return rows.logits(index)

    def mask_logits(
        self, rows: Rows, index: Sequence[Sequence[int]], tokens: Sequence[int], pick: PickMask
    ) -> list[Tensor]:
        assert isinstance(rows, DecoderRows)
        if self.adapter is None or self.adapter.sampler is None:
            return rows.logits(index)
        made = read_in_turn(
            index,
            tokens,
            pick,
            lambda asked, before: [row for row in rows.logits(asked, before) if len(row)],
        )
        return [torch.cat(own) if own else torch.empty(0, self.vocab_size) for own in made]

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """With one thread for torch: its workers spin after each parallel operation, on the cores that the
        kernels need. (Measured: a sampled step took 5.6 ms, and so 4.3.)"""
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(before)

    def cost(self, rows: int, history: int = 0) -> float:
        if self._times is None:
            identity = {
                "decoder": self.library.name,
                "config": self.config.to_dict(),
                "weights": self.weights_label,
                "own_threads": self.threads,
                "adapter": None if self.adapter is None else asdict(self.adapter.config),
            }
            self._times = step_times(self, self.rows, identity)
        return self._times(rows, history)


@dataclass(frozen=True)
class KernelNoise:
    """See `sampling.gumbel.NoiseSource`. The noise differs from torch's by rounding."""

    library: Library
    block: int = 1

    def noise(
        self, seed: int, sample: int, positions: Sequence[int], vocabulary: int, device: torch.device
    ) -> Tensor:
        return torch.from_numpy(self.library.noise(seed, sample, positions, vocabulary))

    def draw(self, logits: Tensor, temperature: float, noise: Noise, position: int) -> int:
        logits = logits.contiguous()
        return self.library.draw(
            logits.data_ptr(), temperature, noise.seed, noise.sample, position, len(logits)
        )


@dataclass(frozen=True)
class DecoderRows:
    """What a forward left behind. It holds until the next one."""

    decoder: Decoder
    work: Work
    step: int
    starts: Sequence[int]
    counts: Sequence[int]
    wanted: Sequence[int]

    @property
    def done(self) -> Sequence[Sequence[bool]]:
        return [(True,) * count for count in self.counts]

    @property
    def picks(self) -> Sequence[Sequence[int]]:
        found = iter(self.work.picks[: sum(self.wanted)].tolist())
        return [[next(found) for _ in range(count)] for count in self.wanted]

    @property
    def finite(self) -> Sequence[Sequence[bool]]:
        flags = self.work.finite
        return [
            flags[start : start + count].astype(bool).tolist()
            for start, count in zip(self.starts, self.counts, strict=True)
        ]

    def of(self, requests: Sequence[int]) -> DecoderRows:
        count = len(requests)
        assert list(requests) == list(range(count)), "the trees come first, and all their rows are done"
        parts = (self.starts[:count], self.counts[:count], self.wanted[:count])
        return DecoderRows(self.decoder, self.work, self.step, *parts)

    def logits(self, index: Sequence[Sequence[int]], previous: Sequence[int] | None = None) -> list[Tensor]:
        """Per request [len(index), vocabulary] float32: those of the step where it was asked for them.

        previous: per row the token that an adapter's sampler head sees; None: without that head."""
        work, decoder = self.work, self.decoder
        assert self.step == work.steps, "a later forward has taken the place of these rows"
        if previous is None and all(
            list(mine) == list(range(len(mine))) and len(mine) == n
            for mine, n in zip(index, self.wanted, strict=True)
        ):
            found = torch.from_numpy(work.logits[: sum(self.wanted), : decoder.vocab_size])
            return list(found.split(list(self.wanted)))
        rows = [start + row for start, mine in zip(self.starts, index, strict=True) for row in mine]
        structure, logits = work.reading(len(rows))
        decoder.library.logits(
            decoder._built.model, structure, decoder._beside, rows, previous, decoder.threads
        )
        found = torch.from_numpy(logits[:, : decoder.vocab_size])
        return list(found.split([len(mine) for mine in index]))


class DecoderPool(PagePool):
    """The pages of one engine's requests, and the scratch memory and results of its steps."""

    def __init__(
        self, layers: int, key_heads: int, head_size: int, wide: int, page: int, capacity: int, work: Work
    ) -> None:
        super().__init__(layers, key_heads, head_size, wide, page, capacity)
        self.work = work


class Work:
    """Scratch memory and results of an engine's steps, which grow with the rows."""

    def __init__(
        self, built: _Build, library: Library, threads: int, activations: int = 8, rank: int = 0
    ) -> None:
        """activations: bits of the inputs of products with quantised weights. rank: of an adapter's LoRA."""
        self._built, self._library, self._activations, self._rank = built, library, activations, rank
        self.steps = 0
        self._rows = self._wanted = 0
        self._arrays: dict[str, NDArray[Any]] = {
            "scratch": np.zeros(threads * library.scratch_bytes, np.uint8),
            "partials": np.zeros(PARTIAL_FLOATS, np.float32),
        }
        self.structure = structures.Work()
        self.grow(64, 64)

    @property
    def logits(self) -> NDArray[np.float32]:
        return self._arrays["logits"]

    @property
    def picks(self) -> NDArray[np.int32]:
        """Likeliest tokens of the rows whose logits were wanted; -1 of a row that is not finite."""
        return self._arrays["pick"]

    @property
    def finite(self) -> NDArray[np.uint8]:
        return self._arrays["finite"]

    def reading(self, rows: int) -> tuple[structures.Work, NDArray[np.float32]]:
        """The same with logits of their own, to read rows of the last step: others may still be looked at."""
        self.grow(rows, 0)
        logits = np.empty((rows, self.logits.shape[1]), np.float32)
        structure = structures.Work.from_buffer_copy(self.structure)
        structure.logits, structure.pick = logits.ctypes.data, None
        return structure, logits

    def grow(self, rows: int, wanted: int) -> None:
        """Have room for so many rows, and for the logits of so many."""
        if rows <= self._rows and wanted <= self._wanted:
            return
        built, padded = self._built, self._library.padded
        self._rows, self._wanted = max(self._rows, rows), max(self._wanted, wanted)
        rows, most = max(self._rows, self._wanted) + MAX_TILE, max(self._wanted, 1)
        wide = padded((built.heads + 2 * built.key_heads) * built.head_size)
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "hidden": ((rows, built.hidden), np.float32),
            "qkv": ((rows + 1, wide), np.float32),
            "attended": ((rows + 1, built.heads * built.head_size), np.float32),
            "inner": ((rows + 1, padded(2 * built.inner)), np.float32),
            "change": ((rows + 1, padded(built.hidden)), np.float32),
            "low": ((rows, 3, self._rank), np.float32),
            "logits": ((most, padded(built.vocabulary)), np.float32),
            "pick": ((most,), np.int32),
            "finite": ((rows,), np.uint8),
            "bytes": ((rows, built.widest), np.int8),
            "low_bytes": ((rows, built.widest if self._activations == 16 else 0), np.int8),
            "scales": ((rows, built.widest // GROUP, 4), np.float32),
            "floats": ((rows, built.widest), np.float32),
            "halves": ((rows, built.widest), np.uint16),
        }
        for name, (shape, dtype) in shapes.items():
            old = self._arrays.get(name)
            if old is not None and old.shape == shape:
                continue
            self._arrays[name] = np.zeros(shape, dtype)
            if old is not None and name in ("hidden", "finite"):  # rows whose logits may still be asked for
                self._arrays[name][: len(old)] = old
        for name in ("hidden", "qkv", "attended", "inner", "change", "low", "logits", "pick", "finite"):
            setattr(self.structure, name, self._arrays[name].ctypes.data)
        self.structure.rank = self._rank
        names = ("bytes", "low_bytes", "scales", "floats", "halves")
        inputs = (self._arrays[name].ctypes.data if self._arrays[name].size else None for name in names)
        self.structure.inputs = structures.Inputs(*inputs, built.widest // GROUP)
        self.structure.scratch = self._arrays["scratch"].ctypes.data
        self.structure.partials = self._arrays["partials"].ctypes.data
        self.structure.partial_floats = PARTIAL_FLOATS


class _Build:
    """A model's structures for the kernels, and the arrays that they point to."""

    def __init__(
        self, config: PretrainedConfig, weights: Weights, library: Library, kind: str, threads: int
    ) -> None:
        self._library, self._weights, self._kind, self._threads = library, weights, kind, threads
        self.quantised = False
        self.places: dict[str, Place] = {}
        """Linear layers by name."""
        self.arrays: dict[int, NDArray[Any]] = {}
        self.read_bytes = self.parameters = 0
        self.layers = int(config.num_hidden_layers)
        self.hidden, self.inner = int(config.hidden_size), int(config.intermediate_size)
        self.heads, self.key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.head_size, self.vocabulary = _head_size(config), int(config.vocab_size)
        self.widest = max(self.hidden, self.inner, self.heads * self.head_size)
        offset = 1.0 if config.model_type.startswith("gemma") else 0.0
        self._offset = np.float32(offset)
        rotations = _angles(config, self.head_size)
        table = self._linear("model.embed_tokens.weight", self.vocabulary, self.hidden)
        tied = "lm_head.weight" not in weights
        head = table if tied else self._linear("lm_head.weight", self.vocabulary, self.hidden)
        self.wide = 4 if self._format(head) in ("f16", "f32") else 2
        packed_head = self._matrix([head])  # first: nothing else is held while the largest matrix is read
        weights.release()
        layers = (structures.Layer * self.layers)()
        for i in range(self.layers):
            layers[i] = self._layer(config, i, rotations)
            weights.release()
        self.model = structures.Model(
            layers,
            packed_head,
            self._norm("model.norm.weight", self.hidden),
            self._pointer(table.rows),
            WEIGHT_TYPES[table.kind].number,
            self.layers,
            self.hidden,
            self.heads,
            self.key_heads,
            self.head_size,
            rotations.rotated,
            self.inner,
            self.vocabulary,
            FUNCTIONS[_activation(config)],
            config.rms_norm_eps,
            _attention_scale(config, self.head_size),
            getattr(config, "attn_logit_softcapping", None) or 0.0,
            _embedding_scale(config, self.wide),
            getattr(config, "residual_multiplier", 1.0),
            1.0 / getattr(config, "logits_scaling", 1.0),
            getattr(config, "final_logit_softcapping", None) or 0.0,
            self.wide,
            config.model_type == "olmo2",
        )

    def sizes(self, config: PretrainedConfig) -> Sizes:
        """What an adapter has to fit. Gemma scales embeddings within the table, Granite what comes out of
        it."""
        scale = self.model.embedding_scale
        inside = config.model_type.startswith("gemma")
        shape = self.hidden, self.layers, self.key_heads, self.head_size, self.wide
        return Sizes(*shape, 1.0 if inside else scale, scale if inside else 1.0)

    def _layer(self, config: PretrainedConfig, i: int, rotations: _Angles) -> structures.Layer:
        at = f"model.layers.{i}."
        own, mlp, hidden, inner = at + "self_attn.", at + "mlp.", self.hidden, self.inner
        heads, key_heads = self.heads * self.head_size, self.key_heads * self.head_size
        if config.model_type == "phi3":
            qkv = {own + "qkv_proj": heads + 2 * key_heads}
            gate_up = {mlp + "gate_up_proj": 2 * inner}
        else:
            qkv = {own + "q_proj": heads, own + "k_proj": key_heads, own + "v_proj": key_heads}
            gate_up = {mlp + "gate_proj": inner, mlp + "up_proj": inner}
        before_mlp, after = {
            "gemma": ("pre_feedforward_layernorm", True),
            "olmo2": ("none", True),
        }.get(config.model_type[:5], ("post_attention_layernorm", False))
        windows, joint = _windows(config), config.model_type == "olmo2"
        return structures.Layer(
            self._parts(i, 0, qkv, hidden, 3),
            self._parts(i, 3, {own + "o_proj": hidden}, heads, 1)[0],
            self._parts(i, 4, gate_up, hidden, 2),
            self._parts(i, 6, {mlp + "down_proj": hidden}, inner, 1)[0],
            self._norm(at + "input_layernorm.weight", hidden),
            self._norm(f"{at}{before_mlp}.weight", hidden),
            self._norm(at + "post_attention_layernorm.weight", hidden) if after else None,
            self._norm(at + "post_feedforward_layernorm.weight", hidden) if after else None,
            self._norm(own + "q_norm.weight", heads if joint else self.head_size),
            self._norm(own + "k_norm.weight", key_heads if joint else self.head_size),
            self._pointer(rotations.of(config, i)),
            windows[i],
        )

    def _parts(self, layer: int, product: int, sizes: Mapping[str, int], ins: int, most: int) -> Any:
        """Linear layers that take the same inputs, side by side: neighbours of one format are one matrix.
        product: the number of the first among those of the layer. sizes: of their outputs, by name."""
        names, at = list(sizes), 0
        parts = [self._linear(f"{name}.weight", outs, ins) for name, outs in sizes.items()]
        for i, (name, outs) in enumerate(sizes.items()):
            self.places[name] = Place(layer, product + i, ins, outs, at)
            at += outs
        made, at = (structures.Matrix * most)(), 0
        runs = [list(run) for _, run in groupby(range(len(parts)), lambda i: self._format(parts[i]))]
        for i, run in enumerate(runs):
            made[i] = self._matrix([parts[k] for k in run], [f"{names[k]}.bias" for k in run])
            made[i].at = at
            at += made[i].outs
        return made

    def _matrix(self, parts: Sequence[Stored], biases: Sequence[str] = ()) -> structures.Matrix:
        """One matrix of the outputs of several in one format."""
        format, ins = self._format(parts[0]), parts[0].ins
        self.quantised |= format not in ("bf16", "f16", "f32")
        outs = sum(len(part.rows) for part in parts)
        out = self._library.empty(format, outs, ins)
        at = 0
        for part in parts:
            self._library.pack(part.kind, part.rows, ins, format, at, out, self._threads)
            at += len(part.rows)
        self.read_bytes += out.nbytes
        self.parameters += outs * ins
        bias = None
        if any(name in self._weights for name in biases):
            padded = np.zeros(self._library.padded(outs), np.float32)
            given = np.concatenate([self._weights.vector(name) for name in biases])
            if len(given) != outs:
                raise ModelCorrupt(f"{biases[0]}: {len(given)} biases for {outs} outputs")
            padded[:outs] = given
            bias = self._pointer(padded)
        return structures.Matrix(self._pointer(out), bias, FORMATS[format], outs, ins)

    def _linear(self, name: str, outs: int, ins: int) -> Stored:
        """Raises ModelCorrupt for a matrix of another shape than the configuration's."""
        found = self._weights.linear(name)
        if (len(found.rows), found.ins) != (outs, ins):
            raise ModelCorrupt(
                f"{name} is of the shape {[len(found.rows), found.ins]}; the config wants {[outs, ins]}"
            )
        return found

    def _format(self, part: Stored) -> str:
        """The packed format in which a matrix runs."""
        return part.format if self._kind == "as-stored" else self._kind

    def _norm(self, name: str, size: int) -> int | None:
        if name not in self._weights:
            return None
        found = self._weights.vector(name)
        if found.shape != (size,):
            raise ModelCorrupt(f"{name} is of the shape {list(found.shape)}; the config wants [{size}]")
        return self._pointer(found + self._offset)

    def _pointer(self, array: NDArray[Any] | None) -> int | None:
        if array is None:
            return None
        address = int(array.ctypes.data)
        self.arrays[address] = array
        return address


# ---- What configurations say.


def _head_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _activation(config: PretrainedConfig) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _attention_scale(config: PretrainedConfig, head_size: int) -> float:
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None:
        return math.sqrt(1.0 / float(scalar))
    return float(getattr(config, "attention_multiplier", head_size**-0.5))


def _embedding_scale(config: PretrainedConfig, wide: int) -> float:
    if config.model_type.startswith("gemma"):  # which transformers rounds to the dtype of its weights
        scale = torch.tensor(config.hidden_size**0.5)
        return (scale if wide == 4 else scale.to(torch.bfloat16)).item()
    return float(getattr(config, "embedding_multiplier", 1.0))


def _windows(config: PretrainedConfig) -> list[int]:
    """Keys that a row sees in each layer, itself included; 0 for all."""
    size = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        uses = getattr(config, "use_sliding_window", True)
        return [size if uses else 0] * config.num_hidden_layers
    return [size if kind == "sliding_attention" else 0 for kind in kinds]


def _rotations(config: PretrainedConfig) -> Mapping[str, Mapping[str, Any]]:
    """Rotary parameters by layer type; of most models one set for all."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if parameters and all(found is None or isinstance(found, Mapping) for found in parameters.values()):
        return {kind: found for kind, found in parameters.items() if found}
    return {"": parameters}


class _Angles:
    """Cosines and sines of all positions by layer type, [context, rotated]: cosines, then sines."""

    def __init__(self, rotated: int, tables: Mapping[str, NDArray[np.float32]]) -> None:
        self.rotated, self._tables = rotated, tables

    def of(self, config: PretrainedConfig, layer: int) -> NDArray[np.float32] | None:
        rotates = getattr(config, "no_rope_layers", None)
        if rotates is not None and not rotates[layer]:
            return None
        return self._tables["" if "" in self._tables else config.layer_types[layer]]


def _angles(config: PretrainedConfig, head_size: int) -> _Angles:
    tables, rotated = {}, head_size
    for name, parameters in _rotations(config).items():
        rotated = int(head_size * parameters.get("partial_rotary_factor", 1.0))
        kind, scaling = parameters.get("rope_type", "default"), 1.0
        frequencies = 1.0 / parameters["rope_theta"] ** (torch.arange(0, rotated, 2).float() / rotated)
        if kind != "default":
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        positions = torch.arange(config.max_position_embeddings).float()
        angles = torch.outer(positions, frequencies.float())
        both = torch.cat([angles.cos(), angles.sin()], 1) * scaling
        tables[name] = np.ascontiguousarray(both.numpy())
    return _Angles(rotated, tables)
