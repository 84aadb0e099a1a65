"""The filler of a consistency-trained model: one token that stands for positions not known yet.

The model learns to read the filler as "unknown", so no text may hold it. A token that begins or pads texts is
the usual choice, but chat templates put such tokens inside a text: the BOS token of SmolLM2 begins every
message. So candidates are checked against rendered conversations and against the training data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..errors import InvalidOption

TURNS = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]


def choose_filler(
    tokenizer: Any,
    vocabulary: int,
    ends: Collection[int],
    rows: Iterable[Mapping[str, Any]],
    kept: int | None = None,
) -> int:
    """The special token that stands inside the fewest texts of the data, and in no conversation.

    A text may begin with it. ends: ids that end texts. rows: the training data, token ids of `prompt` and
    `answer`. kept: the filler of the adapter to start from, preferred if it still qualifies. Raises
    InvalidOption if no token qualifies.
    """
    used = set(ends) | template_ids(tokenizer)
    inside: Counter[int] = Counter()
    for row in rows:
        inside.update(row["prompt"][1:])
        inside.update(row["answer"])
    source = str(tokenizer.chat_template or "")
    special = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    candidates = [
        int(token)
        for token in (kept, tokenizer.bos_token_id, tokenizer.pad_token_id, *special)
        if token is not None
        and token not in used
        and 0 <= token < vocabulary
        and str(tokenizer.convert_ids_to_tokens(token)) not in source
    ]
    if not candidates:
        raise InvalidOption(
            "unknown: every special token of the tokenizer ends texts or is in the chat template, so "
            "none can be the filler; give --unknown random"
        )
    return min(candidates, key=inside.__getitem__)  # of equal ones the first


def template_ids(tokenizer: Any) -> set[int]:
    """The token ids of conversations rendered by the chat template, except for the first id of each."""
    if not tokenizer.chat_template:
        return set()
    found: set[int] = set()
    for turns in (TURNS, TURNS[1:], TURNS[1:2]):
        for prompt in (False, True):
            found.update(_rendered(tokenizer, turns, prompt)[1:])
    return found


def _rendered(tokenizer: Any, turns: Sequence[Mapping[str, str]], prompt: bool) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(list(turns), add_generation_prompt=prompt, tokenize=False)
    except Exception:  # a template refuses roles that it does not know with an error of any kind
        return []
    return list(tokenizer.encode(text, add_special_tokens=False))
