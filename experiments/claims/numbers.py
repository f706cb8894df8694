"""From the parts of `glm_claims` to one row for each claim: an effect, its interval over seeds, a verdict."""

from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import numpy as np

from experiments.claims.balance import middle
from experiments.claims.optimisers import saved
from experiments.claims.settings import ClaimsSettings
from experiments.lab.numbers import Interval
from experiments.lab.numbers import over_seeds
from experiments.study import Arrays
from experiments.study import Results

REPRODUCED, NOT_RESOLVED, REVERSED = "reproduced", "not at this size", "reversed"


class Row(NamedTuple):
    """One claim.

    Attributes:
        name: in summary.json.
        claim: what is said to be better, in words.
        measure: what the effect is a difference of; above 0 where the claim holds.
        published: the figure that was reported, and where.
        effect: mean over seeds with its 95 % interval, paired.
        arms: means over seeds of what was compared: with and without what is claimed; one number where it is a slope.
    """

    name: str
    claim: str
    measure: str
    published: str
    effect: Interval
    arms: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """By the rule that was stated before anything was run."""
        return verdict(self.effect)


def verdict(effect: Interval) -> str:
    """ "reproduced" if the interval lies above 0, "reversed" if below, "not at this size" if 0 is inside."""
    if effect.mean - effect.half > 0:
        return REPRODUCED
    return REVERSED if effect.mean + effect.half < 0 else NOT_RESOLVED


def with_bias(settings: ClaimsSettings, results: Results) -> Arrays:
    """What is measured with the correction bias at the rate at which balance is compared, per seed."""
    run, number = results["adamw"], middle(settings)
    return {name: values[number] for name, values in run.items() if name not in ("best", "curve", "seconds")}


def drafts(results: Results) -> Arrays:
    """What is measured of the best run of AdamW, per seed: the model whose drafts are judged."""
    run = results["adamw"]
    best = int(run["best"])
    return {name: values[best] for name, values in run.items() if name not in ("best", "curve", "seconds")}


def _pair(better: np.ndarray, worse: np.ndarray, *, less: bool = False) -> dict[str, Any]:
    gain = worse - better if less else better - worse
    return {"effect": over_seeds(gain), "arms": (float(better.mean()), float(worse.mean()))}


def budgets(settings: ClaimsSettings) -> np.ndarray:
    """Tokens of the runs of claim 1."""
    return np.arange(2, settings.pieces + 1) * settings.piece * settings.rows * settings.length


def rows(settings: ClaimsSettings, results: Results) -> list[Row]:
    """Every claim, in the order of the report's sections."""
    return [*_of_pretraining(settings, results), *_of_rewards(results)]


def _of_pretraining(settings: ClaimsSettings, results: Results) -> list[Row]:
    muon, adamw = results["muon"]["curve"], results["adamw"]["curve"]
    bias, none, loss, draft = with_bias(settings, results), results["none"], results["loss"], drafts(results)
    share = saved(muon, adamw, budgets(settings))
    return [
        Row(
            "muon_tokens",
            "1 Muon needs fewer tokens than AdamW",
            "share of the tokens saved to AdamW's final loss",
            "1.4x at 0.1B, 1.1x at 1.2B (2509.02046); 10-15 % fewer (2505.02222)",
            over_seeds(share),
            (float(muon[-1].mean()), float(adamw[-1].mean())),
        ),
        Row(
            "bias_violation",
            "2a The correction bias evens out loads",
            "largest violation without it minus with it",
            "0.72 to 0.04 (2408.15664)",
            **_pair(bias["violation"], none["violation"], less=True),
        ),
        Row(
            "bias_loss",
            "2b The bias costs less than the auxiliary loss",
            "held-out loss with the auxiliary loss minus with the bias [nats]",
            "perplexity 9.56 to 9.50 (2408.15664)",
            **_pair(bias["loss"], loss["loss"], less=True),
        ),
        Row(
            "mtp_entropy",
            "3 Fewer drafts are accepted where entropy is high",
            "minus the slope of acceptance [prob per nat]",
            "falls linearly (2606.12370); 60-80 % accepted at the first position",
            over_seeds(-draft["slope"]),
            (float(draft["accepted"].mean()),),
        ),
    ]


def _of_rewards(results: Results) -> list[Row]:
    rounded, replay, plain = results["rounded"], results["replay"], results["token_mean"]
    curriculum = results["curriculum"]
    return [
        Row(
            "replay_kl",
            "4a Router replay brings the trainer nearer to a rounded sampler",
            "KL of sampler and trainer without minus with replay [nats]",
            "about halved (2510.11370)",
            **_pair(rounded["kl_replayed"].mean(1), rounded["kl_own"].mean(1), less=True),
        ),
        Row(
            "replay_reward",
            "4b Router replay ends with more reward",
            "solved at the end with minus without replay",
            "71.83 against 62.23 (2510.11370)",
            **_pair(replay["solved"], rounded["solved"]),
        ),
        Row(
            "single_stage",
            "5 One stage of full length beats staged lengths",
            "solved at the end with one stage minus two",
            "83.4 against 80.6 (GLM-4.5, section 3)",
            **_pair(plain["solved"], results["staged"]["solved"]),
        ),
        Row(
            "curriculum",
            "6 Switching to hard problems beats staying",
            "solved at the end after the switch minus without",
            "83.4 against 81.8 (GLM-4.5, section 3)",
            **_pair(curriculum["switch_solved"], curriculum["stay_solved"]),
        ),
        Row(
            "token_mean",
            "7 Token-mean loss beats sequence-mean",
            "solved at the end, token-mean minus sequence-mean",
            "better, by a figure without numbers (GLM-4.5, section 3)",
            **_pair(plain["solved"], results["sequence_mean"]["solved"]),
        ),
        Row(
            "temperature",
            "8 A temperature that is chosen anew at plateaus beats a fixed one",
            "solved at the end, dynamic minus fixed",
            "used, without a comparison (GLM-4.5, section 3)",
            **_pair(results["dynamic"]["solved"], plain["solved"]),
        ),
    ]


def summarise(settings: ClaimsSettings, results: Results) -> dict[str, Any]:
    """Every row, and how many claims are reproduced."""
    found = rows(settings, results)
    summary: dict[str, Any] = {}
    for row in found:
        # An interval of two seeds that agree in nothing is wide, and none of it is infinite: JSON has no infinity.
        summary[row.name] = row.effect.mean
        summary[f"{row.name}_half_interval"] = row.effect.half
        summary[f"{row.name}_arms"] = list(row.arms)
        summary[f"{row.name}_verdict"] = row.verdict
    count: Mapping[str, int] = {
        name: sum(row.verdict == name for row in found) for name in (REPRODUCED, NOT_RESOLVED, REVERSED)
    }
    draft, bias = drafts(results), with_bias(settings, results)
    return summary | {
        "reproduced": count[REPRODUCED],
        "not_at_this_size": count[NOT_RESOLVED],
        "reversed": count[REVERSED],
        "adamw_rate": settings.adamw_rates[int(results["adamw"]["best"])],
        "muon_rate": settings.muon_rates[int(results["muon"]["best"])],
        "violation_with_loss": float(results["loss"]["violation"].mean()),
        "violation_with_bias": float(bias["violation"].mean()),
        "loss_without_balance": float(results["none"]["loss"].mean()),
        "accepted": float(draft["accepted"].mean()),
        "accepted_by_entropy": [float(x) for x in accepted_by_bin(draft)],
        "flips": float(results["rounded"]["flips"].mean()),
        "solved_at_the_start": float(results["start"]["solved"].mean()),
        "solved_with_token_mean": float(results["token_mean"]["solved"].mean()),
        "temperature_at_the_end": float(results["dynamic"]["temperature"][:, -1].mean()),
        "moderate_problems": float(results["curriculum"]["moderate"].mean()),
        "hard_problems": float(results["curriculum"]["hard"].mean()),
    }


def accepted_by_bin(draft: Arrays) -> np.ndarray:
    """Share of accepted drafts by bins of entropy, of all seeds together; 0 where no token is."""
    tokens = draft["bin_tokens"].sum(0)
    return (draft["bin_accepted"] * draft["bin_tokens"]).sum(0) / np.maximum(tokens, 1)
