"""Text in, text out: a model, its tokenizer and a method behind `generate` and `stream`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast, overload

import torch
from transformers import PreTrainedTokenizerBase

from . import drafting
from .drafting.method import Method
from .drafting.references import is_ids, spellings
from .engine.engine import Engine, check_early
from .engine.request import Request
from .errors import InvalidOption, InvalidPrompt, InvalidReference
from .models.adapters import folder as adapter_folder
from .models.loading import drive, load_pretrained
from .models.transformers import Numerics, TransformersModel
from .params import Chunk, Completion, SamplingParams
from .sampling.detokenizer import Detokenizer, StopStrings

Prompt = str | Sequence[int]
Message = Mapping[str, str]


class Stream:
    """Chunks of one answer as they are made; `result` holds what there is, at any time."""

    def __init__(self, generator: LLM, engine: Engine, request: Request) -> None:
        self._generator = generator
        self._engine = engine
        self._request = request

    def __iter__(self) -> Iterator[Chunk]:
        text = Detokenizer(self._generator.tokenizer, self._request.prompt)
        stop = self._request.limits.stop
        waiting, shown = "", 0  # text that may begin a stop string, and how much was shown before it
        for ids in self._engine.run(self._request):
            waiting += text.add(ids)
            if self._request.finish_reason is not None:
                waiting = self.result.text[shown:]
                safe = len(waiting)
            else:
                safe = stop.safe(waiting) if isinstance(stop, StopStrings) else len(waiting)
            yield Chunk(ids, waiting[:safe])
            waiting, shown = waiting[safe:], shown + safe

    @property
    def result(self) -> Completion:
        return self._generator.result(self._request)


class LLM:
    """A model, its tokenizer and the method it drafts with. `selfdraft.load` makes one."""

    def __init__(
        self,
        model: TransformersModel,
        tokenizer: PreTrainedTokenizerBase,
        method: str | Method = "plain",
        options: Mapping[str, object] | None = None,
        name: str | None = None,
        adapter: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name or model.name
        self.method, self.method_name = drafting.resolve(method, options)
        self.adapter = adapter_folder.chosen(self.method, self.method_name, self.name, adapter)
        self.model = adapter_folder.fit(model, self.method, self.method_name, self.adapter)
        self.eos = _end_ids(model, tokenizer)
        check_early(self.method, self.model)

    @overload
    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        references: Sequence[Prompt] = (),
        n: None = None,
        **options: object,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: list[str] | Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        references: Sequence[Prompt] = (),
        n: int | None = None,
        **options: object,
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: list[str] | Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        references: Sequence[Prompt] = (),
        n: int | None = None,
        **options: object,
    ) -> Completion | list[Completion]:
        """The answer to a prompt (text or token ids), or to several texts, which then run as one batch.

        messages: instead of a prompt, a conversation, `{"role": ..., "content": ...}` each, in the form of
        the tokenizer's chat template. references: texts or ids that the answer may quote. n: so many samples
        of each prompt, a list then. options: the fields of `SamplingParams`.
        """
        several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str)
        prompts = cast(list[Prompt | None], prompt if several else [prompt])
        asked = SamplingParams.read(options)
        if n is not None and (not isinstance(n, int) or n < 1 or (n > 1 and asked.temperature == 0)):
            raise InvalidOption(f"n={n}: give at least 1; more than 1 only with a temperature above 0")
        engine = Engine(self.model)
        ids = [self.ids(one, messages) for one in prompts]
        quoted = self.references(references)
        requests = [s for one in ids for s in self._samples(engine, one, quoted, asked, n or 1)]
        while engine.requests:
            engine.step()
        results = [self.result(request) for request in requests]
        return results if several or n is not None else results[0]

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        references: Sequence[Prompt] = (),
        **options: object,
    ) -> Stream:
        """The same answer, chunk by chunk."""
        engine = Engine(self.model)
        request = self.submit(engine, self.ids(prompt, messages), references, SamplingParams.read(options))
        return Stream(self, engine, request)

    def using(
        self, method: str | Method, options: Mapping[str, object] | None = None, adapter: str | None = None
    ) -> LLM:
        """The same model with another method; see `load`. Without an adapter a tuned model stays tuned."""
        made, _ = drafting.resolve(method, options)
        if adapter is None and getattr(made, "adapted", False) and method == self.method_name:
            adapter = self.adapter
        start = self.model.base if adapter is None else self.model.loaded
        return LLM(start, self.tokenizer, method, options, self.name, adapter)

    def encode(self, text: Prompt, special: bool = True) -> Sequence[int]:
        """Token ids of a text; ids pass as they are. Raises InvalidPrompt for what is neither."""
        if not isinstance(text, str):
            if not is_ids(text):
                raise InvalidPrompt(f"give text or token ids; got {text!s:.100}")
            return list(text)
        return cast(list[int], self.tokenizer.encode(text, add_special_tokens=special))

    def ids(self, prompt: Prompt | None, messages: Sequence[Message] | None = None) -> Sequence[int]:
        """Token ids of a prompt, or of messages in the form of the tokenizer's chat template.

        Raises InvalidPrompt, and InvalidOption where there is no template.
        """
        if (prompt is None) == (messages is None):
            raise InvalidPrompt("give one of prompt and messages")
        if prompt is not None:
            if isinstance(prompt, str) and not prompt:
                raise InvalidPrompt("the prompt is empty; give some text")
            return self.encode(prompt)
        if not self.tokenizer.chat_template:
            raise InvalidOption(f"{self.name}: its tokenizer has no chat template; give a prompt instead")
        try:
            text = self.tokenizer.apply_chat_template(
                cast(list[dict[str, str]], messages), add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # whatever a template raises about messages it does not take
            raise InvalidPrompt(f"the chat template does not take these messages: {error}") from error
        return self.encode(cast(str, text), special=False)

    def references(self, given: Sequence[Prompt]) -> list[Sequence[int]]:
        """Token ids of reference texts, in the spellings that another text may give them; ids pass as they
        are. Raises InvalidReference."""
        return spellings(lambda text: self.encode(text, special=False), given)

    def submit(
        self,
        engine: Engine,
        ids: Sequence[int],
        references: Sequence[Prompt],
        options: SamplingParams,
        sample: int = 0,
        start: Request | None = None,
        keep: bool = False,
    ) -> Request:
        """Let a request join an engine of this model; see `Engine.submit`."""
        strange = [token for token in options.eos or () if not 0 <= token < self.model.vocab_size]
        if strange:
            raise InvalidOption(f"eos: no token id {strange[0]} in a vocabulary of {self.model.vocab_size}")
        return engine.submit(
            ids,
            self.method,
            options.sampler(sample),
            options.limits(self.tokenizer, self.eos),
            self.references(references),
            logprobs=options.logprobs,
            start=start,
            keep=keep,
        )

    def result(self, request: Request) -> Completion:
        """What a request has come to."""
        ids = list(request.emitted)
        sampler = request.draw.sampler
        text = Detokenizer(self.tokenizer, request.prompt).add(ids, last=True)
        return Completion(
            model=self.name,
            method=self.method_name,
            grade=self.model.grade,
            text=text if request.watch is None else text[: request.watch.cut],
            ids=ids,
            logprobs=None if request.top is None else tuple(request.logprobs),
            runs=tuple(request.runs),
            prompt_tokens=len(request.prompt),
            reused=request.reused,
            tokens=len(ids),
            forwards=request.forwards,
            tokens_per_forward=len(ids) / request.forwards if request.runs else 0.0,
            rows_per_forward=request.rows / max(1, len(request.runs)),
            seconds=request.seconds,
            prefill_seconds=request.prefill_seconds,
            tokens_per_second=len(ids) / request.seconds if ids else 0.0,
            finish_reason=request.finish_reason or "cancelled",
            seed=sampler.seed,
            sample=sampler.sample,
            temperature=sampler.temperature,
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=str(self.model.device),
            numerics=self.model.numerics,
        )

    def _samples(
        self,
        engine: Engine,
        ids: Sequence[int],
        references: Sequence[Prompt],
        options: SamplingParams,
        count: int,
    ) -> Iterator[Request]:
        """Requests of one prompt, which is read once."""
        first = self.submit(engine, ids, references, options)
        yield first
        while count > 1 and not first.ready:
            engine.step()
        for sample in range(1, count):
            start = first if first in engine.requests else None
            yield self.submit(engine, ids, references, options, sample, start)


def load(
    model: str | torch.nn.Module = "pico",
    method: str | Method = "plain",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: Mapping[str, object] | None = None,
    adapter: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    numerics: Numerics | None = None,
) -> LLM:
    """Load a model to generate with.

    model: "pico" (embedded), a folder, or a hub id; or a transformers model that is loaded already, with its
    `tokenizer`, wrapped by peft or quantised as it may be. method: a name (see
    `selfdraft.methods.available`), with its `options`, or a `Method`. adapter: a folder, a hub id or an
    embedded one, with which the method drafts (bita, space), None being that of an embedded model; or which
    tunes the model, for any method (`selfdraft train cllm`): then texts are those of the tuned weights.
    dtype: None keeps the checkpoint's. device: None is CUDA if there is one. numerics: "exact" gives every
    token the same bits whatever the method, the batch or the step; "fast" does not promise that; None is
    exact on the CPU, where the probe at load finds it possible. Raises a SelfdraftError that says what was
    wrong.
    """
    if numerics not in (None, "exact", "fast"):
        raise InvalidOption(f"numerics must be 'exact' or 'fast'; got {numerics!r}")
    drafting.resolve(method, options)  # a wrong name is told before the weights are read
    if isinstance(model, str):
        loaded, own = load_pretrained(model, dtype, device)
        return LLM(drive(loaded, numerics), tokenizer or own, method, options, model, adapter)
    if tokenizer is None:
        raise InvalidOption("a model that is loaded already needs its tokenizer: load(model, tokenizer=...)")
    if dtype is not None or device is not None:
        raise InvalidOption("dtype and device go with a model's name; a loaded model has its own")
    return LLM(drive(model, numerics), tokenizer, method, options, adapter=adapter)


def read_reference(path: Path) -> str:
    """The text of a reference file. Raises InvalidReference."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidReference(f"reference {path} cannot be read as text: {error}") from error


def _end_ids(model: TransformersModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a text: those of the model's generation config, else the tokenizer's."""
    config = model.model.generation_config
    ids = config.eos_token_id if config is not None else None
    if ids is None:
        ids = tokenizer.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])
