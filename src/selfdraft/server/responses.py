"""`/v1/responses`, without state: text in, one message out, streamed as OpenAI's typed events."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .errors import api_error, refused
from .generation import FINISH, Generation
from .grammars import chat_grammar
from .prompts import Rendered
from .requests import (
    ChatRequest,
    InputItem,
    Message,
    ResponseFormat,
    ResponsesRequest,
    TextFormat,
    part_texts,
)
from .serving import Serving, figures, respond, usage
from .split import Delta, Splitter
from .sse import event

NOT_HELD = {
    "previous_response_id": "nothing is kept between requests",
    "conversation": "nothing is kept between requests",
    "background": "answers are given at once",
    "prompt": "there are no stored prompts",
    "tools": "there are no tools here; use /v1/chat/completions",
    "top_logprobs": "log-probabilities are in /v1/chat/completions",
}
"""Fields that are not honoured, and why."""


async def answer_response(serving: Serving, asked: ResponsesRequest, request: Request) -> Response:
    """Answer a request of the Responses API, streamed or whole."""
    chat = _as_chat(asked)
    rendered = await asyncio.to_thread(serving.prompts.chat, chat)
    grammar = chat_grammar(chat, (), rendered, serving)
    generation = await serving.start(
        "responses", asked, [rendered.ids], 1, asked.max_output_tokens, grammar=grammar
    )
    return await respond(ResponsesAnswer(serving, asked, rendered, generation), asked.stream, request)


def _as_chat(asked: ResponsesRequest) -> ChatRequest:
    """The chat that the request is. Raises ApiError for what is not honoured."""
    for name, why in NOT_HELD.items():
        if getattr(asked, name):
            raise refused(f"{name}: {why}", name)
    if asked.truncation not in (None, "disabled"):
        raise refused("truncation other than disabled is not supported", "truncation")
    if asked.text is not None and asked.text.verbosity not in (None, "medium"):
        raise refused("text.verbosity is not supported", "text.verbosity")
    messages = [] if asked.instructions is None else [Message(role="system", content=asked.instructions)]
    if isinstance(asked.input, str):
        messages.append(Message(role="user", content=asked.input))
    else:
        messages += [_message(item, f"input.{number}") for number, item in enumerate(asked.input)]
    if not asked.input:
        raise refused("the input is empty; give text", "input")
    return ChatRequest(
        model=asked.model,
        messages=messages,
        reasoning_effort=(asked.reasoning or {}).get("effort"),
        chat_template_kwargs=asked.chat_template_kwargs,
        response_format=_format(asked.text.format if asked.text is not None else None),
        guided_regex=asked.guided_regex,
        guided_grammar=asked.guided_grammar,
        min_tokens=asked.min_tokens,
        ignore_eos=asked.ignore_eos,
    )


def _message(item: InputItem, where: str) -> Message:
    if item.type not in (None, "message") or item.role is None:
        raise refused(f"{where}: input items are messages; got {item.type!r:.80}", where)
    return Message(role=item.role, content=part_texts(item.content, where))


def _format(given: TextFormat | None) -> ResponseFormat | None:
    if given is None:
        return None
    return ResponseFormat(type=given.type, json_schema={"name": given.name or "", "schema": given.schema_})


@dataclass
class Item:
    """One item of the output: the model's reasoning, or its message."""

    id: str
    part: str
    """Of the splitter: reasoning or content."""
    text: str = ""

    def shown(self, status: str, text: str | None = None) -> dict[str, Any]:
        """The item as an object. text: None is what has come so far; "" is an item without content."""
        text = self.text if text is None else text
        content = [self.content(text)] if text or status != "in_progress" else []
        if self.part == "reasoning":
            return {"type": "reasoning", "id": self.id, "summary": [], "content": content, "status": status}
        return {"type": "message", "id": self.id, "role": "assistant", "status": status, "content": content}

    def content(self, text: str) -> dict[str, Any]:
        if self.part == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    @property
    def kind(self) -> str:
        return "reasoning_text" if self.part == "reasoning" else "output_text"


class ResponsesAnswer:
    """The answer in the shapes of the API."""

    def __init__(
        self, serving: Serving, asked: ResponsesRequest, rendered: Rendered, generation: Generation
    ) -> None:
        self.generation = generation
        self._serving = serving
        self._asked = asked
        self._prompt_tokens = len(rendered.ids)
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._splitter = Splitter(rendered.reasons, rendered.reasoning)
        self._items: list[Item] = []
        self._number = 0

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises what ended it."""
        async for _ in self._steps():
            pass
        return self._response(self._status())

    async def events(self) -> AsyncIterator[bytes]:
        """The answer in events. An error that ends it is one, too."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        try:
            async for name, data in self._steps():
                yield self._event(name, **data)
            status = self._status()
            yield self._event(f"response.{status}", response=self._response(status))
        except Exception as error:
            failed = api_error(error).body["error"]
            said = {"code": failed["code"] or failed["type"], "message": failed["message"]}
            yield self._event("response.failed", response=self._response("failed") | {"error": said})

    async def _steps(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The events between the first two and the last one."""
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                for delta in self._splitter.add(piece.text, last=piece.completion is not None):
                    assert isinstance(delta, Delta)
                    if not self._items or self._items[-1].part != delta.part:
                        for step in (*self._end(), *self._begin(delta.part)):
                            yield step
                    self._items[-1].text += delta.text
                    yield self._text_event("delta", delta=delta.text)
        if not self._items or self._items[-1].part != "content":  # an answer has a message, be it empty
            for step in (*self._end(), *self._begin("content")):
                yield step
        for step in self._end():
            yield step

    def _begin(self, part: str) -> list[tuple[str, dict[str, Any]]]:
        item = Item(f"{'rs' if part == 'reasoning' else 'msg'}_{secrets.token_hex(16)}", part)
        self._items.append(item)
        at = {"output_index": len(self._items) - 1}
        return [
            ("response.output_item.added", {**at, "item": item.shown("in_progress")}),
            (
                "response.content_part.added",
                {**at, "item_id": item.id, "content_index": 0, "part": item.content("")},
            ),
        ]

    def _end(self) -> list[tuple[str, dict[str, Any]]]:
        if not self._items:
            return []
        item, at = self._items[-1], {"output_index": len(self._items) - 1}
        part = {**at, "item_id": item.id, "content_index": 0, "part": item.content(item.text)}
        return [
            self._text_event("done", text=item.text),
            ("response.content_part.done", part),
            ("response.output_item.done", {**at, "item": item.shown("completed")}),
        ]

    def _text_event(self, what: str, **data: Any) -> tuple[str, dict[str, Any]]:
        item = self._items[-1]
        place = {"output_index": len(self._items) - 1, "item_id": item.id, "content_index": 0}
        if item.part == "content":
            data["logprobs"] = []
        return f"response.{item.kind}.{what}", {**place, **data}

    def _event(self, name: str, **data: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": name, "sequence_number": number, **data}, name)

    def _status(self) -> str:
        return "completed" if FINISH[self.generation.completions[0].finish_reason] == "stop" else "incomplete"

    def _response(self, status: str) -> dict[str, Any]:
        asked, params, done = self._asked, self.generation.params, bool(self.generation.completions)
        reasons = {"length": "max_output_tokens", "abort": "shutting_down"}
        incomplete = None
        if status == "incomplete":
            incomplete = {"reason": reasons[FINISH[self.generation.completions[0].finish_reason]]}
        ended = status in ("completed", "incomplete")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "model": self._serving.names[0],
            "output": [item.shown(status if ended else "in_progress") for item in self._items],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": self._format()},
            "tool_choice": "auto",
            "tools": [],
            "top_p": params.top_p,
            "top_logprobs": 0,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "truncation": "disabled",
            "background": False,
            "max_tool_calls": None,
            "service_tier": "default",
            "safety_identifier": None,
            "prompt_cache_key": None,
            "completed_at": int(time.time()) if ended else None,
            "usage": self._usage() if done and ended else None,
            **({"selfdraft": figures(self.generation)} if done and ended else {}),
        }

    def _format(self) -> dict[str, Any]:
        text = self._asked.text
        given = text.format if text is not None else None
        return {"type": "text"} if given is None else given.model_dump(by_alias=True, exclude_none=True)

    def _usage(self) -> dict[str, Any]:
        counted = usage(self.generation, self._prompt_tokens)
        return {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": counted["prompt_tokens_details"],
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0, **counted["completion_tokens_details"]},
            "total_tokens": counted["total_tokens"],
        }
