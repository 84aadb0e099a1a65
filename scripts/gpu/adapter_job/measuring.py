"""What trained adapters are worth on held-out prompts: acceptance by kind, what tuning costs; and their
cards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selfdraft._common import machine
from selfdraft.models.adapters import folder as adapter_folder
from selfdraft.params import SamplingParams
from selfdraft.train import card, tuning_cost
from selfdraft.train.calibration import calibrate, frequent_ids, window_acceptance
from selfdraft.train.run import MAX_HELD_OUT
from selfdraft.train.sequences import Batches
from selfdraft.train.student import IGNORED, Loss
from selfdraft.train.trajectories import convergence, watch

from . import texts
from .llama import Llama
from .sampling import Answers
from .students import FastStudent
from .training import RECIPES, Run

if TYPE_CHECKING:
    from .job import Job
    from .texts import Row

TREE = 3  # candidates at each place of the tree that is counted
COSTED = 32  # held-out prompts on which the price of tuning is measured


def measure(job: Job, _: float) -> None:
    """All adapters that have been trained further since they were measured last."""
    for stage in RECIPES:
        if not (job.work / stage / "state.pt").exists():
            continue
        run = Run(job, stage)
        if job.report.get(stage, {}).get("measured_step") == run.state["step"]:
            continue
        held_out = [row for row in job.rows() if row.held_out]
        about, found = run.about(), {}
        if run.recipe.config.gated:
            student = run.student
            student.fast = job.fast  # the shapes of held-out batches are not compiled
        else:
            student, held_out, costs = tuned(job, run, held_out)
            about |= costs
        if run.recipe.config.masks:
            found = acceptance_by_kind(job, student, held_out)
            greedy = [row for row in held_out if row.temperature == 0]
            greedy = greedy[:: -(-len(greedy) // MAX_HELD_OUT)]  # each anchor is looked at alone
            known = ({"prompt": row.prompt, "answer": row.answer} for row in job.rows() if not row.held_out)
            ids = frequent_ids(known, run.recipe.vocabulary, job.model.vocab_size)
            student.adapter.vocabulary = run.student.adapter.vocabulary = ids
            calibration = calibrate(student.eval(), evenly(greedy, run, job.device))
            run.student.adapter.odds = calibration.odds
            about["accuracy"] = [[round(share, 4) for share in row] for row in calibration.accuracy]
        written(job, run, about)
        costs = {key: about[key] for key in ("tuning_cost", "convergence") if key in about}
        job.note(stage, measured=found | costs, measured_step=run.state["step"])
        job.tell(f"{stage}: {found.get('all', costs)}")


def written(job: Job, run: Run, about: dict[str, Any]) -> None:
    """The adapter with its odds and its card."""
    folder, adapter, method = job.work / run.stage, run.student.adapter, run.recipe.method
    adapter_folder.save(folder, adapter, job.model, method, job.base_name, about)
    log = [
        {"step": point["step"], **{f"eval_{key}": value for key, value in point.items() if "right" in key}}
        for point in run.state["curve"]
    ]
    write = card.write if adapter.config.gated else card.write_tuned
    write(folder, method, job.base_name, about, log, machine.describe(job.device))
    job.take(run.stage)


def tuned(job: Job, run: Run, held_out: Sequence[Row]) -> tuple[FastStudent, list[Row], dict[str, Any]]:
    """The tuned model as it will be loaded, its own answers to held-out prompts, and what the tuning
    costs."""
    adapter = run.student.adapter.requires_grad_(False)
    adapter.bfloat16().float()
    model = job.model.adapted(adapter)
    merged, prompts = Llama.of(model.base.model), [row.prompt for row in held_out[:COSTED]]
    params = SamplingParams(max_new_tokens=min(160, job.args.answer), eos=tuple(job.eos))
    about: dict[str, Any] = {
        "tuning_cost": asdict(tuning_cost.measure(job.model, model.base, prompts, params))
    }
    if run.recipe.block:
        block = run.recipe.block
        about["convergence"] = {
            name: asdict(convergence(watch(one, prompts, block, params), block))
            for name, one in (("base", job.model), ("tuned", model.base))
        }
        adapter.odds = window_acceptance(model.base, prompts, params)
        return run.student, [], about
    answers = Answers(merged, job.eos, job.args.answer, job.args.slots)
    asked = [replace(row, answer=[], temperature=0.0) for row in held_out]
    own = [row for batch in answers.batches(asked) for row in answers(batch)]
    return FastStudent(model.base, adapter.drafting(), Loss(), merged), own, about


def evenly(rows: Sequence[Row], run: Run, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches with anchors that are evenly spread."""
    recipe = run.recipe
    cut = Batches(recipe.length, recipe.anchors, recipe.config.masks, texts.STRIDE)
    ordered, lanes = sorted(rows, key=len), max(1, recipe.tokens // recipe.length)
    for at in range(0, len(ordered), lanes):
        yield texts.collated(ordered[at : at + lanes], cut, device)


@torch.no_grad()
def acceptance_by_kind(job: Job, student: FastStudent, rows: Sequence[Row]) -> dict[str, Any]:
    """Tokens per forward where each row of a tree has masks of its own, as decoded: of a chain of first
    candidates, and of a full tree of TREE candidates at each place; and how often the first is right, by
    offset."""
    cut = Batches(1024, 64, student.size, texts.STRIDE)
    found: dict[str, Any] = {}
    everything: list[Tensor] = []
    for kind in sorted({row.kind for row in rows}):
        own, ranks = [row for row in rows if row.kind == kind], []
        for at in range(0, len(own), 16):
            batch = texts.collated(own[at : at + 16], cut, job.device)
            scores, labels = student.as_decoded(batch["ids"], batch["anchors"]), batch["labels"].flatten(0, 1)
            best = scores.topk(TREE).indices.view(*labels.shape, TREE)
            ranks.append(
                ((best == labels[..., None]) & (labels != IGNORED)[..., None])[labels[:, 0] != IGNORED]
            )
        everything += ranks
        found[job.kinds[kind]] = _figures(ranks)
    return {"all": _figures(everything)} | found


def _figures(ranks: Sequence[Tensor]) -> dict[str, Any]:
    """ranks: [anchors, masks, TREE], is the candidate of that rank the token that came?"""
    hit = torch.cat(list(ranks)).float()
    runs = {"chain": hit[..., 0], "tree": hit.amax(-1)}
    return {"anchors": len(hit), "right": [round(x, 4) for x in hit[..., 0].mean(0).tolist()]} | {
        name: round(1 + float(one.cumprod(1).sum(1).mean()), 4) for name, one in runs.items()
    }


def figures(report: dict[str, Any]) -> str:
    """The last line of a job."""
    return json.dumps({stage: report.get(stage, {}).get("measured") for stage in RECIPES})
