"""One request under way: its text, where it ends, and what the picks of one forward do to it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..drafting.acceptance import DraftCount
from ..drafting.method import Drafter
from ..errors import DraftError, GrammarError, InvalidTree, SelfdraftError, StopError
from ..models.protocol import Cache, Pool
from ..params import SamplingParams
from ..sampling.sampler import Draws, Sampler
from ..sampling.stopping import Stop, StopWatch
from .step import Step, accept
from .tree import MAX_DRAFT, Tree

FinishReason = Literal["eos", "stop", "length", "context", "cancelled", "deadline", "error"]
MIN_SHARED = 32
"""Tokens at least that a prompt must share with another one that is being read to wait for it."""


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, before bias, penalties, temperature and filters."""

    token: int
    logprob: float
    """In nats."""
    top: Sequence[tuple[int, float]]
    """The most likely ids with their log-probabilities, best first, as many as were asked for."""


@dataclass(eq=False)
class Request:
    """One request under way. Root rule: once ready, cache.length == len(tokens) - 1."""

    prompt: Sequence[int]
    drafter: Drafter
    params: SamplingParams
    sampler: Sampler
    context: int
    """Tokens that the model's context holds."""
    eos_ids: frozenset[int] = frozenset()
    """Token ids that end the text; the one that does stays in `tokens`."""
    stop: Stop | None = None
    """What else ends it."""
    salt: str = ""
    """Requests of other salts share no text and no memory with it."""
    deadline: float | None = None
    """When it ends in any case, as `time.monotonic` counts."""
    early: bool = False
    """Its drafter observes rows that are not done. Its steps are then stages, of which `loops` make a
    forward."""
    loops: int = 1
    pending: Tree | None = None
    """The tree of a drafter that does not observe such rows, while the tree is in flight."""
    tokens: list[int] = field(init=False)
    """Prompt and text so far."""
    watch: StopWatch | None = field(init=False)
    cache: Cache | None = None
    """None while it waits."""
    reused: int = 0
    """Tokens of the prompt that another request had read."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the tokens added, where they were asked for."""
    runs: list[int] = field(default_factory=list)
    """Tokens emitted by each decode step."""
    rows: int = 0
    """Rows that the decode steps ran."""
    width: int = 1
    """Rows of the last one."""
    sources: Mapping[str, DraftCount] = field(default_factory=dict)
    """Draft tokens by where they are from, if the drafter says so."""
    readouts: Mapping[str, DraftCount] = field(default_factory=dict)
    """Picks of a looped model's early passes, by pass, if the drafter says so."""
    prefills: int = 0
    """Forwards that read the prompt."""
    finish_reason: FinishReason | None = None
    error: SelfdraftError | None = None
    """Why it ended, where the reason is "error"."""
    prefill_seconds: float = 0.0
    """Time of the engine's calls that read the prompt."""
    seconds: float = 0.0
    """Time of its decode steps. Time between them belongs to others and is not counted."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.watch = self.stop.watch(self.prompt) if self.stop else None

    @property
    def emitted(self) -> Sequence[int]:
        """The tokens added to the prompt so far."""
        return self.tokens[len(self.prompt) :]

    @property
    def added(self) -> int:
        """How many they are."""
        return len(self.tokens) - len(self.prompt)

    @property
    def pace(self) -> float:
        """Tokens that a decode step adds, on average; 1 before the first one."""
        return self.added / len(self.runs) if self.runs else 1.0

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return min(self.params.max_new_tokens - self.added, self.context - len(self.tokens))

    @property
    def ready(self) -> bool:
        """True if the prompt has been read."""
        return self.cache is not None and self.cache.length == len(self.tokens) - 1

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return self.cache.length if self.cache is not None else 0

    @property
    def forwards(self) -> float:
        """Decode forwards through the whole depth of the model; stages count as parts of one."""
        return len(self.runs) / self.loops if self.early else len(self.runs)

    def open(self, pool: Pool) -> None:
        """Begin, or go on after a preemption: with what the pool remembers of its text."""
        self.cache = pool.open(self.tokens, self.salt)
        if not self.prefills and not self.runs:
            self.reused = self.cache.length

    def close(self) -> None:
        """Give the memory back."""
        if self.cache is not None:
            self.cache.close()
            self.cache = None

    def reserve(self, length: int) -> bool:
        """Have memory for so many tokens; False where there is none left."""
        assert self.cache is not None
        return self.cache.reserve(length)

    def keep(self, path: Sequence[int], in_flight: Sequence[int]) -> None:
        """Keep these rows of the last forward."""
        assert self.cache is not None
        self.cache.keep(path, in_flight)
        self.cache.remember(self.tokens)

    def unread(self, rows: int) -> Sequence[int]:
        """The part of its text, of so many tokens at most, that is read next."""
        return self.tokens[self.length : min(self.length + rows, len(self.tokens) - 1)]

    def reads_what(self, other: Request) -> bool:
        """True if it is reading what another request's text begins with, too: that one can share it later."""
        if self.ready or self.salt != other.salt:
            return False
        count = max(self.length + 1, MIN_SHARED)
        return count < min(len(self.tokens), len(other.tokens)) and (
            self.tokens[:count] == other.tokens[:count]
        )

    def propose(self) -> Tree:
        """The drafter's tree, without the rows that could not be emitted any more; the same tree again while
        it is in flight. Raises DraftError."""
        if self.pending is not None:
            return self.pending
        name = type(self.drafter).__name__
        try:
            tree = self.drafter.propose(tuple(self.tokens))
        except Exception as error:  # a drafter is others' code
            raise _named(error, f"{name}.propose") from error
        if not isinstance(tree, Tree):
            raise InvalidTree(f"{name}.propose must return a Tree; got {tree!r:.100}")
        if len(tree) > MAX_DRAFT:
            raise InvalidTree(f"{name} proposed {len(tree)} rows; the limit is {MAX_DRAFT}")
        if not all(type(parent) is int for parent in tree.parents):
            raise InvalidTree(f"{name} proposed parents that are not integers: {tree.parents!s:.100}")
        tree = tree.prune(self.room - 1)
        if self.sampler.guide is not None:
            tree = self.sampler.guide.cut(tree, self.room - 1, self.sampler.vocabulary)
        return tree

    def has_output(self, tree: Tree, done: Sequence[bool]) -> bool:
        """True if a forward produced an output for this request. Otherwise all rows stay in flight."""
        if self.early or done[0]:
            self.pending = None
            return True
        self.pending = tree
        self.keep([], range(len(tree)))
        return False

    def read(self, count: int) -> None:
        """Keep the rows of a part of the prompt, which is a chain."""
        self.keep(range(count), [])
        self.prefills += 1

    def advance(self, tree: Tree, draws: Draws, done: Sequence[bool]) -> Step:
        """Take the picks of one forward: extend the text and keep the accepted rows."""
        try:
            walked, in_flight = accept(tree, draws, done)
        except GrammarError as error:
            self.fail(error)
            walked, in_flight = [], []
        picks = [draws[row] for row in walked]
        try:
            path = walked[: self._end(picks)]
        except Exception as error:  # what watches for the end is others' code
            self.fail(_named(error, "a stopping criterion", StopError))
            path, picks, in_flight = [], [], []
        in_flight = in_flight if len(path) == len(walked) else []
        step = Step(tree, draws.scores, draws, path, in_flight)
        emitted = picks[: len(path)]
        if self.params.logprobs is not None:
            self.logprobs += _logprobs(draws.logits, path, emitted, self.params.logprobs)
        self.tokens += emitted
        self.keep(path, in_flight)
        try:
            self.sampler.take(emitted)
        except GrammarError as error:
            self.fail(error)
        self.runs.append(len(path))
        self.rows += len(tree)
        self.width = len(tree)
        if self.finish_reason is None and self.room == 0:
            self.finish_reason = "context" if len(self.tokens) == self.context else "length"
        return step

    def observe(self, step: Step, mask_logits: Tensor | None) -> None:
        """Tell the drafter what the step decided. mask_logits: logits at the mask rows under the last
        accepted row. Raises DraftError; it is called last, so that the root rule holds even then."""
        if mask_logits is not None:
            step = replace(step, mask_scores=self.sampler.mask_scores(mask_logits))
        try:
            self.drafter.observe(step)
            if len(step.tree) > 1 or self.early:  # else nothing was drafted
                self.sources = _counts(getattr(self.drafter, "sources", {}))
                self.readouts = _counts(getattr(self.drafter, "readouts", {}))
        except Exception as error:  # a drafter is others' code
            raise _named(error, f"{type(self.drafter).__name__}.observe") from error

    def fail(self, error: SelfdraftError) -> None:
        """End with an error; what has been emitted stays."""
        self.finish_reason, self.error = "error", error

    def _end(self, picks: Sequence[int]) -> int:
        """How many of these picks belong to the text; notes why it ends, if it does."""
        least = self.params.min_new_tokens - self.added
        end = first_end(picks, self.eos_ids)
        count = len(picks) if end is None else end + 1
        stop = self.watch.find(picks[:count], least) if self.watch is not None else None
        if stop is not None and stop != end:
            self.finish_reason = "stop"
            return stop + 1
        if end is not None:
            self.finish_reason = "eos"
        return count


def _counts(given: Mapping[Hashable, DraftCount]) -> dict[str, DraftCount]:
    """A drafter's counts as they are now."""
    return {str(name): DraftCount(one.drafted, one.accepted) for name, one in given.items()}


def first_end(tokens: Sequence[int], eos_ids: frozenset[int]) -> int | None:
    """Index of the first token that ends the text, if there is one."""
    return next((i for i, token in enumerate(tokens) if token in eos_ids), None)


def _named(error: Exception, where: str, kind: type[SelfdraftError] = DraftError) -> SelfdraftError:
    """An error of others' code as one of this package; that error is its cause."""
    if isinstance(error, SelfdraftError):
        return error
    named = kind(f"{where} raised {type(error).__name__}: {error}")
    named.__cause__ = error
    return named


def _logprobs(logits: Tensor, path: Sequence[int], tokens: Sequence[int], top: int) -> Iterator[TokenLogprob]:
    """Of the tokens picked after the rows of a path. In float64, so that no bit depends on the other rows."""
    logprobs = logits[list(path)].double().log_softmax(-1)
    values, ids = logprobs.topk(top)
    own = logprobs.gather(-1, torch.tensor([*tokens], device=logits.device)[:, None]).flatten().tolist()
    for token, value, best, which in zip(tokens, own, values.tolist(), ids.tolist(), strict=True):
        alternatives = sorted(zip(which, best, strict=True), key=lambda pair: (-pair[1], pair[0]))
        yield TokenLogprob(token, value, alternatives)
