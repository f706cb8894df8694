"""A call without a mistake of every public function of objectives and bounds, made from its signature.

A new function is in the table at once; only arguments that are not arrays are written down.
"""

import importlib
import inspect
import pkgutil
import typing

import jax.numpy as jnp
import numpy as np

import jaxrl_llm.bounds
import jaxrl_llm.objectives
from jaxrl_kernels import Reference
from jaxrl_llm.bounds import SHARP
from jaxrl_llm.bounds import bound_inputs_from_scalars
from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import SignalInputs
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

SIZES = {"B": 4, "T": 3, "R": 3, "K": 2, "V": 3, "H": 2, "D": 2, "N": 5, "_": 4, "E": 4, "k": 1}
OTHERS = {
    "mode": "token-mean",
    "length_normaliser": 4.0,
    "coefficient": 0.5,
    "k": 1,
    "steps": 2,
    "step": 1.0,
    "start": 0.1,
    "final": 1.0,
    "threshold": 0.55,
    "maximum": 0.1,
    "average": 0.1,
    "log_min_p": -2.0,
    "horizon": 3,
    "vocabulary": 3,
    "max_noise": 0.1,
    "scale": 0.1,
    "max_kl": 0.01,
    "target": 0.1,
    "episodes": 10.0,
    "dimension": 2,
    "accuracy": 0.5,
    "failure": 0.1,
    "rounds": 10.0,
    "index_radius": 1.0,
    "anti_concentration": 0.1,
    "states": 2,
    "actions": 2,
    "name": "grpo",
    "bound": SHARP["linear"],
    "inputs": bound_inputs_from_scalars(max_kl=0.01, horizon=3),
    "recipe": RECIPES["rloo"],
    "reward_range": (0.0, 1.0),
    "mean_reward": 0.5,
    "surrogate_gain": 0.1,
    "context_masked_gain": 0.1,
    "error_bound": 0.1,
    "hit_probability": 0.1,
    "sequence_tv": 0.1,
    "eps": 0.1,
    "columns": 3,
    "slope": 0.1,
    "rank": 2,
    "smallest_kept_mass": 0.9,
    "clip": 0.2,
    "num_experts": 4,
    "rate": 0.1,
    "means": {"target": 0.5, "target_squared": 0.5, "error": 0.1, "error_squared": 0.2},
}
"""What the arguments that are not arrays are in a call without mistakes."""


def public_functions():
    """Name -> function, of every module of the two packages."""
    found = {}
    for package in (jaxrl_llm.objectives, jaxrl_llm.bounds):
        for module in pkgutil.iter_modules(package.__path__):
            loaded = importlib.import_module(f"{package.__name__}.{module.name}")
            for name, value in vars(loaded).items():
                if inspect.isroutine(value) and value.__module__ == loaded.__name__ and not name.startswith("_"):
                    found[f"{package.__name__.partition('.')[2]}.{module.name}.{name}"] = value
    return found


FUNCTIONS = public_functions()


def array_type(parameter):
    """The array annotation of a parameter, None if it takes no array or a number as well."""
    arms = typing.get_args(parameter.annotation) or (parameter.annotation,)
    arrays = [arm for arm in arms if getattr(arm, "dim_str", "")]
    return arrays[0] if arrays else None


def axes(annotation, sizes):
    shape = []
    for axis in annotation.dim_str.split():
        shape += [sizes["B"], sizes["T"]] if axis == "*shape" else [sizes["B"]] if axis == "*batch" else [sizes[axis]]
    return tuple(shape)


def sample(annotation, sizes, position):
    """An array of the annotation: numbers in (0, 1), all true, or small integers."""
    shape = axes(annotation, sizes)
    count = int(np.prod(shape))
    if annotation.__name__.startswith("Bool"):
        return jnp.ones(shape, bool)
    if annotation.__name__.startswith("Int"):
        return (jnp.arange(count, dtype=jnp.int32) // 2).reshape(shape) % min(2, sizes["V"])
    return (0.2 + 0.1 * ((jnp.arange(count, dtype=jnp.float32) * 3 + position) % 7)).reshape(shape)


def signal_inputs(sizes):
    """A batch as signals read it, everything there."""
    shape = (sizes["B"], sizes["T"])
    tokens = -sample(Float[Array, "B T"], sizes, 0)
    return SignalInputs(
        response_mask=jnp.ones(shape, bool),
        rewards=sample(Float[Array, " B"], sizes, 1),
        rewards_t=tokens,
        group_ids=sample(Int[Array, " B"], sizes, 0),
        step_ids=jnp.zeros(shape, jnp.int32),
        actor_ids=jnp.zeros(shape, jnp.int32),
        ended=jnp.ones(shape[0], bool),
        log_prob_old=tokens,
        log_prob_behaviour=2 * tokens,
        log_prob_ref=3 * tokens,
        entropy=-tokens,
        collision=-tokens,
        kl_ref_t=-tokens,
        values=-tokens,
    )


def good_call(name, **sizes):
    """Arguments by name without a mistake, and the annotations of those that are arrays."""
    sizes = {**SIZES, **sizes}
    arguments, arrays = {}, {}
    for position, (key, parameter) in enumerate(inspect.signature(FUNCTIONS[name]).parameters.items()):
        annotation = array_type(parameter)
        if annotation is not None:
            arguments[key], arrays[key] = sample(annotation, sizes, position), annotation
        elif parameter.default is inspect.Parameter.empty or key == "length_normaliser":
            arguments[key] = OTHERS.get(key)
    if name in ("objectives.signals.advantages_of", "objectives.signals.value_targets"):
        arguments = {"recipe": RECIPES["ppo"], "inputs": signal_inputs(sizes)}
    if name == "objectives.hybrid.chunked_hybrid_loss":
        head = jnp.ones((sizes["D"], sizes["V"]))
        arguments |= {"head": head, "reference": Reference(arguments["hidden"], 2 * head)}
        arrays = {key: arrays[key] for key in ("targets", "coefficient")}
    if "vocabulary" in arguments:
        arguments["vocabulary"] = max(sizes["V"], 2)
    return arguments, arrays


def call(name, arguments):
    """The function by position where a parameter asks for it."""
    positional = []
    named = dict(arguments)
    for key, parameter in inspect.signature(FUNCTIONS[name]).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and key in named:
            positional.append(named.pop(key))
    return FUNCTIONS[name](*positional, **named)
