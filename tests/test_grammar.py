"""Grammars: masks, drafts that are cut, and reasoning that is free."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

pytest.importorskip("llguidance", reason="the extra serve is not installed")

from selfdraft.errors import InvalidOption
from selfdraft.sampling.grammar import Grammar, Grammars, Guide, check

from conftest import VOCABULARY

SCHEMA = Grammar("json_schema", json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}}))
WORDS = Grammar("regex", "(return|def) [a-z]{1,4}")


@pytest.fixture(scope="module")
def grammars(tokenizer: PreTrainedTokenizerFast) -> Grammars:
    return Grammars(tokenizer, VOCABULARY, {1})


def walk(guide: Guide, seed: int, steps: int = 60) -> list[int]:
    """A random text that the masks allow."""
    draw, text = random.Random(seed), []
    for _ in range(steps):
        mask = guide.mask()
        assert mask is not None
        token = draw.choice([int(i) for i in mask.nonzero()[0]])
        guide.take([token])
        text.append(token)
        if token == 1:
            break
    return text


def test_masks_lead_to_texts_of_the_grammar(grammars: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    for seed in range(20):
        ids = walk(grammars.guide(WORDS), seed)
        assert ids[-1] == 1
        words = tokenizer.decode(ids[:-1]).split(" ")
        assert words[0] in ("return", "def")
        assert 1 <= len(words[1]) <= 4


def test_a_mask_behind_a_tail_is_the_mask_after_taking_it(grammars: Grammars) -> None:
    for grammar in (WORDS, SCHEMA):
        ids = walk(grammars.guide(grammar), 3, 12)
        taken, ahead = grammars.guide(grammar), grammars.guide(grammar)
        for count in range(len(ids)):
            there, behind = taken.mask(), ahead.mask(ids[:count])
            assert there is not None
            assert behind is not None
            assert (there == behind).all()
            assert ahead.allowed(ids) >= len([i for i in ids if i != 1])
            taken.take([ids[count]])


def test_drafts_are_cut_where_masks_are(grammars: Grammars) -> None:
    """A path is allowed as far as each of its tokens is in the mask before it."""
    draw = random.Random(0)
    for seed in range(10):
        guide = grammars.guide(WORDS)
        path = walk(grammars.guide(WORDS), seed, 4)
        path[draw.randrange(len(path))] = draw.randrange(2, VOCABULARY)
        count = guide.allowed(path)
        steps = grammars.guide(WORDS)
        for index, token in enumerate(path):
            mask = steps.mask()
            assert mask is not None
            assert bool(mask[token]) == (index < count) or token == 1
            if index >= count:
                break
            steps.take([token])
        guide.take(path[:count])  # what was rejected has not harmed the matcher
        assert guide.mask() is not None


def test_rows_of_a_tree(grammars: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    def one(text: str) -> int:
        return tokenizer.encode(text, add_special_tokens=False)[0]

    guide = grammars.guide(Grammar("regex", "ab|ac"))
    tokens = [5, one("a"), one("b"), one("c"), one("d"), one("b"), one("b")]
    parents = [-1, 0, 1, 1, 1, 4, 0]
    assert guide.rows(tokens, parents) == [True, True, True, True, False, False, False]


def test_forced_text_is_a_draft(grammars: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    guide = grammars.guide(Grammar("regex", "return add"))
    ids = guide.forced()
    assert "return add".startswith(tokenizer.decode(ids))
    assert ids
    assert guide.allowed(ids) == len(ids)


def test_reasoning_is_free(grammars: Grammars) -> None:
    opening, closing = 300, 301
    for thinking in (False, True):
        grammar = Grammar("regex", "ab", (opening, closing), thinking)
        guide, bare = grammars.guide(grammar), grammars.guide(Grammar("regex", "ab"))
        first = bare.mask()
        assert first is not None
        if not thinking:
            mask = guide.mask()
            assert mask is not None
            assert mask[opening]
            first_or_thought = first.copy()
            first_or_thought[opening] = True
            assert (mask == first_or_thought).all()
            guide.take([opening])
        assert guide.mask() is None
        assert guide.allowed([7, 8, 9]) == 3
        assert guide.allowed([7, closing, 7]) == 2
        assert guide.forced() == []
        behind = guide.mask([7, 8, closing])
        assert behind is not None
        assert (behind == first).all()
        guide.take([7, 8, closing])
        after = guide.mask()
        assert after is not None
        assert (after == first).all()


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", '{"type": "nonsense"}'),
        Grammar("json_schema", "{"),
        Grammar("json_schema", "[" * 50_000),
        Grammar("regex", "("),
        Grammar("lark", "start: nothing"),
        Grammar("lark", ""),
    ],
)
def test_unsound_grammars_are_refused(grammars: Grammars, grammar: Grammar) -> None:
    with pytest.raises(InvalidOption, match="cannot be used"):
        check(grammar)
    with pytest.raises(InvalidOption, match="cannot be used"):
        grammars.guide(grammar)


def test_a_model_without_an_end_takes_no_grammar(tokenizer: PreTrainedTokenizerFast) -> None:
    ends: Sequence[int] = ()
    with pytest.raises(InvalidOption, match="end-of-text"):
        Grammars(tokenizer, VOCABULARY, ends)
