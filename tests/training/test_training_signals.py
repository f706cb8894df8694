"""Signals of users: what they may return, what is refused in a sentence, and what they are found to read."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.training import Trainer
from jaxrl_llm.training.text.signals import recipe_signal
from jaxrl_llm.training.text.signals import returned
from jaxrl_llm.training.text.signals import sound_advantages
from jaxrl_llm.training.text.signals import user_signal
from jaxrl_llm.trajectory import Actions
from jaxrl_llm.trajectory import Trajectories

RECIPE = get_recipe("dapo")


def batch(rows: int = 4) -> tuple[Trajectories, Actions]:
    """Rows of a prompt token and up to four chosen ones, in two steps; the returns are 0, 1, 2, .."""
    lengths = np.arange(rows) % 4 + 1
    chosen = (np.arange(5) >= 1) & (np.arange(5) <= lengths[:, None])
    steps = np.where(chosen, (np.arange(5) >= 3).astype(np.int32), np.int32(-1))
    rewards = np.zeros(chosen.shape, np.float32)
    rewards[np.arange(rows), lengths] = np.arange(rows)
    ids = np.where(chosen, np.int32(0), np.int32(-1))
    real = chosen | (np.arange(5) == 0)
    ended, log_probs = np.ones(rows, bool), np.where(chosen, np.float32(-1), np.float32(0))
    tokens, groups = np.full(chosen.shape, 7, np.int32), np.arange(rows, dtype=np.int32) // 2
    made = Trajectories(tokens, real, chosen, groups, rewards, log_probs, steps, ids, ids, ended)
    return made, Actions.of(made)


def advantages(function, *, sound=None, per_sequence=False, **scored):
    trajectories, actions = batch()
    sound = np.ones(4, bool) if sound is None else sound
    signal = user_signal(function, RECIPE)
    scored = {"log_prob_old": np.full(actions.mask.shape, -1.0, np.float32), "values": None} | scored
    return sound_advantages(signal, trajectories, actions, scored, sound, per_sequence=per_sequence), actions.mask


def test_one_advantage_per_row_goes_to_each_of_its_tokens() -> None:
    (given, weights, targets), mask = advantages(lambda x: x.rewards - 1)
    np.testing.assert_array_equal(given, np.where(mask, np.arange(4)[:, None] - 1.0, 0))
    np.testing.assert_array_equal(weights, mask)
    assert targets is None


def test_one_per_token_and_weights_of_either_shape() -> None:
    def of_tokens(x):
        return jnp.where(x.response_mask, x.step_ids + 1.0, jnp.nan), x.rewards

    (given, weights, _), mask = advantages(of_tokens)
    assert given[3].tolist() == [1, 1, 2, 2]
    assert not given[~mask].any(), "what stands outside the mask is not looked at"
    np.testing.assert_array_equal(weights, np.where(mask, np.arange(4)[:, None], 0))
    (_, weights, _), mask = advantages(lambda x: (x.rewards, jnp.full(x.response_mask.shape, 0.5)))
    np.testing.assert_array_equal(weights, 0.5 * mask)
    (given, *_), _ = advantages(lambda x: np.asarray(x.rewards).tolist())
    assert given[2, 0] == 2


def test_rows_that_are_not_sound_are_not_seen() -> None:
    seen = []

    def signal(x):
        seen.append(np.asarray(x.rewards).tolist())
        return x.rewards

    (given, weights, _), _ = advantages(signal, sound=np.array([True, False, True, False]))
    assert seen[-1] == [0, 2]
    assert given[:, 0].tolist() == [0, 0, 2, 0]
    assert weights[:, 0].tolist() == [1, 0, 1, 0]


def fails_later(x):
    """Sound on the small batch that is tried first, which has three columns."""
    if x.response_mask.shape[1] == 4:
        raise KeyError("letters")
    return x.rewards


def broken_later(x):
    bad = x.response_mask.shape[1] == 4
    return jnp.where(x.rewards == 2, jnp.nan, x.rewards) if bad else x.rewards


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda x: None, "advantages have shape"),
        (lambda x: x.rewards[:-1], r"advantages have shape \(3,\); it must be \(4,\) or \(4, 3\)"),
        (lambda x: x.response_mask.T, r"have shape \(3, 4\)"),
        (lambda x: "up", "advantages are str; they must be numbers"),
        (lambda x: (x.rewards, x.rewards, x.rewards), "returned 3 things"),
        (lambda x: (x.rewards, -x.rewards), "gave negative weights; they must be at least 0"),
        (lambda x: (x.rewards, x.rewards[:2]), r"weights have shape \(2,\)"),
        (lambda x: x.rewards / x.nothing, "AttributeError: .*nothing"),
        (lambda x: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_advantages_is_refused_before_anything_is_computed(function, sentence) -> None:
    function.__name__ = "mine"
    with pytest.raises(ValueError, match=f"The signal 'mine' fails on a small batch: .*{sentence}"):
        user_signal(function, RECIPE)


def test_what_goes_wrong_later_names_the_signal_and_the_row() -> None:
    with pytest.raises(ValueError, match=r"the signal 'fails_later' fails on a batch of 4 rows: KeyError: 'letters'"):
        advantages(fails_later)
    with pytest.raises(
        ValueError, match=r"the signal 'broken_later' gave row 2 an advantage that is not finite \(3 tok"
    ):
        advantages(broken_later)
    with pytest.raises(ValueError, match="gave row 3 an advantage that is not finite"):
        advantages(lambda x: (x.rewards, jnp.where(x.rewards == 3, jnp.inf, 1.0)))


def test_a_loss_of_sequences_takes_no_signal_of_tokens() -> None:
    def of_tokens(x):
        return x.rewards[:, None] * x.response_mask

    with pytest.raises(ValueError, match=r"'of_tokens' gives one advantage per token, and the objective reads one per"):
        advantages(of_tokens, per_sequence=True)
    with pytest.raises(ValueError, match="gives one advantage per token"):
        advantages(lambda x: (x.rewards, x.response_mask.astype(float)), per_sequence=True)
    advantages(lambda x: (x.rewards, x.rewards), per_sequence=True)


@pytest.mark.parametrize(
    ("function", "needs"),
    [
        (lambda x: x.rewards, set()),
        (lambda x: jnp.zeros(len(x.rewards)), set()),
        (lambda x: x.rewards[:, None] - x.values, {"values"}),
        (lambda x: x.rewards if x.values is None else x.rewards + x.values[:, 0], {"values"}),
        (lambda x: x.log_prob_old - x.log_prob_ref, {"log_prob_ref"}),
        (lambda x: -x.kl_ref_t, {"kl_ref_t"}),
        (lambda x: x.rewards[:, None] * x.entropy / x.collision, {"entropy", "collision"}),
        (lambda x: x.values * 0 + x.log_prob_behaviour, {"values"}),
    ],
)
def test_what_a_signal_reads_is_seen(function, needs) -> None:
    signal = user_signal(function, RECIPE)
    assert signal.needs == needs
    assert (signal.targets is not None) == ("values" in needs)


def test_a_recipe_without_a_rule_needs_a_signal() -> None:
    given = dataclasses.replace(RECIPE, advantage="given")
    with pytest.raises(ValueError, match="takes advantages as given; pass a signal"):
        recipe_signal(given)
    assert recipe_signal(get_recipe("empg")).needs == {"entropy"}


def test_a_trainer_makes_what_the_signal_reads_and_nothing_else(tiny_run) -> None:
    settings = tiny_run.SETTINGS
    _, collector = tiny_run.make_trainer(tiny_run.make_parts())
    for signal, critic, reference, collision in (
        (lambda x: x.rewards, False, False, False),
        (lambda x: x.rewards[:, None] - x.values, True, False, False),
        (lambda x: x.rewards[:, None] - x.kl_ref_t, False, True, False),
        (lambda x: x.rewards[:, None] * x.collision, False, False, True),
    ):
        trainer = Trainer(tiny_run.make_parts(signal=signal), settings, collector.shape)
        assert (trainer.critic is not None, trainer.reference is not None) == (critic, reference)
        assert ("collision" in trainer.signal.needs) == collision


def test_weights_multiply_the_loss(tiny_run) -> None:
    """A signal with weights learns as one whose advantages were multiplied, and a weight of 0 learns nothing."""

    def weighed(x):
        return x.rewards - 0.3, 0.5 + x.rewards

    def multiplied(x):
        return (x.rewards - 0.3) * (0.5 + x.rewards)

    found = []
    for signal in (weighed, multiplied):
        trainer, collector = tiny_run.make_trainer(tiny_run.make_parts(signal=signal))
        state = trainer.initial_state()
        prepared = trainer.prepare(state, 0, tiny_run.collected(trainer, collector, state))
        found.append(np.asarray(prepared.batch.advantages))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    assert np.abs(found[0]).max() > 0.1
    assert returned((np.ones(2), 0.0), (2, 3))[1].tolist() == [[0, 0, 0], [0, 0, 0]]
