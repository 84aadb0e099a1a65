"""How answers and figures look on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..outputs import Chunk, Completion

RUN_COLOURS = ("\x1b[32m", "\x1b[36m")  # alternate, so that neighbouring runs can be told apart
RESET = "\x1b[0m"
ENDED = {
    "eos": "ended by the model",
    "stop": "ended by a stop text",
    "length": "ended at the maximum length",
    "context": "ended at the end of the context",
    "cancelled": "cancelled",
    "error": "ended by an error",
}


def console(stderr: bool = False) -> Console:
    """The terminal. Colours follow rich: NO_COLOR, FORCE_COLOR, TERM, and whether this is a terminal."""
    return Console(stderr=stderr)


def has_colours(out: IO[str]) -> bool:
    """Whether text written there may hold colours, by the same rules."""
    screen = Console(file=out)
    return screen.color_system is not None and not screen.no_color


def printer(out: IO[str]) -> Callable[[Chunk | None], None]:
    """Prints chunks as they come, unchanged. Where colours are shown, a chunk of several tokens is coloured.
    None ends the text."""
    colours = has_colours(out)
    runs = 0

    def show(chunk: Chunk | None) -> None:
        nonlocal runs
        if chunk is None:
            out.write("\n")
        elif colours and len(chunk.ids) > 1:
            runs += 1
            out.write(f"{RUN_COLOURS[runs % 2]}{chunk.text}{RESET}")
        else:
            out.write(chunk.text)
        out.flush()

    return show


def identical(result: Completion, plain: Completion, interrupted: bool = False) -> bool:
    """Whether the tokens are plain decoding's. If the text was interrupted, as far as it goes."""
    shared = len(result.ids) if interrupted else None
    return list(result.ids) == list(plain.ids[:shared])


def figures_table(
    results: Sequence[Completion],
    plain: Completion | None,
    title: str | None = None,
    interrupted: bool = False,
) -> None:
    """One row per result. With plain decoding's, the speed-up over it and whether the text is identical."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    headings = ["tokens", "forwards", "tokens/\nforward", "tokens/s"]
    for heading in headings if plain is None else [*headings, "speed-up", "identical"]:
        table.add_column(heading, justify="right")
    for result in results:
        row = [
            result.method,
            str(result.tokens),
            f"{result.forwards:.4g}",
            f"{result.tokens_per_forward:.2f}",
            f"{result.tokens_per_second:.1f}",
        ]
        if plain is not None:
            speedup = result.tokens_per_second / plain.tokens_per_second if plain.tokens else 1.0
            row += [f"{speedup:.2f}x", "yes" if identical(result, plain, interrupted) else "NO"]
        table.add_row(*row)
    screen = console()
    screen.print(table)
    screen.print(about(results[-1]), style="dim", highlight=False, markup=False)


def about(result: Completion) -> str:
    """How an answer was made, in one sentence or two."""
    facts = [
        result.model,
        "asked through its chat template" if result.chat else "prompt taken as it is",
        f"{result.weights} weights on {result.device}",
        f"{result.numerics} numerics",
        *([f"seed {result.seed}"] if result.temperature else []),
        ENDED[result.finish_reason],
    ]
    return f"{', '.join(facts)}. The text is that of the {result.grade} weights."
