"""Training an adapter on `transformers.Trainer`: its loop, schedule, logs, checkpoints and resumption.

The student holds no frozen weights, so a checkpoint has the adapter and its optimizer, some megabytes; if all
weights are trained, it has them, too. LoRA and sampler head have their own learning rate, because the rate of
embeddings and prefixes (3e-2 in BiTA) is too high for them.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, cast

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from .card import SHOWN
from .sequences import Batches, Draws
from .student import IGNORED, Student
from .tuned import TunedStudent

SORTED = 16  # batches that are sorted by length together
SECONDS = "seconds"  # key of the last log entry: duration of the run over all its starts
Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """How long, on how much and at which rates an adapter trains."""

    # Optimizer steps.
    steps: Annotated[int, Ge(1)] = 2000
    # Sequences per step; with several processes (`accelerate launch`), per step and process.
    batch: Annotated[int, Ge(1)] = 4
    # Maximum tokens of a sequence.
    length: Annotated[int, Ge(8)] = 512
    # Groups of masks per sequence.
    anchors: Annotated[int, Ge(1)] = 64
    # Learning rate of embeddings and prefix.
    rate: Annotated[float, Gt(0)] = 1e-2
    # Learning rate of LoRA and sampler head, and of all weights if they are trained.
    lora_rate: Annotated[float, Gt(0)] = 2e-3
    # Share of the steps in which the rates rise; then they fall like a cosine.
    warmup: float = 0.03
    # Steps between checkpoints, each with an evaluation.
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
    """Train from the last checkpoint in `folder`, if there is one. Returns the log.

    collate: makes the student's inputs of rows.
    """
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


class ByLength(Sampler[int]):
    """Uses in random order, sorted by length within some batches, whose order is random too: texts in one
    batch are padded to the longest. Every start draws the same order."""

    def __init__(self, uses: Dataset[Any], batch: int, seed: int) -> None:
        self.uses, self.batch, self.seed = uses, batch, seed

    def __len__(self) -> int:
        return len(cast(Any, self.uses))

    def __iter__(self) -> Iterator[int]:
        dice = random.Random(self.seed)
        order = dice.sample(range(len(self)), len(self))
        for start in range(0, len(order), SORTED * self.batch):
            part = sorted(order[start : start + SORTED * self.batch], key=self._length)
            found = [part[at : at + self.batch] for at in range(0, len(part), self.batch)]
            for batch in dice.sample(found, len(found)):
                yield from batch

    def _length(self, use: int) -> int:
        row = self.uses[use]
        return len(row["prompt"]) + len(row["answer"])


class Clock(TrainerCallback):
    """The duration of a run, including earlier starts up to the checkpoint that it continues from."""

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
    """The last complete checkpoint. The state of the trainer is written last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


class AdapterTrainer(Trainer):
    """A Trainer that logs how often each mask's first candidate is the model's pick, and, if the model is
    tuned, the loss that keeps its text. Texts of about one length go together."""

    def _get_train_sampler(self, train_dataset: Any = None) -> ByLength:
        return ByLength(cast(Any, self.train_dataset), self._train_batch_size, self.args.seed)

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
    """Accuracy by offset, and the tokens per forward of a chain of first candidates.

    hits: [anchors, masks], 1, 0 or IGNORED.
    """
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
    """Figures of hits, [anchors, masks], and for tuned models of the loss of the text, [sequences]."""
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
    """The fields that all schedules have; see `Schedule`."""

    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def every(self) -> int: ...
    @property
    def seed(self) -> int: ...


def arguments(schedule: Times, folder: Path, device: torch.device, **more: Any) -> TrainingArguments:
    """Logging, evaluation, checkpoints and resumption of all trainings. more: further arguments."""
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
