"""What ends a text beside token ids: stop strings, or anything else that watches the tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from ..errors import InvalidOption
from .detokenizer import Detokenizer


class StopWatch(Protocol):
    """Looks for the end of one text while its tokens come."""

    cut: int | None
    """Where the text ends, in characters, once the end has been found; None leaves it whole."""

    def find(self, tokens: Sequence[int], least: int) -> int | None:
        """Read on; the index, among these tokens, of the one that completes an end. Ends completed before
        index `least` do not count."""


class Stop(Protocol):
    """What ends a text. The token that completes the end is kept."""

    def watch(self, prompt: Sequence[int]) -> StopWatch:
        """A search in the answer to a prompt of these ids."""


@dataclass(frozen=True)
class StopStrings:
    """Strings that end a text, which is cut before the first of them.

    Raises InvalidOption for an empty string, and for one that holds a special token, which no text shows.
    """

    tokenizer: PreTrainedTokenizerBase
    strings: tuple[str, ...]

    def __post_init__(self) -> None:
        if not all(self.strings):
            raise InvalidOption("stop: an empty string would end every text before it begins", option="stop")
        special = [
            (string, token)
            for string in self.strings
            for token in self.tokenizer.all_special_tokens
            if token in string
        ]
        if special:
            string, token = special[0]
            raise InvalidOption(
                f"stop: {string!r} holds the special token {token!r}, which no text shows; "
                f"give eos={self.tokenizer.convert_tokens_to_ids(token)}",
                option="stop",
            )

    def watch(self, prompt: Sequence[int]) -> StringWatch:
        return StringWatch(self.strings, Detokenizer(self.tokenizer, prompt))

    def safe(self, text: str) -> int:
        """How much of a text, in which no string stands, can be shown: its end may begin one."""
        starts = range(max(0, len(text) - max(map(len, self.strings)) + 1), len(text))
        return next((i for i in starts if any(s.startswith(text[i:]) for s in self.strings)), len(text))


class TextStream:
    """The text of an answer in pieces, while its ids come. What was shown is never taken back: what may be
    the beginning of a stop string is held."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Stop | None = None
    ) -> None:
        self._text = Detokenizer(tokenizer, prompt)
        self._stop = stop if isinstance(stop, StopStrings) else None
        self._held, self._shown = "", 0

    def add(self, ids: Sequence[int]) -> str:
        """The text that these ids complete. They are not the last."""
        self._held += self._text.add(ids)
        safe = self._stop.safe(self._held) if self._stop is not None else len(self._held)
        piece, self._held = self._held[:safe], self._held[safe:]
        self._shown += safe
        return piece

    def finish(self, text: str) -> str:
        """The last piece. text: the whole answer."""
        return text[self._shown :]


class StringWatch:
    """The search for stop strings in one answer, token by token, at a cost that does not grow with it."""

    def __init__(self, strings: Sequence[str], text: Detokenizer) -> None:
        self.strings = strings
        self.text = text
        self.cut: int | None = None
        self.length = 0  # characters read
        self.tail = ""  # the last of them, as many as a stop string may reach back

    def find(self, tokens: Sequence[int], least: int) -> int | None:
        reach = max(map(len, self.strings)) - 1
        for index, token in enumerate(tokens):
            fresh = self.text.add([token])
            before = len(self.tail)
            text = self.tail + (fresh or self.text.held)
            # An occurrence that ended before this token was found then, or did not count.
            starts = [text.find(s, max(0, before - len(s) + 1)) for s in self.strings]
            if index >= least and max(starts) >= 0:
                self.cut = self.length - before + min(start for start in starts if start >= 0)
                return index
            self.length += len(fresh)
            self.tail = (self.tail + fresh)[-reach:] if reach else ""
        return None
