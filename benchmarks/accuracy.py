"""How far logits are from float32 of the same weights, by format and engine, on real text.

    python benchmarks/accuracy.py FILE.jsonl [--model smollm2] [--llama-python PYTHON] [--positions 2048]

FILE: prompts with answers, or any text. The reference is the decoder with the file's weights as float32
numbers, which the tests hold equal to transformers' forward. Engines read the text in windows of 512 tokens.
Error: root mean square of the difference of logits, each row without its mean, over the vocabulary and all
positions. Agreement: positions with the reference's likeliest token. Loss: nats per token of the text itself.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

WINDOW = 512
BLOCK = 64
"""Rows whose logits are compared at a time."""
LLAMA = """
import sys
import numpy as np
import llama_cpp
path, tokens, out, threads = sys.argv[1], np.load(sys.argv[2]), sys.argv[3], int(sys.argv[4])
llama = llama_cpp.Llama(path, n_ctx=tokens.shape[1], n_batch=tokens.shape[1], n_ubatch=tokens.shape[1],
                        n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False)
found = np.lib.format.open_memmap(out, "w+", np.float32, (*tokens.shape, llama.n_vocab()))
for window, to in zip(tokens, found):
    llama.reset()
    llama.eval(window.tolist())
    to[:] = llama.scores[: len(window)]
"""
Forward = Callable[[list[int]], Iterator[NDArray[np.float32]]]
"""Logits of a window's tokens, BLOCK rows at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python")
    parser.add_argument("--positions", type=int, default=2048)
    asked = parser.parse_args()
    from selfdraft import LLM
    from selfdraft._common import machine

    llm = LLM(asked.model, "plain")
    windows = read_windows(asked.text, llm.tokenizer.encode, asked.positions // WINDOW)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        truth = np.lib.format.open_memmap(
            Path(folder) / "truth.npy", "w+", np.float32, (len(windows), WINDOW, llm.model.vocab_size)
        )
        reference = own(asked.model, "float32")
        for window, to in zip(windows, truth, strict=True):
            to[:] = np.concatenate(list(reference(window)))
        for name, forward in forwards(asked.model, asked.llama_python, windows, Path(folder)):
            start = time.perf_counter()
            found[name] = compare(forward, windows, truth)
            line = " ".join(f"{key} {value:8.4f}" for key, value in found[name].items())
            print(f"{name:36} {line}   ({time.perf_counter() - start:.0f} s)", flush=True)
    record = {"machine": machine.describe(torch.device("cpu")), "model": asked.model, "text": asked.text.name}
    print(json.dumps(record | {"positions": len(windows) * WINDOW, "formats": found}))


def read_windows(path: Path, encode: Callable[[str], list[int]], count: int) -> list[list[int]]:
    """So many windows of tokens: the strings of the file's lines, or its text."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode()
    if ".jsonl" in path.suffixes:
        text = "\n\n".join(part for line in text.splitlines() for part in strings(json.loads(line)))
    ids = encode(text[: count * WINDOW * 8])
    if len(ids) < count * WINDOW:
        sys.exit(f"{path} has {len(ids)} tokens; {count * WINDOW} are needed")
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


def strings(value: object) -> Iterator[str]:
    """The texts of a line, words alone left out."""
    if isinstance(value, str) and " " in value:
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def forwards(
    model: str, llama_python: str | None, windows: list[list[int]], folder: Path
) -> Iterator[tuple[str, Forward]]:
    for weights in ("as-stored", "bf16", "q8", "q4"):
        for activations in (None,) if weights == "bf16" else (8, 16):
            bits = f", {activations}-bit activations" if activations else ""
            yield f"own {weights}{bits}", own(model, weights, activations)
    yield "transformers bfloat16", theirs(model)
    if llama_python:
        yield "llama.cpp", llama(model, llama_python, windows, folder)


def own(model: str, weights: str, activations: int | None = None) -> Forward:
    from selfdraft import LLM
    from selfdraft.engine.tree import Tree

    kind = {"dtype": "float32"} if weights == "float32" else {"weights": weights, "activations": activations}
    decoder = LLM(model, "plain", **kind).model

    def run(window: list[int]) -> Iterator[NDArray[np.float32]]:
        cache = decoder.pool().open()
        for at in range(0, WINDOW, BLOCK):
            part = window[at : at + BLOCK]
            rows = decoder.forward([Tree.chain(part)], [cache], wanted=[len(part)])
            yield decoder.head(rows, [range(len(part))])[0].numpy().copy()
            cache.keep(range(len(part)), [])

    return run


def theirs(model: str) -> Forward:
    from selfdraft.models.loading import load_pretrained

    loaded = load_pretrained(model, "bfloat16", "cpu")[0].eval()

    def run(window: list[int]) -> Iterator[NDArray[np.float32]]:
        with torch.inference_mode():
            yield from loaded(torch.tensor([window])).logits[0].float().numpy()[:, None]

    return run


def llama(model: str, python: str, windows: list[list[int]], folder: Path) -> Forward:
    from selfdraft.bench.stored import gguf_source

    tokens, out = folder / "tokens.npy", folder / "llama.npy"
    np.save(tokens, np.array(windows))
    words = [
        python,
        "-c",
        LLAMA,
        str(gguf_source(model)),
        str(tokens),
        str(out),
        str(torch.get_num_threads()),
    ]
    subprocess.run(words, check=True)
    found = iter(np.load(out, mmap_mode="c"))

    def run(window: list[int]) -> Iterator[NDArray[np.float32]]:
        yield next(found)

    return run


def compare(forward: Forward, windows: list[list[int]], truth: NDArray[np.float32]) -> dict[str, float]:
    squares = same = loss = 0.0
    for window, right in zip(windows, truth, strict=True):
        at = 0
        for ours in forward(window):
            difference = ours - right[at : at + len(ours)]
            difference -= difference.mean(-1, keepdims=True)
            squares += float(np.square(difference, dtype=np.float64).sum())
            same += int((ours.argmax(-1) == right[at : at + len(ours)].argmax(-1)).sum())
            after = window[at + 1 : at + 1 + len(ours)]
            loss -= float(
                torch.from_numpy(ours[: len(after)]).log_softmax(-1)[range(len(after)), after].sum()
            )
            at += len(ours)
    positions = len(windows) * WINDOW
    return {
        "error": (squares / truth.size) ** 0.5,
        "agreement": same / positions,
        "loss": loss / (positions - len(windows)),
    }


if __name__ == "__main__":
    main()
