"""The curve between price and speed: an adapter that tunes a model, at parts of its strength.

    python benchmarks/price.py --adapter pico-cllm --data DIR [--method jacobi] [--suite py_functions]

LoRA is merged at 0, a quarter, ... of its scale; nothing is trained. For each strength: tokens per forward,
per step and up to the first repetition (greedy), of the method and of plain decoding's texts, which must be
the same; and what it costs (`selfdraft.train.price`): nats per token on the suite's prompts, places where the
likeliest token is the base's, share of tokens behind the first repetition. Only counts: other work on the
machine does not disturb them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import selfdraft
from selfdraft import Engine, Limits
from selfdraft._common.repetition import fresh
from selfdraft.bench import source, suite
from selfdraft.bench.arm import method
from selfdraft.bench.measure import plan
from selfdraft.drafting import create
from selfdraft.models.adapters import folder as adapter_folder
from selfdraft.models.transformers import TransformersModel
from selfdraft.train.price import price


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="pico")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--method", default="jacobi")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--suite", default="py_functions")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    base = selfdraft.load(asked.model)
    adapter = adapter_folder.load(asked.adapter, base.model)
    if adapter.config.gated:
        parser.error(f"{asked.adapter} is gated: the text is the base's, at no price")
    work = plan(source.from_folder(suite.named(asked.suite), asked.data), base, asked.prompts, asked.tokens)
    prompts = [base.encode(item.turns[0]) for item in work.items]
    limits, scale, found = Limits(asked.tokens, base.eos), adapter.config.scale, []
    for strength in asked.strengths:
        adapter.config = replace(adapter.config, alpha=adapter.config.rank * scale * strength)
        tuned = base.model.adapted(adapter)
        same, per_forward = drafted(tuned, asked.method, prompts, limits)
        cost = price(base.model, tuned.base, prompts, limits)
        one = {"strength": strength, "tokens_per_forward": per_forward, "identical": same, **asdict(cost)}
        found.append(one)
        print(
            f"{strength:4.2f}: {per_forward:.3f} tokens per forward, {same} of {len(prompts)} texts "
            f"are plain's; loss {cost.loss[0]:.4f} -> {cost.loss[1]:.4f}, agreement {cost.agreement:.1%}, "
            f"repeated {cost.repeated[0]:.1%} -> {cost.repeated[1]:.1%}"
        )
    if asked.picture:
        draw(asked.picture, found)
    print(json.dumps({**vars(asked), "found": found}, default=str))


def drafted(tuned: TransformersModel, name: str, prompts: list[Any], limits: Limits) -> tuple[int, float]:
    """Texts that are plain decoding's of the same weights, and tokens per forward up to the first
    repetition."""
    tokens = forwards = same = 0
    for prompt in prompts:
        engine = Engine(tuned)
        request = engine.submit(prompt, method(name), limits=limits)
        for _ in engine.run(request):
            pass
        plain = Engine(tuned.base)
        expected = plain.submit(prompt, create("plain"), limits=limits)
        for _ in plain.run(expected):
            pass
        same += request.emitted == expected.emitted
        kept, reached = fresh(list(request.emitted)), 0
        for run in request.runs:
            if reached >= kept:
                break
            reached += run
            forwards += 1
        tokens += kept
    return same, tokens / max(1, forwards)


def draw(path: Path, found: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    points = [(one["loss"][1] - one["loss"][0], one["tokens_per_forward"]) for one in found]
    axes.plot(*zip(*points, strict=True), marker="o")
    for one, point in zip(found, points, strict=True):
        axes.annotate(f"{one['strength']:g}", point, xytext=(4, -10), textcoords="offset points", fontsize=8)
    axes.set(xlabel="loss beyond the base's, nats per token", ylabel="tokens per forward")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
