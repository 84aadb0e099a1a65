"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .errors import api_error, refused
from .generation import FINISH, Generation, Piece, Token
from .grammars import chat_grammar
from .logprobs import chat_logprobs
from .prompts import Rendered
from .requests import ChatRequest, StreamOptions
from .serving import Serving, figures, respond, usage
from .split import Delta, Splitter
from .sse import DONE, event
from .tools import Call, chosen_tools


async def chat(serving: Serving, asked: ChatRequest, request: Request) -> Response:
    """Answer a chat, streamed or whole."""
    _check(asked)
    tools = chosen_tools(asked, serving.prompts.tool_format)
    rendered = await asyncio.to_thread(serving.prompts.chat, asked)
    n = asked.n or 1
    grammar = await asyncio.to_thread(chat_grammar, asked, tools, rendered, serving)
    generation = await serving.start(
        "chat",
        asked,
        request,
        [rendered.ids],
        n,
        asked.max_completion_tokens or asked.max_tokens,
        (asked.top_logprobs or 0) if asked.logprobs else None,
        grammar,
    )
    names = frozenset(tool.function.name for tool in tools)
    return await respond(ChatAnswer(serving, asked, rendered, generation, names), asked.stream, request)


def _check(asked: ChatRequest) -> None:
    if asked.stream_options is not None and not asked.stream:
        raise refused("stream_options needs stream", "stream_options")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise refused("top_logprobs needs logprobs", "top_logprobs")
    if asked.modalities is not None and asked.modalities != ["text"]:
        raise refused("answers are text alone", "modalities")


@dataclass
class Choice:
    """One answer of the request, as far as it has come."""

    splitter: Splitter
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    """Of the calls."""
    tokens: list[Token] = field(default_factory=list)


class ChatAnswer:
    """The answers to one request in the shapes of the API."""

    def __init__(
        self,
        serving: Serving,
        asked: ChatRequest,
        rendered: Rendered,
        generation: Generation,
        names: frozenset[str],
    ) -> None:
        self._serving = serving
        self._asked = asked
        self.generation = generation
        self._prompt_tokens = len(rendered.ids)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": serving.names[0],
        }
        tools = serving.prompts.tool_format if names else None
        self._choices = [
            Choice(Splitter(rendered.reasons, rendered.reasoning, tools, names)) for _ in generation.tickets
        ]

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises what ended it."""
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                self._take(piece)
        return {
            **self._head,
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._choices)],
            "usage": usage(self.generation, self._prompt_tokens),
            "selfdraft": figures(self.generation),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The answer in events. An error that ends it is one, too."""
        options = self._asked.stream_options or StreamOptions()
        with_usage, drafts = options.include_usage, options.include_drafts
        head = {**self._head, "object": "chat.completion.chunk"}
        tail: dict[str, Any] = {"usage": None} if with_usage else {}

        def chunk(
            index: int, delta: Any, logprobs: Any = None, finish: str | None = None, made: Any = None
        ) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return event({**head, "choices": [choice], **tail, **(made or {})})

        for index in range(len(self._choices)):
            yield chunk(index, {"role": "assistant", "content": ""})
        try:
            async with aclosing(self.generation.pieces()) as pieces:
                async for piece in pieces:
                    count = {"selfdraft": {"tokens": piece.count}} if drafts and piece.count else None
                    logprobs = self._logprobs(piece.tokens)
                    for delta in self._take(piece):
                        yield chunk(piece.index, delta, logprobs, made=count)
                        logprobs, count = None, None
                    if logprobs is not None and logprobs["content"]:
                        yield chunk(piece.index, {"content": ""}, logprobs, made=count)
                    if piece.completion is not None:
                        ended = len(self.generation.completions) == len(self._choices)
                        made = {"selfdraft": figures(self.generation)} if ended else {}
                        yield chunk(piece.index, {}, None, self._finish(piece.index), made=made)
            if with_usage:
                yield event({**head, "choices": [], "usage": usage(self.generation, self._prompt_tokens)})
        except Exception as error:
            yield event(api_error(error).body)
        yield DONE

    def _take(self, piece: Piece) -> Sequence[dict[str, Any]]:
        """Note a piece; the deltas that it makes."""
        choice = self._choices[piece.index]
        choice.tokens += piece.tokens
        parts = choice.splitter.add(piece.text, last=piece.completion is not None)
        return [delta for part in parts for delta in self._deltas(choice, part)]

    def _deltas(self, choice: Choice, part: Delta | Call) -> Sequence[dict[str, Any]]:
        if isinstance(part, Call):
            index, name = len(choice.calls), f"call_{secrets.token_hex(12)}"
            choice.calls.append(part)
            choice.ids.append(name)
            begin = {"index": index, "id": name, "type": "function"}
            return [
                {"tool_calls": [{**begin, "function": {"name": part.name, "arguments": ""}}]},
                {"tool_calls": [{"index": index, "function": {"arguments": part.arguments}}]},
            ]
        if part.part == "reasoning":
            choice.reasoning.append(part.text)
            return [{"reasoning_content": part.text}]
        choice.content.append(part.text)
        return [{"content": part.text}]

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return chat_logprobs(self._serving.llm.tokenizer, tokens) if self._asked.logprobs else None

    def _finish(self, index: int) -> str:
        reason = FINISH[self.generation.completions[index].finish_reason]
        return "tool_calls" if self._choices[index].calls and reason == "stop" else reason

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        content = "".join(choice.content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not choice.calls else None,
            "refusal": None,
            "annotations": [],
        }
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.calls:
            message["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for id, call in zip(choice.ids, choice.calls, strict=True)
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": self._finish(index),
        }
