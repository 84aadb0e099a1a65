"""One sample under way: from the model's logits to scores, with the text that penalties count.

The order is that of transformers' processors: logit bias, repetition penalty, (presence and frequency,
which transformers lacks), the ban on early ends, then temperature, filters and noise (`sampling`).

What a penalty sees is the text before a row: the committed tokens, and the row's own ancestors in the
tree. The former are counted once, as they come; the latter are added per row, so that every row is
scored exactly as plain decoding would score it there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import InvalidOption
from .sampler import Sampler


class Draw:
    """State of one sample.

    sampler: its options. prompt: ids; they count for the repetition penalty alone. vocabulary: how many
    ids the model has. ends: ids that may not be picked before `least` tokens have been. Raises
    InvalidOption for a bias on an id that the model does not have.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompt: Sequence[int],
        vocabulary: int,
        device: torch.device,
        ends: Set[int] = frozenset(),
        least: int = 0,
    ) -> None:
        strange = [token for token in sampler.logit_bias if not 0 <= token < vocabulary]
        if strange:
            raise InvalidOption(f"logit_bias: no token id {strange[0]} in a vocabulary of {vocabulary}")
        self.sampler = replace(sampler)  # noise that is remembered lives as long as the sample
        self.vocabulary = vocabulary
        self.device = device
        self.length = len(prompt)
        self.start = len(prompt) + least  # index in the text from which on it may end
        known = [token for token in sorted(ends) if 0 <= token < vocabulary]  # no other is ever picked
        self._ends = torch.tensor(known, device=device)
        self._bias = torch.zeros(vocabulary, device=device)
        for token, value in sampler.logit_bias.items():
            self._bias[token] = value
        if sampler.penalises:
            self._counts = torch.zeros(vocabulary, device=device)  # of each token in the answer
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)  # there or in the prompt
            self._seen[list(prompt)] = True

    def scores(self, logits: Tensor, tails: Sequence[Sequence[int]]) -> Tensor:
        """Scores whose argmax is the pick.

        logits: [rows, vocabulary]. tails: per row, the tokens between the text so far and the one that the
        row predicts. Returns [rows, vocabulary], float32 (float64 for float64 logits).
        """
        return self._scores(logits, tails, [self.length + len(tail) for tail in tails])

    def ahead(self, logits: Tensor) -> Tensor:
        """Scores of guesses at the tokens that follow the text, of which only the first follows it directly:
        what stands between is unknown, so penalties count the text alone. Of [rows, vocabulary]."""
        rows = len(logits)
        return self._scores(logits, [()] * rows, range(self.length, self.length + rows))

    def guess(self, offset: int, logits: Tensor) -> int:
        """The token with the best score of such a guess alone, so many places after the first. Of [1,
        vocabulary]."""
        return int(self._scores(logits, [()], [self.length + offset]).argmax())

    def _scores(self, logits: Tensor, tails: Sequence[Sequence[int]], positions: Sequence[int]) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.sampler.logit_bias:
            logits = logits + self._bias
        if self.sampler.penalises:
            logits = self._penalise(logits, tails)
        if len(self._ends) and self.length < self.start:
            early = torch.tensor([p < self.start for p in positions], device=self.device)[:, None]
            held = logits[:, self._ends].masked_fill(early, -math.inf)
            logits = logits.index_copy(1, self._ends, held)
        return self.sampler.scores(logits, positions)

    def noise(self, position: int, tokens: Sequence[int]) -> Sequence[float]:
        """The Gumbel noise of some tokens at an index of the text; zeros when greedy."""
        return self.sampler.noise(position, tokens, self.vocabulary, self.device)

    def take(self, tokens: Sequence[int]) -> None:
        """Count tokens that the text has gained."""
        self.length += len(tokens)
        if self.sampler.penalises:
            ids = torch.tensor(tokens, dtype=torch.long, device=self.device)
            self._counts.index_add_(0, ids, self._counts.new_ones(len(tokens)))
            self._seen[ids] = True

    def _penalise(self, logits: Tensor, tails: Sequence[Sequence[int]]) -> Tensor:
        counts, seen = self._before(tails)
        repetition, sampler = self.sampler.repetition_penalty, self.sampler
        if repetition != 1:
            less = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits = torch.where(seen, less, logits)
        if sampler.presence_penalty or sampler.frequency_penalty:
            logits = logits - (sampler.frequency_penalty * counts + sampler.presence_penalty * counts.sign())
        return logits

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
