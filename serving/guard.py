"""What stands before the application: key and size are checked before a body is read, and every answer is counted."""

from __future__ import annotations

import hmac
import os
import sys
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.metrics import Metrics
from serving.server_options import ServerOptions

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENDPOINTS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/models"})


@dataclass(frozen=True)
class ServerSettings:
    """name: of the model. api_key "": anybody may ask. max_body: bytes of a request."""

    name: str
    api_key: str = ""
    max_body: int = 1 << 20


def settings_of(options: ServerOptions, name: str) -> ServerSettings:
    """The settings of a command line, for a model that is called `name` unless it says otherwise.

    Raises ValueError for a port that there is not.
    """
    if not 0 <= options.port < 2**16:
        raise ValueError(f"port={options.port} must lie between 0 and {2**16 - 1}")
    key = options.api_key or os.environ.get("SERVING_API_KEY", "")
    if options.host not in LOOPBACK and not key:
        print(f"warning: host={options.host} lets anybody who reaches it use this server; set SERVING_API_KEY",
              file=sys.stderr)  # fmt: skip
    return ServerSettings(options.name or name, key, options.max_body)


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error as the OpenAI clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Guard:
    """Middleware in ASGI's own terms, so that a client's hanging up reaches the application unchanged."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                known = status not in (404, 405) and scope["path"] in ENDPOINTS  # others could be any number
                endpoint = scope["path"] if known else "other"
                self.metrics.requests.labels(endpoint, str(status)).inc()
            await send(message)

        await (self._refusal(scope) or self.app)(scope, receive, counting)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        if self.settings.api_key:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.settings.api_key.encode()):
                return _response(401, "the API key is missing or wrong")
        if scope["method"] == "POST":
            size = headers.get("content-length", "")
            if not size.isdigit():
                return _response(411, "a body needs a Content-Length")
            if int(size) > self.settings.max_body:
                return _response(413, f"a body of {size} bytes is larger than {self.settings.max_body}")
        return None


def _response(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(status, message), status)
