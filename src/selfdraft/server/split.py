"""The text of a chat answer in its parts: reasoning, content and calls of tools, while it arrives.

Whatever the sizes of the pieces, the parts are the same: text that may begin a tag is held back until it is
known to be one or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .prompts import THINK
from .tools import CLOSE, OPEN, PYTHON_TAG, Call, ToolFormat, parse_call


@dataclass(frozen=True)
class Delta:
    """What a piece of text adds to one part."""

    part: Literal["reasoning", "content"]
    text: str


class Splitter:
    """State of one answer."""

    def __init__(
        self,
        reasons: bool = False,
        reasoning: bool = False,
        tools: ToolFormat | None = None,
        names: frozenset[str] = frozenset(),
    ) -> None:
        """reasons: a `<think>` at the beginning starts reasoning. reasoning: the text begins inside it.
        tools: the format of calls; None: there are none. names: functions that may be called."""
        self._names = names
        self._tools = tools
        self._state = "reasoning" if reasoning else "start" if reasons else "first"
        self._held = ""
        self._trim = reasoning  # blank text before a part's first word is not part of it

    def add(self, text: str, last: bool = False) -> Iterator[Delta | Call]:
        """The parts that this text completes; with `last`, also what was held back."""
        self._held += text
        while True:
            before = self._state, self._held
            yield from getattr(self, f"_{self._state}")(last)
            if (self._state, self._held) == before or not self._held:
                return

    def _start(self, last: bool) -> Iterator[Delta]:
        """Before the first word, which may be `<think>`."""
        text = self._held.lstrip()
        if text.startswith(THINK[0]):
            self._held, self._state, self._trim = text[len(THINK[0]) :], "reasoning", True
        elif last or not THINK[0].startswith(text):
            self._state = "first"
        yield from ()

    def _reasoning(self, last: bool) -> Iterator[Delta]:
        yield from self._until(THINK[1], "reasoning", "first", last)

    def _first(self, last: bool) -> Iterator[Delta | Call]:
        """The first word of the content. A call in Llama's format is the whole of it; small models that
        should write tags may leave them out, too."""
        if self._tools is None:
            self._state = "content"
            return
        text = self._held.strip()
        if self._tools == "llama" and text.startswith(PYTHON_TAG):
            text = text[len(PYTHON_TAG) :].strip()
        elif text and text[0] != "{" and not (self._tools == "llama" and PYTHON_TAG.startswith(text)):
            self._state = "content"
            return
        if last:
            call = parse_call(text, self._names)
            if call is None:
                self._state = "content"
            else:
                self._held = ""
                yield call

    def _content(self, last: bool) -> Iterator[Delta]:
        if self._tools == "hermes":
            yield from self._until(OPEN, "content", "call", last)
        else:
            yield from self._show(len(self._held), "content")

    def _call(self, last: bool) -> Iterator[Delta | Call]:
        inside, tag, rest = self._held.partition(CLOSE)
        if not tag and not last:
            return
        call = parse_call(inside, self._names)
        if call is None:
            yield Delta("content", OPEN + inside + tag)
        else:
            yield call
        self._held, self._state, self._trim = rest, "content", call is not None

    def _until(
        self, tag: str, part: Literal["reasoning", "content"], after: str, last: bool
    ) -> Iterator[Delta]:
        """Show the text up to a tag; behind it another state begins."""
        at = self._held.find(tag)
        if at >= 0:
            yield from self._show(at, part)
            self._held, self._state, self._trim = self._held[len(tag) :], after, True
        else:
            yield from self._show(len(self._held) if last else _safe(self._held, tag), part)

    def _show(self, count: int, part: Literal["reasoning", "content"]) -> Iterator[Delta]:
        text, self._held = self._held[:count], self._held[count:]
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        if text:
            yield Delta(part, text)


def _safe(text: str, tag: str) -> int:
    """How much of a text, in which the tag does not stand, can be shown: its end may begin one."""
    starts = range(max(0, len(text) - len(tag) + 1), len(text))
    return next((i for i in starts if tag.startswith(text[i:])), len(text))
