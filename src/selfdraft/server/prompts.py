"""Messages and texts to token ids, through the chat template of the checkpoint.

transformers renders templates in a sandbox (jinja2's ImmutableSandboxedEnvironment); here rendering also has
a limit in time. What a template does not know is refused: it would be left out of the prompt silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from threading import Lock
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..encoding import PromptEncoder
from ..errors import InvalidPrompt
from .errors import refused
from .requests import ChatRequest, Message, part_texts
from .time_limit import within
from .tools import ToolFormat, tool_format

TEMPLATE_SECONDS = 10.0
"""How long a template may take."""
THINK = ("<think>", "</think>")
"""What stands around the reasoning of Qwen3, SmolLM3 and DeepSeek-R1."""
RESERVED = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it."""

    ids: Sequence[int]
    reasons: bool
    """The template knows of reasoning, so a `<think>` in the answer is one."""
    reasoning: bool
    """The prompt ends inside the reasoning: the template has opened it."""


class Prompts:
    """The tokenizer of a model, for many threads."""

    def __init__(self, encoder: PromptEncoder, name: str) -> None:
        """encoder: the model's. name: what clients call it."""
        self.tokenizer = encoder.tokenizer
        self.name = name
        self._encoder = encoder
        template = self.tokenizer.chat_template
        self.template: str = template if isinstance(template, str) else (template or {}).get("default", "")
        self.tool_format: ToolFormat | None = tool_format(self.template)
        self._lock = Lock()  # fast tokenizers refuse to be read while a call of another thread sets them up
        self.encode("a")

    def encode(self, text: str, special: bool = True) -> Sequence[int]:
        """Ids of a text as it is; see `PromptEncoder.encode`."""
        with self._lock:
            return self._encoder.encode(text, special)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ids; with `special`, special tokens are written out."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def references(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Ids of texts that an answer may quote, in the spellings that the answer may give them."""
        with self._lock:
            return self._encoder.references(texts)

    def chat(self, asked: ChatRequest) -> Rendered:
        """The prompt of a chat. Raises ApiError and InvalidPrompt."""
        turns = conversation(asked.messages)
        continued = bool(asked.continue_final_message)
        if continued and turns[-1]["role"] != "assistant":
            raise refused("continue_final_message continues a message of the assistant", "messages")
        extra = dict(asked.chat_template_kwargs or {})
        if asked.reasoning_effort is not None:
            extra["reasoning_effort"] = asked.reasoning_effort
        tools = None
        if asked.tools and asked.tool_choice != "none":
            tools = [tool.model_dump(exclude_none=True) for tool in asked.tools]
        text = self.render(turns, extra, tools, continued)
        return Rendered(
            self.encode(text, special=False),
            THINK[1] in self.template,
            text.rstrip().endswith(THINK[0]),
        )

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        continued: bool = False,
    ) -> str:
        """The text of a conversation. extra: variables of the template. continued: the last message goes
        on. Raises ApiError, and InvalidPrompt for what the template does not take."""
        if not self.template:
            raise refused(f"{self.name} has no chat template; use /v1/completions", "messages")
        self._check_variables(extra)
        try:
            text = within(
                TEMPLATE_SECONDS,
                lambda: self.tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns],
                    tools=tools,  # type: ignore[arg-type]
                    add_generation_prompt=not continued,
                    continue_final_message=continued,
                    tokenize=False,
                    **extra,
                ),
            )
        except TimeoutError:
            raise InvalidPrompt(
                f"the chat template took more than {TEMPLATE_SECONDS:g} s for these messages"
            ) from None
        except Exception as error:  # whatever a template raises about messages it does not take
            raise InvalidPrompt(f"the chat template does not take these messages: {error}") from error
        assert isinstance(text, str)
        return text

    def _check_variables(self, extra: Mapping[str, Any]) -> None:
        for name in extra:
            reserved = name in RESERVED or not name.isidentifier()
            if reserved or not re.search(rf"\b{re.escape(name)}\b", self.template):
                raise refused(
                    f"the chat template of {self.name} has no variable {name!r:.80}",
                    "reasoning_effort" if name == "reasoning_effort" else "chat_template_kwargs",
                )


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates take them: content is one text, arguments of tool calls are objects.

    Raises ApiError."""
    return [_turn(message, f"messages.{number}") for number, message in enumerate(messages)]


def _turn(message: Message, where: str) -> dict[str, Any]:
    content = part_texts(message.content, f"{where}.content")
    if content is None and not message.tool_calls:
        raise refused(f"{where} has no content; give text", f"{where}.content")
    turn = message.model_dump(exclude_none=True) | {"content": content or ""}
    if message.role == "developer":  # OpenAI's newer word; templates know the older one
        turn["role"] = "system"
    if message.tool_calls:
        turn["tool_calls"] = [_call(call, f"{where}.tool_calls") for call in message.tool_calls]
    return turn


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise refused(f"{where}: give objects with a function that has a name", where)
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise refused(f"{where}: the arguments are not JSON", where) from None
    return {**call, "function": {**function, "arguments": arguments}}
