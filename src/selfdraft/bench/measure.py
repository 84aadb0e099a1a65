"""The run: every arm answers every prompt, in turn.

Arms take turns on each prompt, and another one begins each time, so that a machine that slows down slows all
of them. All prompts are answered once before any is answered again, so that a run that stops early has
answers to all. Each arm warms up with an answer that does not count. Nothing is printed or written while an
answer is timed.

A model with a chat template is asked through it: each turn is a message of the user. `--raw` asks for the
plain continuation of the text instead. Either way all arms get the same token ids. In a dialogue the later
turns of all arms follow the answers of plain decoding's first repeat.
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

WARM = 16
"""Tokens of an answer that warms up."""
JOIN = "\n\n"
"""Separates an answer from the next raw turn."""
SPARE = 4
"""Tokens per turn that joining texts may cost."""


@dataclass(frozen=True)
class Work:
    """The prompts of one suite that are asked."""

    source: Source
    items: Sequence[Item]
    length: int
    """Longest answer, in tokens."""
    total: int
    """Items that the suite has."""
    too_long: Sequence[str]
    """Ids of items that were left out because they do not fit the context, or the limit that was given."""
    context: int
    """Most tokens that the turns and answers of one item have together."""

    @property
    def name(self) -> str:
        return self.source.suite.name


@dataclass
class Bench:
    """A run: its arms, its prompts, and the journal that keeps the answers."""

    llm: LLM
    arms: Sequence[Arm]
    works: Sequence[Work]
    repeats: int
    journal: Journal
    chat: bool = False
    """Ask through the model's chat template."""
    warmed: set[str] = field(default_factory=set)
    """Suites for which the arms have warmed up."""

    def answers(self) -> int:
        """How many answers a finished run has."""
        turns = sum(len(item.turns) for work in self.works for item in work.items)
        return turns * len(self.arms) * self.repeats

    def run(self, tell: Callable[[Key], None] = lambda key: None) -> None:
        """Answer what has no answer yet. `tell` is called after each answer, outside of any timing. However
        the run ends, the arms are closed, and the processes of other engines end."""
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
            references = self.llm.references(item.references)
            for arm in missing:
                self.journal.add(self._measured(arm, keys[arm], prompt, references, work.length))
                tell(keys[arm])

    def prompt(self, work: Work, item: Item, turn: int) -> Sequence[int]:
        """Token ids of a turn's prompt: the earlier turns with plain decoding's answers, and the turn."""
        answers = [self._text(Key(work.name, item.id, earlier, PLAIN, 0)) for earlier in range(turn)]
        return encoded(self.llm, item, turn, answers, self.chat)

    def _text(self, key: Key) -> str:
        """The text of an answer."""
        ids = self.journal.records[key].ids
        return Detokenizer(self.llm.tokenizer).add(ids, last=True).rstrip()

    def _measured(
        self, arm: Arm, key: Key, prompt: Sequence[int], references: Sequence[Sequence[int]], length: int
    ) -> Record:
        device = self.llm.model.device
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
            sources=answer.sources,
            readouts=answer.readouts,
            peak=machine.peak(device) if answer.peak is None else answer.peak,
            others=_background(before, after, answer),
        )

    def _warm(self, work: Work) -> None:
        """Let each arm answer shortly before a suite's first answer; this does not count."""
        if work.name in self.warmed:
            return
        self.warmed.add(work.name)
        prompt = self.prompt(work, work.items[0], 0)
        references = self.llm.references(work.items[0].references)
        for arm in self.arms:
            arm.answer(prompt, references, min(WARM, work.length))


def encoded(llm: LLM, item: Item, turn: int, answers: Sequence[str], chat: bool) -> Sequence[int]:
    """Token ids of a prompt: the item's turns up to `turn`, with the answers to the earlier ones."""
    if not chat:
        parts = [text for pair in zip(item.turns, answers, strict=False) for text in (*pair, JOIN)]
        return llm.encode("".join([*parts, item.turns[turn]]))
    messages = [{"role": "user", "content": item.chat[0]}]
    for answer, asked in zip(answers, item.chat[1:], strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": asked}]
    return llm.prompt_ids(None, messages)


def _background(before: machine.Clock | None, after: machine.Clock | None, answer: Answer) -> float | None:
    """Processor seconds of other work, less those of another engine that answered."""
    spent = machine.others(before, after)
    return None if spent is None else max(0.0, round(spent - answer.spent, 2))


def plan(
    source: Source,
    llm: LLM,
    prompts: int,
    length: int | None,
    chat: bool = False,
    most: int | None = None,
) -> Work:
    """Choose prompts of a suite: of those that fit, `prompts` spread evenly over the set.

    length: longest answer; None is the suite's. most: longest prompt in tokens, answers apart; None is what
    the model's context allows. Raises InvalidSuite if no prompt fits.
    """
    length = length or source.suite.max_new_tokens
    room = llm.model.context
    read = {item.id: _read(item, llm, chat) for item in source.items}
    needs = {item.id: read[item.id] + len(item.turns) * (length + SPARE) for item in source.items}
    fitting = [one for one in source.items if needs[one.id] <= room and read[one.id] <= (most or room)]
    if not fitting:
        limit = f" and in the limit of {most} tokens a prompt" if most else ""
        raise InvalidSuite(
            f"suite {source.suite.name!r}: no prompt leaves room for answers of {length} tokens in the "
            f"model's context of {room}{limit}; lower --max-new-tokens or raise --max-prompt-tokens"
        )
    chosen = (
        [fitting[i * len(fitting) // prompts] for i in range(prompts)] if prompts < len(fitting) else fitting
    )
    stay = {item.id for item in fitting}
    too_long = [item.id for item in source.items if item.id not in stay]
    context = max(needs[item.id] for item in chosen)
    return Work(source, chosen, length, len(source.items), too_long, context)


def _read(item: Item, llm: LLM, chat: bool) -> int:
    """Tokens of an item's turns, without answers."""
    if not chat:
        return sum(len(llm.encode(turn)) for turn in item.turns)
    return len(encoded(llm, item, len(item.turns) - 1, [""] * (len(item.turns) - 1), chat))
