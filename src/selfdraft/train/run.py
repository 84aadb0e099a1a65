"""One training run: from a folder of answers to a folder with an adapter.

The folder holds `run.json` (everything the run depends on, and each start's command, commit and versions),
`checkpoints/`, and at the end the adapter, its calibration and its card. The same command goes on where it
stopped; with other options the folder is refused.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .._common import machine
from .._common.run_folder import changes
from ..errors import InvalidOption, TrainingDataError
from ..models.adapters import folder as adapter_folder
from ..models.adapters.adapter import Adapter, AdapterConfig
from ..models.adapters.fingerprint import fingerprint
from ..models.loading import drive, load_pretrained
from . import card, shards
from .calibration import calibrate
from .distill import tokenizer_sha256
from .student import Loss, Student, fresh, started
from .trainer import SECONDS, Schedule, batches, train

LEAST = 4  # tokens of an answer that can be trained on
HELD_OUT = 0.02  # share of the rows that is not trained on, at most
MOST = 64  # rows


@dataclass(frozen=True)
class Plan:
    """What is asked for. method: whose adapter it is. data: a folder of `selfdraft distill`. start: an
    adapter of this kind to go on from, see `student.started`."""

    method: str
    model: str
    data: Path
    out: Path
    config: AdapterConfig
    loss: Loss = field(default_factory=Loss)
    schedule: Schedule = field(default_factory=Schedule)
    start: str | None = None
    dtype: str | None = None
    device: str | None = None


def run(plan: Plan, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train, calibrate, save; what came of it. tell: hears what is being done.

    Raises ModelError, AdapterError, TrainingDataError, and InvalidOption for a folder of another run.
    """
    pretrained, tokenizer = load_pretrained(plan.model, plan.dtype, plan.device)
    model = drive(pretrained.requires_grad_(False), "fast")
    distilled = shards.read(plan.data)
    base = fingerprint(pretrained)
    shards.check_model(distilled.manifest, [base], model.vocab_size, tokenizer_sha256(tokenizer))
    rows, held_out = split(distilled.rows, plan.data)
    begun = started(plan.start, model, plan.config)
    if begun is not None:
        plan = replace(plan, config=begun.config)
    student = Student(model, begun or fresh(model, plan.config, plan.schedule.seed), plan.loss)
    settings = asked(plan, distilled, begun)
    claim(plan.out, settings)
    share = student.adapter.size / pretrained.num_parameters()
    tell(f"{student.adapter.size:,} parameters to train, {share:.2%} of the model's; {len(rows):,} sequences")
    machine.reset_peak(model.device)
    collate = batches(student, plan.schedule)
    log = train(student, plan.schedule, rows, held_out, collate, plan.out / "checkpoints")
    peak = machine.peak(model.device)
    tell("calibrating on held-out sequences")
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
    """Rows to train on, and rows to judge by, evenly spread. Raises TrainingDataError where there are too
    few."""
    usable = [i for i, answer in enumerate(rows["answer"]) if len(answer) >= LEAST]
    if len(usable) < 2:
        raise TrainingDataError(f"{data} has {len(usable)} answers of {LEAST} tokens or more; distill more")
    count = max(1, min(MOST, round(HELD_OUT * len(usable))))
    held = usable[:: len(usable) // count][:count]
    kept = set(held)
    return rows.select([i for i in usable if i not in kept]), rows.select(held)


def asked(plan: Any, distilled: shards.Distilled, begun: Adapter | None) -> dict[str, Any]:
    """Everything that comes of a plan depends on. The answers, and the adapter that it goes on from, by what
    they are, not by where they lie."""
    given = json.loads(json.dumps(asdict(plan), default=str))
    del given["out"], given["device"]
    given["data"] = {"rows": len(distilled.rows), **distilled.manifest["asked"]}
    given["start"] = None if begun is None else machine.module_sha256(repr(begun.config), begun)
    return dict(given)


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """See that the folder is this run's, and note the start. Raises InvalidOption."""
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
