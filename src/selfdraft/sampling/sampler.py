"""How one sample is drawn: from processed logits to scores, whose argmax is the pick.

Greedy: the scores are the logits. Otherwise `scores = processed logits + temperature * noise`, the
Gumbel-max form of sampling from softmax(logits / temperature), written so that it does not overflow
at tiny temperatures. The noise is keyed by position, never drawn in call order, so the pick at a
position does not depend on how many forwards or drafts led there. Verification is then equality of
tokens at every temperature, and the distribution is the model's own.

Filters follow transformers' order (top-k, top-p, min-p) and cut by value, so that equal logits stay
or go together, whatever the shape of the tensor they come in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InvalidOption
from .gumbel import Noise

HEAD = 256  # top-p looks among this many largest logits before it sorts all of them


@dataclass(frozen=True)
class Sampler:
    """How one sample is drawn.

    temperature: 0 is greedy. top_k: keep the k most likely tokens, 0 keeps all. top_p: keep the most
    likely tokens that together reach this probability. min_p: keep tokens at least this share as
    likely as the most likely one. seed and sample key the noise; equal seeds share it across prompts.

    repetition_penalty: logits of tokens in prompt or answer are divided by it if positive, else multiplied
    (Keskar et al., CTRL, arXiv 1909.05858, section 4.1). presence_penalty: taken off the logits of tokens in
    the answer; frequency_penalty: taken off once for each time they occur there. logit_bias: added to the
    logits of these ids; -inf bans one. They act when greedy, too. Raises InvalidOption for values outside
    their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int = 0
    sample: int = 0
    _noise: Noise = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        within = {
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0, ">= 0"),
            "top_k": (self.top_k >= 0, ">= 0 (0 keeps all)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "> 0 (1 changes nothing)"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a number"),
            "logit_bias": (all(x < math.inf for x in self.logit_bias.values()), "ids with numbers or -inf"),
            "seed": (0 <= self.seed < 2**64, "in [0, 2**64)"),
            "sample": (0 <= self.sample < 2**32, "in [0, 2**32)"),
        }
        for name, (holds, wanted) in within.items():
            if not holds:
                raise InvalidOption(f"{name} must be {wanted}; got {getattr(self, name)}")
        object.__setattr__(self, "_noise", Noise(self.seed, self.sample))

    @property
    def penalises(self) -> bool:
        """Do the scores depend on the text before?"""
        penalties = self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty
        return any(penalties)

    def noise(
        self, position: int, tokens: Sequence[int], vocabulary: int, device: torch.device
    ) -> Sequence[float]:
        """The noise of some tokens at a position of the text, before it is scaled; zeros when greedy."""
        if self.temperature == 0:
            return [0.0] * len(tokens)
        values: list[float] = self._noise.peek([position], vocabulary, device)[0][list(tokens)].tolist()
        return values

    def scores(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        """Scores of the tokens at some positions of the text.

        logits: [rows, vocabulary], with bias and penalties (`draw`). positions: per row, the index in the
        text (prompt included) of the token that the row predicts. Returns [rows, vocabulary], float32
        (float64 for float64 logits).
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.temperature == 0:
            return logits
        noise = self._noise.at(positions, logits.shape[-1], logits.device)
        return self._filter(logits).add(noise, alpha=self.temperature)

    def _filter(self, logits: Tensor) -> Tensor:
        """Logits with the excluded tokens at -inf."""
        if 0 < self.top_k < logits.shape[-1]:
            floor = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < floor, -math.inf)
        if self.top_p < 1:
            logits = logits.masked_fill(logits < self._nucleus(logits), -math.inf)
        if self.min_p > 0:
            floor = logits.amax(-1, keepdim=True) + self.temperature * math.log(self.min_p)
            logits = logits.masked_fill(logits < floor, -math.inf)
        return logits

    def _nucleus(self, logits: Tensor) -> Tensor:
        """Smallest logit of the nucleus, [rows, 1]: the tokens above it fall short of top_p.

        In float64, since sums of other rounding for one row than for several could move the edge.
        """
        total = (logits.double() / self.temperature).logsumexp(-1, keepdim=True)
        for count in (min(HEAD, logits.shape[-1]), logits.shape[-1]):
            largest = logits.topk(count).values
            reached = (largest.double() / self.temperature - total).exp().cumsum(-1) >= self.top_p
            if count == logits.shape[-1] or bool(reached[:, -1].all()):
                break
        last = torch.where(reached.any(-1), reached.int().argmax(-1), count - 1)
        return largest.gather(-1, last[:, None])
