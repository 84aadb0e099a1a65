"""One run that makes a looped model: from windows of text to a model folder.

The folder and the resumption are those of `run`: `run.json`, `checkpoints/`, and at the end an ordinary
transformers folder with the tokenizer, a card, and `training.json`. A run starts from an ordinary checkpoint
whose layers are shared (`share`), from a looped model, or from random weights of a model's widths (scratch).
Weights are float32 and products bfloat16 in training. The saved model has its original dtype, and is measured
in that dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from .._common import machine
from ..errors import InvalidOption, SelfdraftError
from ..models import conformance
from ..models.adapters.fingerprint import fingerprint
from ..models.loading import load_pretrained
from ..models.looped.config import Shape
from ..models.looped.decoder import LoopedForCausalLM
from ..models.looped.retrofit import Rule, blank, recast, share
from ..models.transformers import MARK
from . import looped_card, pipeline, run, windows
from .distill import tokenizer_sha256
from .exits import Early, Exits, Places, distribution, exit_loss, measure
from .optimizer import muon
from .sequences import Draws
from .trainer import SECONDS, Clock, arguments, last_checkpoint

WATCHED = 48  # held-out windows evaluated during training
DEFAULT = Shape(unique=2, loops=6)
DECAY, BETAS = 0.1, (0.9, 0.95)  # of AdamW and Muon


@dataclass(frozen=True)
class LoopedSchedule:
    """How long and at which rates a looped model trains."""

    # Optimizer steps.
    steps: Annotated[int, Ge(1)] = 1000
    # Windows per step.
    batch: Annotated[int, Ge(1)] = 8
    # Learning rate of the hidden matrices (Muon).
    rate: Annotated[float, Gt(0)] = 4e-3
    # Learning rate of embeddings, head and norms (AdamW).
    outer_rate: Annotated[float, Gt(0)] = 2e-3
    # Steps in which both rates rise; then they fall linearly to zero.
    warmup: Annotated[int, Ge(1)] = 20
    # Steps between checkpoints, each with an evaluation.
    every: Annotated[int, Ge(1)] = 200
    seed: int = 0

    def factor(self, step: int) -> float:
        """The factor of the learning rates at a step."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / max(1, self.steps - self.warmup))


@dataclass(frozen=True)
class LoopedPlan:
    """The settings of a run."""

    model: str
    # A `datasets` folder or a file of documents; see `windows`.
    data: Path
    out: Path
    # Layers with weights of their own. None: 2, or those of a looped model.
    unique: int | None = None
    # Passes through them. None: 6, or those of a looped model.
    loops: int | None = None
    # Layers that run once, before them and after them. None: none, or those of a looped model.
    prelude: int | None = None
    coda: int | None = None
    # Rank of a delta per pass beside each of their matrices. None: no deltas, or those of a looped model.
    lora_rank: int | None = None
    # Start from random weights of the model's widths.
    scratch: bool = False
    # How layers are made from those of the model, and the width of their MLPs; see `share`.
    share_rule: Rule = "step"
    intermediate: int | None = None
    # What early passes learn; see `exits`.
    early: Early = "same"
    # Teacher to distill from; "none": train on the reference tokens. None: the ordinary model whose layers
    # are shared, if there is one.
    teacher: str | None = None
    # Share of the positions at which early passes are read.
    exit_share: Annotated[float, Gt(0), Le(1)] = 0.25
    column: str = "text"
    length: Annotated[int, Ge(2)] = 512
    schedule: LoopedSchedule = field(default_factory=LoopedSchedule)
    compile: bool = False
    device: str | None = None


def loop(plan: LoopedPlan, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train, measure and save a looped model; returns its figures. report: gets progress lines.

    Raises ModelError, TrainingDataError, and InvalidOption for a folder of another run.
    """
    base, tokenizer = load_pretrained(plan.model, None, plan.device)
    plan, model = _started(plan, base)
    data = windows.read(
        plan.data,
        tokenizer,
        plan.length,
        plan.column,
        conformance.context_length(base),
        base.config.vocab_size,
    )
    teacher = _teacher(plan, base)
    settings = _asked(plan, base, teacher, tokenizer, data)
    run.claim(plan.out, settings)
    recast(model, torch.float32)
    model.train()
    size, depth = model.num_parameters(), model.config.num_hidden_layers
    layers = f"{plan.prelude} + {plan.unique} x {plan.loops} + {plan.coda}, LoRA {plan.lora_rank or 0}"
    report(f"layers {layers}: {size:,} parameters, depth {depth}; {len(data.train):,} windows")
    machine.reset_peak(model.device)
    log = train(model, plan, data, teacher)
    peak = machine.peak(model.device)
    report("measuring the model on held-out windows")
    recast(model, base.dtype)
    found = measure(model, data.held_out, plan.schedule.batch, autocast=False)
    mark = getattr(model.config, MARK, None)
    own_loss = None if plan.scratch else _own_loss(base, data, plan.schedule.batch)
    teacher_loss = own_loss
    if teacher is not None and teacher is not base:
        teacher_loss = _own_loss(teacher, data, plan.schedule.batch)
    if mark and teacher is not None:
        setattr(model.config, MARK, {**mark, "tuning_cost": _tuning_cost(teacher_loss, found)})
    _save(plan, model, tokenizer, found)  # first, so that no failure after it costs the weights
    about: dict[str, Any] = {
        "base": mark["base"] if mark else plan.model,
        "parameters": size,
        "exits": asdict(found),
        "pipeline": _decoded(model, data, found, report) if model.config.loops > 1 else None,
        "base_loss": own_loss,
        "teacher_loss": None if teacher is None else teacher_loss,
        "grade": "tuned" if mark else "base",
        "seconds": log[-1][SECONDS],
        "peak_bytes": peak,
        "run": settings,
    }
    record = json.dumps({**about, "log": log}, indent=1)
    (plan.out / "training.json").write_text(record + "\n", encoding="utf-8")
    looped_card.write(plan.out, model.config.model_type, about, machine.describe(model.device))
    return about


def _started(plan: LoopedPlan, base: PreTrainedModel) -> tuple[LoopedPlan, LoopedForCausalLM]:
    """The plan with the defaults that depend on the model filled in, and the model before training."""
    own = base.config if isinstance(base, LoopedForCausalLM) else None
    asked = {name: getattr(plan, name) for name in asdict(DEFAULT)}
    asked = {name: count for name, count in asked.items() if count is not None}
    shape = replace(own.shape if own else DEFAULT, **asked)
    teacher = plan.teacher or ("none" if plan.scratch or own else plan.model)
    plan = replace(plan, **asdict(shape), teacher=None if teacher == "none" else teacher)
    set_seed(plan.schedule.seed)
    if plan.scratch:
        return plan, blank(base.config, shape, base.device, intermediate=plan.intermediate)
    model = share(base, shape, plan.share_rule, plan.intermediate)
    before = getattr(base.config, MARK, None) or {"base": plan.model}
    setattr(model.config, MARK, {"method": "speed", "base": before["base"]})
    return plan, model


def _teacher(plan: LoopedPlan, base: PreTrainedModel) -> PreTrainedModel | None:
    """The frozen teacher, if there is one. Raises InvalidOption if its vocabulary differs."""
    if plan.teacher is None:
        return None
    teacher = base if plan.teacher == plan.model else load_pretrained(plan.teacher, None, plan.device)[0]
    if teacher.config.vocab_size != base.config.vocab_size:
        raise InvalidOption(
            f"teacher: {plan.teacher} has a vocabulary of {teacher.config.vocab_size}, the model one of "
            f"{base.config.vocab_size}; both must have the same"
        )
    teacher.requires_grad_(False).eval()
    return teacher


def _tuning_cost(loss: float | None, found: Exits) -> dict[str, Any]:
    """The losses of teacher and model as a `tuning_cost.TuningCost`, whose other figures are not measured."""
    return {"tokens": found.tokens, "loss": [loss, found.loss[-1]], "agreement": None, "repeated": None}


def _decoded(
    model: LoopedForCausalLM, data: windows.Windows, found: Exits, report: Callable[[str], None]
) -> dict[str, Any] | None:
    """How the model decodes; None if it cannot, which is reported."""
    try:
        return asdict(pipeline.decode(model, data.held_out))
    except SelfdraftError as error:
        finite = math.isfinite(found.loss[-1])
        why = error if finite else "its loss is not finite, the training has diverged; try lower rates"
        report(f"how the model decodes is not measured: {why}")
        return None


def _own_loss(base: PreTrainedModel, data: windows.Windows, batch: int) -> float:
    """The loss of the model that the run started from, at its full depth."""
    looped = (
        base if isinstance(base, LoopedForCausalLM) else share(base, Shape(base.config.num_hidden_layers, 1))
    )
    return measure(looped, data.held_out, batch, autocast=False).loss[-1]


def _asked(
    plan: LoopedPlan,
    base: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    data: windows.Windows,
) -> dict[str, Any]:
    """All settings that the result depends on, with the hashes of windows and weights."""
    given = json.loads(json.dumps(asdict(plan), default=str))
    del given["out"], given["device"], given["compile"], given["column"], given["length"]
    given["data"] = {
        "windows": len(data.train),
        "held_out": len(data.held_out),
        "length": data.length,
        "sha256": data.sha256,
    }
    teacher_print = None if teacher is None else fingerprint(teacher)
    weights = {"fingerprint": fingerprint(base), "teacher_fingerprint": teacher_print}
    return {**given, **weights, "tokenizer": tokenizer_sha256(tokenizer)}


def train(
    model: LoopedForCausalLM,
    plan: LoopedPlan,
    data: windows.Windows,
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train from the last checkpoint in the plan's folder, if there is one. Returns the log."""
    folder, schedule = plan.out / "checkpoints", plan.schedule
    args = arguments(schedule, folder, model.device)
    if args.world_size > 1:
        raise InvalidOption("a looped model is trained by one process; start the command without a launcher")
    last = last_checkpoint(folder)
    clock = Clock(folder, last)
    trainer = LoopedTrainer(
        model,
        plan,
        teacher,
        args=args,
        train_dataset=Draws(data.train, schedule.steps * schedule.batch, schedule.seed),
        eval_dataset=data.held_out.select(windows.spread(len(data.held_out), WATCHED)),
        data_collator=Places(plan.exit_share),
        callbacks=[*callbacks, clock],
    )
    trainer.train(resume_from_checkpoint=last)
    return [*trainer.state.log_history, {SECONDS: clock.seconds}]


class LoopedTrainer(Trainer):
    """A Trainer with this loss, optimizer and schedule. It logs loss and agreement by pass."""

    def __init__(
        self, model: LoopedForCausalLM, plan: LoopedPlan, teacher: PreTrainedModel | None, **options: Any
    ) -> None:
        schedule = plan.schedule
        optimizer = muon(model, schedule.rate, schedule.outer_rate, DECAY, BETAS)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
        super().__init__(model=model, optimizers=(optimizer, falling), **options)
        self.model_accepts_loss_kwargs = False  # batches are of equal size, so the plain mean is right
        self.network, self.early, self.teacher = model, plan.early, teacher
        self.loss = torch.compile(exit_loss, dynamic=False) if plan.compile else exit_loss

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        with torch.autocast(self.args.device.type, torch.bfloat16):
            target = None if self.teacher is None else distribution(self.teacher, inputs["ids"])
            return self.loss(self.network, inputs["ids"], inputs["places"], self.early, target)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        found = measure(self.network, self.eval_dataset, self.args.eval_batch_size, autocast=True)
        figures = found.figures("eval")
        self.log(dict(figures))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures


def _save(
    plan: LoopedPlan, model: LoopedForCausalLM, tokenizer: PreTrainedTokenizerBase, found: Exits
) -> None:
    model.config.exit_agreement = found.agreement
    model.config.use_cache = True  # the trainer turns it off
    model.save_pretrained(plan.out)
    tokenizer.save_pretrained(plan.out)
