"""SPEED on looped models: stages a token, speed against plain decoding and its ceiling, depth, requests,
quality.

    python benchmarks/looped.py --model DIR [--model DIR ...] --data DIR [--beside DIR ...] [--picture FILE]

Each model is a looped one; each beside is an unshared one (`selfdraft train speed --loops 1`), for the
picture of latency against held-out loss, which is read from the folder's training.json. For each looped
model, greedy, on prompts of a suite:

- revisions: places of plain's text where the pick after pass g is not the last one's;
- options: tokens of a forward and of a stage, and time against plain decoding, for every spawn depth and
  others, with Hugging Face's `generate` beside; texts that are not plain's are counted;
- the ceiling (G b + h) / (b + h) (arXiv 2310.12072): b is the time of one pass more of a row, h that of its
head;
- depth: the first model run through 2 to 6 times, whatever it was trained for, and read after the last: time
  of a token with speed and without;
- requests: tokens a second of 1, 2, 4 and 8 at once, with speed and without.

Arms run in turn on each prompt, after a warm-up; ratios are medians of those within a prompt. Stop whatever
else runs on the machine first. The last line is JSON."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from selfdraft import Engine, Limits, Method, Sampler, Tree
from selfdraft._common import machine
from selfdraft.bench import source, suite
from selfdraft.bench.arm import Drafted, Generated
from selfdraft.drafting import create
from selfdraft.models.drive import drive
from selfdraft.models.loading import EMBEDDED, load_pretrained
from selfdraft.models.looped.decoder import LoopedForCausalLM
from selfdraft.models.looped.retrofit import share
from selfdraft.models.transformers import TransformersModel

Prompts = Sequence[Sequence[int]]
OPTIONS: dict[str, dict[str, object]] = {
    "speed": {},
    "final only": {"spawn": 1, "revise": False},
    "second": {"spawn": 1, "second": True},
    "gate 0.3": {"spawn": 1, "gate": 0.3},
}
HISTORY = 192  # tokens before the rows that are timed
ROUNDS = 60
SESSIONS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", action="append", default=[], help="a looped model; may be repeated")
    parser.add_argument("--beside", action="append", default=[], help="an unshared one; may be repeated")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--suite", default="py_edits")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    record: dict[str, Any] = {"machine": machine.describe(torch.device(asked.device)), "models": {}}
    for i, name in enumerate(asked.model or ["pico-loop"]):
        model, tokenizer = load_pretrained(name, asked.dtype, asked.device)
        if not isinstance(model, LoopedForCausalLM):
            parser.error(f"{name} is not a looped model; see `selfdraft train speed`")
        prompts = _prompts(asked, tokenizer)
        driven = drive(model)
        one = {
            "shape": f"{model.config.unique_layers}x{model.config.loops}",
            "numerics": driven.numerics,
            "revisions": revisions(driven, prompts, asked.tokens),
            **options(driven, model, prompts, asked.tokens),
            "sessions": requests(driven, prompts, asked.tokens),
            "loss": _loss(name),
        }
        if i == 0:
            one["depth"] = depths(model, prompts, asked.tokens)
        record["models"][Path(name).name] = one
        _tell(name, one)
    record["beside"] = {Path(name).name: beside(name, asked) for name in asked.beside}
    if asked.picture:
        picture(record, asked.picture)
    print(json.dumps(record))


def _prompts(asked: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    items = source.from_folder(suite.named(asked.suite), asked.data).items
    encoded = [tokenizer.encode(item.turns[0]) for item in items]
    fitting = [ids for ids in encoded if 40 <= len(ids) <= 400]
    return [fitting[i * len(fitting) // asked.prompts] for i in range(asked.prompts)]


def decode(
    model: TransformersModel, method: Method, prompts: Prompts, tokens: int
) -> tuple[list[list[int]], float, int]:
    """Texts, and seconds and steps behind the last prompt's reading, of all prompts at once."""
    engine = Engine(model)
    ready = [engine.submit(prompt, method, Sampler(), Limits(tokens + 1)) for prompt in prompts]
    while not all(request.runs and request.added for request in ready):
        engine.step()
    before = sum(request.added for request in ready)
    started, steps = time.perf_counter(), 0
    while engine.requests:
        engine.step()
        steps += 1
    took = time.perf_counter() - started
    made = sum(request.added for request in ready) - before
    return [list(request.emitted) for request in ready], took / made, steps


def revisions(model: TransformersModel, prompts: Prompts, tokens: int) -> list[float]:
    """By pass, the share of plain's tokens at which the pick after it is not the last one's."""
    plain, looped = create("plain"), model.model
    differ, count = torch.zeros(looped.config.loops), 0
    for prompt in prompts:
        text = decode(model, plain, [prompt], tokens)[0][0]
        with torch.inference_mode(), model.attending(model.own_attention):
            out = looped(
                torch.tensor([[*prompt, *text]], device=model.device),
                output_hidden_states=True,
                use_cache=False,
            )
            states = [state[0, len(prompt) - 1 : -1] for state in out.hidden_states[1:]]
            picks = [looped.lm_head(looped.model.readout(state)).argmax(-1) for state in states]
        differ += torch.tensor([int((pick != picks[-1]).sum()) for pick in picks])
        count += len(text)
    return [round(float(share), 4) for share in differ / count]


def options(
    model: TransformersModel, own: LoopedForCausalLM, prompts: Prompts, tokens: int
) -> dict[str, Any]:
    """Every arm on each prompt in turn; b, h and the ceiling."""
    loops = own.config.loops
    asked = {f"spawn {d}": {"spawn": d} for d in range(1, loops + 1)} | OPTIONS
    arms: dict[str, Any] = {
        name: Drafted(name, create("speed", given), model, Sampler(), frozenset())
        for name, given in asked.items()
    }
    arms["plain"] = Drafted("plain", create("plain"), model, Sampler(), frozenset())
    twin = type(own)(own.config).to(own.device)
    twin.load_state_dict(own.state_dict())
    arms["generate"] = Generated("generate", twin.to(own.dtype).eval(), Sampler(), frozenset())
    found: dict[str, dict[str, list[float]]] = {name: {} for name in arms}
    for arm in arms.values():
        arm.answer(prompts[0], [], 16)
    for prompt in prompts:
        answers = {name: arm.answer(prompt, [], tokens) for name, arm in arms.items()}
        plain = answers["plain"]
        for name, answer in answers.items():
            steps = [i for i, run in enumerate(answer.runs) if run]
            speed = (len(answer.ids) - answer.runs[steps[0]]) / (answer.times[-1] - answer.times[steps[0]])
            own_speed = (len(plain.ids) - 1) / (plain.times[-1] - plain.times[0])
            values = {
                "tokens_per_second": speed,
                "ratio": speed / own_speed,
                "tokens_per_forward": len(answer.ids) / (len(answer.runs) * answer.part),
                "stages_per_token": len(answer.runs) * answer.part * loops / len(answer.ids),
                "rows": sum(answer.rows) / len(answer.rows),
                "identical": float(answer.ids == plain.ids),
            }
            for figure, value in values.items():
                found[name].setdefault(figure, []).append(value)
    b, h = parts(own)
    ceiling = (loops * b + h) / (b + h)
    told = {name: {figure: _summed(figure, x) for figure, x in one.items()} for name, one in found.items()}
    return {"group_ms": 1e3 * b, "head_ms": 1e3 * h, "ceiling": ceiling, "arms": told}


def _summed(figure: str, values: Sequence[float]) -> float:
    return round(sum(values) if figure == "identical" else median(values), 4)


def parts(own: LoopedForCausalLM) -> tuple[float, float]:
    """Seconds of one pass more of one row, and of its head."""
    loops, unique = own.config.loops, own.config.unique_layers
    deep, short = drive(own), drive(share(own, unique, 1))
    forwards = [_row(deep), _row(short)]
    head = deep.head
    rows = forwards[0]()
    timed = [[_timed(call) for call in (*forwards, lambda: head(rows, [[0]]))] for _ in range(ROUNDS)][10:]
    whole, first, last = (median(column) for column in zip(*timed, strict=True))
    return (whole - first) / (loops - 1), last


def _row(model: TransformersModel) -> Callable[[], Any]:
    cache = model.pool().open()
    model.forward([Tree.chain([2] * HISTORY)], [cache])
    cache.keep(range(HISTORY), [])
    return lambda: model.forward([Tree.chain([5])], [cache])


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def depths(own: LoopedForCausalLM, prompts: Prompts, tokens: int) -> dict[int, dict[str, float]]:
    """Of the model with 2 to 6 passes: milliseconds a token, plain and with speed, in turn; stages a
    token."""
    models = {g: drive(share(own, own.config.unique_layers, g)) for g in range(2, 7)}
    plain, speed = create("plain"), create("speed", {"spawn": 1})
    found: dict[int, dict[str, list[float]]] = {g: {"plain": [], "speed": [], "stages": []} for g in models}
    for prompt in prompts:
        for g, model in models.items():
            text, slow, _ = decode(model, plain, [prompt], tokens)
            same, fast, steps = decode(model, speed, [prompt], tokens)
            assert same == text
            found[g]["plain"].append(1e3 * slow)
            found[g]["speed"].append(1e3 * fast)
            found[g]["stages"].append(steps / tokens)
    return {g: {name: round(median(x), 3) for name, x in one.items()} for g, one in found.items()}


def requests(model: TransformersModel, prompts: Prompts, tokens: int) -> dict[int, dict[str, float]]:
    """Tokens a second of several requests at once; the best of two rounds in turn."""
    methods = {"plain": create("plain"), "speed": create("speed", {"spawn": 1}), "chosen": create("speed")}
    found: dict[int, dict[str, float]] = {n: {} for n in SESSIONS}
    for _ in range(2):
        for n in SESSIONS:
            for name, method in methods.items():
                rate = 1 / decode(model, method, prompts[:n], tokens)[1]
                found[n][name] = max(found[n].get(name, 0.0), round(rate, 1))
    return found


def beside(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """An unshared model: milliseconds a token, and its loss."""
    model, tokenizer = load_pretrained(name, asked.dtype, asked.device)
    driven, prompts = drive(model), _prompts(asked, tokenizer)
    taken = [decode(driven, create("plain"), [prompt], asked.tokens)[1] for prompt in prompts]
    layers = model.config.num_hidden_layers
    return {"layers": layers, "ms": 1e3 * median(taken), "loss": _loss(name)}


def _loss(name: str) -> float | None:
    """Held-out, after the last pass, as `selfdraft train speed` measured it."""
    path = Path(EMBEDDED.get(name, name)) / "training.json"
    return json.loads(path.read_text())["exits"]["loss"][-1] if path.is_file() else None


def _tell(name: str, one: Mapping[str, Any]) -> None:
    print(f"{name}: {one['shape']}, revised after each pass {one['revisions']}")
    print(f"  b {one['group_ms']:.2f} ms, h {one['head_ms']:.2f} ms, ceiling {one['ceiling']:.2f}")
    for arm, figures in one["arms"].items():
        part = figures["ratio"] / one["ceiling"]
        print(
            f"  {arm:12} {' '.join(f'{key} {value:.3f}' for key, value in figures.items())} of it {part:.2f}"
        )
    print(f"  requests {one['sessions']}\n  depth {one.get('depth')}")


def picture(record: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, one in record["models"].items():
        if "depth" in one:
            passes = list(one["depth"])
            for arm, style in (("plain", "o-"), ("speed", "s-")):
                left.plot(passes, [one["depth"][g][arm] for g in passes], style, label=f"{name}, {arm}")
        if one["loss"] is None:
            continue
        times = [1e3 / one["arms"][arm]["tokens_per_second"] for arm in ("plain", "speed")]
        right.plot(times, [one["loss"]] * 2, "-", color="0.7", zorder=0)
        for arm, at, mark in zip(("plain", "speed"), times, ("o", "s"), strict=True):
            right.plot(at, one["loss"], mark, label=f"{name} ({one['shape']}), {arm}")
    for name, one in record["beside"].items():
        right.plot(one["ms"], one["loss"], "^", label=f"{name}: {one['layers']} layers, unshared")
    left.set(xlabel="passes through the shared layers", ylabel="ms a token", ylim=(0, None))
    right.set(xlabel="ms a token", ylabel="held-out loss, nats a token", xlim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    left.locator_params(axis="x", integer=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
