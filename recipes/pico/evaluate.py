"""Measure a pico on repositories it has not seen: `evaluate.py MODEL --data DIR`.

Three figures. Bits per byte on code: how good a language model it is. Edit accuracy: the share of
an edited function's tokens that it predicts, given the edit prompt and the tokens before; what it
takes to copy. Loops: the share of greedy continuations that end in a repetition, where a drafter
looks better than it is. With `--tasks`, which takes minutes, also how many tasks of HumanEval and
MBPP it passes (passing.py). The last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import selfdraft

import tokenizer as tokens
from bits import bits_per_byte, predictions
from documents import FORMS, Row
from passing import rates
from sets import read, spaced
from settings import HERE, Settings, load
from stream import Ids

console = Console()
LOOP, PERIOD = 48, 24  # a loop: the last 48 tokens repeat themselves at a distance of 24 or less


def windows(texts: Iterable[str], encoder: PreTrainedTokenizerFast, length: int) -> list[Ids]:
    """The texts as training sees them, one after another, cut into windows."""
    encode = encoder.backend_tokenizer.encode
    ids = [id for text in texts for id in [*encode(text).ids, encoder.eos_token_id]]
    whole = len(ids) // length * length
    return list(np.array(ids[:whole], dtype=np.int64).reshape(-1, length))


def edit_accuracy(
    model: PreTrainedModel, encoder: PreTrainedTokenizerFast, edits: list[Row], context: int
) -> float:
    """Share of the responses' tokens that are the likeliest ones; over-long rows are left out."""
    right = seen = 0
    for row in track(edits, "edit accuracy", console=console, transient=True):
        prompt = encoder(row["prompt"] + "\n\n")["input_ids"]
        answer = encoder(row["response"], add_special_tokens=False)["input_ids"]
        if len(prompt) + len(answer) <= context:
            _, likeliest = predictions(model, np.array([*prompt, *answer], dtype=np.int64))
            right += int(likeliest[len(prompt) - 1 :].sum())
            seen += len(answer)
    return right / max(1, seen)


def loops(ids: list[int]) -> bool:
    """Whether a continuation ends in a repetition."""
    tail = ids[-LOOP:]
    return len(tail) == LOOP and any(tail[p:] == tail[:-p] for p in range(1, PERIOD + 1))


def continuations(
    model: PreTrainedModel, encoder: PreTrainedTokenizerFast, prompts: list[str], count: int
) -> Iterator[list[int]]:
    for prompt in track(prompts, "continuations", console=console, transient=True):
        given = encoder(prompt, return_tensors="pt").to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            done = model.generate(  # type: ignore[operator]
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                max_new_tokens=count,
                do_sample=False,
            )
        ids = done[0, given["input_ids"].shape[1] :].tolist()
        yield [id for id in ids if id != encoder.eos_token_id]


def prompts(data: Path, count: int, context: int) -> list[str]:
    """Half of them functions to write, half edits, as far as they leave room for an answer."""
    functions = [row["prompt"] for row in read(data, "py_functions")]
    edits = [row["prompt"] + "\n\n" for row in read(data, "py_edits")]
    fitting = [[p for p in group if len(p) < 2 * context] for group in (functions, edits)]
    return [p for group in fitting for p in spaced(group, count // 2)]


def evaluate(
    folder: Path, data: Path, settings: Settings, adapter: str | None = None, tasks: int = 0
) -> dict[str, float]:
    """The figures of the model in a folder, or of that which an adapter makes of it, by name.

    tasks: of HumanEval and of MBPP, at most; 0 leaves them out.
    """
    how, context = settings.evaluation, settings.shape.context
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        tuned = selfdraft.load(str(folder), adapter=adapter, numerics="fast").model.base.model
        model.load_state_dict(tuned.state_dict())
    model.eval().cuda() if torch.cuda.is_available() else model.eval()
    encoder = tokens.read(folder)
    lengths, figures = tokens.byte_lengths(encoder), dict[str, float]()
    for name, form in {"py_code_main": "file", "py_functions": "function"}.items():
        texts = [text for row in read(data, name) if (text := FORMS[form](row))]
        picked = spaced(windows(texts, encoder, how.context), how.final_windows)
        figures[f"bits_per_byte_{name}"] = bits_per_byte(model, picked, lengths)
    edits = spaced(read(data, "py_edits"), how.edits)
    figures["edit_accuracy"] = edit_accuracy(model, encoder, edits, context)
    asked = prompts(data, how.loop_prompts, context)
    ended = [loops(ids) for ids in continuations(model, encoder, asked, how.loop_tokens)]
    figures["loop_share"] = sum(ended) / max(1, len(ended))
    if tasks:
        generator = selfdraft.load(str(folder), adapter=adapter)
        figures |= rates(generator, data, tasks, how.task_tokens)
    return {name: round(value, 4) for name, value in figures.items()}


def show(figures: dict[str, float]) -> None:
    table = Table("figure", "value", title="pico on held-out repositories")
    for name, value in figures.items():
        table.add_row(
            name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else str(value)
        )
    console.print(table)


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint or an exported folder.")],
    data: Annotated[Path, typer.Option(help="Folder that holds eval/.")],
    settings: Annotated[Path, typer.Option(help="Another settings file.")] = HERE / "settings.toml",
    adapter: Annotated[
        str | None, typer.Option(help="An adapter that tunes it, as pico-cllm.")
    ] = None,
    tasks: Annotated[int, typer.Option(help="Of HumanEval and of MBPP, at most.", min=0)] = 0,
) -> None:
    """Print the model's figures; the last line is JSON."""
    figures = evaluate(model, data, load(settings), adapter, tasks)
    show(figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
