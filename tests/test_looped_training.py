"""Looped models trained: the loss and the agreement as defined, resumed == whole, a folder that loads as any
other. Each planted fault is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from selfdraft.errors import SelfdraftError
from selfdraft.models.adapters.fingerprint import fingerprint
from selfdraft.models.loading import load_pretrained
from selfdraft.models.looped.config import Shape
from selfdraft.models.looped.decoder import LoopedForCausalLM, exit_weights
from selfdraft.models.looped.retrofit import share
from selfdraft.models.transformers import MARK
from selfdraft.train import exits, pipeline, windows
from selfdraft.train import looped as looped_run
from selfdraft.train.exits import Places, distribution, exit_loss, measure
from selfdraft.train.looped import LoopedPlan, LoopedSchedule, train

from conftest import TEXT, VOCABULARY, Run, tiny_llama
from looping import tiny_looped

pytestmark = pytest.mark.usefixtures("short_answers")
LENGTH = 24
ALL = Places(1.0)


def random_rows(count: int, seed: int = 0) -> datasets.Dataset:
    ids = torch.randint(2, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return datasets.Dataset.from_dict({"input_ids": ids.tolist()})


@pytest.fixture
def looped() -> LoopedForCausalLM:
    return share(tiny_llama(), Shape(2, 3)).train()


def taken(rows: datasets.Dataset, draw: int = 0) -> list[dict[str, Any]]:
    return [{**row, "draw": draw * len(rows) + i} for i, row in enumerate(rows)]


# The loss.


@torch.no_grad()
def by_hand(model: LoopedForCausalLM, ids: Tensor, early: str, teacher: Any = None) -> float:
    """The sum over groups of weight times mean cross-entropy, position by position."""
    states = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states[1:]
    logs = [model.lm_head(model.model.readout(state)).log_softmax(-1) for state in states]
    total = 0.0
    for weight, own in zip(exit_weights(len(logs)), logs, strict=True):
        parts = []
        for i, text in enumerate(ids):
            said = None if teacher is None else teacher(text[None]).logits[0].softmax(-1)
            for at in range(len(text) - 1):
                if early == "last" and own is not logs[-1]:
                    aim = logs[-1][i, at].exp()
                elif said is not None:
                    aim = said[at]
                else:
                    aim = torch.eye(VOCABULARY)[text[at + 1]]
                parts.append(-float(aim @ own[i, at]))
        total += weight * sum(parts) / len(parts)
    return total


@pytest.mark.parametrize("early", ["last", "same"])
def test_the_loss_is_as_defined(looped: LoopedForCausalLM, early: Any) -> None:
    made = ALL(taken(random_rows(3)))
    loss = exit_loss(looped, made["ids"], made["places"], early)
    assert float(loss.detach()) == pytest.approx(by_hand(looped, made["ids"], early), rel=1e-5)
    if early == "same":
        torch.testing.assert_close(loss, looped(made["ids"], labels=made["ids"]).loss)
    teacher = tiny_llama()
    told = distribution(teacher, made["ids"])
    loss = exit_loss(looped, made["ids"], made["places"], early, told)
    assert float(loss.detach()) == pytest.approx(by_hand(looped, made["ids"], early, teacher), rel=1e-5)


@torch.no_grad()
def test_fewer_positions_leave_the_expected_loss(looped: LoopedForCausalLM) -> None:
    rows = random_rows(2)
    whole = ALL(taken(rows))
    expected = exit_loss(looped, whole["ids"], whole["places"], "same")
    few = Places(0.25)
    drawn = [few(taken(rows, draw)) for draw in range(100)]
    assert all(len(made["places"].unique()) == 2 * round(0.25 * (LENGTH - 1)) for made in drawn)
    seen = torch.cat([made["places"] for made in drawn]).bincount(minlength=2 * (LENGTH - 1))
    assert seen.min() > 0.4 * seen.float().mean()  # every position, as often as others
    losses = torch.stack([exit_loss(looped, made["ids"], made["places"], "same") for made in drawn])
    error = float(losses.std() / len(losses) ** 0.5)
    assert abs(float(losses.mean() - expected)) < 4 * error
    assert float(losses.std()) > 0


def test_the_final_readout_does_not_learn_from_early_ones(looped: LoopedForCausalLM) -> None:
    """Distilled, early groups go to the last one's distribution, never the other way round."""
    made = ALL(taken(random_rows(2)))
    states = looped.model(made["ids"], output_hidden_states=True, use_cache=False).hidden_states[1:]
    flat = [state[:, :-1].flatten(0, 1).detach().requires_grad_() for state in states]
    labels = made["ids"][:, 1:].flatten()
    exits.readout_loss(looped, flat, labels, made["places"], "last").backward()
    (alone,) = torch.autograd.grad(
        exit_weights(3)[-1] * cross_entropy(looped.lm_head(looped.model.readout(flat[-1])), labels), flat[-1]
    )
    assert flat[-1].grad is not None
    torch.testing.assert_close(flat[-1].grad, alone)


def equal_weights(patch: pytest.MonkeyPatch) -> None:
    """All groups weigh the same."""
    patch.setattr(exits, "exit_weights", lambda loops: [1 / loops] * loops)


def one_place_late(patch: pytest.MonkeyPatch) -> None:
    """Early groups are read one position further than what they are to say."""
    patch.setattr(exits, "_read", lambda state, places: state[places.roll(1)])


def one_window(patch: pytest.MonkeyPatch) -> None:
    """Positions of the first window stand for those of all."""
    call = Places.__call__

    def wrong(self: Places, rows: Any) -> dict[str, Tensor]:
        made = call(self, rows)
        return made | {"places": made["places"] % (LENGTH - 1)}

    patch.setattr(Places, "__call__", wrong)


@pytest.mark.parametrize("fault", [equal_weights, one_place_late, one_window])
@pytest.mark.parametrize("early", ["last", "same"])
def test_wrong_losses_are_seen(
    looped: LoopedForCausalLM,
    early: Any,
    fault: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test_the_loss_is_as_defined(looped, early)


# What is measured.


@torch.no_grad()
def test_agreement_by_hand(looped: LoopedForCausalLM) -> None:
    rows = random_rows(5, seed=3)
    found = measure(looped, rows, 2, autocast=False)
    assert looped.training
    ids = torch.tensor(rows["input_ids"])
    states = looped.model(ids, output_hidden_states=True, use_cache=False).hidden_states[1:]
    logits = [looped.lm_head(looped.model.readout(state))[:, :-1] for state in states]
    assert found.tokens == 5 * (LENGTH - 1)
    for group, own in enumerate(logits):
        same = (own.argmax(-1) == logits[-1].argmax(-1)).float().mean()
        assert found.agreement[group] == pytest.approx(float(same), abs=1e-4)
        loss = cross_entropy(own.flatten(0, 1), ids[:, 1:].flatten())
        assert found.loss[group] == pytest.approx(float(loss), abs=2e-4)
    assert found.agreement[0] < found.agreement[-1] == 1
    assert set(found.figures("eval")) == {
        f"eval_{name}_{g}" for name in ("loss", "agreement") for g in (1, 2, 3)
    }


def test_wrong_agreement_is_seen(looped: LoopedForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are counted from the embedding."""
    states = exits._states

    def early(model: LoopedForCausalLM, ids: Tensor) -> list[Tensor]:
        return [model.model.embed_tokens(ids)[:, :-1].flatten(0, 1), *states(model, ids)[:-1]]

    monkeypatch.setattr(exits, "_states", early)
    with pytest.raises(AssertionError):
        test_agreement_by_hand(looped)


# Training.


class Pulled(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


SCHEDULE = LoopedSchedule(steps=5, batch=2, every=2, warmup=2, seed=5)
PLAN = LoopedPlan("tiny", Path(), Path(), 2, 2, schedule=SCHEDULE)


def trained(out: Path, *stops: int) -> dict[str, Tensor]:
    plan = replace(PLAN, out=out)
    data = windows.Windows(random_rows(12), random_rows(3, seed=1), LENGTH)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train(share(tiny_llama(), Shape(2, 2)).train(), plan, data, callbacks=[Pulled(stop)])
    model = share(tiny_llama(), Shape(2, 2)).train()
    log = train(model, plan, data)
    assert [entry["step"] for entry in log if "eval_agreement_1" in entry] == [2, 4, 5]
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_a_resumed_run_is_a_run_in_one_go(tmp_path: Path) -> None:
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts", 3)
    start = dict(share(tiny_llama(), Shape(2, 2)).named_parameters())
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name
        assert not torch.equal(weight, start[name]), name


def test_other_positions_after_a_stop_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions in the order in which they are asked for, not by the number of the use."""
    asked = iter(range(1000))
    drawn = exits._drawn
    monkeypatch.setattr(exits, "_drawn", lambda room, count, draw: drawn(room, count, next(asked)))
    with pytest.raises(AssertionError):
        test_a_resumed_run_is_a_run_in_one_go(tmp_path)


def test_the_rate_rises_and_falls_to_zero() -> None:
    schedule = LoopedSchedule(steps=10, warmup=4)
    factors = [schedule.factor(step) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert [LoopedSchedule(steps=2, warmup=20).factor(step) for step in range(3)] == [0.05, 0.1, 0]


# From text to a model folder.


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": TEXT[i:] + TEXT[:i]} for i in range(0, 120, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SMALL = ("--steps", "4", "--every", "2", "--batch", "2", "--length", "32", "--unique", "2", "--loops", "3")


def speed(command: Run, folder: Path | str, data: Path, out: Path, *more: str) -> tuple[int, str, str]:
    words = ("--model", str(folder), "--data", str(data), "--out", str(out))
    return command("train", "speed", *words, *SMALL, *more)


def test_from_texts_to_a_looped_model(command: Run, folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "looped"
    code, said, err = speed(command, folder, texts, out, "--teacher", str(folder), "--json")
    assert code == 0, err
    about = json.loads(said.splitlines()[-1])
    assert about["grade"] == "tuned"
    assert about["base_loss"] > 0
    assert len(about["exits"]["loss"]) == 3

    model, tokenizer = load_pretrained(str(out))
    assert isinstance(model, LoopedForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.config.exit_agreement == about["exits"]["agreement"]
    losses = [about["teacher_loss"], about["exits"]["loss"][-1]]
    cost = {"tokens": about["exits"]["tokens"], "loss": losses, "agreement": None, "repeated": None}
    assert getattr(model.config, MARK) == {"method": "speed", "base": str(folder), "tuning_cost": cost}
    assert about["teacher_loss"] == about["base_loss"] != losses[1]
    auto = AutoModelForCausalLM.from_pretrained(out)
    assert fingerprint(auto) == fingerprint(model)
    ids = tokenizer("def add(", return_tensors="pt")["input_ids"]
    assert len(auto.generate(ids, max_new_tokens=4)[0]) > ids.shape[1]
    assert AutoTokenizer.from_pretrained(out)("def")["input_ids"] == tokenizer("def")["input_ids"]

    card = (out / "README.md").read_text()
    assert "2 layers, used 3 times" in card
    assert "lossless to the **tuned** weights" in card
    assert f"the distribution of {folder}" in card
    assert f"| 1 | {about['exits']['loss'][0]:.4f} |" in card
    assert f"{about['pipeline']['tokens_per_forward']:.2f} tokens per forward" in card
    assert f"{about['pipeline']['flushed']:.1%} were flushed" in card
    assert any("eval_loss_3" in entry for entry in json.loads((out / "training.json").read_text())["log"])

    code, said, err = speed(command, folder, texts, out, "--teacher", str(folder))
    assert code == 0, err
    assert "held-out loss by pass" in said
    assert fingerprint(load_pretrained(str(out))[0]) == fingerprint(model)  # nothing was left to do
    code, _, err = speed(command, folder, texts, out, "--teacher", str(folder), "--rate", "0.1")
    assert code == 2
    assert "holds another run" in err

    more = tmp_path / "more"  # the loss that counts is that of the teacher, not of what it goes on from
    words = ("--model", str(out), "--data", str(texts), "--out", str(more), "--teacher", str(folder))
    code, said, err = command("train", "speed", *words, *SMALL[:-4], "--json")
    assert code == 0, err
    told = json.loads(said.splitlines()[-1])
    assert told["teacher_loss"] == about["teacher_loss"]
    assert told["base_loss"] == pytest.approx(about["exits"]["loss"][-1], rel=1e-4)
    own = getattr(load_pretrained(str(more))[0].config, MARK)["tuning_cost"]["loss"]
    assert own[0] == told["teacher_loss"]
    assert (
        f"{folder.name}, from which it learns, has {told['teacher_loss']:.4f}"
        in (more / "README.md").read_text()
    )


def test_a_looped_model_goes_on_and_scratch_is_not_tuned(
    command: Run, folder: Path, texts: Path, tmp_path: Path
) -> None:
    first, more = tmp_path / "first", tmp_path / "more"
    code, said, err = speed(command, folder, texts, first, "--scratch", "--early", "same", "--json")
    assert code == 0, err
    assert json.loads(said.splitlines()[-1])["grade"] == "base"
    assert not hasattr(load_pretrained(str(first))[0].config, MARK)
    assert "trained\nfrom random weights" in (first / "README.md").read_text()
    assert "The last pass learns the reference tokens" in (first / "README.md").read_text()
    words = ("--model", str(first), "--data", str(texts), "--out", str(more), *SMALL[:-4], "--loops", "2")
    code, _, err = command("train", "speed", *words)
    assert code == 0, err
    model = load_pretrained(str(more))[0]
    assert (model.config.unique_layers, model.config.loops) == (2, 2)
    card = (more / "README.md").read_text()
    assert "lossless to the **tuned** weights" in card
    assert "first, from which this run started, has a loss of" in card


def test_windows_as_long_as_the_context_are_continued() -> None:
    """By the one token that there is room for."""
    for context in (LENGTH, pipeline.PROMPT):
        rows = datasets.Dataset.from_dict(
            {"input_ids": torch.arange(2, 2 + 3 * context).view(3, -1) % 90 + 2}
        )
        found = pipeline.decode(tiny_looped(max_position_embeddings=context), rows)
        assert (found.prompts, found.tokens) == (3, 3)


def test_a_model_that_does_not_decode_keeps_its_attention() -> None:
    model = diverged(tiny_looped(attn_implementation="sdpa"))
    with pytest.raises(SelfdraftError):
        pipeline.decode(model, random_rows(2))
    assert (model.config._attn_implementation, model.training) == ("sdpa", False)


def diverged(model: LoopedForCausalLM) -> LoopedForCausalLM:
    model.model.norm.weight.data.fill_(torch.nan)
    return model


def test_a_diverged_model_is_saved(
    command: Run, folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def badly(model: LoopedForCausalLM, *given: Any) -> Any:
        log = train(model, *given)
        diverged(model)
        return log

    monkeypatch.setattr(looped_run, "train", badly)
    out = tmp_path / "looped"
    code, _, err = speed(command, folder, texts, out)
    assert code == 0, err
    assert "how the model decodes is not measured: its loss is not finite" in err
    assert json.loads((out / "training.json").read_text())["pipeline"] is None
    assert (out / "model.safetensors").exists()
    assert "tokens per forward" not in (out / "README.md").read_text()


def test_a_model_is_saved_before_it_decodes(
    command: Run, folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pulled(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "decode", pulled)
    out = tmp_path / "looped"
    assert speed(command, folder, texts, out)[0] != 0
    assert isinstance(load_pretrained(str(out))[0], LoopedForCausalLM)


def test_documents_are_cut_end_to_end(tokenizer: Any, texts: Path, tmp_path: Path) -> None:
    found = windows.read(texts, tokenizer, 16, "text", 64, VOCABULARY)
    documents = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    stream = [id for text in documents for id in [*tokenizer(text)["input_ids"], 1]]
    cut = [stream[at : at + 16] for at in range(0, len(stream) - 15, 16)]
    held, kept = found.held_out["input_ids"], found.train["input_ids"]
    assert sorted([*held, *kept]) == sorted(cut)
    assert len(held) == windows.MIN_WINDOWS
    plain = tmp_path / "text.txt"
    plain.write_text("\n".join(documents))
    whole = windows.read(plain, tokenizer, 16, "text", 64, VOCABULARY)
    assert whole.train[1]["input_ids"] == tokenizer("\n".join(documents))["input_ids"][32:48]
    assert whole.sha256 != found.sha256
    rows = datasets.DatasetDict({"train": random_rows(6), "held_out": random_rows(2, seed=1)})
    rows.save_to_disk(tmp_path / "rows")
    given = windows.read(tmp_path / "rows", tokenizer, 16, "text", 64, VOCABULARY)
    assert given.length == LENGTH
    assert given.held_out["input_ids"] == rows["held_out"]["input_ids"]


def test_bad_data_is_named(command: Run, folder: Path, texts: Path, tmp_path: Path) -> None:
    def wrong(name: str, rows: dict[str, list[Any]]) -> Path:
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / name)
        return tmp_path / name

    torn, other = tmp_path / "torn.jsonl", tmp_path / "texts.csv"
    torn.write_text('{"text": ')
    other.write_text("text\n")
    split = datasets.DatasetDict({"test": random_rows(2)})
    split.save_to_disk(tmp_path / "split")
    faults = [
        (tmp_path / "nothing", (), "there is no"),
        (torn, (), "cannot be read"),
        (other, (), ".jsonl"),
        (tmp_path / "split", (), "no split 'train'"),
        (wrong("body", {"body": ["x"] * 20}), (), "no column 'input_ids' and no column 'text'"),
        (texts, ("--column", "body"), "no column 'body'"),
        (wrong("long", {"input_ids": [[2] * 300] * 20}), (), "do not fit the model's context of 256"),
        (texts, ("--length", "300"), "do not fit the model's context of 256"),
        (wrong("other", {"input_ids": [[2, VOCABULARY]] * 20}), (), "another tokenizer's ids"),
        (wrong("ragged", {"input_ids": [[2, 3]] * 20 + [[2, 3, 4]] * 20}), (), "of one length"),
        (wrong("words", {"input_ids": [["a", "b"]] * 20}), (), "does not hold ids"),
        (wrong("below", {"input_ids": [[2, -1]] * 20}), (), "does not hold ids"),
        (wrong("figures", {"text": [1] * 20}), (), "does not hold text"),
        (wrong("few", {"input_ids": [[2, 3]] * 3}), (), "are needed"),
        (texts, ("--unique", "0"), "unique must be at least 1"),
        (texts, ("--loops", "0"), "loops must be at least 1"),
        (texts, ("--exit-share", "0"), "'exit_share'"),
        (
            texts,
            ("--teacher", "looped-tiny"),
            f"looped-tiny has a vocabulary of 8192, the model one of {VOCABULARY}",
        ),
        (texts, ("--early", "never"), "'early'"),
        (texts, ("--steps", "0"), "steps"),
    ]
    for data, more, said in faults:
        code, _, err = speed(command, folder, data, tmp_path / "out", *more)
        assert (code, said in err) == (2, True), err
    assert not (tmp_path / "out").exists()
