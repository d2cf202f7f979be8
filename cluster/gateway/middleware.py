"""Round every request: its id, the API key, the last resort for errors, and the response counter.

Plain ASGI, so that `receive` (the client's disconnect) reaches the routes untouched. An exception that comes up here
before headers were sent becomes OpenAI error JSON; later than that only the connection can be closed.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import MethodNotAllowed, NotAuthenticated, RouteNotFound, http_error
from cluster.gateway.state import GatewayState

logger = logging.getLogger(__name__)

PROTECTED = ("/v1", "/tokenize", "/detokenize")
_REQUEST_ID = re.compile(r"\A[A-Za-z0-9._:\-]{1,128}\Z")


class GatewayMiddleware:
    """The outermost application."""

    def __init__(self, app: ASGIApp, *, state: GatewayState) -> None:
        self._app = app
        self._state = state
        self._key_digests = tuple(_digest(key.encode()) for key in state.context.config.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else f"req-{uuid.uuid4().hex}"
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._authenticate(scope["path"], headers)
            await self._app(scope, receive, send_noted)
        except Exception as error:
            if status:  # the headers are gone; uvicorn closes the connection
                raise
            await error_response(self._state, error)(scope, receive, send_noted)
        finally:
            route = scope.get("route")
            endpoint = getattr(route, "path", "unmatched")
            self._state.metrics.count_response(endpoint, status)
            logger.debug("%s %s: %d", scope["method"], endpoint, status, extra={"request_id": request_id})

    def _authenticate(self, path: str, headers: Headers) -> None:
        """Raises NotAuthenticated. Compares digests with every key, in constant time."""
        if not self._key_digests or not any(path == p or path.startswith(f"{p}/") for p in PROTECTED):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode("utf-8", "surrogateescape"))
        matches = [hmac.compare_digest(digest, known) for known in self._key_digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise NotAuthenticated("the API key is missing or wrong; send it as 'Authorization: Bearer <key>'")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def error_response(state: GatewayState, error: Exception) -> JSONResponse:
    """Any exception as a response, counted."""
    answer = http_error(_translated(error))
    state.metrics.count_error(str(answer.body["error"]["code"]))
    return JSONResponse(answer.body, status_code=answer.status, headers=answer.headers)


def _translated(error: Exception) -> Exception:
    """The framework's own errors in our tree."""
    if isinstance(error, HTTPException) and error.status_code == 404:
        return RouteNotFound("there is no such path; see /v1/models, /v1/chat/completions, /v1/completions")
    if isinstance(error, HTTPException) and error.status_code == 405:
        allowed = _allowed(error.headers)
        return MethodNotAllowed(f"the method is not allowed here{allowed}")
    return error


def _allowed(headers: Any) -> str:
    methods = (headers or {}).get("Allow") or (headers or {}).get("allow")
    return f"; use {methods}" if methods else ""
