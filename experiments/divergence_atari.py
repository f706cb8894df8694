"""From pictures alone, every batch used eight times, the multi-step divergence holds its own in Pong.

Claim      From pictures alone, every batch used eight times, the multi-step divergence holds its own in Pong.
Command    python -m experiments run divergence_atari
Cost       85 minutes on two cores of an Intel Xeon at 2.8 GHz, beside other work (40 minutes with the KL, 46 with PPO);
           needs the extra `atari-gpl` (ale-py is under the GPL)
Expected   score_at_the_end >= 0.0 in summary.json: as many points as the opponent, in the last tenth of the run

Two million frames of Pong (half a million steps, each held for four frames), one run each of PPO and the multi-step KL,
grey pictures of 42 x 42; `--size 84 --torso nature` is the usual one, and about twice as slow (estimated).

What came out: both learn, from -20.2 points to -3.6 (PPO) and -8.3 (multi-step KL) in the games that end in the last
tenth; a claim of 0 is missed, and one run each does not tell the arms apart. With the network for 84 x 84 (`--torso
nature`), whose convolutions leave one place of such pictures, PPO stayed at -20.3 for all two million frames.
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
    cost="85 minutes on two cores of an Intel Xeon, beside other work",
    settings=SETTINGS,
    tiny=TINY,
    expectation=Expectation("score_at_the_end", at_least=0.0),
    parts=parts,
    summarise=summarise,
    page=atari_page,
    ranges=RANGES,
)
