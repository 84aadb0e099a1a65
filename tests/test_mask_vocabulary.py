"""Masks that predict some ids alone: their scores are those of these ids among all, in the decoder and in
transformers' forward; texts stay. Each planted fault is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfdraft import SamplingParams, Tree
from selfdraft.drafting.auto import Auto
from selfdraft.drafting.mask_tree import MaskCandidates, candidates
from selfdraft.drafting.plain import Plain
from selfdraft.drafting.space import Space
from selfdraft.errors import AdapterError
from selfdraft.models import decoder, decoder_build
from selfdraft.models.adapters import folder as adapter_folder
from selfdraft.models.adapters.adapter import Adapter
from selfdraft.models.adapters.folder import VOCABULARY as STORED
from selfdraft.models.adapters.folder import WEIGHTS
from selfdraft.models.decoder import Decoder
from selfdraft.models.transformers import TransformersModel
from selfdraft.models.weights import ModuleWeights
from selfdraft.sampling.sampler import Sampler
from selfdraft.train.calibration import frequent_ids

from adapting import adapter
from conftest import VOCABULARY
from runs import greedy, random_prompt, run, sampled
from test_decoder import CONFIGS, build, made
from test_decoder import decoder as tiny

IDS = torch.arange(3, VOCABULARY, 5, dtype=torch.int32)
MASKS = range(VOCABULARY, VOCABULARY + 3)
ALL = ("q_proj", "o_proj", "up_proj")
PARTS = {"alone": (0, 0, 0), "sampler head": (0, 4, 24)}


def some(part: Adapter) -> Adapter:
    found = copy.deepcopy(part)
    found.vocabulary = IDS
    return found


def read(model: Decoder | TransformersModel) -> Tensor:
    text = random_prompt(9, 1)
    rows = model.forward([Tree.chain(text).hang(8, MASKS)], [model.pool().open()], wanted=[9])
    return model.mask_logits(rows, [[9, 10, 11]], [7], lambda request, offset, logits: 11 + offset)[0].clone()


def of_the_decoder(parts: str, name: str = "llama") -> None:
    config = CONFIGS[name]
    own = Decoder(config, ModuleWeights(made(config)), build(), threads=2)
    part = adapter(own, 3, *PARTS[parts], targets=ALL)
    few, whole = read(own.adapted(some(part))), read(own.adapted(part))
    assert few.shape == (3, len(IDS))
    torch.testing.assert_close(few, whole[:, IDS.long()], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_are_those_of_the_ids(name: str, parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "SHORTLIST", VOCABULARY)
    of_the_decoder(parts, name)


@pytest.mark.parametrize("parts", PARTS)
def test_transformers_logits_are_those_of_the_ids(exact: TransformersModel, parts: str) -> None:
    part = adapter(exact, 3, *PARTS[parts])
    assert torch.equal(read(exact.adapted(some(part))), read(exact.adapted(part))[:, IDS.long()])


def test_other_ids_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    output_of = decoder_build.Build.output_of
    monkeypatch.setattr(decoder, "SHORTLIST", VOCABULARY)
    monkeypatch.setattr(
        decoder_build.Build, "output_of", lambda self, ids: output_of(self, np.roll(ids, 1).copy())
    )
    with pytest.raises(AssertionError):
        of_the_decoder("alone")


WAYS = {
    "greedy": greedy(24),
    "sampled": sampled(0.9, 3, 24),
    "all": SamplingParams(24, 20, 0.8, top_k=40, presence_penalty=0.5, logit_bias={13: 2.0}, seed=5),
}


@pytest.mark.parametrize("method", [Space(), Space(faithful=True), Auto()], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_drafted_is_plain(method: Any, way: str) -> None:
    own = tiny("f32")
    adapted = own.adapted(some(adapter(own, 3, 0, 4, 24, targets=ALL)))
    prompt = random_prompt(20, 4)
    assert run(adapted, method, prompt, WAYS[way]).emitted == run(own, Plain(), prompt, WAYS[way]).emitted


def scored(way: str) -> None:
    """Scores of some ids are those that they have among all, where the others have none."""
    few = Sampler(WAYS[way], [5, 13], VOCABULARY, torch.device("cpu"), {8, 13}, drafted=IDS.tolist())
    whole = Sampler(WAYS[way], [5, 13], VOCABULARY, torch.device("cpu"), {8, 13})
    logits = torch.randn(3, len(IDS), generator=torch.Generator().manual_seed(1))
    spread = torch.full((3, VOCABULARY), -torch.inf)
    spread[:, IDS.long()] = logits
    for sampler in (few, whole):
        sampler.take([18, 23])
    assert torch.equal(few.mask_scores(logits), whole.mask_scores(spread)[:, IDS.long()])
    assert few.candidate(1, logits[:1]) == whole.candidate(1, spread[:1])


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_the_ids(way: str) -> None:
    scored(way)


def test_scores_that_are_logits_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "_keeps_logits", True)
    with pytest.raises(AssertionError):
        scored("sampled")


def test_candidates_are_ids() -> None:
    scores = torch.randn(3, len(IDS), generator=torch.Generator().manual_seed(2))
    found = candidates(scores, IDS.tolist())
    assert [row[0].token for row in found] == IDS[scores.argmax(-1)].tolist()
    assert [[one.kind for one in row] for row in found] == [
        [one.kind for one in row] for row in candidates(scores)
    ]


def test_a_drafter_reads_them() -> None:
    own = tiny("f32")
    look = some(adapter(own, 3)).lookahead(VOCABULARY)
    assert look is not None
    masks = MaskCandidates(look)
    masks.predict(torch.eye(len(IDS))[4:7])
    assert masks.trunk == IDS[4:7].tolist()


def test_frequent_ids() -> None:
    rows = [{"prompt": [7, 7, 300], "answer": [300, 300, 9]}, {"prompt": [9], "answer": [2]}]
    assert frequent_ids(rows, 3, VOCABULARY) is not None
    found = [frequent_ids(rows, most, VOCABULARY) for most in (3, 6)]
    assert [None if ids is None else ids.tolist() for ids in found] == [[7, 9, 300], [0, 1, 2, 7, 9, 300]]
    assert frequent_ids(rows, 0, VOCABULARY) is frequent_ids(rows, VOCABULARY, VOCABULARY) is None


Damage = Callable[[dict[str, Tensor]], None]


def twice(tensors: dict[str, Tensor]) -> None:
    tensors[STORED][1] = tensors[STORED][0]


def beyond(tensors: dict[str, Tensor]) -> None:
    tensors[STORED][-1] = VOCABULARY


def other_type(tensors: dict[str, Tensor]) -> None:
    tensors[STORED] = tensors[STORED].float()


def test_what_is_loaded_is_what_was_saved(exact: TransformersModel, tmp_path: Path) -> None:
    part = some(adapter(exact, 3, 0, 4, 24))
    adapter_folder.save(tmp_path, part, exact, "space", "tiny", {})
    found = adapter_folder.load(str(tmp_path), exact)
    assert found.vocabulary is not None
    assert torch.equal(found.vocabulary, IDS)
    assert part.drafting().vocabulary is not None


@pytest.mark.parametrize("damage", [twice, beyond, other_type])
def test_what_are_no_ids_of_the_model_is_refused(
    exact: TransformersModel, tmp_path: Path, damage: Damage
) -> None:
    adapter_folder.save(tmp_path, some(adapter(exact, 3)), exact, "space", "tiny", {})
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=STORED):
        adapter_folder.load(str(tmp_path), exact)
