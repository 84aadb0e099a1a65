"""A LoRA per pass beside shared layers: each pass is a layer with its delta added, rows of all passes share a
stage and keep the text, and each planted fault is seen."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from selfdraft import LLM, Engine
from selfdraft.drafting.plain import Plain
from selfdraft.drafting.speed import Speed
from selfdraft.errors import InvalidOption, ModelUnsupported
from selfdraft.models import numerics
from selfdraft.models.loading import drive, load_pretrained
from selfdraft.models.looped.config import LoopedConfig, OuroConfig, Shape
from selfdraft.models.looped.decoder import LoopedForCausalLM, LoopedModel
from selfdraft.models.looped.lora import RelaxedLinear, closed, relaxed
from selfdraft.models.looped.retrofit import blank, share
from selfdraft.models.transformers import TransformersModel
from selfdraft.verify.adversaries import Restless

from conftest import Run, tiny_llama
from looping import tiny_looped
from runs import random_prompt, run, sampled

pytestmark = pytest.mark.usefixtures("short_answers")
IDS = torch.tensor([random_prompt(12, 1), random_prompt(12, 2)])
WHOLE = 64  # the smallest side of the tiny models' matrices


@pytest.fixture(scope="module", params=[{}, {"prelude": 1, "coda": 1}], ids=str)
def low(request: pytest.FixtureRequest) -> TransformersModel:
    return drive(tiny_looped(torch.bfloat16, lora_rank=4, **request.param))


ASKED = [(random_prompt(3 + 7 * seed, seed), sampled(0.8 * (seed % 2), seed, 10)) for seed in range(4)]
"""Greedy and sampled in turn."""


@pytest.fixture(scope="module")
def plain(low: TransformersModel) -> Sequence[Sequence[int]]:
    return [run(low, Plain(), *one).emitted for one in ASKED]


def test_speed_is_plain(low: TransformersModel, plain: Sequence[Sequence[int]]) -> None:
    """Alone and four at a time, and whatever a drafter proposes."""
    for method in (Speed(spawn=1), Speed(spawn=2, second=True), Restless(plain[1])):
        assert [run(low, method, *one).emitted for one in ASKED] == plain
    engine = Engine(low)
    requests = [engine.submit(prompt, Speed(spawn=1), params) for prompt, params in ASKED]
    while engine.requests:
        engine.step()
    assert [request.emitted for request in requests] == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_bit_is_that_of_a_whole_forward(dtype: torch.dtype) -> None:
    model, text = drive(tiny_looped(dtype, lora_rank=4), "exact"), random_prompt(40, 2)
    (whole,) = numerics.logits_behind(model, [numerics.Tree.chain(text[9:])], [text[:9]])
    assert torch.equal(numerics.staged_logits(model, text[:9], text[9:]), whole)


def next_pass(patch: pytest.MonkeyPatch) -> None:
    """Rows have the delta of the pass after theirs, in stages."""
    group = LoopedModel.group

    def other(self: LoopedModel, hidden: Any, passes: Any, *rest: Any, **given: Any) -> Any:
        staged = isinstance(passes, torch.Tensor)
        return group(self, hidden, (passes + 1) % self.config.loops if staged else passes, *rest, **given)

    patch.setattr(LoopedModel, "group", other)


def first_row(patch: pytest.MonkeyPatch) -> None:
    """All rows of a stage have the delta of the first."""
    group = LoopedModel.group

    def same(self: LoopedModel, hidden: Any, passes: Any, *rest: Any, **given: Any) -> Any:
        return group(self, hidden, passes if isinstance(passes, int) else int(passes[0]), *rest, **given)

    patch.setattr(LoopedModel, "group", same)


def all_deltas(patch: pytest.MonkeyPatch) -> None:
    """Stages add the deltas of all passes to each row."""
    forward = RelaxedLinear.forward

    def opened(self: RelaxedLinear, rows: torch.Tensor) -> torch.Tensor:
        if self.turn.closed is not None and self.turn.closed.ndim == 3:
            self.turn.closed = torch.zeros_like(self.turn.closed)
        return forward(self, rows)

    patch.setattr(RelaxedLinear, "forward", opened)


@pytest.mark.parametrize("fault", [next_pass, first_row, all_deltas])
def test_each_fault_changes_a_text(
    low: TransformersModel, plain: Sequence[Sequence[int]], fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    pairs = zip(ASKED, plain, strict=True)
    assert any(run(low, Speed(spawn=1), *one).emitted != text for one, text in pairs)


# The model by itself.


def test_a_pass_is_layers_with_their_deltas_added() -> None:
    looped, deep = tiny_looped(lora_rank=4, prelude=1), tiny_looped(unique=7, loops=1)
    base = looped.model
    deep.model.layers[0].load_state_dict(base.prelude[0].state_dict())
    for place, layer in enumerate(deep.model.layers[1:]):
        loop, i = divmod(place, 2)
        state = base.layers[i].state_dict()
        for name, linear in relaxed(base.layers[i]).items():
            own = slice(4 * loop, 4 * loop + 4)
            state[f"{name}.weight"] = linear.weight + linear.up.weight[:, own] @ linear.down.weight[own]
        layer.load_state_dict({name: state[name] for name in layer.state_dict()})
    for name in ("embed_tokens", "norm"):
        getattr(deep.model, name).load_state_dict(getattr(base, name).state_dict())
    deep.lm_head.load_state_dict(looped.lm_head.state_dict())
    torch.testing.assert_close(looped(IDS).logits, deep(IDS).logits, rtol=1e-4, atol=1e-4)


def test_threads_and_copies_have_passes_of_their_own() -> None:
    model = tiny_looped(lora_rank=4)
    twin = copy.deepcopy(model)
    for layer, own in zip(twin.model.layers, model.model.layers, strict=True):
        assert layer.turn is not own.turn
        assert {linear.turn for linear in relaxed(layer).values()} == {layer.turn}
    alone, made = model(IDS).logits, []
    work = [threading.Thread(target=lambda: made.append(model(IDS).logits)) for _ in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert all(torch.equal(logits, alone) for logits in [*made, twin(IDS).logits])


def gradients(model: LoopedForCausalLM) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # the only name before v6
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parts", [{}, {"prelude": 1, "coda": 1}], ids=str)
def test_gradient_checkpointing_changes_no_gradient(parts: dict[str, int], reentrant: bool) -> None:
    """Layers run once more in the backward pass, each with the delta of the same pass."""
    model = tiny_looped(lora_rank=4, **parts).train()
    whole = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)
    assert found.keys() == whole.keys() == dict(model.named_parameters()).keys()
    for name, gradient in whole.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_layers_rerun_with_another_delta_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """All have that of the pass that the model made last, which is the last one in a backward pass."""
    last: list[torch.Tensor] = []
    group, forward = LoopedModel.group, RelaxedLinear.forward

    def noted(self: LoopedModel, hidden: torch.Tensor, passes: Any, *rest: Any, **given: Any) -> Any:
        last[:] = [closed(passes, self.config, hidden.device)]
        return group(self, hidden, passes, *rest, **given)

    def stale(self: RelaxedLinear, rows: torch.Tensor) -> torch.Tensor:
        self.turn.closed = last[0]
        return forward(self, rows)

    monkeypatch.setattr(LoopedModel, "group", noted)
    monkeypatch.setattr(RelaxedLinear, "forward", stale)
    with pytest.raises(AssertionError):
        test_gradient_checkpointing_changes_no_gradient({}, False)


# From an ordinary model.


@pytest.mark.parametrize("rule", ["step", "average"])
def test_at_full_rank_it_is_the_checkpoint(rule: Any) -> None:
    """Each pass takes the place of the layers that stood there; a lower rank takes it as near as it can."""
    model = tiny_llama(layers=8)
    whole = share(model, Shape(2, 3, 1, 1, WHOLE), rule)
    torch.testing.assert_close(whole(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-3)
    linear = share(model, Shape(2, 3, 1, 1, 8), rule).model.layers[1].mlp.up_proj
    wanted = model.model.layers[4].mlp.up_proj.weight  # the second of the second pass
    own = slice(8, 16)
    delta = wanted - linear.weight
    left = delta - linear.up.weight[:, own] @ linear.down.weight[own]
    torch.testing.assert_close(left.norm(), torch.linalg.svdvals(delta)[8:].norm())


def test_narrow_layers_have_the_same_neurons_in_every_pass() -> None:
    model = tiny_llama(layers=4)
    narrow = share(model, Shape(2, 2, lora_rank=WHOLE), intermediate=96)
    linear = narrow.model.layers[0].mlp.up_proj
    stay = [model.model.layers[0].mlp.up_proj.weight.tolist().index(row) for row in linear.weight.tolist()]
    own = slice(WHOLE, 2 * WHOLE)
    found = linear.weight + linear.up.weight[:, own] @ linear.down.weight[own]
    torch.testing.assert_close(found, model.model.layers[2].mlp.up_proj.weight[stay], rtol=1e-4, atol=1e-4)


def test_fresh_deltas_add_nothing() -> None:
    model = blank(tiny_llama().config, Shape(2, 3, lora_rank=4)).eval()
    before = model(IDS).logits
    for linear in relaxed(model).values():
        linear.down.weight.data.normal_()
    assert torch.equal(model(IDS).logits, before)
    model(IDS, labels=IDS).loss.backward()
    assert all(linear.up.weight.grad.abs().sum() > 0 for linear in relaxed(model).values())


def test_ranks_that_cannot_be_are_named() -> None:
    for rank in (0, -1, 1.5, True):
        with pytest.raises(InvalidOption, match="lora_rank must be at least 1, or left out"):
            Shape(2, 2, lora_rank=rank)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="lora_rank must be at most 64, the smallest side"):
        share(tiny_llama(), Shape(2, 2, lora_rank=65))
    with pytest.raises(InvalidOption, match="lora_rank must be at least 1"):
        LoopedConfig(lora_rank=0)
    with pytest.raises(ModelUnsupported, match="no LoRA per pass"):
        OuroConfig(lora_rank=4)
    looped = share(tiny_llama(), Shape(1, 2, lora_rank=4))
    assert share(looped, looped.config.shape)(IDS).logits.equal(looped(IDS).logits)
    with pytest.raises(ModelUnsupported, match="another number of passes: it has 2, got loops 3"):
        share(looped, Shape(1, 3, lora_rank=4))
    with pytest.raises(ModelUnsupported, match="a looped model with lora_rank 4 cannot go on with None"):
        share(looped, Shape(1, 2))


def test_trained_saved_and_loaded(
    command: Run, folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data, out = tmp_path / "texts.txt", tmp_path / "looped"
    data.write_text("def add(a, b):\n    return a + b\n\n" * 60)
    words = ("train", "speed", "--data", str(data), "--steps", "2", "--batch", "2", "--length", "32")
    start = (*words, "--model", str(folder), "--out", str(out), "--unique", "1", "--loops", "3")
    code, _, err = command(*start, "--lora-rank", "0")
    assert (code, "lora_rank must be at least 1" in err) == (2, True), err
    code, _, err = command(*start, "--lora-rank", "4")
    assert code == 0, err
    model, _ = load_pretrained(str(out))
    assert isinstance(model, LoopedForCausalLM)
    assert model.config.shape == Shape(1, 3, lora_rank=4)
    assert "Each pass has a LoRA of rank 4" in (out / "README.md").read_text()
    llm = LLM(str(out), "speed")
    plain = llm.using("plain").generate("def add", max_new_tokens=12, ignore_eos=True)
    assert llm.generate("def add", max_new_tokens=12, ignore_eos=True).ids == plain.ids
