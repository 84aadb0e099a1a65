"""Answers that follow a grammar: a JSON schema, a regular expression, or a grammar in Lark's notation.

llguidance (the extra `serve`) says which tokens may come next. A mask over the vocabulary takes 0.02 to 2 ms,
checking a draft some microseconds, and a rollback one: so drafts are cut by `allowed` before the forward, and
masks are made only for the rows that the walk reaches. A token that the matcher rejects must never be fed to
it, since its error is permanent.

What a model thinks between `<think>` and `</think>` is free of the grammar.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..engine.tree import Tree
from ..errors import GrammarError, InvalidOption

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT = 8
"""Compiled grammars that a model keeps. Answers to one request share one."""
MAX_FORCED = 32
"""Tokens of forced text that are drafted in one step, at most."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like; plain data, so that it can go to another process."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    """The schema as JSON, the regular expression, or the grammar."""
    think: tuple[int, int] | None = None
    """Token ids of `<think>` and `</think>`: what stands between them is free."""
    thinking: bool = False
    """The answer begins behind a `<think>`."""


@lru_cache(maxsize=4)
def grammars(tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos_ids: frozenset[int]) -> Grammars:
    """The `Grammars` of a model, made once."""
    return Grammars(tokenizer, vocabulary, eos_ids)


class Grammars:
    """Compiles grammars for one model. Making it reads the vocabulary, about a second."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos_ids: Collection[int]) -> None:
        """vocabulary: how many ids the model has. eos_ids: those that may end an answer once it is whole.

        Raises InvalidOption where llguidance is missing, or does not know the tokenizer.
        """
        try:
            from llguidance import hf
        except ImportError:
            raise InvalidOption(
                'grammars need llguidance: pip install "selfdraft[serve]"', option="grammar"
            ) from None
        ends = sorted(token for token in eos_ids if 0 <= token < vocabulary)
        if not ends:
            raise InvalidOption("a grammar needs a model with an end-of-text token", option="grammar")
        try:
            # slow tokenizers have no Rust part; others fail in ways of their own
            self._tokenizer = hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=ends)  # type: ignore[arg-type]
        except Exception as error:
            raise InvalidOption(
                f"llguidance cannot read this tokenizer, so there are no grammars: {error}", option="grammar"
            ) from error
        self._ends = frozenset(ends)
        self._matcher = lru_cache(KEPT)(self._compile)

    def guide(self, grammar: Grammar) -> Guide:
        """The state of one answer. Compiling takes 1 to 200 ms, without Python's lock; any thread may do it.
        Raises InvalidOption for a grammar that says nothing sound."""
        matcher = self._matcher(grammar).deep_copy()
        return Guide(matcher, self._tokenizer, self._ends, grammar.think, grammar.thinking)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the beginning, which is only copied."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, _compiled(grammar), log_level=0)
        if matcher.is_error():
            raise _unsound(grammar, matcher.get_error())
        return matcher


def check(grammar: Grammar) -> None:
    """Raises InvalidOption for a grammar that says nothing sound, or where llguidance is missing."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise InvalidOption(
            'grammars need llguidance: pip install "selfdraft[serve]"', option="grammar"
        ) from None
    wrong = LLMatcher.validate_grammar(_compiled(grammar))
    if wrong:
        raise _unsound(grammar, wrong)


class Guide:
    """Where one answer stands in its grammar."""

    def __init__(
        self,
        matcher: LLMatcher,
        tokenizer: LLTokenizer,
        ends: Set[int],
        think: tuple[int, int] | None,
        thinking: bool,
    ) -> None:
        self._matcher = matcher
        self._ends = ends
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.vocab_size
        self._think = think
        self._thinking = thinking and think is not None
        self._begun = thinking  # the first token may be `<think>`

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of these tokens the grammar lets follow the text, before an end of the text: nothing comes
        behind that, and a rollback of it takes llguidance one token too far."""
        end = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        free, bound = self._split(tokens[:end])
        count: int = self._matcher.validate_tokens(list(bound)) if bound else 0
        return free + count

    def rows(
        self, tokens: Sequence[int], parents: Sequence[int], vocabulary: int | None = None
    ) -> list[bool]:
        """Which rows of a tree stand on paths that the grammar allows. Row 0 carries the last token of the
        text; parents: as in `Tree`, -1 for the root. Rows of ids from `vocabulary` on stay with their
        parents."""
        paths: list[list[int]] = [[]]
        kept = [True]
        for row in range(1, len(tokens)):
            path = [*paths[parents[row]], tokens[row]]
            paths.append(path)
            text = vocabulary is None or tokens[row] < vocabulary
            kept.append(kept[parents[row]] and (not text or self.allowed(path) == len(path)))
        return kept

    def mask(self, tail: Sequence[int] = ()) -> np.ndarray | None:
        """Which tokens may follow the text and a tail that is allowed: bool, [vocabulary]. None: all. Raises
        GrammarError."""
        _, bound = self._split(tail)
        thinking, begun = self._after(tail)
        if thinking:
            return None
        self._consume(bound)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little", count=self._vocabulary).astype(bool)
        if np.count_nonzero(bits) == 1 and (forced := self._spelled(int(allowed.argmax()))):
            allowed[:] = False
            allowed[forced] = True
        if bound:
            self._matcher.rollback(len(bound))
        if self._think is not None and not begun:
            allowed[self._think[0]] = True
        return allowed

    def _spelled(self, token: int) -> list[int]:
        """Tokens with which forced text may go on, where llguidance masks all but one token, which it then
        rejects: an added one, such as <tool_call>, whose name is forced as letters. Else empty."""
        if self._matcher.is_accepting() or self._matcher.validate_tokens([token]):
            return []  # the end of the text, or a token as any
        text: bytes = self._matcher.compute_ff_bytes()
        parts = [self._tokenizer.tokenize_bytes(text[: count + 1]) for count in range(len(text))]
        return [part[0] for part in parts if len(part) == 1 and self._matcher.validate_tokens(part)]

    def cut(self, tree: Tree, room: int, vocabulary: int) -> Tree:
        """A tree of drafts without the rows that the grammar excludes, and with text that it forces. room:
        the depth that rows may have. Ids from `vocabulary` on are mask tokens, which are not text."""
        kept = self.rows(tree.tokens, tree.parents, vocabulary)
        if not all(kept):
            stay = [row for row, keep in enumerate(kept) if keep]
            new = {row: i for i, row in enumerate(stay)}
            tree = Tree(
                tuple(tree.tokens[row] for row in stay), tuple(new.get(tree.parents[row], -1) for row in stay)
            )
        forced = self.forced()[: min(room, MAX_FORCED)]
        if forced and tree.child(0, forced[0]) is None and tree.ordinary(vocabulary) == len(tree):
            tree = tree.hang(0, forced)
        return tree

    def forced(self) -> list[int]:
        """Tokens of which the grammar allows no other text: a draft that is free."""
        if self._thinking or (self._think is not None and not self._begun):
            return []
        tokens = list(self._matcher.compute_ff_tokens())
        return tokens[: self.allowed(tokens)]  # it may force names of added tokens that it rejects

    def take(self, tokens: Sequence[int]) -> None:
        """The text goes on with tokens that are allowed. Raises GrammarError."""
        _, bound = self._split(tokens)
        self._thinking, self._begun = self._after(tokens)
        self._consume(bound)

    def _consume(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if not self._matcher.consume_token(token):
                raise GrammarError(f"llguidance rejects token {token}, which it had allowed")

    def _split(self, tokens: Sequence[int]) -> tuple[int, Sequence[int]]:
        """How many of these tokens are free, and those after them."""
        free = 0
        thinking, begun = self._thinking, self._begun
        for token in tokens:
            opens = self._think is not None and not begun and token == self._think[0]
            if not thinking and not opens:
                break
            free += 1
            thinking, begun = self._think is not None and token != self._think[1], True
        return free, tokens[free:]

    def _after(self, tokens: Sequence[int]) -> tuple[bool, bool]:
        """Whether the text thinks after these tokens, and whether it has begun."""
        free, bound = self._split(tokens)
        if bound or not free:
            return (False if bound else self._thinking), self._begun or bool(tokens)
        assert self._think is not None
        return tokens[free - 1] != self._think[1], True


def _compiled(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    try:
        if grammar.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(json.dumps(json.loads(grammar.text)))
        if grammar.kind == "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        return LLMatcher.grammar_from_lark(grammar.text)
    except (ValueError, RecursionError) as error:
        raise _unsound(grammar, str(error)) from error


def _unsound(grammar: Grammar, why: str) -> InvalidOption:
    named = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}[grammar.kind]
    return InvalidOption(f"the {named} cannot be used: {why.strip():.500}", option="grammar")
