"""`auto`: whatever it drafts from, the text is plain decoding's; requests pass on rates alone."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import selfdraft
from selfdraft import LLM, DraftContext, Drafter, Engine, Method, Request, SamplingParams, Step, Tree
from selfdraft.bench import metrics, source, suite
from selfdraft.bench.job import Job
from selfdraft.cli import flags
from selfdraft.drafting import create
from selfdraft.drafting.acceptance import AcceptanceStats, Budget, SharedAcceptance
from selfdraft.drafting.auto import Auto, AutoDrafter
from selfdraft.drafting.draft_tree import DraftTreeBuilder
from selfdraft.drafting.jacobi import Jacobi, Picks
from selfdraft.drafting.llma import Llma
from selfdraft.drafting.method import Lookahead
from selfdraft.drafting.plain import Plain
from selfdraft.drafting.suffix_index import SuffixIndex
from selfdraft.models.adapters import folder as adapter_folder
from selfdraft.models.decoder import Decoder
from selfdraft.models.transformers import TransformersModel
from test_decoder_adapters import ALL, tiny
from test_methods import cost, noise_text, replay

import faults
from adapting import Helped, adapter
from runs import greedy, random_prompt, run, sampled

WAYS = {"greedy": greedy(24), "sampled": sampled(0.8, seed=3, tokens=24)}
PROMPTS = [random_prompt(12, seed) for seed in range(3)]


def all_equal(base: TransformersModel | Decoder, masks: bool, quoted: bool, params: SamplingParams) -> None:
    """The texts of auto are plain's, alone and in a batch; and each source that there is was accepted."""
    model = base.adapted(adapter(base, 3, 4, 4, targets=ALL)) if masks else base  # type: ignore[arg-type]
    plain = [run(base, Plain(), prompt, params).emitted for prompt in PROMPTS]
    given = [plain[0][:9], plain[1][4:15], plain[2][12:]] if quoted else []
    methods: list[Method] = [Helped(Auto(), text) if masks else Auto() for text in plain]
    alone = [run(model, method, p, params, given) for method, p in zip(methods, PROMPTS, strict=True)]
    assert [request.emitted for request in alone] == plain
    engine = Engine(model)
    batch = [engine.submit(p, method, params, given) for method, p in zip(methods, PROMPTS, strict=True)]
    while engine.requests:
        engine.step()
    assert [request.emitted for request in batch] == plain
    expected = {"copy"} if quoted else set()
    expected |= {"mask"} if masks else set()
    assert expected <= {name for one in alone for name, count in one.sources.items() if count.accepted}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quoted", [False, True], ids=["alone", "quoted"])
@pytest.mark.parametrize("masks", [False, True], ids=["no adapter", "masks"])
@pytest.mark.parametrize("kind", ["transformers", "decoder"])
def test_drafted_is_plain(kind: str, masks: bool, quoted: bool, way: str, exact: TransformersModel) -> None:
    all_equal(exact if kind == "transformers" else tiny("bf16"), masks, quoted, WAYS[way])


@pytest.mark.parametrize(
    ("fault", "masks", "way"),
    [
        (faults.tree_mask, True, "greedy"),
        (faults.rows_kept, True, "greedy"),
        (faults.noise_key, False, "sampled"),
    ],
)
def test_a_fault_is_seen(
    fault: faults.Patch, masks: bool, way: str, exact: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        all_equal(exact, masks, True, WAYS[way])


def one_after_another(model: TransformersModel) -> list[Request]:
    """Requests of one engine, each with the rates of those before it; every text is plain's."""
    engine, requests = Engine(model), []
    for seed in range(6):
        params = sampled(0.8 * (seed % 2), seed, 20)
        right = run(model, Plain(), PROMPTS[seed % 3], params).emitted
        requests.append(engine.submit(PROMPTS[seed % 3], Auto(), params, [right[:15]]))
        while engine.requests:
            engine.step()
        assert requests[-1].emitted == right
    return requests


def test_rates_of_other_requests_change_no_text(exact: TransformersModel) -> None:
    one_after_another(exact)


def rows_at_first(before: Callable[[int], int]) -> int:
    """Rows that a request drafts first, after another one of the same engine. before: what follows each
    token of that one's reference."""
    shared, reference = SharedAcceptance(), noise_text(400, 0)
    context = DraftContext([1000], [reference], cost=cost, acceptance=shared)
    replay(Auto().drafter(context), [1000], [before(token) for token in reference[:300]])
    fresh = Auto().drafter(DraftContext([7], [range(1, 60)], cost=cost, acceptance=shared))
    assert isinstance(fresh, AutoDrafter)
    fresh.builder.budget.credit = 9.0
    return len(fresh.builder.tree([7, 1, 2]))


def test_a_request_starts_with_the_rates_of_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(5)

    def wrong(token: int) -> int:
        return token if dice.random() < 0.5 else 1000

    assert rows_at_first(wrong) < rows_at_first(lambda token: token)
    monkeypatch.setattr(SharedAcceptance, "start", lambda self, name, prior: AcceptanceStats(prior))
    assert rows_at_first(wrong) == rows_at_first(lambda token: token), "without them it starts as any other"


class Spy:
    """A drafter whose proposed tokens are kept."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.seen = drafter, set[int]()

    def propose(self, tokens: Sequence[int]) -> Tree:
        tree = self.drafter.propose(tokens)
        self.seen |= set(tree.tokens)
        return tree

    def observe(self, step: Step) -> None:
        self.drafter.observe(step)


def nothing_crosses() -> None:
    """Requests of one engine, in turn, with tokens in common and tokens of their own: each drafts tokens of
    its text alone, and those that the model picked for it."""
    shared = SharedAcceptance()
    for first in (100, 200, 300):
        dice = random.Random(first)
        own, common = range(first, first + 9), range(12)
        text = [dice.choice(common if dice.random() < 0.6 else own) for _ in range(300)]
        context = DraftContext(text[:100], [text[50:90]], acceptance=shared)  # rows cost nothing
        spy = Spy(Auto().drafter(context))
        replay(spy, text[:100], text[100:], right=0.3)
        assert len(spy.seen) > 10
        assert spy.seen <= {*text, 1000}  # 1000 is what the model picks off the path


def test_no_token_of_one_request_is_drafted_in_another() -> None:
    nothing_crosses()


def shared_pool(patch: pytest.MonkeyPatch) -> None:
    """All requests have one pool."""
    init, pool = Picks.__init__, dict[tuple[int, int], int]()

    def one(self: Picks, prior: Sequence[float]) -> None:
        init(self, prior)
        self.pool = pool

    patch.setattr(Picks, "__init__", one)


def shared_index(patch: pytest.MonkeyPatch) -> None:
    """Copies are taken from earlier prompts, too."""
    init, known = SuffixIndex.__init__, list[Sequence[int]]()

    def all_of_them(self: SuffixIndex, references: Sequence[Sequence[int]], prompt: Sequence[int]) -> None:
        known.append(prompt)
        init(self, [*known, *references], prompt)

    patch.setattr(SuffixIndex, "__init__", all_of_them)


@pytest.mark.parametrize("fault", [shared_pool, shared_index])
def test_a_shared_memory_is_seen(fault: faults.Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        nothing_crosses()


def counts_add_up(model: TransformersModel) -> None:
    """Over its sources a request's draft tokens are all rows but the roots, those accepted all tokens but
    one a step."""
    right = run(model, Plain(), PROMPTS[0], greedy(40)).emitted
    for method in (Auto(), Jacobi(), Llma()):
        request = run(model, method, PROMPTS[0], greedy(40), [right[:9], right[20:30]])
        counts, steps = request.sources.values(), len(request.runs)
        assert sum(count.accepted for count in counts) == len(request.emitted) - steps > 0
        assert sum(count.drafted for count in counts) == request.rows - steps


def test_draft_tokens_are_counted_by_source(
    exact: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts_add_up(exact)
    count = DraftTreeBuilder._count

    def of_nodes_alone(self: DraftTreeBuilder[object], step: Step) -> object:
        accepted = count(self, step)
        self.counts.pop(self.hung, None)
        return accepted

    monkeypatch.setattr(DraftTreeBuilder, "_count", of_nodes_alone)
    with pytest.raises(AssertionError):
        counts_add_up(exact)


@pytest.mark.parametrize("masks", [False, True])
def test_it_is_silent_where_nothing_comes_true(masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token has occurred, and never goes on alike; the masks are sure of wrong tokens."""

    def dear(rows: int) -> float:
        return 1 + 0.15 * (rows - 1)

    def speed() -> float:
        few = random.Random(1).choices(range(40), k=700)
        look = Lookahead((2000, 2001, 2002)) if masks else None
        drafter = Auto().drafter(DraftContext(few[:400], cost=dear, lookahead=look))
        found = replay(drafter, few[:400], few[400:], mask_scores=wrong_scores if masks else None)
        return sum(found.runs) / sum(map(dear, found.rows))

    assert speed() > 0.97
    monkeypatch.setattr(Budget, "affords", lambda self, rows, masks=False: True)
    assert speed() < 0.97


def wrong_scores(masks: int) -> torch.Tensor:
    scores = torch.zeros(masks, 1001)
    scores[:, 500] = 12.0
    return scores


def test_it_takes_an_adapter_and_needs_none(exact: TransformersModel, folder: Path, tmp_path: Path) -> None:
    mine = str(tmp_path / "mine")
    adapter_folder.save(Path(mine), adapter(exact, 3, 4, 4), exact, "bita", "tiny", {})
    bare, with_masks = LLM(str(folder)), LLM(str(folder), "auto", adapter=mine)
    assert with_masks.model.lookahead is not None
    assert with_masks.using("auto").model.lookahead is not None
    assert with_masks.using("llma").model.lookahead is None
    answer, plain = (llm.generate("def add(", max_new_tokens=12) for llm in (with_masks, bare.using("plain")))
    assert (answer.ids, answer.grade, answer.method) == (plain.ids, "base", "auto")


def test_counts_of_a_bench_survive_a_stop(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "def add(a, b):", "reference": "def add(a, b): return a + b"}\n')
    asked = Job(str(folder), ["auto"], [], prompts=1, repeats=1, max_new_tokens=12)
    found = []
    for _ in range(2):  # the second one reads the answers of the first
        bench = asked.prepare([source.from_files(suite.own(prompts), [prompts])], tmp_path / "out")
        bench.run()
        found.append(
            metrics.counts(one.sources for one in bench.journal.records.values() if one.arm == "auto")
        )
    assert bench.journal.found == 2
    assert found[0] == found[1] != {}


def test_it_is_the_default_everywhere() -> None:
    method = inspect.signature(LLM.__init__).parameters["method"].default
    hook = inspect.signature(selfdraft.hook).parameters["method"].default
    assert {method, hook, flags.DEFAULT_METHOD, *Job().methods} == {"auto"}
    assert create("auto") == Auto()
