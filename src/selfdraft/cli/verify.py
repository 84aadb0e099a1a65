"""`selfdraft verify`: does a method change a text of this model on this machine?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidOption, InvalidPrompt
from . import flags

if TYPE_CHECKING:
    from ..verify.compare import Case
    from ..verify.verify import Verification

MEANING = {
    "exact": "every token compared is plain decoding's",
    "tie-bounded": "every difference is within this model's own rounding, and gone in float64",
    "broken": "a difference that rounding does not explain: do not use this combination, and report it",
}


def verify(
    model: flags.Model = "pico",
    method: flags.Method = "llma",
    option: flags.MethodOptions = None,
    adapter: flags.Adapter = None,
    reference: flags.References = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help='JSON lines, each {"prompt": "..."}; default: a built-in set.'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens per answer.")] = 48,
    seeds: Annotated[int, typer.Option(help="Seeds at temperature 0.8, beside greedy.")] = 2,
    seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    numerics: flags.Numerics = None,
    as_json: flags.Json = False,
) -> None:
    """Put the promise to the test: same seed, same text, drafted or not.

    Compares the method's texts, those of a drafter that proposes garbage and of a bushy tree with decoys,
    alone and in a mixed batch, with plain decoding, and plain decoding with Hugging Face's generate. Tests
    that samples follow the distribution of every filter.

    The verdict is exact, tie-bounded (each difference lies within the model's own rounding noise and is
    gone in float64) or broken. Exit code 0, or 1 if broken.

    Examples:

      selfdraft verify --model ./my-model --method jacobi

      selfdraft verify --prompts mine.jsonl --numerics fast --json
    """
    from ..llm import load, read_reference
    from ..verify.prompts import PROMPTS
    from ..verify.verify import verify as put_to_the_test

    if seeds < 0:
        raise InvalidOption(f"seeds must be >= 0; got {seeds}")
    texts = PROMPTS if prompts is None else _read(prompts)
    quoted = [read_reference(path) for path in reference or ()]
    generator = load(
        model,
        method,
        options=flags.pairs("--option", option),
        adapter=adapter,
        dtype=dtype,
        device=device,
        numerics=numerics,  # type: ignore[arg-type]
    )
    ids = [generator.encode(text) for text in texts]
    copied = generator.references(quoted)
    result = put_to_the_test(generator, ids, max_new_tokens, seeds, seed, copied, _progress)
    about = {
        "model": model,
        "method": method,
        "grade": generator.model.grade,
        "dtype": str(generator.model.dtype).removeprefix("torch."),
        "device": str(generator.model.device),
        "numerics": generator.model.numerics,
    }
    if as_json:
        print(json.dumps(about | result.record()))
    else:
        _show(result, about)
    sys.exit(result.verdict == "broken")


def _read(file: Path) -> list[str]:
    """The prompts of a JSON lines file. Raises InvalidPrompt with the number of a line that has none."""
    texts = []
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            row = json.loads(line) if line.strip() else None
            if row is None:
                continue
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
                raise InvalidPrompt(f'{file}, line {number}: no text under "prompt"')
            texts.append(row["prompt"])
    except json.JSONDecodeError as error:
        raise InvalidPrompt(f"{file}, line {number}: not JSON ({error})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidPrompt(f"{file} cannot be read as text: {error}") from error
    if not texts:
        raise InvalidPrompt(f"{file} holds no prompts")
    return texts


def _progress(cases: Sequence[Case]) -> Iterable[Case]:
    from rich.console import Console
    from rich.progress import track

    return track(cases, "comparing", console=Console(stderr=True), transient=True)


def _show(result: Verification, about: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("check", title=", ".join(about.values()), title_justify="left")
    for heading in ("tokens compared", "differences", "verdict"):
        table.add_column(heading, justify="right")
    for judged in (*result.checks, result.generate):
        numbers = (f"{judged.compared:,}", str(len(judged.differences)))
        table.add_row(judged.check, *numbers, judged.verdict)
    for fit in result.distribution:
        name = ", ".join(f"{key} {value:g}" for key, value in fit.setting.items())
        found = f"p {fit.p:.2g}, variation {fit.variation:.3f} (true draws {fit.expected:.3f})"
        table.add_row(f"samples: {name}", found, "", "holds" if fit.holds else "broken")
    console = Console()
    console.print(table)
    for judged in (*result.checks, result.generate):
        for d in judged.differences[:5]:
            console.print(
                f"{d.check}: prompt {d.case}, temperature {d.temperature:g}, seed {d.seed}, "
                f"token {d.position}: plain {d.expected}, got {d.got}; margin {d.margin:.3g} "
                f"({d.ulps:.1f} units in the last place), "
                f"plain afresh {'agrees' if d.reproduces else 'differs'}",
                style="dim",
                highlight=False,
            )
    console.print(f"row noise of this model here: {result.row_noise:.3g} in logits", style="dim")
    console.print(f"[bold]{result.verdict}[/bold]: {MEANING[result.verdict]}")
    if result.verdict != "broken" and result.generate.differences:
        console.print(
            f"notice: generate differs at {len(result.generate.differences)} tokens, within rounding; its "
            "kernels are other ones"
        )
