"""PureJaxRL's PPO on a MinAtar game; run by `game_speed.py` with the Python of an environment that has what it needs.

Its own files are used as they are, from a clone (`--peer`). What is adapted to them is here: names of packages that
MinAtar does not use, the five values of a step that older gymnax had, and MinAtar's network in place of its own, with
the convolution written as fast as a user could make it (plain `nn.Conv` takes seven times as long on a CPU).
"""

import argparse
import json
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path


def _stub(names: dict[str, tuple[str, ...]]) -> None:
    """Modules that are imported and never used."""
    for name, attributes in names.items():
        module = types.ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, None)
        sys.modules[name] = module


def _five_values() -> None:
    """Let gymnax's games answer as those that the peer was written for: what is over, and little in `info`, which the
    peer keeps for each step."""
    import gymnax

    class FiveValues:
        def __init__(self, env):
            self._env = env

        def __getattr__(self, name):
            return getattr(self._env, name)

        def step(self, key, state, action, params=None):
            shown, state, reward, terminated, truncated, info = self._env.step(key, state, action, params)
            return shown, state, reward, terminated | truncated, {"discount": info["discount"]}

    make = gymnax.make
    gymnax.make = lambda *args, **options: (lambda env, params: (FiveValues(env), params))(*make(*args, **options))


def _network() -> type:
    """MinAtar's network, as a class that takes the place of the peer's."""
    import distrax
    import flax.linen as nn
    import numpy as np
    from flax.linen.initializers import constant
    from flax.linen.initializers import orthogonal

    class ActorCritic(nn.Module):
        action_dim: int
        activation: str = "relu"

        @nn.compact
        def __call__(self, x):
            channels = x.shape[-1] // 100
            i, j, u, v, k = np.indices((8, 8, 3, 3, channels))
            x = x[..., (((i + u) * 10 + j + v) * channels + k).reshape(8, 8, -1)]
            for width in (16, 128):
                x = nn.relu(nn.Dense(width, kernel_init=orthogonal(np.sqrt(2)), bias_init=constant(0.0))(x))
                x = x.reshape(*x.shape[:-3], -1) if width == 16 else x
            logits = nn.Dense(self.action_dim, kernel_init=orthogonal(0.01), bias_init=constant(0.0))(x)
            value = nn.Dense(1, kernel_init=orthogonal(1.0), bias_init=constant(0.0))(x)
            return distrax.Categorical(logits=logits), value[..., 0]

    return ActorCritic


def main() -> None:
    """Time whole runs after a first one, without compilation, and print one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    work = json.loads(parser.parse_args().work.read_text())
    sys.path.insert(0, work["peer"])
    wrappers = {"brax.envs.wrappers.training": ("EpisodeWrapper", "AutoResetWrapper")}
    _stub({"brax": ("envs",), "brax.envs": (), "brax.envs.wrappers": (), **wrappers, "navix": ()})
    _five_values()
    import jax
    import ppo

    ppo.ActorCritic = _network()
    settings = {
        "LR": 5e-3,
        "NUM_ENVS": work["games"],
        "NUM_STEPS": work["steps"],
        "TOTAL_TIMESTEPS": work["frames"],
        "UPDATE_EPOCHS": work["reuse"],
        "NUM_MINIBATCHES": work["minibatches"],
        "GAMMA": 0.99,
        "GAE_LAMBDA": 0.95,
        "CLIP_EPS": 0.2,
        "ENT_COEF": 0.01,
        "VF_COEF": 0.5,
        "MAX_GRAD_NORM": 0.5,
        "ACTIVATION": "relu",
        "ENV_NAME": work["game"],
        "ANNEAL_LR": True,
    }
    start = time.perf_counter()
    run = jax.jit(ppo.make_train(settings)).lower(jax.random.PRNGKey(0)).compile()
    compiling = time.perf_counter() - start
    seconds, processor = [], []
    for number in range(1 + work["runs"]):
        start, before = time.perf_counter(), time.process_time()
        jax.block_until_ready(run(jax.random.PRNGKey(number)))
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - before)
    versions = {name: version(name) for name in ("jax", "flax", "gymnax", "distrax")}
    print(
        json.dumps({"seconds": seconds[1:], "processor": processor[1:], "compiling": compiling, "versions": versions})
    )


if __name__ == "__main__":
    main()
