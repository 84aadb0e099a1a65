"""`selfdraft verify`: does a method change a text of this model on this machine?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidOption, InvalidPrompt
from . import flags

if TYPE_CHECKING:
    from ..verify.compare import Difference
    from ..verify.verdict import Verification

CHECKS = {
    "method": "your method",
    "garbage": "random drafts",
    "bushy": "right drafts among wrong ones",
    "ends": "texts that end inside a draft",
    "in flight": "rows in flight rearranged",
    "batch": "several requests in one batch",
    "generate": "plain decoding, transformers' generate",
}
MEANING = {
    "exact": "every token compared is plain decoding's",
    "rounding": "every difference is small enough to be rounding, and gone in float64",
    "broken": "rounding does not explain a difference. Do not use this combination, and please report it",
}
SHOWN = 5  # differences shown per check


def verify(
    model: flags.Model = flags.DEFAULT_MODEL,
    method: flags.Method = flags.DEFAULT_METHOD,
    option: flags.MethodOptions = None,
    adapter: flags.Adapter = None,
    reference: flags.References = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help='JSON lines, each {"prompt": "..."}; default: a built-in set.'),
    ] = None,
    raw: flags.Raw = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="transformers: where the model runs on the decoder, also compare its forward with "
            "transformers' generate, in float32. Loads the model again."
        ),
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="More prompts, longer answers, more samples; takes minutes.")
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", "-n", min=1, help="Tokens per answer. [default: 16, or 48 with --thorough]"
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Sampled answers per prompt, beside the greedy one. [default: 1, or 2 with --thorough]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the first sampled answer.")] = 0,
    weights: flags.Weights = None,
    activations: flags.Activations = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    numerics: flags.Numerics = None,
    as_json: flags.Json = False,
) -> None:
    """Check that a method does not change the model's text on this machine.

    Your method, and drafters that are bad on purpose, have to reproduce plain decoding's text, alone and in
    a batch. Plain decoding is compared with transformers' generate, and sampled tokens with the
    distribution that the sampling parameters ask for.

    The verdict is exact, rounding (there are differences, but rounding explains them) or broken. The exit
    code is 1 if broken, otherwise 0.

    Examples:

      selfdraft verify

      selfdraft verify --model ./my-model --method jacobi --thorough

      selfdraft verify --prompts mine.jsonl --numerics fast --json
    """
    from ..llm import read_reference
    from ..models.decoder import Decoder
    from ..models.loading import float32_pair
    from ..verify import prompts as built_in
    from ..verify.verify import QUICK, THOROUGH
    from ..verify.verify import verify as compare

    if against not in (None, "transformers"):
        raise InvalidOption(f"--against takes transformers; got {against!r}")
    texts: Sequence[str] = built_in.PROMPTS if thorough else built_in.PROMPTS[: built_in.QUICK]
    if prompts is not None:
        texts = _read(prompts)
    quoted = [read_reference(path) for path in reference or ()]
    effort = THOROUGH if thorough else QUICK
    effort = replace(
        effort,
        max_new_tokens=effort.max_new_tokens if max_new_tokens is None else max_new_tokens,
        seeds=effort.seeds if seeds is None else seeds,
    )
    with _progress() as report:
        report(f"loading {model}")
        llm = flags.load(model, method, option, adapter, weights, activations, dtype, device, numerics)
        ids = [llm.prompt_ids(text, raw=raw) for text in texts]
        pair = None
        if against is not None and isinstance(llm.model, Decoder):
            report("loading the model in float32")
            pair = float32_pair(model)
        result = compare(llm, ids, effort, seed, llm.references(quoted), report, pair)
    about = {
        "model": model,
        "method": method,
        "grade": llm.model.grade,
        "weights": llm.model.weights_label,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "device": str(llm.model.device),
        "numerics": llm.model.numerics,
        "chat template": llm.chats(raw=raw),
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


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows what is compared: in place on a terminal, else line by line, both on standard error."""
    from .paint import console

    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda line: print(f"selfdraft verify: {line}", file=sys.stderr, flush=True)
        return
    with screen.status("starting") as status:
        yield lambda line: status.update(line)


def _show(result: Verification, about: Mapping[str, object]) -> None:
    from rich.table import Table

    from .paint import console

    screen = console()
    title = (
        f"{about['model']}, {about['method']}, {about['weights']} weights on {about['device']}, "
        f"{about['numerics']} numerics{', chat template' if about['chat template'] else ''}; text of the "
        f"{about['grade']} weights"
    )
    table = Table("compared with plain decoding", title=title, title_justify="left")
    for heading in ("tokens", "differences", "verdict"):
        table.add_column(heading, justify="right")
    for found in result.all_checks:
        table.add_row(CHECKS[found.check], f"{found.compared:,}", str(len(found.differences)), found.verdict)
    wrong = [fit for fit in result.distribution if not fit.holds]
    table.add_row("distribution of samples", "", str(len(wrong)), "broken" if wrong else "right")
    screen.print(table)
    for found in result.all_checks:
        for difference in found.differences[:SHOWN]:
            screen.print(_sentence(difference), style="dim", highlight=False)
    for fit in wrong:
        setting = ", ".join(f"{name} {value:g}" for name, value in fit.setting.items())
        screen.print(
            f"samples at {setting}: p-value {fit.p:.2g}; total variation {fit.variation:.3f}, at most "
            f"{fit.limit:.3f} expected",
            style="dim",
            highlight=False,
        )
    screen.print(_rounding(result.rounding), style="dim", highlight=False)
    screen.print(f"[bold]{result.verdict}[/bold]: {MEANING[result.verdict]}.")
    if result.verdict != "broken" and result.generate is not None and result.generate.differences:
        screen.print(
            f"Note: transformers' generate, which rounds in its own way, differs at "
            f"{len(result.generate.differences)} tokens, within rounding."
        )


def _rounding(size: float) -> str:
    if size == 0:
        return "Rounding on this machine does not move this model's logits."
    return f"Rounding on this machine moves this model's logits by up to {size:.3g}."


def _sentence(difference: Difference) -> str:
    where = (
        f"{CHECKS[difference.check]}: prompt {difference.case}, temperature {difference.temperature:g}, "
        f"seed {difference.seed}, token {difference.position}"
    )
    again = "again" if difference.reproduces else "not again"
    return (
        f"{where}: plain decoding picks {difference.expected}, here {difference.got}; the scores are "
        f"{difference.margin:.3g} apart ({difference.ulps:.1f} units in the last place); plain decoding "
        f"started afresh picks it {again}"
    )
