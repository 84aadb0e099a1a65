"""Adapters: the text stays the base model's, ordinary rows keep their bits, mask rows say what they were
trained to say, whoever else is in the engine. Each planted fault is seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from selfdraft import Engine, Limits, Method, Sampler, Session, Tree
from selfdraft.errors import AdapterError, InvalidTree
from selfdraft.methods.bita import Bita
from selfdraft.methods.jacobi import Jacobi
from selfdraft.methods.llma import Llma
from selfdraft.methods.plain import Plain
from selfdraft.methods.space import Space
from selfdraft.models.adapter import Adapter, AdapterConfig, LowRank, all_targets, linear_layers
from selfdraft.models.hf import HfModel
from selfdraft.noise import Noise
from selfdraft.train.student import Loss, Student
from selfdraft.verify.adversaries import Oracle

import faults
from adapting import Heard, Helped, Knowing, adapter, defined
from architectures import WORKING, build
from conftest import VOCABULARY, tiny_llama
from drafting import random_prompt, run

PARTS = [(0, 0), (16, 0), (0, 4), (16, 4)]  # prefix, rank
SHAPES: Mapping[str, Method] = {
    "bita": Bita(block=40),
    "upper-triangle": Bita(faithful=True),
    "half": Bita(faithful=True, tree="half", width=3),
    "full": Bita(faithful=True, tree="full", width=2),
    "space": Space(),
    "faithful": Space(faithful=True),
}
SAMPLERS = {"greedy": Sampler(), "sampled": Sampler(0.8, seed=3)}
PROMPT = random_prompt(30, seed=1)
SHORT = Limits(24)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", ["exact", "double"])
@pytest.mark.parametrize(("prefix", "rank"), PARTS)
def test_text_is_that_of_the_base(
    model: str, prefix: int, rank: int, sampler: str, request: pytest.FixtureRequest
) -> None:
    base: HfModel = request.getfixturevalue(model)
    adapted, sampled = base.adapted(adapter(base, 3, prefix, rank)), SAMPLERS[sampler]
    plain = run(base, Plain(), PROMPT, sampled, SHORT).emitted
    assert run(adapted, Plain(), PROMPT, sampled, SHORT).emitted == plain
    for name, method in SHAPES.items():
        drafted = run(adapted, Helped(method, plain), PROMPT, sampled, SHORT)
        assert drafted.emitted == plain, name
        assert len(drafted.runs) < 20, f"{name}: right guesses must be accepted"
        assert run(adapted, method, PROMPT, sampled, Limits(5)).emitted == plain[:5], name


@pytest.mark.parametrize("model", ["exact", "double"])
@pytest.mark.parametrize(("prefix", "rank"), [(16, 4)])
def test_batch_is_single(model: str, prefix: int, rank: int, request: pytest.FixtureRequest) -> None:
    """All methods at once, with or without masks, of several lengths; up to four live, they join and leave."""
    base: HfModel = request.getfixturevalue(model)
    adapted = base.adapted(adapter(base, 3, prefix, rank))
    dice = random.Random(0)
    waiting: list[tuple[Sequence[int], Method, Sampler, Limits]] = []
    alone = []
    for seed in range(12):
        prompt, limits = random_prompt(dice.randint(1, 70), seed), Limits(dice.randint(1, 24))
        sampler = SAMPLERS["sampled" if seed % 2 else "greedy"]
        alone.append(run(base, Plain(), prompt, sampler, limits).emitted)
        drafts = [Helped(method, alone[-1]) for method in SHAPES.values()]
        methods = [*drafts, Plain(), Llma(trigger=1, block=8), Jacobi(6), Knowing(alone[-1]), Bita(), Space()]
        waiting.append((prompt, methods[seed], sampler, limits))
    engine, joined = Engine(adapted), list[Session]()
    while waiting or engine.sessions:
        while waiting and len(engine.sessions) < 4:
            joined.append(engine.submit(*waiting.pop(0)))
        engine.step()
    assert [session.emitted for session in joined] == alone


def say(model: HfModel, heard: Sequence[Heard], size: int) -> Tensor:
    """Logits of a group under the row before the last of each text, as training sees it, [texts, size, :].

    The texts are the beginnings of the last one.
    """
    text = list(heard[-1].text)
    anchors = torch.tensor([[len(one.text) - 2 for one in heard]])
    assert model.adapter is not None
    _, hidden = Student(model.base, model.adapter, Loss()).hidden(torch.tensor([text]), anchors)
    return model.output(hidden[0]).view(len(heard), size, -1)


def crowd(adapted: HfModel, sampler: Sampler) -> None:
    """Sessions that join and leave, some from another's cache: their texts are the base's, and what the masks
    say, at rows anywhere in a tree, is what a group under that text says in training."""
    base, dice = adapted.base, random.Random(1)
    engine, sessions = Engine(adapted), list[tuple[Session, Knowing, Sequence[int]]]()
    for seed in range(9):
        first = random_prompt(dice.randint(2, 50), seed)
        other = next((s for s, *_ in sessions if s in engine.sessions), None) if seed % 3 else None
        prompt = [*other.tokens, *first[:2]] if other is not None else first
        limits = Limits(dice.randint(8, 16))
        plain = run(base, Plain(), prompt, sampler, limits).emitted
        knowing = Knowing(plain)
        sessions.append((engine.submit(prompt, knowing, sampler, limits, start=other), knowing, plain))
        for _ in range(dice.randint(0, 2)):
            engine.step()
    while engine.sessions:
        engine.step()
    for session, knowing, plain in sessions:
        assert session.emitted == plain
        assert knowing.heard[-1].step.ahead is None, "the text has ended"
        compare(adapted, knowing.heard[:-1], sampler)


def compare(adapted: HfModel, heard: Sequence[Heard], sampler: Sampler) -> None:
    noise, size = Noise(sampler.seed, sampler.sample), len(adapted.lookahead.ids if adapted.lookahead else ())
    for one, group in zip(heard, say(adapted, heard, size) if heard else (), strict=True):
        assert (0 if one.step.ahead is None else len(one.step.ahead)) == one.group
        if one.step.ahead is not None:
            at = range(len(one.text), len(one.text) + one.group)
            scores = group[: one.group] + sampler.temperature * noise.at(at, VOCABULARY, adapted.device)
            torch.testing.assert_close(one.step.ahead, scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("prefix", "rank"), PARTS)
def test_decoding_sees_what_training_saw(double: HfModel, prefix: int, rank: int, sampler: str) -> None:
    crowd(double.adapted(adapter(double, 3, prefix, rank)), SAMPLERS[sampler])
