"""The recipe's settings: `settings.toml` as frozen, checked values.

Every number of the recipe lives in the TOML file beside this module, so that a run is described by
one file and a resumed run reads the same one. A key that no dataclass names is an error, not a
silent default. The default work folder (data, checkpoints, logs) is outside the checkout.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
HERE = Path(__file__).parent
WORK = Path.home() / ".cache" / "selfdraft" / "pico"


class RecipeError(Exception):
    """A mistake of whoever runs the recipe: says what was given and what to do."""


class SettingsError(RecipeError):
    """The settings file holds a value or a key that the recipe cannot use."""


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    context: int
    rope_theta: float


@dataclass(frozen=True)
class Tokens:
    entries: int
    sample_mb: dict[str, float]


@dataclass(frozen=True)
class Data:
    shard_mb: float
    held_out: float
    drop: str
    caps_mb: dict[str, float]


@dataclass(frozen=True)
class Source:
    form: str
    files: list[str]
    aligned: bool = False  # windows start at documents: prompt and response stay together


@dataclass(frozen=True)
class Stage:
    name: str
    until_tokens: int  # 0: open end
    length: int
    weights: dict[str, int]


@dataclass(frozen=True)
class Batch:
    tokens_per_step: int
    micro_tokens: int


@dataclass(frozen=True)
class Optimizer:
    name: str
    muon_lr: float
    adamw_lr: float
    weight_decay: float
    betas: tuple[float, float]
    clip: float


@dataclass(frozen=True)
class Schedule:
    warmup_steps: int
    max_steps: int


@dataclass(frozen=True)
class Run:
    compile: bool
    threads: int
    log_seconds: float
    checkpoint_seconds: float
    keep: int


@dataclass(frozen=True)
class Evaluation:
    windows: int
    sources: list[str]
    context: int
    final_windows: int
    edits: int
    loop_prompts: int
    loop_tokens: int
    tasks: int
    task_tokens: int
    samples: int
    sample_tokens: int
    curve_margin: int


@dataclass(frozen=True)
class Settings:
    seed: int
    shape: Shape
    tokenizer: Tokens
    data: Data
    sources: dict[str, Source]
    stages: list[Stage]
    batch: Batch
    optimizer: Optimizer
    schedule: Schedule
    run: Run
    evaluation: Evaluation


def build(kind: type[T], table: dict[str, Any], where: str) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(table) - known):
        raise SettingsError(f"[{where}] has unknown keys {unknown}; known are {sorted(known)}")
    try:
        return kind(**table)
    except TypeError as error:
        raise SettingsError(f"[{where}]: {error}") from error


def parse(table: dict[str, Any]) -> Settings:
    kinds = {
        "shape": Shape,
        "tokenizer": Tokens,
        "data": Data,
        "batch": Batch,
        "optimizer": Optimizer,
        "schedule": Schedule,
        "run": Run,
        "evaluation": Evaluation,
    }
    values: dict[str, Any] = {
        name: build(kinds[name], value, name) if name in kinds else value
        for name, value in table.items()
    }
    values["sources"] = {
        name: build(Source, value, f"sources.{name}") for name, value in table["sources"].items()
    }
    values["stages"] = [build(Stage, value, "stages") for value in table["stages"]]
    settings = build(Settings, values, "top level")
    check(settings)
    return settings


def check(settings: Settings) -> None:
    batch = settings.batch
    if batch.tokens_per_step % batch.micro_tokens:
        raise SettingsError(
            f"tokens_per_step {batch.tokens_per_step} is no multiple of "
            f"micro_tokens {batch.micro_tokens}"
        )
    for stage in settings.stages:
        if sum(stage.weights.values()) != 100:
            raise SettingsError(f"the weights of stage {stage.name!r} do not add up to 100")
        if unknown := sorted(set(stage.weights) - set(settings.sources)):
            raise SettingsError(f"stage {stage.name!r} names unknown sources {unknown}")
        if batch.micro_tokens % stage.length or stage.length > settings.shape.context:
            raise SettingsError(
                f"stage {stage.name!r}: length {stage.length} must divide micro_tokens "
                f"{batch.micro_tokens} and fit the context {settings.shape.context}"
            )
    if settings.stages[-1].until_tokens:
        raise SettingsError("the last stage must have an open end (until_tokens = 0)")


def load(path: Path = HERE / "settings.toml") -> Settings:
    if not path.is_file():
        raise SettingsError(f"no settings file at {path}")
    return parse(tomllib.loads(path.read_text(encoding="utf-8")))
