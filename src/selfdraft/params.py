"""What one request may ask."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ._common.options import read
from .errors import InvalidOption

MAX_MAGNITUDE = 1e30
"""Numbers beyond it (or positive ones below its inverse) would overflow float32 once they meet logits."""


@dataclass(frozen=True)
class SamplingParams:
    """The sampling parameters of a request. All of them have a default; the default text is the greedy one.

    Bias and penalties act on greedy answers too. Raises InvalidOption for a value outside its range.
    """

    max_new_tokens: int = 256
    """Maximum length of the answer in tokens."""
    min_new_tokens: int = 0
    """Tokens before an end-of-text id may be picked and before a stop string counts."""
    temperature: float = 0.0
    """0 picks the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities add up to this."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the prompt or the answer, and multiplies negative ones (Keskar et
    al., CTRL, arXiv 1909.05858, section 4.1)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the answer once for each time they occur there."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Token id -> number added to its logit; -inf bans the token."""
    stop: str | tuple[str, ...] = ()
    """Strings that end the answer, which is cut before them."""
    eos: tuple[int, ...] | None = None
    """Token ids that end the answer, instead of the model's own."""
    ignore_eos: bool = False
    """No token id ends the answer."""
    logprobs: int | None = None
    """Report the log-probability of each token, and of so many of the most likely alternatives."""
    seed: int | None = None
    """The same seed gives the same text. None draws one, which the answer reports."""

    def __post_init__(self) -> None:
        big = MAX_MAGNITUDE
        wanted = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"from 0 to max_new_tokens ({self.max_new_tokens})",
            ),
            "temperature": (self.temperature == 0 or 1 / big <= self.temperature <= big, _range(0)),
            "top_k": (self.top_k >= 0, ">= 0 (0 keeps all)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (1 / big <= self.repetition_penalty <= big, _range(1)),
            "presence_penalty": (abs(self.presence_penalty) <= big, f"from {-big:g} to {big:g}"),
            "frequency_penalty": (abs(self.frequency_penalty) <= big, f"from {-big:g} to {big:g}"),
            "logit_bias": (
                all(abs(value) <= big or value == -math.inf for value in self.logit_bias.values()),
                f"token ids with numbers from {-big:g} to {big:g}, or -inf",
            ),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, ">= 0"),
            "seed": (self.seed is None or 0 <= self.seed < 2**64, "in [0, 2**64)"),
            "stop": (all(self.stop_strings), "without empty strings: one would end every answer at once"),
            "eos": (self.eos is None or not self.ignore_eos, "left out with ignore_eos: they contradict"),
        }
        for name, (holds, wish) in wanted.items():
            if not holds:
                raise InvalidOption(f"{name} must be {wish}; got {getattr(self, name)!r}", option=name)

    @classmethod
    def read(cls, given: Mapping[str, object], base: SamplingParams | None = None) -> SamplingParams:
        """The parameters of those names; the others are those of `base`, else the defaults. Text such as
        "20" is read as the field's type. Raises InvalidOption."""
        set_before = {} if base is None else {name: getattr(base, name) for name in cls.__dataclass_fields__}
        return read(cls, {**set_before, **given}, "sampling parameters")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        """True if the scores of a token depend on the text before it."""
        return any((self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty))

    @property
    def has_filters(self) -> bool:
        """True if sampling excludes tokens."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def end_ids(self, of_model: Collection[int]) -> frozenset[int]:
        """Token ids that end the answer. of_model: those of the model."""
        if self.ignore_eos:
            return frozenset()
        return frozenset(of_model if self.eos is None else self.eos)


def _range(also: float) -> str:
    return f"{also:g} or from {1 / MAX_MAGNITUDE:g} to {MAX_MAGNITUDE:g}"
