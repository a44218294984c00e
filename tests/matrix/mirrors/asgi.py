"""The HTTP mirror for granian, whose sockets are tokio's and whose HTTP is hyper's. README.md says what it does."""

from collections.abc import Awaitable, Callable
from typing import Any

from tests.matrix.mirrors.mirror import pattern


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] != "http":
        return
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if scope["path"] == "/push":
        body = bytearray(pattern(0, int(scope["query_string"])))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for at in range(0, len(body) or 1, 65536):
        data, is_last = bytes(body[at : at + 65536]), at + 65536 >= len(body)
        await send({"type": "http.response.body", "body": data, "more_body": not is_last})
