"""Looped models with layers of their own before and after the group: a prelude and a coda. Driven by stages
they say what they say plainly, an early readout is that of a model with fewer passes, and each planted fault
is seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from selfdraft import LLM, Engine, Method, SamplingParams
from selfdraft.drafting.plain import Plain
from selfdraft.drafting.speed import Speed
from selfdraft.errors import InvalidOption, ModelUnsupported
from selfdraft.models import numerics
from selfdraft.models.loading import drive, load_pretrained
from selfdraft.models.looped import stages
from selfdraft.models.looped.config import LoopedConfig, Shape
from selfdraft.models.looped.decoder import LoopedForCausalLM
from selfdraft.models.looped.retrofit import blank, share
from selfdraft.models.looped.stages import StagedModel
from selfdraft.models.transformers import TransformersModel
from selfdraft.verify.adversaries import Restless

from conftest import Run, tiny_llama
from looping import tiny_looped
from runs import greedy, random_prompt, run, sampled

pytestmark = pytest.mark.usefixtures("short_answers")
IDS = torch.tensor([random_prompt(12, 1), random_prompt(12, 2)])
PARTS = [{"prelude": 1, "coda": 1}, {"prelude": 2}, {"coda": 2}]
METHODS = [Speed(spawn=1), Speed(spawn=1, revise=False), Speed(spawn=2, second=True)]


def together(
    model: TransformersModel, asked: Sequence[tuple[Method, Sequence[int], SamplingParams]]
) -> list[Sequence[int]]:
    engine = Engine(model)
    requests = [engine.submit(prompt, method, params) for method, prompt, params in asked]
    while engine.requests:
        engine.step()
    return [request.emitted for request in requests]


@pytest.fixture(scope="module", params=PARTS, ids=str)
def parted(request: pytest.FixtureRequest) -> TransformersModel:
    return drive(tiny_looped(torch.bfloat16, **request.param))


def test_speed_is_plain(parted: TransformersModel) -> None:
    """Alone and four at a time, greedy and sampled, with methods mixed, and whatever a drafter proposes."""
    asked = [(random_prompt(3 + 7 * seed, seed), sampled(0.8 * (seed % 2), seed, 10)) for seed in range(4)]
    plain = [run(parted, Plain(), *one).emitted for one in asked]
    for method in METHODS:
        assert [run(parted, method, *one).emitted for one in asked] == plain
    assert together(parted, [(METHODS[0], *one) for one in asked]) == plain
    mixed = [Restless(plain[0]), Plain(), Speed(spawn=1), Restless(plain[3])]
    assert together(parted, [(method, *one) for method, one in zip(mixed, asked, strict=True)]) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_by_stages_are_those_of_whole_forwards(dtype: torch.dtype) -> None:
    model, text = drive(tiny_looped(dtype, prelude=1, coda=2)), random_prompt(40, 2)
    cache = model.pool().open()
    model.forward([numerics.Tree.chain(text[:9])], [cache])
    cache.keep(range(9), [])
    (whole,) = model.head(model.forward([numerics.Tree.chain(text[9:])], [cache]), [range(31)])
    by_stages = numerics.staged_logits(model, text[:9], text[9:])
    if model.numerics == "exact":
        assert torch.equal(by_stages, whole), "every bit"
    else:
        torch.testing.assert_close(by_stages, whole)


def test_only_looped_layers_have_a_sheet_per_pass(parted: TransformersModel) -> None:
    pool = parted.pool()
    lanes = [pool.open() for _ in range(2)]
    parted.forward([numerics.Tree.chain([3, 4, 5])] * 2, lanes)
    shape = parted.model.config.shape
    loops = [1] * shape.prelude + [shape.loops] * shape.unique + [1] * shape.coda
    assert [len(layer.keys) for layer in pool.own] == [2 * count for count in loops]


def no_prelude(patch: pytest.MonkeyPatch) -> None:
    """Rows that start stand at their embedding."""
    patch.setattr(StagedModel, "_join", lambda *_: None)


def prelude_again(patch: pytest.MonkeyPatch) -> None:
    """All rows go through the prelude at each stage."""
    join = StagedModel._join

    def again(self: Any, flights: Any, caches: Any) -> None:
        made = [in_flight.passes for in_flight in flights]
        for in_flight in flights:
            in_flight.passes = [0] * len(in_flight.passes)
        join(self, flights, caches)
        for in_flight, passes in zip(flights, made, strict=True):
            in_flight.passes = passes

    patch.setattr(StagedModel, "_join", again)


def no_coda(patch: pytest.MonkeyPatch) -> None:
    """Rows are read straight behind the group."""
    patch.setattr(StagedModel, "_read", lambda self, flights, _: [f.states for f in flights])


def coda_once(patch: pytest.MonkeyPatch) -> None:
    """A row goes on with what the coda made of it."""
    read = StagedModel._read

    def on(self: Any, flights: Any, caches: Any) -> Any:
        states = read(self, flights, caches)
        for in_flight, own in zip(flights, states, strict=True):
            in_flight.states = own
        return states

    patch.setattr(StagedModel, "_read", on)


def shared_keys(patch: pytest.MonkeyPatch) -> None:
    """The coda writes and reads the keys and values of the prelude."""
    layers = stages.Layers
    patch.setattr(stages, "Layers", lambda run, first, loops=1: layers(run, first if loops > 1 else 0, loops))


AGAIN = [(random_prompt(12, seed), sampled(0.8, seed, 16)) for seed in range(4)]


@pytest.fixture(scope="module")
def whole() -> tuple[TransformersModel, Sequence[Sequence[int]]]:
    """A model with both parts, and plain decoding's answers."""
    model = drive(tiny_looped(torch.bfloat16, prelude=1, coda=1))
    return model, [run(model, Plain(), *one).emitted for one in AGAIN]


@pytest.mark.parametrize("fault", [no_prelude, prelude_again, no_coda, coda_once, shared_keys])
def test_each_fault_changes_a_text(
    whole: tuple[TransformersModel, Sequence[Sequence[int]]], fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = whole
    fault(monkeypatch)
    pairs = zip(AGAIN, plain, strict=True)
    assert any(run(model, Speed(spawn=1), *one).emitted != text for one, text in pairs)


# The model by itself.


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_a_cache_is_generate_without(parts: dict[str, int], cache: str) -> None:
    model = tiny_looped(**parts)
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    alone = model.generate(IDS, use_cache=False, **asked)
    assert torch.equal(model.generate(IDS, cache_implementation=cache, **asked), alone)


def test_depth_is_layers_run_one_after_another() -> None:
    looped, deep = tiny_looped(prelude=1, coda=2), tiny_looped(unique=9, loops=1)
    base = looped.model
    order = [*base.prelude, *base.layers, *base.layers, *base.layers, *base.coda]
    for layer, own in zip(deep.model.layers, order, strict=True):
        layer.load_state_dict(own.state_dict())
    for name in ("embed_tokens", "norm"):
        getattr(deep.model, name).load_state_dict(getattr(base, name).state_dict())
    deep.lm_head.load_state_dict(looped.lm_head.state_dict())
    assert torch.equal(looped(IDS).logits, deep(IDS).logits)


def test_an_early_readout_is_that_of_fewer_passes() -> None:
    model = tiny_looped(prelude=1, coda=1)
    exits = model.model(IDS, output_exits=True, use_cache=False).exits
    assert len(exits) == 3
    for loops in (1, 2, 3):
        short = share(model, Shape(2, loops, 1, 1))
        logits = model.lm_head(model.model.readout(exits[loops - 1]))
        assert torch.equal(logits, short(IDS).logits)
    each = [
        torch.nn.functional.cross_entropy(
            model.lm_head(model.model.readout(state))[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
        )
        for state in exits
    ]
    torch.testing.assert_close(model(IDS, labels=IDS).loss, each[0] / 6 + each[1] / 3 + each[2] / 2)
    with pytest.raises(ValueError, match="use no cache"):
        model.model(IDS, output_exits=True, use_cache=True)


# From an ordinary model.


def test_first_and_last_layers_stay_where_they_are() -> None:
    model = tiny_llama(layers=6)
    assert torch.equal(share(model, Shape(3, 1, 1, 2))(IDS).logits, model(IDS).logits)
    looped = share(model, Shape(1, 4, 2, 1), "average").model
    own = [layer.mlp.up_proj.weight for layer in model.model.layers]
    assert torch.equal(looped.prelude[1].mlp.up_proj.weight, own[1])
    torch.testing.assert_close(looped.layers[0].mlp.up_proj.weight, (own[2] + own[3] + own[4]) / 3)
    assert torch.equal(looped.coda[0].mlp.up_proj.weight, own[5])


def test_what_does_not_fit_is_named() -> None:
    model = tiny_llama(layers=4)
    with pytest.raises(
        InvalidOption, match="prelude 2 and coda 2 leave none of the model's 4 layers to loop"
    ):
        share(model, Shape(1, 2, 2, 2))
    with pytest.raises(InvalidOption, match="coda must be at least 0; got -1"):
        Shape(1, 2, coda=-1)
    for name in ("unique", "loops", "prelude", "coda"):
        with pytest.raises(InvalidOption, match=rf"{name} must be at least .*; got True"):
            Shape(**{"unique": 1, "loops": 2, name: True})
    with pytest.raises(InvalidOption, match=r"loops must be at least 1.*; got True"):
        LoopedConfig(loops=True)
    looped = share(model, Shape(1, 2, 1))
    assert share(looped, Shape(1, 3, 1)).config.num_hidden_layers == 4
    with pytest.raises(ModelUnsupported, match="a looped model with prelude 1 cannot go on with 0"):
        share(looped, Shape(1, 2))
    assert blank(looped.config, Shape(1, 2, 0, 3)).config.num_hidden_layers == 5


def test_trained_saved_and_loaded(command: Run, folder: Path, tmp_path: Path) -> None:
    texts, out, more = tmp_path / "texts.txt", tmp_path / "looped", tmp_path / "more"
    texts.write_text("def add(a, b):\n    return a + b\n\n" * 60)
    words = ("train", "speed", "--data", str(texts), "--steps", "2", "--batch", "2", "--length", "32")
    start = (*words, "--model", str(folder), "--out", str(out), "--unique", "1", "--loops", "3")
    code, _, err = command(*start, "--prelude", "1", "--coda", "1")
    assert (code, "leave none of the model's 2 layers" in err) == (2, True), err
    code, said, err = command(*start, "--prelude", "1", "--scratch", "--coda", "1", "--json")
    assert code == 0, err
    assert len(json.loads(said.splitlines()[-1])["exits"]["agreement"]) == 3
    model, _ = load_pretrained(str(out))
    assert isinstance(model, LoopedForCausalLM)
    assert model.config.shape == Shape(1, 3, 1, 1)
    assert "1 layer before them and 1 after them" in (out / "README.md").read_text().replace("\n", " ")
    llm = LLM(str(out), "speed")
    plain = llm.using("plain").generate("def add", max_new_tokens=12, ignore_eos=True)
    assert llm.generate("def add", max_new_tokens=12, ignore_eos=True).ids == plain.ids
    code, _, err = command(*words, "--model", str(out), "--out", str(more), "--loops", "2")
    assert code == 0, err
    assert load_pretrained(str(more))[0].config.shape == Shape(1, 2, 1, 1), "as what it goes on from"


def test_ends_of_requests_leave_the_others_their_memory(parted: TransformersModel) -> None:
    """Lanes move, are copied and grow, in layers with one sheet and in those with several."""
    engine = Engine(parted)
    first = engine.submit(random_prompt(30, 1), Speed(spawn=1), greedy(9))
    second = engine.submit(random_prompt(12, 2), Speed(spawn=1), greedy(40))
    for _ in range(12):
        engine.step()
    third = engine.submit([*second.prompt, *second.emitted[:4], 7], Speed(spawn=1), greedy(12))
    while engine.requests:
        engine.step()
    assert third.reused > 12
    for request in (first, second, third):
        plain = run(parted, Plain(), request.prompt, greedy(len(request.emitted)))
        assert request.emitted == plain.emitted
