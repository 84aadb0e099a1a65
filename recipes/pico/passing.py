"""HumanEval and MBPP, pass@1: `passing.py MODEL --data DIR`.

Each task is answered once, greedily, by selfdraft, and the answer is put to the task's own tests
(judge.py). The prompts are in the form that pico knows, a signature with its docstring. HumanEval
comes in that form and is asked as it is. MBPP does not: its prompt is made of the signature of the
reference solution and the task's text as the docstring, where it is usually asked with its tests
and some solved tasks before it, so its figure is no published one's equal. A model of this size
solves next to none of them. The last line is JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

import selfdraft
from selfdraft.llm import TextGenerator

from documents import Row
from judge import judge
from sets import EvaluationError, read, spaced
from settings import HERE, load

console = Console()
BATCH = 16  # prompts answered at once
# What begins at the margin is no longer the function's body.
STOP = tuple(
    f"\n{word}"
    for word in (
        *("def ", "class ", "async ", "if ", "for ", "while ", "with ", "try:", "import ", "from "),
        *("print(", "assert ", "#", "@", "```", '"""', "'''"),
    )
)
DEF = re.compile(r"^def +(\w+) *(\(.*\)) *:", re.MULTILINE)


@dataclass(frozen=True)
class Task:
    """What is asked, and the code that tests an answer."""

    prompt: str
    tests: str

    def program(self, answer: str) -> str:
        return f"{self.prompt}{answer}\n\n{self.tests}\n"


def humaneval(row: Row) -> Task:
    return Task(row["prompt"], f"{row['test']}\ncheck({row['entry_point']})")


def mbpp(row: Row) -> Task:
    tests = "\n".join([row["test_setup_code"], *row["test_list"]])
    return Task(f'{signature(row, tests)}\n    """{row["text"]}"""\n', tests)


def signature(row: Row, tests: str) -> str:
    """The line that begins the function which the tests call, from the reference solution."""
    for name, arguments in DEF.findall(row["code"]):
        if re.search(rf"\b{name}\(", tests):
            return f"def {name}{arguments}:"
    raise EvaluationError(
        f"MBPP task {row['task_id']}: its tests call no function of its solution; "
        "give --data with the published set"
    )


@dataclass(frozen=True)
class Exam:
    """A set of tasks: its name, its file, its form, and which of its rows are the test split."""

    name: str
    file: str
    form: Callable[[Row], Task]
    split: Callable[[Row], bool] = lambda row: True

    def tasks(self, data: Path, count: int) -> list[Task]:
        chosen = [row for row in read(data, self.file) if self.split(row)]
        return [self.form(row) for row in spaced(chosen, count)]


EXAMS = {
    "humaneval": Exam("HumanEval", "humaneval/HumanEval", humaneval),
    "mbpp": Exam("MBPP", "mbpp/mbpp", mbpp, lambda row: 11 <= row["task_id"] <= 510),
}


def answers(generator: TextGenerator, prompts: list[str], tokens: int) -> Iterator[str]:
    """Greedy answers of at most `tokens` tokens, in the order of the prompts."""
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        for result in generator.generate(batch, max_new_tokens=tokens, stop=STOP):
            yield result.text


def rates(generator: TextGenerator, data: Path, count: int, tokens: int) -> dict[str, int]:
    """For each set how many tasks were passed and how many were asked, at most `count`."""
    figures = {}
    for name, exam in EXAMS.items():
        tasks = exam.tasks(data, count)
        shown = partial(track, total=len(tasks), console=console, transient=True)
        given = answers(generator, [task.prompt for task in tasks], tokens)
        answered = zip(tasks, shown(given, f"{name}: answers"), strict=True)
        programs = [task.program(answer) for task, answer in answered]
        figures[f"{name}_passed"] = sum(shown(judge(programs), f"{name}: tests"))
        figures[f"{name}_tasks"] = len(tasks)
    return figures


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint or an exported folder.")],
    data: Annotated[Path, typer.Option(help="Folder that holds eval/.")],
    tasks: Annotated[
        int | None, typer.Option(help="Of each set, at most. Default: the settings'.", min=1)
    ] = None,
    settings: Annotated[Path, typer.Option(help="Another settings file.")] = HERE / "settings.toml",
    adapter: Annotated[str | None, typer.Option(help="An adapter that tunes it.")] = None,
) -> None:
    """Print how many tasks the model passes; the last line is JSON."""
    how = load(settings).evaluation
    generator = selfdraft.load(str(model), adapter=adapter)
    print(json.dumps(rates(generator, data, tasks or how.tasks, how.task_tokens)))


if __name__ == "__main__":
    typer.run(main)
