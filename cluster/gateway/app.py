"""The web application: which path is answered by what.

Routes here are a few lines each; what they do stands in the modules they call. The application holds no state but the
`GatewayState` made from its context, so that several can live in one process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.errors import NotReady
from cluster.gateway.body import parse_json, read_body
from cluster.gateway.chat_route import prepare_chat
from cluster.gateway.completion_route import prepare_completion
from cluster.gateway.context import GatewayContext
from cluster.gateway.middleware import GatewayMiddleware, error_response
from cluster.gateway.serving import serve
from cluster.gateway.state import GatewayState
from cluster.gateway.tokenize_route import detokenize, tokenize

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(context: GatewayContext) -> FastAPI:
    """The gateway as an ASGI application."""
    state = GatewayState(context)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        state.close()

    app = FastAPI(
        title="Tandem", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan, redirect_slashes=False
    )
    app.state.gateway = state

    async def on_http_error(_: Request, error: Exception) -> Response:
        return error_response(state, error)

    app.add_exception_handler(HTTPException, on_http_error)
    app.add_middleware(GatewayMiddleware, state=state)
    _add_generation_routes(app, state)
    _add_model_routes(app, state)
    _add_operation_routes(app, state)
    return app


def _add_generation_routes(app: FastAPI, state: GatewayState) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        return await serve(state, request, lambda fields: prepare_chat(state, fields))

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        return await serve(state, request, lambda fields: prepare_completion(state, fields))

    @app.post("/tokenize", response_model=None)
    async def tokenize_text(request: Request) -> Response:
        return await _computed(state, request, lambda fields: tokenize(state, fields))

    @app.post("/detokenize", response_model=None)
    async def detokenize_ids(request: Request) -> Response:
        return await _computed(state, request, lambda fields: detokenize(state, fields))


async def _computed(
    state: GatewayState, request: Request, compute: Callable[[dict[str, Any]], dict[str, Any]]
) -> Response:
    """The answer of a function of the body, computed in a thread."""
    with state.admitted():
        body = await read_body(request, max_bytes=state.context.config.max_body_bytes, budget=state.budget)
        try:
            loop = asyncio.get_running_loop()
            return JSONResponse(await loop.run_in_executor(state.threads, lambda: compute(parse_json(body))))
        finally:
            state.budget.give(len(body))


def _add_model_routes(app: FastAPI, state: GatewayState) -> None:
    context = state.context
    model = {
        "id": context.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "tandem",
        "max_model_len": context.max_model_len,
    }

    @app.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{model_id:path}", response_model=None)
    async def retrieve_model(model_id: str) -> Response:
        state.check_model(model_id)
        return JSONResponse(model)


def _add_operation_routes(app: FastAPI, state: GatewayState) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        is_ready, reason = state.context.ready()
        if not is_ready:
            raise NotReady(reason or "the cluster is starting")
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(await state.metrics.page(state.context.worker_stats), headers={"content-type": METRICS_TYPE})

    @app.get("/version", response_model=None)
    async def version() -> Response:
        return JSONResponse({"version": state.version})
