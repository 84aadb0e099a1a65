"""On every device at hand: the same noise, and drafted == plain."""

from __future__ import annotations

import pytest
import torch

from selfdraft.drafting.bita import Bita
from selfdraft.drafting.plain import Plain
from selfdraft.drafting.space import Space
from selfdraft.models.transformers import TransformersModel
from selfdraft.sampling.gumbel import gumbel, philox
from selfdraft.verify.adversaries import Garbage, Oracle

from adapting import adapter
from conftest import tiny_llama
from runs import random_prompt, run, sampled

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_the_same_on_every_device(device: str) -> None:
    words = philox([torch.arange(1000, device=device)] * 4, 2**63 + 12345)
    here = philox([torch.arange(1000)] * 4, 2**63 + 12345)
    for word, mine in zip(words, here, strict=True):
        assert torch.equal(word.cpu(), mine)
    there = gumbel(7, 1, range(5), 999, torch.device(device))
    torch.testing.assert_close(
        there.cpu(), gumbel(7, 1, range(5), 999, torch.device("cpu")), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafted_is_plain_in_float64(device: str, temperature: float) -> None:
    model = TransformersModel(tiny_llama(torch.float64).to(device), "fast")
    prompt, params = random_prompt(30, 1), sampled(temperature, seed=2)
    plain = run(model, Plain(), prompt, params).emitted
    for method in (Garbage(), Oracle(plain)):
        assert run(model, method, prompt, params).emitted == plain
    adapted = model.adapted(adapter(model, prefix=4, rank=4).to(device))
    for method in (Bita(faithful=True), Space()):
        assert run(adapted, method, prompt, params).emitted == plain
