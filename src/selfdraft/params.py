"""One answer: what a request may ask for, and what comes back."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

from transformers import PreTrainedTokenizerBase

from ._common.options import read
from .engine.request import FinishReason, Limits, TokenLogprob
from .errors import InvalidOption
from .models.transformers import Grade, Numerics
from .sampling.detokenizer import StopStrings
from .sampling.sampler import Sampler


@dataclass(frozen=True)
class SamplingParams:
    """What one request may set. See `Sampler` and `Limits` for what is not said here.

    eos: ids that end a text, instead of the model's own; ignore_eos: none does. stop: strings that end it;
    the text ends before them. logprobs: note every token's, and those of so many alternatives. seed: None
    draws one and reports it.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | tuple[str, ...] = ()
    eos: tuple[int, ...] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    seed: int | None = None

    @classmethod
    def read(cls, given: Mapping[str, object]) -> SamplingParams:
        """Options by name, with a seed. Raises InvalidOption."""
        options = read(cls, given, "generate")
        return options if options.seed is not None else replace(options, seed=secrets.randbits(63))

    def sampler(self, sample: int) -> Sampler:
        """How a sample of the request is drawn."""
        shared = {f.name for f in fields(Sampler) if f.init} & {f.name for f in fields(self)}
        return Sampler(**{name: getattr(self, name) for name in shared}, sample=sample)

    def limits(self, tokenizer: PreTrainedTokenizerBase, eos: frozenset[int]) -> Limits:
        """Where its texts end. eos: the ids that end a text of the model."""
        if self.eos is not None and self.ignore_eos:
            raise InvalidOption("eos and ignore_eos contradict each other; give one")
        ends = eos if self.eos is None else frozenset(self.eos)
        strings = (self.stop,) if isinstance(self.stop, str) else self.stop
        return Limits(
            self.max_new_tokens,
            frozenset() if self.ignore_eos else ends,
            StopStrings(tokenizer, strings) if strings else None,
            self.min_new_tokens,
        )


@dataclass(frozen=True)
class Completion:
    """An answer and how it was made.

    text: without the stop string that ended it. ids: new tokens, the one that ended the text included;
    tokens: their number. logprobs: one per id, if asked for. runs: tokens each step yielded. forwards: decode
    forwards, prefill apart; a stage of a looped model is a part of one. tokens_per_forward: per step, the
    model's own token counted. rows_per_forward: tokens run per forward. seconds: what the decode steps took;
    prefill_seconds: what reading the prompt took. reused: tokens of the prompt that an earlier turn or sample
    had read. grade: the text is that of the base checkpoint, or of tuned weights. finish_reason: eos, stop,
    length, context, or cancelled. seed and sample key the noise."""

    model: str
    method: str
    grade: Grade
    text: str
    ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] | None
    runs: Sequence[int]
    prompt_tokens: int
    reused: int
    tokens: int
    forwards: float
    tokens_per_forward: float
    rows_per_forward: float
    seconds: float
    prefill_seconds: float
    tokens_per_second: float
    finish_reason: FinishReason
    seed: int
    sample: int
    temperature: float
    dtype: str
    device: str
    numerics: Numerics

    def figures(self) -> dict[str, object]:
        """All of it but the ids, runs, and logprobs that were not asked for, for printing and JSON."""
        left_out = {"ids", "runs"} | ({"logprobs"} if self.logprobs is None else set())
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(frozen=True)
class Chunk:
    """What one forward added: its ids, and the text that they complete."""

    ids: Sequence[int]
    text: str
