"""What stands before the endpoints: who may ask, under which name, and how much.

`Host`: a page of another site can have its own name resolve to this machine (DNS rebinding) and then ask as
if it were a page of this server. Unknown names are therefore refused; addresses cannot be rebound.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection, Sequence
from hashlib import sha256
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

BODY_SECONDS = 30.0
"""How long a body may take to arrive."""
OPEN = frozenset({"/", "/health", "/v1/health"})
"""Paths without a key."""


class Guard:
    """Refuses what must not reach the endpoints, and reads the body."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], hosts: Collection[str], max_body: int) -> None:
        """keys: empty lets everybody in. hosts: names that the server answers to. max_body: bytes."""
        self._app = app
        self._keys = [_digest(key.encode()) for key in keys]
        self._hosts = {host.lower() for host in (*hosts, "localhost")}
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers.get("host", ""))
            if scope["path"] not in OPEN:
                self._check_key(headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check_host(self, host: str) -> None:
        name = host.rsplit("]", 1)[0].lstrip("[") if host.startswith("[") else host.rsplit(":", 1)[0]
        if name.lower() in self._hosts:
            return
        try:
            ip_address(name)
        except ValueError:
            raise ApiError(
                403,
                f"this server does not answer under the name {name!r:.200}; start it with --allow-host",
                "permission_error",
                code="host_not_allowed",
            ) from None

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        kind, key = given_key(headers)
        digest = _digest(key.encode("utf-8", "surrogateescape"))
        # All keys are compared, each in constant time: the answer's time says nothing about them.
        known = [hmac.compare_digest(digest, key) for key in self._keys]
        if kind.lower() != "bearer" or not any(known):
            raise ApiError(
                401,
                "give a key of this server: Authorization: Bearer KEY",
                "authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None: the client went away. Raises ApiError."""
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._max_body} bytes", code="body_too_large", headers=CLOSE
        )


CLOSE = {"Connection": "close"}


def given_key(headers: Headers) -> tuple[str, str]:
    """The kind of authorization that a client gave, such as Bearer, and its key."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return kind, key.strip()


def tenant(headers: Headers, salt: str | None) -> str:
    """Whom the engine keeps apart: clients of different keys, and of one key requests of different salts."""
    key = _digest(given_key(headers)[1].encode("utf-8", "surrogateescape"))
    return f"{key.hex()} {salt or ''}"


def _digest(key: bytes) -> bytes:
    """Keys of one length, so that comparing them does not tell theirs."""
    return sha256(key).digest()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Receive the body that has been read, then what comes after it."""
    read = False

    async def replayed() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
