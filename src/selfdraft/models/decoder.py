"""The decoder: one forward for the Llama family, configured, beneath which the CPU kernels run.

It reads a transformers configuration, and weights from a folder or a GGUF file (`weights`). Models whose
configuration it does not know (`decoder_config.unsupported`) go through transformers' own forward
(`transformers`). Numerics are exact by construction: a row's bits depend on its own keys alone, so not on the
tree, the batch, the chunk of a prompt, the pages or the number of threads (see `kernels/cpu/attention.h`,
`products.h`).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from ..drafting.method import Lookahead, Loops
from ..engine.tree import Tree
from ..errors import InvalidTree, KVMemoryExhausted, ModelUnsupported
from ..sampling.gumbel import Noise
from .adapters.adapter import Adapter, read_in_turn, targeted
from .adapters.fingerprint import stored_fingerprint
from .adapters.packed import PackedAdapter, TunedWeights
from .batch import Batch
from .decoder_build import Build, OutputPart, Packed
from .decoder_config import unsupported
from .decoder_work import DecoderPool, Work
from .kernels import structures
from .kernels.crowding import Crowding
from .kernels.library import Library
from .numerics import RowRange
from .paged_cache import PagedCache, PagePool, page_limit
from .protocol import Cache, PickMask, Rows
from .step_cost import StepTimes, step_times
from .transformers import MARK, Grade, Numerics
from .weights import Weights

ACTIVATIONS = (8, 16)
"""Bits of the inputs of products with quantised weights."""
SHORTLIST = 32
"""Likeliest tokens of a mask that a sampler head corrects."""


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
        packed: Packed | None = None,
    ) -> None:
        """kind: the format in which linear layers run, one of `weights.WEIGHTS`, or f32. activations: bits of
        the inputs of products with quantised weights, 8 or 16. packed: matrices of the same weights that
        are packed already. Raises ModelUnsupported, ModelCorrupt."""
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
        self._drafting: OutputPart | None = None
        self._weights, self._kind, self._activations = weights, kind, activations
        self._times: StepTimes | None = None
        self._crowding = Crowding(self.threads)
        self._built = Build(config, weights, library, kind, self.threads, packed)
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
        merged into the weights first: matrices that this changes are packed anew. This object stays as it
        is. Raises AdapterError where a part has no place in the model."""
        if adapter.config.gated:
            twin = copy.copy(self)
            sizes = self._built.sizes(self.config)
            twin._packed = PackedAdapter(adapter, sizes, self._built.places, self.library)
            if adapter.vocabulary is not None:
                twin._drafting = self._built.output_of(adapter.vocabulary.numpy())
            twin.adapter, twin.lookahead = adapter, adapter.lookahead(self.vocab_size)
            twin._times, twin._crowding = None, Crowding(self.threads)
            return twin
        weights = TunedWeights(self._weights, adapter, self._built.places)
        tuned = Decoder(
            self.config,
            weights,
            self.library,
            kind=self._kind,
            activations=self._activations,
            generation_config=self.generation_config,
            threads=self.threads,
            packed={names: out for names, out in self._built.packed.items() if not weights.changes(names)},
        )
        tuned.loaded, tuned.grade, tuned.tuning_cost = self.loaded, "tuned", adapter.tuning_cost
        if adapter.config.masks:  # which the tuned model itself does not take
            return tuned.adapted(adapter.drafting())
        tuned.lookahead = adapter.lookahead(self.vocab_size)
        return tuned

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
        found = rows.mask_logits(index)
        if self.adapter is None or self.adapter.sampler is None:
            return found

        def read(asked: Sequence[Sequence[int]], before: Sequence[int]) -> list[Tensor]:
            live = [i for i, own in enumerate(asked) if own]
            at = {i: list(index[i]).index(asked[i][0]) for i in live}
            for i, token in zip(live, before, strict=True):
                rows.shortlist(i, asked[i][0], token, found[i][at[i]])
            return [found[i][at[i] : at[i] + 1] for i in live]

        read_in_turn(index, tokens, pick, read)
        return found

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """With one thread for torch: its workers spin after each parallel operation, on the cores that the
        kernels need. (Measured: a sampled step took 5.6 ms, and so 4.3.)"""
        before = torch.get_num_threads()
        if before == 1:
            yield
            return
        try:
            torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(before)

    def cost(self, rows: int, history: int = 0) -> float:
        if self._times is None:
            identity = {
                "decoder": self.library.name,
                "kernels": self.library.digest,
                "config": self.config.to_dict(),
                "weights": self.weights_label,
                "own_threads": self.threads,
                "adapter": None if self.adapter is None else asdict(self.adapter.config),
                "mask_vocabulary": None if self._drafting is None else self._drafting.model.vocabulary,
            }
            self._times = step_times(self, self.rows, identity)
        return self._times(rows, history)

    def mask_cost(self) -> float:
        self.cost(1)
        assert self._times is not None
        return self._times.mask_cost

    def observe(self, rows: int, history: int, seconds: float, masks: bool) -> None:
        if self._times is not None:
            self._times.observe(rows, history, seconds, masks)


@dataclass(frozen=True)
class KernelNoise:
    """See `sampling.gumbel.NoiseSource`. The noise differs from torch's by rounding."""

    library: Library
    block: int = 1

    def noise(
        self, seed: int, sample: int, positions: Sequence[int], vocabulary: int, device: torch.device
    ) -> Tensor:
        return torch.from_numpy(self.library.noise(seed, sample, positions, vocabulary))

    def few(
        self, noise: Noise, position: int, tokens: Sequence[int], vocabulary: int, device: torch.device
    ) -> Sequence[float]:
        return self.library.noise_of(noise.seed, noise.sample, position, tokens)

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
        ends = list(accumulate(self.wanted))
        found = self.work.picks[: ends[-1]].tolist()
        return [found[end - count : end] for end, count in zip(ends, self.wanted, strict=True)]

    @property
    def finite(self) -> Sequence[Sequence[bool]]:
        flags = self.work.finite.view(np.bool_)
        return [
            flags[start : start + count].tolist()
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
        if previous is None and all(mine == range(n) for mine, n in zip(index, self.wanted, strict=True)):
            found = torch.from_numpy(work.logits[: sum(self.wanted), : decoder.vocab_size])
            return list(found.split(list(self.wanted)))
        return self._read(index, decoder._built.model, previous)

    def mask_logits(self, index: Sequence[Sequence[int]]) -> list[Tensor]:
        """Per request [len(index), ids that masks predict] float32, without a sampler head."""
        return self._read(index, self._drafting, None)

    def _read(
        self, index: Sequence[Sequence[int]], model: structures.Model, previous: Sequence[int] | None
    ) -> list[Tensor]:
        work, decoder = self.work, self.decoder
        assert self.step == work.steps, "a later forward has taken the place of these rows"
        rows = [start + row for start, mine in zip(self.starts, index, strict=True) for row in mine]
        structure, logits = work.reading(len(rows), model.vocabulary)
        decoder.library.logits(model, structure, decoder._beside, rows, previous, decoder.threads)
        found = torch.from_numpy(logits[:, : model.vocabulary])
        return list(found.split([len(mine) for mine in index]))

    @property
    def _drafting(self) -> structures.Model:
        """The model whose output layer has the ids that masks predict."""
        part = self.decoder._drafting
        return self.decoder._built.model if part is None else part.model

    def shortlist(self, request: int, row: int, previous: int, logits: Tensor) -> None:
        """Let the adapter's sampler head, which sees a token, correct the SHORTLIST largest logits of a mask
        row, [ids that masks predict], in place. The others become minus infinity."""
        work, decoder = self.work, self.decoder
        assert self.step == work.steps, "a later forward has taken the place of these rows"
        assert decoder._beside is not None
        at = self.starts[request] + row
        own = self._drafting, work.structure, decoder._beside
        decoder.library.shortlist(*own, at, previous, logits.numpy(), SHORTLIST)
