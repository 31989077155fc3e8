"""ASGI middleware of a vLLM server: every request needs the key, not only those under /v1.

vLLM's own check leaves the development endpoints open, including the one that calls any method of
its workers. The module runs in vLLM's interpreter and needs only the standard library.
"""

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

_FORBIDDEN = b'{"error":"unauthorized"}'


class Guard:
    """Middleware that answers 401 unless a request has `Authorization: Bearer $VLLM_API_KEY`."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app
        self.expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self.expected):
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})
                    return
                headers = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 401, "headers": headers})
                await send({"type": "http.response.body", "body": _FORBIDDEN})
                return
        await self.app(scope, receive, send)
