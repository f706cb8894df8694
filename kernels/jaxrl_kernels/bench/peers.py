"""The same work by PyTorch, in a process of its own: run by the interpreter given with --torch.

    PYTHON peers.py ROWS WIDTH VOCABULARY ROUNDS [--compiled]

prints one JSON object {program: CPU seconds of each round}. This file imports nothing of this project, and no torch at
its top, so that it can also be read where there is none.
"""

import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path


def measure(interpreter: str, rows: int, width: int, vocabulary: int, rounds: int, compiled: bool) -> dict:
    """CPU seconds of each round by program, from a worker under `interpreter`; {} with a message where that fails."""
    command = [interpreter, str(Path(__file__)), str(rows), str(width), str(vocabulary), str(rounds)]
    done = subprocess.run(command + ["--compiled"] * compiled, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"PyTorch was not measured: {done.stderr.strip().splitlines()[-1:]}")
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def _seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _worker(rows: int, width: int, vocabulary: int, rounds: int, compiled: bool) -> dict:
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    scale = 2 / width**0.5
    hidden, head = torch.randn(rows, width), torch.randn(width, vocabulary) * scale
    hidden_ref = hidden + 0.1 * torch.randn_like(hidden)
    head_ref = head + 0.1 * torch.randn_like(head) * scale
    targets, weights = torch.randint(0, vocabulary, (rows, 1)), torch.randn(4, rows)
    hidden.requires_grad_()
    head.requires_grad_()

    def loss(hidden, head):
        log_p = torch.log_softmax(hidden @ head, -1)
        with torch.no_grad():
            log_q = torch.log_softmax(hidden_ref @ head_ref, -1)
        p = log_p.exp()
        kl = (p * (log_p - log_q)).sum(-1)
        values = (log_p.gather(1, targets)[:, 0], -(p * log_p).sum(-1), (p * p).sum(-1), kl**2)
        return sum((weight * value).sum() for weight, value in zip(weights, values, strict=True))

    programs = {"gradient/torch eager": loss}
    if compiled:
        programs["gradient/torch compiled"] = torch.compile(loss)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for index in range(rounds + 1):
        for name, program in programs.items():
            hidden.grad = head.grad = None
            start = _seconds()
            program(hidden, head).backward()  # pyright: ignore
            if index:
                times[name].append(_seconds() - start)
    return {"version": torch.__version__, "cpu_seconds": times}


if __name__ == "__main__":
    sizes = [int(word) for word in sys.argv[1:5]]
    print(json.dumps(_worker(sizes[0], sizes[1], sizes[2], sizes[3], "--compiled" in sys.argv)))
