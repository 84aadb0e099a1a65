"""What `/v1/responses` is asked, as the chat that it is: items of the input become messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import refused
from .requests import (
    ChatRequest,
    Function,
    InputItem,
    Message,
    ResponseFormat,
    ResponsesRequest,
    TextFormat,
    Tool,
    part_texts,
)

NOT_HELD = {
    "previous_response_id": "nothing is kept between requests",
    "conversation": "nothing is kept between requests",
    "background": "answers are given at once",
    "prompt": "there are no stored prompts",
    "top_logprobs": "log-probabilities are in /v1/chat/completions",
}
"""Fields that are not honoured, and why."""


def as_chat(asked: ResponsesRequest) -> ChatRequest:
    """The chat that the request is. Raises ApiError for what is not honoured."""
    for name, why in NOT_HELD.items():
        if getattr(asked, name):
            raise refused(f"{name}: {why}", name)
    if asked.truncation not in (None, "disabled"):
        raise refused("truncation other than disabled is not supported", "truncation")
    if asked.text is not None and asked.text.verbosity not in (None, "medium"):
        raise refused("text.verbosity is not supported", "text.verbosity")
    if not asked.input:
        raise refused("the input is empty; give text", "input")
    messages = [] if asked.instructions is None else [Message(role="system", content=asked.instructions)]
    if isinstance(asked.input, str):
        messages.append(Message(role="user", content=asked.input))
    else:
        for number, item in enumerate(asked.input):
            _add(messages, item, f"input.{number}")
    return ChatRequest(
        model=asked.model,
        messages=messages,
        tools=[Tool(type="function", function=_function(tool)) for tool in asked.tools or ()] or None,
        tool_choice=_choice(asked.tool_choice),
        reasoning_effort=(asked.reasoning or {}).get("effort"),
        chat_template_kwargs=asked.chat_template_kwargs,
        response_format=_format(asked.text.format if asked.text is not None else None),
        guided_regex=asked.guided_regex,
        guided_grammar=asked.guided_grammar,
        min_tokens=asked.min_tokens,
        ignore_eos=asked.ignore_eos,
    )


def _add(messages: list[Message], item: InputItem, where: str) -> None:
    """Add an item to the messages. What the model said before, thought and called is one message of it."""
    match item.type:
        case None | "message" if item.role is not None:
            content = part_texts(item.content, where)
            if item.role == "assistant" and messages and _only_thought(messages[-1]):
                messages[-1].content = content
            else:
                messages.append(Message(role=item.role, content=content))
        case "reasoning":
            text = part_texts(item.content, where)
            if text:  # Qwen3's and SmolLM3's templates know `reasoning_content`
                messages.append(Message.model_validate({"role": "assistant", "reasoning_content": text}))
        case "function_call" if item.call_id and item.name:
            if not messages or messages[-1].role != "assistant":
                messages.append(Message(role="assistant"))
            function = {"name": item.name, "arguments": item.arguments or "{}"}
            call = {"id": item.call_id, "type": "function", "function": function}
            messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
        case "function_call_output" if item.call_id:
            if item.call_id not in {call["id"] for m in messages for call in m.tool_calls or ()}:
                raise refused(
                    f"{where}: no function_call before it has the call_id {item.call_id!r:.80}", where
                )
            output = part_texts(item.output, where)
            messages.append(Message(role="tool", content=output, tool_call_id=item.call_id))
        case _:
            raise refused(
                f"{where}: input items are messages with a role, reasoning, function_call with call_id and "
                f"name, and function_call_output with call_id; got one of type {item.type!r:.80}",
                where,
            )


def _only_thought(message: Message) -> bool:
    return message.role == "assistant" and message.content is None and not message.tool_calls


def _function(tool: Function) -> Function:
    """The same without `type`, which stands outside in a chat."""
    return Function(**tool.model_dump(include=set(Function.model_fields)))


def _choice(given: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    """As in a chat, where the name of a function stands one level deeper."""
    if not isinstance(given, Mapping):
        return given
    return {"type": given.get("type"), "function": {"name": given.get("name")}}


def _format(given: TextFormat | None) -> ResponseFormat | None:
    if given is None:
        return None
    return ResponseFormat(type=given.type, json_schema={"name": given.name or "", "schema": given.schema_})
