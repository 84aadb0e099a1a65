"""What earlier answers gain: prompts that are asked again, prompts like earlier ones, and unrelated ones.

    python benchmarks/answers.py --data DIR [--method auto] [--kept 100000] [--prompts 12] [--length 128]

Three engines answer each prompt in turn: plain decoding, the method, and the method with earlier answers,
whose store is full of other text when it begins. Prompts are asked (new), then changed a little (similar),
then as they were (again):

    reworded   a question with a request added before or behind it
    numbers    a word problem with another number
    functions  a function to complete, then also to explain
    edits      one function with three tasks
    file       one file with four questions

For each: tokens per forward, the median of paired ratios of plain decoding's time to this one's, the
drafter's own time a step, and draft tokens from earlier answers, accepted and verified. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drafters import Timed
from selfdraft import LLM, Engine, Limits, Request, SamplingParams
from selfdraft.bench import source, suite
from selfdraft.bench.arm import method
from selfdraft.models.loading import DEFAULT_MODEL

ADDED = ("{} Keep it simple.", "Please answer this: {}")
EXPLAINED = ("Complete this function and explain it.\n\n{}",)
TASKS = ("Write the changed function and nothing else.\n\n{}", "{}\n\nAdd a docstring, too.")
ASKED = (
    "What does this file do?\n\n{}",
    "List its functions with one sentence for each.\n\n{}",
    "Write this file with type hints.\n\n{}",
    "Write this file with a docstring in each function.\n\n{}",
)
FILE = 1500  # characters of a file
PIECE = 128  # tokens of an answer that fills the store
FILL = ("spider", "py_code", "spec_bench")  # suites whose texts do


@dataclass
class Figures:
    """One engine's answers to the prompts of one kind."""

    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    """Of its decode steps."""
    micros: list[float] = field(default_factory=list)
    """The drafter's time of each step."""
    ratios: list[float] = field(default_factory=list)
    """Decode time of plain over this, by prompt."""
    accepted: int = 0
    drafted: int = 0

    def record(self) -> dict[str, object]:
        return {
            "tokens/forward": round(self.tokens / self.forwards, 2),
            "tokens/s": round(self.tokens / self.seconds),
            "times plain": round(statistics.median(self.ratios), 2),
            "drafter us, median": round(statistics.median(self.micros)),
            "from answers": [self.accepted, self.drafted],
        }


class Way:
    """A method on an engine of its own."""

    def __init__(self, llm: LLM, name: str, kept: int = 0) -> None:
        self.llm = llm
        self.engine = Engine(llm.model, Limits(earlier_answers=kept))
        self.timed = Timed(method(name))
        self.found: defaultdict[str, Figures] = defaultdict(Figures)

    def answer(self, kind: str, prompt: Sequence[int], length: int, plain: Request | None) -> Request:
        self.timed.seconds.clear()
        params = SamplingParams(max_new_tokens=length)
        request = self.engine.submit(prompt, self.timed, params, eos_ids=self.llm.eos_ids)
        for _ in self.engine.run(request):
            pass
        figures = self.found[kind]
        figures.tokens += request.added
        figures.forwards += len(request.runs)
        figures.seconds += request.seconds
        figures.micros += [1e6 * seconds for seconds in self.timed.seconds]
        figures.ratios.append((plain or request).seconds / request.seconds)
        count = getattr(self.timed.inner, "sources", {}).get("answer")
        if count is not None:
            figures.accepted += count.accepted
            figures.drafted += count.drafted
        assert plain is None or request.emitted == plain.emitted
        return request


def groups(data: Path, prompts: int) -> Iterator[tuple[str, list[str]]]:
    """Name of a kind, and prompts like each other."""

    def some(name: str) -> list[str]:
        items = source.from_folder(suite.named(name), data).items
        return [item.turns[0] for item in items[:: max(1, len(items) // prompts)][:prompts]]

    for text in some("mt_bench"):
        yield "reworded", [text, *(form.format(text) for form in ADDED)]
    for text in some("gsm8k"):
        yield "numbers", [text, re.sub(r"\b\d+\b", lambda found: str(int(found[0]) + 1), text, count=1)]
    for text in some("humaneval"):
        yield "functions", [text, *(form.format(text) for form in EXPLAINED)]
    for text in some("py_edits"):
        yield "edits", [text, *(form.format(text) for form in TASKS)]
    for text in some("py_code")[: max(1, prompts // 2)]:
        yield "file", [form.format(text[:FILE]) for form in ASKED]


def fill(way: Way, data: Path, kept: int) -> int:
    """Fill a store with texts that are no answers to any of the prompts. Returns the tokens."""
    store, count = way.engine.answers, 0
    assert store is not None
    for name in FILL:
        for item in source.from_folder(suite.named(name), data).items:
            ids = way.llm.encode(item.turns[0][: 8 * PIECE], special=False)[:PIECE]
            if count + len(ids) > kept:
                return count
            store.add("", ids)
            count += len(ids)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--kept", type=int, default=100_000)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--length", type=int, default=128)
    given = parser.parse_args()
    llm = LLM(given.model)
    ways = {
        "plain": Way(llm, "plain"),
        "without": Way(llm, given.method),
        "with": Way(llm, given.method, given.kept),
    }
    filled = fill(ways["with"], given.data, given.kept)
    asked = list(groups(given.data, given.prompts))
    for phase in ("new", "similar", "again"):
        for name, texts in asked:
            for text in texts[1:] if phase == "similar" else texts[:1]:
                prompt, plain = llm.prompt_ids(text), None
                for way in ways.values():
                    request = way.answer(f"{name}, {phase}", prompt, given.length, plain)
                    plain = plain or request
    found = {name: {kind: one.record() for kind, one in way.found.items()} for name, way in ways.items()}
    for kind in ways["plain"].found:
        for name in ("without", "with"):
            print(f"{kind:20} {name:8} {found[name][kind]}")
    print(json.dumps({"filled": filled, **vars(given), "data": None, "found": found}))


if __name__ == "__main__":
    main()
