"""Answers by the model itself: the data that draft adapters learn from.

A draft is right when it is the model's own pick, so an adapter is trained on what this model says, not
on what people wrote. So many requests are kept alive all the time: as one ends, the next prompt joins.
What a row is depends on the model, its prompt and its index alone: the index keys whether the answer is
greedy or drawn, and its seed. A run that stops goes on as if it had not, and rows do not depend on
which others ran beside them (with exact numerics to the bit, with fast ones up to rounding).

An answer that begins to loop teaches nothing more: it is cut at the end of the first copy, where the
bench stops to count, too, and is not generated much further.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from .._common.machine import describe
from .._common.repetition import fresh
from ..engine.engine import Engine
from ..engine.request import Limits, Request
from ..errors import InvalidOption
from ..llm import LLM
from ..models.adapters.fingerprint import fingerprint
from ..sampling.sampler import Sampler
from .prompts import Prompt, Prompts
from .shards import Row, Shards

LOOK = 32  # tokens after which an answer is looked at for loops again


@dataclass(frozen=True)
class Recipe:
    """What rows depend on beside the model and the prompts. greedy_share: how many are greedy; the others
    are drawn at the temperature. cut_loops: end an answer where it begins to loop."""

    max_new_tokens: int = 256
    temperature: float = 0.8
    greedy_share: float = 0.5
    seed: int = 0
    cut_loops: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidOption(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")
        if not 0 <= self.greedy_share <= 1:
            raise InvalidOption(f"greedy_share must be from 0 to 1; got {self.greedy_share}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InvalidOption(
                f"temperature must be above 0; got {self.temperature} (greedy_share=1 has greedy ones alone)"
            )

    def sampler(self, index: int) -> Sampler:
        """How the answer to that prompt is drawn."""
        digest = hashlib.sha256(f"{self.seed} {index}".encode()).digest()
        greedy = int.from_bytes(digest[:6], "big") / 2**48 < self.greedy_share
        seed = int.from_bytes(digest[8:16], "big") >> 1
        return Sampler(0.0 if greedy else self.temperature, seed=seed)


@dataclass
class Progress:
    """Of this start. tokens: generated, those cut off a loop among them. forwards: decode steps, counted for
    each request. too_long: prompts left out, because they and an answer do not fit the context."""

    rows: int = 0
    tokens: int = 0
    forwards: int = 0
    too_long: int = 0
    began: float = field(default_factory=time.perf_counter)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (time.perf_counter() - self.began)


@dataclass
class Distillation:
    """A model, what it answers and how, and where the answers go. batch: requests alive at a time.
    limit: answer the first prompts only."""

    generator: LLM
    prompts: Prompts
    recipe: Recipe
    shards: Shards
    batch: int = 32
    limit: int | None = None

    @property
    def wanted(self) -> range:
        """Indices of the prompts to answer."""
        return range(min(len(self.prompts), self.limit or len(self.prompts)))

    def run(self, tell: Callable[[Progress], None] = lambda progress: None) -> dict[str, Any]:
        """Answer what has no answer yet; the summary. `tell` hears of each row. Raises TrainingDataError."""
        self.shards.note(starts=[*self.shards.manifest["starts"], self._start()], summary=None)
        progress = Progress()
        for row in self._answers(progress):
            self.shards.add(row)
            progress.rows += 1
            tell(progress)
        summary = self._summary(progress)
        self.shards.note(summary=summary)
        return summary

    def _answers(self, progress: Progress) -> Iterator[Row]:
        """Rows as they finish: the loop over live requests."""
        engine, live = Engine(self.generator.model), dict[Request, int]()
        waiting = self._waiting(progress)
        while True:
            while len(live) < self.batch and (following := next(waiting, None)) is not None:
                index, ids, prompt = following
                live[self._submit(engine, index, ids, prompt)] = index
            if not live:
                return
            engine.step()
            for request in [request for request in live if request.finish_reason is not None]:
                progress.tokens += request.added
                progress.forwards += len(request.runs)
                yield self._row(live.pop(request), request)

    def _waiting(self, progress: Progress) -> Iterator[tuple[int, Sequence[int], Prompt]]:
        """Prompts without an answer, those left out that do not fit."""
        for index in self.wanted:
            if index in self.shards.done:
                continue
            prompt = self.prompts[index]
            ids = self.generator.ids(prompt.text, prompt.messages)
            if len(ids) + self.recipe.max_new_tokens > self.generator.model.context:
                progress.too_long += 1
            else:
                yield index, ids, prompt

    def _submit(self, engine: Engine, index: int, ids: Sequence[int], prompt: Prompt) -> Request:
        loops = Loops() if self.recipe.cut_loops else None
        limits = Limits(self.recipe.max_new_tokens, self.generator.eos, loops)
        references = self.generator.references(prompt.references)
        return engine.submit(ids, self.generator.method, self.recipe.sampler(index), limits, references)

    def _row(self, index: int, request: Request) -> Row:
        answer = list(request.emitted)
        kept = fresh(answer) if self.recipe.cut_loops else len(answer)
        reason = str(request.finish_reason) if kept == len(answer) else "loop"
        sampler = request.draw.sampler
        return Row(index, list(request.prompt), answer[:kept], sampler.temperature, sampler.seed, reason)

    def _start(self) -> dict[str, Any]:
        """How this start goes about it: what may change rows by rounding at most."""
        return {
            "argv": sys.argv,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "method": self.generator.method_name,
            "batch": self.batch,
            "limit": self.limit,
            "rows_found": self.shards.found,
            "machine": describe(self.generator.model.device),
        }

    def _summary(self, progress: Progress) -> dict[str, Any]:
        """All rows of the folder; and of this start its pace."""
        rows, reasons = len(self.shards.done), self.shards.reasons
        return {
            "rows": rows,
            "tokens": self.shards.tokens,
            "ended_by_itself": reasons["eos"] / max(1, rows),
            "loops_cut": reasons["loop"],
            "too_long": progress.too_long,
            "new_rows": progress.rows,
            "new_tokens": progress.tokens,
            "seconds": time.perf_counter() - progress.began,
            "tokens_per_second": progress.tokens_per_second,
            "tokens_per_forward": progress.tokens / max(1, progress.forwards),
        }


class Loops:
    """An end of texts beside token ids: where they loop. See `request.Stop`."""

    def watch(self, prompt: Sequence[int]) -> LoopWatch:
        return LoopWatch()


class LoopWatch:
    """One answer, looked at every so many tokens: it ends some tokens after it has begun to loop, and is cut
    once it is a row."""

    def __init__(self) -> None:
        self.cut: int | None = None
        self.answer: list[int] = []

    def find(self, tokens: Sequence[int], least: int) -> int | None:
        looked = len(self.answer) // LOOK
        self.answer += tokens
        if len(self.answer) // LOOK == looked or fresh(self.answer) == len(self.answer):
            return None
        return len(tokens) - 1


def asked(generator: LLM, prompts: Prompts, recipe: Recipe) -> dict[str, Any]:
    """All that rows depend on: no folder made with anything else is continued. Raises InvalidOption where
    there are messages, but no chat template."""
    if prompts.conversation is not None:
        generator.ids(None, prompts.conversation)
    model = generator.model
    return {
        "model": generator.name,
        "fingerprint": fingerprint(model.model),
        "vocabulary": model.vocab_size,
        "tokenizer": tokenizer_sha256(generator.tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "numerics": model.numerics,
        "eos": sorted(generator.eos),
        "prompts": {"rows": len(prompts), "sha256": prompts.sha256},
        **asdict(recipe),
    }


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides which ids a text becomes, the chat template among it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    known = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    said = [known, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
