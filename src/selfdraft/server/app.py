"""The routes, each with and without `/v1`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response

from ..errors import SelfdraftError
from .chat import chat
from .completions import complete
from .errors import ApiError, api_error, json_response, refused
from .guard import Guard
from .prompts import conversation
from .requests import ChatRequest, CompletionRequest, DetokenizeRequest, ResponsesRequest, TokenizeRequest
from .responses import answer_response
from .serving import Options, Serving

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM

LOG = logging.getLogger("selfdraft.server")
OUTCOMES = {429: "queue_full", 503: "shutting_down"}


def create_app(llm: AsyncLLM, options: Options | None = None) -> FastAPI:
    """The server of a model. Its state is `app.state.serving`."""
    options = options or Options()
    app = FastAPI(title="selfdraft", version=version("selfdraft"), docs_url=None, redoc_url=None)
    serving = app.state.serving = Serving(llm, options)
    app.add_api_route("/", _page, response_class=HTMLResponse, include_in_schema=False)
    for prefix in ("/v1", ""):
        app.include_router(_routes(serving), prefix=prefix, include_in_schema=bool(prefix))
    failed = _failed(serving)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(RequestValidationError, _invalid(failed))
    app.add_exception_handler(HTTPException, _http_error)
    for kind in (ApiError, SelfdraftError, Exception):
        app.add_exception_handler(kind, failed)
    app.add_middleware(Guard, keys=options.api_keys, hosts=(*options.hosts,), max_body=options.max_body)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


def _routes(serving: Serving) -> APIRouter:
    routes = APIRouter()

    @routes.post("/chat/completions", responses=ANSWERS)
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        serving.check(asked)
        return await chat(serving, asked, request)

    @routes.post("/completions", responses=ANSWERS)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        serving.check(asked)
        return await complete(serving, asked, request)

    @routes.post("/responses", responses=ANSWERS)
    async def responses(asked: ResponsesRequest, request: Request) -> Response:
        serving.check(asked)
        return await answer_response(serving, asked, request)

    @routes.get("/models", responses=ANSWERS)
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model(serving, name) for name in serving.names]})

    @routes.get("/models/{name:path}", responses=ANSWERS)
    async def model(name: str) -> Response:
        if name not in serving.names:
            raise ApiError(404, f"no model {name!r:.200}", param="model", code="model_not_found")
        return json_response(_model(serving, name))

    @routes.post("/tokenize", responses=ANSWERS)
    async def tokenize(asked: TokenizeRequest) -> Response:
        serving.check(asked)
        return json_response(await asyncio.to_thread(_tokenize, serving, asked))

    @routes.post("/detokenize", responses=ANSWERS)
    async def detokenize(asked: DetokenizeRequest) -> Response:
        serving.check(asked)
        size = serving.llm.facts.vocab_size
        if not all(0 <= token < size for token in asked.tokens):
            raise refused(f"tokens holds an id outside the vocabulary of {size}", "tokens")
        return json_response({"prompt": serving.prompts.decode(asked.tokens, special=True)})

    @routes.get("/health", responses=ANSWERS)
    async def health() -> Response:
        status = "shutting_down" if serving.draining else "ok"
        return json_response({"status": status}, 503 if serving.draining else 200)

    @routes.get("/metrics", responses=ANSWERS)
    async def metrics() -> Response:
        return Response(serving.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


ANSWERS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": 'What is wrong: {"error": {"message", "type", "param", "code"}}'},
}


async def _page() -> HTMLResponse:
    """The page for people."""
    text = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": CONTENT})


CONTENT = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
"""The page loads nothing, and talks to this server alone."""


def _model(serving: Serving, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "selfdraft",
        "max_model_len": serving.context,
    }


def _tokenize(serving: Serving, asked: TokenizeRequest) -> dict[str, Any]:
    if (asked.prompt is None) == (asked.messages is None):
        raise refused("give one of prompt and messages", "prompt")
    prompts = serving.prompts
    if asked.messages is not None:
        ids = prompts.encode(prompts.render(conversation(asked.messages), {}), special=False)
    else:
        ids = prompts.encode(asked.prompt or "", special=asked.add_special_tokens is not False)
    texts = {}
    if asked.return_token_strs:
        texts["token_strs"] = [prompts.decode([token], special=True) for token in ids]
    return {"count": len(ids), "max_model_len": serving.context, "tokens": ids, **texts}


Handler = Callable[[Request, Exception], Awaitable[Response]]


def _invalid(failed: Handler) -> Handler:
    """A body that is not what the models say."""

    async def respond(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        return await failed(request, refused(f"{message:.500}", where[:200] or None))

    return respond


def _failed(serving: Serving) -> Handler:
    async def respond(request: Request, error: Exception) -> Response:
        endpoint = request.url.path.removeprefix("/v1").strip("/").split("/")[0]
        told = api_error(error, endpoint)
        if told.status >= 500 and not isinstance(error, ApiError):
            LOG.error("%s: %s", request.url.path, error, exc_info=error)
        if endpoint in ("chat", "completions", "responses"):
            outcome = OUTCOMES.get(told.status, "failed" if told.status >= 500 else "refused")
            serving.metrics.requests.labels(endpoint, outcome).inc()
        return told.response()

    return respond


async def _gone(request: Request, error: Exception) -> Response:
    """The client went away: nobody is there to be told."""
    return Response(status_code=499)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers: Mapping[str, str] | None = error.headers
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(
        error.status_code,
        f"{request.method} {request.url.path:.200}: {error.detail}",
        code=code,
        headers=headers,
    ).response()
