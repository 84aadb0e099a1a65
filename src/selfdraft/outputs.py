"""What comes back: an answer with its figures, and the chunks of one that is streamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from .drafting.acceptance import DraftCount
from .engine.request import FinishReason, TokenLogprob
from .errors import SelfdraftError
from .models.transformers import Grade, Numerics


@dataclass(frozen=True)
class Completion:
    """An answer and how it was made."""

    model: str
    method: str
    grade: Grade
    """Whose text it is: that of the "base" checkpoint, or of "tuned" weights."""
    chat: bool
    """The prompt went through the chat template."""
    text: str
    """Without the end-of-text token or the stop string that ended it."""
    ids: Sequence[int]
    """The new tokens, including the one that ended the text."""
    logprobs: Sequence[TokenLogprob] | None
    """One per id, if asked for."""
    runs: Sequence[int]
    """Tokens that each decode step yielded."""
    prompt_tokens: int
    reused: int
    """Tokens of the prompt that an earlier turn or sample had read."""
    tokens: int
    """Number of new tokens."""
    forwards: float
    """Decode forwards, without those that read the prompt. A stage of a looped model is a part of one."""
    tokens_per_forward: float
    """New tokens per decode forward; the model's own token counts."""
    rows_per_forward: float
    """Tokens that a decode step ran, on average."""
    sources: Mapping[str, DraftCount]
    """Draft tokens by where they are from ("copy", "mask", "jacobi"; of `speed` the pass after which they
    started: those not accepted were flushed); empty where the method does not say."""
    readouts: Mapping[str, DraftCount]
    """Of `speed`: by early pass, how many of the text's tokens were read out after it, and for how many of
    them that pick was the final one."""
    seconds: float
    """Time of the decode steps."""
    prefill_seconds: float
    """Time it took to read the prompt."""
    tokens_per_second: float
    """New tokens per second of the decode steps."""
    finish_reason: FinishReason
    seed: int
    """Keys the sampling noise, together with `sample`."""
    sample: int
    temperature: float
    weights: str
    """The format in which the weights ran, such as Q4_1 or bfloat16."""
    dtype: str
    """Of the KV cache, and of the weights where transformers' forward ran."""
    device: str
    numerics: Numerics
    error: SelfdraftError | None = None
    """What ended it, where `finish_reason` is "error"."""

    def figures(self) -> dict[str, object]:
        """All of it for printing and JSON, without ids and runs, and what was not asked for."""
        left_out = {"ids", "runs", "error"} | ({"logprobs"} if self.logprobs is None else set())
        figures = {name: value for name, value in asdict(self).items() if name not in left_out}
        return figures if self.error is None else figures | {"error": str(self.error)}


@dataclass(frozen=True)
class Chunk:
    """What one forward added."""

    ids: Sequence[int]
    text: str
    """The text that the ids complete."""
