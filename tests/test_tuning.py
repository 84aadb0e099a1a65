"""Training tuned models: rows of a packed tree say what the same tokens say alone, the losses by hand,
gradients where they belong, resumed == whole. Each planted fault is seen."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import datasets
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from selfdraft import LLM, SamplingParams, Tree
from selfdraft._common.machine import module_sha256
from selfdraft.drafting.jacobi import Jacobi
from selfdraft.drafting.method import Lookahead, free
from selfdraft.drafting.plain import Plain
from selfdraft.drafting.space import SpaceTuned
from selfdraft.errors import AdapterError, InvalidOption, TrainingDataError
from selfdraft.models.adapters import folder as adapter_folder
from selfdraft.models.adapters.adapter import AdapterConfig, LowRank
from selfdraft.models.transformers import TransformersModel
from selfdraft.train import filler, packed, shards, tuned, tuning_cost
from selfdraft.train import run as run_
from selfdraft.train.filler import choose_filler
from selfdraft.train.packed import Masked, NoiseConfig, Noisy
from selfdraft.train.sequences import Batches, Draws
from selfdraft.train.student import IGNORED, fresh
from selfdraft.train.trainer import Schedule, train
from selfdraft.train.trajectories import watch
from selfdraft.train.tuned import NO_ROW, TunedLoss, TunedStudent, deviates, trees
from selfdraft.train.tuning import TunedPlan, tune

from adapting import LAYERS, defined
from conftest import VOCABULARY, Run, tiny_llama
from runs import greedy, random_prompt, run

LORA = AdapterConfig(masks=0, rank=4, targets=LAYERS, gated=False)
MASKS = AdapterConfig(masks=3, rank=4, targets=LAYERS, sampler=8, gated=False)
FULL = AdapterConfig(masks=0, gated=False)
BLOCK = 5
CUT = Batches(64, 4, 3)
EOS = frozenset([1])


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    return TransformersModel(tiny_llama(torch.float64).requires_grad_(False), "fast")


@pytest.fixture(scope="module")
def rows(model: TransformersModel) -> datasets.Dataset:
    """Prompts, and how the model itself comes to its answers."""
    prompts = [random_prompt(8, seed) for seed in range(8)]
    found = watch(model, prompts, BLOCK, greedy(23))
    made = [{"prompt": prompt, **one, "temperature": 0.0} for prompt, one in zip(prompts, found, strict=True)]
    return datasets.Dataset.from_list(made)


def student(
    model: TransformersModel, config: AdapterConfig, loss: TunedLoss, full: bool = False
) -> TunedStudent:
    """One whose LoRA is at work already."""
    adapter = fresh(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for low in adapter.lora:
            cast(LowRank, low).b.normal_(0, 0.3)
        if adapter.sampler is not None:
            adapter.sampler.outer.normal_(0, 0.3)
    return TunedStudent(model, adapter.to(model.dtype), loss, full)


def paths(batch: dict[str, Tensor]) -> Iterator[tuple[int, int, int, list[int]]]:
    """Of each hung row that has an aim: lane, row, aim, and the tokens from the text's start to it."""
    for lane, tree in enumerate(trees(batch["tokens"], batch["parents"])):
        pairs = zip(
            batch["hung"][lane].flatten().tolist(), batch["aims"][lane].flatten().tolist(), strict=True
        )
        for row, aim in pairs:
            if aim == NO_ROW:
                continue
            above, at = [], row
            while at >= 0:
                above.append(tree.tokens[at])
                at = tree.parents[at]
            yield lane, row, aim, above[::-1]


NOISES = [
    NoiseConfig(window=1, noise="random", copies=1),
    NoiseConfig(window=3, noise="progressive"),
    NoiseConfig(window=2, noise="reverse"),
    NoiseConfig(window=1, noise="random", consistency="local"),
]


def drawn(rows: datasets.Dataset, *uses: int) -> list[dict[str, Any]]:
    every = Draws(rows, max(uses) + 1)
    return [every[use] for use in uses]


def same_as_alone(model: TransformersModel, rows: datasets.Dataset, noise: NoiseConfig) -> None:
    """Each noisy row's logits are those of transformers' own forward over the text before it and its noise,
    LoRA merged; and of the text's rows as well."""
    learner = student(model, LORA, TunedLoss())
    merged = model.adapted(learner.adapter)
    batch = Noisy(CUT, BLOCK, noise, EOS, True)(drawn(rows, 0, 1, 11))
    with torch.no_grad():
        logits = learner.model.output(learner.hidden(batch["tokens"], batch["parents"]))
    seen = 0
    for lane, row, aim, tokens in paths(batch):
        torch.testing.assert_close(logits[lane, row], merged.reference(tokens)[-1])
        if noise.consistency == "global":
            text = batch["tokens"][lane, : aim + 1].tolist()
            assert len(text) == len(tokens), "row and aim stand at one position"
            torch.testing.assert_close(logits[lane, aim], merged.reference(text)[-1])
        seen += 1
    assert seen > 3 * 15


@pytest.mark.parametrize("noise", NOISES, ids=str)
def test_noisy_rows_say_what_they_say_alone(
    model: TransformersModel, rows: datasets.Dataset, noise: NoiseConfig
) -> None:
    same_as_alone(model, rows, noise)


def test_mask_rows_say_what_they_say_when_decoding(model: TransformersModel, rows: datasets.Dataset) -> None:
    learner = student(model, MASKS, TunedLoss())
    ids = range(VOCABULARY, VOCABULARY + 3)
    batch = Masked(CUT, ids, True)(drawn(rows, 0, 1))
    with torch.no_grad():
        hidden = learner.hidden(batch["tokens"], batch["parents"])
    merged, rest = model.adapted(learner.adapter).base, learner.adapter.drafting()
    for lane in range(2):
        for hung, aims in zip(batch["hung"][lane], batch["aims"][lane], strict=True):
            if (aims == NO_ROW).any():
                continue
            text = batch["tokens"][lane, : int(aims[0])].tolist()
            told = batch["tokens"][lane, aims]
            with torch.no_grad():
                got = learner.model.output(learner.model.apply_sampler_head(hidden[lane, hung], told))
            with merged.attending(merged.own_attention):  # by the definition that gated ones are held to
                expected = defined(copy.deepcopy(merged.model), rest, text, told.tolist())
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # the sampler head has float32


def by_hand(model: TransformersModel, rows: datasets.Dataset, loss: TunedLoss, noise: NoiseConfig) -> None:
    """The loss from transformers' own forwards, row by row."""
    learner = student(model, LORA, loss).eval()
    merged = model.adapted(learner.adapter)
    batch = Noisy(CUT, BLOCK, noise, EOS, loss.keep == "base")(drawn(rows, 2, 5))
    draft, weights, weighed = 0.0, 0.0, 0
    counted = deviates(batch["tokens"], batch["parents"], batch["hung"], batch["aims"])
    first: dict[tuple[int, int], int] = {}
    for lane, row, aim, tokens in paths(batch):
        group, place = next(
            (g, s)
            for g, s in (batch["hung"][lane] == row).nonzero().tolist()
            if batch["aims"][lane, g, s] == aim
        )
        to = trees(batch["tokens"], batch["parents"])[lane]
        right, at = [], aim
        while at >= 0:
            right.append(to.tokens[at])
            at = to.parents[at]
        assert bool(counted[lane, row]) == (right[::-1] != tokens)
        if right[::-1] == tokens:
            continue
        start = first.setdefault((lane, group), place)
        scores = merged.reference(tokens)[-1].float()
        if loss.draft == "distill":
            target = merged.reference(right[::-1])[-1].float().softmax(-1)
            each = -(target * scores.log_softmax(-1)).sum()
        else:
            label = int(batch["labels"][lane, aim])
            each = -scores.log_softmax(-1)[label] if label != IGNORED else torch.tensor(0.0)
        draft += loss.decay ** (place - start) * float(each)
        weights += loss.decay ** (place - start)
        weighed += 1
    kept = []
    for lane, labels in enumerate(batch["labels"]):
        count = int((labels != IGNORED).nonzero()[-1]) + 1
        text = batch["tokens"][lane, :count].tolist()
        own, new = model.reference(text).float(), merged.reference(text).float().log_softmax(-1)
        for at in (labels != IGNORED).nonzero().flatten().tolist():
            known = own[at].log_softmax(-1)
            divergence = (known.exp() * (known - new[at])).sum()
            told = -(1 - loss.smoothing) * new[at, labels[at]] - loss.smoothing * new[at].mean()
            kept.append(float(divergence if loss.keep == "base" else told))
    out = learner(**batch)
    expected = draft / weights + loss.weight * sum(kept) / len(kept)
    if loss.joint:
        expected = (draft + loss.weight * sum(kept)) / (weights + len(kept))
    assert float(out["loss"].detach()) == pytest.approx(expected, rel=1e-4)
    hits = out["hits"][out["hits"] != IGNORED]
    assert len(hits) == weighed


LOSSES = [
    (TunedLoss(), NOISES[1]),
    (TunedLoss(keep="tokens", weight=3.0), NOISES[0]),
    (TunedLoss(draft="tokens", decay=0.7), NOISES[2]),
    (TunedLoss(decay=0.5), NOISES[3]),
    (TunedLoss(draft="tokens", keep="tokens", weight=1.0, joint=True), NOISES[0]),
    (TunedLoss(keep="tokens", smoothing=0.1), NOISES[0]),
]


@pytest.mark.parametrize(("loss", "noise"), LOSSES, ids=str)
def test_the_loss_is_as_defined(
    model: TransformersModel, rows: datasets.Dataset, loss: TunedLoss, noise: NoiseConfig
) -> None:
    by_hand(model, rows, loss, noise)


def sees_the_text(patch: pytest.MonkeyPatch) -> None:
    """Noisy blocks hang under the last row of the text."""
    hang = packed.Packing.hang

    def wrong(self: packed.Packing, row: int, tokens: Sequence[int]) -> range:
        return hang(self, len(self.text) - 1 if row < len(self.text) else row, tokens)

    patch.setattr(packed.Packing, "hang", wrong)


def one_row_late(patch: pytest.MonkeyPatch) -> None:
    """A noisy row is to agree with the row after its own."""
    call = Noisy.__call__

    def wrong(self: Noisy, rows: Any) -> dict[str, Tensor]:
        got = call(self, rows)
        return {**got, "aims": torch.where(got["aims"] == NO_ROW, NO_ROW, (got["aims"] - 1).clamp(min=0))}

    patch.setattr(Noisy, "__call__", wrong)


@pytest.mark.parametrize("fault", [sees_the_text, one_row_late])
def test_wrong_trees_are_seen(
    fault: Callable[[pytest.MonkeyPatch], None],
    model: TransformersModel,
    rows: datasets.Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        same_as_alone(model, rows, NOISES[0])


def all_count(patch: pytest.MonkeyPatch) -> None:
    """Rows before the first wrong token count, too."""
    patch.setattr(tuned, "deviates", lambda tokens, *_: torch.ones_like(tokens, dtype=torch.bool))


def own_wrong_only(patch: pytest.MonkeyPatch) -> None:
    """Only rows that carry a wrong token count, not those below them."""

    def wrong(tokens: Tensor, parents: Tensor, hung: Tensor, aims: Tensor) -> Tensor:
        there = (hung != NO_ROW) & (aims != NO_ROW)
        lane = torch.arange(len(tokens))[:, None, None].expand(hung.shape)[there]
        found = torch.zeros_like(tokens, dtype=torch.bool)
        found[lane, hung[there]] = tokens[lane, hung[there]] != tokens[lane, aims[there]]
        return found

    patch.setattr(tuned, "deviates", wrong)


def of_the_learner(patch: pytest.MonkeyPatch) -> None:
    """What is kept is compared with the student itself."""
    patch.setattr(TunedStudent, "base", TunedStudent.model)


@pytest.mark.parametrize("fault", [all_count, own_wrong_only, of_the_learner])
def test_wrong_losses_are_seen(
    fault: Callable[[pytest.MonkeyPatch], None],
    model: TransformersModel,
    rows: datasets.Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        by_hand(model, rows, *LOSSES[0])


def test_a_fresh_student_is_its_base(model: TransformersModel, rows: datasets.Dataset) -> None:
    learner = TunedStudent(model, fresh(model, LORA), TunedLoss())
    out = learner(**Noisy(CUT, BLOCK, NOISES[0], EOS, True)(drawn(rows, 0, 1)))
    assert out["kept"].abs().max() < 1e-5
    assert {name for name, part in learner.named_parameters() if part.requires_grad} == {
        f"adapter.{name}" for name, _ in learner.adapter.named_parameters()
    }
    out["loss"].backward()
    assert all(cast(LowRank, low).b.grad is not None for low in learner.adapter.lora)
    assert not any(weight.requires_grad for weight in model.model.parameters())


def gradients(
    model: TransformersModel, rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Of the draft loss: at the last hidden states of branch rows with a loss, and at those of the text."""
    learner = student(model, LORA, TunedLoss(weight=0.0))
    batch = Noisy(CUT, BLOCK, NOISES[0], EOS, True)(drawn(rows, 0, 1))
    hidden, kept = TunedStudent.hidden, list[Tensor]()

    def noted(self: TunedStudent, *given: Tensor) -> Tensor:
        kept.append(hidden(self, *given))
        kept[0].retain_grad()
        return kept[0]

    monkeypatch.setattr(TunedStudent, "hidden", noted)
    learner(**batch)["loss"].backward()
    given = (batch[name] for name in ("tokens", "parents", "hung", "aims"))
    grad = kept[0].grad
    assert grad is not None
    branches = torch.zeros(grad.shape[:2], dtype=torch.bool)
    for lane, hung in enumerate(batch["hung"]):
        branches[lane, hung[hung != NO_ROW]] = True
    return grad[deviates(*given) & branches], grad[~branches]


def test_the_target_of_a_draft_has_no_gradient(
    model: TransformersModel, rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop-gradient of the consistency loss, which the loss itself does not show."""
    branches, text = gradients(model, rows, monkeypatch)
    assert branches.any()
    assert not text.any()


class Graded:
    """torch, but nothing is without a gradient."""

    no_grad = nullcontext

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def test_a_target_with_a_gradient_is_seen(
    model: TransformersModel, rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "torch", Graded())
    assert gradients(model, rows, monkeypatch)[1].any()


def test_a_pass_is_a_jacobi_iteration(model: TransformersModel, rows: datasets.Dataset) -> None:
    """On policy: each noisy token becomes the pick after the tokens before it."""
    learner = student(model, LORA, TunedLoss(refresh=1.0))
    merged = model.adapted(learner.adapter)
    batch = Noisy(CUT, BLOCK, NOISES[0], EOS, True)(drawn(rows, 0, 3))
    after = learner.passed(*(batch[name] for name in ("tokens", "parents", "hung", "aims")))
    changed = right = 0
    for lane, row, aim, tokens in paths(batch):
        pick = int(merged.reference(tokens[:-1])[-1].argmax())
        if tokens[:-1] == batch["tokens"][lane, :aim].tolist():  # it would be known by then
            pick = int(batch["tokens"][lane, aim])
            right += 1
        assert int(after[lane, row]) == pick
        changed += int(batch["tokens"][lane, row]) != pick
    assert changed
    assert right
    text = batch["hung"][0][batch["hung"][0] != NO_ROW].min()
    assert torch.equal(after[0, :text], batch["tokens"][0, :text])
    still = replace(learner.loss, refresh=0.0)
    asked = {**batch, "tokens": after}
    with torch.no_grad():
        passed = learner.train()(**batch)["loss"]
        expected = TunedStudent(model, learner.adapter, still)(**asked)["loss"]
        assert float(passed) == pytest.approx(float(expected))
        assert float(learner.eval()(**batch)["loss"]) != pytest.approx(float(passed))


def test_draws_are_anew_and_repeatable(rows: datasets.Dataset) -> None:
    for collate in (Noisy(CUT, BLOCK, NOISES[1], EOS, True), Masked(CUT, range(320, 323), True)):

        def kept(use: int, made: Any = collate) -> str:
            got = made(drawn(rows, use))
            return str([got["tokens"].tolist(), got["parents"].tolist()])

        uses = [use * len(rows) for use in range(4)]  # of one row
        anew = [kept(use) for use in uses]
        assert len(set(anew)) == 4
        assert [kept(use) for use in uses] == anew


def test_noise_rises_over_the_window() -> None:
    aim = list(range(50, 60))
    line = [[*aim[: 10 - wrong], *[7] * wrong] for wrong in range(10, 0, -1)]
    row = {"prompt": [2, 3], "answer": aim * 4, "states": [line] * 4}

    def wrong(noise: NoiseConfig, draw: int) -> list[int]:
        got = Noisy(CUT, 10, noise, EOS, True)([{**row, "draw": draw}])
        tokens = got["tokens"][0]
        return [sum(int(tokens[r]) == 7 for r in group.tolist()) for group in got["hung"][0]]

    found = [wrong(NoiseConfig(5, "progressive", copies=1), draw) for draw in range(20)]
    assert any(one == [2, 4, 6, 8] for one in found)
    assert all(b - a == 2 or b == 2 for one in found for a, b in pairwise(one))
    back = [wrong(NoiseConfig(5, "reverse", copies=1), draw) for draw in range(20)]
    assert any(one == [10, 8, 6, 4] for one in back)
    random_ones = {w for draw in range(20) for w in wrong(NoiseConfig(5, "random", copies=1), draw)}
    assert len(random_ones) > 6
    with pytest.raises(InvalidOption, match="local consistency has no window"):
        NoiseConfig(window=2, consistency="local")


def test_nothing_behind_the_end_counts(model: TransformersModel) -> None:
    """Where the text has ended, there is nothing to agree with."""
    row = {"prompt": [2, 3], "answer": [9, 8, 1], "states": [[[4, 4, 4], [9, 4, 4]]], "draw": 0}
    got = Noisy(CUT, BLOCK, NOISES[0], EOS, True)([row])
    assert got["aims"][0, 0].tolist()[:3] == [2, 3, NO_ROW]
    assert got["labels"][0, :5].tolist() == [3, 9, 8, 1, IGNORED]


class Pulled(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


SCHEDULE = Schedule(steps=4, batch=2, length=48, every=2, lora_rate=1e-3, seed=5)


@pytest.mark.parametrize("config", [LORA, MASKS, FULL], ids=["lora", "masks", "full"])
def test_a_resumed_run_is_a_run_in_one_go(
    model: TransformersModel, rows: datasets.Dataset, config: AdapterConfig, tmp_path: Path
) -> None:
    loss = TunedLoss(refresh=0.0 if config.masks else 0.5)
    collate: Any = Noisy(CUT, BLOCK, NOISES[1], EOS, True)
    if config.masks:
        collate = Masked(CUT, range(VOCABULARY, VOCABULARY + 3), True)

    def trained(folder: Path, *stops: int) -> dict[str, Tensor]:
        few = rows.select([0, 1])
        for stop in stops:
            learner = TunedStudent(model, fresh(model, config), loss, config is FULL)
            with pytest.raises(KeyboardInterrupt):
                train(learner, SCHEDULE, rows, few, collate, folder, [Pulled(stop)])
        learner = TunedStudent(model, fresh(model, config), loss, config is FULL)
        before = {name: part.detach().clone() for name, part in learner.named_parameters()}
        log = train(learner, SCHEDULE, rows, few, collate, folder)
        assert [entry["eval_kept"] >= 0 for entry in log if "eval_loss" in entry] == [True, True]
        after = {name: part.detach().clone() for name, part in learner.named_parameters()}
        assert any(not torch.equal(part, before[name]) for name, part in after.items()) or stops
        return after

    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts", 3)
    for name, part in whole.items():
        assert torch.equal(part, parts[name]), name


def test_a_torn_checkpoint_is_passed_over(
    model: TransformersModel, rows: datasets.Dataset, tmp_path: Path
) -> None:
    collate = Noisy(CUT, BLOCK, NOISES[0], EOS, True)
    train(
        TunedStudent(model, fresh(model, LORA), TunedLoss()),
        SCHEDULE,
        rows,
        rows.select([0]),
        collate,
        tmp_path,
    )
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    again = TunedStudent(model, fresh(model, LORA), TunedLoss())
    train(again, SCHEDULE, rows, rows.select([0]), collate, tmp_path)
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()


def test_the_tuning_cost_by_hand(model: TransformersModel) -> None:
    learner = student(model, LORA, TunedLoss())
    tuned_model = model.adapted(learner.adapter)
    prompts = [random_prompt(9, seed) for seed in range(3)]
    got = tuning_cost.measure(model, tuned_model, prompts, greedy(20))
    assert got.tokens == 3 * 8
    for i, one in enumerate((model, tuned_model)):
        losses = [
            -float(one.reference(prompt)[at].log_softmax(-1)[prompt[at + 1]])
            for prompt in prompts
            for at in range(8)
        ]
        assert got.loss[i] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    same = tuning_cost.measure(model, model, prompts, greedy(20))
    assert (same.agreement, same.loss[0], same.repeated[0]) == (1.0, same.loss[1], same.repeated[1])
    assert got.agreement < 1


# The command line, from prompts to a tuned model that answers.


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trajectories of the saved model."""
    from selfdraft.train.distill import Recipe, asked
    from selfdraft.train.prompts import Prompts
    from selfdraft.train.trajectories import Recorded, Recording

    home = tmp_path_factory.mktemp("data")
    file = home / "prompts.jsonl"
    dice = random.Random(0)
    texts = ["".join(dice.choices("abcdefgh (),:", k=12)) for _ in range(8)]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    prompts = Prompts([str(file)])
    llm = LLM(str(folder), Recorded(4), numerics="fast")
    recipe = Recipe(16)
    kept = shards.Shards(home / "paths", {**asked(llm, prompts, recipe), "block": 4, "augment": False}, 100)
    Recording(llm, prompts, recipe, kept).run()
    kept.close()
    return home / "paths"


SMALL = ("--steps", "2", "--batch", "2", "--every", "1", "--length", "48")
pytestmark = pytest.mark.usefixtures("short_answers")


def test_answers_by_somebody_else_are_learned_instead_of_the_text(
    model: TransformersModel, rows: datasets.Dataset
) -> None:
    """The loss of keep is that of the plain text of prompt and foreign answer; noisy rows learn as before."""
    answer = [7, 9, 11, 13, 1]
    given = [{**row, "label": answer} for row in drawn(rows, 0, 1)]
    collate = Noisy(CUT, BLOCK, NOISES[0], EOS, False)
    learner = student(model, LORA, TunedLoss(keep="tokens", weight=0.0))
    found, own = learner(**collate(given)), learner(**collate(drawn(rows, 0, 1)))
    torch.testing.assert_close(found["loss"], own["loss"])  # of the noisy rows alone
    merged = model.adapted(learner.adapter)
    for row, kept in zip(given, found["kept"], strict=True):
        logits = merged.reference([*row["prompt"], *answer])[len(row["prompt"]) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        torch.testing.assert_close(kept, expected, check_dtype=False)
    assert not torch.allclose(found["kept"], own["kept"])


def test_labels_of_a_file_are_those_of_its_prompts(
    folder: Path, data: Path, command: Run, tmp_path: Path
) -> None:
    file = data.parent / "prompts.jsonl"
    prompts = [json.loads(line) for line in file.read_text().splitlines()]
    labelled = tmp_path / "labelled.jsonl"

    def written(rows: list[dict[str, str]]) -> None:
        labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(out: str, *more: str) -> tuple[int, str, str]:
        words = (
            "--model",
            str(folder),
            "--data",
            str(data),
            "--out",
            str(tmp_path / out),
            *SMALL,
            "--rank",
            "4",
        )
        return command("train", "cllm", *words, "--labels", str(labelled), *more)

    written([{**row, "answer": f"def {i}("} for i, row in enumerate(prompts)])
    code, _, err = train("first", "--keep", "tokens")
    assert code == 0, err
    asked = json.loads((tmp_path / "first" / "run.json").read_text())["asked"]
    assert len(asked["labels"]) == 64
    code, _, err = train("second")
    assert code == 2
    assert "keep=tokens" in err
    for rows, says in (
        ([{**row, "answer": "a"} for row in prompts[::-1]], "other prompts than"),
        (prompts, "no row of"),
    ):
        written(rows)
        code, _, err = train("third", "--keep", "tokens")
        assert code == 2
        assert says in err


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("method", ["cllm", "space-tuned"])
def test_from_answers_to_a_tuned_model(
    method: str, full: bool, folder: Path, data: Path, command: Run, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    more = ["--full"] if full else ["--rank", "4"]
    more += ["--masks", "2", "--sampler-head", "8", "--anchors", "4"] if method == "space-tuned" else []
    words = ("train", method, "--data", str(data), "--out", str(out), "--model", str(folder), *SMALL, *more)
    code, said, err = command(*words, "--json")
    assert code == 0, err
    about = json.loads(said.splitlines()[-1])
    assert about["tuning_cost"]["tokens"] > 0
    assert ("convergence" in about) == (method == "cllm")
    card = (out / "README.md").read_text()
    assert "lossless to the **tuned** weights" in card
    assert f"{about['tuning_cost']['loss'][1]:.4f}" in card
    drafts = "jacobi" if method == "cllm" else "space-tuned"
    model = str(out / "model") if full else str(folder)
    adapter = None if full and method == "cllm" else str(out)
    loaded = LLM(model, drafts, adapter=adapter)
    assert loaded.generate("def add(", max_new_tokens=6).grade == "tuned"
    assert loaded.model.lookahead is not None
    if method == "cllm":
        assert loaded.model.lookahead.filler == 0, "the token that begins texts"
        assert len(loaded.model.lookahead.odds["ahead"][0]) == 7
        kept = shards.manifest(data)["asked"]["eos"]
        prompts = [row["prompt"] for row in shards.read(data).rows.select([0])]
        params = SamplingParams(max_new_tokens=4, eos=tuple(kept))
        assert tuning_cost.measure(loaded.model, loaded.model, prompts, params).agreement == 1
    plain = loaded.using("plain").generate("def add(", max_new_tokens=6)
    assert plain.ids == loaded.generate("def add(", max_new_tokens=6).ids
    again = json.loads(command(*words, "--json")[1].splitlines()[-1])
    assert again["tuning_cost"] == about["tuning_cost"], "a finished run is not trained again"


def test_on_policy_goes_on_from_an_adapter(folder: Path, data: Path, command: Run, tmp_path: Path) -> None:
    first, second, own = tmp_path / "first", tmp_path / "second", tmp_path / "own"
    words = ("--model", str(folder), *SMALL, "--rank", "4")
    assert command("train", "cllm", "--data", str(data), "--out", str(first), *words, "--rate", "0.1")[0] == 0
    prompts = data.parent / "prompts.jsonl"
    recorded = ("--prompts", str(prompts), "--model", str(folder), "--adapter", str(first), "--block", "4")
    assert command("trajectories", *recorded, "--out", str(own), "-n", "12")[0] == 0
    fails = command("train", "cllm", "--data", str(own), "--out", str(second), *words)
    assert fails[0] == 2
    assert "distill from the model itself" in fails[2]
    code, _, err = command(
        "train", "cllm", "--data", str(own), "--out", str(second), *words, "--start", str(first)
    )
    assert code == 0, err
    assert LLM(str(folder), "jacobi", adapter=str(second)).model.grade == "tuned"
    start = adapter_folder.load(str(first), LLM(str(folder)).model).float()
    digest = module_sha256(repr(start.config), start)
    assert f"an earlier adapter (digest {digest[:12]})" in (second / "README.md").read_text()
    assert "earlier adapter" not in (first / "README.md").read_text()


def test_full_weights_are_measured_as_they_are_loaded(data: Path, folder: Path, tmp_path: Path) -> None:
    """In bfloat16: rotations keep their precision."""
    plan = TunedPlan(
        "cllm",
        str(folder),
        data,
        tmp_path / "mine",
        FULL,
        schedule=Schedule(steps=2, batch=2, length=48, every=1, lora_rate=1e-3),
        noise=NoiseConfig(),
        full=True,
    )
    about = tune(plan)
    loaded = LLM(str(tmp_path / "mine" / "model"), numerics="fast").model
    base = LLM(str(folder), numerics="fast").model
    prompts = [row["prompt"] for row in run_.split(shards.read(data).rows, data)[1]]
    again = tuning_cost.measure(base, loaded, prompts, SamplingParams(max_new_tokens=8, eos=(1,)))
    assert again.loss[1] == pytest.approx(about["tuning_cost"]["loss"][1], rel=1e-6)
    assert again.loss[1] != again.loss[0]


def test_an_adapter_of_another_kind_is_no_start(folder: Path, data: Path, tmp_path: Path) -> None:
    base = LLM(str(folder)).model
    for name, config in (("gated", replace(MASKS, gated=True)), ("masks", MASKS)):
        adapter_folder.save(tmp_path / name, fresh(base, config), base, "space", str(folder), {})
        plan = TunedPlan("cllm", str(folder), data, tmp_path / "out", LORA, start=str(tmp_path / name))
        with pytest.raises(AdapterError, match="an adapter of another kind \\(masks, LoRA"):
            tune(replace(plan, noise=NoiseConfig()))


def test_bad_data_is_named(folder: Path, data: Path, command: Run, tmp_path: Path) -> None:
    words = ("--model", str(folder), "--out", str(tmp_path / "out"), *SMALL)
    for more, message in (
        (("--window", "2", "--consistency", "local"), "local consistency has no window"),
        (("--noise", "loud"), "noise"),
        (("--data-share", "0"), "--data-share must be above 0"),
        (("--keep", "all"), "keep"),
        (("--full", "--rank", "4"), "go with LoRA"),
        (("--unknown", "noise"), "--unknown takes filler or random"),
    ):
        code, _, err = command("train", "cllm", "--data", str(data), *words, *more)
        assert (code, message in err) == (2, True), err
    code, _, err = command("train", "cllm", "--data", str(data), *words, "--full", "--start", str(tmp_path))
    assert code == 2
    assert "goes with LoRA" in err
    held = json.loads((data / shards.MANIFEST).read_text())
    plain = tmp_path / "plain"
    plain.mkdir()
    for name, change, message in (
        ("answers", {"block": None}, "holds answers without trajectories"),
        ("wide", {"block": 64}, "raise it|the file is damaged"),
        ("other", {"fingerprint": "0" * 64}, "distill from the model itself"),
        ("vocabulary", {"vocabulary": 400}, "a vocabulary of 400"),
        ("tokenizer", {"tokenizer": "0" * 64}, "ids of another tokenizer"),
        ("ends", {"eos": None}, "does not say which model answered"),
    ):
        other = tmp_path / name
        other.mkdir()
        asked = {key: value for key, value in {**held["asked"], **change}.items() if value is not None}
        (other / shards.MANIFEST).write_text(json.dumps({**held, "asked": asked}))
        for shard in shards.shards(data):
            (other / shard.name).write_bytes(shard.read_bytes())
        code, _, err = command("train", "cllm", "--data", str(other), *words)
        assert code == 2
        assert any(part in err for part in message.split("|")), err
    assert run(TransformersModel(tiny_llama(), "fast"), Plain(), [5], greedy(2)).emitted
    with pytest.raises(TrainingDataError):
        shards.read(plain)


TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|eos|>{% endfor %}<|start|>"


def test_the_filler_stands_inside_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """As in SmolLM2's template: the token that begins a text begins each message, too."""
    mine = copy.deepcopy(tokenizer)
    mine.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|tool|>", "<|spare|>"]})
    start, tool, spare = range(len(tokenizer), len(tokenizer) + 3)
    text = {"prompt": [0, 5, 6], "answer": [7, 8]}
    ends, size = {1}, len(mine)
    assert choose_filler(mine, size, ends, [text]) == 0, "it may begin texts"
    assert choose_filler(mine, size, ends, [{**text, "prompt": [5, 0]}]) == start
    mine.bos_token = "<|start|>"
    mine.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<"}]
    said = set(mine.encode(mine.apply_chat_template(turns, tokenize=False), add_special_tokens=False))
    assert start in said
    assert choose_filler(mine, size, ends, [{**text, "prompt": [5, 0]}]) == tool
    mine.chat_template = TEMPLATE + "{% if tools %}<|tool|>{{ tools }}{% endif %}"
    assert choose_filler(mine, size, ends, [{**text, "prompt": [5, 0]}]) == spare
    assert choose_filler(mine, size, ends, [text], kept=spare) == spare
    assert choose_filler(mine, size, ends, [text], kept=start) == 0, "a start that was badly chosen"
    mine.chat_template += "<|bos|>"
    with pytest.raises(InvalidOption, match="--unknown random"):
        choose_filler(mine, spare, ends, [text])


def test_a_filler_that_templates_hold_is_seen(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filler, "template_ids", lambda tokenizer: set())
    mine = copy.deepcopy(tokenizer)
    mine.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|spare|>"]})
    mine.bos_token = "<|start|>"
    mine.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    start = len(tokenizer)
    assert choose_filler(mine, len(mine), {1}, []) == start
    monkeypatch.undo()
    assert choose_filler(mine, len(mine), {1}, []) == 0


def test_blocks_of_filler(rows: datasets.Dataset) -> None:
    """Half of the copies are filler alone, the others end in it; aims are as ever."""
    used: set[int] = set()
    for row in rows:
        used.update(row["prompt"], row["answer"], *(state for states in row["states"] for state in states))
    filler = next(token for token in range(2, VOCABULARY) if token not in used)
    noise = NoiseConfig(window=1, noise="random", copies=2, filler=filler, reach=3)
    collate = Noisy(CUT, BLOCK, noise, EOS, True)
    starts, tails = set(), set()
    for use in range(24):
        row = drawn(rows, use)[0]
        got, first = collate([row]), len(row["prompt"])
        tokens = got["tokens"][0]
        groups = [group[group != NO_ROW].tolist() for group in got["hung"][0]]
        filled = [
            group for group in groups if all(int(tokens[r]) == filler for r in group) and len(group) <= 3
        ]
        assert filled
        starts.add(int(got["parents"][0, filled[0][0]]) + 1 - first)
        others = [group for group in groups if group not in filled]
        tails |= {sum(int(tokens[r]) == filler for r in group) for group in others}
        assert all(int(tokens[group[0]]) != filler for group in others), "the first token is always known"
        assert all(len(path) == aim + 1 for _, _, aim, path in paths(got))
    assert starts == {0, 1, 2}
    assert len(tails) > 2


def test_a_pass_leaves_filler_at_the_end(model: TransformersModel, rows: datasets.Dataset) -> None:
    learner = student(model, LORA, TunedLoss(refresh=1.0, filler=7))
    merged = model.adapted(learner.adapter)
    noise = NoiseConfig(window=1, noise="random", copies=2, filler=7, reach=3)
    batch = Noisy(CUT, BLOCK, noise, EOS, True)(drawn(rows, 0, 3))
    torch.manual_seed(0)
    after = learner.passed(*(batch[name] for name in ("tokens", "parents", "hung", "aims")))
    picks = {}
    for lane, row, aim, tokens in paths(batch):
        deviates = tokens[:-1] != batch["tokens"][lane, :aim].tolist()
        pick = int(merged.reference(tokens[:-1])[-1].argmax())
        picks[lane, row] = pick if deviates else int(batch["tokens"][lane, aim])
    cut = 0
    for lane in range(2):
        for group in batch["hung"][lane]:
            own = [row for row in group.tolist() if row != NO_ROW]
            known = [int(after[lane, row]) == picks.get((lane, row)) for row in own]
            unknown = [int(after[lane, row]) == 7 for row in own]
            last = unknown.index(True) if True in unknown else len(own)
            assert all(known[:last])
            assert all(unknown[last:])
            cut += last < len(own)
    assert cut


def test_a_filler_is_used_saved_and_harmless(model: TransformersModel, tmp_path: Path) -> None:
    config = replace(LORA, filler=7)
    adapter = student(model, config, TunedLoss()).adapter.requires_grad_(False)
    adapter.odds = {"ahead": [[0.9] * 7]}
    adapter_folder.save(tmp_path / "mine", adapter, model, "cllm", "tiny", {})
    loaded = model.adapted(adapter_folder.load(str(tmp_path / "mine"), model))
    assert loaded.lookahead == Lookahead((), {"ahead": [[0.9] * 7]}, 7)
    prompt = random_prompt(9, 0)
    for method, least in ((Jacobi(12), 4), (Jacobi(12, faithful=True), 11)):
        seen: list[Tree] = []
        plain = run(loaded.base, Plain(), prompt, greedy(20)).emitted
        assert run(loaded, Heard(method, seen), prompt, greedy(20)).emitted == plain
        assert 7 in seen[0].tokens[-1:]
        assert max(map(len, seen)) > least
    with pytest.raises(AdapterError, match="this model came without one"):
        run(loaded, SpaceTuned(), prompt)


@dataclass
class Heard:
    """Notes the trees of a method; rows cost nothing."""

    method: Any
    seen: list[Tree]

    def drafter(self, context: Any) -> Any:
        inner = self.method.drafter(replace(context, cost=free))
        propose = inner.propose

        def noted(tokens: Sequence[int]) -> Tree:
            self.seen.append(propose(tokens))
            return self.seen[-1]

        inner.propose = noted
        return inner
