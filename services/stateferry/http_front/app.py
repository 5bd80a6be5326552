"""Paths of the HTTP door."""

from __future__ import annotations

import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from stateferry.core.errors import InvalidRequest
from stateferry.core.ids import Role
from stateferry.http_front import chat, completions
from stateferry.http_front.answers import ChatShape, TextShape
from stateferry.http_front.chat_prompt import chat_prompt
from stateferry.http_front.chat_template import ChatTemplate
from stateferry.http_front.errors import HttpError, http_error
from stateferry.http_front.generation import GenerationEndpoint
from stateferry.http_front.order import Order
from stateferry.router.intake import Backend


def build_app(backend: Backend, template: ChatTemplate, max_body_bytes: int) -> Starlette:
    """The application; it has no state of its own."""
    door = backend.door

    async def read_completion(content: dict[str, Any]) -> Order:
        return completions.read_completion(content)

    async def read_chat(content: dict[str, Any]) -> Order:
        order, conversation = chat.read_chat(content)
        ids, hints = await chat_prompt(
            template, door.tokenizer, conversation, door.limits.max_prompt_bytes
        )
        order.message.token_ids.ids.extend(ids)
        order.message.token_ids.SetInParent()
        order.message.snapshot_hints.extend(hints)
        return order

    listing = _Listing(backend)
    text_endpoint = GenerationEndpoint(
        backend, TextShape(), read_completion, completions.PROMPT_FIELD, max_body_bytes
    )
    chat_endpoint = GenerationEndpoint(
        backend, ChatShape(), read_chat, chat.PROMPT_FIELD, max_body_bytes
    )
    routes = [
        Route("/v1/completions", text_endpoint, methods=["POST"]),
        Route("/v1/chat/completions", chat_endpoint, methods=["POST"]),
        Route("/v1/models", listing.models),
        Route("/v1/models/{name:path}", listing.model),
        Route("/health", listing.health),
        Route("/ready", listing.ready),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _on_http_exception})


class _Listing:
    """The paths that generate nothing."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._created = int(time.time())

    async def models(self, request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def model(self, request: Request) -> JSONResponse:
        served = self._backend.door.model.name
        if request.path_params["name"] != served:
            refused = InvalidRequest("model", f"is not served here; {served} is")
            return _response(http_error(refused))
        return JSONResponse(self._entry())

    async def health(self, request: Request) -> JSONResponse:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> JSONResponse:
        """A request could be served: there are workers of both roles."""
        counts = {role.value: len(self._backend.registry.views(role)) for role in Role}
        is_ready = all(counts.values())
        body = {"status": "ready" if is_ready else "not ready", "workers": counts}
        return JSONResponse(body, status_code=200 if is_ready else 503)

    def _entry(self) -> dict[str, Any]:
        model = self._backend.door.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "stateferry",
            "max_model_len": model.max_context_tokens,
        }


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Of paths and methods that do not exist."""
    assert isinstance(error, HTTPException)
    failure = HttpError(
        error.status_code,
        "invalid_request_error",
        f"{request.method} {request.url.path}: {error.detail}",
        headers=dict(error.headers or {}),
    )
    return _response(failure)


def _response(failure: HttpError) -> JSONResponse:
    return JSONResponse(failure.body, status_code=failure.status, headers=failure.headers)
