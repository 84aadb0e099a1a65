"""Grammars: masks, drafts that are cut, and reasoning that is free."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

pytest.importorskip("llguidance", reason="the extra serve is not installed")

from selfdraft import LLM, Method, Request, SamplingParams, Tree
from selfdraft.drafting.speed import Speed
from selfdraft.errors import GrammarError, InvalidOption, NotFinite
from selfdraft.sampling.grammar import Grammar, Grammars, Guide, check, grammars

from conftest import TEXT, VOCABULARY
from looping import tiny_looped

SCHEMA = Grammar("json_schema", json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}}))
WORDS = Grammar("regex", "(return|def) [a-z]{1,4}")


@pytest.fixture(scope="module")
def known(tokenizer: PreTrainedTokenizerFast) -> Grammars:
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


def test_masks_lead_to_texts_of_the_grammar(known: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    for seed in range(20):
        ids = walk(known.guide(WORDS), seed)
        assert ids[-1] == 1
        words = tokenizer.decode(ids[:-1]).split(" ")
        assert words[0] in ("return", "def")
        assert 1 <= len(words[1]) <= 4


def test_a_mask_behind_a_tail_is_the_mask_after_taking_it(known: Grammars) -> None:
    for grammar in (WORDS, SCHEMA):
        ids = walk(known.guide(grammar), 3, 12)
        taken, ahead = known.guide(grammar), known.guide(grammar)
        for count in range(len(ids)):
            there, behind = taken.mask(), ahead.mask(ids[:count])
            assert there is not None
            assert behind is not None
            assert (there == behind).all()
            assert ahead.allowed(ids) >= len([i for i in ids if i != 1])
            taken.take([ids[count]])


def test_drafts_are_cut_where_masks_are(known: Grammars) -> None:
    """A path is allowed as far as each of its tokens is in the mask before it."""
    draw = random.Random(0)
    for seed in range(10):
        guide = known.guide(WORDS)
        path = walk(known.guide(WORDS), seed, 4)
        path[draw.randrange(len(path))] = draw.randrange(2, VOCABULARY)
        count = guide.allowed(path)
        steps = known.guide(WORDS)
        for index, token in enumerate(path):
            mask = steps.mask()
            assert mask is not None
            assert bool(mask[token]) == (index < count) or token == 1
            if index >= count:
                break
            steps.take([token])
        guide.take(path[:count])  # what was rejected has not harmed the matcher
        assert guide.mask() is not None


def test_rows_of_a_tree(known: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    def one(text: str) -> int:
        return tokenizer.encode(text, add_special_tokens=False)[0]

    guide = known.guide(Grammar("regex", "ab|ac"))
    tokens = [5, one("a"), one("b"), one("c"), one("d"), one("b"), one("b")]
    parents = [-1, 0, 1, 1, 1, 4, 0]
    assert guide.rows(tokens, parents) == [True, True, True, True, False, False, False]


def test_an_end_of_the_text_is_no_draft(known: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    """A mask behind it would leave the matcher a token back, so that the text could go on."""
    guide = known.guide(Grammar("regex", "ab?"))
    ids = tokenizer.encode("ab", add_special_tokens=False)
    tree = Tree((5, ids[0], 1, ids[1], 1), (-1, 0, 1, 1, 3))
    assert guide.cut(tree, 9, VOCABULARY) == Tree((5, *ids), (-1, 0, 1))


def test_forced_text_is_a_draft(known: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    guide = known.guide(Grammar("regex", "return add"))
    ids = guide.forced()
    assert "return add".startswith(tokenizer.decode(ids))
    assert ids
    assert guide.allowed(ids) == len(ids)


def test_reasoning_is_free(known: Grammars) -> None:
    opening, closing = 300, 301
    for thinking in (False, True):
        grammar = Grammar("regex", "ab", (opening, closing), thinking)
        guide, bare = known.guide(grammar), known.guide(Grammar("regex", "ab"))
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
def test_unsound_grammars_are_refused(known: Grammars, grammar: Grammar) -> None:
    with pytest.raises(InvalidOption, match="cannot be used"):
        check(grammar)
    with pytest.raises(InvalidOption, match="cannot be used"):
        known.guide(grammar)


def test_a_model_without_an_end_takes_no_grammar(tokenizer: PreTrainedTokenizerFast) -> None:
    ends: Sequence[int] = ()
    with pytest.raises(InvalidOption, match="end-of-text"):
        Grammars(tokenizer, VOCABULARY, ends)


GUIDED = (SCHEMA, WORDS, Grammar("lark", 'start: "def " NAME "(" NAME ")"\nNAME: /[a-z]{1,5}/'))


def guided(llm: LLM, grammar: Grammar | None, method: str | Method, **options: object) -> Request:
    """One request, to its end."""
    params = SamplingParams.read({"max_new_tokens": 40, "seed": 3, **options})
    request = llm.using(method).submit(llm.encode("def add"), (TEXT,), params, grammar=grammar)
    for _ in llm.engine.run(request):
        pass
    return request


def differing(llm: LLM, methods: Sequence[str | Method] = ("llma", "jacobi", "auto")) -> list[str]:
    """Drafted texts that differ from plain guided decoding, or that the grammar excludes."""
    wrong = []
    for grammar in GUIDED:
        for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 9, "presence_penalty": 0.5}):
            plain, *drafted = (
                guided(llm, grammar, method, **options).emitted for method in ("plain", *methods)
            )
            state = grammars(llm.tokenizer, VOCABULARY, frozenset(llm.eos_ids)).guide(grammar)
            allowed = state.allowed([token for token in plain if token != 1]) >= len(plain) - 1
            if not allowed or any(ids != plain for ids in drafted):
                wrong.append(f"{grammar.kind} {options}")
    return wrong


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder))


def test_drafted_is_plain_under_a_grammar(llm: LLM) -> None:
    assert differing(llm) == []
    whole = guided(llm, Grammar("regex", "return add"), "llma")
    assert llm.completion(whole, False).text == "return add"
    assert whole.finish_reason == "eos"
    assert len(whole.runs) < whole.added  # forced text is drafted


@pytest.fixture(scope="module")
def looped(tokenizer: PreTrainedTokenizerFast) -> LLM:
    return LLM(tiny_looped(torch.bfloat16), tokenizer=tokenizer)


EARLY = [Speed(spawn=1), Speed(spawn=1, revise=False), Speed(spawn=2, second=True), Speed()]


def test_early_drafts_are_plain_under_a_grammar(looped: LLM) -> None:
    """Text that the grammar forces is hung on their trees, and rows that it excludes are left out."""
    assert differing(looped, EARLY) == []
    whole = guided(looped, Grammar("regex", "return add"), EARLY[0])
    assert len(whole.runs) < whole.added * looped.model.loops.count
    assert "pass 0" not in whole.sources, "forced text did not start on a pick"


def test_a_planted_fault_in_the_tails_is_found(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Guide.mask
    monkeypatch.setattr(Guide, "mask", lambda self, tail=(): mask(self))  # of the text alone
    with pytest.raises((AssertionError, GrammarError), match=r"had allowed|\[\]"):
        assert differing(llm) == []


def test_a_bias_that_leaves_no_token_ends_its_request(llm: LLM) -> None:
    bans = {token: -math.inf for token in range(VOCABULARY) if token != 5}
    with pytest.raises(NotFinite):
        guided(llm, Grammar("regex", "return"), "llma", logit_bias=bans)


@pytest.fixture(scope="module")
def marked(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer with a token as Qwen2.5 has <tool_call>: added, and not special."""
    made = deepcopy(tokenizer)
    made.add_tokens(["<mark>"])
    return made


@pytest.mark.parametrize("kept", [True, False])
def test_names_of_added_tokens_are_spelled(
    marked: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """llguidance masks all but the added token where its name is forced, and then rejects it."""
    if not kept:
        monkeypatch.setattr(Guide, "_spelled", lambda self, token: [])
    known = Grammars(marked, VOCABULARY + 1, {1})
    for grammar in (Grammar("regex", "<mark>[ab]"), Grammar("json_schema", '{"const": "<mark>"}')):
        guide = known.guide(grammar)
        assert guide.allowed(guide.forced()) == len(guide.forced())
        if not kept:
            with pytest.raises(GrammarError):
                walk(guide, 0)
            continue
        text = marked.decode(walk(guide, 0)[:-1])
        assert text in ("<mark>a", "<mark>b", '"<mark>"')


def test_a_matcher_that_contradicts_itself_ends_its_own_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, params = llm.encode("def add"), SamplingParams(max_new_tokens=12, ignore_eos=True)
    alone = llm.generate("def add", params, raw=True).ids

    def fail(self: Guide, tail: Sequence[int] = ()) -> None:
        raise GrammarError("planted")

    monkeypatch.setattr(Guide, "mask", fail)
    beside = llm.submit(ids, (), params)
    wrong = llm.submit(ids, (), replace(params, ignore_eos=False, logprobs=2), grammar=WORDS)
    while llm.engine.requests:
        llm.engine.step()
    assert (wrong.finish_reason, str(wrong.error), wrong.added) == ("error", "planted", 0)
    assert list(beside.emitted) == alone
