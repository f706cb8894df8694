"""Claim: the rollouts' decode loop reaches 0.7 of llama.cpp's speed on two CPU cores at batch 32 (SmolLM2-135M).

Command: python -m experiments.benchmarks.decode_speed --llama-python /path/to/venv/bin/python [--out decode_speed.json]
         The other Python needs `pip install llama-cpp-python==0.3.36`, nothing of this project.
Cost:    about four minutes on two quiet cores.

Both run on the same machine in interleaved rounds, on the same weights (llama.cpp as BF16 GGUF), the same numbers of
prompt and new tokens, and distinct prompts; ours also with several samples a prompt, as rollouts have. The opponent is
timed without sampling, at the fastest of its cache and attention settings, found first; ours includes sampling at
temperature 1 and recording log-probabilities. Reading the prompts is in neither. The comparison at batch 32 is void
when the opponent makes fewer than 700 tokens/s there: then the machine was not quiet.

Two floors are measured in the same run: `products`, the model's matrix products alone at the same batch, and `memory`,
one pass over the weights at the bandwidth of a sum over a large array.
"""

import argparse
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl_llm.models.blueprint import num_parameters
from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.stored_parts import stored_parts
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.weights import save_gguf
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts.decode import DecodeWeights

VOID_BELOW = 700
REPORTED = ("batches", "dtypes", "group_size", "prompt_tokens", "new_tokens", "rounds", "threads")
WORKER = Path(__file__).parent / "peers" / "llama_cpp_worker.py"


@dataclass(frozen=True)
class Timing:
    """One timed run of a decode loop."""

    tokens_per_s: float
    tokens_per_cpu_s: float


class LlamaCpp:
    """The opponent in its own process, idle between requests."""

    def __init__(self, python: str, model: Path, threads: int, prompt: int, new: int):
        self.process = subprocess.Popen(
            [python, str(WORKER), str(model), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.prompt, self.new = prompt, new
        self.version = self._answer()["ready"]
        self.best: dict[int, dict[str, bool]] = {}

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("llama.cpp's process ended; run its command by hand to see why")
        return json.loads(line)

    def _ask(self, batch: int, options: dict[str, bool], new: int) -> Timing:
        assert self.process.stdin is not None
        request = {"batch": batch, "prompt": self.prompt, "new": new, **options}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        return Timing(answer["tokens"] / answer["decode_s"], answer["tokens"] / answer["decode_cpu_s"])

    def tune(self, batch: int) -> None:
        """Find the faster settings at this batch."""
        choices = [
            {"kv_unified": unified, "flash": flash} for unified, flash in itertools.product((True, False), repeat=2)
        ]
        speeds = [max(self._ask(batch, choice, self.new // 2).tokens_per_s for _ in range(2)) for choice in choices]
        self.best[batch] = choices[int(np.argmax(speeds))]

    def run(self, batch: int) -> Timing:
        """Decode `new` tokens in every sequence."""
        return self._ask(batch, self.best[batch], self.new)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Ours:
    """The compiled sampler; the time of one new token, which is prompt and first draw, is subtracted."""

    def __init__(self, model: Transformer, dtype: str, batch: int, group: int, prompt: int, new: int):
        graphdef, self.state = nnx.split(model)
        group = min(group, batch)
        self.steps, self.batch = new, batch

        def sampler(length):
            return make_generate(
                graphdef,
                max_new_tokens=length,
                group_size=group,
                sampling=SamplingSettings(),
                eos_id=(),
                pad_id=0,
                decode_dtype=jnp.dtype(dtype),
            )

        self.long, self.short = sampler(new + 1), sampler(1)
        tokens = jax.random.randint(jax.random.key(0), (batch // group, prompt), 100, 40000)
        self.arguments = (tokens, jnp.ones(tokens.shape, bool), jax.random.key(1), 0, jnp.arange(batch // group))
        self.run()

    def _time(self, sampler: Callable) -> tuple[float, float]:
        start, start_cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(sampler(self.state, *self.arguments))
        return time.perf_counter() - start, time.process_time() - start_cpu

    def run(self) -> Timing:
        """Decode `new` tokens in every sequence after the first one."""
        whole, whole_cpu = self._time(self.long)
        first, first_cpu = self._time(self.short)
        tokens = self.steps * self.batch
        return Timing(tokens / (whole - first), tokens / (whole_cpu - first_cpu))


def products_floor(model: Transformer, dtype: str, batch: int) -> Callable[[], float]:
    """Tokens per second if a step were the model's matrix products and nothing else."""
    weights = DecodeWeights.of(model, jnp.dtype(dtype))
    parts = [part for block in weights.model.layers for part in stored_parts(block) if part.transposed]
    kernels = [part.parameter.get_value() for part in parts]
    head = weights.head if weights.vocabulary_axis == 1 else weights.head.T
    inputs = {size: jnp.ones((batch, size), dtype) for size in {kernel.shape[0] for kernel in kernels}}

    @jax.jit
    def step(inputs, kernels, head):
        carried = jnp.zeros((), jnp.float32)
        for kernel in (*kernels, head):
            # Each product waits for the one before, as in the model.
            x = inputs[kernel.shape[0]] + carried.astype(dtype)
            y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
            carried = 1e-9 * y[0, 0]
        return carried

    def measure() -> float:
        step(inputs, kernels, head).block_until_ready()
        start = time.perf_counter()
        for _ in range(5):
            step(inputs, kernels, head).block_until_ready()
        return 5 * batch / (time.perf_counter() - start)

    return measure


def memory_floor(model: Transformer, dtype: str, batch: int) -> float:
    """Tokens per second if a step were one pass over the weights at the measured bandwidth."""
    array = jnp.ones(2**26, jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        total(array).block_until_ready()
        times.append(time.perf_counter() - start)
    bandwidth = array.nbytes / min(times)
    return batch * bandwidth / (num_parameters(model.config) * jnp.dtype(dtype).itemsize)


def summarise(timings: list[Timing]) -> dict[str, float]:
    """Best and median of the rounds."""
    speeds = [timing.tokens_per_s for timing in timings]
    per_cpu = [timing.tokens_per_cpu_s for timing in timings]
    return {"best": max(speeds), "median": median(speeds), "median_per_cpu_s": median(per_cpu)}


def measure_batch(options: argparse.Namespace, model: Transformer, opponent: LlamaCpp | None, batch: int) -> dict:
    """All contestants at one batch size, in interleaved rounds."""
    groups = sorted({1, min(options.group_size, batch)})
    contestants: dict[str, Callable[[], Timing]] = {}
    if opponent is not None:
        opponent.tune(batch)
        contestants["llama.cpp BF16"] = lambda: opponent.run(batch)
    for dtype, group in itertools.product(options.dtypes, groups):
        ours = Ours(model, dtype, batch, group, options.prompt_tokens, options.new_tokens)
        contestants[f"jaxrl_llm {dtype}, {group} sample{'s' * (group > 1)} a prompt"] = ours.run
    floors = {dtype: products_floor(model, dtype, batch) for dtype in options.dtypes}
    timings = {name: [] for name in contestants}
    products = {dtype: [] for dtype in options.dtypes}
    for _ in range(options.rounds):
        for name, contestant in contestants.items():
            timings[name].append(contestant())
        for dtype, floor in floors.items():
            products[dtype].append(floor())
    result: dict = {"batch": batch, "speeds": {name: summarise(rounds) for name, rounds in timings.items()}}
    result["floors"] = {
        dtype: {"products": max(products[dtype]), "memory": memory_floor(model, dtype, batch)}
        for dtype in options.dtypes
    }
    if opponent is not None:
        reference = result["speeds"]["llama.cpp BF16"]
        result["opponent_settings"] = opponent.best[batch]
        result["ratios"] = {
            name: {kind: speeds[kind] / reference[kind] for kind in ("best", "median")}
            for name, speeds in result["speeds"].items()
        }
        result["void"] = batch == 32 and reference["best"] < VOID_BELOW
    return result


def show(result: dict) -> None:
    """Print one batch size's table."""
    print(f"\nbatch {result['batch']}{'  (void: the machine was not quiet)' if result.get('void') else ''}")
    print(f"  {'':44} {'best':>8} {'median':>8} {'per CPU s':>10} {'ratio best':>11} {'median':>7}")
    for name, speeds in result["speeds"].items():
        ratios = result.get("ratios", {}).get(name)
        ratio = f"{ratios['best']:11.2f} {ratios['median']:7.2f}" if ratios else ""
        print(f"  {name:44} {speeds['best']:8.0f} {speeds['median']:8.0f} {speeds['median_per_cpu_s']:10.0f} {ratio}")
    for dtype, floors in result["floors"].items():
        print(f"  floor {dtype}: products {floors['products']:.0f} tokens/s, memory {floors['memory']:.0f} tokens/s")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", help="Python that has llama-cpp-python; without it only ours is timed")
    parser.add_argument(
        "--gguf", type=Path, help="BF16 GGUF file of the same model; written to a temporary file if absent"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    options = parse()
    model, tokenizer = smollm2_135m()
    opponent = None
    with tempfile.TemporaryDirectory() as folder:
        if options.llama_python:
            path = options.gguf or Path(folder) / "smollm2-bf16.gguf"
            if options.gguf is None:
                save_gguf(model, path, tokenizer=tokenizer, dtype="BF16")
            opponent = LlamaCpp(options.llama_python, path, options.threads, options.prompt_tokens, options.new_tokens)
        results = []
        for batch in options.batches:
            results.append(measure_batch(options, model, opponent, batch))
            show(results[-1])
        if opponent is not None:
            opponent.close()
    report = {
        "jax": jax.__version__,
        "llama_cpp_python": opponent.version if opponent else None,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "settings": {
            name: str(value) for name, value in vars(options).items() if name not in ("llama_python", "gguf", "out")
        },
        "results": results,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
