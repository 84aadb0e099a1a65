"""Adapters on the decoder: mask rows say what the definitions say, with the same bits in every batch;
ordinary rows keep theirs; drafted is plain. Each planted fault is seen."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from selfdraft import LLM, Engine, Method, Request, SamplingParams, Tree
from selfdraft.drafting.auto import Auto
from selfdraft.drafting.bita import Bita
from selfdraft.drafting.jacobi import Jacobi
from selfdraft.drafting.llma import Llma
from selfdraft.drafting.method import Lookahead
from selfdraft.drafting.plain import Plain
from selfdraft.drafting.space import Space
from selfdraft.errors import AdapterError, InvalidTree
from selfdraft.models import batch, decoder, decoder_build, decoder_work
from selfdraft.models.adapters import folder as adapter_folder
from selfdraft.models.adapters import packed
from selfdraft.models.adapters.adapter import Adapter, merge
from selfdraft.models.adapters.fingerprint import fingerprint
from selfdraft.models.decoder import Decoder
from selfdraft.models.kernels import library as kernels
from selfdraft.models.kernels.library import FORMATS, WEIGHT_TYPES
from selfdraft.models.loading import load_pretrained
from selfdraft.models.protocol import PickMask
from selfdraft.models.transformers import MARK, TransformersModel
from selfdraft.models.weights import ModuleWeights

from adapting import Helped, MaskOracle, adapter, defined
from conftest import VOCABULARY, Run
from gguf_files import write_gguf
from runs import greedy, random_prompt, run, sampled
from test_decoder import BASE, CONFIGS, BlockWeights, build, distance, made, tree_at
from test_decoder import decoder as tiny

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
PARTS = {"embeddings": (0, 0, 0), "prefix": (20, 0, 0), "LoRA": (0, 5, 0), "all": (20, 5, 24)}
"""Slots of the prefix, rank of the LoRA, width of the sampler head."""
MASKS = range(VOCABULARY, VOCABULARY + 3)
Save = Callable[..., str]
WAYS = {"greedy": greedy(16), "sampled": sampled(0.8, 3, 16)}
PROMPT = random_prompt(30, seed=1)


@pytest.fixture(autouse=True)
def _whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler head corrects all tokens, as it is defined; a test asks what it does to a shortlist."""
    monkeypatch.setattr(decoder, "SHORTLIST", VOCABULARY)


def shortlisted(size: int, parts: str = "all") -> None:
    """The likeliest tokens without the sampler head have the logits that they have with it; others none."""
    own = tiny("f32")
    part = adapter(own, 3, *PARTS[parts], targets=ALL)
    adapted, ids = own.adapted(part), random_prompt(60, seed=1)
    bare = own.adapted(without_sampler(part))
    tree, group = Tree.chain(ids[40:41]).hang(0, MASKS), range(1, 4)
    given = (tree, ids[:40], group, ids[41:44])
    whole, raw = read_masks(adapted, *given), read_masks(bare, *given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "SHORTLIST", size)
        found = read_masks(adapted, *given)
    kept = raw.topk(size).indices
    torch.testing.assert_close(found.gather(1, kept), whole.gather(1, kept))
    assert (found.scatter(1, kept, -torch.inf) == -torch.inf).all()
    assert (found > -torch.inf).sum() == 3 * size


def without_sampler(part: Adapter) -> Adapter:
    bare = copy.deepcopy(part)
    bare.sampler, bare.config = None, replace(part.config, sampler=0)
    return bare


@pytest.mark.parametrize("size", [1, 2, 17, 64, 319])
def test_a_sampler_head_corrects_the_likeliest_tokens(size: int) -> None:
    shortlisted(size)


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
@pytest.mark.parametrize("name", kernels.builds())
def test_a_sampler_head_reads_every_format(name: str, kind: str) -> None:
    """One that changes nothing leaves the logits of the output layer. (Mutant: a plane of bits left out.)"""
    config = LlamaConfig(**{**BASE, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64})
    own = Decoder(config, BlockWeights(made(config), kind, kind), build(name), activations=16, threads=1)
    part = adapter(own, 3, sampler=8)
    assert part.sampler is not None
    part.sampler.outer.data.zero_()
    given = Tree.chain(PROMPT[:1]).hang(0, MASKS), [], range(1, 4), [7, 8, 9]
    with_it, bare = (read_masks(own.adapted(one), *given) for one in (part, without_sampler(part)))
    assert distance(with_it, bare) < (0.02 if kind == "BF16" else 0.001)


def test_a_shortlist_of_other_tokens_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    shortlist = kernels.Library.shortlist

    def of_the_least(self: kernels.Library, *given: Any) -> None:
        given[-2][:] *= -1  # the logits
        shortlist(self, *given)

    monkeypatch.setattr(kernels.Library, "shortlist", of_the_least)
    with pytest.raises(AssertionError):
        shortlisted(17)


def targets(model: Decoder) -> tuple[str, ...]:
    return FUSED if model.name == "phi3" else ALL


def told_next(previous: Sequence[int]) -> PickMask:
    """The sampler head sees these tokens, whatever the masks say."""
    return lambda request, offset, logits: previous[offset + 1]


def read_masks(
    model: Decoder, tree: Tree, text: Sequence[int], group: Sequence[int], previous: Sequence[int]
) -> Tensor:
    """Logits of a group of mask rows of a tree behind a text, whose tokens are `previous`."""
    cache = model.pool().open()
    if text:
        model.forward([Tree.chain(text)], [cache])
        cache.keep(range(len(text)), [])
    rows = model.forward([tree], [cache], wanted=[tree.ordinary(VOCABULARY)])
    return model.mask_logits(rows, [group], previous[:1], told_next(previous))[0]


def compare(model: PreTrainedModel, own: Decoder, part: Adapter) -> None:
    """A group under the last row of a chain, and one under a path of a bushy tree that has others, too."""
    reference, wide = copy.deepcopy(model).double(), copy.deepcopy(part).double()
    adapted, ids = own.adapted(part), random_prompt(60, seed=1)
    for at, tree, under in (
        (40, Tree.chain(ids[40:41]).hang(0, MASKS), 1),
        (40, tree_at(ids, 40).hang(3, MASKS).hang(4, MASKS).hang(0, MASKS[:1]), 3),
        (0, Tree.chain(ids[:1]).hang(0, MASKS), 1),
    ):
        start = tree.tokens.index(VOCABULARY) + (3 if under > 1 else 0)
        text, after = ids[: at + under], ids[at + under : at + under + 3]
        found = read_masks(adapted, tree, ids[:at], range(start, start + 3), after)
        expected = defined(reference, wide, text, after).float()
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_mask_rows_say_what_is_defined(name: str, parts: str) -> None:
    model = made(CONFIGS[name])
    own = Decoder(CONFIGS[name], ModuleWeights(model), build(), threads=2)
    compare(model, own, adapter(own, 3, *PARTS[parts], targets=targets(own)))


def test_one_embedding_and_a_long_prefix() -> None:
    """One embedding for all masks; more keys in the prefix than a partition of attention has."""
    model = made(CONFIGS["llama"])
    own = Decoder(CONFIGS["llama"], ModuleWeights(model), build(), threads=2)
    compare(model, own, adapter(own, 3, distinct=False))
    compare(model, own, adapter(own, 3, 300))


def prefix_late(patch: pytest.MonkeyPatch) -> None:
    """The prefix lacks its last slot."""
    make = packed.PackedAdapter._prefix

    def short(self: Any, *given: Any) -> None:
        make(self, *given)
        self.structure.prefix -= 1

    patch.setattr(packed.PackedAdapter, "_prefix", short)


def scale_left_out(patch: pytest.MonkeyPatch) -> None:
    make = packed.PackedAdapter._products
    patch.setattr(packed.PackedAdapter, "_products", lambda self, a, b, _, at: make(self, a, b, 1.0, at))


def masks_a_place_further(patch: pytest.MonkeyPatch) -> None:
    make = batch.Batch.__init__

    def shift(self: Any, *given: Any) -> None:
        make(self, *given)
        token, position = self._numbers[: 2 * self.rows].reshape(2, -1)
        position[token < 0] += 1

    patch.setattr(batch.Batch, "__init__", shift)


def outputs_of_the_first(patch: pytest.MonkeyPatch) -> None:
    """LoRA of keys and values is added to the queries."""
    make = packed.PackedAdapter._products
    patch.setattr(packed.PackedAdapter, "_products", lambda self, a, b, scale, _: make(self, a, b, scale, 0))


def mask_embeddings_not_scaled(patch: pytest.MonkeyPatch) -> None:
    sizes = decoder_build.Build.sizes
    patch.setattr(decoder_build.Build, "sizes", lambda *given: replace(sizes(*given), mask_scale=1.0))


@pytest.mark.parametrize(
    "fault",
    [
        prefix_late,
        scale_left_out,
        masks_a_place_further,
        outputs_of_the_first,
        mask_embeddings_not_scaled,
    ],
)
def test_a_wrong_mask_row_is_seen(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test_mask_rows_say_what_is_defined("granite", "all")


def poisoned(own: Adapter, poison: str) -> Adapter:
    """With what is not a number among the parameters of that name."""
    for name, part in own.named_parameters():
        if poison and name.startswith(poison):
            part.data.view(-1)[::7] = torch.nan
            part.data.view(-1)[1::7] = torch.inf
    return own


def ordinary(model: Decoder) -> list[Tensor]:
    """Logits of ordinary rows, step after step, in a batch; with an adapter's masks beside them."""
    pool, found, ids = model.pool(), list[Tensor](), random_prompt(400, seed=2)
    caches = [pool.open() for _ in range(3)]
    for at in (0, 7, 270):
        steps = [tree_at(ids, at), Tree.chain(ids[at : at + 4]), tree_at(ids, at + 1)]
        trees = steps
        if model.lookahead is not None:
            trees = [tree.hang(0, MASKS).hang(len(tree) - 1, MASKS).hang(1, MASKS[:1]) for tree in steps]
        rows = model.forward(trees, caches, wanted=[len(tree) for tree in steps])
        found += [one.clone() for one in model.head(rows, [range(len(tree)) for tree in steps])]
        for cache in caches:
            cache.keep([0, 1], [])
            model.forward([Tree.chain(ids[:200])], [cache])
            cache.keep(range(200), [])
    return found


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8", "q4"])
@pytest.mark.parametrize("name", kernels.builds())
def test_ordinary_rows_keep_their_bits(name: str, kind: str) -> None:
    own = tiny(kind, build(name), threads=2)
    right = ordinary(own)
    poisons = ["masks", "keys", "values", "lora"] if name == kernels.builds()[0] else []
    for poison in ["", *poisons]:
        part = poisoned(adapter(own, 3, *PARTS["all"], targets=ALL), poison)
        for mine, theirs in zip(ordinary(own.adapted(part)), right, strict=True):
            assert torch.equal(mine, theirs), poison


def test_ordinary_rows_taken_for_mask_rows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    make = batch.Batch.__init__

    def all_masks(self: Any, trees: Any, caches: Any, wanted: Any, block: int, size: int, masks: int) -> None:
        make(self, trees, caches, wanted, block, size, masks)
        if masks:
            self._numbers[: self.rows] = -1

    monkeypatch.setattr(batch.Batch, "__init__", all_masks)
    with pytest.raises(AssertionError):
        test_ordinary_rows_keep_their_bits(kernels.builds()[0], "f32")


@pytest.mark.parametrize("kind", ["f32", "bf16", "q4"])
@pytest.mark.parametrize("name", kernels.builds())
def test_bits_of_mask_rows_depend_on_their_own_keys(name: str, kind: str) -> None:
    """Threads, other groups in the tree, other requests, a history that is shared out: the same bits."""
    ids, dice = random_prompt(600, seed=2), random.Random(0)
    for at in (3, 255, 530) if name == kernels.builds()[0] else (300,):
        found = []
        for threads in (1, 2, 5):
            own = tiny(kind, build(name), threads)
            adapted = own.adapted(adapter(own, 3, *PARTS["all"], targets=ALL))
            alone = Tree.chain(ids[at : at + 3]).hang(2, MASKS)
            after = ids[at + 3 : at + 6]
            found.append(read_masks(adapted, alone, ids[:at], range(3, 6), after))
            bushy = tree_at(ids, at).hang(4, MASKS).hang(1, MASKS).hang(2, MASKS)
            found.append(read_masks(adapted, bushy, ids[:at], range(7, 10), after))
            pool, caches = adapted.pool(), []
            for _ in range(3):
                cache = pool.open()
                cache.reserve(dice.randint(1, 90))
                adapted.forward([Tree.chain(ids[:at])], [cache])
                cache.keep(range(at), [])
                caches.append(cache)
            trees = [alone, Tree.chain(ids[at : at + 2]), bushy]
            rows = adapted.forward(trees, caches, wanted=[3, 2, 7])
            told = [after[0], 0, after[0]]
            groups = [range(3, 6), range(0), range(7, 10)]
            one, none, other = adapted.mask_logits(rows, groups, told, told_next(after))
            assert none.shape == (0, VOCABULARY)
            found += [one, other]
        for logits in found[1:]:
            assert torch.equal(logits, found[0]), at


def methods(answer: Sequence[int]) -> Iterator[Method]:
    for method in (Bita(block=40), Bita(faithful=True), Space(), Space(faithful=True)):
        yield Helped(method, answer)
    yield from (MaskOracle(answer), Bita(), Auto(), Llma(trigger=1, block=8), Jacobi(6), Plain())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["f32", "bf16", "q4"])
def test_drafted_is_plain(kind: str, way: str) -> None:
    """Alone, and all methods at once, of several lengths; they join and leave."""
    own = tiny(kind)
    adapted, dice = own.adapted(adapter(own, 3, *PARTS["all"], targets=ALL)), random.Random(0)
    waiting: list[tuple[Sequence[int], Method, SamplingParams]] = []
    alone = []
    for seed in range(10):
        prompt, params = random_prompt(dice.randint(1, 70), seed), WAYS[way]
        alone.append(run(own, Plain(), prompt, params).emitted)
        method = list(methods(alone[-1]))[seed]
        drafted = run(adapted, method, prompt, params)
        assert drafted.emitted == alone[-1], method
        if seed < 5:
            assert len(drafted.runs) < 13, f"{method}: right candidates must be accepted"
        waiting.append((prompt, list(methods(alone[-1]))[seed], params))
    engine, joined = Engine(adapted), list[Request]()
    while waiting or engine.requests:
        while waiting and len(engine.requests) < 4:
            joined.append(engine.submit(*waiting.pop(0)))
        engine.step()
    assert [request.emitted for request in joined] == alone


def drafters_see_the_picks() -> None:
    """The scores of a step stay what they were when the masks are read."""
    own = tiny("f32")
    adapted = own.adapted(adapter(own, 3, *PARTS["all"], targets=ALL))
    plain = run(own, Plain(), PROMPT, greedy(30)).emitted
    oracle, compared = MaskOracle(plain), 0
    engine = Engine(adapted)
    engine.submit(PROMPT, oracle, greedy(30))
    while engine.requests:
        engine.step()
        if oracle.observed and oracle.observed[-1].step.mask_scores is not None:
            step = oracle.observed[-1].step
            assert step.scores.argmax(-1).tolist() == list(step.picks)
            compared += 1
    assert compared > 3


def test_drafters_see_the_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    drafters_see_the_picks()
    monkeypatch.setattr(
        decoder_work.Work, "reading", lambda self, rows, ids: (self.structure, self.logits[:rows])
    )
    with pytest.raises(AssertionError):
        drafters_see_the_picks()


def test_adapters_work_side_by_side() -> None:
    """On one model, each on requests of its own, the model itself too."""
    own = tiny("q4")
    one, other = (own.adapted(adapter(own, 2 + seed, 16 * seed, 4, 8, seed)) for seed in range(2))
    tree = Tree.chain(PROMPT[:3]).hang(2, MASKS[:2])
    first = [read_masks(model, tree, [], range(3, 5), [7, 8]) for model in (one, other)]
    again = [read_masks(model, tree, [], range(3, 5), [7, 8]) for model in (one, other)]
    assert not torch.equal(*first)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InvalidTree, match=r"from 0 to 319$"):
        read_masks(own, tree, [], range(3, 5), [7, 8])
    with pytest.raises(InvalidTree, match="from 0 to 321, mask tokens included: 2"):
        read_masks(one, Tree.chain([5]).hang(0, [VOCABULARY + 2]), [], [1], [7])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_merged_weights_are_those_of_the_other_way(kind: str) -> None:
    """LoRA that tunes the model: with weights of 16 bits, too, the sums are rounded to the same bits."""
    config = LlamaConfig(**BASE)
    model = made(config).to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
    own = Decoder(config, BlockWeights(model, kind, kind), build(), threads=2)
    part = adapter(own, 3, *PARTS["all"], targets=ALL, gated=False)
    tuned = own.adapted(part)
    theirs = Decoder(config, BlockWeights(merge(model, part), kind, kind), build(), threads=2)
    assert (tuned.grade, tuned.base.grade, own.grade) == ("tuned", "tuned", "base")
    assert (tuned.loaded, own.adapter, tuned.base.adapter) == (own, None, None)
    assert tuned.lookahead is not None
    assert tuned.base.lookahead is None, "plain decoding of the tuned model has no mask tokens"
    for mine, other in zip(tuned._built.arrays.values(), theirs._built.arrays.values(), strict=True):
        assert (mine == other).all()
    plain = run(tuned.base, Plain(), PROMPT, greedy(16)).emitted
    assert plain != run(own, Plain(), PROMPT, greedy(16)).emitted
    for method in methods(plain):
        assert run(tuned, method, PROMPT, greedy(16)).emitted == plain, method


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_1"])
def test_few_bits_are_merged_in_eight(kind: str) -> None:
    """The sum, not yet rounded, to be packed in 8 bits unless another format is asked for."""
    config = LlamaConfig(**BASE)
    stored = BlockWeights(made(config), kind)
    own = Decoder(config, stored, build(), threads=1, activations=16)
    part = adapter(own, 0, rank=4, gated=False)
    name = "model.layers.1.self_attn.q_proj"
    low: Any = part.lora[part.names.index(name)]
    expected = stored.linear(f"{name}.weight").float32() + (part.config.scale * low.b @ low.a).numpy()
    tuned = packed.TunedWeights(stored, part, own._built.places)
    found = tuned.linear(f"{name}.weight")
    assert found.format == "q8"
    np.testing.assert_allclose(found.float32(), expected, atol=1e-5)
    assert tuned.linear("model.layers.1.self_attn.k_proj.weight").format == WEIGHT_TYPES[kind].format
    assert tuned.label == ("float32" if kind == "Q8_0" else "float32, tuned layers in 8 bits")
    adapted = own.adapted(part)
    assert adapted.weights_label == f"{tuned.label}, 16-bit activations"
    before, after = own._built.packed, adapted._built.packed
    kept = [names for names in before if not tuned.changes(names)]
    assert [names for names, out in after.items() if out is before.get(names)] == kept
    assert 0 < len(kept) < len(before)
    asked = Decoder(config, stored, build(), kind="q4", activations=16).adapted(part)
    assert asked.weights_label == "q4, 16-bit activations"
    for model, format in ((adapted, "q8"), (asked, "q4")):
        place = own._built.places[name]
        assert model._built.model.layers[place.layer].qkv[place.product].format == FORMATS[format]


def test_what_has_no_place_is_refused() -> None:
    own = tiny("q4")
    part = adapter(own, 3, rank=4)
    part.names[0] = "model.layers.9.mlp.down_proj"
    with pytest.raises(AdapterError, match=r"layers\.9\.mlp\.down_proj, which the model has not"):
        own.adapted(part)
    with pytest.raises(AdapterError, match="llama has no linear layer experts"):
        own.adapter_shape(["experts"])
    with pytest.raises(AdapterError, match="sampler head is 70000 wide"):
        own.adapted(adapter(own, 3, sampler=70_000))


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Save:
    """Saves a random adapter of the saved model."""
    model = LLM(str(folder), "plain").model

    def save(name: str, parts: tuple[int, int, int, int], gated: bool = True) -> str:
        made = adapter(model, *parts, targets=ALL, gated=gated)
        adapter_folder.save(tmp_path / name, made, model, name, str(folder), {})
        return str(tmp_path / name)

    return save


@pytest.mark.usefixtures("with_kernels")
def test_adapters_go_the_way_of_the_model(folder: Path, saved: Save, command: Run) -> None:
    bita, space = saved("bita", (3, 16, 0, 8)), saved("space", (3, 0, 4, 0))
    cllm = saved("cllm", (0, 0, 4, 0), gated=False)
    llm = LLM(str(folder), "bita", adapter=bita)
    assert llm.route.startswith("decoder")
    plain = LLM(str(folder), "plain").generate("def add(", max_new_tokens=12)
    for one in (llm, llm.using("space", adapter=space), llm.using("bita"), llm.using("plain")):
        answer = one.generate("def add(", max_new_tokens=12)
        assert one.route.startswith("decoder")
        assert (answer.ids, answer.grade, answer.weights) == (plain.ids, "base", "bfloat16")
    tuned = llm.using("jacobi", adapter=cllm)
    answer = tuned.generate("def add(", max_new_tokens=12)
    assert (tuned.route, answer.grade) == (llm.route, "tuned")
    assert answer.ids != plain.ids
    assert tuned.using("plain").generate("def add(", max_new_tokens=12).ids == answer.ids
    with pytest.raises(AdapterError, match="no mask tokens"):
        llm.using("bita", adapter=cllm)
    words = ("--model", str(folder), "--method", "bita", "--adapter", bita, "-n", "8", "--seeds", "1")
    code, said, err = command("verify", *words)
    assert code == 0, err
    assert "exact" in said.splitlines()[-1]
    code, said, err = command("info", str(folder), "--adapter", cllm, "--json")
    assert code == 0, err
    assert '"runs on": "decoder' in said
    assert '"text with the adapter of": "tuned weights"' in said


@pytest.mark.usefixtures("with_kernels")
def test_a_fingerprint_needs_no_loading(folder: Path) -> None:
    model, _ = load_pretrained(str(folder))
    assert LLM(str(folder), "plain").model.fingerprint() == fingerprint(model)
    for name in ("llama", "llama, tied", "gemma3", "phi3"):
        model = made(CONFIGS[name])
        own = Decoder(model.config, ModuleWeights(model), build(), threads=1)
        assert own.fingerprint() == fingerprint(model), name
        changed = copy.deepcopy(model)
        changed.model.layers[1].mlp.down_proj.weight.data[5, 3] *= 1.01
        assert Decoder(model.config, ModuleWeights(changed), build()).fingerprint() != fingerprint(model)


@pytest.mark.usefixtures("with_kernels")
def test_an_adapter_of_a_gguf_file_goes_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is bound to the weights that transformers loads of the file, whatever the decoder makes of them."""
    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "a.gguf", quantise=gguf.GGMLQuantizationType.Q4_1, head=32)
    model = TransformersModel(load_pretrained(str(file))[0])
    for name, gated in (("space", True), ("cllm", False)):
        made = adapter(model, 3 * gated, 0, 4, gated=gated)
        adapter_folder.save(tmp_path / name, made, model, name, "tiny", {})
    plain = LLM(str(file), "plain")
    space = plain.using("space", adapter=str(tmp_path / "space"))
    tuned = plain.using("jacobi", adapter=str(tmp_path / "cllm"))
    assert all(one.route.startswith("decoder") for one in (plain, space, tuned))
    prompt = random_prompt(30, 1, vocabulary=260)
    ids = [one.generate(prompt, max_new_tokens=12).ids for one in (plain, space, tuned, tuned.using("plain"))]
    assert ids[0] == ids[1]
    assert ids[2] == ids[3]
    assert tuned.model.weights_label == "Q4_1, tuned layers in 8 bits, 8-bit activations"
    assert LLM(str(file), "plain", weights="q8").using("space", adapter=str(tmp_path / "space"))


def test_weights_that_were_tuned_as_a_whole_are_told() -> None:
    config = LlamaConfig(**BASE)
    setattr(config, MARK, {"method": "cllm", "filler": 7, "odds": {"first": [[0.5]]}})
    own = Decoder(config, ModuleWeights(made(config)), build())
    assert own.grade == "tuned"
    assert own.lookahead == Lookahead((), {"first": [[0.5]]}, 7)
