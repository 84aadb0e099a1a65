"""The decoder is transformers' forward in float32; and a row's bits depend on its own keys alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from selfdraft import LLM
from selfdraft.drafting.plain import Plain
from selfdraft.engine.engine import Engine
from selfdraft.engine.tree import Tree
from selfdraft.errors import InvalidOption, InvalidTree, ModelCorrupt, NotFinite
from selfdraft.models.decoder import Decoder
from selfdraft.models.decoder_config import unsupported
from selfdraft.models.kernels import library as kernels
from selfdraft.models.kernels import weight_memory
from selfdraft.models.kernels.crowding import Crowding
from selfdraft.models.kernels.library import FORMATS, WEIGHT_TYPES, Library
from selfdraft.models.kernels.weight_memory import WeightMemory
from selfdraft.models.paged_cache import PagedCache
from selfdraft.models.weights import FolderWeights, ModuleWeights, Stored, Weights
from selfdraft.sampling.gumbel import gumbel
from selfdraft.verify.adversaries import Garbage, Oracle

from runs import greedy, random_prompt, run, sampled

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = {"sliding_window": 24}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**BASE, attention_bias=True, mlp_bias=True),
    "llama, tied": LlamaConfig(**BASE, tie_word_embeddings=True),
    "llama, scaled positions": LlamaConfig(**BASE, rope_parameters=LLAMA3),
    "llama, linear positions": LlamaConfig(
        **BASE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "mistral": MistralConfig(**BASE, **WINDOW),
    "qwen2": Qwen2Config(**BASE, use_sliding_window=True, max_window_layers=2, **WINDOW),
    "qwen3": Qwen3Config(**BASE),
    "granite": GraniteConfig(
        **BASE,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        attention_multiplier=0.2,
    ),
    "smollm3": SmolLM3Config(**BASE, no_rope_layers=[1, 1, 1, 0]),
    "gemma2": Gemma2Config(**BASE, query_pre_attn_scalar=48, **WINDOW),
    "gemma3": Gemma3TextConfig(**BASE, **WINDOW),
    "phi3": Phi3Config(**BASE),
    "olmo2": Olmo2Config(**BASE),
}
TREE = ((0, 7, 1, 9, 2, 7, 8), (-1, 0, 0, 2, 2, 1, 4))  # rows 0, 2 and 4 carry the text's own tokens


class BlockWeights(ModuleWeights):
    """The weights of a model in memory, in blocks of a type of ggml's. With a head in float32 keys and values
    are, too, and products alone round."""

    def __init__(self, model: PreTrainedModel, kind: str, head: str = "F32") -> None:
        super().__init__(model)
        self._kind, self._head = kind, head
        self.stored: dict[str, Stored] = {}

    def linear(self, name: str) -> Stored:
        if name not in self.stored:
            kind, values = self._head if name == "lm_head.weight" else self._kind, self.vector(name)
            blocks = as_blocks(values, kind)
            self.stored[name] = Stored(kind, blocks, values.shape[1], WEIGHT_TYPES[kind].format)
        return self.stored[name]


def as_blocks(values: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
    """Rows of a type; of those that the package gguf only reads random ones, with sound scales."""
    number = GGMLQuantizationType[kind]
    if kind not in ("Q4_K", "Q5_K", "Q6_K", "IQ4_NL"):
        return np.ascontiguousarray(quantize(values, number)).view(np.uint8).reshape(len(values), -1)
    block, size = GGML_QUANT_SIZES[number]
    dice = np.random.default_rng(len(values))
    raw = dice.integers(0, 256, (len(values), values.shape[1] // block, size), dtype=np.uint8)
    scales = dice.uniform(0.001, 0.002, (*raw.shape[:2], 2)).astype(np.float16).view(np.uint8)
    at = size - 2 if kind == "Q6_K" else 0
    width = 4 if kind in ("Q4_K", "Q5_K") else 2
    raw[..., at : at + width] = scales[..., :width]
    return np.ascontiguousarray(raw.reshape(len(values), -1))


def made(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, part in model.named_parameters():
            if "norm" in name or "bias" in name:
                part.add_(0.2 * torch.randn_like(part))
    return model


def build(name: str | None = None) -> Library:
    found = kernels.builds()
    assert found, "there is no build of the kernels: make kernels"
    name = name or found[0]
    return Library(kernels.LIB / f"{name}{kernels.SUFFIX}", name)


def decoder(
    kind: str = "f32",
    library: Library | None = None,
    threads: int = 1,
    activations: int = 8,
    run_as: str | None = None,
    **changed: Any,
) -> Decoder:
    """A random model in a packed format (f32, bf16, q8, q4), or stored in a type of ggml's; that one runs as
    stored, or in the format `run_as`. changed: of its configuration."""
    config, weights = random_weights(kind, tuple(changed.items()))
    run_as = run_as or (kind if kind in FORMATS else "as-stored")
    return Decoder(config, weights, library or build(), kind=run_as, activations=activations, threads=threads)


@cache  # the same for each build and number of threads
def random_weights(kind: str, changed: Sequence[tuple[str, Any]]) -> tuple[LlamaConfig, Weights]:
    shape = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64} if kind.endswith("_K") else {}
    config = LlamaConfig(**{**BASE, **shape, **dict(changed)})
    return config, ModuleWeights(made(config)) if kind in FORMATS else BlockWeights(made(config), kind)


def read(model: Decoder, cache: PagedCache, tree: Tree) -> Tensor:
    """Logits of all rows, copied."""
    rows = model.forward([tree], [cache], wanted=[len(tree)])
    return model.head(rows, [range(len(tree))])[0].clone()


def chain(model: Decoder, ids: Sequence[int], chunk: int) -> tuple[Tensor, PagedCache]:
    cache, found = model.pool().open(), []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        found.append(read(model, cache, Tree.chain(part)))
        cache.keep(range(len(part)), [])
    return torch.cat(found), cache


def tree_at(ids: Sequence[int], at: int) -> Tree:
    own = {0: ids[at], 1: ids[at + 1], 2: ids[at + 2]}
    return Tree(tuple(own.get(token, token) for token in TREE[0]), TREE[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_transformers_forward(name: str) -> None:
    """Whole, in chunks, as a tree, and behind a tree whose path was kept."""
    model = made(CONFIGS[name])
    own = Decoder(CONFIGS[name], ModuleWeights(model), build(), threads=2)
    ids = random_prompt(60, seed=1)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0]
    whole, _ = chain(own, ids, 60)
    torch.testing.assert_close(whole, theirs, atol=1e-4, rtol=1e-4)
    _, cache = chain(own, ids[:40], 7)
    tree = read(own, cache, tree_at(ids, 40))
    torch.testing.assert_close(tree[[0, 2, 4]], theirs[40:43], atol=1e-4, rtol=1e-4)
    cache.keep([0, 2, 4], [])
    after = read(own, cache, Tree.chain(ids[43:60]))
    torch.testing.assert_close(after, theirs[43:60], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "activations"),
    [*[(kind, 8) for kind in ("f32", "bf16", "F16", "q8", "q4", "Q5_1", "Q6_K")]]
    + [(kind, 16) for kind in ("q8", "q4", "Q5_0", "Q6_K")],
)
@pytest.mark.parametrize("name", kernels.builds())
def test_bits_depend_on_a_rows_own_keys(name: str, kind: str, activations: int) -> None:
    """Chunks of prompts, trees, threads, pages in any order, other requests beside it: the same bits."""
    quick = name == "portable"  # which is slow
    ids, library = random_prompt(270 if quick else 530, seed=2), build(name)

    def on(threads: int) -> Decoder:
        return decoder(kind, library, threads, activations, num_hidden_layers=2)

    alone, _ = chain(on(1), ids, 1)
    model = on(2)
    for chunk in (32,) if quick else (7, 32, 512):
        assert torch.equal(chain(model, ids, chunk)[0], alone), chunk
    for threads in (3,) if quick else (1, 3, 8, 16):
        assert torch.equal(chain(on(threads), ids[:270], 128)[0], alone[:270]), threads
    pool = model.pool()
    dice = random.Random(0)
    used = pool.open()
    used.reserve(200 * library.page)
    used.close()
    for at in (3, 255) if quick else (3, 16, 250, 255, 256, 300, 511):
        filler = [pool.open() for _ in range(dice.randint(0, 3))]
        for one in filler:
            one.reserve(40)
        dice.shuffle(pool._free)
        caches = []
        for _ in range(3):
            cache = pool.open()
            model.forward([Tree.chain(ids[:at])], [cache])
            cache.keep(range(at), [])
            caches.append(cache)
        trees = [tree_at(ids, at), Tree.chain(ids[at : at + 9]), tree_at(ids, at)]
        rows = model.forward(trees, caches, wanted=[len(tree) for tree in trees])
        first, second, third = model.head(rows, [range(len(tree)) for tree in trees])
        assert torch.equal(first[[0, 2, 4]], alone[at : at + 3]), at
        assert torch.equal(second, alone[at : at + 9]), at
        assert torch.equal(first, third), at
        caches[0].keep([0, 2, 4], [])
        assert torch.equal(
            read(model, caches[0], Tree.chain(ids[at + 3 : at + 8])), alone[at + 3 : at + 8]
        ), at


@pytest.mark.parametrize("kind", ["f32", "bf16", "q4"])
def test_drafted_is_plain(kind: str) -> None:
    model = decoder(kind, threads=2)
    for params in (greedy(), sampled()):
        plain = run(model, Plain(), random_prompt(30, seed=3), params)
        for method in (Garbage(), Oracle(plain.emitted)):
            drafted = run(model, method, random_prompt(30, seed=3), params)
            assert drafted.emitted == plain.emitted, method
    assert len(drafted.runs) < 25, "the oracle's right rows must be accepted"


def requantised(values: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """The numbers of weights in a format, in plain numpy."""
    if kind == "bf16":
        return torch.from_numpy(values).bfloat16().float().numpy()
    groups = values.reshape(len(values), -1, 32)
    low = groups.min(-1, keepdims=True) if kind == "q4" else 0 * groups[..., :1]
    range_ = groups.max(-1, keepdims=True) - low if kind == "q4" else np.abs(groups).max(-1, keepdims=True)
    scale = (range_ / {"q8": 127, "q4": 15}[kind]).astype(np.float16).astype(np.float32)
    least = low.astype(np.float16).astype(np.float32)
    q = np.rint((groups - least) / scale).clip(*{"q8": (-127, 127), "q4": (0, 15)}[kind])
    return np.asarray(q * scale + least, np.float32).reshape(values.shape)


@pytest.mark.parametrize("kind", ["bf16", "q8", "q4"])
@pytest.mark.parametrize("name", kernels.builds())
def test_asked_formats_round_to_nearest(name: str, kind: str) -> None:
    """Products of a format are those of the weights as numpy rounds them. (Mutant: `clipped` cuts off.)"""
    model = made(LlamaConfig(**BASE))
    own = decoder(kind, build(name), threads=1, activations=16)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(torch.from_numpy(requantised(module.weight.numpy(), kind)))
        ids = random_prompt(50, seed=4)
        theirs = model(torch.tensor([ids])).logits[0]
    assert distance(chain(own, ids, 50)[0], theirs) < 0.03  # of which keys and values in bfloat16 are a half


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of the difference, relative to that of the second."""
    return float((ours - theirs).pow(2).mean().sqrt() / theirs.pow(2).mean().sqrt())


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
@pytest.mark.parametrize("name", kernels.builds())
def test_types_run_in_a_format_that_holds_them(name: str, kind: str) -> None:
    """As stored and in float32 the same numbers, within the rounding of inputs of 16 bits. (Mutants: a plane
    of bits left out; an offset of 31 for Q6.)"""
    ids = random_prompt(50, seed=4)
    stored = decoder(kind, build(name), threads=1, activations=16)
    numbers = decoder(kind, build(name), threads=1, run_as="f32")
    apart = distance(chain(stored, ids, 50)[0], chain(numbers, ids, 50)[0])
    assert apart < (0.02 if kind == "BF16" else 0.004)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0", "Q6_K"])
def test_inputs_of_16_bits_are_nearer_to_float32(kind: str) -> None:
    """(Mutant: the low bytes are left out.)"""
    ids = random_prompt(50, seed=4)
    truth, _ = chain(decoder(kind, run_as="f32"), ids, 50)
    coarse = distance(chain(decoder(kind, activations=8), ids, 50)[0], truth)
    fine = distance(chain(decoder(kind, activations=16), ids, 50)[0], truth)
    assert fine < coarse / 4


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8", "q4"])
def test_a_row_that_is_not_finite_ends_its_request_alone(kind: str) -> None:
    """NaN in the embedding of one token: its request ends, a draft with it is rejected, the neighbour is
    untouched."""
    config = LlamaConfig(**BASE)
    model = made(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[300] = torch.nan
    own = Decoder(config, ModuleWeights(model), build(), kind=kind, threads=2)
    sound = random_prompt(20, seed=5, vocabulary=290)
    plain = run(own, Plain(), sound, greedy(20))
    engine = Engine(own)
    bad = engine.submit([*sound, 300], Plain(), greedy(20))
    good = engine.submit(sound, Oracle([300, *plain.emitted[1:]]), greedy(20))
    while engine.requests:
        engine.step()
    assert isinstance(bad.error, NotFinite)
    assert bad.finish_reason == "error"
    assert good.emitted == plain.emitted


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (Tree.chain([320]), "from 0 to 319"),
        (Tree.chain([-5]), "from 0 to 319"),
        (Tree((1,) * 600, (-1, *([0] * 599))), "600 rows; the limit is 512"),
        (Tree.chain([1] * 1025), "position 1024; the model's context is 1024"),
    ],
)
def test_what_would_leave_the_arrays_is_refused(tree: Tree, says: str) -> None:
    model = decoder("q8")
    with pytest.raises(InvalidTree, match=says):
        read(model, model.pool().open(), tree)


def test_configurations_that_it_does_not_know() -> None:
    known = CONFIGS["llama"]
    assert unsupported(known) is None
    assert unsupported(LlamaConfig(**{**BASE, "hidden_act": "relu"})) == "activation relu"
    assert "head size 20" in str(unsupported(LlamaConfig(**{**BASE, "head_dim": 20})))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "dynamic" in str(unsupported(LlamaConfig(**BASE, rope_parameters=dynamic)))


def test_a_folder_gives_the_weights_of_the_model(tmp_path: Path) -> None:
    model = made(CONFIGS["llama"])
    model.save_pretrained(tmp_path)
    own, stored = ModuleWeights(model), FolderWeights(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert np.array_equal(stored.linear(name).rows, own.linear(name).rows)
    assert stored.label == "float32"
    assert "lm_head.bias" not in stored


def with_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A safetensors file with another header."""
    contents = path.read_bytes()
    length = int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8 : 8 + length])
    change(header)
    made = json.dumps(header).encode()
    path.write_bytes(len(made).to_bytes(8, "little") + made + contents[8 + length :])


def test_damaged_safetensors_are_named_errors(tmp_path: Path) -> None:
    """Lengths and offsets beyond the file, sizes that are not the shape's, a header that is none."""
    name = "model.layers.1.self_attn.q_proj.weight"
    file = tmp_path / "model.safetensors"
    made(CONFIGS["llama"]).save_pretrained(tmp_path)
    whole = file.read_bytes()

    def offsets(begin: int, end: int) -> Callable[[dict[str, Any]], None]:
        return lambda header: header[name].update(data_offsets=[begin, end])

    for change, says in (
        (offsets(1 << 40, (1 << 40) + 128 * 64 * 4), "truncated or damaged"),
        (offsets(0, 4), f"tensor {name} of .* has 4 bytes"),
        (lambda header: header[name].pop("shape"), "header is damaged"),
    ):
        with_header(file, change)
        with pytest.raises(ModelCorrupt, match=says):
            FolderWeights(tmp_path)
        file.write_bytes(whole)
    file.write_bytes((1 << 50).to_bytes(8, "little") + whole[8:])
    with pytest.raises(ModelCorrupt, match="truncated or damaged"):
        FolderWeights(tmp_path)


def test_weights_of_another_shape_than_the_config(tmp_path: Path) -> None:
    """They would make a kernel read beyond them."""
    made(CONFIGS["llama"]).save_pretrained(tmp_path)
    wider = LlamaConfig(**{**BASE, "intermediate_size": 160})
    with pytest.raises(ModelCorrupt, match=r"gate_proj\.weight is of the shape \[128, 64\]; .*\[160, 64\]"):
        Decoder(wider, FolderWeights(tmp_path), build())


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
@pytest.mark.parametrize("name", kernels.builds())
def test_blocks_hold_the_numbers_of_the_gguf_package(name: str, kind: str) -> None:
    """Packed as float32. Scales of the types K are rounded to half precision on the way."""
    shape, library = (29, 512), build(name)
    rows = as_blocks(np.random.default_rng(0).standard_normal(shape).astype(np.float32), kind)
    theirs = dequantize(rows, GGMLQuantizationType[kind]).reshape(shape)
    out = WeightMemory().zeros(library.packed_bytes("f32", *shape))
    library.pack(kind, rows, shape[1], "f32", 0, out, 2)
    panels = out.view(np.float32).reshape(-1, shape[1], library.lanes)
    ours = panels.transpose(0, 2, 1).reshape(-1, shape[1])[: shape[0]]
    bound = 1e-3 * float(np.abs(theirs).max()) if kind.endswith("_K") else 0
    np.testing.assert_allclose(ours, theirs, atol=bound, rtol=0)


@given(st.lists(st.integers(0, 300), max_size=12))
def test_weights_cut_from_one_array_do_not_overlap(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_memory, "CHUNK", 512)
        patch.setattr(weight_memory, "LARGE", 250)
        memory = WeightMemory()
        cut = [memory.zeros(size) for size in sizes]
    for number, part in enumerate(cut, start=1):
        assert not part.any()
        part[:] = number
    assert [part.tolist() for part in cut] == [[i] * size for i, size in enumerate(sizes, start=1)]
    assert all(part.ctypes.data % weight_memory.ALIGNED == 0 for part in cut if len(part))


def test_a_build_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.CHOICE, "avx1024")
    kernels.library.cache_clear()
    with pytest.raises(InvalidOption, match="avx1024"):
        kernels.library()
    monkeypatch.setenv(kernels.CHOICE, "none")
    kernels.library.cache_clear()
    assert kernels.library() is None
    kernels.library.cache_clear()


@pytest.mark.parametrize(("here", "says"), [([], "were not built"), (["portable"], "are slow")])
def test_slow_ways_are_said_once(
    here: list[str], says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(kernels.CHOICE)
    monkeypatch.setattr(kernels, "builds", lambda: here)
    kernels.library.cache_clear()
    for _ in range(2):
        kernels.library()
    kernels.library.cache_clear()
    assert len(caplog.records) == 1
    assert says in caplog.text


class Busy:
    """A clock for steps: on several threads they take longer while another process keeps a core busy."""

    def __init__(self) -> None:
        self.now, self.used, self.busy = 0.0, list[int](), False

    def step(self, threads: int) -> None:
        self.used.append(threads)
        self.now += 1.8 if threads == 1 else 5.0 if self.busy else 1.0


def test_steps_run_on_one_thread_while_a_core_is_busy() -> None:
    machine = Busy()
    crowding = Crowding(2, lambda: machine.now)
    for busy in (False, True, False):
        machine.busy = busy
        before, machine.used = machine.now, []
        for _ in range(200):
            crowding.run(1, machine.step)
        alone = machine.used.count(1)
        assert (alone > 150) == busy, "one thread while it is busy, else both"
        assert machine.now - before < (1.3 * 1.8 if busy else 1.3) * 200


def test_one_thread_is_given_up_where_it_does_not_help() -> None:
    """A history that grows makes steps longer, on one thread too."""
    machine = Busy()
    crowding = Crowding(2, lambda: machine.now)
    crowding.run(1, machine.step)
    for _ in range(500):
        crowding.run(1, lambda threads: setattr(machine, "now", machine.now + (9 if threads == 1 else 5)))
    assert machine.now < 1.05 * 500 * 5


@pytest.mark.parametrize("name", kernels.builds())
def test_noise_is_that_of_the_sampler(name: str) -> None:
    positions = [0, 7, 1000]
    ours = build(name).noise(2**63 + 5, 3, positions, 1003)
    theirs = gumbel(2**63 + 5, 3, positions, 1003, torch.device("cpu"))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-6, rtol=5e-6)


def test_a_model_goes_the_way_that_its_config_allows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.CHOICE)
    kernels.library.cache_clear()
    try:
        llm = LLM(str(folder), "plain")
        assert llm.route.startswith("decoder")
        assert llm.model.weights_label == "bfloat16"
        text = llm.generate("def add(a, b):", max_new_tokens=8)
        assert (text.weights, text.numerics) == ("bfloat16", "exact")
        q4 = LLM(str(folder), "plain", weights="q4", activations=16)
        assert q4.generate("def", max_new_tokens=1).weights == "q4, 16-bit activations"
        with pytest.raises(InvalidOption, match="weights"):
            LLM(str(folder), "plain", weights="q3")
        with pytest.raises(InvalidOption, match="8 or 16"):
            LLM(str(folder), "plain", weights="q4", activations=4)
        with pytest.raises(InvalidOption, match="goes with quantised weights"):
            LLM(str(folder), "plain", activations=16)
        with pytest.raises(InvalidOption, match="activations=16 needs the decoder"):
            LLM(str(folder), "plain", activations=16, dtype="float64")
        with pytest.raises(InvalidOption, match="give one"):
            LLM(str(folder), "plain", weights="q4", dtype="float32")
        assert "dtype float64" in LLM(str(folder), "plain", dtype="float64").route
    finally:
        kernels.library.cache_clear()
