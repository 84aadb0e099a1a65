"""`/v1/responses`, without state: a message or calls of functions come back, streamed as OpenAI's typed
events."""

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

from .errors import api_error
from .generation import FINISH, Generation
from .grammars import chat_grammar
from .prompts import Rendered
from .requests import ResponsesRequest
from .responses_input import as_chat
from .serving import Serving, figures, respond, usage
from .split import Splitter
from .sse import event
from .tools import Call, chosen_tools

Step = tuple[str, dict[str, Any]]
"""The name of an event and its data."""


async def answer_response(serving: Serving, asked: ResponsesRequest, request: Request) -> Response:
    """Answer a request of the Responses API, streamed or whole."""
    chat = as_chat(asked)
    tools = chosen_tools(chat, serving.prompts.tool_format)
    rendered = await asyncio.to_thread(serving.prompts.chat, chat)
    grammar = await asyncio.to_thread(chat_grammar, chat, tools, rendered, serving)
    generation = await serving.start(
        "responses", asked, request, [rendered.ids], 1, asked.max_output_tokens, grammar=grammar
    )
    names = frozenset(tool.function.name for tool in tools)
    return await respond(ResponsesAnswer(serving, asked, rendered, generation, names), asked.stream, request)


@dataclass
class TextItem:
    """An item of the output that is text: the model's reasoning, or its message."""

    id: str
    part: str
    """Of the splitter: reasoning or content."""
    text: str = ""

    def shown(self, status: str) -> dict[str, Any]:
        """The item as an object, with what has come so far."""
        content = [self.content(self.text)] if self.text or status != "in_progress" else []
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


@dataclass
class CallItem:
    """An item of the output that is a call of a function."""

    call: Call
    id: str
    call_id: str

    def shown(self, status: str, arguments: str | None = None) -> dict[str, Any]:
        return {
            "type": "function_call",
            "id": self.id,
            "call_id": self.call_id,
            "name": self.call.name,
            "arguments": self.call.arguments if arguments is None else arguments,
            "status": status,
        }


class ResponsesAnswer:
    """The answer in the shapes of the API."""

    def __init__(
        self,
        serving: Serving,
        asked: ResponsesRequest,
        rendered: Rendered,
        generation: Generation,
        names: frozenset[str],
    ) -> None:
        """names: functions that may be called."""
        self.generation = generation
        self._serving = serving
        self._asked = asked
        self._prompt_tokens = len(rendered.ids)
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        tools = serving.prompts.tool_format if names else None
        self._splitter = Splitter(rendered.reasons, rendered.reasoning, tools, names)
        self._items: list[TextItem | CallItem] = []
        self._open: TextItem | None = None
        """The last item, while text may be added to it."""
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

    async def _steps(self) -> AsyncIterator[Step]:
        """The events between the first two and the last one."""
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                for part in self._splitter.add(piece.text, last=piece.completion is not None):
                    if isinstance(part, Call):
                        for step in (*self._end(), *self._called(part)):
                            yield step
                        continue
                    if self._open is None or self._open.part != part.part:
                        for step in (*self._end(), *self._begin(part.part)):
                            yield step
                    yield self._add(part.text)
        if all(isinstance(item, TextItem) and item.part == "reasoning" for item in self._items):
            for step in (*self._end(), *self._begin("content")):  # an answer has a message, be it empty
                yield step
        for step in self._end():
            yield step

    def _begin(self, part: str) -> list[Step]:
        """Open an item for text."""
        item = self._open = TextItem(
            f"{'rs' if part == 'reasoning' else 'msg'}_{secrets.token_hex(16)}", part
        )
        self._items.append(item)
        return [
            ("response.output_item.added", {**self._at(), "item": item.shown("in_progress")}),
            ("response.content_part.added", {**self._in(item), "part": item.content("")}),
        ]

    def _add(self, text: str) -> Step:
        """Add text to the open item."""
        item = self._open
        assert item is not None
        item.text += text
        return self._text_event(item, "delta", delta=text)

    def _end(self) -> list[Step]:
        """Close the open item."""
        item, self._open = self._open, None
        if item is None:
            return []
        return [
            self._text_event(item, "done", text=item.text),
            ("response.content_part.done", {**self._in(item), "part": item.content(item.text)}),
            ("response.output_item.done", {**self._at(), "item": item.shown("completed")}),
        ]

    def _called(self, call: Call) -> list[Step]:
        """A whole item for a call."""
        item = CallItem(call, f"fc_{secrets.token_hex(16)}", f"call_{secrets.token_hex(12)}")
        self._items.append(item)
        at, name = {**self._at(), "item_id": item.id}, "response.function_call_arguments"
        return [
            ("response.output_item.added", {**self._at(), "item": item.shown("in_progress", "")}),
            (f"{name}.delta", {**at, "delta": call.arguments}),
            (f"{name}.done", {**at, "name": call.name, "arguments": call.arguments}),
            ("response.output_item.done", {**self._at(), "item": item.shown("completed")}),
        ]

    def _at(self) -> dict[str, Any]:
        """The place of the last item."""
        return {"output_index": len(self._items) - 1}

    def _in(self, item: TextItem) -> dict[str, Any]:
        return {**self._at(), "item_id": item.id, "content_index": 0}

    def _text_event(self, item: TextItem, what: str, **data: Any) -> Step:
        if item.part == "content":
            data["logprobs"] = []
        return f"response.{item.kind}.{what}", {**self._in(item), **data}

    def _event(self, name: str, /, **data: Any) -> bytes:
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
            "tool_choice": asked.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in asked.tools or ()],
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
