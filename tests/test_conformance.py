"""Every type of model that works gives, for every branch of a tree, the logits of its own forward.

The reference is transformers' own forward without cache, mask or attention of ours. Histories are longer
than two and a half windows and read in pieces, two requests of different lengths run together, and the
rows of an accepted branch are kept and built upon. Each planted fault is refused when a model is loaded.
Every commit runs a few types, `make conformance` runs all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from selfdraft import SamplingParams, Tree
from selfdraft.drafting.bita import Bita
from selfdraft.drafting.plain import Plain
from selfdraft.errors import AdapterError, ModelUnsupported
from selfdraft.models import transformers_inputs
from selfdraft.models.adapters.adapter import AdapterConfig
from selfdraft.models.loading import drive
from selfdraft.models.transformers import TransformersModel
from selfdraft.train.student import Loss, Student, fresh
from selfdraft.verify.adversaries import Oracle

import faults
from adapting import Helped
from architectures import REFUSED, WORKING, build, known
from models_page import PAGE, page
from runs import random_prompt, run

TREES = (
    Tree(tuple(random_prompt(12, 3)), (-1, 0, 0, 1, 1, 2, 3, 0, 7, 3, 4, 10)),
    Tree(tuple(random_prompt(5, 4)), (-1, 0, 1, 0, 3)),
)
KEPT = ((0, 1, 4, 10, 11), (0, 3, 4))  # a branch of each tree whose rows lie apart
HISTORIES = (random_prompt(30, 1), random_prompt(21, 2))
AFTER = Tree.chain(random_prompt(4, 5))
PIECE = 11  # tokens of a history that are read at once
NEW = 6  # tokens of a text
SHORT = SamplingParams(max_new_tokens=NEW)
SAMPLE = ("llama", "gpt2", "gpt_oss", "gemma2", "llama4_text", "deepseek_v3", "opt", "falcon", "gptj")
# What every commit runs; the others are marked `conformance`. Among these are biases, norms of queries and
# keys, windows, capped scores, fused projections, learned positions and routed experts; and a refusal of each
# kind.
PER_COMMIT = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "mixtral"),
    *("mamba", "mpt", "bloom"),
}
WINDOWED = [
    *("afmoe", "cohere2", "exaone4", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss"),
    *("llama4_text", "mimo_v2_flash", "mistral", "mixtral", "modernbert-decoder", "olmo3", "phi3"),
    *("qwen2", "qwen3_moe", "starcoder2"),
]


def types(names: Sequence[str]) -> pytest.MarkDecorator:
    """A test for each type that the transformers at hand has: few of them with every commit."""
    missing = pytest.mark.skip(reason="not in this transformers")

    def marks(name: str) -> list[pytest.MarkDecorator]:
        nightly = [] if name in PER_COMMIT else [pytest.mark.conformance]
        return nightly if known(name) else [*nightly, missing]

    return pytest.mark.parametrize("kind", [pytest.param(name, marks=marks(name)) for name in names])


@torch.inference_mode()
def own(model: PreTrainedModel, text: Sequence[int]) -> Tensor:
    """Logits of the model's own forward, [tokens, vocabulary]."""
    logits: Tensor = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    return logits.double()


def branches(tree: Tree) -> list[list[int]]:
    leaves = sorted(set(range(len(tree))) - set(tree.parents))
    return [tree.visible[leaf].nonzero().flatten().tolist() for leaf in leaves]


def reference(model: PreTrainedModel, history: list[int], tree: Tree, kept: Sequence[int]) -> Tensor:
    """Logits of all rows of a tree behind a history, then of AFTER behind the kept branch."""
    logits = torch.full((len(tree), model.config.get_text_config().vocab_size), torch.nan).double()
    for branch in branches(tree):
        logits[branch] = own(model, [*history, *(tree.tokens[row] for row in branch)])[len(history) :]
    text = [*history, *(tree.tokens[row] for row in kept)]
    return torch.cat([logits, own(model, [*text, *AFTER.tokens])[len(text) :]])


@torch.inference_mode()
def ours(model: TransformersModel) -> list[Tensor]:
    """The same of both requests, run together."""
    pool = model.pool()
    caches = [pool.open(), pool.open()]
    for cache, history in zip(caches, HISTORIES, strict=True):
        for start in range(0, len(history), PIECE):
            chunk = history[start : start + PIECE]
            model.forward([Tree.chain(chunk)], [cache])
            cache.keep(range(len(chunk)), [])
    first = model.head(model.forward(TREES, caches), [range(len(tree)) for tree in TREES])
    for cache, path in zip(caches, KEPT, strict=True):
        cache.keep(path, [])
    then = model.head(model.forward([AFTER] * 2, caches), [range(len(AFTER))] * 2)
    return [torch.cat(pair).double() for pair in zip(first, then, strict=True)]


def greedy(model: PreTrainedModel, text: Sequence[int]) -> list[int]:
    text = list(text)
    for _ in range(NEW):
        text.append(int(own(model, text)[-1].argmax()))
    return text[-NEW:]


@types(list(WORKING))
def test_trees_have_the_logits_of_the_models_own_forward(kind: str) -> None:
    model = build(kind, WORKING[kind])
    wanted = [reference(model, *case) for case in zip(HISTORIES, TREES, KEPT, strict=True)]
    text = greedy(model, HISTORIES[1])
    wrapped = drive(model, "fast")
    tolerance = 2e-5 if model.dtype == torch.float64 else 1e-4
    for got, logits in zip(ours(wrapped), wanted, strict=True):
        error = (got - logits).norm(dim=-1) / logits.norm(dim=-1)
        assert error.max() <= tolerance
    assert run(wrapped, Plain(), HISTORIES[1], SHORT).emitted == text


@types(list(REFUSED))
def test_what_cannot_verify_a_tree_is_refused_by_name(kind: str) -> None:
    reason, extra = REFUSED[kind]
    with pytest.raises(ModelUnsupported, match=f"model type '{kind}'.*{reason}"):
        TransformersModel(build(kind, extra), "fast")


def mask_states(model: TransformersModel, text: Sequence[int], masks: int) -> Tensor:
    """Hidden states of a group of masks under the last row of a text, as decoding comes to them."""
    ids, cache = range(model.vocab_size, model.vocab_size + masks), model.pool().open()
    model.forward([Tree.chain(text[:-1])], [cache])
    cache.keep(range(len(text) - 1), [])
    return model.forward([Tree.chain(text[-1:]).hang(0, ids)], [cache]).hidden[1:]


@types(list(WORKING))
def test_adapters_learn_and_draft(kind: str) -> None:
    """One step of training: each part of an adapter learns, its masks say the same in decoding, and a text
    drafted with it is the model's own."""
    config = AdapterConfig(masks=2, prefix=4, rank=4, sampler=8)
    model = drive(build(kind, WORKING[kind]).requires_grad_(False), "fast")
    plain = run(model, Plain(), HISTORIES[1], SHORT).emitted
    student = Student(model, fresh(model, config), Loss())
    texts = torch.tensor([[*HISTORIES[1], *plain], [*HISTORIES[0][:21], *plain]])
    labels = torch.zeros(2, 2, config.masks, dtype=torch.long)
    loss = student(texts, torch.tensor([[22, 5], [9, 20]]), labels)["loss"]
    loss.backward()
    assert loss.isfinite()
    learned = set()
    for name, part in student.adapter.named_parameters():
        assert part.grad is not None, name
        assert part.grad.isfinite().all(), name
        if name.endswith(".b") and part.grad.any():
            learned.add(student.adapter.names[int(name.split(".")[1])].split(".")[-1])
        elif not name.startswith(("lora", "sampler.inner")):  # behind zeros as yet
            assert part.grad.any(), name
        part.data -= 0.5 * part.grad.sign()  # far from what it was
    assert learned == set(student.adapter.config.targets)
    trained = student.hidden(texts, torch.tensor([[20]] * 2))[1].detach()
    for text, right in zip(texts.tolist(), trained, strict=True):
        error = (mask_states(student.model, text[:21], config.masks) - right).norm(dim=-1) / right.norm(
            dim=-1
        )
        assert error.max() <= (2e-5 if model.dtype == torch.float64 else 1e-4)
    drafted = run(student.model, Helped(Bita(faithful=True, width=2), plain), HISTORIES[1], SHORT)
    assert drafted.emitted == plain
    assert len(drafted.runs) < NEW


@types(["llama4_text", "phimoe", "longcat_flash"])
def test_lora_on_routers_of_their_own_kind_is_refused(kind: str) -> None:
    name = {"longcat_flash": "classifier"}.get(kind, "router")
    model = TransformersModel(build(kind, WORKING[kind]), "fast")
    with pytest.raises(AdapterError, match=f"{name} does not run on the rows of a text"):
        fresh(model, AdapterConfig(rank=4, targets=(name,)))


def whole_text(patch: pytest.MonkeyPatch) -> None:
    """One mask for all layers."""
    faults.replace_function(
        patch, transformers_inputs.kind_masks, lambda kinds, seen, *_: dict.fromkeys(kinds, seen)
    )


def one_more(patch: pytest.MonkeyPatch) -> None:
    """Windows and chunks of one token more."""
    kinds = transformers_inputs.layer_kinds

    def wider(*args: Any) -> Mapping[str, transformers_inputs.LayerKind]:
        return {name: widen(kind) for name, kind in kinds(*args).items()}

    def widen(kind: transformers_inputs.LayerKind) -> transformers_inputs.LayerKind:
        size = kind.size or 0
        return replace(kind, rule=lambda lane, head, q, k: kind.rule(lane, head, q, k) | (k == q - size))

    faults.replace_function(patch, kinds, wider)


@types(WINDOWED)
@pytest.mark.parametrize("fault", [whole_text, one_more])
def test_wrong_windows_are_seen_at_load(
    kind: str, fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(ModelUnsupported, match="does not verify a tree"):
        TransformersModel(build(kind, WORKING[kind]), "fast")


@types(SAMPLE)
@pytest.mark.parametrize("fault", [faults.tree_mask, faults.positions])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_wrong_trees_are_seen_at_load(
    kind: str, fault: faults.Patch, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(ModelUnsupported, match="does not verify a tree"):
        TransformersModel(build(kind, WORKING[kind], dtype), "fast")


@types(["cohere2", "gemma2", "mistral", "gpt_oss"])
def test_exact_texts_over_windows(kind: str) -> None:
    """The drafted text is the plain one to the bit, far behind the first window."""
    try:
        model = TransformersModel(build(kind, WORKING[kind], torch.bfloat16), "exact")
    except ModelUnsupported as error:
        pytest.skip(str(error))  # of this machine's kernels, not of the windows
    plain = run(model, Plain(), HISTORIES[0]).emitted
    drafted = run(model, Oracle(plain), HISTORIES[0])
    assert drafted.emitted == plain
    assert len(drafted.runs) < len(plain)


@pytest.mark.conformance
@pytest.mark.skipif(
    PAGE.exists() and f"transformers {transformers.__version__}." not in PAGE.read_text(),
    reason="the page is for another transformers",
)
def test_the_page_says_what_is_measured() -> None:
    assert PAGE.read_text() == page()
