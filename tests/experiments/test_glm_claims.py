"""Claims of GLM-4.5 in small: texts and rewards by hand, effects and verdicts from known numbers, the tiny twin."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import glm_claims as study
from experiments.claims import courses
from experiments.claims.numbers import rows
from experiments.claims.numbers import verdict
from experiments.claims.optimisers import falling
from experiments.claims.optimisers import saved
from experiments.claims.pretraining import BINS
from experiments.claims.pretraining import draft_statistics
from experiments.claims.reinforcement import judged
from experiments.claims.text import END
from experiments.claims.text import EQUALS
from experiments.claims.text import FIRST_LETTER
from experiments.claims.text import FIRST_NUMBER
from experiments.claims.text import NUMBERS
from experiments.claims.text import PAD
from experiments.claims.text import VOCABULARY
from experiments.claims.text import all_problems
from experiments.claims.text import counting_text
from experiments.claims.text import draw_language
from experiments.claims.text import draw_problems
from experiments.claims.text import letters_text
from experiments.cli import main
from experiments.lab.numbers import Interval
from experiments.run_folder import RunFolder
from experiments.study import read_results
from jaxrl_llm.rollouts.generate import Rollout

LONGEST = 5


def answer_of(prompt):
    """The steps and the end, as tokens."""
    start, stride, times = prompt[0] - FIRST_NUMBER, prompt[1] - FIRST_LETTER + 1, prompt[2] - FIRST_LETTER - 3
    return [(start + stride * (count + 1)) % NUMBERS + FIRST_NUMBER for count in range(times)] + [END]


def test_problems_are_answered_step_by_step(key):
    drawn = jax.device_get(draw_problems(key, 60, longest=LONGEST))
    assert set(drawn.times) == {1, 2, 3, 4}
    assert len(set(drawn.prompt[:, 1])) == 4
    for prompt, answer, answered, times, result in zip(*drawn, drawn.result, strict=True):
        wanted = answer_of(prompt)
        assert prompt[3] == EQUALS
        assert answer[answered].tolist() == wanted
        assert (answer[~answered] == PAD).all()
        assert (len(wanted), wanted[-2]) == (times + 1, result)


def test_every_problem_is_there_once():
    drawn = jax.device_get(all_problems(longest=LONGEST))
    assert len({tuple(prompt) for prompt in drawn.prompt.tolist()}) == len(drawn.prompt) == 16 * 4 * (LONGEST - 1)
    for prompt, answer, answered in zip(*drawn[:3], strict=True):
        assert answer[answered].tolist() == answer_of(prompt)


def test_texts_have_no_holes_and_read_as_problems(key):
    text = jax.device_get(counting_text(key, 3, 33, longest=LONGEST))
    assert text.shape == (3, 33)
    for row in text.tolist():
        assert PAD not in row
        assert END in row
        while END in row:
            one, row = row[: row.index(END) + 1], row[row.index(END) + 1 :]
            assert one[4:] == answer_of(one)


def test_letters_follow_the_two_before_them(key):
    language = jnp.where(jnp.arange(12) == (jnp.arange(12)[:, None, None] + jnp.arange(12)[:, None]) % 12, 50.0, 0.0)
    text = jax.device_get(letters_text(key, language, 2, 9)) - FIRST_LETTER
    np.testing.assert_array_equal(text[:, 2:], (text[:, :-2] + text[:, 1:-1]) % 12)
    assert VOCABULARY == FIRST_LETTER + 12
    entropy = -np.sum(jax.nn.softmax(draw_language(key)) * jax.nn.log_softmax(draw_language(key)), axis=-1)
    assert entropy.min() < 0.3
    assert entropy.max() > 2.4


def test_only_an_ended_answer_with_the_result_last_earns_anything():
    three, four = FIRST_NUMBER + 3, FIRST_NUMBER + 4
    answers = [[three, four, END], [four, END, PAD], [END, PAD, PAD], [three, four, four], [four, three, END]]
    tokens = jnp.array([[EQUALS, *answer] for answer in answers])
    mask = (tokens != PAD) & (jnp.arange(4) > 0)
    nothing = jnp.zeros(tokens.shape)
    rollout = Rollout(tokens, tokens != PAD, mask, nothing, jnp.arange(5))
    result = jnp.full(5, four)
    assert judged(rollout, result, 3, 3).rewards.tolist() == [1, 1, 0, 0, 0]
    cut = judged(rollout, result, 3, 2)
    assert cut.rewards.tolist() == [0, 1, 0, 0, 0]
    assert cut.mask.sum(1).tolist() == [2, 2, 1, 2, 2]


def test_acceptance_is_the_common_mass_and_its_slope_that_of_a_line():
    rng = np.random.default_rng(0)
    logits, drafts = rng.normal(scale=2.0, size=(2, 2, 40, 7))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, drafts))
    common, entropy = np.minimum(p, q).sum(-1).ravel(), -(p * np.log(p)).sum(-1).ravel()
    found = jax.device_get(draft_statistics(jnp.asarray(logits), jnp.asarray(drafts)))
    np.testing.assert_allclose(found["accepted"], common.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["slope"], np.polyfit(entropy, common, 1)[0], rtol=1e-4)
    where = np.minimum((entropy / np.log(NUMBERS) * BINS).astype(int), BINS - 1)
    for number in range(BINS):
        assert found["bin_tokens"][number] == (where == number).sum()
        if (where == number).any():
            np.testing.assert_allclose(found["bin_accepted"][number], common[where == number].mean(), rtol=1e-5)


def test_tokens_are_saved_where_the_same_loss_comes_sooner():
    budgets = np.array([100.0, 200.0, 400.0])
    ours, theirs = np.array([[3.0], [2.0], [1.0]]), np.array([[4.0], [3.0], [1.5]])
    np.testing.assert_allclose(saved(ours, theirs, budgets), [0.25])  # 1.5 is half of the way from 200 to 400
    np.testing.assert_allclose(saved(theirs, ours, budgets), [-0.25])
    np.testing.assert_allclose(saved(ours, ours, budgets), [0.0])
    bumpy = np.array([[3.0], [1.2], [1.4]])  # longer was worse: the shorter run already got there
    np.testing.assert_allclose(saved(bumpy, np.array([[4.0], [3.0], [1.4]]), budgets), [0.5 + 0.25 * 0.2 / 1.8])


def test_the_rate_rises_stays_and_falls():
    np.testing.assert_allclose(falling(2.0, 4, warmup=2, first=0), [1.0, 1.5, 1.0, 0.5])
    np.testing.assert_allclose(falling(2.0, 4, warmup=2, first=4), [2.0, 1.5, 1.0, 0.5])


def test_verdicts_are_by_the_side_of_the_interval():
    assert verdict(Interval(0.3, 0.2)) == "reproduced"
    assert verdict(Interval(-0.3, 0.2)) == "reversed"
    assert verdict(Interval(0.1, 0.2)) == verdict(Interval(0.0, 0.0)) == "not at this size"


def synthetic(settings, shift):
    """Parts of a run that was not made, in which every claim holds by `shift`."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 1, settings.seeds)

    def rewards(gain):
        return {"solved": 0.4 + 0.1 * noise + gain, "flips": np.full((settings.seeds, 4), 0.1)}

    def measured(gain):
        one = {"loss": 2 + noise - gain, "violation": 1 + noise - gain, "slope": -gain + 0.01 * (noise - 0.5)}
        one |= {"accepted": 0.8 + 0 * noise, "bin_tokens": np.ones((settings.seeds, BINS))}
        return one | {"bin_accepted": np.full((settings.seeds, BINS), 0.5)}

    adamw = {name: np.stack([x] * 3) for name, x in measured(shift).items()}
    losses = np.linspace(3, 2, settings.pieces - 1)[:, None] + noise
    kl = {"kl_own": np.full((settings.seeds, 4), 0.2) + shift, "kl_replayed": np.full((settings.seeds, 4), 0.2)}
    curriculum = {"switch_solved": 0.5 + noise + shift, "stay_solved": 0.5 + noise}
    curriculum |= {"moderate": np.full(settings.seeds, 9), "hard": np.full(settings.seeds, 4)}
    return {
        "adamw": adamw | {"best": np.array(1), "curve": losses},
        "muon": {"best": np.array(0), "curve": losses - shift},
        "none": measured(0.0),
        "loss": measured(0.0),
        "rounded": rewards(0.0) | kl,
        "replay": rewards(shift),
        "start": rewards(0.0),
        "token_mean": rewards(shift),
        "sequence_mean": rewards(0.0),
        "staged": rewards(0.0),
        "curriculum": curriculum,
        "dynamic": rewards(2 * shift) | {"temperature": np.ones((settings.seeds, 3))},
    }


def test_every_row_counts_on_the_side_of_its_claim():
    settings = study.SETTINGS
    for shift, name in ((0.1, "reproduced"), (-0.1, "reversed")):
        results = synthetic(settings, shift)
        found = rows(settings, results)
        assert {row.name: row.verdict for row in found} == dict.fromkeys([row.name for row in found], name)
        summary = study.EXPERIMENT.summarise(settings, results)
        assert summary[name] == len(found) == 10
        json.dumps(summary, allow_nan=False)
        page = study.EXPERIMENT.page(settings, results, summary)
        assert page.value == f"{10 * (shift > 0)} of 10"
        (section,) = page.sections
        assert section.table is not None
        assert all(len(row) == len(section.table.head) for row in section.table.rows)
        assert all(picture.svg.startswith("<?xml") for picture in section.pictures)
    none = synthetic(settings, 0.0)
    assert study.EXPERIMENT.summarise(settings, none)["not_at_this_size"] >= 9


class Fake:
    """Policies that are numbers: what a course asks for is written down."""

    def __init__(self, settings):
        self.settings, self.asked = settings, []
        self.problems = all_problems(longest=settings.longest)

    def plain(self):
        seeds = self.settings.seeds
        return courses.Course(jnp.ones(seeds), self.settings.longest, jnp.zeros((seeds, len(self.problems.times))))

    def train(self, learner, course, first):
        self.asked.append((first, course))
        return learner + 1, {"reward": np.full((self.settings.seeds, self.settings.chunk), 0.5)}

    def solve(self, learner, temperature, number):
        # Of four answers, problem 0 has two right, problem 1 none at first and some of many, the others none ever.
        right = np.zeros((self.settings.seeds, len(self.problems.times), 4))
        right[:, 0, :2] = 1.0
        right[:, 1, 0] = number > 300
        right *= 1.0 if temperature < 1.3 else 0.5
        return {"right": right, "length": np.zeros(self.settings.seeds)}


@pytest.fixture
def fake(monkeypatch):
    made = Fake(dataclasses.replace(study.TINY, chunks=4, temperatures=(1.0, 1.2, 1.5)))
    monkeypatch.setattr(courses, "reinforcement", lambda settings: made)
    monkeypatch.setattr(courses, "started", lambda settings: 0)
    return made


def test_stages_and_curriculum_change_half_way(fake):
    courses.staged_part(fake.settings)
    assert [(first, course.longest) for first, course in fake.asked] == [(0, 2), (2, 2), (4, 3), (6, 3)]
    fake.asked.clear()
    found = courses.curriculum_part(fake.settings)
    assert found["moderate"].tolist() == found["hard"].tolist() == [1, 1]
    asked = [(first, np.flatnonzero(np.isfinite(course.log_weights[0])).tolist()) for first, course in fake.asked]
    assert asked == [(0, [0]), (2, [0]), (4, [0]), (6, [0]), (4, [1]), (6, [1])]


def test_the_temperature_rises_to_the_largest_that_costs_nothing(fake):
    found = courses.temperature_part(fake.settings)
    # Windows of one step: after the first chunk of equal rewards there is a plateau.
    assert found["temperature"].tolist() == [[1.0, 1.2, 1.2, 1.2]] * 2


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"seeds": 1}, "--seeds is 1; it must be at least 2"),
        ({"width": 24}, "--width is 24; it must be a multiple of 16"),
        ({"longest": 10}, "--longest is 10; it must be at least 3 and at most 9"),
        ({"rl_rows": 12}, "--rl-rows is 12; it must be a multiple of --group-size 8"),
        ({"muon_rates": (0.1, 0.1)}, r"--muon-rates is \(0.1, 0.1\); it must be rising numbers"),
    ],
)
def test_settings_that_cannot_be(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        study.parts(dataclasses.replace(study.SETTINGS, **changed))


@pytest.mark.timeout(900)
def test_the_tiny_twin_from_end_to_end(tmp_path):
    assert main(["run", "glm_claims", "--tiny", "--id", "one", "--runs-folder", str(tmp_path)]) == 0
    folder = RunFolder(tmp_path / "glm_claims" / "one")
    results, summary = read_results(folder), json.loads(folder.summary.read_text())
    assert sum(summary[name] for name in ("reproduced", "not_at_this_size", "reversed")) == 10
    # Arms ask the same problems of the same policies, with the same random numbers.
    for name in ("sequence_mean", "dynamic"):
        for quantity in ("reward", "length"):
            plain, other = (results[arm][quantity][:, 0] for arm in ("token_mean", name))
            np.testing.assert_array_equal(plain, other)
    # Same sampler, same experts: what is compared differs in the experts alone.
    for quantity in ("kl_own", "kl_replayed", "flips"):
        plain, other = (results[arm][quantity][:, 0] for arm in ("rounded", "replay"))
        np.testing.assert_allclose(plain, other, rtol=1e-4)
    assert results["staged"]["length"][:, 0].max() <= 2
    assert results["adamw"]["loss"].shape == (1, 2)
    assert "Claims" in folder.report.read_text()
