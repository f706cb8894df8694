"""Whether what a collector brings is what objective and signal read; held before anything is computed."""

from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives.rules import SURROGATES
from jaxrl_llm.rollouts.collect import Brings
from jaxrl_llm.rollouts.collect import Collector
from jaxrl_llm.training.text.objective import Objective
from jaxrl_llm.training.text.settings import TrainSettings
from jaxrl_llm.training.text.signals import Signal
from jaxrl_llm.training.text.signals import refuse_unrecorded


def require_fitting(brings: Brings, objective: Objective, signal: Signal, settings: TrainSettings) -> None:
    """Refuse experience from which this objective learns nothing, or something else than it says.

    Args:
        brings: what the experience has.
        objective: what is minimised.
        signal: how advantages are made.
        settings: for the temperature.

    Raises:
        ValueError: rewards or log-probs are read that nobody brings, a temperature is set where nobody samples, or
            pairs are not told apart.
    """
    if not brings.log_probs:
        refuse_unrecorded(objective, signal)
    if not brings.log_probs and settings.sampling.temperature != 1:
        raise ValueError(
            f"sampling.temperature is {settings.sampling.temperature:g}; it belongs to sampling, and what a file "
            "brings, or an expert, is learned at temperature 1."
        )
    if not brings.rewards:
        for what, name, reads in (
            ("objective", objective.name, "rewards" in objective.needs),
            ("signal", signal.name, signal.reads_rewards),
        ):
            if reads:
                raise ValueError(
                    f"the {what} {name!r} reads rewards, and demonstrations have none, so nothing would be learned; "
                    "they are learned by the objective nll, distil_forward, ... or your own."
                )
    if brings.pairs and not _tells_sides_apart(objective, signal):
        raise ValueError(
            f"the objective {objective.name!r} learns both sides of a pair alike; pairs are learned by the objective "
            "dpo or ipo, or one of your own that compares them."
        )


def require_temperature(collector: Collector, settings: TrainSettings) -> None:
    """What a collector samples itself is scored at the temperature of the settings.

    Raises:
        ValueError: it samples at another one.
    """
    sampling = getattr(collector, "sampling", settings.sampling)
    if sampling.temperature != settings.sampling.temperature:
        raise ValueError(
            f"the collector samples at temperature {sampling.temperature:g}, and sampling.temperature of the settings "
            f"is {settings.sampling.temperature:g}; the trainer would score another policy than the one that acted."
        )


def _tells_sides_apart(objective: Objective, signal: Signal) -> bool:
    return objective.compares_rows or "rewards" in objective.needs or signal.reads_rewards


def stale_sentence(
    objective: Objective, signal: Signal, settings: TrainSettings, *, recipe: Recipe | None
) -> str | None:
    """What a run should say where it learns batches of earlier policies as if the present one had sampled them.

    Args:
        objective: what is minimised.
        signal: how advantages are made.
        settings: for `replay` and `ahead`.
        recipe: of which the objective is the loss; None where it is another one.

    Returns:
        a sentence, or None where batches are fresh, weighed by a ratio to the sampler, or no policy gradient is made.
    """
    if (settings.replay < 2 and not settings.ahead) or "advantages" not in objective.needs:
        return None
    if recipe is None:
        weighed = "log_prob_behaviour" in objective.needs
    else:
        reads_ratio = "ratio" in SURROGATES[recipe.surrogate].needs
        weighed = recipe.correction != "none" or (reads_ratio and recipe.denominator == "behaviour")
    if weighed or "log_prob_behaviour" in signal.needs:
        return None
    old = [f"replay {settings.replay}"] * (settings.replay > 1) + [f"ahead {settings.ahead}"] * bool(settings.ahead)
    return (
        f"With {' and '.join(old)}, batches of earlier policies are learned, and {objective.name!r} has no ratio to "
        "the policy that sampled them: its gradient is biased. A recipe with denominator behaviour, or with a "
        "correction, has one."
    )
