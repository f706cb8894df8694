"""Requests to servers that are not trusted: a total deadline, a bound on bytes, no redirects, no secrets in errors.

Every request has a connection of its own. The deadline holds for the whole of it, from the first byte sent to the last
one read: a server that drips a header or a body byte by byte runs into it like one that says nothing.
"""

import base64
import http.client
import io
import re
import socket
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from jaxrl_llm.redaction import HIDDEN
from jaxrl_llm.redaction import quoted
from jaxrl_llm.redaction import redact

CHUNK = 1 << 16
"""Bytes read at a time."""


class APIConnectionError(Exception):
    """A server could not be reached, broke off, or did not speak HTTP."""


class APITimeoutError(APIConnectionError):
    """A request took longer than its limit."""


class OversizedAnswerError(Exception):
    """An answer has more bytes than it may have, or is compressed, so that its size is not known before."""


class Limits(NamedTuple):
    """What one request may take.

    Attributes:
        seconds: from the connection to the last byte.
        size: of the answer's body [bytes].
    """

    seconds: float
    size: int


class Answer(NamedTuple):
    """What a server answered.

    Attributes:
        status: of HTTP.
        headers: by lower-case name.
        body: at most as long as the limit.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_redirect(self) -> bool:
        """Whether it sends the request elsewhere."""
        return 300 <= self.status < 400


class _TimedReader(io.RawIOBase):
    """Reads of a socket, each with what is left of the time."""

    def __init__(self, timed: "_TimedSocket") -> None:
        self._timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._timed.armed().recv_into(buffer)

    def close(self) -> None:
        if not self.closed:
            self._timed.released()
        super().close()


class _TimedSocket:
    """As much of a socket as http.client asks for, under one deadline."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = connected, deadline
        self._readers, self._closed = 0, False

    def armed(self) -> socket.socket:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
        return self._socket

    def sendall(self, data: Any) -> None:
        self.armed().sendall(data)

    def makefile(self, mode: str, *_: Any, **__: Any) -> io.BufferedReader:
        self._readers += 1
        return io.BufferedReader(_TimedReader(self), CHUNK)

    def released(self) -> None:
        self._readers -= 1
        if self._closed and not self._readers:
            self._socket.close()

    def close(self) -> None:
        """http.client closes the socket of a response that ends with the connection before it has read it."""
        self._closed = True
        if not self._readers:
            self._socket.close()


class Sent:
    """A request that was sent, and whose answer has not been read."""

    def __init__(
        self, connection: http.client.HTTPConnection, deadline: float, limits: Limits, secrets: tuple[str, ...]
    ) -> None:
        self._connection, self._deadline, self._limits, self._secrets = connection, deadline, limits, secrets

    def answer(self) -> Answer:
        """The answer; the connection is closed.

        Raises:
            APIConnectionError: the server broke off or does not speak HTTP.
            APITimeoutError: it took too long.
            OversizedAnswerError: it is too large or compressed.
        """
        try:
            with _Named(self._limits, self._secrets), self._connection.getresponse() as response:
                headers = {name.lower(): value for name, value in response.getheaders()}
                return Answer(response.status, headers, self._body(response, headers))
        finally:
            self._connection.close()

    def _body(self, response: http.client.HTTPResponse, headers: Mapping[str, str]) -> bytes:
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise OversizedAnswerError("the answer is compressed, which was not asked for")
        length = headers.get("content-length", "").strip()
        announced = int(length) if re.fullmatch(r"\d{1,18}", length) else None
        if announced is None and length and "transfer-encoding" not in headers:
            raise APIConnectionError("Connection broken: the announced length of the answer is no number")
        if announced is not None and announced > self._limits.size:
            raise OversizedAnswerError(f"the answer has {announced} bytes; at most {self._limits.size} are read")
        body = bytearray()
        while chunk := response.read1(CHUNK):
            body += chunk
            if len(body) > self._limits.size:
                raise OversizedAnswerError(f"the answer has more than {self._limits.size} bytes, which is the limit")
            if time.monotonic() > self._deadline:
                raise TimeoutError("timed out")
        if announced is not None and "transfer-encoding" not in headers and len(body) < announced:
            raise APIConnectionError(f"Connection broken: {len(body)} of {announced} bytes of the answer came")
        return bytes(body)


class _Named:
    """Errors of sockets and HTTP as errors of this module, without what a server wrote being taken at its word."""

    def __init__(self, limits: Limits, secrets: tuple[str, ...]) -> None:
        self._limits, self._secrets = limits, secrets

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TimeoutError):
            raise APITimeoutError(f"Request timed out after {self._limits.seconds:g} s") from None
        if isinstance(error, OSError | http.client.HTTPException | ValueError):
            what = quoted(f"{type(error).__name__}: {error}", self._secrets)
            raise APIConnectionError(f"Connection error ({what})") from None


class Server:
    """Where requests go, and what identifies their sender.

    Args:
        url: http or https; a user and a password in it become basic authentication.
        api_key: sent as a bearer token; None for none. With it, user and password are not sent.
        direct: whether the environment's proxies are left out, as they must be for a server in this process.

    Attributes:
        name: the address as sentences may say it, without user and password.
        secrets: what must not be printed.

    Raises:
        ValueError: no such address, or a key that no header can hold.
    """

    def __init__(self, url: str, *, api_key: str | None = None, direct: bool = False) -> None:
        self.name = _without_user(url)
        parts, port = _parts(url)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"the address is {self.name!r}; expected http://host:port/path or https://host/path.")
        if api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", api_key):
            raise ValueError("api_key must be printable ASCII without spaces; what was given is not shown here.")
        user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
        self._scheme, self._host, self._port, self._direct = parts.scheme, parts.hostname, port, direct
        self.path = parts.path
        # A user without a password is a key; what both are sent as is no less secret than they are.
        secret = password or user
        told = (api_key, secret, parts.password or parts.username, secret and f"{user}:{password}")
        self.secrets = tuple({part for part in told if part and part != "none"})
        self._authorization: str | None = None
        if api_key is not None and (api_key != "none" or not user):
            self._authorization = f"Bearer {api_key}"
        elif user:
            self._authorization = _basic(user, password)

    @property
    def _origin(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return host if self._port is None else f"{host}:{self._port}"

    def post(self, path: str, body: bytes, limits: Limits) -> Sent:
        """Send a JSON body to a path of the server.

        Raises:
            APIConnectionError: the server cannot be reached.
            APITimeoutError: that took too long.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Host": self._origin}
        if self._authorization is not None:
            headers["Authorization"] = self._authorization
        deadline = time.monotonic() + limits.seconds
        with _Named(limits, self.secrets):
            connection, target, more = self._connected(path, limits.seconds)
            try:
                assert connection.sock is not None
                connection.sock = _TimedSocket(connection.sock, deadline)  # pyright: ignore[reportAttributeAccessIssue]
                connection.request("POST", target, body, {**headers, **more})
            except BaseException:
                connection.close()
                raise
        return Sent(connection, deadline, limits, self.secrets)

    def _connected(self, path: str, seconds: float) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """A connection, by way of the proxy of the environment if there is one; the request's target; more headers."""
        secure, host, port, target = self._scheme == "https", self._host, self._port, path
        more: dict[str, str] = {}
        tunnel: tuple[str, int | None] | None = None
        proxy = None if self._direct else _proxy(self._scheme, self._origin)
        if proxy is not None:
            via = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            if via.username:
                user, password = (urllib.parse.unquote(part or "") for part in (via.username, via.password))
                more["Proxy-Authorization"] = _basic(user, password)
            if secure:
                tunnel = (host, port or http.client.HTTPS_PORT)
            else:
                target = f"http://{self._origin}{path}"
            host, port = via.hostname or "", via.port
        if secure:
            context = ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=seconds, context=context
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=seconds)
        if tunnel is not None:
            connection.set_tunnel(*tunnel, headers=more)
            more = {}
        connection.connect()
        return connection, target, more


def _parts(url: str) -> tuple[urllib.parse.SplitResult | None, int | None]:
    """The parts of an address and its port; None where there is none. Python's own error would quote the password."""
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        return None, None
    try:
        parts = urllib.parse.urlsplit(url)
        return parts, parts.port
    except ValueError:
        return None, None


def _without_user(url: str) -> str:
    """An address as sentences may say it. One that is none, for want of a scheme or for a blank, may hold a password
    all the same, which may hold an @."""
    head, found, tail = url.rpartition("@")
    scheme, separator, _ = head.partition("://")
    return redact(
        f"{scheme}{separator}{HIDDEN}@{tail}" if separator and found else f"{HIDDEN}@{tail}" if found else url
    )


def _basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def _proxy(scheme: str, host: str) -> str | None:
    proxies: Mapping[str, str] = urllib.request.getproxies()
    return None if urllib.request.proxy_bypass(host) else proxies.get(scheme) or proxies.get("all")


def refusal(answer: Answer, secrets: Iterable[str]) -> str:
    """A status that is no success, in words: what the server said, redacted, or where it would have sent the request.

    Args:
        answer: of another status than 200.
        secrets: of the request.
    """
    if answer.is_redirect:
        parts, _ = _parts(answer.headers.get("location", ""))
        place = quoted(parts.hostname, secrets) if parts is not None and parts.hostname else "another path"
        return (
            f"HTTP status {answer.status}: it redirects to {place}. Redirects are not followed, because prompts and "
            "the key are for the server that was named; if it is right, name it as the address."
        )
    return f"HTTP status {answer.status}: {quoted(answer.body[:CHUNK], secrets)}"
