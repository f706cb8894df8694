"""Reinforcement learning alone teaches a small transformer with random weights to copy digits.

Claim      Held-out accuracy on copying 4 digits rises from 0 by at least 50 points.
Command    python -m experiments run from_scratch
Cost       about a minute on two cores of an AMD EPYC, half of it compilation the first time
Expected   accuracy_gain >= 0.5 in summary.json

Every recipe learns, most of them all of the task, with what `BY_RECIPE` says (`--recipe NAME --seeds 0 1 2 3 4`; 300
steps, Intel Xeon, 2 cores). Held-out accuracy is 0.00 before; then its mean over seeds 0 to 4 and each of them after,
and the mean reward of the first batch and of the last 25:

    recipe                        accuracy, seeds 0 to 4              reward
    reinforce                     0.42  (0.45 1.00 0.25 0.01 0.39)  0.002 -> 0.65
    reinforce_plus_plus           1.00  (1.00 1.00 1.00 0.99 1.00)  0.002 -> 1.00
    reinforce_plus_plus_baseline  1.00  (1.00 1.00 1.00 1.00 1.00)  0.002 -> 1.00
    rloo                          0.82  (1.00 1.00 0.41 0.68 1.00)  0.002 -> 0.94
    grpo                          0.69  (0.69 0.69 1.00 0.05 1.00)  0.002 -> 0.88
    dr_grpo                       0.80  (1.00 1.00 1.00 0.00 1.00)  0.002 -> 0.89
    dapo                          1.00  (1.00 1.00 1.00 1.00 1.00)  0.002 -> 1.00
    gspo                          1.00  (1.00 1.00 1.00 1.00 1.00)  0.002 -> 1.00
    cispo                         0.88  (1.00 0.42 1.00 1.00 1.00)  0.002 -> 0.95
    ppo                           0.98  (1.00 0.88 1.00 1.00 1.00)  0.002 -> 0.98
    trm_max                       1.00  (1.00 1.00 1.00 1.00 1.00)  0.002 -> 1.00
    trm_avg                       0.93  (1.00 1.00 1.00 0.67 1.00)  0.002 -> 0.93
    trm                           0.93  (1.00 1.00 1.00 0.67 1.00)  0.002 -> 0.93
    empg                          0.89  (1.00 1.00 1.00 0.66 0.77)  0.002 -> 0.97
    dvp                           0.94  (1.00 1.00 0.68 1.00 1.00)  0.002 -> 0.98
    hybrid                        0.69  (0.38 1.00 1.00 0.95 0.14)  0.002 -> 0.92
    divergence_augmented          0.74  (0.69 0.72 0.62 0.67 1.00)  0.002 -> 0.83

PPO, with a critic on the policy's states, less GRPO: +0.29, 95 % interval -0.19 to +0.77, paired by seed: not resolved.
GRPO has no entropy bonus here. Two of the trust regions are the same, since the threshold of the maximum is never
reached before that of the mean. Without the bonus rloo ends at 0.02 and ppo at 0.00: their entropy is gone after a
hundred steps. With their papers' threshold of the mean, trm and trm_avg end at 0.12 and 0.00 (seed 0); hybrid with the
sampled divergence instead of the exact one, a reward weight of 100 and twice the rate, at 0.13 over the five seeds.
empg was measured with the steps of all groups (`empg_all_groups`), before it left out those whose rewards are equal.

The model reads and writes bytes. The reward is the share of places that are right, so there is something to follow from
the first step. A third of the 10,000 strings is never trained on; 128 of that third are the held-out problems.
"""

import dataclasses

from flax import nnx

from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.registry import Expectation
from experiments.registry import Experiment
from experiments.run_folder import UserError
from experiments.settings import RUN_RANGES
from experiments.settings import RunSettings
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training import OptimizerSettings
from jaxrl_llm.training import TrainSettings
from jaxrl_llm.training import UpdateSettings


@dataclasses.dataclass(frozen=True)
class FromScratchSettings(RunSettings):
    """What is trained, on what, by which objective, and how large it is.

    Attributes:
        width: size of the states.
        layers: number of layers.
        heads: attention heads of each layer; the width must be a multiple of twice their number.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4


RANGES: Ranges = RUN_RANGES | {"width": Range(4, 8192), "layers": Range(1, 256), "heads": Range(1, 256)}
POSITIONS = 256
"""The longest row that the model reads [tokens]."""
MOST_PARAMETERS = 500_000_000
"""A model with random weights that is larger than this is a slip, and takes minutes to make."""


def check(settings: RunSettings) -> None:
    """Refuse sizes that do not fit each other, before there is a model.

    Raises:
        UserError: naming the field.
    """
    assert isinstance(settings, FromScratchSettings)
    if settings.model != "random":
        raise UserError(
            f"Field --model is {settings.model!r}; from_scratch starts from random weights, so it must be 'random'."
        )
    if settings.width % (2 * settings.heads):
        raise UserError(
            f"Field --width is {settings.width}; it must be a multiple of twice --heads, {2 * settings.heads}."
        )
    # Four square matrices of attention and three of a feed-forward block three times as wide.
    parameters = 13 * settings.layers * settings.width**2
    if parameters > MOST_PARAMETERS:
        raise UserError(
            f"Fields --width and --layers are {settings.width} and {settings.layers}, which makes about "
            f"{parameters / 1e6:,.0f} million parameters; from_scratch takes at most {MOST_PARAMETERS / 1e6:,.0f}."
        )


def build(settings: RunSettings) -> tuple[Transformer, Tokenizer]:
    """A transformer with random weights and its byte tokenizer.

    Raises:
        UserError: as `check`.
    """
    check(settings)
    assert isinstance(settings, FromScratchSettings)
    tokenizer = ByteTokenizer()
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=settings.width,
        num_layers=settings.layers,
        num_heads=settings.heads,
        num_kv_heads=settings.heads,
        head_dim=settings.width // settings.heads,
        intermediate_size=3 * settings.width,
        max_positions=POSITIONS,
    )
    return Transformer(config, rngs=nnx.Rngs(settings.train.seed)), tokenizer


SETTINGS = FromScratchSettings(
    model="random",
    task="copy_digits",
    recipe="grpo",
    learns="full",
    train=TrainSettings(
        steps=300,
        prompts=16,
        group_size=16,
        prompt_length=5,
        response_length=5,
        optimizer=OptimizerSettings(learning_rate=1e-3),
        update=UpdateSettings(minibatches=4),
        checkpoint_every=50,
        evaluate_every=25,
        episodes_every=100,
    ),
)

TINY = dataclasses.replace(
    SETTINGS,
    width=16,
    layers=1,
    heads=2,
    train=dataclasses.replace(
        SETTINGS.train,
        steps=3,
        prompts=4,
        group_size=4,
        # So few answers may all earn nothing, and the optimiser is to be seen at work.
        update=dataclasses.replace(SETTINGS.train.update, skip_equal_groups=False),
        checkpoint_every=1,
        evaluate_every=0,
        episodes_every=3,
    ),
)

RAW = {"recipe_settings.entropy_coefficient": 0.01}
"""With advantages in units of reward. Without a bonus these recipes decide for two digits out of four and stay there:
their entropy is gone after a hundred steps, and then all answers of a group earn the same."""

UNIT = {"recipe_settings.entropy_coefficient": 0.05}
"""With advantages of size 1, whatever the rewards are."""

BY_RECIPE = {
    **dict.fromkeys(("reinforce", "rloo", "group_reinforce", "dr_grpo", "dvp"), RAW),
    **dict.fromkeys(("reinforce_plus_plus", "reinforce_plus_plus_baseline", "dapo", "gspo", "cispo", "empg"), UNIT),
    "trm_max": UNIT,
    # Of a vocabulary this flat, half of the answers would leave the papers' trust region of the mean KL.
    **dict.fromkeys(("trm", "trm_avg"), UNIT | {"recipe_settings.mask_average": 0.01}),
    # Nothing clips its surrogate: at the rate of the others it forgets again what it learned.
    "divergence_augmented": UNIT | {"learning_rate": 5e-4},
    "ppo": UNIT | {"recipe_settings.trace": 1.0},
    # Its reference is the policy before training, and its KL the bonus that keeps the entropy up.
    "hybrid": {
        "recipe_settings.reward_weight": 300.0,
        "recipe_settings.advantage": "sparse_imitation_exact",
        "learning_rate": 5e-4,
    },
}
"""What each recipe needs to learn this task in 300 steps; GRPO has its KL term and needs nothing."""

EXPERIMENT = Experiment(
    name="from_scratch",
    claim="Reinforcement learning alone teaches a small transformer with random weights to copy digits.",
    cost="about a minute on two cores of an AMD EPYC",
    settings=SETTINGS,
    tiny=TINY,
    expectation=Expectation("accuracy_gain", at_least=0.5),
    build=build,
    by_recipe=BY_RECIPE,
    ranges=RANGES,
    check=check,
    positions=lambda settings: POSITIONS,
)
