"""Collecting Jacobi trajectories: cached and in batches, against the uncached collector as published.

    python benchmarks/trajectories.py [--model pico] [--prompts FILE] [--tokens 64] [--batch 32] [--repeats 3]

`uncached` is the algorithm of CLLM (arXiv 2403.00835, section 3.3.1) with transformers' own model: prompt by
prompt, and for every pass a whole forward over prompt, answer so far and block, until a block stays as it is.
Against it what `selfdraft trajectories` runs: one answer at a time, which shows the share of the cache, and
in a batch. Same prompts, greedy, of the same length, in the same dtype; loops are not cut. Loading is not
timed; of ours the tokenizer and the writing of rows are.

Arms run in turn, behind a warm-up; ratios are medians of those within a round. First states are drawn anew,
so the number of passes differs a little. Answers must be equal up to rounding, and are counted. Prompts are
JSON lines with a column `prompt`; without, those of `selfdraft verify`. Stop whatever else runs on the
machine first. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch

import selfdraft
from selfdraft._common import machine
from selfdraft.engine.request import first_end
from selfdraft.models.loading import load_pretrained
from selfdraft.train import shards
from selfdraft.train.distill import Recipe, asked
from selfdraft.train.prompts import Prompts
from selfdraft.train.trajectories import Recorded, Recording
from selfdraft.verify.prompts import PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="pico")
    parser.add_argument("--prompts")
    parser.add_argument("--limit", type=int, default=32, help="prompts, at most")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer, at most")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    given = parser.parse_args()
    where = {"dtype": given.dtype, "device": given.device}
    generator = selfdraft.load(given.model, Recorded(given.block), **where, numerics="fast")
    theirs = load_pretrained(given.model, **where)[0].eval()
    prompts = read(given.prompts)
    ids = [row["prompt"] for row in ours(generator, prompts, given, given.batch)[0]]  # those that fit
    uncached(theirs, ids[0], given, generator.eos, random.Random(0))
    paces: dict[str, list[float]] = {}
    equal: dict[str, int] = {}
    for number in range(given.repeats):
        dice, start = random.Random(number), time.perf_counter()
        answers = [uncached(theirs, prompt, given, generator.eos, dice) for prompt in ids]
        made = {"uncached": (answers, time.perf_counter() - start)}
        for batch in (1, given.batch):
            rows, seconds = ours(generator, prompts, given, batch)
            made[f"batch {batch}"] = [row["answer"] for row in rows], seconds
        for name, (found, seconds) in made.items():
            paces.setdefault(name, []).append(sum(map(len, found)) / seconds)
            equal[name] = sum(a == b for a, b in zip(found, answers, strict=True))
    record: dict[str, Any] = vars(given) | {"answers": len(ids)}
    for name, found in paces.items():
        ratio = median(a / b for a, b in zip(found, paces["uncached"], strict=True))
        record[name] = {"tokens_per_second": median(found), "ratio": ratio, "equal": equal[name]}
        same = f"{equal[name]} of {len(ids)} answers equal"
        print(f"{name:9} {median(found):9,.1f} tokens/s, {ratio:6.2f} of uncached, {same}")
    print(json.dumps(record | {"load": os.getloadavg()[0], "on": machine.describe(generator.model.device)}))


def read(file: str | None) -> Prompts:
    """The prompts of a file, or the built-in ones."""
    if file is not None:
        return Prompts([file])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
        return Prompts([str(path)])


def ours(
    generator: selfdraft.LLM, prompts: Prompts, given: argparse.Namespace, batch: int
) -> tuple[list[dict[str, Any]], float]:
    """The rows, by index, and the seconds that they took."""
    recipe = Recipe(given.tokens, greedy_share=1, cut_loops=False)
    with tempfile.TemporaryDirectory() as folder:
        about = asked(generator, prompts, recipe) | {"block": given.block}
        kept = shards.Shards(Path(folder), about, 1000)
        start = time.perf_counter()
        Recording(generator, prompts, recipe, kept, batch, given.limit).run()
        seconds = time.perf_counter() - start
        kept.close()
        rows = [json.loads(x) for path in shards.shards(Path(folder)) for x in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["index"]), seconds


@torch.inference_mode()
def uncached(
    model: Any, prompt: list[int], given: argparse.Namespace, eos: frozenset[int], dice: random.Random
) -> list[int]:
    """An answer by whole forwards. Its states are kept while it is made, as they would be to be written."""
    text, end, kept = list(prompt), len(prompt) + given.tokens, []
    while len(text) < end:
        state, following = [], dice.choices(text, k=min(given.block, end - len(text)))
        while following != state:
            state = following
            kept.append(state)
            ids = torch.tensor([[*text, *state]], device=model.device)
            following = model(ids, use_cache=False).logits[0, len(text) - 1 : -1].argmax(-1).tolist()
        last = first_end(state, eos)
        if last is not None:
            return [*text[len(prompt) :], *state[: last + 1]]
        text += state
    return text[len(prompt) :]


if __name__ == "__main__":
    main()
