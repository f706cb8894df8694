"""Between HTTP and the engine: bodies within bounds, pieces that cross threads, and clients that go away."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Coroutine
from typing import Any
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.responses import Response
from starlette.types import Receive
from starlette.types import Scope
from starlette.types import Send

from jaxrl_llm.serving.errors import APIError
from jaxrl_llm.serving.generation import Piece

Made = TypeVar("Made")

CLIENT_GONE = 499
"""Status in the metrics of a request whose client did not wait; nobody is told."""


class Inbox:
    """Pieces from the engine's thread for a coroutine; those that wait are joined, so that a slow one gets fewer.

    Args:
        count: generations that deliver here.
    """

    def __init__(self, count: int) -> None:
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._pieces: deque[tuple[int, Piece]] = deque()
        self._open = count

    def deliver(self, index: int, piece: Piece) -> None:
        """Called by the engine."""
        self._pieces.append((index, piece))
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop has ended, and nobody waits
            self._pieces.clear()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """All of them, in order, until every generation has ended.

        Raises:
            APIError: one failed.
        """
        while self._open:
            await self._ready.wait()
            self._ready.clear()
            joined: dict[int, Piece] = {}
            error: APIError | None = None
            while self._pieces and error is None:
                index, new = self._pieces.popleft()
                if new.error is not None:
                    error = new.error
                    continue
                before = joined.get(index, Piece())
                joined[index] = Piece(before.text + new.text, before.tokens + new.tokens, new.finish)
            for index, piece in joined.items():
                self._open -= piece.finish is not None
                yield index, piece
            if error is not None:
                raise error


class EventStream(Response):
    """Server-sent events, as long as somebody reads them.

    Args:
        events: what is sent; closed when the client is gone.
        seconds: until the connection is given up, however slowly it is read.
        ended: called at the end with the status for the metrics.
    """

    def __init__(self, events: AsyncIterator[bytes], *, seconds: float, ended: Callable[[int], None]) -> None:
        self._events, self._seconds, self._ended = events, seconds, ended
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        status = CLIENT_GONE
        try:
            async with asyncio.timeout(self._seconds):
                status = await unless_gone(receive, self._sent(send)) or CLIENT_GONE
        except TimeoutError:
            status = 504
        finally:
            self._ended(status)

    async def _sent(self, send: Send) -> int:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            close: Callable[[], Awaitable[None]] = getattr(self._events, "aclose")  # noqa: B009 - of generators
            await close()
        return 200


def event(content: Any) -> bytes:
    """One server-sent event."""
    text = content
    if not isinstance(content, str):
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def error_response(error: APIError) -> JSONResponse:
    """An error as an answer."""
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


async def body_of(request: Request, *, limit: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
        APIError: it is too large, or takes too long.
        ClientDisconnect: its sender is gone.
    """
    too_large = APIError(413, f"the body is larger than {limit} bytes.", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise APIError(408, f"the body took longer than {seconds:g} s.", code="timeout") from None
    return b"".join(parts)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Made]) -> Made | None:
    """What the work makes; None, with the work cancelled, if the client goes away first."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
