"""With every batch used eight times, a multi-step divergence ends with higher returns than PPO's clip.

Claim      With every batch used eight times, a multi-step divergence ends with higher returns than PPO's clip.
Command    python -m experiments run divergence_minatar
Cost       TODO
Expected   kl_over_ppo_low >= 1e-06 in summary.json: the lower end of the 95 % interval of the relative score of the
           multi-step KL over PPO with as much reuse, mean over games, paired by seed
"""

from experiments.games.numbers import summarise
from experiments.games.page import minatar_page
from experiments.games.settings import RANGES
from experiments.games.settings import GameSettings
from experiments.games.settings import parts
from experiments.registry import Expectation
from experiments.study import Study

SETTINGS = GameSettings()

TINY = GameSettings(
    games=("breakout",),
    arms=("ppo", "kl"),
    seeds=2,
    iterations=10,
    parallel=8,
    steps=8,
    minibatches=2,
    reuse=4,
    every=5,
)

EXPERIMENT = Study(
    name="divergence_minatar",
    claim="With every batch used eight times, a multi-step divergence ends with higher returns than PPO's clip.",
    cost="TODO",
    settings=SETTINGS,
    tiny=TINY,
    expectation=Expectation("kl_over_ppo_low", at_least=1e-6),
    parts=parts,
    summarise=summarise,
    page=minatar_page,
    ranges=RANGES,
)
