"""Text in, text out: a model, its tokenizer and a drafting method behind `generate` and `stream`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, overload

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from . import drafting
from .drafting.method import Method
from .drafting.references import is_ids
from .encoding import Message, Prompt, PromptEncoder
from .engine.engine import Engine, check_early
from .engine.request import Request
from .engine.scheduler import Limits
from .errors import InvalidOption, InvalidPrompt, InvalidReference
from .models.adapters import folder as adapter_folder
from .models.decoder import ACTIVATIONS, Decoder
from .models.loading import DEFAULT_MODEL, AnyModel, drive, end_ids, load_decoder, load_pretrained
from .models.transformers import Numerics
from .outputs import Chunk, Completion
from .params import SamplingParams
from .sampling.detokenizer import Detokenizer
from .sampling.grammar import Grammar, Grammars, Guide, grammars
from .sampling.stopping import StopStrings, TextStream

LOG = logging.getLogger("selfdraft")
DEFAULT_METHOD = "auto"
AHEAD = 2
"""Times as many requests as can run that are made from a list of prompts."""
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

    def __init__(self, llm: LLM, request: Request, chat: bool) -> None:
        self._llm = llm
        self._request = request
        self._chat = chat

    def __iter__(self) -> Iterator[Chunk]:
        text = TextStream(self._llm.tokenizer, self._request.prompt, self._request.stop)
        for ids in self._llm.engine.run(self._request):
            ended = self._request.finish_reason is not None
            yield Chunk(ids, text.finish(self.result.text) if ended else text.add(ids))

    @property
    def result(self) -> Completion:
        return self._llm.completion(self._request, self._chat)


@dataclass
class Job:
    """What is asked for one prompt."""

    ids: Sequence[int]
    references: Sequence[Sequence[int]]
    params: SamplingParams
    chat: bool
    """The prompt went through the chat template."""
    seed: int | None = None
    """That of its samples, once the first one has it."""


class LLM(PromptEncoder):
    """A model, its tokenizer and the method it drafts with.

        llm = LLM("smollm2")
        print(llm.generate("Why is the sky blue?").text)

    Attributes: model (the engine's), tokenizer, name, method, method_name, adapter, eos_ids (token ids that
    end a text), engine (which runs all requests; threads may share it).
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
        limits: Limits | None = None,
    ) -> None:
        """Load a model to generate with.

        model: "smollm2", a folder, a GGUF file, or a hub id (`owner/name`, `owner/name:file.gguf`); or a
        transformers model that is loaded already, with its `tokenizer`, wrapped by peft or quantised as it
        may be. method: a name (see `selfdraft.drafting.available`), with its `options`, or a `Method`.
        adapter: a folder, a hub id or a shipped one ("smollm2-space"), with which the method drafts (auto,
        bita, space), or which tunes the model, for any method (`selfdraft train cllm`): then texts are those
        of the tuned weights. weights: the format in which they run, "as-stored" (None), "bf16", "q8" or "q4".
        activations: bits to which the inputs of products with 4- to 8-bit weights are rounded, 8 (None) or
        16. dtype: "float32" or "bfloat16" instead of weights. device: None is CUDA if there is one. numerics:
        "exact" gives every token the same bits whatever the method, the batch or the step; "fast" does not
        promise that; None is exact on the CPU, where it is possible. limits: what the engine may use, such as
        `Limits(kv_memory=2**30)`.

        On a CPU the model runs on this package's own decoder where that knows it, with an adapter too, else
        through transformers' forward; `route` says which, and why.

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
        self._limits = limits
        if isinstance(model, str):
            self._asked = (model, activations, dtype, device, numerics)
            loaded, own = self._load(weights, made)
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

    def _load(self, weights: str | None, method: Method) -> tuple[AnyModel, PreTrainedTokenizerBase]:
        """The model on the decoder, or where that cannot be, behind transformers' forward."""
        assert self._asked is not None
        name, activations, dtype, device, numerics = self._asked
        reason = "the method drafts from early picks of a looped model"
        if not getattr(method, "early", False):
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
        self.model: AnyModel = adapter_folder.fit(model, self.method, self.method_name, self.adapter)
        self.eos_ids = end_ids(model.config, model.generation_config, tokenizer)
        check_early(self.method, self.model)
        self.engine = Engine(self.model, self._limits)
        self.model.cost(1)  # measured now, if it is not known, and not within somebody's request

    def using(
        self, method: str | Method, options: Mapping[str, object] | None = None, adapter: str | None = None
    ) -> LLM:
        """The same model with another method. Without an adapter a tuned model stays tuned."""
        made, _ = drafting.resolve(method, options)
        if adapter is None and adapter_folder.drafts_with(made) and method == self.method_name:
            adapter = self.adapter
        start: AnyModel = self.model.base if adapter is None else self.model.loaded
        other = LLM.__new__(LLM)
        other.route, other._asked, other._limits = self.route, self._asked, self._limits
        if isinstance(start, Decoder) and getattr(made, "early", False):
            start, _ = other._load(None, made)
        other._init(start, self.tokenizer, method, options, self.name, adapter)
        if other.model is self.model:
            other.engine = self.engine
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
        progress: bool = False,
        **options: object,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        messages: None = None,
        references: Sequence[Prompt] | Sequence[Sequence[Prompt]] = (),
        raw: bool = False,
        n: int | None = None,
        progress: bool = False,
        **options: object,
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompt: Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        n: int,
        messages: Sequence[Message] | None = None,
        references: Sequence[Prompt] = (),
        raw: bool = False,
        progress: bool = False,
        **options: object,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | list[str] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        messages: Sequence[Message] | None = None,
        references: Sequence[Prompt] | Sequence[Sequence[Prompt]] = (),
        raw: bool = False,
        n: int | None = None,
        progress: bool = False,
        **options: object,
    ) -> Completion | list[Completion]:
        """The answer to a prompt, or to a list of texts, as many of which run together as the limits allow.

        prompt: text, which goes through the chat template as one message of a user if the tokenizer has a
        template and `raw` is not set; or token ids, used as they are. messages: instead of a prompt, a
        conversation. references: texts or token ids that the answer may quote; for a list of prompts also a
        list of such lists, one for each. n: number of samples of each prompt; the result is then a list.
        params, options: the sampling parameters, as an object (of a list of prompts also one for each), or by
        name (`temperature=0.8`); those by name win. progress: show a progress bar.

        Without a seed every prompt of a list, every sample and every call draws its own; with one the same
        prompt gives the same text, alone or in a list. Raises InvalidPrompt, InvalidReference and
        InvalidOption, and what ended the answer to a single prompt, if an error did; in a list only that
        completion has `finish_reason="error"`.
        """
        several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str)
        prompts = cast(list[Prompt | None], prompt if several else [prompt])
        asked = _each(params, len(prompts), several, SamplingParams)
        quoted = _references_of_each(references, len(prompts), several)
        jobs = [
            self._job(
                i if several else None, one, messages, raw, SamplingParams.read(options, own), others, n
            )
            for i, (one, own, others) in enumerate(zip(prompts, asked, quoted, strict=True))
        ]
        completions = self._answers(jobs, n or 1, progress)
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
        ids, asked = self.prompt_ids(prompt, messages, raw), SamplingParams.read(options, params)
        request = self.submit(ids, references, asked)
        return Stream(self, request, messages is not None or self.chats(prompt, raw))

    def _job(
        self,
        index: int | None,
        prompt: Prompt | None,
        messages: Sequence[Message] | None,
        raw: bool,
        params: SamplingParams,
        references: Sequence[Prompt],
        n: int | None,
    ) -> Job:
        """What is asked for one prompt, checked. index: in a list."""
        if n is not None and (not isinstance(n, int) or n < 1):
            raise InvalidOption(f"n must be at least 1; got {n!r}", option="n")
        if n is not None and n > 1 and params.temperature == 0:
            raise InvalidOption(
                f"n={n} needs a temperature above 0: greedy samples are all equal", option="n"
            )
        try:
            ids = self.prompt_ids(prompt, messages, raw)
            quoted = self.references(references)
            self.engine.check(ids, quoted)
        except (InvalidPrompt, InvalidReference) as error:
            raise error if index is None else type(error)(f"prompt {index}: {error}") from error
        return Job(ids, quoted, params, messages is not None or self.chats(prompt, raw))

    def _answers(self, jobs: Sequence[Job], n: int, progress: bool) -> list[Completion]:
        """The completions of all jobs, in order. Only so many requests are made at a time as can run, and
        some more: each has the state of a drafter."""
        found: list[Completion | None] = [None] * (len(jobs) * n)
        waiting = iter([(job, sample) for job in jobs for sample in range(n)])
        live: dict[Request, int] = {}
        with _bar(len(found), progress) as advance:
            try:
                for index, (job, sample) in enumerate(waiting):
                    live[self._sample(job, sample, live)] = index
                    self._collect(jobs, n, live, found, advance, AHEAD * self.engine.limits.max_requests)
                self._collect(jobs, n, live, found, advance, 1)
            finally:
                for request in live:
                    self.engine.cancel(request)
        return cast(list[Completion], found)

    def _sample(self, job: Job, sample: int, live: Mapping[Request, int]) -> Request:
        """A request for a sample of a prompt. Samples share a seed, and differ in `sample`."""
        if sample == 0:
            request = self.submit(job.ids, job.references, job.params)
            job.seed = request.sampler.seed
            return request
        return self.submit(job.ids, job.references, replace(job.params, seed=job.seed), sample=sample)

    def _collect(
        self,
        jobs: Sequence[Job],
        n: int,
        live: dict[Request, int],
        found: list[Completion | None],
        advance: Callable[[], None],
        most: int,
    ) -> None:
        """Step until fewer requests than `most` are live."""
        while len(live) >= most:
            self.engine.step()
            for request in [request for request in live if request.finish_reason is not None]:
                index = live.pop(request)
                found[index] = self.completion(request, jobs[index // n].chat)
                advance()

    def submit(
        self,
        ids: Sequence[int],
        references: Sequence[Prompt],
        params: SamplingParams,
        *,
        sample: int = 0,
        salt: str = "",
        timeout: float | None = None,
        grammar: Grammar | Guide | None = None,
    ) -> Request:
        """Let a request join the engine; see `Engine.submit`. grammar: what the text must follow; a `Guide`
        has been compiled before."""
        guide = self.load_grammars().guide(grammar) if isinstance(grammar, Grammar) else grammar
        stop = StopStrings(self.tokenizer, params.stop_strings) if params.stop_strings else None
        return self.engine.submit(
            ids,
            self.method,
            params,
            self.references(references),
            eos_ids=self.eos_ids,
            stop=stop,
            sample=sample,
            salt=salt,
            timeout=timeout,
            guide=guide,
        )

    def load_grammars(self) -> Grammars:
        """Read the vocabulary for grammars, once: 0.3 s for SmolLM2, 1.4 s for Qwen2.5. Otherwise the first
        request with a grammar does it, and others wait while it holds Python's lock. Raises InvalidOption, as
        `Grammars`."""
        return grammars(self.tokenizer, self.model.vocab_size, frozenset(self.eos_ids))

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
            sources=request.sources,
            readouts=request.readouts,
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


def _each(given: Any, count: int, several: bool, kind: type) -> Sequence[Any]:
    """One for each prompt: all of them the same, or as given. Raises InvalidOption."""
    if given is None or isinstance(given, kind):
        return [given] * count
    if not several or not isinstance(given, Sequence) or len(given) != count:
        raise InvalidOption(
            f"params: give one {kind.__name__}, or for a list of prompts one for each; got {given!r:.100}",
            option="params",
        )
    return given


def _references_of_each(given: Sequence[Any], count: int, several: bool) -> Sequence[Sequence[Prompt]]:
    """The references of each prompt. A list of lists of texts, or of lists of ids, is one list for each.
    Raises InvalidReference."""
    nested = several and isinstance(given, list | tuple) and bool(given)
    if not nested or not all(
        (isinstance(one, list | tuple) and not is_ids(one)) or one == [] for one in given
    ):
        return [given] * count
    if len(given) != count:
        raise InvalidReference(f"references: there are {count} prompts and {len(given)} lists of references")
    return given


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar; yields what advances it."""
    if not shown:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("answers", total=total)
        yield lambda: bar.advance(task)


def read_reference(path: Path) -> str:
    """The text of a reference file. Raises InvalidReference."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidReference(f"reference {path} cannot be read as text: {error}") from error


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
