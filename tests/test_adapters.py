"""Adapters: the text stays the base model's, ordinary rows keep their bits, mask rows say what they were
trained to say, whoever else is in the engine. Each planted fault is seen."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from selfdraft import Engine, Method, Request, SamplingParams, Tree
from selfdraft.drafting.auto import Auto
from selfdraft.drafting.bita import Bita
from selfdraft.drafting.jacobi import Jacobi
from selfdraft.drafting.llma import Llma
from selfdraft.drafting.plain import Plain
from selfdraft.drafting.space import Space
from selfdraft.errors import AdapterError, InvalidPrompt, InvalidReference, InvalidTree
from selfdraft.models.adapters.adapter import Adapter, all_targets, linear_layers
from selfdraft.models.transformers import TransformersModel
from selfdraft.sampling.gumbel import Noise
from selfdraft.train.student import Loss, Student

import faults
from adapting import Helped, MaskOracle, Observed, adapter, defined
from architectures import WORKING, build
from conftest import VOCABULARY, tiny_llama
from runs import greedy, random_prompt, run, sampled

PARTS = [
    (0, 0, 0),
    (16, 0, 32),
    (0, 4, 0),
    (16, 4, 32),
]  # prefix, rank of the LoRA, width of the sampler head
SHAPES: Mapping[str, Method] = {
    "bita": Bita(block=40),
    "upper-triangle": Bita(faithful=True),
    "half": Bita(faithful=True, tree="half", width=3),
    "full": Bita(faithful=True, tree="full", width=2),
    "space": Space(),
    "faithful": Space(faithful=True),
}
WAYS = {"greedy": greedy(16), "sampled": sampled(0.8, 3, 16)}
PROMPT = random_prompt(30, seed=1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("model", "parts"), [*(("exact", parts) for parts in PARTS), ("double", PARTS[-1])], ids=str
)
def test_text_is_that_of_the_base(
    model: str, parts: tuple[int, ...], way: str, request: pytest.FixtureRequest
) -> None:
    base: TransformersModel = request.getfixturevalue(model)
    adapted, params = base.adapted(adapter(base, 3, *parts)), WAYS[way]
    plain = run(base, Plain(), PROMPT, params).emitted
    assert run(adapted, Plain(), PROMPT, params).emitted == plain
    for name, method in SHAPES.items():
        drafted = run(adapted, Helped(method, plain), PROMPT, params)
        assert drafted.emitted == plain, name
        assert len(drafted.runs) < 13, f"{name}: right candidates must be accepted"
        short = replace(params, max_new_tokens=5)
        assert run(adapted, method, PROMPT, short).emitted == plain[:5], name


@pytest.mark.parametrize("model", ["exact", "double"])
def test_batch_is_single(model: str, request: pytest.FixtureRequest) -> None:
    """All methods at once, with or without masks, of several lengths; they join and leave, four live."""
    base: TransformersModel = request.getfixturevalue(model)
    adapted = base.adapted(adapter(base, 3, *PARTS[-1]))
    dice = random.Random(0)
    waiting: list[tuple[Sequence[int], Method, SamplingParams]] = []
    alone = []
    for seed in range(12):
        prompt = random_prompt(dice.randint(1, 70), seed)
        params = replace(WAYS["sampled" if seed % 2 else "greedy"], max_new_tokens=dice.randint(1, 24))
        alone.append(run(base, Plain(), prompt, params).emitted)
        drafts = [Helped(method, alone[-1]) for method in SHAPES.values()]
        methods = [
            *drafts,
            Plain(),
            Llma(trigger=1, block=8),
            Jacobi(6),
            MaskOracle(alone[-1]),
            Auto(),
            Space(),
        ]
        waiting.append((prompt, methods[seed], params))
    engine, joined = Engine(adapted), list[Request]()
    while waiting or engine.requests:
        while waiting and len(engine.requests) < 4:
            joined.append(engine.submit(*waiting.pop(0)))
        engine.step()
    assert [request.emitted for request in joined] == alone


def test_whatever_a_request_asks_for(double: TransformersModel) -> None:
    """Penalties, bias, bans and ends hold for the masks' candidates as they do for picks."""
    adapted = double.adapted(adapter(double, 3, *PARTS[-1]))
    bias = {50: 9.0, 51: 8.0, 52: 8.0, 3: 9.0, 60: -torch.inf}
    for seed in range(4):
        biased = bias if seed < 2 else {60: 5.0}
        params = SamplingParams(
            max_new_tokens=20,
            min_new_tokens=9,
            temperature=0.8 * (seed % 2),
            repetition_penalty=1.4,
            presence_penalty=0.5,
            frequency_penalty=0.8,
            logit_bias=biased,
            eos=tuple(range(40)),
            seed=seed,
        )
        plain = run(double, Plain(), PROMPT, params)
        assert len(plain.emitted) > 9
        oracle = MaskOracle(plain.emitted)
        for method in (oracle, Helped(Bita(), plain.emitted), Space(faithful=True), Bita()):
            drafted = run(adapted, method, PROMPT, params)
            assert (drafted.emitted, drafted.finish_reason) == (plain.emitted, plain.finish_reason)
        for one in oracle.observed[:-1]:
            if one.step.mask_scores is not None:
                early = [len(one.text) + i < len(PROMPT) + 9 for i in range(one.group)]
                assert (one.step.mask_scores[:, :40] == -torch.inf).all(-1).tolist() == early
                assert seed > 1 or bool((one.step.mask_scores[:, 60] == -torch.inf).all())


def trained_logits(model: TransformersModel, observed: Sequence[Observed]) -> list[Tensor]:
    """Logits of a group in training under the row before the last of each text, [texts][masks, :]. The texts
    are the beginnings of the last one; the sampler head sees the prediction of the mask before."""
    assert model.adapter is not None
    anchors = torch.tensor([[len(one.text) - 2 for one in observed]])
    student = Student(model.base, model.adapter, Loss())
    _, hidden = student.hidden(torch.tensor([observed[-1].text]), anchors)
    found = []
    for one, group in zip(observed, hidden[0].split(model.adapter.config.masks), strict=True):
        if one.step.mask_scores is not None:
            before = torch.tensor([one.text[-1], *one.step.mask_scores.argmax(-1)[:-1]])
            group = model.apply_sampler_head(group[: one.group], before)
        found.append(model.output(group))
    return found


# How many requests live, at most, when one joins; does it start from another's cache?
JOINS = [
    (9, False),
    (9, False),
    (9, True),
    (9, False),
    (1, False),
    (1, True),
    (2, False),
    (3, False),
    (2, True),
]


def crowd(adapted: TransformersModel, params: SamplingParams) -> None:
    """Requests that join and leave, some from another's cache: their texts are the base's, and the masks'
    logits, at rows anywhere in a tree, are those of a group under that text in training."""
    base, dice = adapted.base, random.Random(1)
    engine, requests = Engine(adapted), list[tuple[Request, MaskOracle, Sequence[int]]]()
    for seed, (live, copied) in enumerate(JOINS):
        while len(engine.requests) > live:
            engine.step()
        prompt = random_prompt(dice.randint(2, 50), seed)
        if copied:
            prompt = [*engine.requests[0].tokens, *prompt[:2]]
        params = replace(params, max_new_tokens=dice.randint(14, 24))
        plain = run(base, Plain(), prompt, params).emitted
        oracle = MaskOracle(plain)
        requests.append((engine.submit(prompt, oracle, params), oracle, plain))
        engine.step()
    while engine.requests:
        engine.step()
    assert sum(request.reused > 0 for request, *_ in requests) > 2
    for request, oracle, plain in requests:
        assert request.emitted == plain
        assert oracle.observed[-1].step.mask_scores is None, "the text has ended"
        compare(adapted, oracle.observed[:-1], params)


def compare(adapted: TransformersModel, observed: Sequence[Observed], params: SamplingParams) -> None:
    noise = Noise(params.seed or 0)
    for one in observed:
        assert (0 if one.step.mask_scores is None else len(one.step.mask_scores)) == one.group
    for one, group in zip(observed, trained_logits(adapted, observed) if observed else (), strict=True):
        if one.step.mask_scores is not None:
            at = range(len(one.text), len(one.text) + one.group)
            scores = group + params.temperature * noise.at(at, VOCABULARY, adapted.device)
            torch.testing.assert_close(one.step.mask_scores, scores, atol=1e-4, rtol=1e-4)


def calibrated_as_decoded(base: TransformersModel) -> None:
    """The logits that calibration counts are those that a greedy drafter observes."""
    own = adapter(base, 3, *PARTS[-1])
    oracle = MaskOracle(run(base, Plain(), PROMPT, greedy(30)).emitted)
    run(base.adapted(own), oracle, PROMPT, greedy(30))
    texts = [one.text for one in oracle.observed]
    anchors = torch.tensor([[len(text) - 2 for text in texts]])
    found = Student(base, own, Loss()).as_decoded(torch.tensor([texts[-1]]), anchors)
    seen = 0
    for one, group in zip(oracle.observed, found.split(3), strict=True):
        if one.step.mask_scores is not None:
            torch.testing.assert_close(one.step.mask_scores.float(), group[: one.group], atol=1e-4, rtol=1e-4)
            seen += one.group
    assert seen > 10


def test_calibration_sees_what_decoding_sees(double: TransformersModel) -> None:
    calibrated_as_decoded(double)


def test_a_calibration_that_is_told_the_truth_is_seen(
    double: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Student, "as_decoded", lambda self, *given: self.scores(*given)[0].detach())
    with pytest.raises(AssertionError):
        calibrated_as_decoded(double)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_decoding_sees_what_training_saw(double: TransformersModel, parts: tuple[int, ...], way: str) -> None:
    crowd(double.adapted(adapter(double, 3, *parts)), WAYS[way])


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_windows_hide_the_text_but_not_the_prefix(kind: str) -> None:
    model = TransformersModel(build(kind, WORKING[kind]), "fast")
    crowd(model.adapted(adapter(model, 3, *PARTS[-1])), greedy())


def trained(kind: str, *parts: int, distinct: bool = True) -> None:
    """What a group says in training is what the definitions say, at any row of a text in a batch; what it
    learns from is what the model itself says at the rows after that."""
    model, plain = TransformersModel(build(kind, WORKING[kind]), "fast"), build(kind, WORKING[kind])
    own = adapter(model, 3, *parts, distinct=distinct)
    texts = torch.tensor([random_prompt(30, seed) for seed in range(2)])
    anchors = torch.tensor([[2, 26, 11], [20, 0, 15]])
    with torch.no_grad():
        scores, aims = Student(model, own, Loss()).scores(texts, anchors)
        logits = [plain(input_ids=text[None]).logits[0].float() for text in texts]
    groups = iter(zip(scores.split(3), aims.split(3), strict=True))
    for text, rows, known in zip(texts.tolist(), anchors.tolist(), logits, strict=True):
        for row in rows:
            group, aim = next(groups)
            true = defined(plain, own, text[: row + 1], text[row + 1 : row + 4])
            torch.testing.assert_close(group, true.float(), atol=3e-4, rtol=1e-3)
            torch.testing.assert_close(aim, known[row + 1 : row + 4], atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_training_sees_what_is_defined(kind: str, parts: tuple[int, ...]) -> None:
    trained(kind, *parts)


def test_one_embedding_may_serve_all_masks() -> None:
    trained("llama", 0, 0, 0, distinct=False)


BUSHY = Tree(tuple(random_prompt(6, seed=2)), (-1, 0, 1, 0, 3, 1))
LONG = Tree.chain(random_prompt(40, seed=3))  # more than one piece of exact numerics
AFTER = Tree.chain(random_prompt(4, seed=4))


@torch.inference_mode()
def ordinary(model: TransformersModel) -> list[Tensor]:
    """Logits of ordinary rows, step after step, in a batch; with an adapter's masks beside them."""
    pool, found = model.pool(), []
    caches = [pool.open() for _ in range(3)]
    for steps in ((BUSHY, AFTER, LONG), (AFTER, BUSHY, AFTER), (BUSHY, LONG, BUSHY)):
        trees = list(steps)
        if model.lookahead is not None:
            ids = model.lookahead.ids
            trees = [tree.hang(0, ids).hang(len(tree) - 1, ids).hang(1, ids[:1]) for tree in trees]
        rows = model.forward(trees, caches)
        found += model.head(rows, [range(len(tree)) for tree in steps])
        for cache in caches:
            cache.keep([0, 1], [])
    return found


def poisoned(own: Adapter, poison: str) -> Adapter:
    """With what is not a number among the parameters of that name."""
    for name, part in own.named_parameters():
        if poison and name.startswith(poison):
            part.data.view(-1)[::7] = torch.nan
            part.data.view(-1)[1::7] = torch.inf
    return own


@pytest.mark.parametrize("poison", ["masks", "keys", "lora", "sampler"])
def test_an_adapter_gone_wrong_changes_no_text(double: TransformersModel, poison: str) -> None:
    adapted = double.adapted(poisoned(adapter(double, 3, *PARTS[-1]), poison))
    for params in WAYS.values():
        plain = run(double, Plain(), PROMPT, params).emitted
        for method in (Bita(faithful=True), Space(), MaskOracle(plain)):
            assert run(adapted, method, PROMPT, params).emitted == plain


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("poison", ["", "masks", "keys", "values", "lora"])
def test_ordinary_rows_keep_their_bits(exact: TransformersModel, parts: tuple[int, ...], poison: str) -> None:
    own = poisoned(adapter(exact, 3, *parts), poison)
    for training in (False, True):  # an adapter can be drafted with while it is trained
        adapted = exact.adapted(own.requires_grad_(training))
        for mine, right in zip(ordinary(adapted), ordinary(exact), strict=True):
            assert torch.equal(mine, right)


LEAKS = [
    faults.prefix_for_all,
    faults.lora_for_all,
    faults.lora_multiplied,
    faults.not_numbers,
]


@pytest.mark.parametrize("fault", LEAKS)
def test_a_leak_is_seen(
    fault: faults.Patch, exact: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test_ordinary_rows_keep_their_bits(exact, PARTS[-1], "lora")


DRIFTS = [
    faults.prefix_for_all,
    faults.lora_for_all,
    faults.masks_kept,
    faults.group_of_the_root,
    faults.noise_behind,
    faults.lane_cleared,
    faults.lane_released,
    faults.lane_copied,
    faults.lanes_grown,
    faults.lanes_grown_by_copies,
    faults.sampler_head_sees_token_zero,
    faults.sampler_head_noise_shifted,
]


@pytest.mark.parametrize("fault", DRIFTS)
def test_a_drift_of_decoding_is_seen(
    fault: faults.Patch, double: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        crowd(double.adapted(adapter(double, 3, *PARTS[-1])), WAYS["sampled"])


WRONGS = [
    faults.prefix_in_windows,
    faults.mask_positions,
    faults.one_embedding,
    faults.mask_positions_count_prefix,
]


@pytest.mark.parametrize("fault", WRONGS)
def test_a_wrong_mask_row_is_seen(fault: faults.Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        trained("gemma3_text", 16)


@pytest.mark.parametrize("parts", [(16, 4, 0), (16, 4, 32)], ids=str)
def test_the_head_runs_for_the_rows_that_are_looked_at(
    double: TransformersModel, parts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First for the rows of ordinary tokens, then for one group of each request that goes on."""
    adapted = double.adapted(adapter(double, 3, *parts))
    asked: list[list[list[int]]] = []
    ran: list[int] = []
    head, logits = TransformersModel.head, TransformersModel.logits
    mask_logits = TransformersModel.mask_logits

    def spy(self: TransformersModel, rows: Any, index: Sequence[Sequence[int]]) -> list[Tensor]:
        asked.append([list(own) for own in index])
        return head(self, rows, index)

    def spy_masks(
        self: TransformersModel, rows: Any, index: Sequence[Sequence[int]], *given: Any
    ) -> list[Tensor]:
        try:
            return mask_logits(self, rows, index, *given)
        finally:
            asked[1:] = [[list(own) for own in index]]

    def spy_rows(self: TransformersModel, hidden: Tensor) -> Tensor:
        ran.append(len(hidden))
        return logits(self, hidden)

    plain = [run(double, Plain(), random_prompt(9, i), greedy(6 + 6 * i)).emitted for i in range(3)]
    methods = [MaskOracle(answer) for answer in plain]
    engine = Engine(adapted)
    requests = [
        engine.submit(random_prompt(9, i), method, greedy(6 + 6 * i)) for i, method in enumerate(methods)
    ]
    while any(not request.ready for request in requests):
        engine.scheduler.admit()
        engine._forward([], [], engine.scheduler.chunks(0, 0, adapted.cost), 0.0)
    monkeypatch.setattr(TransformersModel, "head", spy)
    monkeypatch.setattr(TransformersModel, "mask_logits", spy_masks)
    monkeypatch.setattr(TransformersModel, "logits", spy_rows)
    groups = 0
    while live := list(engine.requests):
        asked.clear()
        engine.step()
        steps = [method.observed[-1] for s, method in zip(requests, methods, strict=True) if s in live]
        assert asked[0] == [list(range(len(one.step.picks))) for one in steps]
        counts = [one.group if s.finish_reason is None else 0 for s, one in zip(live, steps, strict=True)]
        assert [[len(own) for own in index] for index in asked[1:]] == ([counts] if any(counts) else [])
        for one, own in zip(steps, asked[1] if any(counts) else [], strict=False):
            above = [one.step.path[-1], *own[:-1]] if own else []
            assert [one.step.tree.parents[row] for row in own] == above
        assert sum(ran) == sum(len(own) for index in asked for own in index)
        groups += sum(counts)
        ran.clear()
    assert groups > 9


@pytest.mark.parametrize("params", [greedy(), sampled(50.0, 1)])
def test_mask_tokens_are_never_emitted(exact: TransformersModel, params: SamplingParams) -> None:
    """Not where everything is as likely, nor where a mask hangs under each row."""
    adapted = exact.adapted(adapter(exact, 3, *PARTS[-1]))
    request = run(adapted, Bita(faithful=True), PROMPT, params)
    assert max(request.emitted) < VOCABULARY
    rows = adapted.forward([Tree.chain([5]).hang(0, [VOCABULARY])], [adapted.pool().open()])
    assert all(len(row) == VOCABULARY for row in adapted.head(rows, [[0, 1]])[0])


@dataclass
class Rogue:
    """Proposes one tree under the last token."""

    rows: Sequence[int]
    parents: Sequence[int]

    def drafter(self, context: object) -> Rogue:
        return self

    def propose(self, tokens: Sequence[int]) -> Tree:
        return Tree((tokens[-1], *self.rows), (-1, *self.parents))

    def observe(self, step: object) -> None:
        pass


@pytest.mark.parametrize(
    ("adapted", "rows", "parents"),
    [
        (False, [320], [0]),
        (True, [323], [0]),
        (True, [-1], [0]),
        (True, [320, 321, 7], [0, 1, 0]),
        (True, [320, 7], [0, 1]),
    ],
    ids=["no adapter", "beyond the masks", "below zero", "before ordinary ones", "under a mask"],
)
def test_mask_tokens_out_of_place_are_refused(
    double: TransformersModel, adapted: bool, rows: Sequence[int], parents: Sequence[int]
) -> None:
    engine = Engine(double.adapted(adapter(double, 3)) if adapted else double)
    request = engine.submit(PROMPT, Rogue(rows, parents))
    engine.step()
    assert isinstance(request.error, InvalidTree)
    assert "Rogue" in str(request.error)


def test_prompts_of_mask_tokens_are_refused(double: TransformersModel) -> None:
    adapted = double.adapted(adapter(double, 3))
    with pytest.raises(InvalidPrompt):
        Engine(adapted).submit([5, VOCABULARY], Plain())
    with pytest.raises(InvalidReference):
        Engine(adapted).submit([5], Llma(), references=[[VOCABULARY]])


def test_the_users_model_is_untouched_and_adapters_work_side_by_side() -> None:
    own = tiny_llama(torch.float64)
    base = TransformersModel(own, "fast")
    modules, keys, config = dict(own.named_modules()), list(own.state_dict()), own.config.to_dict()
    ids = torch.tensor([PROMPT])
    logits = own(ids).logits
    one, other = (base.adapted(adapter(base, 2 + seed, 16 * seed, 4, 0, seed)) for seed in range(2))
    engines = [Engine(one), Engine(other)]
    plain = run(base, Plain(), PROMPT, greedy(16)).emitted
    methods = [MaskOracle(plain), MaskOracle(plain)]
    requests = [e.submit(PROMPT, m, greedy(16)) for e, m in zip(engines, methods, strict=True)]
    while any(engine.requests for engine in engines):
        for engine in engines:
            engine.step()
        assert torch.equal(own(ids).logits, logits)
    for adapted, method, request in zip((one, other), methods, requests, strict=True):
        assert request.emitted == plain
        compare(adapted, method.observed[:-1], greedy())
    assert dict(own.named_modules()) == modules
    assert list(own.state_dict()) == keys
    assert own.config.to_dict() == config
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())
    for mine, theirs in zip(own.parameters(), one.model.parameters(), strict=True):
        assert mine is theirs, "the weights are shared"


class Mixture(torch.nn.Module):
    """Two experts, each for the rows whose first number says so, the last rows first."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.shared = inner
        self.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64, dtype=torch.float64) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        flat, out = hidden.flatten(0, 1), torch.zeros_like(hidden).flatten(0, 1)
        for mine, expert in zip((flat[:, 0] > 0, flat[:, 0] <= 0), self.experts, strict=True):
            rows = mine.nonzero().flatten().flip(0)
            out[rows] = expert(flat[rows])
        shared: Tensor = self.shared(hidden)
        return shared + out.view_as(hidden)


def test_lora_on_experts_is_refused() -> None:
    """They run on some rows, in an order of their own: the gate would open for others."""
    own = tiny_llama(torch.float64)
    for layer in own.model.layers:
        layer.mlp = Mixture(layer.mlp)
    assert all_targets(own) == tuple(
        sorted(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    )
    with pytest.raises(AdapterError, match="1 does not run on the rows of a text"):
        linear_layers(own, ["q_proj", "1"])
    model = TransformersModel(own, "fast")
    crowd(model.adapted(adapter(model, 3, *PARTS[-1])), greedy())


def test_layers_of_the_head_are_no_targets() -> None:
    """They do not run with the mask rows, so LoRA on them would learn nothing."""
    model = build("bert", WORKING["bert"])
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    found = linear_layers(model, all_targets(model))
    assert {name for name in linear if name not in found} == {
        "cls.predictions.transform.dense",
        "cls.predictions.decoder",
    }
