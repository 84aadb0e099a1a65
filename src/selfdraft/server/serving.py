"""What the endpoints share: the model behind the server, its limits, and how a request is started."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

from starlette.requests import Request
from starlette.responses import Response

from ..outputs import Completion
from ..params import SamplingParams
from ..sampling.grammar import Grammar
from .errors import ApiError, json_response, over_context, refused
from .fields import check_fields
from .generation import Generation
from .guard import tenant
from .metrics import Metrics
from .prompts import Prompts
from .requests import Asked, Body
from .sse import EventStream, unless_gone

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM

LOG = logging.getLogger("selfdraft.server")
MAX_TOKENS = 2**20
"""Tokens that one request may ask for: answers times max_tokens."""


@dataclass(frozen=True)
class Options:
    """How a server was started."""

    names: Sequence[str] = ()
    """What the model is called; empty: by its own name. The first one is in every answer."""
    api_keys: Sequence[str] = ()
    """Empty: no key is asked for."""
    hosts: Sequence[str] = ()
    """Names, beside localhost and addresses, under which the server may be asked."""
    cors_origins: Sequence[str] = ()
    strict: bool = False
    """Unknown fields are refused."""
    max_model_len: int | None = None
    """A shorter context than the model's, in tokens."""
    deadline: float = 600.0
    """Seconds that an answer may take."""
    max_body: int = 8 * 2**20
    """Bytes of a request's body."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters of requests that leave them out, by the library's names."""


class Serving:
    """A model that is served."""

    def __init__(self, llm: AsyncLLM, options: Options) -> None:
        self.llm = llm
        self.options = options
        self.names = list(options.names) or [llm.name]
        self.context = min(llm.facts.context, options.max_model_len or llm.facts.context)
        self.prompts = Prompts(llm, self.names[0])
        self.metrics = Metrics(lambda: llm.stats)
        llm.observe = self.metrics.observe
        self.created = int(time.time())
        self.draining = False
        """The server ends: new requests are refused."""
        self.active: WeakSet[Generation] = WeakSet()
        self._seen: set[str] = set()  # unknown fields that were warned of

    def check(self, body: Body) -> None:
        """Raises ApiError for an unknown model, and for fields that are not honoured."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", "server_error", code="shutting_down")
        model = getattr(body, "model", None)
        if model is not None and model not in self.names and model != self.llm.name:
            raise ApiError(
                404,
                f"no model {model!r:.200}; this server has {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        for name in check_fields(body, self._seen, self.options.strict):
            LOG.warning("a request has the unknown field %r, which is ignored", name[:80])

    async def start(
        self,
        endpoint: str,
        asked: Asked,
        request: Request,
        prompts: Sequence[Sequence[int]],
        n: int,
        tokens: int | None,
        logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> Generation:
        """Start n answers to each prompt. tokens: how many at most; None: as the context allows.

        Raises ApiError and what the engine says of a request that it does not take.
        """
        params = [self._params(asked, ids, tokens, logprobs) for ids in prompts]
        if sum(each.max_new_tokens for each in params) * n > MAX_TOKENS:
            raise refused(f"a request may ask for {MAX_TOKENS} tokens in all its answers", "max_tokens")
        references = await asyncio.to_thread(self.prompts.references, asked.predicted())
        # Without keys a client may write into the header what it likes.
        salt = tenant(request.headers, asked.cache_salt) if self.options.api_keys else asked.cache_salt or ""
        generation = Generation(
            endpoint,
            [],
            [ids for ids in prompts for _ in range(n)],
            params[0],
            bool(references),
            self.llm.tokenizer,
            self.metrics,
        )
        try:
            for ids, own in zip(prompts, params, strict=True):
                for sample in range(n):
                    ticket = self.llm.submit(
                        ids,
                        own,
                        references=references,
                        method=asked.method,
                        sample=sample,
                        timeout=self.options.deadline,
                        salt=salt,
                        chat=endpoint != "completions",
                        grammar=grammar,
                    )
                    generation.tickets.append(ticket)
        except BaseException:
            generation.cancel()
            raise
        self.active.add(generation)
        return generation

    def abort(self) -> None:
        """All answers under way end where they are."""
        for generation in list(self.active):
            generation.cancel()

    def _params(
        self, asked: Asked, ids: Sequence[int], tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """Parameters of one prompt. Its answers share a seed."""
        room = self.context - len(ids)
        if room < 1:
            raise over_context(len(ids), self.context)
        params = asked.sampling(self.options.sampling, room, room if tokens is None else tokens, logprobs)
        stops, ends = self._stops(asked)
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(53))
        return replace(params, stop=stops, eos=None if params.ignore_eos or not ends else ends)

    def _stops(self, asked: Asked) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Strings and token ids that end an answer: a stop string that is a special token, which no text
        shows, is looked for among the ids."""
        special = dict(
            zip(self.llm.tokenizer.all_special_tokens, self.llm.tokenizer.all_special_ids, strict=True)
        )
        stops = asked.stops()
        ends = {special[stop] for stop in stops if stop in special}
        strings = tuple(stop for stop in stops if stop not in special)
        return strings, tuple(sorted(ends | self.llm.facts.eos_ids)) if ends else ()


class Answer(Protocol):
    """The answers to one request in the shapes of an endpoint."""

    generation: Generation

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises what ended it."""

    def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events. An error that ends it is one, too."""


async def respond(answer: Answer, stream: bool | None, request: Request) -> Response:
    """Send an answer as its client asked. Its tickets end with the response, whatever happens."""
    try:
        if stream:
            # What the engine refuses must become a status, which stands before the first event.
            await unless_gone(request.receive, answer.generation.begin())
            return EventStream(answer.events(), lambda: answer.generation.end("left"))
        return json_response(await unless_gone(request.receive, answer.whole()))
    except BaseException:
        answer.generation.end("left")
        raise


def usage(generation: Generation, prompt_tokens: int) -> dict[str, Any]:
    """OpenAI's `usage`. Completion tokens are those of the answers, without rejected draft tokens."""
    done = list(generation.completions.values())
    tokens = sum(len(one.ids) for one in done)
    accepted, drafted = drafts(done)
    predicted = generation.predicted
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": min([one.reused for one in done], default=0)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted if predicted else 0,
            "rejected_prediction_tokens": drafted - accepted if predicted else 0,
        },
    }


def figures(generation: Generation) -> dict[str, Any]:
    """How the answers were made: the object `selfdraft` of an answer."""
    done = list(generation.completions.values())
    accepted, drafted = drafts(done)
    forwards = sum(one.forwards for one in done)
    tokens = sum(len(one.ids) for one in done)
    return {
        "method": done[0].method,
        "tokens_per_forward": round(tokens / forwards, 3) if forwards else 0.0,
        "drafted": drafted,
        "accepted": accepted,
        "weights": done[0].grade,
        "seed": done[0].seed,
    }


def drafts(completions: Sequence[Completion]) -> tuple[int, int]:
    """Draft tokens that were accepted, and all that were verified."""
    accepted = sum(len(one.ids) - len(one.runs) for one in completions)
    drafted = sum(round(one.rows_per_forward * len(one.runs)) - len(one.runs) for one in completions)
    return accepted, drafted
