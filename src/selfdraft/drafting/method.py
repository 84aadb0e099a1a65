"""The extension point: a method is one file with a `Method` and its `Drafter`.

A `Method` holds options, frozen, shared by all requests. A `Drafter` holds the drafting state of one
request and has two verbs. It sees tokens and steps, never the model, the cache or the sampler, and
it cannot change the text: whatever it proposes is only ever compared with the model's own picks.

Methods are found through the entry-point group `selfdraft.methods`, the built-in ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..engine.step import Step
from ..engine.tree import Tree
from .acceptance import SharedAcceptance
from .answers import AnswerIndex

Noise = Callable[[int, Sequence[int]], Sequence[float]]
Cost = Callable[[int], float]


def silent(position: int, tokens: Sequence[int]) -> Sequence[float]:
    """The noise of a greedy request: none."""
    return [0.0] * len(tokens)


def free(rows: int) -> float:
    """The cost of a step where nothing was measured: the same whatever its rows."""
    return 1.0


@dataclass(frozen=True)
class Lookahead:
    """What the adapter of a model drafts with.

    ids: its mask tokens, at or above the vocabulary's size, in the order in which they follow each other. A
    chain of them under a row stands for tokens not known yet: where the model's pick after that row is the
    next token of the text, the scores at mask j are about the token j + 1 places after it. odds: how often
    guesses of a kind came true when the adapter was calibrated, by the drafter's names. filler: the ordinary
    token that a tuned model learned to read as one not known yet, if any; such a model may be without masks.
    vocabulary: the ids that masks predict, to which their scores belong in this order; None: all.
    """

    ids: Sequence[int]
    odds: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    filler: int | None = None
    vocabulary: Sequence[int] | None = None


@dataclass(frozen=True)
class Loops:
    """How a looped model uses its layers.

    count: passes of a token through them. agreement: by pass, how often the pick read out after it is that of
    the full depth, the last being 1; empty where nobody measured it.
    """

    count: int
    agreement: Sequence[float] = ()


@dataclass(frozen=True)
class DraftContext:
    """What a drafter may know of the request it drafts for.

    prompt: its token ids. references: token ids of texts the answer may quote. seed: for drafters
    that guess at random. temperature: of the sampling, 0 is greedy. noise: the Gumbel noise that the
    sampler will add to log-probabilities (logits over temperature) of these tokens at that index of the
    text; zeros when greedy. It is known before the model is asked, so candidates are ranked by
    log-probability plus noise. cost: of so many rows of this request, in tokens that the time would bring
    otherwise (see `engine.load`), 1 of one row; it changes with what other requests run. mask_cost: what
    mask tokens among them add to it. lookahead: what the model's adapter drafts with; None without one.
    loops: of a looped model; None for an ordinary one. acceptance: for rates that later requests of the same
    engine shall start with. answers: earlier answers that this one may quote; None where none are kept.
    """

    prompt: Sequence[int]
    references: Sequence[Sequence[int]] = ()
    seed: int = 0
    temperature: float = 0.0
    noise: Noise = silent
    cost: Cost = free
    mask_cost: Callable[[], float] = lambda: 0.0
    lookahead: Lookahead | None = None
    loops: Loops | None = None
    acceptance: SharedAcceptance = field(default_factory=SharedAcceptance)
    answers: AnswerIndex | None = None


def drawn_noise(context: DraftContext) -> Noise | None:
    """The noise of a request that samples; None of a greedy one."""
    return context.noise if context.temperature > 0 else None


class Drafter(Protocol):
    """Drafting state of one request.

    An attribute `sources`, if it has one, says how many draft tokens there were: a mapping from the name of
    where they are from to a `DraftCount`; it is read after steps that had some. An attribute `readouts` says
    the same of the picks that a looped model's passes gave for the text's tokens, by pass: how many there
    were, and how many were the final ones.
    """

    def propose(self, tokens: Sequence[int]) -> Tree:
        """Rows to verify next; row 0 must carry tokens[-1]. `tokens` is all text so far: read it only.

        Rows of mask tokens stand behind all others. Those under the last row accepted are looked at.
        """

    def observe(self, step: Step) -> None:
        """Learn from what the model picked. The tree may have lost rows that could not be used."""


class Method(Protocol):
    """Options of a way to draft.

    A class attribute `adapted = True` says that it drafts with the mask tokens of an adapter, which the
    model must then come with; `adaptable = True`, that it does so where the model came with one.
    `early = True`: it drafts from picks of rows that are only part of the way through a looped model. Then
    each step is one pass through the layers (a stage), after which all rows are read; those under way stay in
    flight, and go on if they are proposed again.
    """

    def drafter(self, context: DraftContext) -> Drafter:
        """A fresh drafter for one request."""
