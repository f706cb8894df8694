"""HyperAgent on linear bandits: scanned and vmapped over seeds, against a per-step NumPy loop of the same algorithm.

Command: python -m experiments.benchmarks.bandit_speed [--out bandit_speed.json]
Cost:    about a minute on two quiet cores.

Both play box bandits at the same sizes, with sphere references and perturbations. The loop is what the algorithm says,
one NumPy call per formula, one seed at a time, warmed up; the scan shares its seeds among the cores. Both are timed in
this process, in turns, compilation not counted (it is reported). Each is given by the clock and in processor time (all
threads), by which the scan has no advantage from a second core; the best turn counts, and the ratio of medians is kept
beside it. `products` is a floor: the matrix product of features and parameters alone, in NumPy, batched over seeds, on
one core. Sizes at which that product fills the machine cannot be made faster by anything but fewer seeds.

Measured on two cores of an AMD EPYC that other processes used as well (load 5 to 7), each size in a run of its own with
100 to 500 rounds; microseconds of processor time per seed and step:

    d     actions   M    seeds    scan     loop   product   loop / scan   by the clock
    10        100   8      200    0.66     37.4      0.30          56.9           61.5
    10       1000   8      100     4.3     46.1       3.5          10.7           12.2
    50       1000   8      100    16.5     62.4      15.5           3.8            3.5
    50     10,000   8       20     405      746       336           1.8            1.9
    100      1000   64      50      54      112        30           2.1            3.6
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxrl_llm.environments import box_bandit
from jaxrl_llm.exploration import hyperagent
from jaxrl_llm.exploration import play

SIZES = ((10, 100, 8, 200), (10, 1000, 8, 100), (50, 1000, 8, 100), (50, 10_000, 8, 20), (100, 1000, 64, 50))
"""(d, actions, M, seeds)."""


def numpy_run(dimension: int, actions: int, index: int, rounds: int, rng: np.random.Generator) -> float:
    """One seed by the per-step loop; returns its regret."""
    features = rng.uniform(-(dimension**-0.5), dimension**-0.5, (actions, dimension))
    means = features @ (10**0.5 * rng.standard_normal(dimension))
    best = means.max()
    mean, covariance = np.zeros(dimension), 10 * np.eye(dimension)
    factor = rng.standard_normal((dimension, index))
    factor *= 10**0.5 / np.linalg.norm(factor, axis=1, keepdims=True)
    regret = 0.0
    for _ in range(rounds):
        xi = rng.standard_normal(index)
        xi *= index**0.5 / np.linalg.norm(xi)
        action = np.argmax(features @ (mean + factor @ xi))
        x = features[action]
        reward = means[action] + rng.standard_normal()
        z = rng.standard_normal(index)
        z /= np.linalg.norm(z)
        along = covariance @ x
        gain = along / (1 + x @ along)
        mean += gain * (reward - x @ mean)
        factor += np.outer(gain, z - x @ factor)
        covariance -= np.outer(gain, along)
        regret += best - means[action]
    return regret


def measure(dimension: int, actions: int, index: int, seeds: int, rounds: int, turns: int) -> dict:
    """Microseconds per seed and step of both, and of the product alone."""
    agent = hyperagent(dimension, index_dimension=index, prior_scale=10**0.5)

    def one(key: jax.Array) -> jax.Array:
        bandit_key, play_key = jax.random.split(key)
        return play(
            agent, box_bandit(bandit_key, dimension=dimension, actions=actions), play_key, rounds=rounds
        ).regrets

    mesh = jax.make_mesh((math.gcd(jax.device_count(), seeds),), ("seeds",))
    shared = jax.P("seeds")
    # No core needs another one's numbers, so what varies over the mesh need not be tracked through the scan.
    spread = jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=shared, out_specs=shared, check_vma=False)
    ours = jax.jit(spread)
    keys = jax.device_put(jax.random.split(jax.random.key(0), seeds), jax.NamedSharding(mesh, shared))
    start = time.perf_counter()
    regret = float(np.asarray(ours(keys)).sum(1).mean())
    first = time.perf_counter() - start
    rng = np.random.default_rng(0)
    features = rng.standard_normal((seeds, actions, dimension)).astype(np.float32)
    parameters = rng.standard_normal((seeds, dimension, 1)).astype(np.float32)
    numpy_run(dimension, actions, index, 100, rng)
    few, repeats, regrets = min(max(1, 4000 // actions), 6), 20, []

    def loop() -> None:
        regrets.extend(numpy_run(dimension, actions, index, rounds, rng) for _ in range(few))

    def products() -> None:
        for _ in range(repeats):
            np.matmul(features, parameters)

    runs: list[tuple[str, Callable[[], object], int]] = [
        ("ours", lambda: ours(keys).block_until_ready(), seeds * rounds),
        ("loop", loop, few * rounds),
        ("products", products, repeats * seeds),
    ]
    wall: dict[str, list[float]] = {name: [] for name, _, _ in runs}
    processor: dict[str, list[float]] = {name: [] for name, _, _ in runs}
    for _ in range(turns):
        for name, run, steps in runs:
            start = time.perf_counter(), time.process_time()
            run()
            wall[name].append(1e6 * (time.perf_counter() - start[0]) / steps)
            processor[name].append(1e6 * (time.process_time() - start[1]) / steps)
    best, best_processor = ({name: min(one[name]) for name in one} for one in (wall, processor))
    return {
        "dimension": dimension,
        "actions": actions,
        "index_dimension": index,
        "seeds": seeds,
        "microseconds": best,
        "processor_microseconds": best_processor,
        "ratio": best["loop"] / best["ours"],
        "ratio_median": float(np.median(wall["loop"]) / np.median(wall["ours"])),
        "processor_ratio": best_processor["loop"] / best_processor["ours"],
        "first_call_seconds": first,
        "mean_regret": {"ours": regret, "loop": float(np.mean(regrets))},
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)  # before anything is computed
    print(
        f"{'d':>4} {'actions':>7} {'M':>4} {'seeds':>5} {'ours us':>8} {'loop us':>8} {'product us':>10} {'ratio':>6} "
        f"{'ratio of processor time':>24}"
    )
    results = []
    for size in SIZES:
        row = measure(*size, options.rounds, options.turns)
        results.append(row)
        ours, loop, products = (row["microseconds"][name] for name in ("ours", "loop", "products"))
        print(
            "{:4} {:7} {:4} {:5}".format(*size), f"{ours:8.3f} {loop:8.1f} {products:10.3f} {row['ratio']:6.1f}", end=""
        )
        print(f"{row['processor_ratio']:25.1f}", flush=True)
    report = {"jax": jax.__version__, "numpy": np.__version__, "device": jax.devices()[0].device_kind}
    report |= {
        "cores": jax.device_count(),
        "load_average": os.getloadavg(),
        "rounds": options.rounds,
        "results": results,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
