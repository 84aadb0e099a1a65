"""Answers by the model itself: the data that draft adapters learn from.

A draft token is accepted when it is the model's own pick, so an adapter is trained on this model's answers,
not on text that people wrote. A fixed number of requests runs at a time: when one ends, the next prompt
joins. A row depends only on the model, its prompt and its index, which decides whether the answer is greedy
or sampled, and its seed. So a run that was interrupted gives the same rows, whichever requests ran in one
batch (bit for bit with exact numerics, up to rounding with fast ones).

A text prompt goes through the model's chat template as one user message, as it does when the model is used.
An answer that begins to repeat itself teaches nothing more: it is cut after the first copy.
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
from ..engine.request import Request
from ..engine.scheduler import Limits
from ..errors import InvalidOption
from ..llm import LLM
from ..models.adapters.fingerprint import fingerprint
from ..models.loading import load_pretrained
from ..models.transformers import TransformersModel
from ..params import SamplingParams
from .prompts import Prompt, Prompts
from .shards import Row, Shards

LOOK = 32  # an answer is searched for repetition after each so many tokens


@dataclass(frozen=True)
class Recipe:
    """What rows depend on, besides the model and the prompts."""

    max_new_tokens: int = 256
    # Of the answers that are sampled.
    temperature: float = 0.8
    # Share of the answers that are greedy.
    greedy_share: float = 0.5
    seed: int = 0
    # End an answer where it begins to repeat itself.
    cut_loops: bool = True
    # Take text prompts as they are, without the chat template.
    raw: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidOption(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")
        if not 0 <= self.greedy_share <= 1:
            raise InvalidOption(f"greedy_share must be from 0 to 1; got {self.greedy_share}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InvalidOption(
                f"temperature must be above 0; got {self.temperature} (greedy_share=1 for greedy answers)"
            )

    def params(self, index: int) -> SamplingParams:
        """The sampling parameters of the answer to that prompt."""
        digest = hashlib.sha256(f"{self.seed} {index}".encode()).digest()
        greedy = int.from_bytes(digest[:6], "big") / 2**48 < self.greedy_share
        seed = int.from_bytes(digest[8:16], "big") >> 1
        temperature = 0.0 if greedy else self.temperature
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=temperature, seed=seed)


@dataclass
class Progress:
    """What this start of the command has done so far."""

    rows: int = 0
    # Generated tokens, including those that were cut off as repetition.
    tokens: int = 0
    # Decode steps, counted for each request.
    forwards: int = 0
    # Prompts skipped because they do not fit the context together with an answer.
    too_long: int = 0
    began: float = field(default_factory=time.perf_counter)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (time.perf_counter() - self.began)


@dataclass
class Distillation:
    """A model, the prompts it answers, and the folder of the answers."""

    llm: LLM
    prompts: Prompts
    recipe: Recipe
    shards: Shards
    # Requests decoded at a time.
    batch: int = 32
    # Answer only the first so many prompts.
    limit: int | None = None

    @property
    def wanted(self) -> range:
        """Indices of the prompts to answer."""
        return range(min(len(self.prompts), self.limit or len(self.prompts)))

    @property
    def _limits(self) -> Limits:
        """Of the engine."""
        return Limits()

    def run(self, report: Callable[[Progress], None] = lambda progress: None) -> dict[str, Any]:
        """Answer the prompts without an answer and return the summary; `report` is called after each row.

        Raises TrainingDataError.
        """
        self.shards.note(starts=[*self.shards.manifest["starts"], self._start()], summary=None)
        progress = Progress()
        for row in self._answers(progress):
            self.shards.add(row)
            progress.rows += 1
            report(progress)
        summary = self._summary(progress)
        self.shards.note(summary=summary)
        return summary

    def _answers(self, progress: Progress) -> Iterator[Row]:
        """Rows in the order in which they finish."""
        engine, live = Engine(self.llm.model, self._limits), dict[Request, int]()
        pending = self._pending(progress)
        while True:
            while len(live) < self.batch and (following := next(pending, None)) is not None:
                index, ids, prompt = following
                live[self._submit(engine, index, ids, prompt)] = index
            if not live:
                return
            engine.step()
            for request in [request for request in live if request.finish_reason is not None]:
                progress.tokens += request.added
                progress.forwards += len(request.runs)
                yield self._row(live.pop(request), request)

    def _pending(self, progress: Progress) -> Iterator[tuple[int, Sequence[int], Prompt]]:
        """Prompts without an answer that fit the context."""
        for index in self.wanted:
            if index in self.shards.done:
                continue
            prompt = self.prompts[index]
            ids = self.llm.prompt_ids(prompt.text, prompt.messages, self.recipe.raw)
            if len(ids) + self.recipe.max_new_tokens > self.llm.model.context:
                progress.too_long += 1
            else:
                yield index, ids, prompt

    def _submit(self, engine: Engine, index: int, ids: Sequence[int], prompt: Prompt) -> Request:
        loops = Loops() if self.recipe.cut_loops else None
        references = self.llm.references(prompt.references)
        params, ends = self.recipe.params(index), self.llm.eos_ids
        return engine.submit(ids, self.llm.method, params, references, eos_ids=ends, stop=loops)

    def _row(self, index: int, request: Request) -> Row:
        answer = list(request.emitted)
        kept = fresh(answer) if self.recipe.cut_loops else len(answer)
        reason = str(request.finish_reason) if kept == len(answer) else "loop"
        temperature, seed = request.params.temperature, request.sampler.seed
        return Row(index, list(request.prompt), answer[:kept], temperature, seed, reason)

    def _start(self) -> dict[str, Any]:
        """Provenance of this start. Nothing in it changes rows by more than rounding."""
        return {
            "argv": sys.argv,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "method": self.llm.method_name,
            "batch": self.batch,
            "limit": self.limit,
            "rows_found": self.shards.found,
            "machine": describe(self.llm.model.device),
        }

    def _summary(self, progress: Progress) -> dict[str, Any]:
        """Figures of all rows in the folder, and the speed of this start."""
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
    """Stops texts that repeat themselves; see `sampling.stopping.Stop`."""

    def watch(self, prompt: Sequence[int]) -> LoopWatch:
        return LoopWatch()


class LoopWatch:
    """Searches one answer for repetition after every `LOOK` tokens. The row is cut later."""

    def __init__(self) -> None:
        self.cut: int | None = None
        self.answer: list[int] = []

    def find(self, tokens: Sequence[int], least: int) -> int | None:
        looked = len(self.answer) // LOOK
        self.answer += tokens
        if len(self.answer) // LOOK == looked or fresh(self.answer) == len(self.answer):
            return None
        return len(tokens) - 1


def asked(llm: LLM, prompts: Prompts, recipe: Recipe) -> dict[str, Any]:
    """All settings that rows depend on: a folder is continued only with the same ones.

    Raises InvalidOption for messages without a chat template.
    """
    if prompts.conversation is not None:
        llm.prompt_ids(None, prompts.conversation)
    model = llm.model
    return {
        "model": llm.name,
        "fingerprint": fingerprint(
            model.model if isinstance(model, TransformersModel) else load_pretrained(llm.name)[0]
        ),
        "vocabulary": model.vocab_size,
        "tokenizer": tokenizer_sha256(llm.tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "numerics": model.numerics,
        "eos": sorted(llm.eos_ids),
        "prompts": {"rows": len(prompts), "sha256": prompts.sha256},
        "chat": llm.chats(raw=recipe.raw),
        **{name: value for name, value in asdict(recipe).items() if name != "raw"},
    }


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides which ids a text becomes, including the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    known = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    rules = [known, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(rules, sort_keys=True, default=str).encode()).hexdigest()
