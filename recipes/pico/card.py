"""The model card of an exported pico, from what was measured and what it was trained on."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from judge import SECONDS
from passing import EXAMS
from samples import Sample, section
from settings import HERE, Settings
from watch import Progress

CARD = """\
---
license: apache-2.0
language: [en, code]
library_name: transformers
pipeline_tag: text-generation
tags: [python, code, speculative-decoding]
---
# pico

A Llama of {millions:.2f} M parameters for Python code: {layers} layers, hidden size {hidden},
{heads} query heads and {key_value_heads} key/value head of {head_size}, {entries:,} entries in the
tokenizer, {context:,} tokens of context. It is the embedded model of *selfdraft*, made to show
drafting from references on any machine: small, quick, and good at copying. It is no assistant.

It knows three forms of prompt: Python to continue; a signature with its docstring, ending in a line
break, whose body follows; and an edit, which is answered by the function in a fenced block:

    Edit this function: rename x to y

    ```python
    def f(x):
        return x + 1
    ```

followed by an empty line.

## Training
{budget}
The repositories `encode/starlette` and `pallets/flask` are held out; the figures are theirs where
no other set is named. An aim is what was wished for before the training.

{figures}
{parts}
## Data
Public text only, under these licences (documents):

| source of the mixture | tokens at hand | licences |
|---|---|---|
{sources}

The repositories: {homes}.

Credits, as the licences ask:

{credits}
"""
TESTED = """\
HumanEval and MBPP (test items 11 to 510): each task is answered once, greedily, in up to {tokens}
tokens, and has to pass its own tests within {seconds:g} seconds. HumanEval is asked as it is. MBPP
is asked by the first line of the reference solution with the task's text as the docstring, since
pico knows that form, and not by its tests and some solved tasks, as is usual: do not compare the
figure with published ones."""
LAW = """\
## Loss curve
![training loss, and held-out bits per byte with a fitted law](curve.png)

L = E + A S1^-a - C S2 ([arXiv 2408.11029](https://arxiv.org/abs/2408.11029)) for the bits per byte
of documents held out of the training data, in millions of tokens: S1 is the tokens seen, each
counted by its share of the full learning rate, and S2 the area by which the rate has fallen, older
falls fading by {forget} a step. At the full rate that is L(D) = E + A D^-a. Fitted to {fitted}
checkpoints from {from_tokens:,} tokens on, {fitted_in_decay} of them in a decay; {left_out} of an
earlier mixture, in a warm-up or soon after it are left out. The last one, at {tokens:,} tokens, was
not fitted but foretold; within {within_percent:g} % was wished for. Where D does not grow several
times, E, A and a make up for each other: what the law says in that stretch is firmer than they are.

| held-out | E | A | a | C | last, measured | foretold | off |
|---|---|---|---|---|---|---|---|
{rows}
"""
ROW = (
    "| {name} | {floor:.4f} | {scale:.4f} | {exponent:.3f} | {annealing:.4f} "
    "| {measured:.4f} | {predicted:.4f} | {distance_percent:.1f} % |"
)
SAMPLES = """\
## Samples
Greedy and unedited, up to {tokens} tokens, for prompts of the held-out repositories: some evenly
spaced ones of those that fit, not picked by hand.

{section}
"""
COUNTS = {f"{name}_{count}" for name in EXAMS for count in ("passed", "tasks")}


@dataclass(frozen=True)
class Figure:
    """What a figure is called on the card; what it was wished to be, if anything, and in words."""

    meaning: str
    aim: str = ""
    reached: Callable[[float], bool] = lambda value: True


FIGURES = {
    "bits_per_byte_py_code_main": Figure(
        "bits per byte, files", "0.95 or less", lambda value: value <= 0.95
    ),
    "bits_per_byte_py_functions": Figure("bits per byte, functions"),
    "edit_accuracy": Figure(
        "edit accuracy (next token over the edited function)",
        "0.88 or more",
        lambda value: value >= 0.88,
    ),
    "loop_share": Figure(
        "share of greedy continuations that end in a loop", "under 0.10", lambda value: value < 0.10
    ),
}


@dataclass(frozen=True)
class State:
    """What is known of the weights that a card is about. start: where the logs of the run begin.
    decay: steps of it taken and planned, None without one. law: as in curve.json."""

    parameters: int
    progress: Progress
    decay: tuple[int, int] | None
    start: Progress | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    law: Mapping[str, Any] | None = None
    samples: Mapping[str, list[Sample]] = field(default_factory=dict)


def licences(entry: dict[str, Any]) -> str:
    counts = {name: sum(homes.values()) for name, homes in entry["licences"].items()}
    return "; ".join(f"{name} ({count:,})" for name, count in sorted(counts.items()))


def homes(index: dict[str, Any]) -> Counter[str]:
    found = Counter[str]()
    for entry in index["sources"].values():
        for counts in entry["licences"].values():
            found.update(counts)
    return found


def credits(names: Counter[str]) -> list[str]:
    known = tomllib.loads((HERE / "attribution.toml").read_text(encoding="utf-8"))
    return [text for name, text in known.items() if any(fnmatch(home, name) for home in names)]


def budget(state: State) -> str:
    """What the training took, in sentences."""
    seen, start = state.progress, state.start
    run = "" if start is None else f", {seen.tokens - start.tokens:,} of them in this run"
    spent = "" if start is None else f", {(seen.seconds - start.seconds) / 3600:.2f} of them in it"
    end = "The learning rate was constant: an interim state of a run that goes on."
    if state.decay:
        taken, planned = state.decay
        end = f"In the last {taken:,} steps the learning rate fell to zero."
        if taken < planned:
            end = (
                f"The learning rate was falling: an interim state, after {taken:,} of a decay's "
                f"{planned:,} steps."
            )
    return (
        f"{seen.tokens:,} tokens seen{run}, in {seen.seconds / 3600:.2f} hours{spent},\n"
        f"with the recipe `recipes/pico`. {end}"
    )


def figure(name: str, value: float) -> str:
    """A row of the table, with what the figure was wished to be and whether it is."""
    known = FIGURES.get(name, Figure(name))
    verdict = "reached" if known.reached(value) else "not reached"
    return f"| {known.meaning} | {value} | {known.aim and f'{known.aim}: {verdict}'} |"


def measured(figures: Mapping[str, float], tokens: int) -> str:
    """The table of figures, and what HumanEval's and MBPP's mean."""
    if not figures:
        return "Not measured."
    lines = ["| figure | value | aim |", "|---|---|---|"]
    lines += [figure(name, value) for name, value in figures.items() if name not in COUNTS]
    tested = [name for name in EXAMS if f"{name}_tasks" in figures]
    for name in tested:
        passed, asked = figures[f"{name}_passed"], figures[f"{name}_tasks"]
        share = f"{passed} of {asked} ({100 * passed / max(1, asked):.1f} %)"
        lines.append(f"| {EXAMS[name].name}, pass@1 | {share} | |")
    if tested:
        lines.append("\n" + TESTED.format(tokens=tokens, seconds=SECONDS))
    return "\n".join(lines)


def parts(state: State, tokens: int) -> str:
    """The loss curve and the samples, as far as there are any."""
    found = []
    if state.law:
        laws = state.law["laws"].items()
        rows = "\n".join(ROW.format(name=name, **law) for name, law in laws)
        found.append(LAW.format(rows=rows, **state.law))
    if state.samples:
        found.append(SAMPLES.format(tokens=tokens, section=section(state.samples)))
    return "".join(f"\n{part}" for part in found)


def write(settings: Settings, index: dict[str, Any], state: State) -> str:
    shape, names = settings.shape, homes(index)
    return CARD.format(
        millions=state.parameters / 1e6,
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        key_value_heads=shape.key_value_heads,
        head_size=shape.head_size,
        context=shape.context,
        entries=settings.tokenizer.entries,
        budget=budget(state),
        figures=measured(state.figures, settings.evaluation.task_tokens),
        parts=parts(state, settings.evaluation.sample_tokens),
        sources="\n".join(
            f"| {name} | {entry['train']['tokens']:,} | {licences(entry)} |"
            for name, entry in index["sources"].items()
        ),
        homes=", ".join(sorted(name for name in names if "/" in name)),
        credits="\n".join(f"- {text}" for text in credits(names)),
    )
