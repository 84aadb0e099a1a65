"""Errors as clients of OpenAI's API read them: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from ..errors import (
    AdapterError,
    EngineClosed,
    InvalidOption,
    InvalidPrompt,
    InvalidReference,
    KVMemoryExhausted,
    ModelError,
    QueueFull,
    SelfdraftError,
    UnknownMethod,
)

RETRY_AFTER = 1
"""Seconds after which a client may ask again when the queue was full."""

PARAMETERS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "eos": "stop"}
"""Fields of SamplingParams whose names differ in a request."""


PROMPTS = {"chat": "messages", "responses": "input"}
"""What the prompt is called, by endpoint."""


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """kind: the body's `type`. param: the field of the request that is wrong. extra: more fields of the
        body, such as `n_ctx`."""
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code, **(extra or {})}
        }
        self.headers = dict(headers or {})

    @property
    def message(self) -> str:
        return str(self)

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request asks what cannot be honoured: status 400."""
    return ApiError(400, message, param=param, code=code)


def over_context(prompt_tokens: int, context: int) -> ApiError:
    """The prompt leaves no room for an answer. The body names both lengths, as llama.cpp's does."""
    return ApiError(
        400,
        f"the prompt has {prompt_tokens} tokens and leaves no room in the context of {context} tokens; "
        "shorten it",
        "exceed_context_size_error",
        code="context_length_exceeded",
        extra={"n_prompt_tokens": prompt_tokens, "n_ctx": context},
    )


def api_error(error: Exception, endpoint: str = "") -> ApiError:
    """Any error of the package as one that a client can read; others are the server's own. endpoint: which
    was asked, such as "chat"."""
    message = str(error)
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(
                429,
                message,
                "rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER)},
            )
        case InvalidOption():
            param = error.option and PARAMETERS.get(error.option, error.option)
            if error.option in PARAMETERS:
                message = message.replace(error.option, str(param))
            return refused(message, param)
        case InvalidPrompt():
            return refused(message, PROMPTS.get(endpoint, "prompt"))
        case InvalidReference():
            return refused(message, "prediction")
        case UnknownMethod() | ModelError() | AdapterError():
            return refused(message, "method")
        case KVMemoryExhausted():
            return refused(message, "max_tokens", "kv_memory_exhausted")
        case EngineClosed():
            return ApiError(503, message, "server_error", code="engine_closed")
        case SelfdraftError():
            return ApiError(500, message, "server_error", code=type(error).__name__)
    return ApiError(500, "the server failed; its log says more", "server_error", code="internal_error")


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: texts with lone surrogates cannot be encoded, but can be escaped."""
    return Response(dump(body), status, dict(headers or {}), "application/json")


def dump(body: Any) -> bytes:
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")
