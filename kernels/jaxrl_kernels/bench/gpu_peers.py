"""What others offer for the same work on a GPU, as far as it is installed.

PyTorch's run in a process of their own under the interpreter given with --torch:

    PYTHON gpu_peers.py ROWS WIDTH VOCABULARY ROUNDS

prints one JSON object. They take the head as [V, D]. Liger's and Apple's fused losses give the log-prob alone,
PyTorch's programs the entropy too. This file imports nothing of this project, and no peer at its top.
"""

import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from typing import NamedTuple


class Entry(NamedTuple):
    """A program of the bench, the work that it is counted as, and its unit."""

    program: Callable
    work: float
    unit: str


def in_jax(size: tuple[int, int, int]) -> dict[str, Entry]:
    """tokamax's fused loss, forward and forward with backward, if it is installed."""
    if importlib.util.find_spec("tokamax") is None:
        return {}
    import jax
    import tokamax  # pyright: ignore[reportMissingImports]

    product = 2.0 * size[0] * size[1] * size[2] / 1e12

    def loss(hidden, head, targets):
        return tokamax.linear_softmax_cross_entropy_loss(hidden, targets, head, reduction="sum")

    return {
        "tokamax forward log_prob": Entry(lambda x: loss(x.hidden, x.head, x.targets), product, "TFLOP"),
        "tokamax full log_prob": Entry(
            lambda x: jax.grad(lambda h, w: loss(h, w, x.targets), (0, 1))(x.hidden, x.head), 3 * product, "TFLOP"
        ),
    }


def measure(interpreter: str, size: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Milliseconds and range by program, from a worker under `interpreter`; a sentence for what failed."""
    command = [interpreter, str(Path(__file__)), *(str(number) for number in (*size, rounds))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"PyTorch": f"not measured: {done.stderr.strip().splitlines()[-1:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _timed(torch: Any, program: Callable, rounds: int) -> dict[str, Any]:
    times = []
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for index in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        program()
        end.record()
        torch.cuda.synchronize()
        if index > 1:
            times.append(start.elapsed_time(end))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    middle = round(statistics.median(times), 3)
    # Peak beyond inputs, results included: PyTorch has no other figure.
    found = {"milliseconds": middle, "range": [round(min(times), 3), round(max(times), 3)]}
    return found | {"temporaries_mib": round(peak)}


def _torch_programs(torch: Any, size: tuple[int, int, int]) -> dict[str, Callable]:
    rows, width, vocabulary = size
    torch.manual_seed(0)
    make = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(rows, width, **make).requires_grad_()
    head = (torch.randn(vocabulary, width, **make) * (2 / width**0.5)).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device="cuda")

    def statistics_of() -> Any:
        log_p = torch.log_softmax((hidden @ head.T).float(), -1)
        return log_p.gather(1, targets[:, None]).sum() - (log_p.exp() * log_p).sum()

    def full(loss: Callable) -> Callable:
        def run() -> None:
            hidden.grad = head.grad = None
            loss().backward()

        return run

    found = {"PyTorch eager full log_prob+entropy": full(statistics_of)}
    found["PyTorch compiled full log_prob+entropy"] = full(torch.compile(statistics_of))
    if importlib.util.find_spec("liger_kernel"):
        liger = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger fused_linear_cross_entropy full log_prob"] = full(lambda: liger(head, hidden, targets))
    if importlib.util.find_spec("cut_cross_entropy"):
        cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        found["cut_cross_entropy full log_prob"] = full(lambda: cut(hidden, head, targets, reduction="sum"))
    return found


def _worker(size: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    torch = importlib.import_module("torch")
    found: dict[str, Any] = {}
    for name, program in _torch_programs(torch, size).items():
        try:
            found[name] = _timed(torch, program, rounds)
        except Exception as error:  # a peer that fails is a result too
            found[name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
    return found


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:5]]
    print(json.dumps(_worker((numbers[0], numbers[1], numbers[2]), numbers[3])))
