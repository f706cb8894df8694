"""Training in games: frames per second against PureJaxRL's PPO, and how much of Atari's play hides behind the update.

Command: python -m experiments.benchmarks.game_speed --peer FOLDER --python PYTHON [--out game_speed.json]
         python -m experiments.benchmarks.game_speed --atari
Cost:    about five minutes on two quiet cores, each.

MinAtar: the whole training loop of PPO (64 games, 128 steps, 4 uses of each batch in 8 minibatches, no sticky actions),
with the same network, one seed, compilation not counted: PureJaxRL from a clone (FOLDER has its ppo.py) with a Python
that has gymnax, distrax, flax and six, and ours, in turns, each in a process of its own. Its minibatches are single
steps, ours rows of 128; both read every step four times.

Atari: steps per second of Pong with random actions, of the update on batches that are there already, and of both
together as they are trained. The share is the last over the slower of the others.

Measured on two cores of an Intel Xeon at 2.8 GHz that other machines use as well, jax 0.11.2, frames per second of the
best run of each process: PureJaxRL 20,155 and 19,387, ours 15,530 and 15,900 in one call with two turns; 19,827 and
22,093 against 20,390 and 16,043 in another. So the order is not resolved. Atari at 42 x 42 with `--torso nature` and
eight uses: playing 2,425 steps/s, updating 900, together 694, a share of 0.77.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.environments.pixels import Atari
from jaxrl_llm.environments.pixels import MinAtar
from jaxrl_llm.training.control import METHODS
from jaxrl_llm.training.control import ControlSettings
from jaxrl_llm.training.control import GameTrainer
from jaxrl_llm.training.control import HostTrainer

WORK = {
    "game": "Breakout-MinAtar",
    "games": 64,
    "steps": 128,
    "reuse": 4,
    "minibatches": 8,
    "frames": 245_760,
    "runs": 2,
}
PEER = Path(__file__).parent / "peers" / "purejaxrl_ppo.py"


def time_ours(work: dict[str, Any]) -> dict[str, Any]:
    """Our loop, in this process."""
    names = ("games", "steps", "reuse", "minibatches")
    iterations = work["frames"] // (work["games"] * work["steps"])
    settings = ControlSettings(iterations=iterations, **{name: work[name] for name in names})
    trainer = GameTrainer(MinAtar("breakout", sticky=0.0), settings)
    start, seconds, processor = time.perf_counter(), [], []
    jax.block_until_ready(trainer.run(trainer.init(jnp.arange(1)), iterations))
    compiling = time.perf_counter() - start
    for number in range(work["runs"]):
        state = jax.block_until_ready(trainer.init(jnp.arange(1) + number))
        start, before = time.perf_counter(), time.process_time()
        jax.block_until_ready(trainer.run(state, iterations))
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - before)
    return {"seconds": seconds, "processor": processor, "compiling": compiling - seconds[0]}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both, in turns."""
    found: dict[str, list[dict[str, Any]]] = {"peer": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.json"
        path.write_text(json.dumps(WORK | {"peer": str(arguments.peer)}))
        commands = {
            "peer": [arguments.python, str(PEER), str(path)],
            "ours": [sys.executable, "-m", "experiments.benchmarks.game_speed", "--worker", str(path)],
        }
        for turn in range(arguments.turns):
            # Who is first changes: what the machine does meanwhile changes too.
            for name in sorted(commands, reverse=turn % 2 == 0):
                made = subprocess.run(commands[name], check=True, stdout=subprocess.PIPE, text=True)
                found[name].append(json.loads(made.stdout.splitlines()[-1]))
                print(f"turn {turn + 1}, {name}: {WORK['frames'] / min(found[name][-1]['seconds']):,.0f} frames/s")
    seconds = {name: [s for one in many for s in one["seconds"]] for name, many in found.items()}
    return {
        "frames_per_second": {name: WORK["frames"] / min(values) for name, values in seconds.items()},
        "ratio_of_best": min(seconds["peer"]) / min(seconds["ours"]),
        "ratio_of_medians": statistics.median(seconds["peer"]) / statistics.median(seconds["ours"]),
        "processor_microseconds": {
            name: min(p for one in many for p in one["processor"]) / WORK["frames"] * 1e6
            for name, many in found.items()
        },
        "compiling": {name: min(one["compiling"] for one in many) for name, many in found.items()},
        "versions": found["peer"][0]["versions"],
    }


def time_atari(reuse: int, size: int, torso: str, batches: int = 20) -> dict[str, float]:
    """Pong: playing alone, updating alone, and both together."""
    settings = ControlSettings(
        method=METHODS["kl"], games=16, steps=64, iterations=1000, reuse=reuse, replay=4, torso=torso, width=512
    )
    games = Atari("pong", settings.games, size=size)
    trainer = HostTrainer(games, settings)
    steps, found = settings.games * settings.steps, {}
    games.reset(0)
    actions = np.random.default_rng(0).integers(0, len(games.actions), (batches * settings.steps, settings.games))
    start = time.perf_counter()
    for row in actions:
        games.step(row)
    found["playing"] = len(actions) * settings.games / (time.perf_counter() - start)
    state, _ = trainer.run(trainer.init(jnp.arange(1)), 2)
    update = jax.jit(trainer.learner.update)
    jax.block_until_ready(update(state.learning, state.replay, jax.random.key(0)))
    start = time.perf_counter()
    for number in range(batches // 2):
        jax.block_until_ready(update(state.learning, state.replay, jax.random.key(number)))
    found["updating"] = batches // 2 * steps / (time.perf_counter() - start)
    # Loading the games is no part of it: two runs of different lengths, one minus the other.
    took = []
    for count in (2, 2 + batches):
        start = time.perf_counter()
        state, _ = trainer.run(state, count)
        took.append(time.perf_counter() - start)
    found["together"] = batches * steps / (took[1] - took[0])
    games.close()
    return found | {"share": found["together"] / min(found["playing"], found["updating"])}


def main() -> None:
    """Measure what is asked for, print it and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--atari", action="store_true")
    parser.add_argument("--size", type=int, default=42)
    parser.add_argument("--torso", default="small")
    parser.add_argument("--reuse", type=int, default=8)
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(time_ours(json.loads(arguments.worker.read_text()))))
        return
    found: dict[str, Any] = {"load": os.getloadavg(), "jax": jax.__version__}
    if arguments.peer:
        found["minatar"] = compare(arguments)
    if arguments.atari:
        found["atari"] = time_atari(arguments.reuse, arguments.size, arguments.torso)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
