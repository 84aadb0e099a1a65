"""Training: trees and labels as defined, losses by hand, gradients where they belong, resumed == whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from selfdraft.drafting import mask_tree
from selfdraft.drafting.plain import Plain
from selfdraft.errors import AdapterError
from selfdraft.models import transformers_inputs
from selfdraft.models.adapters import folder as adapter_folder
from selfdraft.models.adapters.adapter import AdapterConfig
from selfdraft.models.transformers import TransformersModel
from selfdraft.train import calibration, sequences, trainer
from selfdraft.train import student as student_module
from selfdraft.train.calibration import calibrate
from selfdraft.train.sequences import Batches, Draws
from selfdraft.train.student import IGNORED, Loss, Student, Tape, anchored, fresh, started
from selfdraft.train.trainer import Schedule, accuracies, train

import adapting
from conftest import tiny_llama
from runs import greedy, random_prompt, run

BITA = AdapterConfig(masks=2, prefix=4)
SPACE = AdapterConfig(masks=2, rank=4)
WHOLE = AdapterConfig(masks=3, prefix=4, rank=4, targets=("q_proj", "down_proj"), sampler=8)


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    return TransformersModel(tiny_llama(torch.float64).requires_grad_(False), "fast")


@pytest.fixture(scope="module")
def rows(model: TransformersModel) -> datasets.Dataset:
    """Prompts, and what the model itself says to them."""
    prompts = [random_prompt(8, seed) for seed in range(12)]
    answers = [run(model, Plain(), prompt, greedy(24)).emitted for prompt in prompts]
    return datasets.Dataset.from_list(
        [
            {"prompt": list(prompt), "answer": list(answer)}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    )


def test_a_sequence_is_a_tree() -> None:
    tree = anchored([5, 6, 7, 8], [3, 1], [50, 51, 52])
    assert tree.tokens == (5, 6, 7, 8, 50, 51, 52, 50, 51, 52)
    assert tree.parents == (-1, 0, 1, 2, 3, 4, 5, 1, 7, 8)
    assert tree.depth[4:] == (4, 5, 6, 2, 3, 4)


def right(prompt: Sequence[int], answer: Sequence[int], batches: Batches, draw: int | None = None) -> None:
    """All about one batch of a text and a shorter one, against the text itself."""
    rows = [{"prompt": prompt, "answer": answer}, {"prompt": prompt[:3], "answer": answer[:2]}]
    rows = [{**row, "draw": draw} for row in rows]
    got = batches(rows)
    assert got["ids"].shape[1] % sequences.STRIDE == 0
    for ids, anchors, labels, row in zip(got["ids"], got["anchors"], got["labels"], rows, strict=True):
        whole = [*row["prompt"], *row["answer"]]
        text = ids.tolist()
        kept = min(len(whole), batches.length)
        start = next(i for i in range(len(whole)) if whole[i : i + kept] == text[:kept])
        assert not any(text[kept:])
        assert start == 0 or len(row["prompt"]) > batches.length // 2, "the answer's start is kept"
        known = [a for a, told in zip(anchors.tolist(), labels.tolist(), strict=True) if told[0] != IGNORED]
        first = max(0, len(row["prompt"]) - 1 - start)
        assert len(known) == min(batches.anchors, max(0, kept - 2 - first))
        assert len(set(known)) == len(known)
        assert all(first <= a <= kept - 3 for a in known), "decoding could go on from each"
        for anchor, told in zip(anchors.tolist(), labels.tolist(), strict=True):
            true = [text[i] if i < kept else IGNORED for i in range(anchor + 2, anchor + 2 + batches.masks)]
            assert told == (true if told[0] != IGNORED else [IGNORED] * batches.masks)


CASES = [(9, 30, 64), (9, 30, 24), (40, 30, 24), (40, 3, 24), (1, 5, 8)]  # prompt, answer, length


@pytest.mark.parametrize(("prompt", "answer", "length"), CASES)
@pytest.mark.parametrize("draw", [None, 0, 1])
@pytest.mark.parametrize("anchors", [3, 50])
def test_labels_are_the_tokens_two_and_more_places_on(
    prompt: int, answer: int, length: int, draw: int | None, anchors: int
) -> None:
    text = [*range(1, 1 + prompt + answer)]
    right(text[:prompt], text[prompt:], Batches(length, anchors, 3), draw)


def test_anchors_are_drawn_anew_but_those_of_an_evaluation() -> None:
    row = {"prompt": [*range(1, 9)], "answer": [*range(9, 60)]}
    batches = Batches(64, 5, 2)

    def drawn(rows: Sequence[Any]) -> list[tuple[int, ...]]:
        return [tuple(batches([row])["anchors"].flatten().tolist()) for row in rows]

    uses = Draws([row, row], 6)
    assert len(uses) == 6
    anew = drawn([uses[i] for i in range(6)])
    assert len(set(anew)) == 6
    assert drawn([uses[i] for i in range(6)]) == anew
    assert not set(anew) & set(drawn([Draws([row], 6, seed=1)[i] for i in range(6)]))
    assert len(set(drawn([row] * 5))) == 1


def off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Masks learn the token after their own row's."""
    call = Batches.__call__

    def wrong(self: Batches, rows: Any) -> dict[str, Tensor]:
        got = call(self, rows)
        told = got["labels"]
        return {**got, "labels": torch.where(told == IGNORED, told, told - 1)}  # texts count upwards

    patch.setattr(Batches, "__call__", wrong)


def beyond_the_end(patch: pytest.MonkeyPatch) -> None:
    """What stands after the text is padding, and counts."""
    patch.setattr(sequences, "IGNORED", 0)


def before_the_answer(patch: pytest.MonkeyPatch) -> None:
    """Anchors within the prompt."""
    cut = Batches.cut
    patch.setattr(Batches, "cut", lambda self, *given: (cut(self, *given)[0], 0))


@pytest.mark.parametrize("fault", [off_by_one, beyond_the_end, before_the_answer])
def test_wrong_labels_are_seen(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        right([*range(1, 10)], [*range(10, 40)], Batches(64, 50, 3))


def batch(rows: Any, masks: int) -> dict[str, Tensor]:
    """One of the texts is short: it has few anchors, and masks beyond its end."""
    return Batches(48, 8, masks)([rows[0], {**rows[1], "answer": rows[1]["answer"][:4]}, rows[2]])


@torch.no_grad()
def by_hand(student: Student, given: dict[str, Tensor]) -> float:
    """The mean over masks that have a token to tell, by the definition of each kind, one by one."""
    scores, own = student.scores(given["ids"], given["anchors"])
    losses, weights = 0.0, 0.0
    told = given["labels"].flatten(0, 1).tolist()
    for group, labels in enumerate(told):
        for offset, label in enumerate(labels):
            if label == IGNORED:
                continue
            row = group * len(labels) + offset
            logp, logq = scores[row].log_softmax(-1), own[row].log_softmax(-1)
            weight = student.loss.decay**offset
            loss = -logp[label] if student.loss.kind == "tokens" else -(logq.exp() * logp).sum()
            losses, weights = losses + weight * float(loss), weights + weight
    return losses / weights


@pytest.mark.parametrize("kind", ["distill", "tokens"])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_the_loss_is_that_by_hand(
    model: TransformersModel, rows: Any, kind: Literal["distill", "tokens"], decay: float
) -> None:
    student = Student(model, fresh(model, WHOLE), Loss(kind, decay))
    given = batch(rows, 3)
    out = student(**given)
    assert out["loss"].item() == pytest.approx(by_hand(student, given), rel=1e-5)
    scores, own = student.scores(given["ids"], given["anchors"])
    hits = (scores.argmax(-1) == own.argmax(-1)).view(given["labels"].shape)
    assert torch.equal(out["hits"] == 1, hits & (given["labels"] != IGNORED))
    assert torch.equal(out["hits"] == IGNORED, given["labels"] == IGNORED)


def test_the_model_says_its_own_answers(model: TransformersModel, rows: Any) -> None:
    """At the true positions the model's own picks are the labels, for the texts are its own."""
    student = Student(model, fresh(model, WHOLE), Loss())
    given = batch(rows, 3)
    own = student.scores(given["ids"], given["anchors"])[1].argmax(-1).view(given["labels"].shape)
    known = given["labels"] != IGNORED
    assert known.sum() > 40
    assert torch.equal(own[known], given["labels"][known])


def aims_late(patch: pytest.MonkeyPatch) -> None:
    """Masks are compared with the model's scores one row on."""
    scores = Student.scores

    def late(self: Student, ids: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        return scores(self, ids, anchors)[0], scores(self, ids, anchors + 1)[1]

    patch.setattr(Student, "scores", late)


def nothing_ignored(patch: pytest.MonkeyPatch) -> None:
    """Masks beyond the end of the text count."""
    forward = Student.forward
    patch.setattr(
        Student,
        "forward",
        lambda self, ids, anchors, labels: forward(self, ids, anchors, labels.clamp(min=0)),
    )


def flat(patch: pytest.MonkeyPatch) -> None:
    """All offsets have the same weight."""
    forward = Student.forward

    def even(self: Student, **given: Tensor) -> dict[str, Tensor]:
        loss, self.loss = self.loss, Loss(self.loss.kind, 1.0)
        out = forward(self, **given)
        self.loss = loss
        return out

    patch.setattr(Student, "forward", even)


@pytest.mark.parametrize("fault", [aims_late, nothing_ignored, flat])
def test_a_wrong_loss_is_seen(
    model: TransformersModel, rows: Any, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)

    def check() -> None:
        test_the_loss_is_that_by_hand(model, rows, "tokens", 0.5)
        test_the_model_says_its_own_answers(model, rows)

    with pytest.raises(AssertionError):
        check()


def at_once(student: Student, ids: Tensor, anchors: Tensor, labels: Tensor) -> Tensor:
    """The loss of all masks in one forward over the whole tree, through whole tables of logits."""
    model, length, fixed = student.model, ids.shape[1], student.adapter.config.prefix
    assert model.lookahead is not None
    pairs = zip(ids.tolist(), anchors.tolist(), strict=True)
    grown = [anchored(text, where, model.lookahead.ids) for text, where in pairs]
    width, tape = len(grown[0]), Tape(student.adapter)
    laid = model.layout(grown, [0] * len(grown), width, fixed + width)
    made = transformers_inputs.kind_masks(model.kinds, laid.seen, laid.positions, fixed)
    with torch.no_grad():
        seen = {name: mask[..., : fixed + length] for name, mask in made.items()}
        text = model.call(laid, seen, tape, 0, length)
    masks = model.call(laid, made, tape, length, width)
    size = labels.shape[-1]
    true = (anchors[..., None] + 1 + torch.arange(size)).clamp(max=length - 1)
    lane = torch.arange(len(ids))[:, None, None]
    states = model.apply_sampler_head(masks.flatten(0, 1), ids[lane, true].flatten())
    own = model.output(text[lane, true].flatten(0, 2)).float().softmax(-1)
    label = labels.flatten()
    aim = own if student.loss.kind == "distill" else label.clamp(min=0)
    each = torch.nn.functional.cross_entropy(model.output(states).float(), aim, reduction="none")
    weights = student.loss.decay ** torch.arange(size).repeat(len(label) // size) * (label != IGNORED)
    return (each * weights).sum() / weights.sum()


def same_gradients(model: TransformersModel, rows: Any, kind: Literal["distill", "tokens"]) -> None:
    adapter = adapting.adapter(model, 3, 4, 4, 8).float()
    student = Student(model, adapter.requires_grad_(), Loss(kind, 0.8))
    given = batch(rows, 3)
    names, parts = zip(*adapter.named_parameters(), strict=True)
    losses = student(**given)["loss"], at_once(student, **given)
    torch.testing.assert_close(losses[0], losses[1])
    for name, *pair in zip(names, *(torch.autograd.grad(loss, parts) for loss in losses), strict=True):
        assert pair[0].any(), name
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["distill", "tokens"])
@pytest.mark.parametrize("rows_at_once", [24, 512])
def test_losses_and_gradients_are_those_of_all_masks_at_once(
    model: TransformersModel, rows: Any, kind: Any, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the masks and the logits are cut into pieces."""
    monkeypatch.setattr(student_module, "ROWS", (rows_at_once, 0))
    monkeypatch.setattr(student_module, "PIECE", (7, 7))
    same_gradients(model, rows, kind)


def test_the_prefix_is_left_out_in_part_while_it_learns(model: TransformersModel, rows: Any) -> None:
    """Another part in each forward, and none of it when it is measured."""
    adapter = adapting.adapter(model, 3, 4)
    given = batch(rows, 3)

    def losses(dropout: float, learns: bool) -> set[float]:
        student = Student(model, adapter, Loss("tokens", 1.0, dropout)).train(learns)
        return {student(**given)["loss"].item() for _ in range(4)}

    whole = losses(0.0, learns=True)
    assert len(whole) == 1
    assert losses(0.5, learns=False) == whole
    assert len(losses(0.5, learns=True) | whole) == 5


def a_gradient_too_few(patch: pytest.MonkeyPatch) -> None:
    """The gradient of a piece of logits lacks the target."""
    vecdot, sub = torch.linalg.vecdot, Tensor.sub_
    patch.setattr(torch.linalg, "vecdot", vecdot)
    patch.setattr(Tensor, "sub_", lambda self, other: sub(self, other) if other.shape[-1] == 1 else self)


def aims_one_on(patch: pytest.MonkeyPatch) -> None:
    """Masks share the distribution of the place after their own."""
    own = Student._own

    def late(self: Student, *given: Tensor) -> tuple[Tensor, Tensor]:
        shares, index = own(self, *given)
        return shares, (index + 1).clamp(max=len(shares) - 1)

    patch.setattr(Student, "_own", late)


def text_cut_short(patch: pytest.MonkeyPatch) -> None:
    """A piece of groups does not see the row of its last anchor."""
    behind = Tape.behind

    def short(self: Tape, text: Tape, length: int) -> Tape:
        made = behind(self, text, length)
        made.kept = {
            layer: (k, torch.cat([v[:, :, :-1], v[:, :, :1]], 2)) for layer, (k, v) in made.kept.items()
        }
        return made

    patch.setattr(Tape, "behind", short)


@pytest.mark.parametrize("fault", [a_gradient_too_few, aims_one_on, text_cut_short])
def test_wrong_gradients_are_seen(
    model: TransformersModel, rows: Any, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        same_gradients(model, rows, "distill")


def test_batches_are_of_texts_of_about_one_length(rows: Any) -> None:
    """Each use once, in an order that every start draws alike, and with few pads."""
    texts = [{"prompt": [1] * (index % 17), "answer": [1] * (index % 5)} for index in range(50)]
    uses = Draws(texts, 400)

    def order(seed: int) -> list[int]:
        return list(trainer.ByLength(uses, 4, seed))

    assert sorted(order(0)) == list(range(400))
    assert order(0) == order(0) != order(1)

    def pads(order: Sequence[int]) -> int:
        lengths = [len(uses[use]["prompt"]) + len(uses[use]["answer"]) for use in order]
        batches = [lengths[start : start + 4] for start in range(0, 400, 4)]
        return sum(4 * max(batch) - sum(batch) for batch in batches)

    assert pads(order(0)) < pads(range(400)) / 4


@pytest.mark.parametrize("kind", ["distill", "tokens"])
@pytest.mark.parametrize("config", [BITA, SPACE, WHOLE], ids=["bita", "space", "whole"])
def test_it_learns_and_the_model_stays(
    rows: Any, config: AdapterConfig, kind: Literal["distill", "tokens"]
) -> None:
    own = tiny_llama()
    model = TransformersModel(own, "fast")
    before = {name: part.clone() for name, part in own.state_dict().items()}
    student = Student(model, fresh(model, config), Loss(kind))
    assert {id(part) for part in student.parameters()} == {id(part) for part in student.adapter.parameters()}
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = student(**batch(rows, config.masks))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    for name, part in student.adapter.named_parameters():
        assert part.grad is not None, name
        assert part.grad.isfinite().all(), name
        assert part.grad.any(), name
    for name, part in own.state_dict().items():
        assert torch.equal(part, before[name]), name


def test_nothing_is_stored_for_the_frozen_weights(model: TransformersModel, rows: Any) -> None:
    """Neither the text's forward nor the weights carry gradients, wherever those may come from."""
    own = tiny_llama()  # its weights say that they want gradients
    student = Student(TransformersModel(own, "fast"), fresh(model, BITA).float(), Loss())
    text, ahead = student.hidden(torch.tensor([random_prompt(20, 0)]), torch.tensor([[3, 9]]))
    assert not text.requires_grad
    assert ahead.requires_grad


def test_a_fresh_adapter_changes_nothing_yet_where_it_adds(model: TransformersModel) -> None:
    """LoRA and sampler head begin at zero; seeds repeat."""
    one, same, other = (fresh(model, WHOLE, seed) for seed in (0, 0, 1))
    for mine, theirs in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(one.masks, other.masks)
    plain = fresh(model, replace(WHOLE, rank=0, sampler=0))
    plain.load_state_dict({name: one.state_dict()[name] for name in plain.state_dict()})
    given = torch.tensor([random_prompt(20, 0)]), torch.tensor([[3, 9]])
    scores = [Student(model, adapter, Loss()).scores(*given)[0] for adapter in (one, plain)]
    assert torch.equal(*scores)
    assert one.config.targets == WHOLE.targets
    assert fresh(model, SPACE).config.targets == tuple(
        sorted(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    )
    with pytest.raises(AdapterError, match=r"no linear layer wqkv; its linear layers: .*q_proj"):
        fresh(model, AdapterConfig(rank=4, targets=("wqkv",)))


class Pulled(TrainerCallback):
    """The power goes after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


SCHEDULE = Schedule(steps=6, batch=2, length=48, anchors=4, every=2, seed=5)


def trained(
    model: TransformersModel, rows: Any, folder: Path, *stops: int
) -> tuple[dict[str, Tensor], list[Any]]:
    """A run that is interrupted after some steps and started anew; the adapter and the log of the last."""
    collate = Batches(SCHEDULE.length, SCHEDULE.anchors, WHOLE.masks)
    for stop in stops:
        student = Student(model, fresh(model, WHOLE), Loss())
        with pytest.raises(KeyboardInterrupt):
            train(student, SCHEDULE, rows, rows.select([0, 1]), collate, folder, [Pulled(stop)])
    student = Student(model, fresh(model, WHOLE), Loss())
    log = train(student, SCHEDULE, rows, rows.select([0, 1]), collate, folder)
    timed = ("runtime", "per_second")
    held = [{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in log]
    return {name: part.detach().clone() for name, part in student.adapter.named_parameters()}, held


def compare(model: TransformersModel, rows: Any, folder: Path) -> None:
    whole, log = trained(model, rows, folder / "whole")
    parts, resumed = trained(model, rows, folder / "parts", 3, 5)
    for name, part in whole.items():
        assert torch.equal(part, parts[name]), name
    steps = [entry for entry in log if "loss" in entry or "eval_loss" in entry]
    assert len(steps) == 6
    assert [entry for entry in resumed if "loss" in entry or "eval_loss" in entry] == steps
    rates = [entry["learning_rate"] for entry in steps if "loss" in entry]
    assert rates == pytest.approx([SCHEDULE.rate * (1 + math.cos(math.pi * s / 5)) / 2 for s in (0, 2, 4)])
    for entry in steps:
        prefix = "eval_" if "eval_loss" in entry else ""
        assert entry[f"{prefix}tokens_per_forward"] >= 1
        assert 0 <= entry[f"{prefix}right_3"] <= 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_resumed_run_is_a_run_in_one_go(model: TransformersModel, rows: Any, tmp_path: Path) -> None:
    compare(model, rows, tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_dice_with_a_state_of_their_own_are_seen(
    model: TransformersModel, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "_dice", lambda draw: torch.default_generator)
    with pytest.raises(AssertionError):
        compare(model, rows, tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_constant_rate_is_seen(
    model: TransformersModel, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = trainer.arguments

    def constant(*given: Any, **more: Any) -> Any:
        return arguments(*given, **{**more, "lr_scheduler_type": "constant"})

    monkeypatch.setattr(trainer, "arguments", constant)
    with pytest.raises(AssertionError):
        compare(model, rows, tmp_path)


def test_linear_layers_have_a_rate_of_their_own(model: TransformersModel) -> None:
    student = Student(model, fresh(model, WHOLE), Loss())
    optimizer = trainer._optimizer(student, Schedule(rate=0.1, lora_rate=0.001))
    rates = {id(part): group["lr"] for group in optimizer.param_groups for part in group["params"]}
    for name, part in student.adapter.named_parameters():
        assert rates.pop(id(part)) == (0.001 if name.startswith(("lora", "sampler")) else 0.1), name
    assert not rates
    alone = trainer._optimizer(Student(model, fresh(model, BITA), Loss()), Schedule())
    assert len(alone.param_groups) == 1


def test_accuracies() -> None:
    hits = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, IGNORED], [IGNORED] * 3])
    found = accuracies(hits.numpy())
    assert found == {"right_1": 0.75, "right_2": 0.75, "right_3": 0.6667, "tokens_per_forward": 2.25}
    assert accuracies(hits[4:].numpy())["tokens_per_forward"] == 1.0


class Told:
    """A student whose masks say given distributions."""

    def __init__(self, shares: Sequence[Sequence[dict[int, float]]]) -> None:
        self.adapter = type(
            "Adapter", (), {"config": AdapterConfig(masks=len(shares[0])), "vocabulary": None}
        )()
        self.given = torch.full((len(shares), len(shares[0]), 20), 1e-9)
        for group, masks in zip(self.given, shares, strict=True):
            for row, known in zip(group, masks, strict=True):
                for token, share in known.items():
                    row[token] = share

    def as_decoded(self, ids: Tensor, anchors: Tensor) -> Tensor:
        return self.given.log().flatten(0, 1)


def test_calibration_counts_what_a_walk_comes_to() -> None:
    """Four anchors of two masks. The first guess tells the first token, twice, then the second, then none."""
    first, second = {1: 0.55, 2: 0.35, 3: 0.065, 6: 0.035}, {4: 0.75, 5: 0.23, 7: 0.02}
    student = Told([[first, second]] * 5)
    labels = [[1, 4], [1, IGNORED], [2, 5], [9, 4], [IGNORED, IGNORED]]
    given = {"ids": torch.zeros(1, 1), "anchors": torch.zeros(1, 5), "labels": torch.tensor([labels])}
    found = calibrate(cast(Student, student), [given])
    assert found.accuracy[0][:3] == [0.5, 0.25, 0]  # of four
    assert found.accuracy[1][:2] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]  # of three
    middles, least = mask_tree.hazard_middles(), calibration.PRIOR_WEIGHT

    def odds(offset: int, hazard: float, won: int, made: int) -> None:
        kind = sum(bound <= hazard for bound in mask_tree.HAZARDS)
        expected = (won + least * mask_tree.TRUST * middles[kind]) / (made + least)
        assert found.odds[mask_tree.ODDS][offset][kind] == pytest.approx(expected), (offset, hazard)

    odds(0, 0.55, 2, 4)
    odds(0, 0.35 / 0.45, 1, 2)  # the second guess, where the first was wrong
    odds(0, 0.065 / 0.1, 0, 1)
    odds(1, 0.75, 1, 1)  # not where the likeliest guess was not the first token
    odds(1, 0.23 / 0.25, 0, 0)
    odds(1, 0.25, 0, 0)
    onward = [
        (3 + mask_tree.FIRST_ONWARD * least) / (4 + least),
        (1 + mask_tree.FIRST_ONWARD * least) / (2 + least),
    ]
    assert found.odds[mask_tree.ONWARD][0] == pytest.approx(onward)


# Going on from an adapter of weights that were trained further


def test_an_adapter_is_taken_up_for_the_next_weights(model: TransformersModel, tmp_path: Path) -> None:
    before = fresh(model, WHOLE, seed=3)
    adapter_folder.save(tmp_path, before, model, "space", "tiny", {})
    weights = tiny_llama(torch.float64).requires_grad_(False)
    weights.model.layers[0].mlp.up_proj.weight *= 1.01
    later = TransformersModel(weights, "fast")
    begun = started(str(tmp_path), later, replace(WHOLE, masks=1, rank=2))  # its own shape stays
    assert begun is not None
    assert begun.config.masks == WHOLE.masks
    kept = dict(begun.named_parameters())
    for name, part in before.named_parameters():
        assert torch.equal(kept[name], part.bfloat16().float()), name
        assert kept[name].requires_grad
    unlike = dict(fresh(later, WHOLE, seed=4).named_parameters())
    assert any(not torch.equal(kept[name], part.bfloat16().float()) for name, part in unlike.items())
    Student(later, begun, Loss()).scores(torch.arange(12)[None], torch.tensor([[3, 5]]))


@pytest.mark.parametrize("other", [BITA, SPACE, replace(WHOLE, gated=False, prefix=0)])
def test_an_adapter_of_another_kind_is_not_taken_up(
    model: TransformersModel, other: AdapterConfig, tmp_path: Path
) -> None:
    adapter_folder.save(tmp_path, fresh(model, other), model, "space", "tiny", {})
    with pytest.raises(AdapterError, match="of another kind"):
        started(str(tmp_path), model, WHOLE)
    assert started(None, model, WHOLE) is None
