"""Runs of one setting under several seeds as one thing to compare, and differences paired by what is common."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.bands import half_width
from experiments.bands import standard_error
from experiments.evaluation import SCORINGS
from experiments.evaluation_table import problem_scores
from experiments.evaluation_table import title
from experiments.intervals import Estimate
from experiments.intervals import by_problem
from experiments.intervals import paired_difference
from experiments.records import Record
from experiments.settings import changed_settings

Scores = dict[str, float]
"""Mean score of each distinct problem."""


@dataclasses.dataclass(frozen=True)
class Siblings:
    """Runs that differ in their seed only; often one run by itself.

    Attributes:
        label: what is shown.
        records: their files, each with a seed of its own.
    """

    label: str
    records: tuple[Record, ...]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much higher a number is than in what it is compared with.

    Attributes:
        what: the number, in words.
        of: label of those that have it.
        value: mean of the differences.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        how: what was paired with what.
    """

    what: str
    of: str
    value: float
    low: float
    high: float
    how: str

    @property
    def verdict(self) -> str:
        """Whether the sign is known: not where the interval holds 0."""
        if self.low <= 0 <= self.high:
            return "not resolved"
        return "higher" if self.low > 0 else "lower"


def alone(records: Sequence[Record]) -> list[Siblings]:
    """Every run by itself."""
    return [Siblings(record.run.label, (record,)) for record in records]


def siblings(records: Sequence[Record]) -> list[Siblings]:
    """The runs in groups of equal experiment and settings but for the seed, in order of first appearance.

    A run with a seed that its group has already is no further evidence of what seeds do, and stands by itself.
    """
    groups: list[list[Record]] = []
    for record in records:
        for group in groups:
            if _same_but_seed(group[0], record) and record.settings["seed"] not in [r.settings["seed"] for r in group]:
                group.append(record)
                break
        else:
            groups.append([record])
    firsts = [group[0] for group in groups]
    return [Siblings(_label(group, firsts), tuple(group)) for group in groups]


def _same_but_seed(one: Record, other: Record) -> bool:
    if one.run.experiment != other.run.experiment or not all("seed" in record.settings for record in (one, other)):
        return False
    return set(changed_settings(one.settings, other.settings)) <= {"seed"}


def _label(group: Sequence[Record], firsts: Sequence[Record]) -> str:
    """The run's own label, or experiment, what sets it apart from the other groups, and seeds."""
    if len(group) == 1:
        return group[0].run.label
    settings = group[0].settings
    differing = [name for first in firsts for name in changed_settings(settings, first.settings) if name != "seed"]
    apart = [f"{name} {settings[name]}" for name in dict.fromkeys(differing) if name in settings]
    return f"{', '.join([group[0].run.experiment, *apart])} ({len(group)} seeds)"


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of two numbers or more, one per seed, with its 95 % interval by Student's t.

    Raises:
        ValueError: fewer than two numbers.
    """
    numbers = np.asarray(values, float)
    if len(numbers) < 2:
        raise ValueError(f"there are {len(numbers)} seeds; an interval over seeds needs at least 2.")
    mean, half = float(numbers.mean()), half_width(len(numbers)) * float(standard_error(numbers))
    return Estimate(mean, mean - half, mean + half, len(numbers))


def differences(base: Siblings, other: Siblings) -> list[Difference]:
    """Held-out accuracies after training, `other` minus `base`, and pass@k where both were evaluated alike.

    Paired by seed where two seeds or more are common: the interval is then of the mean over seeds. Else paired by
    problem, with the answers to each problem averaged over the runs of each side: the interval is over problems, for
    these very runs, and does not say what other seeds would do. Nothing where the held-out problems differ.
    """
    found = []
    for name, scoring in SCORINGS.items():
        scores = [_after(group, scoring) for group in (base, other)]
        found += _difference(f"{'held-out' if name == 'accuracy' else name} accuracy after", base, other, *scores)
    for key in dict.fromkeys(key for record in base.records for key in _evaluations(record)):
        scores = [[_evaluations(record).get(key) for record in group.records] for group in (base, other)]
        found += _difference(", ".join(key), base, other, *scores)
    return found


def _after(group: Siblings, scoring: str) -> list[Scores | None]:
    """Of every run its scores after training; None where it is not complete."""
    return [
        _by_identity(record.samples["answers"], [row["after"][scoring] for row in record.samples["answers"]])
        if record.summary and all("after" in row for row in record.samples.get("answers", [{}]))
        else None
        for record in group.records
    ]


def _by_identity(rows: Sequence[dict], scores: Sequence[float]) -> Scores:
    identities = [row["identity"] for row in rows]
    return dict(zip(dict.fromkeys(identities), by_problem(scores, identities).tolist(), strict=True))


def _evaluations(record: Record) -> dict[tuple[str, ...], Scores]:
    """What `evaluate` measured, by what was asked in words."""
    found = {}
    for result in record.evaluations:
        for entry in result["results"]:
            key = (f"{entry['name']} ({entry['scoring']})", title(result))
            found[key] = _by_identity(result["problems"], problem_scores(result, entry["name"], entry["scoring"]))
    return found


def _difference(
    what: str, base: Siblings, other: Siblings, before: Sequence[Scores | None], after: Sequence[Scores | None]
) -> list[Difference]:
    sides = [
        {seed: scores for seed, scores in zip(_seeds(group), found, strict=True) if scores is not None}
        for group, found in ((base, before), (other, after))
    ]
    asked = [scores.keys() for side in sides for scores in side.values()]
    if not all(sides) or any(keys != asked[0] for keys in asked):
        return []
    common = [seed for seed in sides[0] if seed in sides[1]]
    if len(common) > 1:
        means = [[float(np.mean(list(side[seed].values()))) for seed in common] for side in sides]
        estimate = over_seeds(np.subtract(means[1], means[0]).tolist())
        how = f"paired by seed, {len(common)} seeds"
    else:
        problems = list(asked[0])
        averaged = [
            np.array([np.mean([scores[problem] for scores in side.values()]) for problem in problems]) for side in sides
        ]
        estimate = paired_difference(*averaged)
        how = f"paired by problem, {len(problems)} problems"
    return [Difference(what, other.label, estimate.value, estimate.low, estimate.high, how)]


def _seeds(group: Siblings) -> list[int]:
    """Seeds, or places where runs have none."""
    return [record.settings.get("seed", place) for place, record in enumerate(group.records)]
