"""Text shown piece by piece == text decoded at once, and never half a character."""

from __future__ import annotations

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from selfdraft.sampling.detokenizer import LONGEST, Detokenizer


def test_pieces_are_the_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    @given(st.text(max_size=30), st.data())
    @hypothesis_settings(max_examples=60, deadline=None)
    def check(text: str, data: DataObject) -> None:
        ids = tokenizer.encode(text + " \N{GRINNING FACE}ö", add_special_tokens=False)
        pieces, at, shown = [], 0, Detokenizer(tokenizer)
        while at < len(ids):
            count = data.draw(st.integers(1, 5))
            pieces.append(shown.add(ids[at : at + count], last=at + count >= len(ids)))
            at += count
        assert "".join(pieces) == text + " \N{GRINNING FACE}ö"
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)

    check()


def test_byte_fallback_is_not_split() -> None:
    """Tokenizers that spell rare characters in bytes turn a run of them that is cut into rubbish."""
    words = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "a": 257, "b": 258}
    raw = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    spelled = PreTrainedTokenizerFast(tokenizer_object=raw)
    text = "a" + 4 * "\N{GRINNING FACE}" + "bé"
    ids = spelled.encode(text, add_special_tokens=False)
    for size in (1, 2, 3, 5):
        shown = Detokenizer(spelled)
        starts = range(0, len(ids), size)
        assert "".join(shown.add(ids[i : i + size], last=i + size >= len(ids)) for i in starts) == text


def test_broken_characters_do_not_depend_on_the_pieces() -> None:
    """A decoder may turn a whole run of bytes into rubbish where one of them is wrong."""
    words = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "a": 257, "b": 258}
    raw = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    spelled = PreTrainedTokenizerFast(tokenizer_object=raw)
    ids = [*spelled.encode("aé\n", add_special_tokens=False), 0xC3 + 1, 258, 0xF0 + 1, 0x9F + 1]
    texts = set()
    for size in (1, 2, 3, 5, len(ids)):
        shown = Detokenizer(spelled)
        starts = range(0, len(ids), size)
        texts.add("".join(shown.add(ids[i : i + size], last=i + size >= len(ids)) for i in starts))
    assert len(texts) == 1
    assert texts.pop().startswith("aé\n")


def test_work_does_not_grow_where_nothing_is_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    shown = Detokenizer(tokenizer)
    half = tokenizer.encode("\N{GRINNING FACE}", add_special_tokens=False)[0]
    for _ in range(50):
        shown.add([1, half])
        assert len(shown.ids) - shown.shown <= LONGEST


def test_the_end_of_text_is_not_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("abc", add_special_tokens=False)
    assert Detokenizer(tokenizer).add([*ids, 1], last=True) == "abc"


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("\N{GRINNING FACE}", add_special_tokens=False)
    shown = Detokenizer(tokenizer)
    assert shown.add(ids[:-1]) == ""
    assert shown.add([], last=True) == "\N{REPLACEMENT CHARACTER}"
