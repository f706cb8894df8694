"""Claim: at 32 clients our server makes at least 0.7 of llama-server's tokens per second (SmolLM2-135M, two cores).

Command: python -m experiments.benchmarks.server_speed [--clients 1 8 32] [--rounds 3] [--out server_speed.json]
         It needs the extras `serving` and `engines`.
Cost:    2 min 35 s for one round on two cores of an Intel Xeon 2.8 GHz, nothing else at work.
Found:   there, one round, bfloat16: 7.0 and 44.3 tokens per second with 1 client (0.16 of llama-server), 45.9 and 89.1
         with 8 (0.51), 112.3 and 129.1 with 32 (0.87: met). First token after 0.28, 0.83 and 4.26 s, llama-server's
         0.13, 1.12 and 3.75 s. All slots, here 32, are decoded whoever is there, so few clients pay for many.

Both servers run on the same machine on the same weights, each in a process of its own, and are asked in turns by the
same client over HTTP: streams of completions at temperature 1, with prompts of random tokens that no two requests share
and as many new tokens each. Reading the prompts is in the time. Tokens per second are those of all clients together,
from the first request to the last byte; the time to the first token is the median over clients. What the machine does
beside is in both; its load is printed.
"""

import argparse
import asyncio
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.weights import save_gguf

PEER = Path(__file__).parent / "peers" / "xllamacpp_server.py"
NAME = "smollm2"


@dataclass(frozen=True)
class Timing:
    """One turn of one server."""

    tokens_per_s: float
    first_token_s: float


class Running:
    """A server in its own process.

    Args:
        command: that prints the address and serves.
        key: that it wants.
    """

    def __init__(self, command: list[str], key: str) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "http://" not in line:
            raise RuntimeError(f"{command[:3]} did not start; run it by hand to see why")
        self.place = urlsplit("http://" + line.split("http://")[1].split("/")[0].split(",")[0].strip())
        self.key = key

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()


async def ask(server: Running, prompt: list[int], new: int) -> tuple[float, float]:
    """When the first token of a stream came, and the last byte [seconds on the clock]."""
    fields = {"model": NAME, "prompt": prompt, "max_tokens": new, "stream": True, "temperature": 1, "ignore_eos": True}
    neutral = {"top_k": 0, "min_p": 0, "top_p": 1}
    body = json.dumps(fields | neutral).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {server.place.netloc}\r\nauthorization: Bearer {server.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(server.place.hostname, server.place.port)
    writer.write(head.encode() + body)
    first = 0.0
    seen = b""
    while part := await reader.read(1 << 16):
        first = first or (time.monotonic() if b"data:" in part else 0.0)
        seen = (seen + part)[-400:]
    writer.close()
    if b"[DONE]" not in seen:
        raise RuntimeError(f"{server.place.netloc} did not finish: {seen!r}")
    return first, time.monotonic()


def turn(server: Running, prompts: list[list[int]], new: int) -> Timing:
    """All clients at once."""

    async def together() -> list[tuple[float, float]]:
        return await asyncio.gather(*(ask(server, prompt, new) for prompt in prompts))

    began = time.monotonic()
    times = asyncio.run(together())
    end = max(last for _, last in times)
    return Timing(len(prompts) * new / (end - began), statistics.median(first - began for first, _ in times))


def measure(servers: dict[str, Running], clients: int, options: argparse.Namespace) -> dict:
    """Turns of all servers at one number of clients."""
    random = np.random.default_rng(clients)

    def prompts() -> list[list[int]]:
        return random.integers(1000, 40_000, (clients, options.prompt_tokens)).tolist()

    timings: dict[str, list[Timing]] = {name: [] for name in servers}
    for number in range(options.rounds + 1):
        for name, server in servers.items():
            timing = turn(server, prompts(), options.new_tokens)
            if number:  # the first one may compile
                timings[name].append(timing)
    found: dict = {"clients": clients, "load_average": os.getloadavg()[0]}
    for name, turns in timings.items():
        rates = [one.tokens_per_s for one in turns]
        first = statistics.median(one.first_token_s for one in turns)
        found[name] = {"tokens_per_s": statistics.median(rates), "turns": rates, "first_token_s": first}
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    options = parse()
    context, slots, key = 2 * (options.prompt_tokens + options.new_tokens), max(options.clients), secrets.token_hex(16)
    servers: dict[str, Running] = {}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = smollm2_135m()
        path, key_file = Path(folder) / "model.gguf", Path(folder) / "key"
        save_gguf(model, path, tokenizer=tokenizer, dtype="F32" if options.dtype == "float32" else "BF16")
        key_file.write_text(key)
        ours = ["-m", "jaxrl_llm.serving", "smollm2_135m", "--name", NAME, "--port", "0", "--dtype", options.dtype]
        ours += ["--api-key-file", str(key_file), "--slots", str(slots), "--context", str(context)]
        theirs = [str(PEER), str(path), str(slots), str(context), str(options.threads), key]
        try:
            servers["ours"] = Running([sys.executable, *ours], key)
            servers["llama-server"] = Running([sys.executable, *theirs], key)
            print(f"{'clients':>7} {'ours':>8} {'llama':>8} {'ratio':>6} {'first':>7} {'llama':>7} {'load':>5}")
            for clients in options.clients:
                results.append(found := measure(servers, clients, options))
                a, b = found["ours"], found["llama-server"]
                found["ratio"] = a["tokens_per_s"] / b["tokens_per_s"]
                print(
                    f"{clients:7} {a['tokens_per_s']:8.1f} {b['tokens_per_s']:8.1f} {found['ratio']:6.2f} "
                    f"{a['first_token_s']:6.2f}s {b['first_token_s']:6.2f}s {found['load_average']:5.1f}",
                    flush=True,
                )
        finally:
            for server in servers.values():
                server.stop()
    if options.out:
        settings = {name: str(value) for name, value in vars(options).items() if name != "out"}
        options.out.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
