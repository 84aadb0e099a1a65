"""One request under way: its text, where it ends, and what the picks of one forward do to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from ..drafting.method import Drafter
from ..errors import DraftError, InvalidTree, SelfdraftError
from ..models.protocol import Cache
from ..params import SamplingParams
from ..sampling.sampler import Sampler
from ..sampling.stopping import Stop, StopWatch
from .step import Step, accept
from .tree import Tree

PREFILL = 512
"""Rows of one prefill call, at most."""
MAX_DRAFT = 512
"""Rows that a drafter may propose, at most."""

FinishReason = Literal["eos", "stop", "length", "context", "cancelled", "error"]


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
    cache: Cache
    context: int
    """Tokens that the model's context holds."""
    eos_ids: frozenset[int] = frozenset()
    """Token ids that end the text; the one that does stays in `tokens`."""
    stop: Stop | None = None
    """What else ends it."""
    keep: bool = False
    """The cache outlives the request."""
    early: bool = False
    """Its drafter observes rows that are not done. Its steps are then stages, of which `loops` make a
    forward."""
    loops: int = 1
    pending: Tree | None = None
    """The tree of a drafter that does not observe such rows, while the tree is in flight."""
    tokens: list[int] = field(init=False)
    """Prompt and text so far."""
    watch: StopWatch | None = field(init=False)
    reused: int = field(init=False)
    """Tokens of the prompt that came with another request's cache."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the tokens added, where they were asked for."""
    runs: list[int] = field(default_factory=list)
    """Tokens emitted by each decode step."""
    rows: int = 0
    """Rows that the decode steps ran."""
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
        return min(self.params.max_new_tokens - self.added, self.context - len(self.tokens))

    @property
    def ready(self) -> bool:
        """True if the prompt has been read."""
        return self.cache.length == len(self.tokens) - 1

    @property
    def forwards(self) -> float:
        """Decode forwards through the whole depth of the model; stages count as parts of one."""
        return len(self.runs) / self.loops if self.early else len(self.runs)

    def unread(self) -> Sequence[int]:
        """The part of the prompt that the next prefill call reads; empty when there is none left."""
        start = self.cache.length
        return self.tokens[start : min(start + PREFILL, len(self.tokens) - 1)]

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
        return tree.prune(self.room - 1)

    def has_output(self, tree: Tree, done: Sequence[bool]) -> bool:
        """True if a forward produced an output for this request. Otherwise all rows stay in flight."""
        if self.early or done[0]:
            self.pending = None
            return True
        self.pending = tree
        self.cache.keep([], range(len(tree)))
        return False

    def advance(
        self, tree: Tree, logits: Tensor, scores: Tensor, picks: Sequence[int], done: Sequence[bool]
    ) -> Step:
        """Take the picks of one forward: extend the text and keep the accepted rows."""
        walked, in_flight = accept(tree, picks, done)
        path = walked[: self._end([picks[row] for row in walked])]
        in_flight = in_flight if len(path) == len(walked) else []
        step = Step(tree, scores, picks, path, in_flight)
        if self.params.logprobs is not None:
            self.logprobs += _logprobs(logits, path, step.emitted, self.params.logprobs)
        self.cache.keep(path, in_flight)
        self.tokens += step.emitted
        self.sampler.take(step.emitted)
        self.runs.append(len(path))
        self.rows += len(tree)
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


def first_end(tokens: Sequence[int], eos_ids: frozenset[int]) -> int | None:
    """Index of the first token that ends the text, if there is one."""
    return next((i for i, token in enumerate(tokens) if token in eos_ids), None)


def _named(error: Exception, where: str) -> SelfdraftError:
    """An error of a drafter as one of this package."""
    if isinstance(error, SelfdraftError):
        return error
    return DraftError(f"{where} raised {type(error).__name__}: {error}")


def _logprobs(logits: Tensor, path: Sequence[int], tokens: Sequence[int], top: int) -> Iterator[TokenLogprob]:
    """Of the tokens picked after the rows of a path. In float64, so that no bit depends on the other rows."""
    logprobs = logits[list(path)].double().log_softmax(-1)
    values, ids = logprobs.sort(stable=True, dim=-1, descending=True)
    for own, token, best, which in zip(logprobs, tokens, values[:, :top], ids[:, :top], strict=True):
        yield TokenLogprob(token, float(own[token]), list(zip(which.tolist(), best.tolist(), strict=True)))
