"""One training run: a cosine over its time, a curve, checkpoints to go on from."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selfdraft.models.adapters import folder as adapter_folder
from selfdraft.models.adapters.adapter import AdapterConfig
from selfdraft.train.packed import NoiseConfig
from selfdraft.train.sequences import Batches
from selfdraft.train.student import Loss, fresh
from selfdraft.train.trainer import accuracies
from selfdraft.train.tuned import TunedLoss

from . import texts
from .students import PASSES, BlockStudent, FastStudent, TunedFastStudent

if TYPE_CHECKING:
    from .job import Job
    from .texts import Row

TARGETS = ("q_proj", "o_proj", "up_proj", "down_proj")
PASSED = 1 - 1 / PASSES  # share of the steps in which blocks pass through the student
FLOOR = 0.02  # of the rate, where the cosine ends


@dataclass(frozen=True)
class Recipe:
    """What a stage trains."""

    method: str
    config: AdapterConfig
    # Groups of rows that hang from each text.
    anchors: int = 64
    # Learning rates of mask tokens and prefix, and of LoRA and sampler head.
    rate: float = 1e-2
    lora_rate: float = 2e-3
    # Tokens of text in a batch, pads among them.
    tokens: int = 32768
    length: int = 1024
    loss: Loss = field(default_factory=lambda: Loss(decay=0.8))
    # Weight of the loss that keeps a tuned model near its base.
    keep: float = 3.0
    # Tokens of a noisy block; 0: mask tokens.
    block: int = 0
    # How many ids masks may predict in decoding, the most frequent; 0: all.
    vocabulary: int = 8192
    # Learn from greedy answers alone.
    greedy: bool = False
    warmup: float = 0.03
    seed: int = 0


RECIPES = {
    "bita": Recipe("bita", AdapterConfig(4, prefix=32, sampler=256)),
    "space": Recipe("space", AdapterConfig(4, rank=12, targets=TARGETS, sampler=256)),
    "bita-published": Recipe(
        "bita",
        AdapterConfig(3, prefix=16),
        rate=3e-2,
        loss=Loss("tokens", decay=1.0, dropout=0.1),
        vocabulary=0,
        greedy=True,
    ),
    "space-tuned": Recipe(
        "space-tuned",
        AdapterConfig(4, rank=12, targets=TARGETS, sampler=256, gated=False),
        anchors=48,
        lora_rate=1e-3,
    ),
    "cllm": Recipe(
        "cllm",
        AdapterConfig(0, rank=12, targets=TARGETS, gated=False),
        anchors=16,
        lora_rate=1e-3,
        loss=Loss(decay=1.0),
        block=16,
    ),
}


class Run:
    """A student with its optimizer and what it has come to; kept in `work/STAGE/state.pt`."""

    def __init__(self, job: Job, stage: str) -> None:
        self.job, self.stage, self.recipe = job, stage, job.recipe(stage)
        self.student = made_student(job, self.recipe)
        adapter, dense = self.student.adapter, self.student.dense()
        known = {id(part) for part in dense}
        light = [part for part in adapter.parameters() if id(part) not in known and part.numel()]
        groups = [(light, self.recipe.rate), (dense, self.recipe.lora_rate)]
        self.optimizer = torch.optim.AdamW(
            [{"params": own, "lr": rate, "rate": rate} for own, rate in groups if own],
            weight_decay=0.0,
            betas=(0.9, 0.98),
            fused=job.device.type == "cuda",
        )
        self.state: dict[str, Any] = {"step": 0, "rows": 0, "used": 0.0, "curve": []}
        self.path = job.work / stage / "state.pt"
        self.path.parent.mkdir(exist_ok=True)
        if self.path.exists():
            kept = torch.load(self.path, map_location=job.device, weights_only=False)
            adapter.load_state_dict(kept["adapter"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.state = kept["state"]

    def rows(self) -> list[Row]:
        """What it learns from."""
        rows = [row for row in self.job.rows() if not row.held_out]
        return [row for row in rows if row.temperature == 0] if self.recipe.greedy else rows

    def step(self, batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        """One optimizer step. share: of the stage's time that is over."""
        factor = min(1.0, (share + 1e-3) / self.recipe.warmup)
        factor *= FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        found = self.student(**batch)
        found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.student.adapter.parameters(), 1.0)
        self.optimizer.step()
        self.state["step"] += 1
        self.state["rows"] += batch["anchors"].numel() * self.student.size
        return {name: part.detach() for name, part in found.items()}

    def point(self, found: list[dict[str, Tensor]]) -> None:
        """A point of the curve, of the steps since the one before."""
        hits = torch.cat([one["hits"].flatten(0, 1) for one in found]).cpu().numpy()
        point = {key: self.state[key] for key in ("step", "rows")} | {"seconds": round(self.state["used"], 1)}
        point |= accuracies(hits)
        for name in ("loss", "kept"):
            if name in found[0]:
                point[name] = round(float(torch.stack([one[name] for one in found]).mean()), 4)
        self.state["curve"].append(point)
        self.job.tell(f"{self.stage}: {point}")

    def save(self) -> None:
        """The checkpoint, and the adapter as it is."""
        adapter = self.student.adapter
        kept = {
            "adapter": adapter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
        }
        torch.save(kept, self.path.with_suffix(".part"))
        os.replace(self.path.with_suffix(".part"), self.path)
        folder = self.job.work / self.stage
        adapter_folder.save(
            folder, adapter, self.job.model, self.recipe.method, self.job.base_name, self.about()
        )
        self.job.take(self.stage)
        self.job.note(self.stage, **self.state)

    def about(self) -> dict[str, Any]:
        recipe, rows = self.recipe, self.rows()
        greedy = [row for row in rows if row.temperature == 0]
        kinds: dict[str, list[int]] = {}
        for row in rows:
            pair = kinds.setdefault(self.job.kinds[row.kind], [0, 0])
            pair[0] += 1
            pair[1] += len(row.answer)
        loss: Loss | TunedLoss = recipe.loss
        if not recipe.config.gated:
            passed = PASSED if recipe.block else 0.0
            loss = TunedLoss(weight=recipe.keep, decay=recipe.loss.decay, refresh=passed)
        schedule = {
            "steps": self.state["step"],
            "batch": recipe.tokens // recipe.length,
            "length": recipe.length,
            "anchors": recipe.anchors,
            "rate": recipe.rate,
            "lora_rate": recipe.lora_rate,
        }
        return {
            "trained": self.student.adapter.size,
            "share": self.student.adapter.size / self.job.model.parameters,
            "seconds": round(self.state["used"], 1),
            "peak_bytes": torch.cuda.max_memory_allocated() if self.job.device.type == "cuda" else None,
            "rows": self.state["rows"],
            "run": {
                "method": recipe.method,
                "model": self.job.base_name,
                "data": {
                    "rows": len(rows),
                    "greedy_share": round(len(greedy) / max(1, len(rows)), 3),
                    "temperature": max((row.temperature for row in rows), default=0.0),
                    "max_new_tokens": self.job.args.answer,
                    "kinds": kinds,
                    "block": recipe.block,
                },
                "config": asdict(self.student.adapter.config),
                "loss": asdict(loss),
                # Blocks as `students.BlockStudent` makes them, in the words of the package's settings.
                "noise": asdict(NoiseConfig(copies=recipe.anchors)),
                "unknown": "filler",
                "vocabulary": recipe.vocabulary,
                "schedule": schedule,
                "full": False,
                "start": None,
            },
        }


def made_student(job: Job, recipe: Recipe) -> FastStudent:
    adapter = fresh(job.model, recipe.config, recipe.seed)
    if recipe.config.gated:
        return FastStudent(job.model, adapter, recipe.loss, job.compiled)
    if recipe.block:
        return BlockStudent(job.model, adapter, recipe.loss, job.compiled, recipe.keep, recipe.block)
    return TunedFastStudent(job.model, adapter, recipe.loss, job.compiled, recipe.keep)


def train(job: Job, stage: str, seconds: float) -> None:
    """Train for so long, or go on for so long. The first step, which compiles, is not counted."""
    run = Run(job, stage)
    rows = run.rows()
    if not rows:
        raise RuntimeError("there are no answers to learn from: run the stage distil first")
    recipe, state = run.recipe, run.state
    cut = Batches(recipe.length, recipe.anchors, run.student.size, texts.STRIDE)
    before, found, began = state["used"], [], 0.0
    for batch in texts.batches(rows, cut, recipe.tokens, job.device, recipe.seed, state["step"]):
        if not began:
            run.step(batch, before / (before + seconds))
            began = told = saved = time.perf_counter()
            continue
        state["used"] = before + time.perf_counter() - began
        share = state["used"] / (before + seconds)
        if share >= 1 or job.left() < 0:
            break
        found.append(run.step(batch, share))
        now = time.perf_counter()
        if now - told > job.args.tell:
            run.point(found)
            found, told = [], now
        if now - saved > job.args.hold:
            run.save()
            saved = now
    if found:
        run.point(found)
    run.save()
