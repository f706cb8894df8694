"""Requests as no library would send them."""

import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

from tests.serving.conftest import KEY

HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}


def ask(address: str, path: str, body: Any = None, *, method: str | None = None, headers=HEADERS) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, content, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    is_json = answer.getheader("content-type", "").startswith("application/json")
    return answer.status, json.loads(text) if is_json else text.decode()


def begun(address: str, path: str, body: Any, *, cut: int = 0) -> socket.socket:
    """A connection on which a request was sent, but for its last bytes, and nothing is read."""
    content = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(content)}"]
    head += [f"{name}: {value}" for name, value in HEADERS.items()]
    place = socket.create_connection(tuple(urlsplit(address).netloc.rsplit(":", 1)), timeout=60)
    whole = "\r\n".join(head).encode() + b"\r\n\r\n" + content
    place.sendall(whole[: len(whole) - cut])
    return place


def metric(address: str, name: str) -> float:
    """A number of /metrics; of several with labels their sum."""
    _, text = ask(address, "/metrics")
    lines = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == f"jaxrl_{name}"]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
