"""The loss curve of a run, and a law of it put to the test: `curve.py --work DIR`.

The law (law.py) is fitted to what the held-out bits per byte were at all checkpoints but the last,
where the decay ends, and has to say what they are there; its distance from what was measured is
reported, for each held-out source and for their mean. Left out are checkpoints of an earlier stage
of the mixture, and those in a warm-up or soon after one: a run that begins from decayed weights
first loses what the decay gave. Writes `curve.json` and `curve.png`; the last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from law import UNIT, Law, fit
from logs import FORGET, Floats, Line, LogError, Point, Run, open_run, read
from settings import HERE, WORK, Settings, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 6  # points: four parameters, a point to spare, and the one that is foretold
WITHIN = 3.0  # percent that the foretold loss may be off
SMOOTH = 25  # lines of the log
COLORS = 64  # of the picture, which would be several times as large with all of them


@dataclass(frozen=True)
class Trial:
    """A law fitted to all losses but the last, and what it says of that one."""

    law: Law
    losses: Floats
    predicted: float

    @property
    def distance(self) -> float:
        """Percent of the measured loss."""
        return 100 * abs(self.predicted / float(self.losses[-1]) - 1)

    def record(self) -> dict[str, Any]:
        found = {"measured": float(self.losses[-1]), "predicted": self.predicted}
        return {**asdict(self.law), **found, "distance_percent": self.distance}


@dataclass(frozen=True)
class Curve:
    """points: those that the law is about, in order; left_out: the others."""

    run: Run
    points: list[Point]
    left_out: list[Point]
    trials: dict[str, Trial]

    def record(self) -> dict[str, Any]:
        return {
            "fitted": len(self.points) - 1,
            "fitted_in_decay": sum(point.annealed > 0 for point in self.points[:-1]),
            "left_out": len(self.left_out),
            "decay_steps": len(self.run.falling()[0]) if self.run.decay else 0,
            "forget": FORGET,
            "from_tokens": self.points[0].tokens,
            "tokens": self.points[-1].tokens,
            "within_percent": WITHIN,
            "laws": {name: trial.record() for name, trial in self.trials.items()},
        }


def losses(points: Sequence[Point]) -> dict[str, Floats]:
    """Bits per byte at the points: their mean over the sources, then each source."""
    names = sorted(set.intersection(*(set(point.held) for point in points)))
    found = {name: np.array([point.held[name] for point in points]) for name in names}
    return {"mean": np.mean(list(found.values()), axis=0), **found}


def trace(run: Run, settings: Settings) -> Curve:
    """The run's curve. Raises LogError where there are too few points for a law."""
    margin, seen = settings.evaluation.curve_margin, run.stable[-1].tokens
    ends = (stage.until_tokens for stage in settings.stages if stage.until_tokens)
    earlier = max((end for end in ends if end <= seen), default=0)
    points: list[Point] = []
    left_out: list[Point] = []
    for point in run.points():
        counts = point.tokens >= earlier + margin and run.settled(point.tokens, margin)
        (points if counts else left_out).append(point)
    if len(points) < LEAST:
        raise LogError(
            f"a law needs {LEAST} checkpoints; {len(points)} count, {len(left_out)} are too near "
            "to a warm-up or of an earlier stage: train on, or save more often (checkpoint_seconds)"
        )
    return Curve(
        run, points, left_out, {name: tried(points, x) for name, x in losses(points).items()}
    )


def tried(points: Sequence[Point], measured: Floats) -> Trial:
    law, last = fit(points[:-1], measured[:-1]), points[-1]
    predicted = law(np.array([last.forward]), np.array([last.annealed]))
    return Trial(law, measured, float(predicted[0]))


def draw(curve: Curve, path: Path) -> None:
    """The picture: training loss, and held-out points with the laws."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(7.5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    for lines, name in ((curve.run.stable, "full rate"), (curve.run.decay, "decay")):
        plot_training(above, lines, name)
    colors = {name: f"C{number}" for number, name in enumerate(curve.trials)}
    for name, trial in curve.trials.items():
        plot_trial(below, curve, trial, name, colors[name])
    for point in curve.left_out:
        for name, value in losses([point]).items():
            color = colors.get(name, "gray")
            below.plot(point.tokens / UNIT, value, "o", color=color, mfc="none", alpha=0.5)
    for mark, said in (("*", "last"), ("x", "last, foretold"), ("o", "left out")):
        below.plot([], [], mark, color="black", mfc="none", label=said)
    above.set(ylabel="training loss, nats per token")
    below.set(xlabel="tokens seen, millions", ylabel="held-out, bits per byte")
    for axes in (above, below):
        if curve.run.decay:
            end = curve.run.decay[-1].tokens
            axes.axvspan(curve.run.branch / UNIT, end / UNIT, color="0.9", zorder=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(drawn := BytesIO(), dpi=100)
    Image.open(drawn).quantize(COLORS).save(path, optimize=True)


def plot_training(axes: Axes, lines: Sequence[Line], name: str) -> None:
    logged = np.array([(at.tokens / UNIT, at.loss) for at in lines if at.loss is not None])
    if not len(logged):
        return
    window = np.ones(width := min(SMOOTH, len(logged))) / width
    tokens, loss = (np.convolve(column, window, mode="valid") for column in logged.T)
    (line,) = axes.plot(tokens, loss, label=f"{name}, mean of {width} lines of the log")
    axes.plot(*logged.T, color=line.get_color(), alpha=0.25, linewidth=0.7)


def plot_trial(axes: Axes, curve: Curve, trial: Trial, name: str, color: str) -> None:
    """Points, the law through them, and the last point beside what was foretold of it."""
    said = f"{name} (last: {trial.distance:.1f} % off)"
    run, tokens = curve.run, np.array([point.tokens for point in curve.points])
    axes.plot(tokens[:-1] / UNIT, trial.losses[:-1], "o", color=color, markersize=4, label=said)
    steady = np.linspace(tokens[0], run.stable[-1].tokens, 100)
    axes.plot(steady / UNIT, trial.law(steady, np.zeros_like(steady)), color=color, linewidth=1)
    if run.decay:
        forward, annealed = run.falling()
        falling = run.branch + run.per_step * np.arange(1, len(forward) + 1)
        axes.plot(falling / UNIT, trial.law(forward, annealed), color=color, linewidth=1)
    axes.plot(tokens[-1] / UNIT, trial.losses[-1], "*", color=color, markersize=11)
    axes.plot(tokens[-1] / UNIT, trial.predicted, "x", color="black", zorder=3)


def write(curve: Curve, folder: Path) -> dict[str, Any]:
    """`curve.json` and `curve.png`; returns what the first holds."""
    record = curve.record()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "curve.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(curve, folder / "curve.png")
    return record


def farthest(work: Path) -> Path | None:
    """The decay that has seen most tokens, if there is one."""
    logs = {path.parent: list(read(path)) for path in work.glob("decay-*/log.jsonl")}
    found = {folder: lines[-1].tokens for folder, lines in logs.items() if lines}
    return max(found, key=lambda folder: found[folder], default=None)


def main(
    work: Annotated[Path, typer.Option(help="Work folder of the recipe.")] = WORK,
    decay: Annotated[
        str | None, typer.Option(help="Name of its folder; default: the one that saw most.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: WORK.")] = None,
    settings: Annotated[Path, typer.Option(help="Another settings file.")] = HERE / "settings.toml",
) -> None:
    """Fit the loss curve and draw it; the last line is JSON."""
    chosen = load(settings)
    run = open_run(work, work / decay if decay else farthest(work), chosen)
    print(json.dumps(write(trace(run, chosen), out or work)))


if __name__ == "__main__":
    typer.run(main)
