"""`selfdraft demo`: three tasks, plain decoding beside the methods that need no training."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import flags

if TYPE_CHECKING:
    from rich.console import Console

    from ..llm import LLM
    from ..outputs import Completion

SHOWN = "auto"  # all methods write the same text, so one of them shows it
METHODS = ("plain", SHOWN, "llma", "jacobi")

LETTER = (
    "I am writeing to tell you about the meeting on Monday. We will start at ten in the main room. Please "
    "bring you're notes and a pen. After lunch we will talk about the new plan, and everyone can ask "
    "questons. The meeting will end at four. If you cannot come, please send me an email by Friday."
)
SHOP = (
    "Our shop is open from Monday to Saturday, from nine in the morning to six in the evening. You can "
    "return any item within thirty days if you bring the receipt. Repairs take about one week. We deliver "
    "to your home for free if you spend more than fifty dollars."
)


@dataclass(frozen=True)
class Task:
    title: str
    question: str


TASKS = (
    Task("Correct a text", f"Correct the mistakes in this text:\n\n{LETTER}"),
    Task("Answer from a passage", f"When is the shop open, and is delivery free?\n\n{SHOP}"),
    Task("Answer an open question", "Explain what photosynthesis is in three sentences."),
)


def demo(
    model: flags.Model = flags.DEFAULT_MODEL,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Maximum length of an answer in tokens.")
    ] = 100,
    as_json: flags.Json = False,
) -> None:
    """Watch a model give the same answers in fewer forward passes.

    The default model answers three questions: with plain decoding, and with the drafting methods that need
    no training. Coloured text came several tokens to a forward pass. Takes under a minute on two cores.
    """
    from .paint import console, figures_table

    screen = console(stderr=as_json)
    with screen.status(f"loading {model}") as status:
        llm = flags.load(model, SHOWN, None, None, None, None, None, None, None)
        status.update("measuring step times")
        llm.model.cost(1)
        arms = [llm.using(name) for name in METHODS]
        for arm in arms:  # the first forwards of a shape are slower
            arm.generate(TASKS[0].question, max_new_tokens=8)
    records: list[dict[str, Any]] = []
    for task in TASKS:
        screen.rule(task.title, align="left")
        screen.print(task.question, style="dim", highlight=False, markup=False)
        screen.print()
        results = [_answer(arm, task, max_new_tokens, screen, as_json) for arm in arms]
        screen.print()
        if not as_json:
            figures_table(results, results[0])
            screen.print()
        identical = all(result.ids == results[0].ids for result in results)
        figures = [result.figures() for result in results]
        records.append({"task": task.title, "identical": identical, "results": figures})
    if as_json:
        print(json.dumps({"tasks": records}))


def _answer(llm: LLM, task: Task, max_new_tokens: int, screen: Console, as_json: bool) -> Completion:
    from .paint import printer

    stream = llm.stream(task.question, max_new_tokens=max_new_tokens)
    if llm.method_name == SHOWN:
        show = printer(sys.stderr if as_json else sys.stdout)
        for chunk in stream:
            show(chunk)
        show(None)
    else:
        with screen.status(f"{llm.method_name}: the same answer, not shown"):
            for _ in stream:
                pass
    return stream.result
