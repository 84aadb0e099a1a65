"""Many requests at once: throughput, what a long prompt takes from others, turns of a chat, memory.

    python benchmarks/many.py throughput --data DIR [--llama-python PYTHON] [--model FILE.gguf] [--other SRC]
    python benchmarks/many.py stall | chat | memory

throughput: tokens per second of n requests that come together, by each of --methods, and by llama.cpp's
parallel decoding of the same prompts from the same file, in turn; with --other also those of another version
of this package, from its sources. stall: time between tokens of a running request while a prompt of 4,000
tokens is read. chat: time to the first token of each of ten turns, with and without the prefix cache. memory:
what 1,000 waiting prompts, and one long text beside 31 short ones, hold. The last line is JSON."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from selfdraft import LLM, Engine, Limits, SamplingParams
from selfdraft._common import machine
from selfdraft.bench import source, suite
from selfdraft.bench.stored import gguf_source
from selfdraft.drafting.plain import Plain

Run = Callable[[Sequence[Sequence[int]]], tuple[float, list[list[int]]]]
"""Prompts -> seconds and texts."""
SUITES = ("mt_bench", "py_edits", "llma_cnndm")
LONGEST = 700
"""Tokens of a prompt, at most."""
WORKER = """
import json, sys, time
import numpy as np
import llama_cpp as raw
path, threads, requests, tokens = sys.argv[1], *map(int, sys.argv[2:])
raw.llama_log_set(quiet := raw.llama_log_callback(lambda *_: None), None)
model = raw.llama_model_load_from_file(path.encode(), raw.llama_model_default_params())
params = raw.llama_context_default_params()
params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = requests * 1024, requests, 512, 512
params.n_threads = params.n_threads_batch = threads
params.kv_unified = True
context = raw.llama_init_from_model(model, params)
size = raw.llama_vocab_n_tokens(raw.llama_model_get_vocab(model))
batch = raw.llama_batch_init(512, 0, 1)

def add(token, position, sequence, wanted):
    i = batch.n_tokens
    batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
    batch.seq_id[i][0], batch.logits[i] = sequence, wanted
    batch.n_tokens += 1
    return i

def run():
    assert raw.llama_decode(context, batch) == 0

def pick(i):
    return int(np.ctypeslib.as_array(raw.llama_get_logits_ith(context, i), (size,)).argmax())

for line in sys.stdin:
    prompts = json.loads(line)
    raw.llama_memory_clear(raw.llama_get_memory(context), True)
    start, texts = time.perf_counter(), [[] for _ in prompts]
    for s, prompt in enumerate(prompts):
        for at in range(0, len(prompt), 512):
            batch.n_tokens = 0
            for i, token in enumerate(prompt[at:at + 512], at):
                last = add(token, i, s, i == len(prompt) - 1)
            run()
        texts[s].append(pick(last))
    for step in range(1, tokens):
        batch.n_tokens = 0
        rows = [add(texts[s][-1], len(prompt) + step - 1, s, True) for s, prompt in enumerate(prompts)]
        run()
        for s, row in enumerate(rows):
            texts[s].append(pick(row))
    print(json.dumps([time.perf_counter() - start, texts]), flush=True)
"""

OTHER = """
import json, sys, time
from selfdraft import LLM, Engine, SamplingParams
llm = LLM(sys.argv[1], weights=sys.argv[2] or None)
llm.model.cost(1)
methods = {name: llm.using(name).method for name in sys.argv[4:]}
for line in sys.stdin:
    name, prompts = json.loads(line)
    engine, start = Engine(llm.model), time.perf_counter()
    params = SamplingParams(max_new_tokens=int(sys.argv[3]), ignore_eos=True)
    requests = [engine.submit(prompt, methods[name], params) for prompt in prompts]
    while engine.requests:
        engine.step()
    texts = [list(request.emitted) for request in requests]
    print(json.dumps([time.perf_counter() - start, texts]), flush=True)
"""


def throughput(llm: LLM, asked: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second by number of requests, of each way; the best of the rounds."""
    prompts = _prompts(llm, Path(asked.data), max(asked.requests))
    table: dict[str, dict[int, float]] = {}
    equal = True
    other = _other(asked) if asked.other else None
    for count in asked.requests:
        ways: dict[str, Run] = {name: partial(_own, llm.using(name), asked.tokens) for name in asked.methods}
        worker = _worker(llm, asked, count) if asked.llama_python else None
        if worker is not None:
            ways["llama.cpp"] = partial(_ask, worker)
        if other is not None:
            ways |= {f"other {name}": partial(_ask, other, name) for name in asked.methods}
        best: dict[str, float] = {}
        for _ in range(asked.rounds):
            texts = {}
            for way, run in ways.items():
                took, texts[way] = run(prompts[:count])
                best[way] = max(sum(map(len, texts[way])) / took, best.get(way, 0.0))
            equal &= all(texts[name] == texts[asked.methods[0]] for name in asked.methods)
        if worker is not None:
            worker.kill()
        for way, rate in best.items():
            table.setdefault(way, {})[count] = rate
        print(count, "requests:", ", ".join(f"{way} {rate:.0f}" for way, rate in best.items()), flush=True)
    if other is not None:
        other.kill()
    return {"tokens per second": table, "all methods give the same texts": equal, "tokens": asked.tokens}


def stall(llm: LLM, asked: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds between the tokens of running requests, with and without a long prompt that joins."""
    found = {}
    for running in (1, 8):
        for joins in (False, True):
            engine, gaps = Engine(llm.model), []
            params = SamplingParams(max_new_tokens=300, ignore_eos=True)
            requests = [
                engine.submit(llm.prompt_ids(f"Count to {i}."), Plain(), params) for i in range(running)
            ]
            while not all(request.ready for request in requests):
                engine.step()
            if joins:
                long = [5 + i % 40_000 for i in range(asked.prompt)]
                late = engine.submit(long, Plain(), SamplingParams(max_new_tokens=1))
            while requests[0].finish_reason is None and not (joins and late.finish_reason):
                start = time.perf_counter()
                engine.step()
                gaps.append(1e3 * (time.perf_counter() - start))
            found[f"{running} running, {'prompt joins' if joins else 'alone'}"] = {
                "p50": statistics.median(gaps),
                "p95": statistics.quantiles(gaps, n=20)[-1],
                "steps": len(gaps),
            }
            for request in engine.requests:
                engine.cancel(request)
    for name, figures in found.items():
        print(name, {key: round(value, 1) for key, value in figures.items()})
    return found


def chat(llm: LLM, asked: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to the first token of each turn."""
    found: dict[str, list[float]] = {}
    for cached in (True, False):
        messages: list[dict[str, str]] = []
        engine = Engine(llm.model)
        found["cached" if cached else "fresh"] = times = []
        for turn in range(10):
            messages.append({"role": "user", "content": f"Tell me fact number {turn} about the sea, please."})
            ids = llm.prompt_ids(None, messages)
            engine = engine if cached else Engine(llm.model)
            start = time.perf_counter()
            request = engine.submit(ids, llm.method, SamplingParams(max_new_tokens=80), eos_ids=llm.eos_ids)
            while not request.emitted:
                engine.step()
            times.append(1e3 * (time.perf_counter() - start))
            while request.finish_reason is None:
                engine.step()
            messages.append({"role": "assistant", "content": llm.completion(request, True).text})
    for name, times in found.items():
        print(name, [round(took, 1) for took in times])
    return found


def memory(llm: LLM, asked: argparse.Namespace) -> dict[str, Any]:
    """Bytes that pages hold, against those of the tokens in them."""
    engine = Engine(llm.model, Limits(kv_memory=64 << 20))
    page = 2 * engine.pool.keys.nbytes // engine.pool.capacity  # type: ignore[attr-defined]
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    requests = [engine.submit(llm.prompt_ids(f"Name {i} things."), llm.method, params) for i in range(1000)]
    before, most = _resident(), 0
    while engine.requests:
        engine.step()
        most = max(most, (engine.pool.tokens or 0) - (engine.pool.free or 0))
    queued = {
        "limit MB": 64 * 1.048576,
        "held at most MB": most / engine.pool.page * page / 1e6,  # type: ignore[attr-defined]
        "process grew by MB": (_resident() - before) / 1e6,
        "answers": sum(request.finish_reason == "length" for request in requests),
    }
    engine = Engine(llm.model)
    engine.submit([5 + i % 40_000 for i in range(8000)], Plain(), SamplingParams(max_new_tokens=64))
    for i in range(31):
        engine.submit([7 + i] * 60, Plain(), SamplingParams(max_new_tokens=64, ignore_eos=True))
    while not all(request.ready for request in engine.requests):
        engine.step()
    tokens = sum(request.length for request in engine.requests)
    held = (engine.pool.tokens or 0) - (engine.pool.free or 0)
    print(queued, "held per token that is needed:", held / tokens)
    return {"1,000 prompts": queued, "one of 8,000 beside 31": {"tokens": tokens, "held": held}}


def _prompts(llm: LLM, data: Path, count: int) -> list[Sequence[int]]:
    found: list[list[Sequence[int]]] = []
    for name in SUITES:
        items = source.from_folder(suite.named(name), data).items
        ids = (llm.prompt_ids(None, [{"role": "user", "content": item.chat[0]}]) for item in items)
        found.append(
            [one for _, one in zip(range(count), (i for i in ids if len(i) <= LONGEST), strict=False)]
        )
    mixed = [one for group in zip(*found, strict=False) for one in group]
    return mixed[:count]


def _own(llm: LLM, tokens: int, prompts: Sequence[Sequence[int]]) -> tuple[float, list[list[int]]]:
    engine = Engine(llm.model)
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    requests = [engine.submit(prompt, llm.method, params) for prompt in prompts]
    while engine.requests:
        engine.step()
    return time.perf_counter() - start, [list(request.emitted) for request in requests]


def _worker(llm: LLM, asked: argparse.Namespace, count: int) -> subprocess.Popen[str]:
    file = str(gguf_source(asked.model) or asked.model)
    words = [asked.llama_python, "-c", WORKER, file, str(llm.model.threads), str(count), str(asked.tokens)]  # type: ignore[union-attr]
    return _started(words)


def _other(asked: argparse.Namespace) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", OTHER, asked.model, asked.weights or "", str(asked.tokens)]
    words += asked.methods
    return _started(words, {**os.environ, "PYTHONPATH": asked.other})


def _started(words: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _ask(worker: subprocess.Popen[str], *asked: Any) -> tuple[float, list[list[int]]]:
    """The answer of a worker to what it is asked: one thing as it is, several as a list."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(asked[0] if len(asked) == 1 else asked) + "\n")
    worker.stdin.flush()
    took, texts = json.loads(worker.stdout.readline())
    return took, texts


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["throughput", "stall", "chat", "memory"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights")
    parser.add_argument("--data", default="data", help="folder of the benchmark sets")
    parser.add_argument("--methods", nargs="+", default=["plain", "auto", "llma"])
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python")
    parser.add_argument("--other", help="folder of the sources of another version, its kernels built")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=4000)
    asked = parser.parse_args()
    llm = LLM(asked.model, weights=asked.weights)
    found = globals()[asked.what](llm, asked)
    about = {
        "model": asked.model,
        "weights": llm.model.weights_label,
        "machine": machine.describe(llm.model.device),
    }
    print(json.dumps({asked.what: found, **about}))


if __name__ == "__main__":
    main()
