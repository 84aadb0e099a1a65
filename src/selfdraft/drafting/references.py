"""Reference texts as token ids, in the spellings that another text may give them.

A text is cut into other tokens at its borders when it stands inside another one: a line break or a
space before it joins its first characters, SentencePiece marks its first word, what follows it joins its
last characters. Further in the cuts agree again. So to the ids of each text come short pieces: its first
tokens as they are after a line break or a space, its last ones as they are before a line break, each
with some tokens of where they agree, so that a match goes over from one to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import cast

from transformers import PreTrainedTokenizerBase

from ..errors import InvalidPrompt, InvalidReference

Encode = Callable[[str], Sequence[int]]

BEFORE = ("\n", " ")
AFTER = ("\n",)
WINDOW = 256  # characters at a border that are encoded anew
BEYOND = 32  # tokens of a piece where the cuts agree, at most: a step's worth


def spellings(encode: Encode, references: Sequence[str | Sequence[int]]) -> list[Sequence[int]]:
    """The ids of each reference, then the pieces at the borders of those given as text.

    encode: without special tokens. Ids pass as they are. Raises InvalidReference for what is neither.
    """
    several = isinstance(references, Sequence) and not isinstance(references, str | bytes)
    if not several or not all(isinstance(one, str) or is_ids(one) for one in references):
        raise InvalidReference(
            f"references is a list of texts or of lists of token ids; got {references!s:.100}"
        )
    texts = [text for text in references if isinstance(text, str)]
    try:
        whole = [encode(text) if isinstance(text, str) else list(text) for text in references]
        pieces = [piece for text in texts for piece in (*_starts(encode, text), *_ends(encode, text))]
    except InvalidPrompt as error:  # of a text that is none
        raise InvalidReference(f"a reference cannot be read: {error}") from error
    return [*whole, *dict.fromkeys(pieces)]


def is_ids(value: object) -> bool:
    """True for a sequence of token ids. Bytes are none, though they are integers to Python."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        return False
    return all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """Token ids of a text, however long. Raises InvalidPrompt for one that is not Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidPrompt(
            f"the text holds a lone surrogate at character {error.start}, so it is not Unicode text: "
            f"{text[max(0, error.start - 20) : error.start + 20]!a}"
        ) from None
    # verbose=False: a reference may be longer than the context, which transformers would warn of
    return cast(list[int], tokenizer.encode(text, add_special_tokens=special, verbose=False))


def _starts(encode: Encode, text: str) -> Iterator[tuple[int, ...]]:
    known = encode(text[:WINDOW])[::-1]
    for lead in BEFORE:
        spelled = encode(lead + text[:WINDOW])[::-1]
        agree = _agree(known, spelled)
        if agree < len(known):
            yield tuple(spelled[max(0, agree - BEYOND) :][::-1])


def _ends(encode: Encode, text: str) -> Iterator[tuple[int, ...]]:
    known = encode(text[-WINDOW:])
    for trail in AFTER:
        spelled = encode(text[-WINDOW:] + trail)
        agree = _agree(known, spelled)
        if agree < len(known):
            yield tuple(spelled[max(0, agree - BEYOND) :])


def _agree(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences share at their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
