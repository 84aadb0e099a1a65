"""One run that tunes a model: from a folder of answers to a folder with an adapter, or with all weights.

The folder and the resumption are those of `run`. At the end the tuned model is measured as it will be loaded,
rounded and merged: the convergence of its blocks, the accuracy of its masks, and what the tuning costs
(`tuning_cost`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from .._common import machine
from ..errors import InvalidOption, TrainingDataError
from ..models.adapters import folder as adapter_folder
from ..models.adapters.adapter import Adapter, AdapterConfig
from ..models.adapters.fingerprint import fingerprint
from ..models.loading import drive, load_pretrained
from ..models.transformers import MARK, TransformersModel
from ..params import SamplingParams
from . import card, run, shards
from .calibration import calibrate, frequent_ids, window_acceptance
from .distill import tokenizer_sha256
from .filler import choose_filler
from .packed import Masked, NoiseConfig, Noisy
from .prompts import Prompts
from .sequences import Batches
from .student import Loss, Student, fresh, started
from .trainer import SECONDS, Collate, Schedule, train
from .trajectories import convergence, watch
from .tuned import TunedLoss, TunedStudent
from .tuning_cost import measure

WATCHED = 32  # held-out prompts that the tuned model answers
MAX_ANSWER = 160  # tokens of such an answer


@dataclass(frozen=True)
class TunedPlan:
    """The settings of a run."""

    # cllm or space-tuned.
    method: str
    model: str
    # A folder written by `selfdraft trajectories` (cllm) or by `selfdraft distill`.
    data: Path
    out: Path
    config: AdapterConfig
    loss: TunedLoss = field(default_factory=TunedLoss)
    schedule: Schedule = field(default_factory=Schedule)
    # Only for cllm.
    noise: NoiseConfig | None = None
    # Train all weights instead of LoRA.
    full: bool = False
    # How many ids the masks may predict, the most frequent; 0: all.
    vocabulary: Annotated[int, Ge(0)] = 8192
    # Files of the prompts that the data answer, each row with an `answer` by somebody else: the text that the
    # loss of keep learns (CLLM's ground-truth labels). None: the model's own answers.
    labels: tuple[str, ...] = ()
    # Share of the rows to train on.
    share: Annotated[float, Gt(0), Le(1)] = 1.0
    # An adapter of the same kind to start from. The data may be its own trajectories.
    start: str | None = None
    # What stands for positions not known yet in noisy blocks: a filler token, which the model learns to read
    # as unknown, or random tokens.
    unknown: Literal["filler", "random"] = "filler"
    dtype: str | None = None
    device: str | None = None


def tune(plan: TunedPlan, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train, measure and save a tuned model; returns its figures. report: gets lines of progress.

    Raises ModelError, AdapterError, TrainingDataError, and InvalidOption for a folder of another run.
    """
    pretrained, tokenizer = load_pretrained(plan.model, plan.dtype, plan.device)
    model = drive(pretrained.requires_grad_(False), "fast")
    distilled = shards.read(plan.data)
    if plan.labels and (plan.noise is None or plan.loss.keep != "tokens"):
        raise InvalidOption("labels: answers by somebody else are learned by cllm, with keep=tokens")
    if plan.start is not None and plan.full:
        raise InvalidOption("start: an adapter to start from goes with LoRA, not with all weights")
    start = started(plan.start, model, plan.config)
    bases = [model] if start is None else [model, model.adapted(start).base]
    prints = [fingerprint(one.model) for one in bases]
    shards.check_model(distilled.manifest, prints, model.vocab_size, tokenizer_sha256(tokenizer))
    plan = _filled(plan, tokenizer, model.vocab_size, distilled, start)
    adapter = start or fresh(model, plan.config, plan.schedule.seed)
    params = SamplingParams(max_new_tokens=MAX_ANSWER, eos=tuple(distilled.manifest["asked"]["eos"]))
    rows = _usable(plan, distilled)
    if plan.labels:
        rows = _labelled(plan, rows, distilled.manifest, tokenizer)
    rows, held_out = run.split(rows, plan.data)
    rows = rows.select(range(max(1, round(plan.share * len(rows)))))
    watched = held_out.select(range(min(WATCHED, len(held_out))))
    prompts = [row["prompt"] for row in watched if 1 < len(row["prompt"]) < model.context]
    if not prompts:
        raise TrainingDataError(
            f"{plan.data}: no held-out prompt fits the context, so the tuning cost cannot be measured"
        )
    student = TunedStudent(model, adapter, plan.loss, plan.full)
    asked = run.asked(plan, distilled, start)
    if plan.labels:  # by content, as the data
        asked["labels"] = hashlib.sha256(json.dumps([*rows["label"]]).encode()).hexdigest()
    run.claim(plan.out, asked)
    trained = sum(part.numel() for part in student.parameters())
    share = trained / pretrained.num_parameters()
    report(f"{trained:,} parameters to train, {share:.2%} of the model's; {len(rows):,} sequences")
    machine.reset_peak(model.device)
    collate = _collate(plan, model, distilled.manifest)
    log = train(student, plan.schedule, rows, held_out, collate, plan.out / "checkpoints")
    peak = machine.peak(model.device)
    report("measuring the tuned model on held-out prompts")
    tuned = _finished(plan, student)
    cost = measure(model, tuned.base, prompts, params)
    about: dict[str, Any] = {
        "trained": trained,
        "share": share,
        "seconds": log[-1][SECONDS],
        "peak_bytes": peak,
        "tuning_cost": asdict(cost),
        "run": asked,
    }
    if plan.noise is not None:
        block = _block(distilled.manifest)
        about["convergence"] = {
            name: asdict(convergence(watch(one, prompts, block, params), block))
            for name, one in (("base", model), ("tuned", tuned.base))
        }
    if plan.config.filler is not None:
        student.adapter.odds = window_acceptance(tuned.base, prompts, params)
    if plan.config.masks:
        student.adapter.vocabulary = frequent_ids(rows, plan.vocabulary, model.vocab_size)
        about["accuracy"] = _calibrated(plan, tuned, student.adapter, held_out)
    _save(plan, model, tuned, student.adapter, tokenizer, about)
    card.write_tuned(plan.out, plan.method, plan.model, about, log, machine.describe(model.device))
    return about


def _filled(
    plan: TunedPlan, tokenizer: Any, vocabulary: int, distilled: shards.Distilled, start: Adapter | None
) -> TunedPlan:
    """The plan with the shape of the adapter that it starts from, and with the filler, if it uses one.

    Raises InvalidOption if no token can be the filler.
    """
    config = plan.config if start is None else start.config
    filler = None
    if plan.noise is not None and plan.unknown == "filler":
        ends = distilled.manifest["asked"]["eos"]
        filler = choose_filler(tokenizer, vocabulary, ends, distilled.rows, config.filler)
    config = replace(config, filler=filler)
    if start is not None:
        start.config, start.odds = config, {}
    noise = None if plan.noise is None else replace(plan.noise, filler=filler)
    return replace(plan, config=config, loss=replace(plan.loss, filler=filler), noise=noise)


def _usable(plan: TunedPlan, distilled: shards.Distilled) -> Any:
    """The rows to train on. Raises TrainingDataError if trajectories are needed and missing."""
    if plan.noise is None:
        return distilled.rows
    block = _block(distilled.manifest)
    if not block:
        raise TrainingDataError(
            f"{plan.data} holds answers without trajectories; record them with `selfdraft trajectories`"
        )
    if block >= plan.schedule.length:
        raise TrainingDataError(
            f"{plan.data} holds blocks of {block} tokens, and length is {plan.schedule.length}; raise it"
        )
    kept = [i for i, found in enumerate(distilled.rows["states"]) if found]
    return distilled.rows.select(kept).select_columns(["index", *shards.COLUMNS, "states"])


def _labelled(plan: TunedPlan, rows: Any, manifest: Mapping[str, Any], tokenizer: Any) -> Any:
    """The rows whose prompts have an answer by somebody else, with its token ids as `label`.

    Raises TrainingDataError for other prompts than the data answer, and where none has an answer.
    """
    prompts = Prompts(plan.labels)
    if manifest["asked"]["prompts"]["sha256"] != prompts.sha256:
        raise TrainingDataError(
            f"labels: {', '.join(plan.labels)} holds other prompts than {plan.data} answers; give the files "
            "that were given to `selfdraft trajectories`, in that order"
        )

    def label(index: int) -> list[int]:
        text = prompts[index].answer
        ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) and text else []
        return [*ids, tokenizer.eos_token_id] if ids else []

    found = [label(index) for index in rows["index"]]
    kept = [i for i, ids in enumerate(found) if ids]
    if not kept:
        raise TrainingDataError(f"labels: no row of {', '.join(plan.labels)} has a text in `answer`")
    return rows.select(kept).add_column("label", [found[i] for i in kept])


def _block(manifest: Mapping[str, Any]) -> int:
    return int(manifest["asked"].get("block", 0))


def _collate(plan: TunedPlan, model: TransformersModel, manifest: Mapping[str, Any]) -> Collate:
    prompts = plan.loss.keep == "base"  # as published, the text of prompts is not learned again
    cut = Batches(plan.schedule.length, plan.schedule.anchors, max(1, plan.config.masks))
    if plan.noise is not None:
        return Noisy(cut, _block(manifest), plan.noise, frozenset(manifest["asked"]["eos"]), prompts)
    return Masked(cut, range(model.vocab_size, model.vocab_size + plan.config.masks), prompts)


def _finished(plan: TunedPlan, student: TunedStudent) -> TransformersModel:
    """The tuned model as it will be loaded, in its stored dtype and with LoRA merged."""
    student.requires_grad_(False)
    if not plan.full:
        student.adapter.bfloat16().float()
        return student.base.adapted(student.adapter)
    tuned = student.learner.copied(student.base.dtype)
    tuned.model.requires_grad_(False)
    tuned.base, tuned.grade = tuned, "tuned"
    if plan.config.masks:
        return tuned.adapted(student.adapter.drafting())
    tuned.lookahead = student.adapter.lookahead(tuned.vocab_size)
    return tuned


def _calibrated(
    plan: TunedPlan, tuned: TransformersModel, adapter: Adapter, held_out: Any
) -> Sequence[Sequence[float]]:
    """The accuracy of the masks by offset and rank. Stores their acceptance rates in the adapter."""
    student = Student(tuned.base, adapter.drafting(), Loss())
    schedule, size = plan.schedule, plan.schedule.batch
    collate = Batches(schedule.length, max(16, schedule.anchors), plan.config.masks)
    greedy = [row for row in held_out if row["temperature"] == 0] or list(held_out)
    found = calibrate(student, (collate(greedy[i : i + size]) for i in range(0, len(greedy), size)))
    adapter.odds = found.odds
    return [[round(p, 4) for p in row] for row in found.accuracy]


def _save(
    plan: TunedPlan,
    model: TransformersModel,
    tuned: TransformersModel,
    adapter: Adapter,
    tokenizer: Any,
    about: Mapping[str, Any],
) -> None:
    """Save an adapter, or, if all weights were trained, a model and the adapter of its masks, if any."""
    if not plan.full:
        adapter_folder.save(plan.out, adapter, model, plan.method, plan.model, about)
        return
    folder = plan.out / "model"
    mark = {"method": plan.method, "base": plan.model, "filler": adapter.config.filler, "odds": adapter.odds}
    setattr(tuned.base.model.config, MARK, {**mark, "tuning_cost": about["tuning_cost"]})
    with tuned.base.attending(tuned.own_attention):
        tuned.base.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if plan.config.masks:
        adapter_folder.save(plan.out, adapter.drafting(), tuned.base, plan.method, str(folder), about)
    (plan.out / "tuning.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
