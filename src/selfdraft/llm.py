"""Text in, text out: a model, its tokenizer and a drafting method behind `generate` and `stream`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, overload

import torch
from transformers import PreTrainedTokenizerBase

from . import drafting
from .drafting.method import Method
from .drafting.references import encode_text, is_ids, spellings
from .engine.engine import Engine, check_early
from .engine.request import Request
from .errors import InvalidOption, InvalidPrompt, InvalidReference
from .models.adapters import folder as adapter_folder
from .models.decoder import ACTIVATIONS, Decoder
from .models.loading import DEFAULT_MODEL, AnyModel, drive, end_ids, load_decoder, load_pretrained
from .models.transformers import Numerics, TransformersModel
from .outputs import Chunk, Completion
from .params import SamplingParams
from .sampling.detokenizer import Detokenizer
from .sampling.stopping import StopStrings

LOG = logging.getLogger("selfdraft")
Prompt = str | Sequence[int]
"""Text, or token ids, which are used as they are."""
Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`; the content is text or a list of `{"type": "text", "text": ...}`."""
DEFAULT_METHOD = "llma"
SAMPLING_CONFIG = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "stop_strings": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "min_new_tokens": None,
    "no_repeat_ngram_size": 0,
}
"""Entries of generation_config.json that would change a text, with the values that change nothing here."""


class Stream:
    """Chunks of one answer as they are made; `result` holds what there is, at any time.

    Iterating raises the error that ends the answer, if one does, after the chunks before it.
    """

    def __init__(self, llm: LLM, engine: Engine, request: Request, chat: bool) -> None:
        self._llm = llm
        self._engine = engine
        self._request = request
        self._chat = chat

    def __iter__(self) -> Iterator[Chunk]:
        text = Detokenizer(self._llm.tokenizer, self._request.prompt)
        stop = self._request.stop
        pending, shown = "", 0  # text that may begin a stop string, and how much was shown before it
        for ids in self._engine.run(self._request):
            pending += text.add(ids)
            if self._request.finish_reason is not None:
                pending = self.result.text[shown:]
                safe = len(pending)
            else:
                safe = stop.safe(pending) if isinstance(stop, StopStrings) else len(pending)
            yield Chunk(ids, pending[:safe])
            pending, shown = pending[safe:], shown + safe

    @property
    def result(self) -> Completion:
        return self._llm.completion(self._request, self._chat)


class LLM:
    """A model, its tokenizer and the method it drafts with.

        llm = LLM("smollm2")
        print(llm.generate("Why is the sky blue?").text)

    Attributes: model (the engine's), tokenizer, name, method, method_name, adapter, eos_ids (token ids that
    end a text).
    """

    def __init__(
        self,
        model: str | torch.nn.Module = DEFAULT_MODEL,
        method: str | Method = DEFAULT_METHOD,
        *,
        options: Mapping[str, object] | None = None,
        adapter: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        weights: str | None = None,
        activations: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        numerics: Numerics | None = None,
    ) -> None:
        """Load a model to generate with.

        model: "smollm2", a folder, a GGUF file, or a hub id (`owner/name`, `owner/name:file.gguf`); or a
        transformers model that is loaded already, with its `tokenizer`, wrapped by peft or quantised as it
        may be. method: a name (see `selfdraft.drafting.available`), with its `options`, or a `Method`.
        adapter: a folder or a hub id, with which the method drafts (bita, space), or which tunes the model,
        for any method (`selfdraft train cllm`): then texts are those of the tuned weights. weights: the
        format in which they run, "as-stored" (None), "bf16", "q8" or "q4". activations: bits to which the
        inputs of products with 4- to 8-bit weights are rounded, 8 (None) or 16. dtype: "float32" or
        "bfloat16" instead of weights. device: None is CUDA if there is one. numerics: "exact" gives every
        token the same bits whatever the method, the batch or the step; "fast" does not promise that; None is
        exact on the CPU, where it is possible.

        On a CPU the model runs on this package's own decoder where that knows it and no adapter is used,
        else through transformers' forward; `route` says which, and why.

        Raises a SelfdraftError that says what was wrong.
        """
        if numerics not in (None, "exact", "fast"):
            raise InvalidOption(f"numerics must be 'exact' or 'fast'; got {numerics!r}", option="numerics")
        if activations not in (None, *ACTIVATIONS):
            raise InvalidOption(
                f"activations must be 8 or 16 bits; got {activations!r}", option="activations"
            )
        made, _ = drafting.resolve(method, options)  # a wrong name is reported before the weights are read
        self.route = "transformers' forward: the model was loaded already"
        self._asked: tuple[str, int | None, str | None, str | None, Numerics | None] | None = None
        if isinstance(model, str):
            self._asked = (model, activations, dtype, device, numerics)
            loaded, own = self._load(weights, made, adapter)
            self._init(loaded, tokenizer or own, method, options, model, adapter)
        elif not isinstance(model, torch.nn.Module):
            raise InvalidOption(
                f"model: give a name or a transformers model; got {model!r:.100}", option="model"
            )
        elif tokenizer is None:
            raise InvalidOption(
                "a model that is loaded already needs its tokenizer: LLM(model, tokenizer=...)"
            )
        elif dtype is not None or device is not None:
            raise InvalidOption("dtype and device go with a model's name; a loaded model has its own")
        elif activations is not None:
            raise InvalidOption("activations go with a model's name: a loaded model's are its own")
        else:
            self._init(drive(model, numerics), tokenizer, method, options, None, adapter)
        _note_sampling_config(self)

    def _load(
        self, weights: str | None, method: Method, adapter: str | None
    ) -> tuple[AnyModel, PreTrainedTokenizerBase]:
        """The model on the decoder, or where that cannot be, behind transformers' forward."""
        assert self._asked is not None
        name, activations, dtype, device, numerics = self._asked
        reason = "the drafts of the method or an adapter need it"
        if not _needs_transformers(method, adapter):
            found = load_decoder(name, weights, activations, dtype, device)
            if not isinstance(found, str):
                self.route = f"decoder, kernels for {found[0].library.name}"
                return found
            reason = found
        if weights not in (None, "as-stored", "bf16"):
            raise InvalidOption(f"weights={weights!r} needs the decoder: {reason}", option="weights")
        if activations is not None:
            raise InvalidOption(
                f"activations={activations} needs the decoder: {reason}", option="activations"
            )
        self.route = f"transformers' forward: {reason}"
        loaded, tokenizer = load_pretrained(name, dtype, device)
        return drive(loaded, numerics), tokenizer

    def _init(
        self,
        model: AnyModel,
        tokenizer: PreTrainedTokenizerBase,
        method: str | Method,
        options: Mapping[str, object] | None,
        name: str | None,
        adapter: str | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name or model.name
        self.method, self.method_name = drafting.resolve(method, options)
        self.adapter = adapter_folder.chosen(self.method, self.method_name, self.name, adapter)
        self.model: AnyModel = model
        if isinstance(model, TransformersModel):
            self.model = adapter_folder.fit(model, self.method, self.method_name, self.adapter)
        self.eos_ids = end_ids(model.config, model.generation_config, tokenizer)
        check_early(self.method, self.model)

    def using(
        self, method: str | Method, options: Mapping[str, object] | None = None, adapter: str | None = None
    ) -> LLM:
        """The same model with another method. Without an adapter a tuned model stays tuned."""
        made, _ = drafting.resolve(method, options)
        if adapter is None and getattr(made, "adapted", False) and method == self.method_name:
            adapter = self.adapter
        start: AnyModel = self.model.base if adapter is None else self.model.loaded
        other = LLM.__new__(LLM)
        other.route, other._asked = self.route, self._asked
        if isinstance(start, Decoder) and _needs_transformers(made, adapter):
            start, _ = other._load(None, made, adapter)
        other._init(start, self.tokenizer, method, options, self.name, adapter)
        return other

    @overload
    def generate(
        self,
        prompt: Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        references: Sequence[Prompt] = (),
        raw: bool = False,
        n: None = None,
        **options: object,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: list[str] | Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        references: Sequence[Prompt] = (),
        raw: bool = False,
        n: int | None = None,
        **options: object,
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: list[str] | Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        references: Sequence[Prompt] = (),
        raw: bool = False,
        n: int | None = None,
        **options: object,
    ) -> Completion | list[Completion]:
        """The answer to a prompt, or to a list of texts, which then run as one batch.

        prompt: text, which goes through the chat template as one message of a user if the tokenizer has a
        template and `raw` is not set; or token ids, used as they are. messages: instead of a prompt, a
        conversation. references: texts or token ids that the answer may quote. n: number of samples of each
        prompt; the result is then a list. params, options: the sampling parameters, as an object, or by name
        (`temperature=0.8`); those by name win.

        Without a seed every prompt of a list, and every call, draws its own. Raises InvalidPrompt,
        InvalidReference and InvalidOption, and DraftError if the drafter of a single prompt fails; in a list
        only that completion has `finish_reason="error"`.
        """
        several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str)
        prompts = cast(list[Prompt | None], prompt if several else [prompt])
        asked = SamplingParams.read(options, params)
        if n is not None and (not isinstance(n, int) or n < 1):
            raise InvalidOption(f"n must be at least 1; got {n!r}", option="n")
        if n is not None and n > 1 and asked.temperature == 0:
            raise InvalidOption(
                f"n={n} needs a temperature above 0: greedy samples are all equal", option="n"
            )
        engine = Engine(self.model)
        ids = [self.prompt_ids(one, messages, raw) for one in prompts]
        quoted = self.references(references)
        requests = [s for one in ids for s in self._samples(engine, one, quoted, asked, n or 1)]
        while engine.requests:
            engine.step()
        chats = [messages is not None or self.chats(one, raw) for one in prompts for _ in range(n or 1)]
        completions = [self.completion(*pair) for pair in zip(requests, chats, strict=True)]
        if several or n is not None:
            return completions
        if completions[0].error is not None:
            raise completions[0].error
        return completions[0]

    def stream(
        self,
        prompt: Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        references: Sequence[Prompt] = (),
        raw: bool = False,
        **options: object,
    ) -> Stream:
        """The answer to one prompt, chunk by chunk. Arguments as in `generate`."""
        engine = Engine(self.model)
        ids, asked = self.prompt_ids(prompt, messages, raw), SamplingParams.read(options, params)
        request = self.submit(engine, ids, references, asked)
        return Stream(self, engine, request, messages is not None or self.chats(prompt, raw))

    def chats(self, prompt: Prompt | None = "", raw: bool = False) -> bool:
        """True if such a prompt goes through the chat template."""
        return isinstance(prompt, str) and bool(self.tokenizer.chat_template) and not raw

    def encode(self, text: Prompt, special: bool = True) -> Sequence[int]:
        """Token ids of a text as it is; ids pass unchanged. Raises InvalidPrompt for what is neither.

        special: add the tokens that the tokenizer puts around a text, such as BOS, unless the text begins
        with that one.
        """
        if isinstance(text, str):
            bos = self.tokenizer.bos_token
            ids = encode_text(self.tokenizer, text, special)
            return ids[1:] if special and bos and text.startswith(bos) and ids[:1] * 2 == ids[:2] else ids
        if not is_ids(text):
            raise InvalidPrompt(f"give text or a list of token ids; got {text!r:.100}")
        return list(text)

    def prompt_ids(
        self, prompt: Prompt | None, messages: Sequence[Message] | None = None, raw: bool = False
    ) -> Sequence[int]:
        """Token ids of a prompt or of messages; see `generate`.

        Raises InvalidPrompt, and InvalidOption for messages without a chat template.
        """
        if (prompt is None) == (messages is None):
            raise InvalidPrompt("give one of prompt and messages")
        if prompt is not None:
            if isinstance(prompt, str) and not prompt:
                raise InvalidPrompt("the prompt is empty; give some text")
            if not self.chats(prompt, raw):
                return self.encode(prompt)
            messages = [{"role": "user", "content": prompt}]
        if not self.tokenizer.chat_template:
            raise InvalidOption(f"{self.name}: its tokenizer has no chat template; give a prompt instead")
        turns = _turns(messages)
        try:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # whatever a template raises about messages it does not take
            raise InvalidPrompt(f"the chat template does not take these messages: {error}") from error
        return self.encode(cast(str, text), special=False)

    def references(self, given: Sequence[Prompt]) -> list[Sequence[int]]:
        """Token ids of reference texts, in the spellings that another text may give them; ids pass unchanged.
        Raises InvalidReference."""
        return spellings(lambda text: encode_text(self.tokenizer, text, special=False), given)

    def submit(
        self,
        engine: Engine,
        ids: Sequence[int],
        references: Sequence[Prompt],
        params: SamplingParams,
        sample: int = 0,
        start: Request | None = None,
        keep: bool = False,
    ) -> Request:
        """Let a request join an engine of this model; see `Engine.submit`."""
        stop = StopStrings(self.tokenizer, params.stop_strings) if params.stop_strings else None
        return engine.submit(
            ids,
            self.method,
            params,
            self.references(references),
            eos_ids=self.eos_ids,
            stop=stop,
            sample=sample,
            start=start,
            keep=keep,
        )

    def completion(self, request: Request, chat: bool) -> Completion:
        """What a request has come to. chat: its prompt went through the chat template."""
        ids = list(request.emitted)
        shown = ids[:-1] if request.finish_reason == "eos" else ids
        text = Detokenizer(self.tokenizer, request.prompt).add(shown, last=True)
        return Completion(
            model=self.name,
            method=self.method_name,
            grade=self.model.grade,
            chat=chat,
            text=text if request.watch is None else text[: request.watch.cut],
            ids=ids,
            logprobs=None if request.params.logprobs is None else tuple(request.logprobs),
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
            seed=request.sampler.seed,
            sample=request.sampler.sample,
            temperature=request.params.temperature,
            weights=self.model.weights_label,
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=str(self.model.device),
            numerics=self.model.numerics,
            error=request.error,
        )

    def _samples(
        self,
        engine: Engine,
        ids: Sequence[int],
        references: Sequence[Prompt],
        params: SamplingParams,
        count: int,
    ) -> Iterator[Request]:
        """Requests of one prompt, which is read once. They share a seed, and differ in `sample`."""
        first = self.submit(engine, ids, references, params)
        yield first
        while count > 1 and not first.ready:
            engine.step()
        params = replace(params, seed=first.sampler.seed)
        for sample in range(1, count):
            start = first if first in engine.requests else None
            yield self.submit(engine, ids, references, params, sample, start)


def _needs_transformers(method: Method, adapter: str | None) -> bool:
    """True where the decoder does not do: with an adapter, or with drafts from early picks."""
    return adapter is not None or any(getattr(method, name, False) for name in ("adapted", "early"))


def read_reference(path: Path) -> str:
    """The text of a reference file. Raises InvalidReference."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidReference(f"reference {path} cannot be read as text: {error}") from error


def _turns(messages: object) -> list[dict[str, Any]]:
    """Messages whose content is one text. Raises InvalidPrompt for what no template of texts can take."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InvalidPrompt(f"messages: give a list of {{role, content}} objects; got {messages!r:.100}")
    return [_turn(number, message) for number, message in enumerate(messages, start=1)]


def _turn(number: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidPrompt(
            f"message {number}: give an object with a role and a content; got {message!r:.100}"
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return dict(message)
    parts = content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidPrompt(
            f"message {number}: its content must be text, or a list of text parts; got {content!r:.100}"
        )
    return {**message, "content": "".join(cast(list[str], texts))}


def _note_sampling_config(llm: LLM) -> None:
    """Name the entries of the model's generation_config.json that are not applied: sampling parameters come
    from the request alone, and the default is greedy."""
    config = llm.model.generation_config
    given = {name: getattr(config, name, None) for name in SAMPLING_CONFIG}
    ignored = [
        f"{name}={value}"
        for name, value in given.items()
        if value is not None and value != SAMPLING_CONFIG[name]
    ]
    if ignored:
        LOG.warning(
            "%s: the sampling settings of its generation_config.json are not applied (%s); a request without "
            "settings is greedy",
            llm.name,
            ", ".join(ignored),
        )
