"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from ..sampling.detokenizer import BROKEN
from .generation import Token

FLOOR = -9999.0
"""OpenAI's figure for what has no chance; JSON has no infinity."""


def _byte_values() -> dict[str, int]:
    """The characters in which byte-level tokenizers spell bytes, in GPT-2's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    values = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert set(values) == set(pre_tokenizers.ByteLevel.alphabet())
    return values


BYTES = _byte_values()


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> tuple[str, list[int]]:
    """A token as text and as bytes. Half a character is `\\ufffd` in the text, and itself in the bytes."""
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    if BROKEN not in text:
        return text, list(text.encode("utf-8", "replace"))
    spelled = tokenizer.convert_ids_to_tokens(token)
    assert isinstance(spelled, str)
    if spelled.startswith("<0x") and spelled.endswith(">"):
        return text, [int(spelled[3:-1], 16)]
    if all(character in BYTES for character in spelled):
        return text, [BYTES[character] for character in spelled]
    return text, list(text.encode())


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Token]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, spelled = token_text(tokenizer, token)
        return {"token": text, "logprob": max(logprob, FLOOR), "bytes": spelled}

    content = [
        entry(token.id, token.logprob.logprob)
        | {"top_logprobs": [entry(id, value) for id, value in token.logprob.top]}
        for token in tokens
        if token.logprob is not None
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Token], start: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. start: characters before the answer, of an echoed prompt."""
    known = [(token, token.logprob) for token in tokens if token.logprob is not None]
    return {
        "tokens": [token_text(tokenizer, token.id)[0] for token, _ in known],
        "token_logprobs": [max(entry.logprob, FLOOR) for _, entry in known],
        "top_logprobs": [
            {token_text(tokenizer, id)[0]: max(value, FLOOR) for id, value in entry.top} for _, entry in known
        ],
        "text_offset": [start + token.offset for token, _ in known],
    }
