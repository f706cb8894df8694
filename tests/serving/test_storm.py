"""A thousand requests with clients that hang up, malformed bodies and slow readers among them."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.serving.conftest import NAME
from tests.serving.conftest import served
from tests.serving.raw import ask
from tests.serving.raw import begun
from tests.serving.raw import metric

REQUESTS, WORKERS = 1000, 16
BOUND = 30.0
"""Of an orderly answer of eight tokens, whatever the others do [seconds]; an idle server takes a hundredth of it."""
GROWTH = 64 << 20
"""Of this process between the first quarter and the end [bytes]."""


def resident() -> int:
    """Memory of this process [bytes]."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_thousand_requests_leave_nothing_behind_and_nobody_waits_beyond_the_bound():
    late: list[float] = []
    sizes: list[int] = []
    readers = []

    def one(number: int) -> str:
        body = {"model": NAME, "prompt": f"{number} " * (1 + number % 20), "max_tokens": 8, "seed": number}
        kind = number % 10
        if kind == 0:  # hangs up while it streams
            begun(address, "/v1/completions", {**body, "max_tokens": 600, "ignore_eos": True, "stream": True}).close()
            return "gone"
        if kind == 1:  # hangs up before the body is there
            begun(address, "/v1/completions", body, cut=7).close()
            return "gone"
        if kind == 2:
            status, answer = ask(address, "/v1/completions", json.dumps(body).encode()[: 10 + number % 40])
            assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
            return "malformed"
        if kind == 3 and number < 200:  # reads nothing until the end
            readers.append(
                begun(address, "/v1/completions", {**body, "max_tokens": 300, "stream": True, "logprobs": 5})
            )
            return "slow"
        began = time.monotonic()
        status, answer = ask(address, "/v1/completions", {**body, "ignore_eos": True})
        late.append(time.monotonic() - began)
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 8
        if number % 100 == 9:
            sizes.append(resident())
        return "orderly"

    threads = threading.active_count()
    with served(queue=64) as address:
        with ThreadPoolExecutor(WORKERS) as pool:
            kinds = list(pool.map(one, range(REQUESTS)))
        for reader in readers:
            text = b""
            while part := reader.recv(1 << 16):
                text += part
                if b"[DONE]" in text[-100:]:
                    break
            assert b"[DONE]" in text[-100:]
            reader.close()
        end = time.monotonic() + 30
        while metric(address, "busy_slots") + metric(address, "queued_generations"):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert ask(address, "/health") == (200, {"status": "ok"})
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "gone": 200,
        "malformed": 100,
        "slow": 20,
        "orderly": 680,
    }
    assert np.max(late) < BOUND
    assert sizes[-1] - sizes[len(sizes) // 4] < GROWTH
    until = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.05)
    assert threading.active_count() <= threads
