"""One training run: from a folder of answers to a folder with an adapter.

The folder holds `run.json` (all settings, and the command and commit of each start), `checkpoints/`, and at
the end the adapter with its calibration and its card. The same command continues a run that was stopped; with
other settings the folder is refused.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from .._common import machine
from .._common.run_folder import changes
from ..errors import InvalidOption, TrainingDataError
from ..models.adapters import folder as adapter_folder
from ..models.adapters.adapter import Adapter, AdapterConfig
from ..models.adapters.fingerprint import fingerprint
from ..models.loading import drive, load_pretrained
from . import card, shards
from .calibration import calibrate, frequent_ids
from .distill import tokenizer_sha256
from .student import Loss, Student, fresh, started
from .trainer import SECONDS, Schedule, batches, train

MIN_ANSWER = 4  # tokens; shorter answers are not trained on
HELD_OUT = 0.02  # share of the rows that is held out
MAX_HELD_OUT = 64  # rows


@dataclass(frozen=True)
class Plan:
    """The settings of a run."""

    # The method that drafts with the adapter.
    method: str
    model: str
    # A folder written by `selfdraft distill`.
    data: Path
    out: Path
    config: AdapterConfig
    loss: Loss = field(default_factory=Loss)
    schedule: Schedule = field(default_factory=Schedule)
    # How many ids the masks may predict, the most frequent; 0: all.
    vocabulary: Annotated[int, Ge(0)] = 8192
    # An adapter of the same kind to start from; see `student.started`.
    start: str | None = None
    dtype: str | None = None
    device: str | None = None


def run(plan: Plan, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train, calibrate and save an adapter; returns its figures. report: gets lines of progress.

    Raises ModelError, AdapterError, TrainingDataError, and InvalidOption for a folder of another run.
    """
    pretrained, tokenizer = load_pretrained(plan.model, plan.dtype, plan.device)
    model = drive(pretrained.requires_grad_(False), "fast")
    distilled = shards.read(plan.data)
    base = fingerprint(pretrained)
    shards.check_model(distilled.manifest, [base], model.vocab_size, tokenizer_sha256(tokenizer))
    rows, held_out = split(distilled.rows, plan.data)
    start = started(plan.start, model, plan.config)
    if start is not None:
        plan = replace(plan, config=start.config)
    student = Student(model, start or fresh(model, plan.config, plan.schedule.seed), plan.loss)
    settings = asked(plan, distilled, start)
    claim(plan.out, settings)
    share = student.adapter.size / pretrained.num_parameters()
    report(
        f"{student.adapter.size:,} parameters to train, {share:.2%} of the model's; {len(rows):,} sequences"
    )
    machine.reset_peak(model.device)
    collate = batches(student, plan.schedule)
    log = train(student, plan.schedule, rows, held_out, collate, plan.out / "checkpoints")
    peak = machine.peak(model.device)
    report("calibrating on held-out sequences")
    student.adapter.vocabulary = frequent_ids(rows, plan.vocabulary, model.vocab_size)
    greedy = [row for row in held_out if row["temperature"] == 0] or list(held_out)
    size = plan.schedule.batch
    calibration = calibrate(student, (collate(greedy[i : i + size]) for i in range(0, len(greedy), size)))
    student.adapter.odds = calibration.odds
    about = {
        "accuracy": [[round(p, 4) for p in row] for row in calibration.accuracy],
        "trained": student.adapter.size,
        "share": share,
        "seconds": log[-1][SECONDS],
        "peak_bytes": peak,
        "run": settings,
    }
    adapter_folder.save(plan.out, student.adapter, model, plan.method, plan.model, about)
    card.write(plan.out, plan.method, plan.model, about, log, machine.describe(model.device))
    return about


def split(rows: Any, data: Path) -> tuple[Any, Any]:
    """Split rows into training rows and held-out rows, which are evenly spread.

    Raises TrainingDataError for too few rows.
    """
    usable = [i for i, answer in enumerate(rows["answer"]) if len(answer) >= MIN_ANSWER]
    if len(usable) < 2:
        raise TrainingDataError(
            f"{data} has {len(usable)} answers of {MIN_ANSWER} tokens or more; distill more"
        )
    count = max(1, min(MAX_HELD_OUT, round(HELD_OUT * len(usable))))
    held = usable[:: len(usable) // count][:count]
    kept = set(held)
    return rows.select([i for i in usable if i not in kept]), rows.select(held)


def asked(plan: Any, distilled: shards.Distilled, start: Adapter | None) -> dict[str, Any]:
    """All settings that the result depends on. Data and the adapter to start from are identified by
    content."""
    given = json.loads(json.dumps(asdict(plan), default=str))
    del given["out"], given["device"]
    given["data"] = {"rows": len(distilled.rows), **distilled.manifest["asked"]}
    given["start"] = None if start is None else machine.module_sha256(repr(start.config), start)
    return dict(given)


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Check that the folder belongs to this run, and record the start. Raises InvalidOption."""
    path = out / "run.json"
    out.mkdir(parents=True, exist_ok=True)
    held: dict[str, Any] = {"asked": json.loads(json.dumps(settings)), "starts": []}
    if path.exists():
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            changed = list(changes(held["asked"], settings))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidOption(f"{path} is not of a training run ({error}); give another --out") from error
        if changed:
            raise InvalidOption(f"--out {out} holds another run ({'; '.join(changed)}); give another folder")
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    held["starts"].append({"argv": sys.argv, "time": now, "commit": machine.commit()})
    path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
