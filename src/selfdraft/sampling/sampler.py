"""The sampler of one request: from the model's logits to scores, whose argmax is the pick.

Greedy: the scores are the processed logits. Otherwise `scores = processed logits + temperature * noise`, the
Gumbel-max form of sampling from softmax(logits / temperature), written so that it does not overflow at tiny
temperatures. The noise is keyed by position, never drawn in call order, so the pick at a position does not
depend on how many forwards or drafts led there. Verification is then equality of tokens at every temperature,
and the distribution is the model's own.

The order is that of transformers' processors: logit bias, repetition penalty, (presence and frequency, which
transformers lacks), the ban on early ends, then temperature, filters and noise.

A penalty counts the text before a row: the committed tokens, and the row's own ancestors in the tree. The
former are counted once, as they come; the latter are added per row, so that every row is scored exactly as
plain decoding would score it there.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence, Set
from functools import cached_property
from typing import overload

import numpy as np
import torch
from torch import Tensor

from ..engine.tree import Tree
from ..errors import InvalidOption
from ..params import SamplingParams
from .grammar import Guide
from .gumbel import Noise, NoiseSource
from .processors import filtered, penalise


class Sampler:
    """Sampling state of one request."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocabulary: int,
        device: torch.device,
        ends: Set[int] = frozenset(),
        sample: int = 0,
        source: NoiseSource | None = None,
        guide: Guide | None = None,
        drafted: Sequence[int] | None = None,
    ) -> None:
        """prompt: token ids; they count for the repetition penalty alone. vocabulary: how many ids the model
        has. ends: ids that may not be picked before `min_new_tokens`. sample: keys the noise, beside
        seed. source: how the model makes noise; None is torch. guide: where the text
        stands in a grammar that it must follow. drafted: the ids that mask rows have logits of, in their
        order; None: all.

        Raises InvalidOption for a bias on an id that the model does not have, and where no token is left.
        """
        check_params(params, vocabulary, ends, sample)
        self.params = params
        self.vocabulary = vocabulary
        self.device = device
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.sample = sample
        self.guide = guide
        self.drafted = drafted
        self.length = len(prompt)  # of the text
        self.start = len(prompt) + params.min_new_tokens  # index in the text from which on it may end
        self._noise = Noise(self.seed, sample, source)
        known = [token for token in sorted(ends) if 0 <= token < vocabulary]  # no other is ever picked
        self._ends = torch.tensor(known, device=device)
        self._bias = torch.zeros(vocabulary, device=device)
        for token, value in params.logit_bias.items():
            self._bias[token] = value
        if params.has_penalties:
            self._counts = torch.zeros(vocabulary, device=device)  # of each token in the answer
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)  # there or in the prompt
            self._seen[list(prompt)] = True

    @property
    def is_argmax(self) -> bool:
        """True if the scores of the next token are the logits themselves."""
        return self._keeps_logits and not self.guide

    @property
    def _keeps_logits(self) -> bool:
        """True if the scores at mask rows are the logits themselves."""
        params = self.params
        return not (params.temperature or params.logit_bias or params.has_penalties or self.bans_ends)

    @property
    def bans_ends(self) -> bool:
        """True if the next token may not end the text."""
        return self.length < self.start and len(self._ends) > 0

    def draws(
        self,
        tree: Tree,
        count: int,
        read: Callable[[], Tensor],
        picks: Sequence[int] | None,
        finite: Sequence[bool],
    ) -> Draws:
        """The picks after the first rows of a tree. count: how many these are. read: gives their logits,
        [count, vocabulary]. picks: the likeliest tokens after them, where they are known. finite: whether
        each row's values are."""
        return Draws(self, tree, count, read, picks if self.is_argmax else None, finite)

    def pick(self, logits: Tensor, position: int) -> int:
        """The token with the best score at an index of the text, if no penalty and no ban depends on what
        stands before it; -1 where none is allowed. logits: [vocabulary]."""
        params = self.params
        if params.logit_bias:
            logits = self._real(logits) + self._bias
        if params.temperature and logits.dtype != torch.float64 and not params.has_filters and not self.guide:
            return self._noise.source.draw(logits.float(), params.temperature, self._noise, position)
        return best(self.draw(logits[None], [position]))[0]

    def scores(self, logits: Tensor, tails: Sequence[Sequence[int]]) -> Tensor:
        """Scores whose argmax is the pick.

        logits: [rows, vocabulary]. tails: per row, the tokens between the text so far and the one that the
        row predicts. Returns [rows, vocabulary], float32 (float64 for float64 logits).
        """
        return self._scores(logits, tails, [self.length + len(tail) for tail in tails], True)

    def mask_scores(self, logits: Tensor) -> Tensor:
        """Scores at mask rows, [rows, ids drafted], as the logits: they predict the tokens that follow the
        text, of which only the first follows it directly. What stands between is unknown, so penalties count
        the text alone."""
        return self._mask_scores(logits, range(self.length, self.length + len(logits)))

    def candidate(self, offset: int, logits: Tensor) -> int:
        """The token with the best score at one mask row, `offset` places after the first. logits: [1, ids
        drafted]."""
        best = int(self._mask_scores(logits, [self.length + offset]).argmax())
        return best if self.drafted is None else self.drafted[best]

    def _mask_scores(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        tails = [()] * len(logits)
        if self.drafted is None:
            return self._scores(logits, tails, positions)
        if self._keeps_logits:
            return self._real(logits)
        spread = self._real(logits).new_full((len(logits), self.vocabulary), -math.inf)
        spread[:, self._drafted_ids] = self._real(logits)
        return self._scores(spread, tails, positions)[:, self._drafted_ids]

    @cached_property
    def _drafted_ids(self) -> Tensor:
        return torch.tensor(self.drafted, device=self.device)

    def draw(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        """Scores from logits that have their bias and penalties: filters, then noise.

        logits: [rows, vocabulary]. positions: per row, the index in the text (prompt included) of the token
        that the row predicts. Returns [rows, vocabulary], float32 (float64 for float64 logits).
        """
        logits = self._real(logits)
        if self.params.temperature == 0:
            return logits
        noise = self._noise.at(positions, logits.shape[-1], logits.device)
        return filtered(logits, self.params).add(noise, alpha=self.params.temperature)

    def noise(self, position: int, tokens: Sequence[int]) -> Sequence[float]:
        """The Gumbel noise of some tokens at an index of the text, before it is scaled; zeros when greedy."""
        if self.params.temperature == 0:
            return [0.0] * len(tokens)
        return self._noise.source.few(self._noise, position, tokens, self.vocabulary, self.device)

    def take(self, tokens: Sequence[int]) -> None:
        """Count tokens that the text has gained."""
        self.length += len(tokens)
        self._noise.forget(self.length)
        if self.guide is not None:
            self.guide.take(tokens)
        if self.params.has_penalties:
            ids = torch.tensor(tokens, dtype=torch.long, device=self.device)
            self._counts.index_add_(0, ids, self._counts.new_ones(len(tokens)))
            self._seen[ids] = True

    def _scores(
        self,
        logits: Tensor,
        tails: Sequence[Sequence[int]],
        positions: Sequence[int],
        guided: bool = False,
    ) -> Tensor:
        logits = self._real(logits)
        if self.params.logit_bias:
            logits = logits + self._bias
        if self.params.has_penalties:
            logits = penalise(logits, self.params, *self._before(tails))
        if guided:
            logits = self.guided(logits, tails)
        if self.bans_ends:
            early = torch.tensor([p < self.start for p in positions], device=self.device)[:, None]
            held = logits[:, self._ends].masked_fill(early, -math.inf)
            logits = logits.index_copy(1, self._ends, held)
        return self.draw(logits, positions)

    def guided(self, logits: Tensor, tails: Sequence[Sequence[int]]) -> Tensor:
        """Logits with what the grammar excludes at -inf. tails: as in `scores`."""
        if self.guide is None:
            return logits
        masks = [self.guide.mask(tail) for tail in tails]
        everything = np.ones(self.vocabulary, bool)
        allowed = torch.from_numpy(np.stack([everything if mask is None else mask for mask in masks]))
        return self._real(logits).masked_fill(~allowed.to(logits.device), -math.inf)

    @staticmethod
    def _real(logits: Tensor) -> Tensor:
        return logits if logits.dtype == torch.float64 else logits.float()

    def _before(self, tails: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """How often, and whether, each token occurs before each row, [rows or 1, vocabulary]."""
        where = [(row, token) for row, tail in enumerate(tails) for token in tail]
        if not where:
            return self._counts[None], self._seen[None]
        rows, ids = torch.tensor(where, device=self.device).T
        counts, seen = self._counts.repeat(len(tails), 1), self._seen.repeat(len(tails), 1)
        counts.index_put_((rows, ids), counts.new_ones(len(where)), accumulate=True)
        seen[rows, ids] = True
        return counts, seen


class Draws(Sequence[int]):
    """The tokens picked after the rows of one tree, -1 after one whose values are not finite. Each is drawn
    when it is first asked for, since the walk comes by few of the rows. What depends on the text so far is
    drawn at once: the text will have grown."""

    def __init__(
        self,
        sampler: Sampler,
        tree: Tree,
        count: int,
        read: Callable[[], Tensor],
        picks: Sequence[int] | None,
        finite: Sequence[bool],
    ) -> None:
        self._sampler, self._tree, self._read, self._finite = sampler, tree, read, finite
        self._length = sampler.length
        self._known: list[int | None] = [None] * count if picks is None else list(picks)
        self._logits: Tensor | None = None
        self._scores: Tensor | None = None
        at_once = sampler.params.has_penalties or sampler.bans_ends or sampler.device.type != "cpu"
        if picks is None and at_once:
            found = best(self.scores())
            self._known = [token if fine else -1 for token, fine in zip(found, finite, strict=False)]

    @property
    def logits(self) -> Tensor:
        """Of the rows, [rows, vocabulary]; until the next step."""
        if self._logits is None:
            self._logits = self._read()
        return self._logits

    def scores(self) -> Tensor:
        """See `Step.scores`."""
        if self._scores is None:
            sampler = self._sampler
            if sampler.params.has_penalties or sampler.bans_ends:
                self._scores = sampler.scores(self.logits, self._tails)
            else:
                logits = self.logits + sampler._bias if sampler.params.logit_bias else self.logits
                if self._is_fresh:
                    logits = sampler.guided(logits, self._tails)
                positions = [self._length + depth for depth in self._tree.depth[: len(self)]]
                self._scores = sampler.draw(logits, positions)
        return self._scores

    @property
    def _is_fresh(self) -> bool:
        """True until the text has gained the walk's tokens. Then the grammar stands elsewhere, and what is
        drawn after other rows, for drafts alone, is drawn without it."""
        return self._sampler.length == self._length

    @cached_property
    def _tails(self) -> list[Sequence[int]]:
        return _tails(self._tree, len(self))

    def __len__(self) -> int:
        return len(self._known)

    @overload
    def __getitem__(self, row: int) -> int: ...

    @overload
    def __getitem__(self, row: slice) -> list[int]: ...

    def __getitem__(self, row: int | slice) -> int | list[int]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        known = self._known[row]
        if known is None:
            known = -1
            if self._finite[row]:
                logits = self.logits[row]
                if self._sampler.guide is not None and self._is_fresh:
                    logits = self._sampler.guided(logits[None], [self._tails[row]])[0]
                known = self._sampler.pick(logits, self._length + self._tree.depth[row])
            self._known[row] = known
        return known


def best(scores: Tensor) -> list[int]:
    """Per row of scores the token with the best one; -1 where all are excluded."""
    values, tokens = scores.max(-1)
    return tokens.masked_fill(values == -math.inf, -1).tolist()


def _tails(tree: Tree, count: int) -> list[Sequence[int]]:
    """Per row, of the first `count`, the tokens between the text and the one that the row predicts: its own
    and its ancestors', the root's apart, which the text has already."""
    tails: list[Sequence[int]] = [()]
    for token, parent in zip(tree.tokens[1:count], tree.parents[1:count], strict=True):
        tails.append((*tails[parent], token))
    return tails


def check_params(params: SamplingParams, vocabulary: int, ends: Set[int], sample: int) -> None:
    """Raises InvalidOption as `Sampler` does."""
    if not 0 <= sample < 2**32:
        raise InvalidOption(f"sample must be in [0, 2**32); got {sample}")
    if params.logprobs is not None and params.logprobs > vocabulary:
        raise InvalidOption(
            f"logprobs must be from 0 to {vocabulary}; got {params.logprobs}", option="logprobs"
        )
    for name in ("logit_bias", "eos"):
        unknown = [token for token in getattr(params, name) or () if not 0 <= token < vocabulary]
        if unknown:
            raise InvalidOption(
                f"{name}: no token id {unknown[0]} in a vocabulary of {vocabulary}", option=name
            )
    banned = {token for token, value in params.logit_bias.items() if value == -math.inf}
    if params.min_new_tokens:
        banned |= ends
    if len(banned) >= vocabulary and banned.issuperset(range(vocabulary)):
        raise InvalidOption("logit_bias bans every token, so none can be picked", option="logit_bias")
