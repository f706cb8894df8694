"""A running server: its socket, its engine and its HTTP loop."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from ipaddress import ip_address
from pathlib import Path

import jax.numpy as jnp
import uvicorn

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.slot_decoder import SlotDecoder
from jaxrl_llm.serving.app import Limits
from jaxrl_llm.serving.app import Service
from jaxrl_llm.serving.engine import Engine
from jaxrl_llm.serving.metrics import Metrics
from jaxrl_llm.serving.served import chat_of
from jaxrl_llm.serving.served import end_ids_of

LARGEST_CONTEXT = 4096
"""Tokens of prompt and answer where nobody asks for more."""
SMALLEST_CONTEXT = 16
"""Tokens; with fewer there is nothing to ask."""
CONNECTIONS = 1024
"""Open connections; one more is answered with 503."""


@dataclass(frozen=True)
class ServerSettings:
    """How a model is served.

    Attributes:
        name: of the model in requests.
        api_key: that requests must bring; None for none, on the loopback only.
        slots: answers that are decoded at a time.
        context: tokens of prompt and answer; None: the model's positions, at most `LARGEST_CONTEXT`.
        queue: answers that may wait for a slot.
        dtype: of the products and of the cache; None for the model's.
        chat: see `served.chat_of`.
        weights: folder from which /v1/weights may load.
        limits: of one request.
        warm: compile the first programs before the port answers.
    """

    name: str = "model"
    api_key: str | None = None
    slots: int = 8
    context: int | None = None
    queue: int = 256
    dtype: jnp.dtype | type | None = None
    chat: str | None = None
    weights: Path | None = None
    limits: Limits = field(default_factory=Limits)
    warm: bool = True

    def __post_init__(self) -> None:
        """Raise a ValueError for settings that cannot be."""
        if self.api_key == "":
            raise ValueError("api_key is empty; expected a key, or None for none.")
        for name, low in (("slots", 1), ("context", SMALLEST_CONTEXT), ("queue", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}; expected at least {low}.")


def bound_socket(host: str, port: int, *, api_key: str | None) -> socket.socket:
    """A listening place, taken before a model is loaded.

    Args:
        host: an address of this machine.
        port: 0 for any free one.
        api_key: of the server.

    Raises:
        ValueError: an address that others can reach, without a key; or one that cannot be had.
    """
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port is {port}; expected 0 .. 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"host is {host!r}, which is no address here ({error.strerror or error}).") from None
    if not api_key and not ip_address(str(address[0])).is_loopback:
        raise ValueError(f"host is {host!r}, which others can reach; give the server an API key (--api-key-file).")
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind(address)
        place.listen(CONNECTIONS)
    except OSError as error:
        place.close()
        raise ValueError(f"port {port} of {host} cannot be had ({error.strerror}); is another server on it?") from None
    return place


def make_service(model: Transformer, tokenizer: Tokenizer, settings: ServerSettings) -> Service:
    """The routes over an engine that is not started yet.

    Raises:
        ValueError: settings that do not fit the model.
    """
    chat = chat_of(tokenizer, settings.chat)
    ends = end_ids_of(tokenizer, chat)
    context = min(model.config.max_positions, LARGEST_CONTEXT) if settings.context is None else settings.context
    decoder = SlotDecoder(model, slots=settings.slots, context=context, dtype=settings.dtype)
    engine = Engine(decoder, tokenizer, end_ids=ends, queue=settings.queue, metrics=Metrics())
    return Service(
        engine,
        name=settings.name,
        chat=chat,
        end_ids=ends,
        api_key=settings.api_key,
        limits=settings.limits,
        weights=settings.weights,
    )


def http_server(service: Service) -> uvicorn.Server:
    """The HTTP loop of a service."""
    return uvicorn.Server(
        uvicorn.Config(
            service.app(),
            log_level="warning",
            access_log=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=5,
            lifespan="off",
            server_header=False,
        )
    )


@contextlib.contextmanager
def serving(
    model: Transformer, tokenizer: Tokenizer, settings: ServerSettings | None = None, *, port: int = 0
) -> Iterator[str]:
    """A server on the loopback, in threads of this process, as long as the block runs.

    Args:
        model: what answers.
        tokenizer: of the model.
        settings: of the server.
        port: 0 for any free one.

    Yields:
        its address, http://127.0.0.1:PORT.

    Raises:
        ValueError: settings that do not fit the model, or a port that is taken.
    """
    settings = ServerSettings() if settings is None else settings
    place = bound_socket("127.0.0.1", port, api_key=settings.api_key)
    with contextlib.closing(place):
        service = make_service(model, tokenizer, settings)
        if settings.warm:
            service.engine.decoder.warm_up()
        service.engine.start()
        server = http_server(service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, name="http", daemon=True)
        thread.start()
        try:
            # The socket listens already: whoever connects before the loop runs waits a moment.
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            service.engine.stop()
