"""What drafters gain and what they cost, on the engine and beside it.

    python benchmarks/drafters.py --data DIR [--suite py_code] [--prompts 20] [--method llma ...]

For each method, against plain decoding of the same prompts in turn: tokens and rows per forward, the
median and the 10th percentile of paired ratios of decode time, the same as expected from the measured
cost of rows, which other work on the machine does not disturb, and the drafter's own time per step.
With --index: the index of references of 300,000 tokens, time to build, bytes a token, time to look up.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import selfdraft
from selfdraft import LLM, Engine, Method, SamplingParams, Step, Tree
from selfdraft._common.repetition import fresh
from selfdraft.bench import source, suite
from selfdraft.bench.arm import method
from selfdraft.bench.measure import plan
from selfdraft.drafting.suffix_index import SuffixIndex
from selfdraft.models.loading import DEFAULT_MODEL


@dataclass
class Timed:
    """A method whose drafter is timed, and its rows counted as they ran."""

    method: Method
    seconds: list[float] = field(default_factory=list)

    def drafter(self, context: selfdraft.DraftContext) -> Timed:
        start = time.perf_counter()
        self.inner = self.method.drafter(context)
        self.setup = time.perf_counter() - start
        self.rows: list[int] = []
        self.runs: list[int] = []
        return self

    def propose(self, tokens: Sequence[int]) -> Tree:
        start = time.perf_counter()
        tree = self.inner.propose(tokens)
        self.seconds.append(time.perf_counter() - start)
        return tree

    def observe(self, step: Step) -> None:
        start = time.perf_counter()
        self.inner.observe(step)
        self.seconds[-1] += time.perf_counter() - start
        self.rows.append(len(step.tree))
        self.runs.append(len(step.path))


@dataclass
class Gain:
    """One method's figures: ratios to plain per prompt, runs and rows per step."""

    timed: Timed
    measured: list[float] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    same: int = 0

    def record(self) -> dict[str, object]:
        micro = sorted(1e6 * s for s in self.timed.seconds)
        return {
            "tokens/forward": round(sum(self.runs) / len(self.runs), 2),
            "rows/forward": round(sum(self.rows) / len(self.rows), 1),
            **spread("measured", self.measured),
            **spread("expected", self.expected),
            "drafter us, median and p95": [round(micro[len(micro) * p // 100]) for p in (50, 95)],
            "identical": f"{self.same}/{len(self.measured)}",
        }


def spread(name: str, ratios: Sequence[float]) -> dict[str, object]:
    ratios = sorted(ratios)
    return {name: [round(statistics.median(ratios), 2), round(ratios[len(ratios) // 10], 2)]}


def decode(
    llm: LLM,
    way: Method,
    prompt: Sequence[int],
    given: Sequence[Sequence[int]],
    params: SamplingParams,
) -> selfdraft.Request:
    engine = Engine(llm.model)
    request = engine.submit(prompt, way, params, given, eos_ids=llm.eos_ids)
    for _ in engine.run(request):
        pass
    return request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--suite", default="py_code")
    parser.add_argument("--method", action="append")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--index", action="store_true")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    record = index() if given.index else gains(given)
    for name, value in record.items():
        print(f"{name:30} {value}")
    print(json.dumps(record))


def gains(given: argparse.Namespace) -> dict[str, object]:
    """All methods on each prompt in turn, plain first; texts end before they loop."""
    llm = LLM(given.model)
    work = plan(source.from_folder(suite.named(given.suite), given.data), llm, given.prompts, given.length)
    plain = method("plain")
    gain = {name: Gain(Timed(method(name))) for name in given.method or ["auto", "llma", "jacobi"]}
    cost = llm.model.cost
    for index, item in enumerate([work.items[0], *list(work.items) * given.repeats]):
        params = SamplingParams(max_new_tokens=work.length, temperature=given.temperature, seed=index)
        prompt = llm.encode(item.turns[0])
        texts = [llm.encode(text, special=False) for text in item.references]
        answer = decode(llm, plain, prompt, texts, params)
        params = replace(params, max_new_tokens=max(1, fresh(answer.emitted)))
        base = decode(llm, plain, prompt, texts, params)
        for own in gain.values():
            request = decode(llm, own.timed, prompt, texts, params)
            if index:  # the first one warms up
                own.measured.append(base.seconds / request.seconds)
                own.expected.append(len(base.emitted) / sum(map(cost, own.timed.rows)))
                own.runs += own.timed.runs
                own.rows += own.timed.rows
                own.same += request.emitted == base.emitted
    costs: dict[str, object] = {
        "cost of rows": {n: round(cost(n), 2) for n in (1, 2, 4, 8, 16, 24, 32, 33, 64)}
    }
    return costs | {name: own.record() for name, own in gain.items()}


def index(tokens: int = 300_000) -> dict[str, object]:
    """Texts that are like prose, and the worst: random, one token, a short period."""
    dice = random.Random(0)
    texts = {
        "random": dice.choices(range(8192), k=tokens),
        "zipf": [min(int(dice.paretovariate(0.3)), 8191) for _ in range(tokens)],
        "one token": [5] * tokens,
        "period 3": [1, 2, 3] * (tokens // 3),
        "four tokens": dice.choices(range(4), k=tokens),
    }
    record: dict[str, object] = {}
    for name, text in texts.items():
        start = time.perf_counter()
        built = SuffixIndex([text], text[:300])
        seconds = time.perf_counter() - start
        look = []
        for token in text[1000:1300]:
            built.extend([token])
            start = time.perf_counter()
            built.find(8)
            look.append(1e6 * (time.perf_counter() - start))
        tracemalloc.start()
        held = SuffixIndex([text], text[:300])
        held_bytes, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        record[name] = {
            "build, s": round(seconds, 3),
            "bytes/token": round(held_bytes / len(held.ids), 1),
            "while building": round(peak / len(held.ids), 1),
            "look-up us, median": round(statistics.median(look), 1),
            "look-up us, p99": round(sorted(look)[len(look) * 99 // 100], 1),
        }
    return record


if __name__ == "__main__":
    main()
