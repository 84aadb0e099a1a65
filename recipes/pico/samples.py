"""Samples for the card: what the model says to held-out prompts, greedily and unedited.

Which prompts is fixed: of those that leave room for an answer, some evenly spaced ones of each
form. The card shows answers in full and of a long prompt its first and its last lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from selfdraft.params import Result
from selfdraft.llm import TextGenerator

from sets import read, spaced

BEGUN = 40  # lines of a file that are given, at most; and not more than half of it
SHOWN = 12  # lines of a prompt on the card
ENDINGS = {"eos": "ended by itself", "context": "the context is full"}


@dataclass(frozen=True)
class Sample:
    prompt: str
    answer: str
    ending: str


def begun(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(lines[: min(BEGUN, len(lines) // 2)])


def prompts(data: Path) -> dict[str, list[str]]:
    """Held-out prompts by form. Raises EvaluationError."""
    return {
        "A file to continue": [begun(row["text"]) for row in read(data, "py_code_main")],
        "A function by its signature and docstring": [
            row["prompt"] for row in read(data, "py_functions")
        ],
        "An edit": [f"{row['prompt']}\n\n" for row in read(data, "py_edits")],
    }


def draw(generator: TextGenerator, data: Path, count: int, tokens: int) -> dict[str, list[Sample]]:
    """`count` samples of each form, of at most `tokens` tokens."""
    room = generator.model.context - tokens
    drawn = {}
    for form, found in prompts(data).items():
        fitting = [text for text in found if text and len(generator.ids(text)) <= room]
        chosen = spaced(fitting, count)
        results = generator.generate(chosen, max_new_tokens=tokens) if chosen else []
        drawn[form] = [sample(*pair) for pair in zip(chosen, results, strict=True)]
    return drawn


def sample(prompt: str, result: Result) -> Sample:
    ending = ENDINGS.get(result.finish_reason, "cut off")
    plural = "" if result.tokens == 1 else "s"
    return Sample(prompt, result.text, f"{ending} after {result.tokens} token{plural}")


def block(text: str) -> str:
    """A text in a fence that is longer than any in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    end = "" if text.endswith("\n") else "\n"
    return f"{fence}text\n{text}{end}{fence}"


def shortened(prompt: str) -> str:
    """Its first line and its last ones, with a line between that says how many are left out."""
    lines = prompt.splitlines(keepends=True)
    out = len(lines) - SHOWN
    if out <= 0:
        return prompt
    return "".join([lines[0], f"[... lines left out: {out} ...]\n", *lines[1 + out :]])


def section(drawn: Mapping[str, list[Sample]]) -> str:
    """The card's text about them."""
    parts = []
    for form, found in drawn.items():
        parts.append(f"### {form}")
        for number, one in enumerate(found, start=1):
            parts.append(f"Prompt {number}:\n\n{block(shortened(one.prompt))}")
            parts.append(f"Answer {number}, {one.ending}:\n\n{block(one.answer)}")
    return "\n\n".join(parts)
