"""What a step of the decoder takes by rows and history, beside llama.cpp on the same file, in turn.

    python benchmarks/steps.py --llama-python PYTHON --model FILE.gguf [--weights bf16] [--file OTHER.gguf]

A step of n rows reads n tokens behind a history and makes the logits of all of them; a prompt makes one.
--file is the file for llama.cpp, where its weights have another format than the model's. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

ROWS = (1, 2, 4, 8, 16)
PROMPT = 512
PROMPT_ROUNDS = 3  # the first touches memory that nobody has used before
ROUNDS = 5
REPEATS = 6
WORKER = """
import json, sys, time
import llama_cpp
path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
llama = llama_cpp.Llama(path, n_ctx=context, n_batch=512, n_ubatch=512, n_threads=threads,
                        n_threads_batch=threads, logits_all=True, verbose=False,
                        type_k=int(sys.argv[4]), type_v=int(sys.argv[4]))
context = llama._ctx
for line in sys.stdin:
    ids, keep, rows, repeats = json.loads(line)
    if keep == 0:
        context.kv_cache_clear()
        batch, start = llama._batch, time.perf_counter()
        for at in range(0, len(ids), 512):
            part = ids[at:at + 512]
            batch.set_batch(batch=part, n_past=at, logits_all=False)
            context.decode(batch)
        print(json.dumps([time.perf_counter() - start]), flush=True)
        continue
    took = []
    for _ in range(repeats):
        context.kv_cache_seq_rm(0, keep, -1)
        batch = llama._batch
        batch.set_batch(batch=ids[:rows], n_past=keep, logits_all=True)
        start = time.perf_counter()
        context.decode(batch)
        took.append(time.perf_counter() - start)
    print(json.dumps(took), flush=True)
"""


def own(model: str, weights: str | None) -> tuple[Callable[..., list[float]], dict[str, object]]:
    """Steps of the decoder, in the worker's terms, and what it is."""
    from selfdraft import LLM
    from selfdraft.engine.tree import Tree

    llm = LLM(model, "plain", weights=weights)
    decoder = llm.model
    pool = decoder.pool()
    state = {"cache": pool.open()}

    def run(ids: list[int], keep: int, rows: int, repeats: int) -> list[float]:
        took = []
        with decoder.stepping():
            if keep == 0:
                state["cache"].close()
                state["cache"] = cache = pool.open()
                start = time.perf_counter()
                for at in range(0, len(ids), PROMPT):
                    part = ids[at : at + PROMPT]
                    decoder.forward([Tree.chain(part)], [cache], wanted=[1])
                    cache.keep(range(len(part)), [])
                return [time.perf_counter() - start]
            tree = Tree.chain(ids[:rows])
            for _ in range(repeats):
                start = time.perf_counter()
                decoder.forward([tree], [state["cache"]], wanted=[rows])
                took.append(time.perf_counter() - start)
        return took

    about = {"runs on": llm.route, "weights": decoder.weights_label, "bytes": decoder.weight_bytes}
    return run, about | {"vocabulary": decoder.vocab_size, "threads": decoder.threads}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights")
    parser.add_argument("--file", help="for llama.cpp; default: the model's")
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--history", type=int, nargs="+", default=[300, 2000])
    asked = parser.parse_args()
    from selfdraft._common import machine
    from selfdraft.bench.bound import bandwidth
    from selfdraft.bench.stored import gguf_source

    ours, about = own(asked.model, asked.weights)
    file = asked.file or str(gguf_source(asked.model))
    kind = (
        "30" if asked.weights == "bf16" else "1"
    )  # ggml's numbers of bfloat16 and float16, for its KV cache
    words = [
        asked.llama_python,
        "-c",
        WORKER,
        file,
        str(about["threads"]),
        str(max(asked.history) + 600),
        kind,
    ]
    worker = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None
    assert worker.stdout is not None
    stdin, stdout = worker.stdin, worker.stdout

    def theirs(*job: object) -> list[float]:
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        found: list[float] = json.loads(stdout.readline())
        return found

    dice = random.Random(0)
    ids = [dice.randrange(5, int(str(about["vocabulary"]))) for _ in range(max(asked.history) + PROMPT)]
    times: dict[str, dict[str, list[float]]] = {}
    for name, run in (("own", ours), ("llama.cpp", theirs)) * PROMPT_ROUNDS:
        times.setdefault("prompt of 512", {}).setdefault(name, []).extend(run(ids[:PROMPT], 0, 0, 0))
    for history in asked.history:
        for run in (ours, theirs):
            run(ids[:history], 0, 0, 0)
        for _ in range(ROUNDS):
            for rows in ROWS:
                for name, run in (("own", ours), ("llama.cpp", theirs)):
                    took = run(ids[history:], history, rows, REPEATS)
                    times.setdefault(f"history {history}, {rows} rows", {}).setdefault(name, []).extend(took)
    best = {key: {name: min(took) * 1e3 for name, took in pair.items()} for key, pair in times.items()}
    middle = {
        key: {name: statistics.median(took) * 1e3 for name, took in pair.items()}
        for key, pair in times.items()
    }
    for key, pair in middle.items():
        low = best[key]
        print(
            f"{key:24} own {low['own']:8.2f} ({pair['own']:8.2f}) ms   llama.cpp {low['llama.cpp']:8.2f} "
            f"({pair['llama.cpp']:8.2f}) ms   ratio {low['own'] / low['llama.cpp']:.2f}"
        )
    import torch

    record = {
        "machine": machine.describe(torch.device("cpu")),
        "bandwidth": bandwidth(torch.device("cpu")),
        "own": about,
        "llama.cpp": file.rpartition("/")[2],
        "minimum_ms": best,
        "median_ms": middle,
    }
    print(json.dumps(record))
    stdin.close()


if __name__ == "__main__":
    sys.exit(main())
