"""What a step costs, and what drafting from a reference gains. Medians of ratios, interleaved.

    python benchmarks/speed.py --data DIR [--model smollm2] [--prompts 20]

DIR holds eval/py_edits.jsonl.gz. Reported, on the same prompts in turn:
- plain decoding (fast, exact) against Hugging Face's `generate` with its cache, same dtype;
- the share of a greedy step outside forward and head;
- a plain step at 200 and at 1,900 tokens;
- llma with the old function as reference against plain: tokens per forward, tokens per second;
- rows: the time of a forward of n rows against one.
Beyond the CPU, fast numerics stand in for exact.
Stop whatever else runs on the machine first. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from selfdraft import LLM, Completion, Engine, SamplingParams, Tree
from selfdraft.drafting import create
from selfdraft.models.loading import DEFAULT_MODEL, load_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--length", type=int, default=128)
    given = parser.parse_args()
    where = {"dtype": given.dtype, "device": given.device}
    fast = LLM(given.model, "plain", **where, numerics="fast")
    on_cpu = fast.model.device.type == "cpu"
    exact = LLM(given.model, "plain", **where, numerics="exact") if on_cpu else fast
    theirs = load_pretrained(given.model, **where)[0].eval()
    with gzip.open(given.data / "eval" / "py_edits.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    random.Random(1).shuffle(rows)
    rows = [r for r in rows if len(exact.encode(r["prompt"])) < 700][: given.prompts]
    record: dict[str, Any] = {
        "model": given.model,
        "dtype": given.dtype,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "device": str(fast.model.device),
        "prompts": len(rows),
    }
    record |= against_generate(exact, fast, theirs, rows, given.length)
    record |= drafting(exact, rows, given.length)
    record |= steps(fast)
    record |= forwards(exact, fast)
    for name, value in record.items():
        print(f"{name:45} {value}")
    print(json.dumps(record))


def against_generate(
    exact: LLM, fast: LLM, theirs: Any, rows: Sequence[Any], length: int
) -> dict[str, object]:
    """Seconds for the same number of greedy tokens, prompt read included, end of text ignored."""

    params = SamplingParams(max_new_tokens=length)

    def ours(llm: LLM, prompt: Sequence[int]) -> None:
        engine = Engine(llm.model)
        for _ in engine.run(engine.submit(prompt, create("plain"), params)):
            pass

    theirs.generation_config = GenerationConfig()  # else its end of text would be filled in
    settings = GenerationConfig(max_new_tokens=length, do_sample=False, pad_token_id=0)

    def generate(prompt: Sequence[int]) -> None:
        ids = torch.tensor([list(prompt)], device=theirs.device)
        theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)

    arms: dict[str, Callable[[Sequence[int]], None]] = {
        "generate": generate,
        "fast": lambda prompt: ours(fast, prompt),
        "exact": lambda prompt: ours(exact, prompt),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for index, row in enumerate([rows[0], *rows]):
        prompt = exact.encode(row["prompt"])
        for name, arm in arms.items():
            start = time.perf_counter()
            arm(prompt)
            if index:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        "generate, tokens/s": length / statistics.median(seconds["generate"]),
        "plain fast, tokens/s": length / statistics.median(seconds["fast"]),
        "plain exact, tokens/s": length / statistics.median(seconds["exact"]),
        "plain fast / generate": ratio(seconds["generate"], seconds["fast"]),
        "plain exact / generate": ratio(seconds["generate"], seconds["exact"]),
        "plain exact / plain fast": ratio(seconds["fast"], seconds["exact"]),
    }


def drafting(exact: LLM, rows: Sequence[Any], length: int) -> dict[str, object]:
    """llma against plain on edits, the old function as reference; plain and drafted in turn."""
    plain: list[Completion] = []
    drafted: list[Completion] = []
    llma = exact.using("llma")
    for index, row in enumerate([rows[0], *rows]):
        old = row["prompt"][row["prompt"].index("```python") :]
        prompt = row["prompt"] + "\n\n"
        one = exact.generate(prompt, raw=True, max_new_tokens=length)
        other = llma.generate(prompt, references=[old], raw=True, max_new_tokens=length)
        if index:
            plain.append(one)
            drafted.append(other)
    seconds = [[r.seconds for r in arm] for arm in (plain, drafted)]
    return {
        "llma, tokens": sum(r.tokens for r in drafted),
        "llma, tokens per forward (step)": sum(r.tokens for r in drafted) / sum(r.forwards for r in drafted),
        "llma, tokens per forward (request)": statistics.mean(r.tokens_per_forward for r in drafted),
        "llma, rows per forward": statistics.mean(r.rows_per_forward for r in drafted),
        "llma / plain, decode time": ratio(*seconds),
        "llma, identical": sum(a.ids == b.ids for a, b in zip(plain, drafted, strict=True)),
    }


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """A model whose forward and head are timed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.inside = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward(self, *args: Any) -> Any:
        return self._timed(self.model.forward, *args)

    def head(self, *args: Any) -> Any:
        return self._timed(self.model.head, *args)

    def _timed(self, call: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        out = call(*args)
        wait(self.model.device)
        self.inside += time.perf_counter() - start
        return out


def steps(fast: LLM) -> dict[str, object]:
    """Share of a plain step outside forward and head, and how a step grows with the text."""
    out: dict[str, object] = {}
    dice = random.Random(0)
    per_step: dict[int, list[float]] = {200: [], 1900: []}
    for temperature in (0.0, 0.8):
        shares = []
        for _ in range(5):
            for length in per_step:
                clock = Clock(fast.model)
                engine = Engine(clock)
                params = SamplingParams(max_new_tokens=120, temperature=temperature, seed=1)
                prompt = dice.choices(range(10, fast.model.vocab_size), k=length)
                request = engine.submit(prompt, create("plain"), params)
                while len(request.runs) < 10:
                    engine.step()
                clock.inside, start = 0.0, time.perf_counter()
                while len(request.runs) < 110:
                    engine.step()
                total = time.perf_counter() - start
                if temperature == 0:
                    per_step[length].append(total / 100)
                shares.append((total - clock.inside) / total)
        name = "greedy" if temperature == 0 else "sampled"
        out[f"outside forward and head, {name} step"] = statistics.median(shares)
    out["step at 200 tokens, ms"] = 1e3 * statistics.median(per_step[200])
    out["step at 1900 tokens, ms"] = 1e3 * statistics.median(per_step[1900])
    return out


def forwards(exact: LLM, fast: LLM) -> dict[str, object]:
    """T(n) / T(1): forward and head of a chain of n rows behind 300 tokens."""
    out: dict[str, object] = {}
    for name, model in (("fast", fast.model), ("exact", exact.model)):
        cache = model.pool().open()
        model.forward([Tree.chain(range(10, 310))], [cache])
        cache.keep(range(300), [])
        counts = (1, 2, 4, 8, 16, 24, 32, 52, 64)
        seconds: dict[int, list[float]] = {n: [] for n in counts}
        for index in range(31):
            for n in counts:
                start = time.perf_counter()
                model.head(model.forward([Tree.chain(range(10, 10 + n))], [cache]), [range(n)])
                wait(model.device)
                if index:
                    seconds[n].append(time.perf_counter() - start)
        out[f"T(1) {name}, ms"] = 1e3 * statistics.median(seconds[1])
        out[f"T(n)/T(1) {name}"] = {n: round(1 / ratio(seconds[1], seconds[n]), 2) for n in counts}
    return out


def ratio(slow: Sequence[float], quick: Sequence[float]) -> float:
    """Median of the paired ratios."""
    return statistics.median(a / b for a, b in zip(slow, quick, strict=True))


if __name__ == "__main__":
    main()
