"""The benchmark: all arms are counted alike, a resumed run equals a whole one, figures as by hand."""

from __future__ import annotations

import errno
import gzip
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import selfdraft.drafting
from selfdraft import LLM, SamplingParams
from selfdraft._common import machine
from selfdraft._common.machine import idle_load
from selfdraft._common.repetition import fresh
from selfdraft.bench import arm, interval, journal, metrics, report, source, suite
from selfdraft.bench.arm import Answer, Arm, Generated
from selfdraft.bench.journal import Journal, Key, Record
from selfdraft.bench.measure import Bench, plan
from selfdraft.errors import BenchError, InvalidOption, InvalidSuite, UnknownMethod

from conftest import Run

pytestmark = pytest.mark.usefixtures("quick_machine")

ROWS: list[dict[str, Any]] = [
    {"id": "add", "prompt": "def add(a, b):\n", "reference": "    return a + b\n"},
    {"id": "talk", "turns": ["class Stack:\n", "push the item\n"]},
    {"prompt": "def push(self", "references": ["item):\n", "self.items.append(item)\n"]},
]
LENGTH = 12


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), "plain", dtype="float64")


@pytest.fixture(scope="module")
def arms(llm: LLM, folder: Path) -> list[Arm]:
    """Methods and baselines, in float64, where all of them give one text."""
    return make_arms(llm, folder, llm.eos_ids)


def make_arms(llm: LLM, folder: Path, eos: frozenset[int]) -> list[Arm]:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float64").eval()
    drafted = [
        arm.Drafted(name, arm.method(name), llm.model, SamplingParams(), eos)
        for name in ("plain", "llma:block=6", "jacobi")
    ]
    return [
        *drafted,
        *(Generated(n, theirs, SamplingParams(), eos, k) for n, k in {"generate": 0, "lookup-5": 5}.items()),
    ]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return write(tmp_path / "mine.jsonl", ROWS)


def write(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(llm: LLM, arms: Sequence[Arm], mine: Path, out: Path, repeats: int = 2) -> Bench:
    work = plan(source.from_files(suite.own(mine), [mine]), llm, 100, LENGTH)
    return Bench(llm, arms, [work], repeats, Journal(out, {"what": "a test"}))


def record(
    name: str, ids: Sequence[int], runs: Sequence[int], times: Sequence[float], **where: Any
) -> Record:
    place = {"suite": "s", "item": "i", "turn": 0, "repeat": 0, **where}
    rows = (2,) * len(runs)
    return Record(
        **place,
        arm=name,
        prompt_tokens=5,
        ids=tuple(ids),
        runs=tuple(runs),
        rows=rows,
        times=tuple(times),
        peak=7,
        others=0.0,
    )


def table(*records: Record) -> dict[Key, Record]:
    return {one.key: one for one in records}


# Where a text begins to loop


@pytest.mark.parametrize(
    ("ids", "keep"),
    [
        ([1, 2, 3, 4], 4),
        ([5, *[9] * 7], 8),  # seven of one token: not yet
        ([5, *[9] * 8, 6], 2),  # eight: the first is new, the others are not
        ([7, *[1, 2] * 3, 8], 8),  # three times, but six tokens
        ([7, *[1, 2] * 4], 3),
        ([7, *[1, 2, 3] * 3], 4),
        ([7, *[1, 2, 3] * 2, 1, 2], 9),
        ([*range(64)] * 3, 64),
        ([*range(65)] * 3, 195),  # longer than what is looked for
        ([1], 1),
    ],
)
def test_repetition_by_hand(ids: list[int], keep: int) -> None:
    assert fresh(ids) == keep


def slowly(ids: Sequence[int]) -> int:
    """`fresh`, as its definition reads."""
    for end in range(1, len(ids) + 1):
        for period in range(1, 65):
            span = max(3 * period, 8)
            if span <= end:
                tail = ids[end - span : end]
                if all(tail[i] == tail[i - period] for i in range(period, span)):
                    return end - span + period
    return len(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=60), st.lists(st.integers(0, 3), max_size=9), st.integers(0, 5))
def test_repetition_against_its_definition(start: list[int], loop: list[int], times: int) -> None:
    ids = [*start, *loop * times, *start[:4]]
    assert fresh(ids) == slowly(ids)


# Figures


def test_figures_by_hand() -> None:
    one = record("a", range(6), [1, 3, 2], [0.5, 0.6, 1.0])
    two = record("a", range(3), [1, 1, 1], [0.3, 0.5, 0.7], item="j")
    found = metrics.figures([one, two], cut=False)
    assert (found["tokens"], found["forwards"]) == (9, 6)
    assert found["tokens_per_second"] == pytest.approx((5 + 2) / (0.5 + 0.4))
    assert found["forwards_per_second"] == pytest.approx(4 / 0.9)
    assert found["first_token_seconds"]["p50"] == pytest.approx(0.4)
    # Gaps: 0.1, 0, 0 and 0.4, 0 of the first; 0.2 twice of the second.
    assert found["between_tokens_seconds"]["p50"] == pytest.approx(0.1)
    assert found["between_tokens_seconds"]["p95"] == pytest.approx(0.2 + 0.7 * 0.2)
    assert found["tokens_per_forward_step"] == 9 / 6
    assert found["tokens_per_forward_request"] == (2 + 1) / 2
    assert found["rows_per_forward"] == 2
    assert found["acceptance_by_depth"] == [2 / 6, 1 / 6]


def test_first_steps_that_emit_nothing_are_forwards_too() -> None:
    found = metrics.figures([record("a", range(3), [0, 1, 0, 2], [0.1, 0.2, 0.3, 0.4])], cut=False)
    assert found["forwards"] == 4
    assert found["first_token_seconds"]["p50"] == 0.2
    assert found["tokens_per_second"] == pytest.approx(2 / 0.2)
    assert found["between_tokens_seconds"]["p95"] == pytest.approx(0.2 * 0.95)


def looping() -> dict[Key, Record]:
    """A text of three new tokens and a loop, which plain decoding and a copier make at their pace."""
    ids = [4, 5, 6, *[6] * 9]
    times = [0.1 * i for i in range(1, 13)]
    plain = record("plain", ids, [1] * 12, times)
    return table(plain, record("copier", ids, [1, 1, 1, 9], times[:4]))


def test_a_loop_flatters_nobody() -> None:
    records = looping()
    copier = [one for one in records.values() if one.arm == "copier"]
    assert metrics.ratios(copier, records, "plain", cut=False)["median"] == pytest.approx(11 / 3)
    assert metrics.ratios(copier, records, "plain", cut=True)["median"] == pytest.approx(1)
    assert metrics.figures(copier, cut=True)["tokens_per_forward_step"] == 1
    assert metrics.repeated(copier) == {"tokens": pytest.approx(0.75), "answers": 1}


def test_a_step_across_the_cut_counts_whole() -> None:
    answer = metrics.count(record("a", [4, *[6] * 11], [1, 6, 5], [0.1, 0.2, 0.3]), cut=True)
    assert (answer.runs, answer.times, answer.tokens) == ([1, 1], (0.1, 0.2), 2)


def test_ratios_are_paired_by_prompt_and_repeat() -> None:
    records = []
    for item, factors in {"i": (2.0, 4.0, 3.0), "j": (1.0, 1.0, 1.0)}.items():
        for repeat, factor in enumerate(factors):
            slow = 1.0 + repeat  # the machine slows down: the ratios must not see it
            where = {"item": item, "repeat": repeat}
            records.append(record("plain", range(3), [1, 1, 1], [0.1, 0.2, 0.1 + slow], **where))
            records.append(record("a", range(3), [1, 2], [0.1, 0.1 + slow / factor], **where))
    found = metrics.ratios([one for one in records if one.arm == "a"], table(*records), "plain", cut=False)
    assert found["median"] == pytest.approx((3 + 1) / 2)
    assert found["p10"] == pytest.approx(1.2)
    assert found["prompts"] == 2


@pytest.mark.parametrize(
    ("ids", "texts", "share"),
    [
        ([1, 2, 3, 4], [[0, 1, 2, 3, 4, 5]], 4),
        ([1, 2, 3, 9], [[0, 1, 2, 3, 4, 5]], 0),  # three tokens are no 4-gram
        ([9, 1, 2, 3, 4, 5, 9], [[1, 2, 3, 4, 5]], 5),  # two that overlap
        ([1, 2, 3, 4], [[1, 2], [3, 4]], 0),  # not across two texts
        ([5, 6, 7, 8, 1, 2, 3, 4], [[1, 2, 3, 4], [5, 6, 7, 8]], 8),
        ([1, 2, 3], [[1, 2, 3]], 0),
    ],
)
def test_copied_share_by_hand(ids: list[int], texts: list[list[int]], share: int) -> None:
    assert metrics.copied(ids, texts) == (share, len(ids))


def test_identity_says_where_texts_part() -> None:
    records = table(
        record("plain", [1, 2, 3], [1] * 3, [1, 2, 3]),
        record("a", [1, 2, 3], [1, 2], [1, 2]),
        record("a", [1, 2], [1, 1], [1, 2], repeat=1),
        record("a", [1, 9, 3], [1, 2], [1, 2], repeat=2),
    )
    found = metrics.identity([one for one in records.values() if one.arm == "a"], records, "plain")
    assert (found["identical"], found["of"]) == (1, 3)
    assert [one["position"] for one in found["differences"]] == [2, 1]


def test_intervals_hold_the_median_and_repeat_themselves() -> None:
    values = [1 + (i * 37 % 100) / 100 for i in range(100)]
    low, high = interval.interval(values) or (0, 0)
    assert low < (interval.median(values) or 0) < high
    assert interval.interval(values) == (low, high)
    assert high - low < 0.35  # the median's standard error, 1.25 sigma / sqrt(n), is 0.036
    assert interval.interval([1.0]) is None
    assert interval.quantile([3.0, 1.0, 2.0], 0.25) == 1.5


@pytest.mark.parametrize("mutant", ["no cut", "smooth gaps", "first step timed", "texts not compared"])
def test_each_fault_changes_a_figure(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen() -> object:
        records = {
            **looping(),
            **table(record("copier", [4, 5, 7, *[6] * 9], [1, 1, 1, 9], [1, 2, 3, 4], repeat=1)),
        }
        copier = [one for one in records.values() if one.arm == "copier"]
        return (
            metrics.figures(copier, cut=True),
            metrics.figures(copier, cut=False),
            metrics.ratios(copier, records, "plain", cut=True),
            metrics.identity(copier, records, "plain"),
        )

    right = seen()
    if mutant == "no cut":
        monkeypatch.setattr(metrics, "fresh", len)
    elif mutant == "smooth gaps":
        monkeypatch.setattr(
            metrics.Counted, "gaps", property(lambda one: [one.decoded[1] / one.decoded[0]] * one.decoded[0])
        )
    elif mutant == "first step timed":
        monkeypatch.setattr(metrics.Counted, "decoded", property(lambda one: (one.tokens, one.times[-1])))
    else:
        monkeypatch.setattr(metrics, "parting", lambda one, other: None)
    assert seen() != right


# Arms


def test_counts_are_equal_across_arms(llm: LLM, folder: Path, arms: list[Arm], mine: Path) -> None:
    """One text for all, also where it ends within a draft; each token is in one step, with its time."""
    prompt = llm.encode(TEXT)
    whole = arms[0].answer(prompt, [], 40).ids
    for end in (None, whole[7], whole[20]):
        eos = llm.eos_ids if end is None else frozenset([end])
        answers = [one.answer(prompt, [prompt[1:]], 40) for one in make_arms(llm, folder, eos)]
        plain = answers[0]
        assert end is None or (plain.ids[-1] == end and end not in plain.ids[:-1])
        for answer in answers:
            assert answer.ids == plain.ids
            assert sum(answer.runs) == len(plain.ids)
            assert len(answer.runs) == len(answer.rows) == len(answer.times)
            assert list(answer.times) == sorted(answer.times)
            assert all(run <= rows for run, rows in zip(answer.runs, answer.rows, strict=True))
        assert set(plain.runs) == set(plain.rows) == set(answers[3].runs) == set(answers[3].rows) == {1}


TEXT = "def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n    return"


def test_sampled_arms_of_the_package_give_one_text(llm: LLM) -> None:
    prompt = llm.encode(TEXT)
    drafted = arm.drafted(["plain", "llma", "jacobi"], llm, SamplingParams(temperature=0.9, seed=3))
    texts = [one.answer(prompt, [], 20).ids for one in drafted]
    assert texts[0] == texts[1] == texts[2]


def test_names_of_arms() -> None:
    assert arm.method("llma:block=4, match=2") == selfdraft.drafting.create("llma", {"block": 4, "match": 2})
    assert arm.lookups(["generate", "lookup-20"]) == {"generate": 0, "lookup-20": 20}
    for names in (["beam"], ["lookup-0"], ["generate", "generate"]):
        with pytest.raises(InvalidOption, match=names[0]):
            arm.lookups(names)
    with pytest.raises(UnknownMethod, match="medusa"):
        arm.method("medusa:k=3")
    with pytest.raises(InvalidOption, match="NAME:OPTION=VALUE"):
        arm.method("llma:block")


# The run


@dataclass(frozen=True)
class Canned:
    """An arm that answers at once, with ids that depend on the prompt: a run needs no model to be resumed."""

    name: str
    drafts: bool = True

    def answer(self, prompt: Sequence[int], references: object, length: int) -> Answer:
        ids = [2 + (sum(prompt) * 31 + 7 * at) % 300 for at in range(length)]
        return Answer(ids, [1] * length, [1] * length, [0.1 * at for at in range(1, length + 1)])

    def close(self) -> None:
        pass


def canned() -> list[Arm]:
    return [cast(Arm, Canned(name)) for name in ("plain", "llma", "generate")]


def told(bench: Bench) -> list[tuple[Any, ...]]:
    """All of the answers but what the clock said, in the order they were written."""
    lines = bench.journal.path.read_text().splitlines()
    return [
        tuple(json.loads(line)[k] for k in (*Key._fields, "prompt_tokens", "ids", "runs", "rows"))
        for line in lines
    ]


def test_interrupted_and_resumed_is_as_if_never_stopped(llm: LLM, mine: Path, tmp_path: Path) -> None:
    arms = canned()
    whole = make(llm, arms, mine, tmp_path / "whole")
    whole.run()
    assert len(whole.journal.records) == whole.answers() == 4 * len(arms) * 2

    class Stop(Exception):
        pass

    for limit in (3, 9, 20):
        bench = make(llm, arms, mine, tmp_path / "parts")

        def tell(key: Key, bench: Bench = bench, limit: int = limit) -> None:
            if len(bench.journal.records) == limit:
                raise Stop

        with pytest.raises(Stop):
            bench.run(tell)
        with bench.journal.path.open("a") as file:
            file.write('{"suite":"mine","it')  # the machine died in a line
    bench = make(llm, arms, mine, tmp_path / "parts")
    assert bench.journal.found == 20
    bench.run()
    assert told(bench) == told(whole)
    again = make(llm, arms, mine, tmp_path / "parts")
    again.run(lambda key: pytest.fail("all answers are there"))


def test_all_arms_see_the_same_first_turn(
    llm: LLM, arms: list[Arm], mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain decoding's, also where an arm said something else."""
    asked: list[Sequence[int]] = []

    class Liar:
        name, drafts = "liar", True

        def answer(self, prompt: Sequence[int], references: object, length: int) -> Answer:
            asked.append(list(prompt))
            return Answer([5], [1], [1], [0.1])

        def close(self) -> None:
            pass

    bench = make(llm, [Liar(), arms[0]], mine, tmp_path / "out", repeats=1)
    bench.run()
    plain = bench.journal.records[Key("mine", "talk", 0, "plain", 0)].ids
    said = llm.tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(said, str)
    second = llm.encode(f"class Stack:\n{said.rstrip()}\n\npush the item\n")
    assert second in asked
    assert {one.prompt_tokens for key, one in bench.journal.records.items() if key[1:3] == ("talk", 1)} == {
        len(second)
    }


TEMPLATE = (
    "{% for one in messages %}<{{ one.role }}>{{ one.content }}</{{ one.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_model_is_asked_through_its_template(
    llm: LLM, arms: list[Arm], mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turn 2 sees turn 1 as messages, with plain decoding's answer; --raw and other models do not."""
    monkeypatch.setattr(llm.tokenizer, "chat_template", TEMPLATE)
    read = source.from_files(suite.own(mine), [mine])
    work = plan(read, llm, 100, 4, chat=True)
    bench = Bench(llm, arms[:1], [work], 1, Journal(tmp_path, {"chat": True}), chat=True)
    bench.run()
    item = next(one for one in work.items if one.id == "talk")
    records = bench.journal.records
    first, second = (records[Key("mine", "talk", turn, "plain", 0)] for turn in (0, 1))
    said = bench._text(first.key)
    text = "<user>class Stack:\n</user><assistant>{}<user>push the item\n</user><assistant>"
    asked = llm.encode(text.format(f"{said}</assistant>"), special=False)
    assert bench.prompt(work, item, 1) == asked
    assert second.prompt_tokens == len(asked)
    assert work.context >= len(asked) + 4
    raw = Bench(llm, arms[:1], [work], 1, bench.journal)
    assert raw.prompt(work, item, 0) == llm.encode("class Stack:\n")


def test_a_full_disk_keeps_what_is_finished(
    llm: LLM, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = canned()
    bench = make(llm, arms, mine, tmp_path / "out")
    write_all = journal.write_all

    def full(file: Any, data: bytes) -> None:
        if len(bench.journal.records) == 6:
            file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(file, data)

    monkeypatch.setattr(journal, "write_all", full)
    with pytest.raises(BenchError, match=r"No space left.*6 finished answers are kept"):
        bench.run()
    with pytest.raises(BenchError, match="No space left"):
        bench.journal.save("report.json", {})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["answers.jsonl", "run.json"]
    monkeypatch.undo()
    resumed = make(llm, arms, mine, tmp_path / "out")
    assert resumed.journal.found == 6
    resumed.run()
    assert len(resumed.journal.records) == resumed.answers()


def test_another_run_has_another_folder(tmp_path: Path) -> None:
    Journal(tmp_path, {"model": "tiny", "machine": {"threads": 1}})
    Journal(tmp_path, {"model": "tiny", "machine": {"threads": 1}})
    with pytest.raises(BenchError, match=r"machine.threads: 1 there, 2 asked for.*another folder"):
        Journal(tmp_path, {"model": "tiny", "machine": {"threads": 2}})
    (tmp_path / "answers.jsonl").write_text('{"suite": 3}\n')
    with pytest.raises(BenchError, match="line 1 is not an answer"):
        Journal(tmp_path, {"model": "tiny", "machine": {"threads": 1}})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(BenchError, match="not JSON"):
        Journal(tmp_path, {})
    (tmp_path / "run.json").unlink()
    with pytest.raises(BenchError, match=r"without run\.json"):
        Journal(tmp_path, {})
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match="cannot be used"):
        Journal(tmp_path / "file" / "out", {})


def test_prompts_are_spread_and_fit(llm: LLM, tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": "x " * (200 if i == 3 else 2)} for i in range(10)]
    path = write(tmp_path / "many.jsonl", rows)
    work = plan(source.from_files(suite.own(path), [path]), llm, 3, 20)
    assert [item.id for item in work.items] == ["0", "4", "7"]
    assert (work.total, work.too_long) == (10, ["3"])
    short = plan(source.from_files(suite.own(path), [path]), llm, 3, 20, most=9)
    assert short.too_long == ["3"]
    with pytest.raises(InvalidSuite, match=r"limit of 2 tokens a prompt; .*--max-prompt-tokens"):
        plan(source.from_files(suite.own(path), [path]), llm, 3, 20, most=2)
    with pytest.raises(InvalidSuite, match="context of 256"):
        plan(source.from_files(suite.own(path), [path]), llm, 3, 300)


# Suites

SAMPLES: dict[str, dict[str, Any]] = {
    "py_edits": {"repo": "r", "commit": "0123456789ab", "path": "p", "function": "f"}
    | {"prompt": "Edit: x\n\n```python\ndef f(): pass\n```"},
    "py_functions": {"repo": "r", "path": "p", "name": "f", "prompt": "def f():\n"},
    "py_code": {"repo": "r", "path": "p", "text": "a\nb\nc\nd\n"},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def f():\n"},
    "humaneval_x": {"task_id": "CPP/0", "prompt": "int f() {\n"},
    "mbpp": {"task_id": 11, "text": "Write.", "test_list": ["assert a", "assert b"]},
    "gsm8k": {"question": "How many?"},
    "mt_bench": {"question_id": 81, "turns": ["One.", "Two."]},
    "spec_bench": {"question_id": 81, "category": "writing", "turns": ["One.", "Two."]},
    "spider": {"prompt": "Schema: ..."},
    "llma_rag": {"query": "why", "docs": ["one", "two"]},
    "llma_cnndm": {"query": "Summarize {this}", "docs": ["this"]},
}


@pytest.mark.parametrize("name", suite.available())
def test_every_suite_reads_its_rows_and_names_the_line_that_lacks_a_field(name: str, tmp_path: Path) -> None:
    one = suite.named(name)
    assert one.about
    assert one.licence
    row = SAMPLES[name]
    for file in one.files:
        path = tmp_path / "eval" / file
        write(path.with_suffix(".plain"), [row, row])
        packed = path.with_suffix(".plain").read_bytes()
        path.write_bytes(gzip.compress(packed) if path.suffix == ".gz" else packed)
    read = source.from_folder(one, tmp_path)
    assert len(read.items) == 2 * len(one.files) == len({item.id for item in read.items})
    assert set(read.fingerprints) == set(one.files)
    for field in row:
        (item,) = suite.items(one, [("data, line 1", row)])
        assert all(turn.endswith(one.after) for turn in item.turns)
        assert len(item.chat) == len(item.turns)
        assert bool(one.references) == bool(item.references)
        with pytest.raises(InvalidSuite, match=f"data, line 7: no field '{field}'"):
            suite.items(one, [("data, line 7", {key: value for key, value in row.items() if key != field})])


def test_what_suites_make_of_rows() -> None:
    def item(name: str) -> suite.Item:
        return suite.items(suite.named(name), [("x, line 3", SAMPLES[name])])[0]

    assert item("py_edits").references == ("```python\ndef f(): pass\n```",)
    assert item("py_edits").id == "r@01234567:p:f"
    assert item("py_code").turns == ("a\nb\n",)
    assert item("mbpp").turns[0].endswith("tests:\nassert a\nassert b\n\n")
    assert item("mt_bench").turns == ("One.\n\n", "Two.\n\n")
    assert (item("spec_bench").group, item("humaneval_x").group) == ("chat", "CPP")
    assert item("llma_rag").turns == ("docs:\none\ntwo\nquery: why\nanswer:",)
    assert item("llma_rag").references == ("one", "two")
    assert item("gsm8k").id == "3"
    assert item("gsm8k").chat == ("How many?",)
    assert item("mt_bench").chat == ("One.", "Two.")
    assert item("humaneval").chat[0].endswith("```python\ndef f():\n```")
    assert item("llma_rag").chat == ("one\ntwo\n\nAnswer this question with the passages above: why",)
    assert item("llma_cnndm").chat == ("Summarize this article.\n\nthis",)
    assert suite.items(suite.named("mbpp"), [("x, line 1", {**SAMPLES["mbpp"], "task_id": 511})]) == []


def test_own_lines(mine: Path) -> None:
    add, talk, push = source.from_files(suite.own(mine), [mine]).items
    assert (add.id, talk.id, push.id) == ("add", "talk", "3")
    assert (add.turns, talk.turns) == ((ROWS[0]["prompt"],), tuple(ROWS[1]["turns"]))
    assert (add.references, push.references) == ((ROWS[0]["reference"],), tuple(ROWS[2]["references"]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "a"}\n\n{"text": "b"}\n', "line 3: no field 'prompt'; the row has text"),
        ('{"prompt": "a"}\n{"prompt": 5}\n', None),
        ('{"prompt": ["a", 5]}\n', "line 1: field 'prompt' must be text"),
        ('{"prompt": ""}\n', "line 1: the prompt is empty"),
        ('{"turns": []}\n', "line 1: the prompt is empty"),
        ('{"turns": ["a", 5]}\n', "line 1: field 'turns' must be text"),
        ('{"prompt": "a", "reference": {}}\n', "line 1: field 'reference' must be text"),
        ('{"prompt"', "line 1: not JSON"),
        ('"a"\n', "line 1: must be an object"),
        ("", "holds no rows"),
    ],
)
def test_rows_that_are_wrong(text: str, says: str | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    if says is None:
        assert source.from_files(suite.own(path), [path]).items[1].turns == ("5",)
        return
    with pytest.raises(InvalidSuite, match=says):
        source.from_files(suite.own(path), [path])


def test_sets_from_their_public_home(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None = None, **rest: Any) -> list[dict[str, Any]]:
        asked.append((name, config, rest.get("data_files"), rest["split"]))
        return [SAMPLES["mbpp"] | SAMPLES["mt_bench"] | {"db_id": "d", "question": "q"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    read = source.from_home(suite.named("mbpp"))
    assert asked == [("google-research-datasets/mbpp", "full", None, "test")]
    assert read.items[0].id == "11"
    assert set(read.fingerprints) == {"google-research-datasets/mbpp"}
    source.from_home(suite.named("mt_bench"))
    assert asked[1][0] == "json"
    assert str(asked[1][2]).endswith("mt_bench/question.jsonl")
    assert source.from_home(suite.named("spider")).items[0].turns[0].startswith("Database: d\n\n")

    def down(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nat all")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=down))
    with pytest.raises(InvalidSuite, match=r"openai/gsm8k cannot be read \(no route\).*--data"):
        source.from_home(suite.named("gsm8k"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidSuite, match=r"pip install 'selfdraft\[bench\]'"):
        source.from_home(suite.named("gsm8k"))
    with pytest.raises(InvalidSuite, match="no public home"):
        source.from_home(suite.named("py_edits"))


# The machine


def test_posix_modules_are_imported_where_they_are_used() -> None:
    """Windows has none of them: no file of the bench, or of what it shares, imports one at its top."""
    home = Path(report.__file__).parents[1]
    files = [*home.glob("bench/**/*.py"), *home.glob("_common/*.py"), home / "cli" / "bench.py"]
    tops = {
        file.name: [line for line in file.read_text().splitlines() if line[:1].isalpha()] for file in files
    }
    assert len(tops) > 20
    found = re.compile(r"(import|from) (fcntl|resource|termios|pwd|grp)\b|.*os\.(sysconf|pread)\b")
    assert [(name, line) for name, lines in tops.items() for line in lines if found.match(line)] == []


def test_background_work_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, after = machine.Clock(100, 10, 0), machine.Clock(103, 11, 1)
    assert machine.others(before, after) == 2
    assert machine.others(None, after) is None
    quiet = report.background([record("a", [1], [1], [1.0])], {"idle_cores_busy": 0.01})
    assert quiet["quiet"] is True
    loud = report.background([], {"idle_cores_busy": 1.5})
    assert "1.5 cores" in loud["said"]
    assert machine.instructions() or not (machine.PROC / "cpuinfo").exists()
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.instructions() == []
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags : fpu avx avx2 avx512f amx_bf16 sse\n")
    assert machine.instructions() == ["amx_bf16", "avx2", "avx512f"]
    assert machine.Clock.read() is None
    assert idle_load(0) is None
    assert report.background([], {"idle_cores_busy": None})["quiet"] is None


# The command


def test_command(command: Run, folder: Path, mine: Path, tmp_path: Path) -> None:
    words = (
        *("bench", "--file", str(mine), "--model", str(folder), "-m", "llma:block=4", "-m", "jacobi"),
        *("--baseline", "generate", "--baseline", "lookup-5", "-n", "10", "--repeats", "2"),
        *("--out", str(tmp_path / "out")),
    )
    code, out, _ = command(*words)
    assert code == 0
    assert "x plain" in out
    assert "background work" in out
    assert "prompts through the chat template" not in out
    assert "raw prompts" in " ".join(out.split())
    assert "tokens can be copied" in " ".join(out.split())
    last = json.loads(out.splitlines()[-1])
    names = ["plain", "llma:block=4", "jacobi", "generate", "lookup-5"]
    assert list(last["suites"]["mine"]["arms"]) == names
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert kept["provenance"]["argv"] == ["selfdraft", *words]
    assert set(kept["provenance"]) >= {"time", "seeds", "idle_cores_busy", "answers_found"}
    assert set(kept["run"]["machine"]) >= {"torch", "transformers", "selfdraft", "commit", "threads"}
    assert (kept["run"]["chat"], kept["run"]["stored"]) == (False, None)
    assert len(kept["run"]["weights"]) == 64
    assert set(kept["bound"]["rows"]["ratio"]) == {"1", "2", "4", "8", "16", "24", "32", "48", "64"}
    (one,) = kept["suites"].values()
    assert one["asked"] == ["add", "talk", "3"]
    assert all(len(sha) == 64 for sha in one["data"].values())
    for name in names[:3]:
        figures = one["arms"][name]
        assert figures["identity"] == {"identical": 8, "of": 8, "differences": []}
        assert figures["grade"] == "base"
        assert figures["cut"]["tokens"] <= figures["whole"]["tokens"] == 80
    assert one["arms"]["jacobi"]["cut"]["against_generate"]["interval"]
    code, out, err = command(*words, "--json")
    assert code == 0
    assert "which has 40 answers" in " ".join(err.split())
    assert out.count("\n") == 1


def test_help_names_every_suite(command: Run) -> None:
    code, out, _ = command("bench", "--help")
    assert code == 0
    words = out.replace(",", " ").replace(".", " ").split()
    assert set(suite.available()) <= set(words)


def test_command_at_a_temperature(command: Run, folder: Path, mine: Path, tmp_path: Path) -> None:
    code, out, _ = command(
        *("bench", "--file", str(mine), "--model", str(folder), "-n", "6", "--repeats", "1"),
        *("--temperature", "0.8", "--seed", "3", "--prompts", "2", "--out", str(tmp_path / "out")),
    )
    assert code == 0
    assert "not expected to be identical" in " ".join(out.split())
    (one,) = json.loads((tmp_path / "out" / "report.json").read_text())["suites"].values()
    expected = {name: figures["identity_expected"] for name, figures in one["arms"].items()}
    assert expected == {"plain": True, "auto": True, "generate": False}
    assert one["arms"]["auto"]["identity"]["identical"] == one["arms"]["auto"]["answers"]


@pytest.mark.parametrize(
    ("dtype", "temperature", "expected"),
    [("float32", 0.0, True), ("bfloat16", 0.0, False), ("float32", 0.8, False)],
)
def test_where_generate_must_give_plain_decodings_text(
    dtype: str, temperature: float, expected: bool, folder: Path
) -> None:
    """16-bit types round by the number of rows, and at a temperature its noise differs."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert (
        Generated("generate", theirs, SamplingParams(temperature=temperature), frozenset()).identity_expected
        == expected
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give --suite"),
        (["--suite", "nope"], "there are gsm8k"),
        (["--suite", "py_edits"], "no public home"),
        (["--suite", "py_edits", "--data", "no-such-folder"], "no-such-folder"),
        (["--file", "no-such-file"], "no-such-file"),
        (["--file", "MINE", "--file", "MINE"], "two suites"),
        (["--file", "MINE", "--method", "medusa"], "medusa"),
        (["--file", "MINE", "--baseline", "beam"], "no baseline 'beam'"),
        (["--file", "MINE", "--max-new-tokens", "0"], "at least 1"),
        (["--file", "MINE", "--temperature", "-1"], "temperature"),
        (["--file", "MINE", "--method", "llma", "--method", "llma"], "given twice"),
        (["--file", "MINE", "--model", "no/such/model"], "no/such/model"),
        (["--file", "MINE", "--model", "MAMBA"], "linear_attention are not supported"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    words: list[str], says: str, command: Run, folder: Path, mine: Path, tmp_path: Path
) -> None:
    if "MAMBA" in words:
        unfit(folder, tmp_path / "MAMBA")
    places = {"MINE": str(mine), "MAMBA": str(tmp_path / "MAMBA")}
    words = [places.get(word, word) for word in words]
    model = [] if "--model" in words else ["--model", str(folder)]
    code, out, err = command("bench", *words, *model, "--out", str(tmp_path / "out"))
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err
    assert not (tmp_path / "out").exists()


def unfit(folder: Path, path: Path) -> None:
    """A model that has no attention to verify a tree with, under the tokenizer of another."""
    config = transformers.MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=320, state_size=8)
    transformers.MambaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((folder / name).read_bytes())
