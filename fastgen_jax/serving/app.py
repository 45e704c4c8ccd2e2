"""The HTTP interface: OpenAI's endpoints, vLLM's helpers, MII's endpoint, and the server's own pages and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from fastgen_jax import __version__
from fastgen_jax.api.async_engine import ClosedError, QueueFullError, RequestFailedError
from fastgen_jax.json_types import JsonObject
from fastgen_jax.serving import endpoints
from fastgen_jax.serving.embeddings import add_embeddings
from fastgen_jax.serving.errors import ApiError, ErrorResponses, as_api_error, from_validation_errors
from fastgen_jax.serving.messages.answer import error_body
from fastgen_jax.serving.messages.endpoints import add_messages
from fastgen_jax.serving.messages.models import is_anthropic, model_info, page_of
from fastgen_jax.serving.metrics import CONTENT_TYPE
from fastgen_jax.serving.middleware import CLIENT_DISCONNECTED, RequestMiddleware
from fastgen_jax.serving.page_html import load_page
from fastgen_jax.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
)
from fastgen_jax.serving.responses.endpoints import add_responses
from fastgen_jax.serving.sse import ClientDisconnectedError
from fastgen_jax.serving.state import ServerState
from fastgen_jax.serving.stored_chats import add_stored_chats
from fastgen_jax.serving.trace import perfetto
from fastgen_jax.serving.weights import add_weights

_ERRORS: ErrorResponses = {
    status: {"description": "An error in OpenAI's format."} for status in (400, 401, 404, 408, 413, 429, 500, 503)
}


def create_app(server: ServerState) -> FastAPI:
    """Returns the ASGI application of `server`."""
    config = server.model.config

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watcher = asyncio.create_task(server.metrics.watch_loop())
        yield
        watcher.cancel()

    app = FastAPI(title="fastgen_jax", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    _add_errors(app)
    _add_openai(app, server)
    add_stored_chats(app, server.chats, _ERRORS)
    add_responses(app, server, _ERRORS)
    add_messages(app, server, _ERRORS)
    add_embeddings(app, server, _ERRORS)
    _add_operations(app, server)
    add_weights(app, server, _ERRORS)
    app.add_middleware(
        RequestMiddleware,
        api_keys=config.api_key,
        max_body_bytes=int(config.max_body_mb * 2**20),
        origins=config.cors_origin,
        on_response=server.metrics.note_response,
        refusal=_refusal,
    )
    if config.cors_origin:  # the outermost layer, so that browsers can read refusals too
        app.add_middleware(CORSMiddleware, allow_origins=list(config.cors_origin), allow_methods=["*"], allow_headers=["*"])
    return app


def _add_openai(app: FastAPI, server: ServerState) -> None:
    def model_card(name: str) -> dict[str, object]:
        card: dict[str, object] = {
            "id": name,
            "object": "model",
            "created": int(server.started),
            "owned_by": "fastgen_jax",
            "root": server.model.root or name,
            "parent": None,
            "max_model_len": None,  # until the model is loaded
            "permission": [],
        }
        if server.backend is not None:
            card["max_model_len"] = server.backend.intake.config.longest_sequence
            card["generation_config"] = server.backend.intake.defaults
        return card

    def adapter_card(name: str, folder: str) -> dict[str, object]:
        base = server.model.name
        return {**model_card(base), "id": f"{base}:{name}", "root": folder or name, "parent": base}

    def info(name: str) -> JsonObject:
        longest = None if server.backend is None else server.backend.intake.config.longest_sequence
        return model_info(name, created=server.started, max_tokens=longest)

    @app.get("/v1/models", responses=_ERRORS)
    async def list_models(
        request: Request,
        limit: int = Query(20, ge=1, le=1000, description="Only for clients of Anthropic's API, like the next two."),
        after_id: str | None = None,
        before_id: str | None = None,
    ) -> dict[str, object]:
        names, adapters = server.model.names, {} if server.backend is None else server.backend.adapters
        if is_anthropic(request.scope):
            every = [*names, *(f"{server.model.name}:{name}" for name in adapters)]
            return page_of([info(name) for name in every], limit=limit, after_id=after_id, before_id=before_id)
        cards = [adapter_card(name, folder) for name, folder in adapters.items()]
        return {"object": "list", "data": [*map(model_card, names), *cards]}

    @app.get("/v1/models/{model:path}", responses=_ERRORS)
    async def get_model(model: str, request: Request) -> dict[str, object]:
        adapter = server.adapter_of(model)
        if is_anthropic(request.scope):
            return info(model)
        return model_card(model) if adapter is None else adapter_card(adapter, server.ready().adapters[adapter])

    @app.post("/v1/completions", responses=_ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await endpoints.complete(server, body, request)

    @app.post("/v1/chat/completions", responses=_ERRORS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await endpoints.chat(server, body, request)

    @app.post("/v1/chat/completions/render", responses=_ERRORS)
    @app.post("/apply-template", responses=_ERRORS, include_in_schema=False)
    async def render(body: ChatRequest) -> dict[str, object]:
        return await endpoints.render(server, body)

    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: TokenizeRequest) -> dict[str, object]:
        return await endpoints.tokenize(server, body)

    @app.get("/tokenizer_info", responses=_ERRORS)
    async def tokenizer_info() -> dict[str, object]:
        """Facts for clients that count tokens, in vLLM's format."""
        tokenizer = server.ready().intake.need_tokenizer("/tokenizer_info")
        names = {name: tokenizer.named_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {
            **names,
            "tokenizer_class": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "chat_template": template.text if (template := tokenizer.template()) is not None else None,
        }

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        return await endpoints.detokenize(server, body)

    @app.post("/mii/{deployment}", responses=_ERRORS)
    async def generate(deployment: str, body: GenerateRequest, request: Request) -> Response:
        if deployment != server.model.deployment:
            raise ApiError(
                f"this server is the deployment {server.model.deployment!r}, not {deployment!r}",
                status=404,
                param="deployment",
                code="deployment_not_found",
            )
        return await endpoints.generate(server, body, request)


def _add_operations(app: FastAPI, server: ServerState) -> None:
    page, page_headers = load_page()

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=page_headers)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=_ERRORS)
    async def health() -> JSONResponse:
        backend = server.backend
        ready = backend is not None and backend.is_ready
        failure = server.failure or (backend.failure if backend is not None else None)
        if backend is not None and ready:
            status = "sleeping" if backend.is_asleep else "ready"
        else:
            status = "failed" if failure else "loading" if backend is None else "ending"
        return JSONResponse(
            {"status": status, "model": server.model.name, "deployment": server.model.deployment, "failure": failure},
            200 if ready else 503,
        )

    @app.get("/ping", responses=_ERRORS)
    @app.post("/ping", responses=_ERRORS)
    async def ping() -> JSONResponse:
        """The same as /health, for SageMaker."""
        return await health()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        snapshots = []
        if server.backend is not None:
            with contextlib.suppress(ClosedError):  # an engine that has ended reports nothing
                snapshots = await server.backend.snapshots()
        return Response(server.metrics.render(snapshots), media_type=CONTENT_TYPE)

    @app.get("/stats", responses=_ERRORS)
    async def stats(since_step: int = Query(0, ge=0, lt=2**53)) -> dict[str, object]:
        """Gauges, counters and the timeline of steps, for the page and `fastgen top`."""
        backend = server.ready()
        return {
            "model": server.model.name,
            "deployment": server.model.deployment,
            "unfinished": backend.num_unfinished,
            "images": backend.intake.images is not None,
            "uptime": time.time() - server.started,
            "worst_lag_ms": 1e3 * server.metrics.worst_lag,
            "engines": await backend.snapshots(since_step=since_step),
        }

    @app.get("/trace", responses=_ERRORS)
    async def trace() -> dict[str, object]:
        """The latest steps as a trace for ui.perfetto.dev."""
        return perfetto(await server.ready().snapshots(since_step=0))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _answer_error(request, from_validation_errors(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        path = request.url.path
        with_version = f"/v1{path}"
        if error.status_code == 404 and any(getattr(route, "path", "") == with_version for route in app.routes):
            refusal = ApiError(
                f"there is no {path} here, but {with_version}; end the client's base_url with /v1", status=404, code=code
            )
        elif error.status_code == 400 and error.__cause__ is not None:  # FastAPI could not read the body
            refusal = ApiError(f"the body is not JSON in UTF-8: {str(error.__cause__)[:200]}")
        else:
            refusal = ApiError(
                f"{request.method} {path}: {error.detail}",
                status=error.status_code,
                code=code,
                headers=dict(error.headers or {}),
            )
        return _refusal(request.scope, refusal)

    @app.exception_handler(ClientDisconnectedError)
    async def disconnected(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_DISCONNECTED)

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return _answer_error(request, error)

    for kind in (ApiError, QueueFullError, ClosedError, RequestFailedError, RecursionError, ValueError):
        app.add_exception_handler(kind, answer)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return _refusal(request.scope, as_api_error(error))


def _answer_error(request: Request, error: Exception) -> JSONResponse:
    answer = as_api_error(error, getattr(request.state, "names", None))
    request.state.log = {**getattr(request.state, "log", {}), "error": str(answer)}
    return _refusal(request.scope, answer)


def _refusal(scope: Scope, error: ApiError) -> JSONResponse:
    """The response to a refused request, in the format of the API that it belongs to."""
    if is_anthropic(scope):
        return JSONResponse(error_body(error.status, error.body), error.status, headers=error.headers)
    return error.response()
