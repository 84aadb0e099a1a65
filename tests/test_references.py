"""References spelled as another text spells them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from selfdraft import DraftContext
from selfdraft.drafting import references
from selfdraft.drafting.llma import Llma
from selfdraft.drafting.references import spellings
from selfdraft.models.loading import EMBEDDED

from conftest import TEXT

Encode = Callable[[str], Sequence[int]]


def byte_level() -> Encode:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["looped-tiny"])
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def sentencepiece() -> Encode:
    """As Llama's: a mark for a space, one put before the text."""
    raw = Tokenizer(models.BPE(byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    raw.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    return lambda text: raw.encode(text).ids


TOKENIZERS = [byte_level, sentencepiece]
REFERENCE = "    def push(self, item):\n        self.items.append(item)\n"


def proposed(encode: Encode, given: Sequence[Sequence[int]], before: str, inside: str) -> int:
    """Tokens of REFERENCE, inside another text, that llma proposes behind `before` and the first of them."""
    text, border = encode(before + inside), len(encode(before)) - 1
    drafter = Llma().drafter(DraftContext([0], given, cost=lambda rows: 1 + rows / 1000))
    tree = drafter.propose([0, *text[: border + 2]])
    row, right = 0, 0
    for token in text[border + 2 :]:
        child = tree.child(row, token)
        if child is None:
            break
        row, right = child, right + 1
    return right


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_whole_texts_come_first_then_short_pieces(tokenizer: Callable[[], Encode]) -> None:
    encode = tokenizer()
    given = spellings(encode, [REFERENCE, "item"])
    assert [list(ids) for ids in given[:2]] == [encode(REFERENCE), encode("item")]
    assert len(given) > 2
    long = spellings(encode, [REFERENCE * 400])
    assert sum(len(piece) for piece in long[1:]) < 200, "the pieces do not grow with the text"


@pytest.mark.parametrize(
    ("tokenizer", "before", "inside"),
    [
        (byte_level, "class Stack:\n", REFERENCE),
        (sentencepiece, "x\n\n", "a + b\n    def push(self, item):\n"),
    ],
)
def test_a_match_begins_at_the_border(
    tokenizer: Callable[[], Encode], before: str, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another text cuts the first tokens otherwise, a piece leads into the reference."""
    encode = tokenizer()
    assert proposed(encode, spellings(encode, [inside]), before, inside) >= 9
    monkeypatch.setattr(references, "BEFORE", ())
    monkeypatch.setattr(references, "AFTER", ())
    assert spellings(encode, [inside]) == [encode(inside)]
    assert proposed(encode, [encode(inside)], before, inside) == 0


def test_a_copy_ends_as_the_text_goes_on() -> None:
    encode = byte_level()
    given = spellings(encode, ["return w * h\n"])
    assert encode("return w * h\n\n")[-4:] == list(given[-1][-4:])
