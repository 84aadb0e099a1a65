"""`/v1/completions`: texts that go on as they are."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from .errors import api_error, refused
from .generation import FINISH, Generation, Token
from .grammars import grammar_of
from .logprobs import completion_logprobs
from .requests import MAX_CHOICES, CompletionRequest, StreamOptions
from .serving import Serving, figures, respond, usage
from .sse import DONE, event

MAX_TOKENS = 16
"""OpenAI's default of max_tokens."""


async def complete(serving: Serving, asked: CompletionRequest, request: Request) -> Response:
    """Continue one text or several, streamed or whole."""
    n = asked.n or 1
    prompts = await asyncio.to_thread(_prompts, serving, asked)
    if len(prompts) * n > MAX_CHOICES:
        raise refused(f"a request may ask for {MAX_CHOICES} answers: prompts times n", "n")
    _check(asked, n)
    grammar = await asyncio.to_thread(grammar_of, asked, asked.response_format, serving)
    generation = await serving.start(
        "completions",
        asked,
        request,
        prompts,
        n,
        asked.max_tokens or MAX_TOKENS,
        asked.logprobs,
        grammar,
    )
    return await respond(CompletionAnswer(serving, asked, prompts, generation), asked.stream, request)


def _check(asked: CompletionRequest, n: int) -> None:
    if asked.stream_options is not None and not asked.stream:
        raise refused("stream_options needs stream", "stream_options")
    if asked.best_of is not None and asked.best_of != n:
        raise refused("best_of other than n is not supported", "best_of")
    if asked.echo and asked.logprobs is not None:
        raise refused("echo with logprobs needs log-probabilities of the prompt, which there are not", "echo")


def _prompts(serving: Serving, asked: CompletionRequest) -> list[Sequence[int]]:
    """Token ids of each prompt."""
    given = asked.prompt
    several = isinstance(given, list) and not (given and isinstance(given[0], int))
    prompts = cast(list[str | list[int]], given if several else [given])
    if not prompts or not all(prompts):
        raise refused("the prompt is empty; give some text", "prompt")
    size = serving.llm.facts.vocab_size
    for ids in prompts:
        if isinstance(ids, list) and not all(0 <= token < size for token in ids):
            raise refused(f"the prompt holds a token id outside the vocabulary of {size}", "prompt")
    return [serving.prompts.encode(one) if isinstance(one, str) else one for one in prompts]


class CompletionAnswer:
    """The answers to one request in the shapes of the API."""

    def __init__(
        self,
        serving: Serving,
        asked: CompletionRequest,
        prompts: Sequence[Sequence[int]],
        generation: Generation,
    ) -> None:
        self._asked = asked
        self.generation = generation
        self._tokenizer = serving.llm.tokenizer
        self._prompt_tokens = sum(map(len, prompts))
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": serving.names[0],
        }
        given = asked.prompt
        texts = [given] if isinstance(given, str) else given
        echoes = [
            text if isinstance(text, str) else serving.prompts.decode(ids)
            for text, ids in zip(texts if len(texts) == len(prompts) else prompts, prompts, strict=True)
        ]
        self._echoes = [text if asked.echo else "" for text in echoes for _ in range(asked.n or 1)]

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises what ended it."""
        texts = list(self._echoes)
        tokens: list[list[Token]] = [[] for _ in texts]
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.index] += piece.text
                tokens[piece.index] += piece.tokens
        return {
            **self._head,
            "choices": [
                self._choice(index, text, tokens[index], self._finish(index))
                for index, text in enumerate(texts)
            ],
            "usage": usage(self.generation, self._prompt_tokens),
            "selfdraft": figures(self.generation),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The answer in events. An error that ends it is one, too."""
        options = self._asked.stream_options or StreamOptions()
        with_usage, drafts = options.include_usage, options.include_drafts
        tail: dict[str, Any] = {"usage": None} if with_usage else {}

        def chunk(
            index: int, text: str, tokens: Sequence[Token], finish: str | None = None, made: Any = None
        ) -> bytes:
            choices = [self._choice(index, text, tokens, finish)]
            return event({**self._head, "choices": choices, **tail, **(made or {})})

        for index, echo in enumerate(self._echoes):
            if echo:
                yield chunk(index, echo, ())
        try:
            async with aclosing(self.generation.pieces()) as pieces:
                async for piece in pieces:
                    if piece.completion is None:
                        count = {"selfdraft": {"tokens": piece.count}} if drafts else {}
                        yield chunk(piece.index, piece.text, piece.tokens, made=count)
                    else:
                        ended = len(self.generation.completions) == len(self._echoes)
                        made = {"selfdraft": figures(self.generation)} if ended else {}
                        yield chunk(piece.index, "", (), self._finish(piece.index), made=made)
            if with_usage:
                counted = usage(self.generation, self._prompt_tokens)
                yield event({**self._head, "choices": [], "usage": counted})
        except Exception as error:
            yield event(api_error(error).body)
        yield DONE

    def _finish(self, index: int) -> str:
        return FINISH[self.generation.completions[index].finish_reason]

    def _choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        logprobs = None
        if self._asked.logprobs is not None:
            logprobs = completion_logprobs(self._tokenizer, tokens, len(self._echoes[index]))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
