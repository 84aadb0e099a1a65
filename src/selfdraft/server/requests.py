"""What a client may ask. Fields that would change the text are honoured or refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..params import SamplingParams
from .errors import refused

MAX_STOP = 16
"""Stop strings of one request."""
MAX_STOP_LENGTH = 1_024
"""Characters of one."""
MAX_CHOICES = 128
"""Answers of one request: prompts times n."""
MAX_REFERENCES = 32
MAX_REFERENCE = 400_000
"""Characters of all texts to copy from: an index of them is built between two steps, in about 0.3 s."""
MAX_GRAMMAR = 64_000
"""Characters of a schema, a regular expression or a grammar."""
MAX_LOGPROBS = 20
TEXTS = ("text", "input_text", "output_text", "reasoning_text")
"""Types of the parts of a content that are text."""


class Body(BaseModel):
    """A JSON object of a request. Numbers are not read from texts; other fields are kept, to be looked at."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


class Part(Body):
    type: str
    text: str | None = None


class Prediction(Body):
    """A text that the answer is expected to resemble. It speeds the answer up and never changes it."""

    type: Literal["content"]
    content: str | list[Part]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    include_drafts: bool | None = None
    """Chunks say how many tokens they hold: `selfdraft: {"tokens": 3}`."""


Stop = (
    str
    | Annotated[list[Annotated[str, Field(max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOP)]
    | None
)


class Asked(Body):
    """What all requests for text have: sampling parameters, and what drafts may be copied from."""

    model: str
    temperature: float | None = Field(default=None, ge=0)
    """0 is greedy; 1 if left out, as in OpenAI's API, or what the server was started with."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = Field(default=None, gt=0)
    logit_bias: dict[str, float] | None = None
    """Token id, as text, -> -100 to 100."""
    stop: Stop = None
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    stream: bool | None = None
    prediction: Prediction | None = None
    references: Annotated[list[str], Field(max_length=MAX_REFERENCES)] | None = None
    """More texts that the answer may quote."""
    method: str | None = None
    """A drafting method other than the server's. It changes the speed, never the text."""
    cache_salt: str | None = Field(default=None, max_length=256)
    """Requests share cached prefixes and earlier answers only with those of the same salt."""
    guided_regex: Annotated[str, Field(max_length=MAX_GRAMMAR)] | None = None
    guided_grammar: Annotated[str, Field(max_length=MAX_GRAMMAR)] | None = None

    def predicted(self) -> list[str]:
        """The texts that drafts may be copied from. Empty ones are none."""
        texts = list(self.references or ())
        if self.prediction is not None:
            content = self.prediction.content
            texts += [content] if isinstance(content, str) else _texts(content, "prediction")
        if (size := sum(map(len, texts))) > MAX_REFERENCE:
            raise refused(
                f"the texts to copy from have {size} characters; at most {MAX_REFERENCE}", "prediction"
            )
        return [text for text in texts if text]

    def sampling(
        self, defaults: Mapping[str, Any], room: int, tokens: int, logprobs: int | None
    ) -> SamplingParams:
        """The library's parameters. defaults: the server's, by the library's names. room: tokens that the
        context has left. tokens: how many at most. Raises InvalidOption, ApiError."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "seed": None if self.seed is None else self.seed % 2**64,
            "logit_bias": dict(self._biases()) or None,
            "min_new_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "logprobs": logprobs,
            "max_new_tokens": max(1, min(tokens, room)),
        }
        return SamplingParams.read(
            {"temperature": 1.0, **defaults, **{k: v for k, v in given.items() if v is not None}}
        )

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def _biases(self) -> Iterator[tuple[int, float]]:
        for token, value in (self.logit_bias or {}).items():
            if not token.isascii() or not token.isdigit() or len(token) > 9 or abs(value) > 100:
                raise refused(
                    f"logit_bias takes token ids with numbers from -100 to 100; got {token!r:.40}: {value}",
                    "logit_bias",
                )
            yield int(token), value


class Function(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class Message(Body):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class Choosing(Asked):
    """Requests that may ask for several answers."""

    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1)
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None


class ChatRequest(Choosing):
    """`/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    continue_final_message: bool | None = None
    modalities: list[str] | None = None


class CompletionRequest(Choosing):
    """`/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = None


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: str | None = None


class InputItem(Body):
    """A message, what the model thought, a call of a function, or what one returned."""

    type: str | None = None
    role: str | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class ResponsesTool(Function):
    type: Literal["function"]


class ResponsesRequest(Asked):
    """`/v1/responses`, without state: `store` is accepted, nothing is kept."""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    text: TextOptions | None = None
    reasoning: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    truncation: str | None = None
    top_logprobs: int | None = None
    prompt: Any = None
    include: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    stream_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None


class TokenizeRequest(Body):
    """`/tokenize`: ids of a text, or of messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """`/detokenize`: the text of ids."""

    model: str | None = None
    tokens: list[int]


def part_texts(content: str | Sequence[Part] | None, param: str) -> str | None:
    """The text of a message's content. Raises ApiError for parts that are not text."""
    if content is None or isinstance(content, str):
        return content
    return "".join(_texts(content, param))


def _texts(parts: Sequence[Part], param: str) -> list[str]:
    texts = []
    for part in parts:
        if part.type not in TEXTS or part.text is None:
            raise refused(f"content parts are text; got one of type {part.type!r:.80}", param)
        texts.append(part.text)
    return texts
