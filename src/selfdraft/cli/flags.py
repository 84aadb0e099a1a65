"""Flags that several commands share, so that they read and behave the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidOption, InvalidPrompt

if TYPE_CHECKING:
    from ..llm import LLM

DEFAULT_MODEL = "smollm2"
DEFAULT_METHOD = "auto"

Model = Annotated[
    str, typer.Option(help="smollm2, looped-tiny, a model folder, a GGUF file, or a Hugging Face id.")
]
Method = Annotated[
    str, typer.Option(help="Drafting method: auto, plain, llma, jacobi, or another installed one.")
]
MethodOptions = Annotated[
    list[str] | None, typer.Option("--option", help="Option of the method, NAME=VALUE; repeatable.")
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="Adapter that the method drafts with, or that tunes the model: a folder, a Hugging Face id, or "
        "a shipped one (`selfdraft info` lists them)."
    ),
]
References = Annotated[
    list[Path] | None,
    typer.Option("--reference", "-r", help="Text file that the answer may quote; repeatable."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Do not apply the model's chat template.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Format in which the weights run: as-stored, bf16, q8 or q4. [default: as-stored]",
        show_default=False,
    ),
]
Activations = Annotated[
    int | None,
    typer.Option(
        help="Bits of the inputs of products with 4- to 8-bit weights: 8 or 16. [default: 8]",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16, float32 or float64. [default: as stored]", show_default=False),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1. [default: cuda if there is one]", show_default=False)
]
Numerics = Annotated[
    str | None,
    typer.Option(
        help="exact: identical results with or without drafting; fast: rounding may differ. "
        "[default: exact on a CPU]",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, as the last line.")]


def load(
    model: str,
    method: str,
    option: Sequence[str] | None,
    adapter: str | None,
    weights: str | None,
    activations: int | None,
    dtype: str | None,
    device: str | None,
    numerics: str | None,
) -> LLM:
    """The model that the flags name."""
    from ..llm import LLM

    return LLM(
        model,
        method,
        options=pairs("--option", option),
        adapter=adapter,
        weights=weights,
        activations=activations,
        dtype=dtype,
        device=device,
        numerics=numerics,  # type: ignore[arg-type]
    )


def check_text(what: str, given: str | None) -> None:
    """Raises InvalidPrompt for an argument that is not UTF-8, which Python passes on as lone surrogates."""
    try:
        (given or "").encode()
    except UnicodeEncodeError as error:
        raise InvalidPrompt(f"{what} is not valid UTF-8 at character {error.start}: {given!a:.80}") from None


def pairs(flag: str, given: Sequence[str] | None) -> dict[str, object]:
    """NAME=VALUE pairs as a mapping from name to the text of its value."""
    options: dict[str, object] = {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidOption(f"{flag} takes NAME=VALUE; got {pair!r}")
        options[name] = value
    return options
