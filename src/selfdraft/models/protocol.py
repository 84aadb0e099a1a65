"""Models: what the engine may ask of one. Weights, device, dtype and adapter live here; methods and
sampling do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from ..drafting.method import Lookahead, Loops
from ..engine.tree import Tree
from ..sampling.gumbel import NoiseSource

# request, offset of a mask, its logits [1, vocabulary] -> the token that the mask is taken to predict
PickMask = Callable[[int, int, Tensor], int]


class Cache(Protocol):
    """Keys and values of one request. Root rule: between steps length == len(tokens) - 1."""

    @property
    def length(self) -> int:
        """Tokens of the text whose keys and values are kept."""

    def keep(self, path: Sequence[int], in_flight: Sequence[int]) -> None:
        """Keep these rows of the last forward; drop the others. Costs O(len(path)).

        in_flight: a tree of rows that are not done, behind the path. A later forward goes on with those that
        its tree holds too, on the same path of tokens.
        """

    def reserve(self, length: int) -> bool:
        """Have memory for so many tokens, rows of the next forward included; False where there is none
        left."""

    def remember(self, tokens: Sequence[int]) -> None:
        """Let later caches of the pool begin with what this one holds of its text, which these tokens are."""

    def close(self) -> None:
        """Give the memory back. The cache is not used again."""


class Rows(Protocol):
    """What one forward left behind: hidden states for `head`, and which rows are finished."""

    @property
    def done(self) -> Sequence[Sequence[bool]]:
        """Per request, per row: has the row run through the whole model?"""

    @property
    def picks(self) -> Sequence[Sequence[int]] | None:
        """Per request, the likeliest token after each row that was wanted, -1 after one that is not finite;
        None where the model does not say."""

    @property
    def finite(self) -> Sequence[Sequence[bool]]:
        """Per request, per row: are the row's hidden states finite?"""

    def of(self, requests: Sequence[int]) -> Rows:
        """The rows of some of the requests."""


class Pool(Protocol):
    """Memory for the caches of one engine."""

    def open(self, tokens: Sequence[int] = (), salt: str = "") -> Cache:
        """A cache that holds what is remembered of the beginning of these tokens, the last one never. Texts
        of different salts share nothing."""

    @property
    def tokens(self) -> int | None:
        """How many tokens the caches hold together, at most; None where memory is taken as it is needed."""

    @property
    def free(self) -> int | None:
        """How many more they hold now; None likewise."""

    def renewed(self) -> Pool:
        """The same memory, empty, in place of this pool: where a step was interrupted nobody knows what the
        caches hold. They are not used again."""


class Model(Protocol):
    """A causal language model that can verify a tree."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def context(self) -> int:
        """Most tokens a text may have."""

    @property
    def device(self) -> torch.device: ...

    @property
    def noise(self) -> NoiseSource | None:
        """How it makes sampling noise, where it has a faster way than torch's."""

    @property
    def lookahead(self) -> Lookahead | None:
        """The mask tokens of its adapter, if it has one: ids at or above `vocab_size`, never picked."""

    @property
    def ragged(self) -> bool:
        """True if trees of different sizes and chunks of prompts run together without padding."""

    def pool(self, memory: int | None = None) -> Pool:
        """Fresh memory for an engine's caches. memory: bytes, at most. Raises InvalidOption for a limit that
        cannot be kept."""

    @property
    def loops(self) -> Loops | None:
        """How often it passes through the same layers; None for an ordinary model."""

    def forward(
        self,
        trees: Sequence[Tree],
        caches: Sequence[Cache],
        stages: int | None = None,
        wanted: Sequence[int] | None = None,
    ) -> Rows:
        """Run one tree per cache, all caches from one pool. Writes behind each cache's length.

        wanted: for how many rows of each tree, from the first, `head` will be asked next; None: for none.
        stages: of a looped model, how many passes through its layers; rows that are not through all of them
        then may be read, and are not done. None: all rows get done.
        """

    def stepping(self) -> AbstractContextManager[None]:
        """Around a step of the engine: what the model needs of its surroundings meanwhile."""

    def cost(self, rows: int, history: int = 0) -> float:
        """What a step with so many rows takes, in units of one with a single row and little history. history:
        tokens before each row, on average. Measured at first use."""

    def mask_cost(self) -> float:
        """What reading the predictions of mask tokens adds to a step, in the same units."""

    def observe(self, rows: int, history: int, seconds: float, masks: bool) -> None:
        """A step of so many rows of trees, behind so many tokens on average, took so long: costs follow.
        masks: were mask tokens among them?"""

    def mask_logits(
        self, rows: Rows, index: Sequence[Sequence[int]], tokens: Sequence[int], pick: PickMask
    ) -> list[Tensor]:
        """Logits of the mask rows asked for, as `head` returns them, of the ids of `lookahead.vocabulary`.

        tokens: per request, the token picked at the row that its mask rows stand behind. pick: chooses the
        token of a mask, on which an adapter's sampler head conditions the next mask.
        """

    def head(self, rows: Rows, index: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits of the rows asked for: per request [len(index), vocab_size], in the model's dtype."""
