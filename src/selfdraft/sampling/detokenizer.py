"""Ids to text while they arrive: what has been shown is never taken back."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders show for half a character
LONGEST = 8  # tokens held back for a character, at most: four bytes, with some to spare
CONTEXT = 16  # tokens of the prompt looked at, at most, for how the text behind them begins


class Detokenizer:
    """Decodes a growing list of ids in pieces. The work per piece does not grow with the text.

    A piece is held back while it ends inside a character. Decoding starts with the piece before, because
    tokenizers treat the first token of a text differently, and a piece that was shown starts at the
    border of a character. The first piece is decoded behind the end of the prompt, for the same reason.

    Tokens are read one by one, since what decoders make of broken characters depends on what they see at
    once: the text must not depend on how many tokens a step yields. Special tokens say nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = self._context(prompt)
        self.before = 0  # start of the piece that was shown last
        self.shown = len(self.ids)  # its end
        self.known = len(self._decode(self.ids))  # characters of that piece, decoded alone
        self.special = set(tokenizer.all_special_ids)

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """The new text that these ids complete; with `last`, also what was held back."""
        shown = [self._read(token) for token in ids if token not in self.special]
        return "".join([*shown, self._show(self._fresh())] if last else shown)

    def _read(self, token: int) -> str:
        self.ids.append(token)
        text = self._fresh()
        half = text.endswith(BROKEN) and len(self.ids) - self.shown < LONGEST
        return "" if half else self._show(text)

    def _show(self, text: str) -> str:
        if text:
            self.before, self.shown = self.shown, len(self.ids)
            self.known = len(self._decode(self.ids[self.before :]))
        return text

    @property
    def held(self) -> str:
        """What is held back, as far as it is whole characters."""
        return self._fresh().rstrip(BROKEN)

    def _fresh(self) -> str:
        """What the ids say that have not been shown."""
        if self.shown == len(self.ids):
            return ""
        return self._decode(self.ids[self.before :])[self.known :]

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The fewest tokens at the end of the prompt that are text without half a character, if any are."""
        for count in range(1, min(CONTEXT, len(prompt)) + 1):
            text = self._decode(prompt[-count:])
            if text and BROKEN not in text:
                return list(prompt[-count:])
        return []

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
