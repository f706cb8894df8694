"""From pictures alone, every batch used eight times, the multi-step divergence holds its own in Pong.

Claim      From pictures alone, every batch used eight times, the multi-step divergence holds its own in Pong.
Command    python -m experiments run divergence_atari
Cost       TODO
Expected   score_at_the_end >= 0.0 in summary.json: as many points as the opponent, in the last tenth of the run
"""

from experiments.games.atari import RANGES
from experiments.games.atari import AtariSettings
from experiments.games.atari import atari_page
from experiments.games.atari import parts
from experiments.games.atari import summarise
from experiments.registry import Expectation
from experiments.study import Study

SETTINGS = AtariSettings()

TINY = AtariSettings(
    arms=("kl",), iterations=4, parallel=2, steps=8, minibatches=1, reuse=2, replay=2, width=16, every=2
)

EXPERIMENT = Study(
    name="divergence_atari",
    claim="From pictures alone, every batch used eight times, the multi-step divergence holds its own in Pong.",
    cost="TODO",
    settings=SETTINGS,
    tiny=TINY,
    expectation=Expectation("score_at_the_end", at_least=0.0),
    parts=parts,
    summarise=summarise,
    page=atari_page,
    ranges=RANGES,
)
