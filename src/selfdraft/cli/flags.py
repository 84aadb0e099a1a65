"""Flags that several commands share, so that they read and behave the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidOption

Model = Annotated[str, typer.Option(help="pico (embedded), a model folder, or a hub id.")]
Method = Annotated[str, typer.Option(help="How to draft: plain, llma, jacobi, or an installed one.")]
MethodOptions = Annotated[
    list[str] | None, typer.Option("--option", help="Option of the method, NAME=VALUE; repeatable.")
]
Adapter = Annotated[
    str | None, typer.Option(help="Adapter to draft with, or that tunes the model: a name or a folder.")
]
References = Annotated[
    list[Path] | None,
    typer.Option("--reference", "-r", help="Text file the answer may quote; repeatable."),
]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16, float32 or float64; default: as stored.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: cuda if present.")]
Numerics = Annotated[
    str | None,
    typer.Option(help="exact: the same bits whatever the method; fast. Default: exact on the CPU."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")]


def pairs(flag: str, given: Sequence[str] | None) -> dict[str, object]:
    """NAME=VALUE pairs as a mapping; who takes them reads the values."""
    options: dict[str, object] = {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidOption(f"{flag} takes NAME=VALUE; got {pair!r}")
        options[name] = value
    return options
