"""Earlier answers: the index against brute force, drafted texts are plain's, and no salt sees another's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from selfdraft import LLM, DraftContext, Engine, Method, Request
from selfdraft.drafting import answers
from selfdraft.drafting.acceptance import AcceptanceStats, Budget
from selfdraft.drafting.answers import GRAMS, AnswerIndex, EarlierAnswers
from selfdraft.drafting.auto import Auto
from selfdraft.drafting.draft_tree import Sources
from selfdraft.drafting.llma import Llma
from selfdraft.drafting.ngrams import EARLIER, LongestFirst, copies
from selfdraft.drafting.plain import Plain
from selfdraft.drafting.suffix_index import REACH, Match
from selfdraft.engine.scheduler import Limits
from selfdraft.errors import DraftError, InvalidOption
from selfdraft.models.decoder import Decoder
from selfdraft.models.transformers import TransformersModel
from test_decoder_adapters import tiny
from test_methods import replay

import faults
from runs import greedy, random_prompt, sampled

SALTS = ("a", "b")
PROMPTS = [random_prompt(12, seed) for seed in range(3)]
Entry = tuple[str, int]  # salt, token; an answer's end is ("", -1)


def everywhere(entries: Sequence[Entry], first: int, salt: str, text: Sequence[int]) -> set[Match]:
    """Places in a salt's answers after contexts of the shortest n-gram and more, by brute force. first: the
    place of the first entry."""
    found = set()
    for at, (owner, _) in enumerate(entries):
        length = 0
        while length < min(at, REACH, len(text)) and entries[at - 1 - length] == (salt, text[-1 - length]):
            length += 1
        if owner == salt and length >= min(GRAMS):
            found.add(Match(first + at, length))
    return found


answer = st.tuples(st.sampled_from(SALTS), st.lists(st.integers(0, 2), min_size=1, max_size=40))


@given(st.lists(answer, max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(8, 30))
@example([("a", [0, 1, 2, 0]), ("b", [0, 1, 2, 1])], [0, 1, 2], 30)
@example([("a", [0] * 7), ("a", [0] * 7)], [0] * 5, 8)  # places that were overwritten look as before
def test_finds_what_brute_force_finds(given: list[tuple[str, list[int]]], text: list[int], size: int) -> None:
    """All that is in an answer that is there as a whole, and nothing that was overwritten."""
    store = EarlierAnswers(size)
    written: list[Entry] = []
    for salt, ids in given:
        before = store.end
        store.add(salt, ids)
        if store.end > before:
            written += [(salt, token) for token in ids[-(size - 1) :]] + [("", -1)]
    for salt in SALTS:
        index = store.index(salt, text[:1])
        index.extend(text[1:])
        found = index.find(10**6)
        whole = store.kept[0].start if store.kept else store.end
        there = everywhere(written[-size:], store.end - min(size, len(written)), salt, text)
        kept = everywhere(written[len(written) - (store.end - whole) :], whole, salt, text)
        assert len(found) == len(set(found))
        assert kept <= set(found) <= there
        assert [m.length for m in found] == sorted((m.length for m in found), reverse=True)
        assert [index.token(m.place) for m in found] == [written[m.place - store.end][1] for m in found], (
            "what followed there"
        )


def one_owner(patch: pytest.MonkeyPatch) -> None:
    """All salts have the same number."""
    own = EarlierAnswers._own
    patch.setattr(EarlierAnswers, "_own", lambda self, salt: own(self, salt) and 1)
    index = EarlierAnswers.index

    def numbered(self: EarlierAnswers, salt: str, prompt: Sequence[int]) -> AnswerIndex:
        for owner in self.owners.values():
            owner.number = 1
        return index(self, salt, prompt)

    patch.setattr(EarlierAnswers, "index", numbered)


def overwritten_places(patch: pytest.MonkeyPatch) -> None:
    """Places count after they were overwritten."""
    patch.setattr(EarlierAnswers, "floor", property(lambda self: 1))


def hashes_alone(patch: pytest.MonkeyPatch) -> None:
    """What an n-gram's hash leads to is not compared with the text."""
    patch.setattr(AnswerIndex, "_common", lambda self, tail, place: min(GRAMS))


@pytest.mark.parametrize("fault", [one_owner, overwritten_places, hashes_alone])
def test_a_fault_of_the_index_is_seen(fault: faults.Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, ExceptionGroup)):
        test_finds_what_brute_force_finds()


def some(seed: int, length: int = 20) -> list[int]:
    return random.Random(seed).choices(range(100), k=length)


def what_is_asked_for_stays() -> None:
    """One answer comes again and again among many others: it is always found, and takes little room."""
    store = EarlierAnswers(200)
    store.add("", some(0))
    for seed in range(1, 100):
        assert store.index("", some(0)[:8]).find(1), seed
        store.add("", some(0))
        store.add("", some(seed))
        for late in range(max(1, seed - 3), seed + 1):
            assert store.index("", some(late)[:8]).find(1), (seed, late)
    end = store.end
    for _ in range(100):
        store.add("", some(0))
    assert store.end <= end + 21


@pytest.mark.parametrize("again", [True, False], ids=["always", "never"])
def test_the_answer_given_least_recently_is_forgotten_first(
    again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither if one that is there is always written again, nor if it never is."""
    what_is_asked_for_stays()
    add = EarlierAnswers.add

    def other(self: EarlierAnswers, salt: str, answer: Sequence[int]) -> None:
        if again:
            self.starts.clear()
        if hash((salt, *answer)) not in self.starts:
            add(self, salt, answer)

    monkeypatch.setattr(EarlierAnswers, "add", other)
    with pytest.raises(AssertionError):
        what_is_asked_for_stays()


def test_memory_is_bounded() -> None:
    """56 bytes a token at most, and nothing of owners and answers that were overwritten."""
    store = EarlierAnswers(1000)
    for seed in range(500):
        store.add(f"salt {seed}", some(seed))
    assert len(store.kept) == len(store.owners) == len(store.starts) == 1000 // 21
    numbers = [store.entries, *(part for chain in store.chains for part in (chain.latest, chain.earlier))]
    assert sum(part.nbytes for part in numbers) <= 56 * 1000


def all_equal(model: TransformersModel | Decoder, temperature: float, size: int) -> None:
    """Requests together, twice, with answers kept of plain decoding and of each other: the texts are plain's
    and tokens of earlier answers were accepted."""
    engine = Engine(model, Limits(earlier_answers=size))
    ways = [sampled(temperature, seed, 30) if temperature else greedy(30) for seed in range(len(PROMPTS))]
    texts: list[list[Request]] = []
    rounds: list[list[Method]] = [[Plain()] * 3, [Auto(), Llma(), Auto()], [Llma(), Auto(), Plain()]]
    for methods in rounds:
        asked = zip(PROMPTS, methods, ways, strict=True)
        texts.append([engine.submit(prompt, method, params) for prompt, method, params in asked])
        while engine.requests:
            engine.step()
    plain = [request.emitted for request in texts[0]]
    assert [[request.emitted for request in each] for each in texts] == [plain] * len(texts)
    accepted = [one.sources.get(EARLIER) for each in texts for one in each]
    assert sum(count.accepted for count in accepted if count) > 20


@pytest.mark.parametrize("size", [70, 5000], ids=["too small for all", "large"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["transformers", "decoder"])
def test_drafted_is_plain(kind: str, temperature: float, size: int, exact: TransformersModel) -> None:
    all_equal(exact if kind == "transformers" else tiny("bf16"), temperature, size)


@pytest.mark.parametrize(
    ("fault", "temperature"), [(faults.positions, 0.0), (faults.rows_kept, 0.0), (faults.noise_key, 0.8)]
)
def test_a_fault_is_seen(
    fault: faults.Patch, temperature: float, exact: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        all_equal(exact, temperature, 5000)


def drafted_from_others(model: TransformersModel) -> list[int]:
    """Draft tokens from earlier answers in four requests of the same text: the first one, one of another
    salt that has answers, too, one of the same salt, and one of an engine that keeps nothing."""
    engine, found = Engine(model, Limits(earlier_answers=1000)), []

    def ask(engine: Engine, salt: str, prompt: Sequence[int] = PROMPTS[0]) -> None:
        request = engine.submit(prompt, Auto(), greedy(30), salt=salt)
        while engine.requests:
            engine.step()
        found.append(request.sources[EARLIER].drafted if EARLIER in request.sources else 0)

    ask(engine, "b", PROMPTS[2])
    for kept, salt in ((engine, "a"), (engine, "b"), (engine, "a"), (Engine(model), "a")):
        ask(kept, salt)
    return found[1:]


def test_salts_share_nothing(exact: TransformersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other, same, off = drafted_from_others(exact)
    assert first == other == off == 0 < same
    one_owner(monkeypatch)
    assert drafted_from_others(exact)[1] > 0


class Failing:
    """A drafter that raises in its third step."""

    steps = 0

    def drafter(self, context: DraftContext) -> Failing:
        return Failing()

    def propose(self, tokens: Sequence[int]) -> object:
        self.steps += 1
        if self.steps == 3:
            raise ValueError("on purpose")
        return Plain().drafter(DraftContext(tokens)).propose(tokens)

    def observe(self, step: object) -> None:
        pass


def test_what_is_kept(exact: TransformersModel) -> None:
    engine = Engine(exact, Limits(earlier_answers=1000))
    assert engine.answers is not None

    def kept(request: Request, steps: int = 1000, cancel: bool = False) -> list[int]:
        """What one more request has left in the ring."""
        assert engine.answers is not None
        before = engine.answers.end
        while engine.requests and steps:
            engine.step()
            steps -= 1
        if cancel:
            engine.cancel(request)
            engine.cancel(request)
        entries, size = engine.answers.entries, engine.answers.size
        mask = (1 << answers.TOKEN_BITS) - 1
        return [entries[place % size] & mask for place in range(before, engine.answers.end - 1)]

    def submit(seed: int, method: Method, **others: object) -> Request:
        return engine.submit(random_prompt(9, seed), method, greedy(9), **others)  # type: ignore[arg-type]

    whole = submit(20, Plain())
    assert kept(whole) == whole.emitted
    ended = submit(21, Plain(), eos_ids=range(0, 320, 2))
    assert kept(ended) == ended.emitted
    assert ended.finish_reason == "eos"
    cut = submit(22, Plain())
    assert kept(cut, steps=4, cancel=True) == cut.emitted != []
    late = submit(23, Plain())
    engine.step()
    engine.step()
    late.deadline = 0.0
    assert kept(late) == late.emitted != []
    failed = submit(24, Failing())  # type: ignore[arg-type]
    assert kept(failed) == []
    assert isinstance(failed.error, DraftError)
    assert failed.emitted
    assert kept(submit(25, Plain()), steps=0, cancel=True) == [], "it had not begun"


def test_the_longest_contexts_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the prompt the last token is followed by a 9; an earlier answer continues the last six with a 7."""
    store = EarlierAnswers(100)
    store.add("", [1, 2, 3, 4, 5, 6, 7, 8])
    prompt = [6, 9, 1, 2, 3, 4, 5, 6]

    def first() -> Sequence[int]:
        source = copies(DraftContext(prompt, answers=store.index("", prompt)))
        return list(source.candidates(source.read(prompt))[0].shares)

    assert first() == [7]
    monkeypatch.setattr(LongestFirst, "candidates", Sources.candidates)
    assert first() == [9]


@pytest.mark.parametrize("method", [Auto(), Llma()])
def test_it_is_silent_where_nothing_comes_true(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """All n-grams have occurred in earlier answers, and never go on alike."""
    dice = random.Random(1)
    store = EarlierAnswers(20_000)
    for _ in range(300):
        store.add("", dice.choices(range(12), k=60))
    text = dice.choices(range(12), k=500)

    def dear(rows: int) -> float:
        return 1 + 0.15 * (rows - 1)

    def speed() -> float:
        context = DraftContext(text[:4], cost=dear, answers=store.index("", text[:4]))
        found = replay(method.drafter(context), text[:4], text[4:])
        return sum(found.runs) / sum(map(dear, found.rows))

    assert speed() > 0.97
    monkeypatch.setattr(Budget, "affords", lambda self, rows, masks=False: True)
    monkeypatch.setattr(AcceptanceStats, "learn", lambda self, kind, accepted: None)
    assert speed() < 0.97


def test_bad_sizes_are_named(exact: TransformersModel) -> None:
    for size in (-1, 0.5, "100", True):
        with pytest.raises(InvalidOption, match="earlier_answers"):
            Limits(earlier_answers=size)  # type: ignore[arg-type]
    for size in (2**55, 2**80):
        with pytest.raises(InvalidOption, match="smaller"):
            Engine(exact, Limits(earlier_answers=size))


def test_a_model_with_earlier_answers(folder: Path) -> None:
    """As a user turns them on: an answer that comes again takes fewer forwards."""
    llm, off = LLM(str(folder), limits=Limits(earlier_answers=1000)), LLM(str(folder))
    for one in (llm, off):
        for _ in range(2):
            last = one.generate("def add(", raw=True, max_new_tokens=40)
        assert (EARLIER in last.sources) == (one is llm)
    assert last.ids == llm.generate("def add(", raw=True, max_new_tokens=40).ids
