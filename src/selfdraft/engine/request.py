"""One request under way: its text, its limits, and what one forward's picks do to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from torch import Tensor

from ..drafting.method import Drafter
from ..errors import InvalidOption
from ..models.protocol import Cache
from ..sampling.processors import Draw
from .step import Step, accept
from .tree import Tree

PREFILL = 512  # rows of one prefill call, at most

FinishReason = Literal["eos", "stop", "length", "context", "cancelled"]


class Watch(Protocol):
    """Looks for the end of one text in what its tokens say. cut: once found, where the text ends, in
    characters."""

    cut: int | None

    def find(self, tokens: Sequence[int], least: int) -> int | None:
        """Read on; the index, among these tokens, of the one that completes an end. Ends completed before
        index `least` do not count."""


class Stop(Protocol):
    """Strings, or whatever else ends a text beside token ids."""

    def watch(self, prompt: Sequence[int]) -> Watch: ...


@dataclass(frozen=True)
class Limits:
    """Where a text ends.

    max_new_tokens: tokens to add, at most. eos: ids that end it, kept in it. stop: what else does, the
    completing token kept. min_new_tokens: tokens to add before eos may be picked and stop counts.
    """

    max_new_tokens: int = 256
    eos: frozenset[int] = frozenset()
    stop: Stop | None = None
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidOption(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise InvalidOption(
                f"min_new_tokens must be from 0 to max_new_tokens ({self.max_new_tokens}); "
                f"got {self.min_new_tokens}"
            )


@dataclass(frozen=True)
class TokenLogprob:
    """What the model thought of a token, in nats, before bias, penalties, temperature and filters.

    top: the most likely ids with theirs, best first, as many as were asked for.
    """

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(eq=False)
class Request:
    """One request under way. Root rule: once ready, cache.length == len(tokens) - 1.

    tokens: prompt and text so far. logprobs: of the tokens added, where they were asked for. runs: tokens
    emitted by each decode step. rows: rows those steps ran. prefills: forwards that read the prompt.
    reused: tokens of the prompt that came with another request's cache. prefill_seconds, seconds: what the
    engine's calls that read the prompt, and its decode steps, took; time between them belongs to others
    and is not counted. early: its drafter hears of rows that are not done; its steps are then stages, of
    which `loops` make a forward. waiting: the tree of a drafter that does not, while it is in in_flight.
    """

    prompt: Sequence[int]
    drafter: Drafter
    draw: Draw
    limits: Limits
    cache: Cache
    context: int
    top: int | None = None  # alternatives per token to note with its logprob; None notes nothing
    keep: bool = False  # does the cache outlive the request?
    early: bool = False
    loops: int = 1
    waiting: Tree | None = None
    tokens: list[int] = field(init=False)
    watch: Watch | None = field(init=False)
    reused: int = field(init=False)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    rows: int = 0
    prefills: int = 0
    finish_reason: FinishReason | None = None
    prefill_seconds: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.watch = self.limits.stop.watch(self.prompt) if self.limits.stop else None
        self.reused = self.cache.length

    @property
    def emitted(self) -> Sequence[int]:
        """The tokens added to the prompt so far."""
        return self.tokens[len(self.prompt) :]

    @property
    def added(self) -> int:
        """How many they are."""
        return len(self.tokens) - len(self.prompt)

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return min(self.limits.max_new_tokens - self.added, self.context - len(self.tokens))

    @property
    def ready(self) -> bool:
        """Has the prompt been read?"""
        return self.cache.length == len(self.tokens) - 1

    @property
    def forwards(self) -> float:
        """Decode forwards through the whole depth of the model; of stages, what they come to."""
        return len(self.runs) / self.loops if self.early else len(self.runs)

    def unread(self) -> Sequence[int]:
        """The part of the prompt that the next prefill call reads; empty when there is none left."""
        start = self.cache.length
        return self.tokens[start : min(start + PREFILL, len(self.tokens) - 1)]

    def propose(self) -> Tree:
        """The drafter's tree, less the rows that could not be emitted any more; the same one again while it
        is in in_flight."""
        if self.waiting is not None:
            return self.waiting
        return self.drafter.propose(self.tokens).prune(self.room - 1)

    def has_output(self, tree: Tree, done: Sequence[bool]) -> bool:
        """Is there something to say after a forward? If not, all rows stay in in_flight."""
        if self.early or done[0]:
            self.waiting = None
            return True
        self.waiting = tree
        self.cache.keep([], range(len(tree)))
        return False

    def advance(
        self, tree: Tree, logits: Tensor, scores: Tensor, picks: Sequence[int], done: Sequence[bool]
    ) -> Step:
        """Take the picks of one forward: extend the text and keep the rows."""
        walked, in_flight = accept(tree, picks, done)
        path = walked[: self._end([picks[row] for row in walked])]
        in_flight = in_flight if len(path) == len(walked) else []
        step = Step(tree, scores, picks, path, in_flight)
        if self.top is not None:
            self.logprobs += _logprobs(logits, path, step.emitted, self.top)
        self.cache.keep(path, in_flight)
        self.tokens += step.emitted
        self.draw.take(step.emitted)
        self.runs.append(len(path))
        self.rows += len(tree)
        if self.finish_reason is None and self.room == 0:
            self.finish_reason = "context" if len(self.tokens) == self.context else "length"
        return step

    def observe(self, step: Step, ahead: Tensor | None) -> None:
        """Tell the drafter. It is others' code, and what it raises must not break the root rule: so this
        comes last. ahead: logits at the mask rows under the last accepted row."""
        if ahead is not None:
            step = replace(step, mask_scores=self.draw.ahead(ahead))
        self.drafter.observe(step)

    def _end(self, picks: Sequence[int]) -> int:
        """How many of these picks belong to the text; notes why it ends, if it does."""
        least = self.limits.min_new_tokens - self.added
        end = first_end(picks, self.limits.eos)
        count = len(picks) if end is None else end + 1
        stop = self.watch.find(picks[:count], least) if self.watch is not None else None
        if stop is not None and stop != end:
            self.finish_reason = "stop"
            return stop + 1
        if end is not None:
            self.finish_reason = "eos"
        return count


def first_end(tokens: Sequence[int], eos: frozenset[int]) -> int | None:
    """Where the text ends within these tokens, if it does; plain decoding would have stopped there."""
    return next((i for i, token in enumerate(tokens) if token in eos), None)


def _logprobs(logits: Tensor, path: Sequence[int], tokens: Sequence[int], top: int) -> Iterator[TokenLogprob]:
    """Of the tokens picked after the rows of a path. In float64, so that no bit depends on the other rows."""
    logprobs = logits[list(path)].double().log_softmax(-1)
    values, ids = logprobs.sort(stable=True, dim=-1, descending=True)
    for own, token, best, which in zip(logprobs, tokens, values[:, :top], ids[:, :top], strict=True):
        yield TokenLogprob(token, float(own[token]), list(zip(which.tolist(), best.tolist(), strict=True)))
