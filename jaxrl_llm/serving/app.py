"""The routes of the server."""

import asyncio
import functools
import hmac
import ipaddress
import logging
import math
import threading
import time
import uuid
from collections.abc import AsyncIterator
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llguidance import LLMatcher
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.responses import Response
from starlette.routing import Route

from jaxrl_llm.models.chat import Chat
from jaxrl_llm.models.files import one_line
from jaxrl_llm.serving.answers import Choice
from jaxrl_llm.serving.answers import Form
from jaxrl_llm.serving.answers import usage
from jaxrl_llm.serving.chats import ChatForm
from jaxrl_llm.serving.completions import CompletionForm
from jaxrl_llm.serving.engine import Engine
from jaxrl_llm.serving.errors import APIError
from jaxrl_llm.serving.errors import bad
from jaxrl_llm.serving.fields import Fields
from jaxrl_llm.serving.fields import parsed
from jaxrl_llm.serving.fields import shown
from jaxrl_llm.serving.generation import Job
from jaxrl_llm.serving.http import CLIENT_GONE
from jaxrl_llm.serving.http import EventStream
from jaxrl_llm.serving.http import Inbox
from jaxrl_llm.serving.http import body_of
from jaxrl_llm.serving.http import error_response
from jaxrl_llm.serving.http import event
from jaxrl_llm.serving.http import unless_gone
from jaxrl_llm.serving.served import load_served

BODIES = 64
"""Bodies that may be on their way at a time, each as large as `Limits` allow."""


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        body_bytes: of the body.
        body_seconds: until all of the body is there.
        seconds: until the answer's last byte, the wait for a slot included.
    """

    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    seconds: float = 600.0

    def __post_init__(self) -> None:
        """Raise a ValueError for bounds that are none."""
        if self.body_bytes < 1:
            raise ValueError(f"body_bytes is {self.body_bytes}; expected at least 1.")
        for name in ("body_seconds", "seconds"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected more than 0, and an end.")


class Service:
    """The routes over one engine.

    Args:
        engine: that decodes; started by whoever runs the service.
        name: of the model.
        chat: of the model; None: it has none.
        end_ids: tokens that end an answer.
        api_key: that every request but /health must bring; None: none.
        limits: of a request.
        weights: folder in which weights lie that /v1/weights may load; None: it loads none.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        chat: Chat | None,
        end_ids: tuple[int, ...],
        api_key: str | None,
        limits: Limits,
        weights: Path | None = None,
    ) -> None:
        self.engine, self.name, self.chat, self.limits = engine, name, chat, limits
        self._end_ids, self._key = end_ids, api_key
        self._weights = None if weights is None else weights.resolve()
        self._created, self._loading, self._bodies = int(time.time()), threading.Lock(), 0

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = (
            ("/v1/completions", "POST", self.completions),
            ("/v1/chat/completions", "POST", self.chat_completions),
            ("/v1/models", "GET", self.models),
            ("/v1/models/{model:path}", "GET", self.models),
            ("/v1/weights", "GET", self.weights_version),
            ("/v1/weights", "POST", self.load_weights),
            ("/tokenize", "POST", self.tokenize),
            ("/metrics", "GET", self.metrics),
            ("/health", "GET", self.health),
        )
        made = [Route(path, self._guarded(path, call), methods=[method]) for path, method, call in routes]

        async def not_found(request: Request, error: Exception) -> Response:
            status = error.status_code if isinstance(error, HTTPException) else 500
            word = "is no route of this server" if status == 404 else f"does not take {request.method}"
            return error_response(APIError(status, f"{request.url.path[:200]} {word}.", code="no_route"))

        return Starlette(routes=made, exception_handlers={404: not_found, 405: not_found})

    def _guarded(
        self, path: str, call: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler behind the key, with its errors as answers and its answers counted."""

        async def handle(request: Request) -> Response:
            try:
                if path != "/health":
                    self._require_key(request)
                response = await call(request)
            except APIError as error:
                response = error_response(error)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_GONE)
            except Exception:
                logging.getLogger(__name__).exception("%s failed", path)
                response = error_response(APIError(500, "the server failed; its log says why.", code="failed"))
            if not isinstance(response, EventStream):
                self._count(path, response.status_code)
            return response

        return handle

    def _count(self, path: str, status: int) -> None:
        self.engine.metrics.requests.labels(path, str(status)).inc()

    def _require_key(self, request: Request) -> None:
        if self._key is None:
            _require_local(request)
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self._key.encode())
        if scheme.lower() != "bearer" or not same:
            raise APIError(401, "the API key is missing or wrong.", code="invalid_api_key")

    async def _body(self, request: Request) -> dict[str, Any]:
        if self._bodies >= BODIES:
            raise APIError(503, f"{BODIES} bodies are on their way.", code="too_many", retry_after=1)
        self._bodies += 1
        try:
            found = await body_of(request, limit=self.limits.body_bytes, seconds=self.limits.body_seconds)
        finally:
            self._bodies -= 1
        return parsed(found)

    def _require_model(self, name: Any) -> None:
        if name not in (None, self.name):
            raise APIError(
                404,
                f"the model {name!r:.200} is not here; this server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._generated(request, self._completion_form)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._generated(request, self._chat_form)

    async def _generated(self, request: Request, make: Callable[[dict[str, Any]], Form]) -> Response:
        """The answer of a request, all of which must end in its time, whatever the engine does."""
        begun = time.monotonic()
        try:
            # A moment later than the engine, which can say more.
            async with asyncio.timeout(self.limits.seconds + 1):
                body = await self._body(request)
                self._require_model(body.get("model"))
                form, matcher = await asyncio.to_thread(self._checked, make, body)
                return await self._answered(request, form, matcher, begun)
        except TimeoutError:
            raise APIError(504, f"the answer took longer than {self.limits.seconds:g} s.", code="timeout") from None

    def _sizes(self) -> dict[str, Any]:
        decoder = self.engine.decoder
        return {"end_ids": self._end_ids, "vocab_size": decoder.config.vocab_size, "context": decoder.context}

    def _completion_form(self, body: dict[str, Any]) -> Form:
        return CompletionForm(body, self.engine.tokenizer, **self._sizes())

    def _chat_form(self, body: dict[str, Any]) -> Form:
        if self.chat is None:
            raise bad("this model has no chat; ask /v1/completions, or start the server with --chat.", code="no_chat")
        return ChatForm(body, self.chat, self.engine.tokenizer, **self._sizes())

    def _checked(self, make: Callable[[dict[str, Any]], Form], body: dict[str, Any]) -> tuple[Form, LLMatcher | None]:
        """A form that the engine can take, and the matcher of its grammar, before it waits for a slot."""
        form = make(body)
        for asked in form.generations[:: form.sampling.count]:
            try:
                self.engine.decoder.check(asked.prompt)
            except ValueError as error:
                long = len(asked.prompt) >= self.engine.decoder.context
                code = "context_length_exceeded" if long else None
                raise bad(f"the prompt cannot be answered: {error}.", "prompt", code) from None
        grammar = form.generations[0].grammar
        try:
            return form, self.engine.masker.matcher(grammar)  # compiled here, where it delays nobody else
        except ValueError as error:
            raise bad(one_line(error), "response_format", "schema_not_supported") from None

    async def _answered(self, request: Request, form: Form, matcher: LLMatcher | None, begun: float) -> Response:
        inbox = Inbox(len(form.generations))
        jobs = [
            Job(
                asked,
                self.engine.tokenizer,
                functools.partial(inbox.deliver, index),
                seconds=self.limits.seconds,
                begun=begun,
                matcher=None if matcher is None else matcher.deep_copy(),
            )
            for index, asked in enumerate(form.generations)
        ]
        self.engine.submit(jobs)
        head = {"id": f"{form.names[0]}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        choices = [form.choice(index) for index in range(len(jobs))]
        if form.sampling.stream:
            events = self._events(form, inbox, jobs, choices, head)
            left = max(begun + self.limits.seconds + 1 - time.monotonic(), 0)
            return EventStream(events, seconds=left, ended=functools.partial(self._streamed, request.url.path, jobs))
        try:
            await unless_gone(request.receive, _gathered(inbox, jobs, choices))
        finally:
            self._leave(jobs)
        if not all(job.ended for job in jobs):
            return Response(status_code=CLIENT_GONE)
        content = {
            **head,
            "object": form.names[1],
            "choices": [choice.whole(job) for choice, job in zip(choices, jobs, strict=True)],
            "usage": usage(jobs, choices, per_prompt=form.sampling.count),
            "system_fingerprint": self._fingerprint(choices),
        }
        return JSONResponse(content)

    async def _events(
        self, form: Form, inbox: Inbox, jobs: list[Job], choices: Sequence[Choice], head: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        head = {**head, "object": form.names[2]}
        more = {"usage": None} if form.sampling.usage else {}
        try:
            async for index, piece in inbox.pieces():
                for written in choices[index].add(piece, jobs[index]):
                    fingerprint = self._fingerprint(choices)
                    yield event({**head, "choices": [written], "system_fingerprint": fingerprint, **more})
            if form.sampling.usage:
                counted = usage(jobs, choices, per_prompt=form.sampling.count)
                yield event({**head, "choices": [], "usage": counted})
            yield event("[DONE]")
        except APIError as error:
            yield event(error.body())

    def _streamed(self, path: str, jobs: Sequence[Job], status: int) -> None:
        # Not at the end of the events: of those that were never begun nothing would come there.
        self._leave(jobs)
        self._count(path, status)

    def _leave(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.engine.cancel(job)

    def _fingerprint(self, choices: Sequence[Choice]) -> str:
        """The version of the weights that drew the first token that there is."""
        first = next((choice.tokens[0].version for choice in choices if choice.tokens), self.engine.version)
        return f"weights-{first}"

    async def models(self, request: Request) -> Response:
        """GET /v1/models, and one of them."""
        described = {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "jaxrl_llm",
            "max_model_len": self.engine.decoder.context,
            "weights_version": self.engine.version,
        }
        if "model" in request.path_params:
            self._require_model(request.path_params["model"])
            return JSONResponse(described)
        return JSONResponse({"object": "list", "data": [described]})

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: the ids of a text, as vLLM and llama.cpp have it under the same name."""
        fields = Fields(await self._body(request))
        text = fields.text("prompt", "") or fields.text("content", "")
        add = True if fields.get("add_special_tokens") is None else fields.flag("add_special_tokens")
        tokens = await asyncio.to_thread(self.engine.tokenizer.encode, text, add_special_tokens=add)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self.engine.decoder.context})

    async def weights_version(self, request: Request) -> Response:
        """GET /v1/weights."""
        return JSONResponse({"version": self.engine.version})

    async def load_weights(self, request: Request) -> Response:
        """POST /v1/weights: go on with the weights of a folder, between two steps."""
        fields = Fields(await self._body(request))
        if self._weights is None:
            raise APIError(403, "this server loads no weights; start it with --weights FOLDER.", code="not_allowed")
        given = fields.text("path")
        version, step = (
            None if fields.get(name) is None else fields.integer(name, 0, 0, 2**53) for name in ("version", "step")
        )
        fields.require_all_read()
        taken = await asyncio.to_thread(self._load, self._weights, given, step, version)
        return JSONResponse({"version": taken, "success": True})

    def _load(self, folder: Path, given: str, step: int | None, version: int | None) -> int:
        """Read weights and wait until they are taken, in a thread; the version that they got."""
        # One at a time: each is a whole model beside the one that is served.
        if not self._loading.acquire(blocking=False):
            raise APIError(409, "other weights are being read.", code="loading", retry_after=1)
        try:
            path = (folder / given).resolve()
            if not path.is_relative_to(folder):
                raise APIError(403, f"path must lie in the folder of --weights, got {shown(given)}.", param="path")
            model, tokenizer = load_served(str(path), step=step)
        except (OSError, RuntimeError, ValueError) as error:
            raise bad(f"the weights cannot be read: {one_line(error)}", "path") from None
        else:
            if tokenizer.backend.get_vocab() != self.engine.tokenizer.backend.get_vocab():
                raise bad("the weights come with another tokenizer than the one that is served.", "path", "other_model")
            taken = self.engine.load(model, version)
            try:
                return taken.result(self.limits.seconds)
            except TimeoutError:
                taken.cancel()
                raise APIError(504, "the engine did not take the weights in time.", code="timeout") from None
        finally:
            self._loading.release()

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(self, request: Request) -> Response:
        """GET /health."""
        if self.engine.failed:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})


async def _gathered(inbox: Inbox, jobs: Sequence[Job], choices: Sequence[Choice]) -> None:
    async for index, piece in inbox.pieces():
        choices[index].add(piece, jobs[index])


def _require_local(request: Request) -> None:
    """Keep web pages out where there is no key: they cannot send this type unasked, nor hide their server's name."""
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise APIError(403, "a server without a key answers as localhost only.", code="not_allowed")
    if request.method == "POST" and request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise APIError(415, "a server without a key wants the content-type application/json.", code="not_allowed")
