"""What the logs of a run and of its decay say: points of the loss curve, with the rate behind them.

The law of law.py takes the learning rate as two areas. S1 is the sum of the rate over steps, S2 the
sum of the rate's falls as a momentum that forgets: m(i) = 0.999 m(i-1) + rate(i-1) - rate(i), S2
the sum of m. Here the rate is a share of the full one and a step counts as its tokens, so that at
the full rate S1 is the tokens seen and S2 is 0. A warm-up counts as full rate, as in the paper.

0.999 a step is the paper's choice: a fall loses half its weight in 690 steps. Decays of this recipe
are about as long, so S2 is most of the area between the full rate and the real one: 84 % of it over
450 steps, 74 % over 800.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from settings import RecipeError, Settings
from watch import Progress, step_of

Floats = NDArray[np.float64]
FORGET = 0.999
FULL = 0.999  # of the highest rate: less is a warm-up


class LogError(RecipeError):
    """A log is missing, damaged, or holds too little."""


@dataclass(frozen=True)
class Line:
    """seconds: of work. loss: nats per token since the line before, on training text. rate: of the
    step. held: bits per byte of held-out sources, by name."""

    step: int
    tokens: int
    seconds: float
    loss: float | None = None
    rate: float | None = None
    held: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """Bits per byte of held-out sources; forward and annealed: S1 and S2, in tokens."""

    tokens: int
    forward: float
    annealed: float
    held: dict[str, float]


def read(path: Path) -> Iterator[Line]:
    if not path.is_file():
        raise LogError(f"no log {path}; pretrain first, or give --work")
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(text)
            step, tokens, seconds = row["step"], row["tokens"], row["seconds"]
            loss, rate, held = row.get("loss"), row.get("learning_rate"), row.get("validation", {})
            yield Line(step, tokens, seconds, loss, rate, held)
        except (ValueError, KeyError) as error:
            raise LogError(f"{path}, line {number}: {error!r}; remove the line") from error


def joined(logs: Iterable[list[Line]]) -> list[Line]:
    """Lines by tokens. A run that was begun anew replaces what an earlier one logged from there."""
    kept: list[Line] = []
    for log in sorted(filter(None, logs), key=lambda lines: lines[0].tokens):
        for line in log:
            while kept and kept[-1].tokens > line.tokens:
                kept.pop()
            kept.append(line)
    return kept


def areas(shares: Floats, forget: float = FORGET) -> tuple[Floats, Floats]:
    """S1 and S2 in steps, after each of the steps that these shares of the full rate were for."""
    momentum, falls = 0.0, []
    for fall in -np.diff(shares, prepend=1.0):
        momentum = forget * momentum + fall
        falls.append(momentum)
    return np.cumsum(shares), np.cumsum(falls)


@dataclass(frozen=True)
class Run:
    """A stable run, and a decay that left it after step `first`. per_step: tokens of a step."""

    stable: list[Line]
    decay: list[Line]
    first: int
    per_step: int

    @property
    def start(self) -> Progress:
        """Where the logs begin."""
        line = self.stable[0]
        return Progress(line.tokens - line.step * self.per_step, line.seconds)

    @property
    def branch(self) -> int:
        """Tokens seen where the decay begins."""
        return self.decay[0].tokens - (self.decay[0].step - self.first) * self.per_step

    @property
    def full(self) -> float:
        """The highest learning rate."""
        return max(line.rate for line in self.stable if line.rate is not None)

    def points(self) -> list[Point]:
        """The stable ones, then those of the decay."""
        stable = [Point(at.tokens, at.tokens, 0.0, at.held) for at in self.stable if at.held]
        if not self.decay:
            return stable
        forward, annealed = self.falling()
        measured = [(at, at.step - self.first - 1) for at in self.decay if at.held]
        return stable + [
            Point(at.tokens, float(forward[i]), float(annealed[i]), at.held)
            for at, i in measured
            if i >= 0
        ]

    def falling(self) -> tuple[Floats, Floats]:
        """S1 and S2 after each step of the decay, in tokens; the log names some of its rates."""
        known = {at.step: at.rate / self.full for at in self.decay if at.rate is not None}
        steps = np.arange(self.first + 1, self.decay[-1].step + 1)
        shares = np.interp(steps, [self.first, *known], [1.0, *known.values()])
        forward, annealed = areas(shares)
        return self.branch + forward * self.per_step, annealed * self.per_step

    def settled(self, tokens: int, margin: int) -> bool:
        """Whether no step of the last `margin` tokens was made in a warm-up."""
        near = (at for at in self.stable if tokens - margin < at.tokens <= tokens)
        return all(at.rate is None or at.rate >= FULL * self.full for at in near)


def open_run(work: Path, decay: Path | None, settings: Settings, until: float = math.inf) -> Run:
    """The run in a work folder and its decay in a folder `decay-<step>`, if there is one.

    until: tokens; what was logged later is left out. Raises LogError.
    """
    logs = sorted(work.glob("stable*/log.jsonl")) or [work / "stable" / "log.jsonl"]
    stable = joined(list(read(path)) for path in logs)
    fallen = joined([list(read(decay / "log.jsonl"))]) if decay else []
    stable, fallen = ([at for at in lines if at.tokens <= until] for lines in (stable, fallen))
    if not any(line.rate for line in stable):
        raise LogError(f"{logs[0]} names no learning rate up to {until:,} tokens; train on")
    first = step_of(decay) if decay else 0
    return Run(stable, fallen, first, settings.batch.tokens_per_step)
