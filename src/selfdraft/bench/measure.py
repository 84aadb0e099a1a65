"""The run: every arm answers every prompt, in turn.

Arms take turns on each prompt, and another begins each time, so that a machine that slows down slows
all of them. All prompts are answered once before any is answered again: a run that stops early has
them all. Each arm answers once before its first answer counts. Nothing is printed or written while an
answer is timed.

In a dialogue the later turns of all arms follow the answers of plain decoding's first repeat: the same
text for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from .._common import machine
from ..errors import InvalidSuite
from ..llm import LLM
from ..sampling.detokenizer import Detokenizer
from .arm import PLAIN, Answer, Arm
from .journal import Journal, Key, Record
from .source import Source
from .suite import Item

WARM = 16  # tokens of an answer that warms up
JOIN = "\n\n"  # between an answer and the next turn


@dataclass(frozen=True)
class Work:
    """The prompts of one suite that are asked, and the length of answers. too_long: ids left out because
    they do not fit the model's context. total: items the suite has. context: most tokens that an item's
    turns and answers have together."""

    source: Source
    items: Sequence[Item]
    length: int
    total: int
    too_long: Sequence[str]
    context: int

    @property
    def name(self) -> str:
        return self.source.suite.name


@dataclass
class Bench:
    """Arms, the work, and where answers go."""

    generator: LLM
    arms: Sequence[Arm]
    works: Sequence[Work]
    repeats: int
    journal: Journal
    warmed: set[str] = field(default_factory=set)

    def answers(self) -> int:
        """How many there will be in the end."""
        turns = sum(len(item.turns) for work in self.works for item in work.items)
        return turns * len(self.arms) * self.repeats

    def run(self, tell: Callable[[Key], None] = lambda key: None) -> None:
        """Answer what has no answer yet. `tell` hears of each answer, between two of them. However it ends,
        arms are closed, and the processes of peers end with them."""
        with ExitStack() as stack:
            for arm in self.arms:
                stack.callback(arm.close)
            for repeat in range(self.repeats):
                for work in self.works:
                    for index, item in enumerate(work.items):
                        self._item(work, item, repeat, index, tell)

    def _item(self, work: Work, item: Item, repeat: int, index: int, tell: Callable[[Key], None]) -> None:
        first = (repeat + index) % len(self.arms)
        turns = [*self.arms[first:], *self.arms[:first]]
        for turn in range(len(item.turns)):
            keys = {arm: Key(work.name, item.id, turn, arm.name, repeat) for arm in turns}
            missing = [arm for arm in turns if keys[arm] not in self.journal.records]
            if not missing:
                continue
            self._warm(work)
            prompt = self.prompt(work, item, turn)
            references = self.generator.references(item.references)
            for arm in missing:
                self.journal.add(self._measured(arm, keys[arm], prompt, references, work.length))
                tell(keys[arm])

    def prompt(self, work: Work, item: Item, turn: int) -> Sequence[int]:
        """The prompt of a turn: what was said before it, plain decoding's answers among it, and the turn."""
        text = item.turns[0]
        for earlier, said in enumerate(item.turns[1 : turn + 1]):
            answer = self.journal.records[Key(work.name, item.id, earlier, PLAIN, 0)].ids
            spoken = Detokenizer(self.generator.tokenizer).add(answer, last=True)
            text += f"{spoken.rstrip()}{JOIN}{said}"
        return self.generator.encode(text)

    def _measured(
        self, arm: Arm, key: Key, prompt: Sequence[int], references: Sequence[Sequence[int]], length: int
    ) -> Record:
        device = self.generator.model.device
        machine.reset_peak(device)
        before = machine.Clock.read()
        answer = arm.answer(prompt, references, length)
        after = machine.Clock.read()
        return Record(
            **key._asdict(),
            prompt_tokens=len(prompt),
            ids=tuple(answer.ids),
            runs=tuple(answer.runs),
            rows=tuple(answer.rows),
            times=tuple(round(at, 7) for at in answer.times),
            part=answer.part,
            peak=machine.peak(device) if answer.peak is None else answer.peak,
            others=_background(before, after, answer),
        )

    def _warm(self, work: Work) -> None:
        """One short answer of each arm, not counted, before a suite's first."""
        if work.name in self.warmed:
            return
        self.warmed.add(work.name)
        prompt = self.generator.encode(work.items[0].turns[0])
        references = self.generator.references(work.items[0].references)
        for arm in self.arms:
            arm.answer(prompt, references, min(WARM, work.length))


def _background(before: machine.Clock | None, after: machine.Clock | None, answer: Answer) -> float | None:
    """Processor seconds of others, less those of a peer that answered."""
    spent = machine.others(before, after)
    return None if spent is None else max(0.0, round(spent - answer.spent, 2))


def plan(source: Source, generator: LLM, prompts: int, length: int | None) -> Work:
    """The suite's prompts that fit the context; of those, `prompts` spread evenly over the set."""
    length = length or source.suite.max_new_tokens
    needs = {item.id: _need(item, generator, length) for item in source.items}
    fitting = [item for item in source.items if needs[item.id] <= generator.model.context]
    if not fitting:
        raise InvalidSuite(
            f"suite {source.suite.name!r}: no prompt leaves room for answers of {length} tokens in the "
            f"model's context of {generator.model.context}; lower --max-new-tokens"
        )
    chosen = (
        [fitting[i * len(fitting) // prompts] for i in range(prompts)] if prompts < len(fitting) else fitting
    )
    stay = {item.id for item in fitting}
    too_long = [item.id for item in source.items if item.id not in stay]
    context = max(needs[item.id] for item in chosen)
    return Work(source, chosen, length, len(source.items), too_long, context)


def _need(item: Item, generator: LLM, length: int) -> int:
    """Tokens of its turns and answers together; joins may cost a token or two each."""
    return sum(len(generator.encode(turn)) + length + 4 for turn in item.turns)
