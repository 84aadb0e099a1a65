"""For those who stay with `model.generate`: drafting as its `custom_generate`.

    fast = selfdraft.hook(tokenizer=tokenizer)
    model.generate(**inputs, max_new_tokens=200, custom_generate=fast)

The ids are those of `generate` itself when greedy. When sampling, the noise is this package's, keyed by a
seed that is drawn from torch's generator, so that `torch.manual_seed` settles it.

`generate` has already made its processors and stopping criteria when it calls the hook. The processors are
read back into `SamplingParams`; what cannot be read is refused. The criteria are asked after every token, as
`generate` does. Its streamer and tokenizer do not reach a hook, which therefore carries its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .. import drafting
from ..drafting.acceptance import SharedAcceptance
from ..drafting.method import Method
from ..drafting.references import encode_text, spellings
from ..engine.engine import Engine
from ..engine.request import Request
from ..errors import InvalidOption, InvalidPrompt, StopError
from ..models import attention
from ..models.adapters import folder as adapter_folder
from ..models.loading import drive
from ..models.transformers import Numerics, TransformersModel
from ..models.transformers_inputs import CACHE
from ..params import SamplingParams
from ..sampling.stopping import Stop, StopStrings, StopWatch

OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
INPUTS = {
    "attention_mask",
    "position_ids",
    "cache_position",
    CACHE,
    "use_cache",
    "logits_to_keep",
}


def hook(
    method: str | Method = "auto",
    *,
    options: Mapping[str, object] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    references: Sequence[str | Sequence[int]] = (),
    stop: str | Sequence[str] = (),
    streamer: BaseStreamer | None = None,
    numerics: Numerics | None = None,
    adapter: str | None = None,
) -> Hook:
    """A `custom_generate` for `model.generate`. Make it once per model: the model is probed at first use.

    method, options, numerics, adapter: as in `selfdraft.LLM`. references: texts or ids that the answer
    may quote. stop: strings that end an answer; `generate` refuses its own `stop_strings`, given or in
    the model's generation config, when it runs with a hook, so set those to None. streamer: gets the ids
    as they are settled; for one prompt at a time. Texts, in references or stop, need the tokenizer.
    Raises UnknownMethod and InvalidOption.
    """
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if tokenizer is None and (strings or any(isinstance(text, str) for text in references)):
        raise InvalidOption("stop strings and references given as text need tokenizer=...")

    def encode(text: str) -> Sequence[int]:
        assert tokenizer is not None
        return encode_text(tokenizer, text, special=False)

    return Hook(
        *drafting.resolve(method, options),
        spellings(encode, references),
        StopStrings(tokenizer, strings) if tokenizer is not None and strings else None,
        streamer,
        numerics,
        adapter,
    )


@dataclass
class Hook:
    """What `model.generate` calls instead of its own loop. Made by `hook`."""

    method: Method
    name: str = ""
    references: Sequence[Sequence[int]] = ()
    stop: StopStrings | None = None
    streamer: BaseStreamer | None = None
    numerics: Numerics | None = None
    adapter: str | None = None
    _model: TransformersModel | None = field(default=None, init=False, repr=False)
    _acceptance: SharedAcceptance = field(default_factory=SharedAcceptance, init=False, repr=False)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """input_ids: int64 [batch, length], left-padded. Returns int64 [batch, up to max_length], or the same
        as the `sequences` of an output. Raises InvalidOption for what cannot be honoured, InvalidPrompt."""
        _refuse(generation_config, model_kwargs)
        if self.streamer is not None and len(input_ids) > 1:
            raise InvalidOption(f"a streamer takes one prompt at a time; got a batch of {len(input_ids)}")
        mask = model_kwargs.get("attention_mask")
        prompts = _prompts(input_ids, mask)
        _check_positions(model_kwargs.get("position_ids"), input_ids, mask)
        params = _params(logits_processor, stopping_criteria, generation_config, input_ids.shape[1])
        with attention.keeping(model):
            engine = Engine(self._of(model), acceptance=self._acceptance)
            requests = [
                engine.submit(
                    prompt,
                    self.method,
                    params,
                    self.references,
                    stop=self._stop(stopping_criteria, input_ids[row]),
                    sample=row,
                )
                for row, prompt in enumerate(prompts)
            ]
            self._run(engine, requests, input_ids)
        if any(request.finish_reason == "context" for request in requests):
            warnings.warn(
                f"a text ended at the model's context of {engine.model.context} tokens", stacklevel=2
            )
        sequences = _padded(input_ids, requests, generation_config)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences))
        return sequences

    def _of(self, model: PreTrainedModel) -> TransformersModel:
        if self._model is None or self._model.loaded.model is not model:
            probed = drive(model, self.numerics)
            source = adapter_folder.chosen(self.method, self.name, probed.name, self.adapter)
            self._model = adapter_folder.fit(probed, self.method, self.name, source)
            self._acceptance = SharedAcceptance()
        if model.config._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)
        return self._model

    def _stop(self, criteria: StoppingCriteriaList, row: Tensor) -> Stop | None:
        """What ends the answer to a row of the input, beside its length and the end-of-text ids."""
        others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        return Criteria(others, row, self.stop) if others else self.stop

    def _run(self, engine: Engine, requests: Sequence[Request], input_ids: Tensor) -> None:
        shown = input_ids.shape[1] if self.streamer is None else len(requests[0].prompt)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        while engine.requests:
            engine.step()
            if error := next((one.error for one in requests if one.error is not None), None):
                raise (error.__cause__ if isinstance(error, StopError) else None) or error
            if self.streamer is not None and len(requests[0].tokens) > shown:
                self.streamer.put(torch.tensor(requests[0].tokens[shown:]))
                shown = len(requests[0].tokens)
        if self.streamer is not None:
            self.streamer.end()


@dataclass(frozen=True)
class Criteria:
    """Stopping criteria of `generate`, and the hook's own stop strings, as what ends a text. row: its input,
    padding included, as the criteria expect it."""

    criteria: Sequence[StoppingCriteria]
    row: Tensor
    strings: StopStrings | None

    def watch(self, prompt: Sequence[int]) -> CriteriaWatch:
        own = self.strings.watch(prompt) if self.strings is not None else None
        return CriteriaWatch(self.criteria, own, self.row)


@dataclass
class CriteriaWatch:
    """Asks the criteria after every token, with all ids so far, as `generate` does; there are no scores."""

    criteria: Sequence[StoppingCriteria]
    strings: StopWatch | None
    ids: Tensor
    cut: int | None = None

    def find(self, tokens: Sequence[int], least: int) -> int | None:
        for index, token in enumerate(tokens):
            self.ids = torch.cat([self.ids, self.ids.new_tensor([token])])
            own = self.strings is not None and self.strings.find([token], least - index) is not None
            if own or any(self._says(criterion) for criterion in self.criteria):
                return index
        return None

    def _says(self, criterion: StoppingCriteria) -> bool:
        try:
            return bool(torch.as_tensor(criterion(self.ids[None], None)).any())
        except (TypeError, AttributeError) as error:
            name = type(criterion).__name__
            raise InvalidOption(
                f"stopping criterion {name} needs scores, which drafts lack: {error}"
            ) from error


# How each processor reads as sampling parameters, with its place in the order they are applied in here.
MIN = "min_new_tokens"
Reader = Callable[[Any, int], dict[str, Any]]
READERS: dict[type[LogitsProcessor], tuple[int, Reader]] = {
    SequenceBiasLogitsProcessor: (0, lambda p, _: {"logit_bias": _single(p.sequence_bias)}),
    RepetitionPenaltyLogitsProcessor: (1, lambda p, _: {"repetition_penalty": _penalty(p)}),
    MinLengthLogitsProcessor: (2, lambda p, length: {MIN: max(0, p.min_length - length)}),
    MinNewTokensLengthLogitsProcessor: (2, lambda p, _: {MIN: p.min_new_tokens}),
    SuppressTokensLogitsProcessor: (2, lambda p, _: {"logit_bias": _banned(p.suppress_tokens)}),
    TemperatureLogitsWarper: (3, lambda p, _: {"temperature": p.temperature}),
    TopKLogitsWarper: (4, lambda p, _: {"top_k": p.top_k}),
    TopPLogitsWarper: (5, lambda p, _: {"top_p": p.top_p}),
    MinPLogitsWarper: (6, lambda p, _: {"min_p": p.min_p}),
    LogitNormalization: (7, lambda p, _: {}),  # moves all scores of a row alike
}


def _params(
    processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig, length: int
) -> SamplingParams:
    """The sampling parameters that they amount to. length: of the input with its padding, which
    transformers' own lengths count."""
    asked = _read(processors, length)
    longest = min((c.max_length - length for c in criteria if type(c) is MaxLengthCriteria), default=2**31)
    ends = [token for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.tolist()]
    if config.do_sample:
        asked = {"temperature": 1.0, "seed": int(torch.randint(2**63 - 1, ())), **asked}
    least = min(asked.pop(MIN, 0), longest)
    return SamplingParams(max_new_tokens=longest, min_new_tokens=least, eos=tuple(ends), **asked)


def _read(processors: LogitsProcessorList, length: int) -> dict[str, Any]:
    """The options that these processors amount to. Raises InvalidOption for those that it cannot read."""
    unknown = [type(p).__name__ for p in processors if type(p) not in READERS]
    if unknown:
        raise InvalidOption(f"logits processor {unknown[0]} cannot be honoured with drafts; leave it out")
    order = [READERS[type(p)][0] for p in processors]
    if order != sorted(order) or any(getattr(p, "min_tokens_to_keep", 1) != 1 for p in processors):
        raise InvalidOption("logits processors can be honoured in transformers' own order and form only")
    options: dict[str, Any] = {}
    for processor in processors:
        for name, value in READERS[type(processor)][1](processor, length).items():
            if name == "logit_bias":
                options[name] = {**options.get(name, {}), **value}
            elif name == MIN:
                options[name] = max(options.get(name, 0), value)
            elif name in options:
                raise InvalidOption(f"{type(processor).__name__} is given twice")
            else:
                options[name] = value
    return options


def _penalty(processor: RepetitionPenaltyLogitsProcessor) -> float:
    ignored = processor.prompt_ignore_length  # a tensor is the padding, which is stripped anyhow
    if isinstance(ignored, int) and ignored > 0:
        raise InvalidOption("a repetition penalty that ignores a part of the prompt cannot be honoured")
    return float(processor.penalty)


def _single(bias: Mapping[Sequence[int], float]) -> dict[int, float]:
    if any(len(ids) != 1 for ids in bias):
        raise InvalidOption("sequence_bias can be honoured for single tokens only")
    return {ids[0]: value for ids, value in bias.items()}


def _banned(ids: Tensor) -> dict[int, float]:
    return dict.fromkeys(ids.tolist(), float("-inf"))


def _refuse(config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> None:
    """Raises InvalidOption for what `generate` offers and drafts cannot honour."""
    refused = [name for name in OUTPUTS if getattr(config, name, None)]
    refused += [name for name, value in model_kwargs.items() if value is not None and name not in INPUTS]
    if (config.num_beams or 1) > 1:
        refused.append(f"num_beams={config.num_beams}")
    cache = model_kwargs.get(CACHE)
    if cache is not None and cache.get_seq_length() > 0:
        refused.append("a cache that is not empty")
    if refused:
        raise InvalidOption(f"{', '.join(refused)}: not possible with drafts; leave it out")


def _prompts(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The rows without their padding, which stands on the left. Raises InvalidPrompt where it does not."""
    if mask is None:
        return cast(list[list[int]], ids.tolist())
    starts = (mask != 0).int().argmax(1)
    if not bool(((mask != 0).int().cumsum(1) == mask.shape[1] - starts[:, None]).any(1).all()):
        raise InvalidPrompt("attention_mask has holes or right padding; pad on the left")
    return [row[start:].tolist() for row, start in zip(ids, starts, strict=True)]


def _check_positions(positions: Tensor | None, ids: Tensor, mask: Tensor | None) -> None:
    """Raises InvalidOption for positions other than those that the mask implies."""
    if positions is None:
        return
    read = torch.ones_like(ids) if mask is None else (mask != 0).long()
    if not bool((positions == read.cumsum(1) - 1)[read.bool()].all()):
        raise InvalidOption("position_ids of your own cannot be honoured with drafts; leave them out")


def _padded(ids: Tensor, requests: Sequence[Request], config: GenerationConfig) -> Tensor:
    """Prompts as they came and the answers, padded on the right, [batch, length]."""
    longest = max(len(request.emitted) for request in requests)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    pad = config.pad_token_id if config.pad_token_id is not None else ends[0] or 0
    rows = [[*s.emitted, *[pad] * (longest - len(s.emitted))] for s in requests]
    return torch.cat([ids, torch.tensor(rows, dtype=ids.dtype, device=ids.device)], 1)
