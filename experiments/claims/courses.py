"""Claims 4 to 8: what differs between arms of reinforcement learning, chunk by chunk."""

from collections.abc import Callable
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from experiments.claims.pretraining import Learner
from experiments.claims.reinforcement import FEW
from experiments.claims.reinforcement import Course
from experiments.claims.reinforcement import Reinforcement
from experiments.claims.reinforcement import reinforcement
from experiments.claims.reinforcement import started
from experiments.claims.settings import ClaimsSettings
from experiments.study import Arrays
from jaxrl_llm.environments.difficulty import just_out_of_reach
from jaxrl_llm.environments.difficulty import moderate
from jaxrl_llm.training.phases.plateau import Plateau
from jaxrl_llm.training.phases.temperature import TemperatureControl
from jaxrl_llm.training.phases.temperature import TemperatureState

MEASUREMENTS = 4
"""Times `FEW` answers to each problem when an arm has ended."""
MARGIN = 0.01
"""Gain of reward between two windows that still counts as a plateau."""


def measured(own: Reinforcement, learner: Learner) -> Arrays:
    """Share of right answers at temperature 1 to all problems and to the longest ones, and their length, per seed."""
    found = [own.solve(learner, 1.0, number) for number in range(MEASUREMENTS)]
    by_problem = np.mean([one["right"].mean(2) for one in found], axis=0)
    return {
        "solved": by_problem.mean(1),
        "solved_long": by_problem[:, np.asarray(own.problems.times) == own.settings.longest - 1].mean(1),
        "answer_length": np.mean([one["length"] for one in found], axis=0),
    }


def followed(own: Reinforcement, learner: Learner, courses: Iterable[Course], first: int = 0) -> tuple[Learner, Arrays]:
    """The policies after a chunk of steps of each course, and metrics, [seeds, steps]."""
    metrics: list[Arrays] = []
    for number, course in enumerate(courses, first):
        learner, found = own.train(learner, course, number * own.settings.chunk)
        metrics.append(found)
    return learner, {name: np.concatenate([one[name] for one in metrics], axis=1) for name in metrics[0]}


def steady_part(settings: ClaimsSettings, **changes: bool) -> Arrays:
    """An arm without a change of course; `changes` are fields of `Course` that differ from the plain one."""
    own = reinforcement(settings)
    learner, metrics = followed(own, started(settings), [own.plain()._replace(**changes)] * settings.chunks)
    return metrics | measured(own, learner)


def start_part(settings: ClaimsSettings) -> Arrays:
    """The policies before reinforcement learning."""
    return measured(reinforcement(settings), started(settings))


def staged_part(settings: ClaimsSettings) -> Arrays:
    """Answers of half the length at most in the first half of the steps, all of it after that."""
    own = reinforcement(settings)
    full, half = own.plain(), settings.chunks // 2
    short = full._replace(longest=-(-settings.longest // 2))
    learner, metrics = followed(own, started(settings), [short] * half + [full] * (settings.chunks - half))
    return metrics | measured(own, learner)


def _asked(choose: Callable[[int], np.ndarray], own: Reinforcement) -> tuple[Course, np.ndarray]:
    """A course that asks the chosen problems of each seed, and how many they are.

    Where none is chosen all are asked: policies that solve everything or nothing have none.
    """
    rows = []
    for seed in range(own.settings.seeds):
        try:
            rows.append(choose(seed))
        except ValueError:
            rows.append(np.ones(len(own.problems.times), bool))
    chosen = np.stack(rows)
    return own.plain()._replace(log_weights=jnp.where(chosen, 0.0, -jnp.inf)), chosen.sum(1)


def _counted(own: Reinforcement, learner: Learner, times: int, number: int) -> np.ndarray:
    """Right ones among `times` times `FEW` answers to each problem, [seeds, problems]."""
    found = [own.solve(learner, 1.0, number + time)["right"].sum(2) for time in range(times)]
    return np.sum(found, axis=0).astype(int)


def curriculum_part(settings: ClaimsSettings) -> Arrays:
    """Moderate problems for half of the steps; then those just out of reach (`switch_`), or moderate ones (`stay_`)."""
    own, half = reinforcement(settings), settings.chunks // 2
    few = _counted(own, started(settings), 1, 100)
    stay, asked = _asked(lambda seed: moderate(few[seed], FEW, low=0.25, high=0.75), own)
    learner, before = followed(own, started(settings), [stay] * half)
    few, many = _counted(own, learner, 1, 200), _counted(own, learner, settings.many, 300)
    verified = np.ones(len(own.problems.times), bool)

    def hard(seed: int) -> np.ndarray:
        return just_out_of_reach(few[seed], many[seed], verified, few=FEW, many=FEW * settings.many)

    switch, found = _asked(hard, own)
    arrays: Arrays = {"moderate": asked, "hard": found} | {f"before_{name}": x for name, x in before.items()}
    for name, course in (("stay", stay), ("switch", switch)):
        ended, metrics = followed(own, learner, [course] * (settings.chunks - half), first=half)
        arrays |= {f"{name}_{quantity}": x for quantity, x in (metrics | measured(own, ended)).items()}
    return arrays


def temperature_part(settings: ClaimsSettings) -> Arrays:
    """The temperature of each seed is chosen anew whenever its reward has a plateau; it starts at 1."""
    own = reinforcement(settings)
    control = TemperatureControl(settings.temperatures, Plateau(settings.window, MARGIN))
    states = [TemperatureState(1.0)] * settings.seeds
    learner, metrics, used = started(settings), [], []
    for number in range(settings.chunks):
        temperatures = np.array([state.temperature for state in states])
        used.append(temperatures)
        course = own.plain()._replace(temperature=jnp.asarray(temperatures, jnp.float32))
        learner, found = own.train(learner, course, number * settings.chunk)
        metrics.append(found)
        for seed, rewards in enumerate(found["reward"]):
            for reward in rewards:
                states[seed] = control.observe(states[seed], float(reward))
        due = [seed for seed, state in enumerate(states) if control.due(state)]
        if due and number < settings.chunks - 1:
            scores = {t: own.solve(learner, t, 400 + number)["right"].mean((1, 2)) for t in control.grid}
            for seed in due:
                states[seed] = control.choose(states[seed], {t: float(score[seed]) for t, score in scores.items()})
    joined = {name: np.concatenate([one[name] for one in metrics], axis=1) for name in metrics[0]}
    return joined | measured(own, learner) | {"temperature": np.stack(used, axis=1)}
