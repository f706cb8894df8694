"""Episodes of text against as many tokens sampled in one turn: tokens per second of both, taking turns.

Command: python -m experiments.benchmarks.text_agent_rollouts [--tasks 8] [--group-size 8] [--rounds 5]

Rooms in words: the world answers every action by a sentence of its own length. The policy is untrained, so nearly every
action has as many tokens as it may. Answers in one turn have as many tokens as an episode has on average behind its
prompt, of which the policy writes some ("chosen", a share) and is given the others in chunks.
"""

import argparse
import platform
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmarks.agent_rollouts import make_model
from experiments.benchmarks.agent_rollouts import seconds
from jaxrl_llm.environments.worlds import Reply
from jaxrl_llm.environments.worlds import Rooms
from jaxrl_llm.environments.worlds import split_panels
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts.collect import PolicySnapshot
from jaxrl_llm.rollouts.collect import TextAgentCollector

WIDTH, ACTION_TOKENS, TURNS = 256, 4, 8


class RoomsInWords:
    """The rooms of `Rooms` with answers in words; an action is one of its letters."""

    def __init__(self) -> None:
        self.rooms = Rooms(turns=24)
        self.name, self.tasks, self.turns = f"{self.rooms.name}-in-words", self.rooms.tasks, TURNS

    def reset(self, seed: int) -> "Walk":
        """Begin a task."""
        return Walk(self.rooms, seed)


class Walk:
    """An episode in progress."""

    admissible: tuple[str, ...] = ()

    def __init__(self, rooms: Rooms, seed: int) -> None:
        self._rooms, self._exits = rooms, rooms.exits
        state, _ = rooms.reset(jnp.asarray([seed]))
        self._room, self._key, self._door = (int(x[0]) for x in (state.room, state.key_room, state.door_room))
        self._has_key = False
        self.prompt = f"The key is in {self._named(self._key)}, the door in {self._named(self._door)}. {self._seen()}"

    def step(self, action: str) -> Reply:
        """Take an action."""
        moved = self._exits[self._room, "nesw".index(action)] if len(action) == 1 and action in "nesw" else -1
        takes = action == "t" and self._room == self._key and not self._has_key
        opens = action == "o" and self._room == self._door and self._has_key
        if moved < 0 and not takes and not opens:
            return Reply(f"There is no way to {action}.", 0.0, False, False)
        self._room, self._has_key = int(moved) if moved >= 0 else self._room, self._has_key or takes
        return Reply(self._seen(), float(opens), opens, True)

    def expert(self) -> str | None:
        """Nobody asks."""
        return None

    def close(self) -> None:
        """Nothing is held."""

    def _named(self, room: int) -> str:
        return f"room {chr(ord('A') + room)}"

    def _seen(self) -> str:
        ways = [way for way, to in zip("nesw", self._exits[self._room], strict=True) if to >= 0]
        return f"You are in {self._named(self._room)}{', with the key' * self._has_key}. Ways: {', '.join(ways)}."


def measure(size: str, tasks: int, group_size: int, rounds: int) -> None:
    """Print a line of the table."""
    world, tokenizer, model = RoomsInWords(), ByteTokenizer(), make_model(size)
    graphdef, state = nnx.split(model)
    sizes: dict[str, Any] = {
        "seed": 0,
        "tasks": tasks,
        "group_size": group_size,
        "width": WIDTH,
        "action_tokens": ACTION_TOKENS,
    }
    sizes["action_tokens"] = ACTION_TOKENS
    collector = TextAgentCollector(world, split_panels(world)[0], model, tokenizer, **sizes)
    policy, key = PolicySnapshot(graphdef, state, 0), jax.random.key(0)
    first = collector.collect(policy, key, 0, {})
    t = first.trajectories
    behind = t.token_mask.sum(axis=1) - t.action_mask.argmax(axis=1)
    script, seeds = collector.stage.script, collector.tasks(0)
    asked, mask = tokenizer.encode_batch([world.reset(int(seed)).prompt + "\n> " for seed in seeds])
    assert [*map(len, (script.prompt(world.reset(int(seed)).prompt) for seed in seeds))] == mask.sum(axis=1).tolist()
    options = {"group_size": group_size, "sampling": SamplingSettings(), "pad_id": tokenizer.pad_id}
    generate = make_generate(graphdef, max_new_tokens=int(behind.mean()), eos_id=(), **options)
    waited: list[float] = []

    def play() -> None:
        waited.append(collector.collect(policy, key, 0, {}).metrics["perf/world_share"])

    runs = {
        "episodes": play,
        "answers": lambda: generate(state, jnp.asarray(asked), jnp.asarray(mask), key, 0, jnp.arange(tasks)),
    }
    for run in runs.values():
        seconds(run)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    tokens = {"episodes": int(behind.sum()), "answers": len(behind) * int(behind.mean())}
    rates = {name: tokens[name] / statistics.median(times) for name, times in taken.items()}
    chosen = t.action_mask.sum() / behind.sum()
    print(
        f"| {size} | {rates['episodes']:,.0f} | {rates['answers']:,.0f} | {rates['episodes'] / rates['answers']:.2f} | "
        f"{chosen:.2f} | {statistics.median(waited[1:]):.3f} | {first.metrics['world/recomputed']:.0f} |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["bytes", "bytes, wider"])
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("| model | episodes [tokens/s] | answers [tokens/s] | ratio | chosen | waiting for the world | recomputed |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        measure(size, arguments.tasks, arguments.group_size, arguments.rounds)


if __name__ == "__main__":
    main()
