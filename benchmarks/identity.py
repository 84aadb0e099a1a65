"""Does a draft ever change a text? Counts differing tokens over real prompts.

    python benchmarks/identity.py --data DIR [--model pico] [--dtype bfloat16] [--tokens 20000] [--with bita]

DIR holds eval/py_edits.jsonl.gz (rows with `prompt` and `response`). For greedy decoding and eight seeds
at temperature 0.8, each prompt is answered plainly; then by llma, jacobi, a drafter that proposes
garbage, and a bushy tree with decoys; then by all of them in batches of four mixed requests that join
and leave. `--with` adds a method that drafts with an adapter, which then is in the model throughout, but for
plain decoding. Every token is compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track

import selfdraft
from selfdraft import Engine, Limits, Method, Sampler
from selfdraft.drafting import create
from selfdraft.models.transformers import TransformersModel
from selfdraft.verify.adversaries import Garbage, Oracle

SAMPLERS = [Sampler(), *(Sampler(0.8, seed=seed) for seed in range(8))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="pico")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--numerics")
    parser.add_argument("--tokens", type=int, default=20_000, help="plain tokens to compare with, at least")
    parser.add_argument("--length", type=int, default=128, help="tokens per answer, at most")
    parser.add_argument("--prompt", type=int, default=400, help="longest prompt, in tokens")
    parser.add_argument("--with", dest="method", help="a method that drafts with an adapter: bita, space")
    parser.add_argument("--adapter", help="its adapter; default: the embedded one")
    given = parser.parse_args()
    where = {"dtype": given.dtype, "device": given.device, "numerics": given.numerics}
    generator = selfdraft.load(given.model, given.method or "plain", adapter=given.adapter, **where)
    with gzip.open(given.data / "eval" / "py_edits.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    compared: Counter[str] = Counter()
    differing: Counter[str] = Counter()
    start = time.time()
    limits = Limits(given.length, generator.eos)
    for row in track(rows, "prompts"):
        if compared["plain"] >= given.tokens:
            break
        prompt = generator.encode(row["prompt"] + "\n\n")
        if len(prompt) <= given.prompt:
            compare(generator, prompt, limits, compared, differing)
    record = {
        "model": given.model,
        "with": given.method,
        "dtype": given.dtype,
        "numerics": generator.model.numerics,
        "rows per call": [generator.model.rows.least, generator.model.rows.most],
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - start),
        "compared": dict(compared),
        "differing texts": {name: differing[name] for name in compared},
    }
    print(json.dumps(record))


def compare(
    generator: selfdraft.LLM,
    prompt: Sequence[int],
    limits: Limits,
    compared: Counter[str],
    differing: Counter[str],
) -> None:
    """One prompt under all samplers, singly and in one engine of at most four requests at a time."""
    mixed = []
    for sampler in SAMPLERS:
        plain = answer(generator.model.base, create("plain"), prompt, sampler, limits)
        compared["plain"] += len(plain)
        methods = drafters(plain, generator)
        for name, method in methods.items():
            ids = answer(generator.model, method, prompt, sampler, limits)
            compared[name] += len(plain)
            differing[name] += ids != plain
        mixed.append((list(methods.values())[len(mixed) % len(methods)], sampler, plain))
    waiting, running, engine = list(mixed), [], Engine(generator.model)
    while waiting or engine.requests:
        if waiting and len(engine.requests) < 4:
            method, sampler, plain = waiting.pop()
            running.append((engine.submit(prompt, method, sampler, limits), plain))
        engine.step()
    for request, plain in running:
        compared["batch of 4"] += len(plain)
        differing["batch of 4"] += request.emitted != plain


def drafters(plain: Sequence[int], generator: selfdraft.LLM) -> dict[str, Method]:
    vocabulary, own = generator.model.vocab_size, generator.method_name
    adapted = {own: generator.method, f"{own} faithful": create(own, {"faithful": True})}
    return {
        **(adapted if generator.model.adapter is not None else {}),
        "llma": create("llma"),
        "jacobi": create("jacobi"),
        "garbage": Garbage(12, vocabulary),
        "bushy": Oracle(plain, 6, vocabulary),
    }


def answer(
    model: TransformersModel, method: Method, prompt: Sequence[int], sampler: Sampler, limits: Limits
) -> Sequence[int]:
    engine = Engine(model)
    request = engine.submit(prompt, method, sampler, limits)
    for _ in engine.run(request):
        pass
    return request.emitted


if __name__ == "__main__":
    main()
