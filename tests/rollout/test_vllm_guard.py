"""The key that a server requires at every endpoint."""

import asyncio
from typing import Any

import pytest

from aropd_mcore.rollout.vllm_side.aropd_guard import Guard


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ([(b"host", b"x"), (b"authorization", b"Bearer the-key")], True),
        ([(b"authorization", b"Bearer the-key-and-more")], False),
        ([(b"authorization", b"the-key")], False),
        ([], False),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_guard_accepts_only_the_key(monkeypatch, kind, headers, passes):
    monkeypatch.setenv("VLLM_API_KEY", "the-key")
    reached, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind, "path": "/collective_rpc", "headers": headers}
    asyncio.run(Guard(app)(scope, None, send))
    assert reached == (["/collective_rpc"] if passes else [])
    refusal = {"http": {"status": 401}, "websocket": {"code": 1008}}[kind]
    assert passes or refusal.items() <= sent[0].items()


def test_guard_ignores_lifespan_events(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "the-key")
    reached = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    asyncio.run(Guard(app)({"type": "lifespan"}, None, None))
    assert reached == ["lifespan"]
