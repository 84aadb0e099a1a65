"""How answers and figures look on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..params import Chunk, Completion

RUNS = ("\x1b[32m", "\x1b[36m")  # forwards that yielded several tokens, in turn, so that runs stay apart
FRESH = "\x1b[0m"


def console(stderr: bool = False) -> Console:
    """The terminal. Colours follow rich: NO_COLOR, FORCE_COLOR, TERM, and whether this is a terminal."""
    return Console(stderr=stderr)


def has_colours(out: IO[str]) -> bool:
    """Whether text written there may hold colours, by the same rules."""
    screen = Console(file=out)
    return screen.color_system is not None and not screen.no_color


def printer(out: IO[str]) -> Callable[[Chunk | None], None]:
    """Prints chunks as they come, character for character; on a terminal, those of several tokens in
    colour. None ends the text."""
    coloured = has_colours(out)
    turn = 0

    def show(chunk: Chunk | None) -> None:
        nonlocal turn
        if chunk is None:
            out.write("\n")
        elif coloured and len(chunk.ids) > 1:
            turn += 1
            out.write(f"{RUNS[turn % 2]}{chunk.text}{FRESH}")
        else:
            out.write(chunk.text)
        out.flush()

    return show


def identical(result: Completion, plain: Completion, interrupted: bool = False) -> bool:
    """Is the text plain's? Of an interrupted one, as far as it goes."""
    shared = len(result.ids) if interrupted else None
    return list(result.ids) == list(plain.ids[:shared])


def figures_table(
    results: Sequence[Completion],
    plain: Completion | None,
    title: str | None = None,
    interrupted: bool = False,
) -> None:
    """One row a result, with the speed-up over plain and whether the text is identical; of an interrupted
    one, as far as it goes."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for heading in ("tokens", "forwards", "tokens/forward", "tokens/s", "speed-up", "identical"):
        table.add_column(heading, justify="right")
    for result in results:
        against = ("", "")
        if plain is not None:
            speedup = result.tokens_per_second / plain.tokens_per_second if plain.tokens else 1.0
            against = (f"{speedup:.2f}x", "yes" if identical(result, plain, interrupted) else "NO")
        table.add_row(
            result.method,
            str(result.tokens),
            f"{result.forwards:.4g}",
            f"{result.tokens_per_forward:.2f}",
            f"{result.tokens_per_second:.0f}",
            *against,
        )
    console = Console()
    console.print(table)
    last = results[-1]
    console.print(
        f"{last.model}, {last.dtype} on {last.device}, {last.numerics} numerics, seed {last.seed}, "
        f"ended by {last.finish_reason}; the text is that of the {last.grade} weights",
        style="dim",
        highlight=False,
    )
