"""`selfdraft demo`: three tasks on the embedded model, plain decoding against the methods at hand."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..llm import LLM
    from ..params import Completion

OLD = '''def load_settings(path, defaults=None):
    """Read settings from a JSON file and merge them with the defaults."""
    settings = dict(defaults or {})
    try:
        with open(path, encoding="utf-8") as handle:
            settings.update(json.load(handle))
    except FileNotFoundError:
        logger.warning("no settings in %s", path)
    return settings
'''


SHOWN = "llma"


@dataclass(frozen=True)
class Task:
    """A prompt of one of the three forms pico was trained on."""

    title: str
    prompt: str
    references: tuple[str, ...] = ()


TASKS = (
    Task(
        "edit a function, given its old version",
        f"Edit this function: rename path to filename\n\n```python\n{OLD}```\n\n",
        (f"```python\n{OLD}```",),
    ),
    Task(
        "continue code",
        "import os\nimport sys\n\n\nclass Stack:\n"
        '    """A last in, first out container."""\n\n'
        "    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    ),
    Task(
        "write a body for a signature and docstring",
        "def count_words(text: str) -> dict[str, int]:\n"
        '    """Return how often each word occurs in the text."""\n',
    ),
)


def demo(
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens per answer.")] = 160,
    as_json: Annotated[
        bool, typer.Option("--json", help="All figures as one JSON object, last line.")
    ] = False,
) -> None:
    """Watch a real model answer in fewer passes with exactly the same tokens.

    Runs the embedded model on three tasks: plain decoding first, then each method, streamed. Tokens
    that came several to a forward are coloured. Takes under a minute on two cores.
    """
    from rich.console import Console

    from .. import drafting
    from .._common.repetition import fresh
    from ..llm import load
    from .paint import figures_table

    console = Console(stderr=as_json)
    with console.status("loading pico and probing its numerics"):
        generator = load("pico")
        names = ["plain", *(name for name in drafting.available() if name != "plain")]
        looped = generator.model.loops is not None
        using = [generator.using(name) for name in names if looped or not drafting.drafts_early(name)]
        using = [one for one in using if one.model.grade == "base"]  # tuned weights say other things
        for one in using:  # the first forwards of a shape are slower
            one.generate(TASKS[0].prompt, max_new_tokens=8)
    records = []
    for task in TASKS:
        console.rule(task.title, align="left")
        console.print(task.prompt, style="dim", highlight=False, markup=False, end="")
        results = [_run(one, task, max_new_tokens, as_json) for one in using]
        if not as_json:
            figures_table(results, results[0], task.title)
            kept = fresh(results[0].ids)
            if kept < results[0].tokens:
                console.print(
                    f"the text repeats itself after {kept} tokens, which flatters drafting\n", style="yellow"
                )
        identical = all(result.ids == results[0].ids for result in results)
        figures = [result.figures() for result in results]
        records.append({"task": task.title, "identical": identical, "results": figures})
    if as_json:
        print(json.dumps({"tasks": records}))


def _run(generator: LLM, task: Task, tokens: int, quiet: bool) -> Completion:
    """One answer. It is the same text each time, so one method shows it as it comes: the one that copies."""
    from .paint import printer

    stream = generator.stream(task.prompt, references=task.references, max_new_tokens=tokens)
    show = (
        printer(sys.stderr if quiet else sys.stdout) if generator.method_name == SHOWN else lambda chunk: None
    )
    for chunk in stream:
        show(chunk)
    show(None)
    return stream.result
