"""Gumbel noise keyed by (seed, sample, position), the same wherever and in whatever order it is asked for.

Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) in integer
tensor operations: counter (token // 4, position, sample, 0), key the 64-bit seed; the four words of a
block belong to four consecutive tokens. Integers are equal on every device. A word w becomes
u = (w + 1/2) / 2**32 and the noise -log(-log(u)), computed in float64 and rounded to float32.

With 32-bit words a pick's probability is off by at most about vocabulary / 2**33 in total variation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Four words per counter. counter: four int64 tensors of 32-bit values, broadcast together."""
    a, b, c, d = counter
    key0, key1 = seed & LOW, seed >> 32 & LOW
    for _ in range(10):
        # int64 products wrap, which leaves their 64 bits right; the mask makes the shift logical.
        high, low = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            (low >> 32 & LOW) ^ b ^ key0,
            low & LOW,
            (high >> 32 & LOW) ^ d ^ key1,
            high & LOW,
        )
        key0, key1 = key0 + WEYL[0] & LOW, key1 + WEYL[1] & LOW
    return [a, b, c, d]


def gumbel(seed: int, sample: int, positions: Sequence[int], vocabulary: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise, float32 [len(positions), vocabulary]."""
    token = torch.arange(-(-vocabulary // 4), device=device)[None]
    position = torch.tensor(positions, device=device)[:, None]
    which = torch.tensor(sample, device=device)
    words = torch.stack(philox((token, position, which, torch.zeros_like(which)), seed), dim=-1)
    uniform = (words.flatten(1)[:, :vocabulary].double() + 0.5) * 2.0**-32
    return uniform.log_().neg_().log_().neg_().float()


class NoiseSource(Protocol):
    """A way to make the noise. A model may have a faster one than torch's."""

    @property
    def block(self) -> int:
        """Positions that cost little more together than one."""

    def noise(
        self, seed: int, sample: int, positions: Sequence[int], vocabulary: int, device: torch.device
    ) -> Tensor:
        """As `gumbel`."""

    def few(
        self, noise: Noise, position: int, tokens: Sequence[int], vocabulary: int, device: torch.device
    ) -> Sequence[float]:
        """The noise of some tokens at an index of the text, the same bits as in that of all."""

    def draw(self, logits: Tensor, temperature: float, noise: Noise, position: int) -> int:
        """The token with the best score, logit + temperature * noise, at an index of the text. logits:
        float32 [vocabulary], which stay as they are."""


class TorchNoise:
    """`gumbel` as a source."""

    block = 16
    noise = staticmethod(gumbel)

    def few(
        self, noise: Noise, position: int, tokens: Sequence[int], vocabulary: int, device: torch.device
    ) -> Sequence[float]:
        found: list[float] = noise.at([position], vocabulary, device)[0][list(tokens)].tolist()
        return found

    def draw(self, logits: Tensor, temperature: float, noise: Noise, position: int) -> int:
        at = noise.at([position], len(logits), logits.device)[0]
        return int(logits.add(at, alpha=temperature).argmax())


class Noise:
    """The noise of one sample, generated some positions at a time and remembered: a position is needed again
    by every step whose tree reaches it."""

    def __init__(self, seed: int, sample: int = 0, source: NoiseSource | None = None) -> None:
        """source: None is torch."""
        self.seed = seed
        self.sample = sample
        self.source = source or TorchNoise()
        self._block = self.source.block
        self._of: tuple[int, torch.device] | None = None
        self._blocks: dict[int, Tensor] = {}

    def at(self, positions: Sequence[int], vocabulary: int, device: torch.device) -> Tensor:
        """float32 [len(positions), vocabulary]."""
        if self._of != (vocabulary, device):
            self._of, self._blocks = (vocabulary, device), {}
        needed = {position // self._block for position in positions}
        if missing := sorted(needed - self._blocks.keys()):
            spans = [block * self._block + i for block in missing for i in range(self._block)]
            fresh = self.source.noise(self.seed, self.sample, spans, vocabulary, device).split(self._block)
            self._blocks |= dict(zip(missing, fresh, strict=True))
        return torch.stack([self._blocks[p // self._block][p % self._block] for p in positions])

    def forget(self, before: int) -> None:
        """Forget the positions before this one."""
        first = before // self._block
        if self._blocks and min(self._blocks) < first:
            self._blocks = {b: block for b, block in self._blocks.items() if b >= first}
