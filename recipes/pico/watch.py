"""What a run says and keeps: progress, log lines and checkpoints, by the clock.

`progress.json` is written into a checkpoint after everything else, so a checkpoint without it was
cut short and is not used. The log is JSON lines: loss, rate, tokens/s, and at each checkpoint the
validation's bits per byte.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cores import Cores
from settings import Settings


@dataclass
class Progress:
    """How far a run is; the stream of tokens goes on from `tokens`."""

    tokens: int = 0
    seconds: float = 0.0  # of work: pauses from outside are not counted


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = [path.parent for path in folder.glob("checkpoint-*/progress.json")]
    return max(found, key=step_of, default=None)


def step_of(folder: Path) -> int:
    """The step after which `checkpoint-<step>` was made, or `decay-<step>` left the stable run."""
    return int(folder.name.split("-")[1])


def progress_of(folder: Path | None) -> Progress:
    """The progress kept with a checkpoint or with exported weights; none is none."""
    path = folder / "progress.json" if folder else None
    return Progress(**json.loads(path.read_text())) if path and path.is_file() else Progress()


@contextmanager
def on_signals(stop: Callable[..., None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run with a checkpoint."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Watch(TrainerCallback):
    """Counts tokens and working time; asks the trainer for logs, checkpoints and the end."""

    def __init__(
        self,
        settings: Settings,
        progress: Progress,
        log: Path,
        measure: Callable[[], dict[str, float]],
        minutes: float = float("inf"),
    ) -> None:
        self.settings, self.progress, self.log, self.measure = settings, progress, log, measure
        self.end = progress.seconds + minutes * 60
        self.stopped = False
        self.steps: list[float] = []  # seconds of the last steps
        self.before = Progress(**asdict(progress))  # at the last log line
        self.logged = self.saved = self.last = time.monotonic()
        self.cores = Cores(settings.run.threads or torch.get_num_threads())

    def stop(self, *_: object) -> None:
        self.stopped = True

    def write(self, step: int, **values: object) -> None:
        line = json.dumps({"step": step, **asdict(self.progress), **values})
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def count(self, took: float) -> None:
        """A step that took ten times the usual was paused from outside: count the usual."""
        usual = median(self.steps) if len(self.steps) > 5 else took
        self.steps = [*self.steps[-20:], took]
        self.progress.seconds += usual if took > 10 * usual else took
        self.progress.tokens += self.settings.batch.tokens_per_step

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.logged = self.saved = self.last = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        now = time.monotonic()
        self.count(now - self.last)
        self.last = now
        self.cores.adapt()
        over = self.stopped or self.progress.seconds >= self.end
        over |= state.global_step >= state.max_steps
        if over or now - self.logged >= self.settings.run.log_seconds:
            control.should_log, self.logged = True, now
        if over or now - self.saved >= self.settings.run.checkpoint_seconds:
            control.should_save, self.saved = True, now
        control.should_training_stop |= over

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        spent = self.progress.seconds - self.before.seconds
        speed = (self.progress.tokens - self.before.tokens) / max(spent, 1e-9)
        self.before = Progress(**asdict(self.progress))
        kept = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs}
        threads = torch.get_num_threads()
        self.write(state.global_step, **kept, tokens_per_second=round(speed), threads=threads)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        (folder / "progress.json").write_text(json.dumps(asdict(self.progress)))
        self.write(state.global_step, validation=self.measure())
        self.last = time.monotonic()
