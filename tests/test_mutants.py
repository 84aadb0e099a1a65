"""The equivalence tests are worth what they catch: each planted fault must change a text."""

from __future__ import annotations

import pytest

from selfdraft import Limits, Sampler
from selfdraft.drafting.plain import Plain
from selfdraft.models.transformers import TransformersModel
from selfdraft.verify.adversaries import Oracle

from faults import FAULTS, Patch, penalties
from runs import random_prompt, run


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(3))
def test_each_fault_changes_a_text(
    fault: Patch, seed: int, exact: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(0.9, top_k=30, seed=seed)
    if fault is penalties:  # a few tokens in turn: a random model hardly repeats one by itself
        few = dict.fromkeys(range(5, 15), 8.0)
        sampler = Sampler(0.9, logit_bias=few, frequency_penalty=1.5, seed=seed)
    prompt = random_prompt(20, seed)
    answer = run(exact, Plain(), prompt, sampler).emitted
    ends = [Limits(40, frozenset([answer[i]])) for i in (7, 14, 21, 28, 35)]
    plain = [run(exact, Plain(), prompt, sampler, limits).emitted for limits in ends]
    oracle = Oracle(answer)
    assert [run(exact, oracle, prompt, sampler, limits).emitted for limits in ends] == plain
    fault(monkeypatch)
    assert [run(exact, Plain(), prompt, sampler, limits).emitted for limits in ends] == plain
    assert [run(exact, oracle, prompt, sampler, limits).emitted for limits in ends] != plain
