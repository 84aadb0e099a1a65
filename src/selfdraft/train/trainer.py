"""Training an adapter on `transformers.Trainer`: its loop, schedule, logs, checkpoints and resumption.

The student holds no frozen weights, so a checkpoint is the adapter and its optimizer, some megabytes; where
all weights learn, they are in it. LoRA and sampler head have a learning rate of their own: one that suits
embeddings and prefixes (3e-2 in BiTA) would break them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from .card import SHOWN
from .sequences import Batches, Draws
from .student import IGNORED, Student
from .tuned import TunedStudent

SECONDS = "seconds"  # the last entry of a log: what the run took, over all its starts
Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """steps: of the optimizer. batch: sequences of a step. length: tokens of a sequence, at most. anchors:
    groups of masks per sequence. rate: learning rate of embeddings and prefix; lora_rate: of LoRA, sampler
    head, and of all weights where they learn; both rise for `warmup` of the steps, then fall as a cosine.
    every: steps between checkpoints, each with an evaluation. Several processes (`accelerate launch`) each
    have a batch of their own."""

    steps: Annotated[int, Ge(1)] = 2000
    batch: Annotated[int, Ge(1)] = 4
    length: Annotated[int, Ge(8)] = 512
    anchors: Annotated[int, Ge(1)] = 64
    rate: Annotated[float, Gt(0)] = 1e-2
    lora_rate: Annotated[float, Gt(0)] = 2e-3
    warmup: float = 0.03
    every: Annotated[int, Ge(1)] = 100
    seed: int = 0


def train(
    student: Student | TunedStudent,
    schedule: Schedule,
    rows: Dataset[Any],
    held_out: Dataset[Any],
    collate: Collate,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train, from the last checkpoint in `folder` if there is one. collate: rows into what the student takes.
    Returns the log."""
    args = arguments(
        schedule,
        folder,
        student.model.device,
        learning_rate=schedule.rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(schedule.warmup * schedule.steps)),
        label_names=["labels"],
    )
    last = last_checkpoint(folder)
    clock = Clock(folder, last)
    uses = schedule.steps * schedule.batch * args.world_size
    trainer = AdapterTrainer(
        model=student,
        args=args,
        train_dataset=Draws(rows, uses, schedule.seed),
        eval_dataset=held_out,
        data_collator=collate,
        compute_metrics=_metrics,
        optimizers=(_optimizer(student, schedule), None),
        callbacks=[*callbacks, clock],
    )
    trainer.train(resume_from_checkpoint=last)
    return [*trainer.state.log_history, {SECONDS: clock.seconds}]


class Clock(TrainerCallback):
    """The seconds a run has taken, those up to the checkpoint among them that it goes on from."""

    def __init__(self, folder: Path, last: str | None) -> None:
        self.path, self.began = folder / "seconds.json", time.perf_counter()
        self.known: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.before = self.known.get(Path(last).name, 0.0) if last is not None else 0.0

    @property
    def seconds(self) -> float:
        return round(self.before + time.perf_counter() - self.began, 1)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.known[f"checkpoint-{state.global_step}"] = self.seconds
        self.path.write_text(json.dumps(self.known), encoding="utf-8")


def batches(student: Student, schedule: Schedule) -> Batches:
    return Batches(schedule.length, schedule.anchors, student.adapter.config.masks)


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that is whole: its state is written at the end."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


class AdapterTrainer(Trainer):
    """A Trainer whose log says how often each guess is the model's pick, and what became of the model's
    text."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        out = model(**inputs)
        if model.training:
            outputs = [out["hits"].detach().flatten(0, 1), *([out["kept"]] if "kept" in out else [])]
            self._outputs = [*getattr(self, "_outputs", []), outputs]
        return (out["loss"], out) if return_outputs else out["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and getattr(self, "_outputs", None):
            logs |= _figures([torch.cat(parts).cpu().numpy() for parts in zip(*self._outputs, strict=True)])
            self._outputs = []
        super().log(logs, start_time)


def accuracies(hits: np.ndarray[Any, Any]) -> dict[str, float]:
    """By offset, and the tokens per forward of a chain of first guesses. hits: [anchors, masks], 1, 0 or
    IGNORED."""
    known = hits != IGNORED
    right = (hits == 1) & known
    found = {
        f"right_{i + 1}": round(float(right[:, i].sum() / max(1, known[:, i].sum())), 4)
        for i in range(min(SHOWN, hits.shape[1]))
    }
    runs = right.cumprod(1).sum(1)[known[:, 0]]
    return found | {"tokens_per_forward": round(1 + float(runs.mean()) if len(runs) else 1.0, 4)}


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    outputs = prediction.predictions
    hits, *kept = list(outputs) if isinstance(outputs, tuple) else [outputs]
    return _figures([np.asarray(hits).reshape(-1, hits.shape[-1]), *kept])


def _figures(outputs: Sequence[np.ndarray[Any, Any]]) -> dict[str, float]:
    """Of hits, [anchors, masks], and where the model's text is at stake, of what was kept, [sequences]."""
    found = accuracies(outputs[0])
    return found | {"kept": round(float(outputs[1].mean()), 5)} if len(outputs) > 1 else found


def _optimizer(student: Student | TunedStudent, schedule: Schedule) -> torch.optim.Optimizer:
    dense = student.dense()
    known = {id(part) for part in dense}
    others = [part for part in student.parameters() if id(part) not in known]
    groups: list[dict[str, Any]] = [{"params": others, "lr": schedule.rate}] if others else []
    if dense:
        groups.append({"params": dense, "lr": schedule.lora_rate})
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))


class Times(Protocol):
    """What every schedule has; see `Schedule`."""

    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def every(self) -> int: ...
    @property
    def seed(self) -> int: ...


def arguments(schedule: Times, folder: Path, device: torch.device, **more: Any) -> TrainingArguments:
    """How all our trainings are logged, judged, kept and resumed. more: what one of them adds."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch,
        per_device_eval_batch_size=schedule.batch,
        max_grad_norm=1.0,
        logging_steps=min(20, schedule.every),
        eval_strategy="steps",
        eval_steps=schedule.every,
        save_strategy="steps",
        save_steps=schedule.every,
        save_total_limit=2,
        seed=schedule.seed,
        data_seed=schedule.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        remove_unused_columns=False,
        report_to=[],
        **more,
    )
