"""Actor-critics in games: targets against plain sums, games that end within rows, replay, runs that go on, refusals."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.environments.pixels import Answer
from jaxrl_llm.environments.pixels import HostAnswer
from jaxrl_llm.training import ChangedSettingsError
from jaxrl_llm.training import NonFiniteError
from jaxrl_llm.training import OptimizerSettings
from jaxrl_llm.training import state_hash
from jaxrl_llm.training.control import METHODS
from jaxrl_llm.training.control import ActorCritic
from jaxrl_llm.training.control import ControlSettings
from jaxrl_llm.training.control import GameTrainer
from jaxrl_llm.training.control import HostTrainer
from jaxrl_llm.training.control import Method
from jaxrl_llm.training.control import train
from jaxrl_llm.training.control.learner import Learner
from jaxrl_llm.training.control.methods import policy_loss
from jaxrl_llm.training.control.rollouts import Rollout
from jaxrl_llm.training.control.rollouts import draw
from jaxrl_llm.training.control.rollouts import empty_replay
from jaxrl_llm.training.control.rollouts import remember
from jaxrl_llm.training.control.rollouts import take

LENGTH = 5
SMALL = ControlSettings(
    method=METHODS["kl"],
    games=8,
    steps=4,
    iterations=4,
    reuse=2,
    replay=2,
    minibatches=2,
    torso="mlp",
    width=8,
    measured=True,
)


class Corridor:
    """Walk right for five steps to be paid 1 (or `paid`); a step left ends the game."""

    def __init__(self, actions=("left", "right"), paid=1.0):
        self.actions, self.paid = actions, paid

    name, observation_shape = "corridor", (LENGTH,)

    def reset(self, key):
        return jnp.zeros((), jnp.int32), jax.nn.one_hot(0, LENGTH)

    def step(self, key, state, action):
        place = state + 1
        won, lost = (action == 1) & (place == LENGTH), action != 1
        over = won | lost
        after = jnp.where(over, 0, place)
        reward = jnp.where(won, jnp.float32(self.paid), 0.0)
        return after, Answer(jax.nn.one_hot(after, LENGTH), reward, over, jnp.zeros((), bool))


class HostCorridor:
    """The same on the host, many at once: a step after the end begins anew."""

    def __init__(self, count=8):
        self.count, self.seeds = count, []

    name, actions, observation_shape = "host corridor", ("left", "right"), (LENGTH,)

    def reset(self, seed):
        self.seeds.append(seed)
        self.place, self.over = np.zeros(self.count, int), np.zeros(self.count, bool)
        return self._shown()

    def _shown(self):
        return (np.eye(LENGTH)[np.minimum(self.place, LENGTH - 1)] * 255).astype(np.uint8)

    def step(self, actions):
        real = ~self.over
        self.place = np.where(real, self.place + 1, 0)
        won = real & (actions == 1) & (self.place == LENGTH)
        self.over = real & (won | (actions != 1))
        scores = np.where(self.over, won.astype(float), np.nan)
        return HostAnswer(self._shown(), won.astype(np.float32), self.over, np.zeros_like(real), real, scores)

    def close(self):
        pass


def drawn(rows=3, steps=6, seed=0):
    """A batch in which games end and are cut off within rows."""
    rng = np.random.default_rng(seed)
    over, cut = rng.random((rows, steps)) < 0.25, rng.random((rows, steps)) < 0.2
    cut &= ~over
    return Rollout(
        shown=rng.normal(size=(rows, steps + 1, LENGTH)).astype(np.float32),
        began=np.concatenate([np.ones((rows, 1), bool), over | cut], axis=1),
        action=rng.integers(0, 2, (rows, steps)),
        log_prob=np.log(rng.uniform(0.2, 0.9, (rows, steps))).astype(np.float32),
        reward=rng.normal(size=(rows, steps)).astype(np.float32),
        discount=np.where(over | cut, 0.0, 0.9).astype(np.float32),
        cut=cut,
        real=rng.random((rows, steps)) < 0.85,
        memory=(),
    )


def plain_targets(rollout, ratio, values, trace, cap):
    """V-trace, its advantage and the divergence by double sums over the rest of each game, step by step."""
    goal, charge, gain = (np.zeros(rollout.reward.shape) for _ in range(3))
    for row in range(len(goal)):
        steps = np.flatnonzero(rollout.real[row])
        following = [*values[row, steps[1:]], values[row, -1]]
        weight = np.where(rollout.cut[row, steps], 0.0, ratio[row, steps])
        discount, reward, value = rollout.discount[row, steps], rollout.reward[row, steps], values[row, steps]
        delta = np.minimum(weight, 1) * (reward + discount * following - value)
        phi = np.log(ratio[row, steps])
        for t in range(len(steps)):
            for u in range(t, len(steps)):
                traced = np.prod([discount[j] * min(trace, weight[j]) for j in range(t, u)])
                goal[row, steps[t]] += traced * delta[u]
                if u == t:
                    charge[row, steps[t]] += phi[t]
                else:
                    seen = np.prod([min(cap, weight[j]) for j in range(t + 1, u)]) * np.prod(discount[t:u])
                    charge[row, steps[t]] += seen * min(1, weight[u]) * phi[u]
            goal[row, steps[t]] += value[t]
        later = [*goal[row, steps[1:]], values[row, -1]]
        gain[row, steps] = reward + discount * later - value
    return goal, charge, gain


@pytest.mark.parametrize("cap", [0.0, 1.0])
def test_targets_are_the_sums_of_their_games(cap):
    settings = dataclasses.replace(SMALL, method=dataclasses.replace(METHODS["kl"], divergence_trace=cap))
    rollout, learner = drawn(), Learner((LENGTH,), 2, settings)
    rng = np.random.default_rng(1)
    log_prob = np.log(rng.uniform(0.2, 0.9, rollout.reward.shape)).astype(np.float32)
    values = rng.normal(size=rollout.began.shape).astype(np.float32)
    targets = learner.targets(jax.tree.map(jnp.asarray, rollout), jnp.asarray(log_prob), jnp.asarray(values))
    goal, charge, gain = plain_targets(rollout, np.exp(log_prob - rollout.log_prob), values, settings.trace, cap)
    real = rollout.real
    np.testing.assert_allclose(np.asarray(targets.value)[real], goal[real], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(targets.divergence)[real], charge[real], rtol=2e-4, atol=1e-5)
    learned = real & ~rollout.cut
    scale = np.sqrt(np.mean(gain[learned] ** 2))
    assert float(targets.scale) == pytest.approx(scale, rel=1e-4)
    np.testing.assert_allclose(np.asarray(targets.advantage)[learned], gain[learned] / scale, rtol=2e-4, atol=1e-5)
    # A step that was cut off is its own target, and a wrong sign would be seen.
    cut = real & rollout.cut
    assert cut.any()
    np.testing.assert_allclose(np.asarray(targets.value)[cut], values[:, :-1][cut], rtol=1e-5)
    assert np.abs(charge[real]).max() > 0.1


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def decided(params):
    """A network with larger logits than a new one has, so that ratios and entropies are no constants."""
    params.policy.kernel[...] = 150 * params.policy.kernel[...]
    return params


@pytest.mark.parametrize("name", ["kl", "ppo"])
def test_the_loss_and_its_metrics_by_hand(name):
    rollout, settings = drawn(), dataclasses.replace(SMALL, method=METHODS[name], entropy=0.3, value=0.7)
    learner = Learner((LENGTH,), 2, settings)
    params = decided(learner.init(jax.random.key(1)).params)
    loss, metrics = learner.loss(params, jax.tree.map(jnp.asarray, rollout))
    logits, values = (np.asarray(x) for x in learner.forward(params, rollout.shown, rollout.began, ())[:2])
    log_all = log_softmax(logits[:, :-1])
    log_prob = np.take_along_axis(log_all, rollout.action[..., None], 2)[..., 0]
    ratio = np.exp(log_prob - rollout.log_prob)
    goal, charge, gain = plain_targets(rollout, ratio, values, settings.trace, settings.method.divergence_trace)
    learned = rollout.real & ~rollout.cut
    gain = gain / np.sqrt(np.mean(gain[learned] ** 2))
    if name == "kl":
        policy = -ratio * (gain - charge)
        assert np.abs(charge[learned]).mean() > 0.1
    else:
        policy = -np.minimum(ratio * gain, np.clip(ratio, 0.8, 1.2) * gain)
    error, entropy = np.square(values[:, :-1] - goal) / 2, -(np.exp(log_all) * log_all).sum(-1)
    parts = {"policy_loss": policy, "value_loss": error, "entropy": entropy}
    for part, values in parts.items():
        assert float(metrics[part]) == pytest.approx(values[learned].mean(), rel=1e-3)
    # Large enough parts that none is lost in the others.
    assert min(abs(values[learned].mean()) for values in parts.values()) > 0.02 * float(abs(loss))
    assert float(loss) == pytest.approx((policy + 0.7 * error - 0.3 * entropy)[learned].mean(), rel=1e-4)
    rho = ratio[learned]
    assert float(metrics["kl"]) == pytest.approx(np.mean(rho - 1 - np.log(rho)), rel=1e-3)
    assert float(metrics["effective_share"]) == pytest.approx(rho.sum() ** 2 / (rho.size * (rho**2).sum()), rel=1e-3)


def test_what_is_measured_of_a_policy_and_the_one_before():
    rollout, learner = drawn(), Learner((LENGTH,), 2, SMALL)
    params, before = (decided(learner.init(jax.random.key(k)).params) for k in (1, 2))
    found = learner.measure(params, before, jax.tree.map(jnp.asarray, rollout))
    (new, own), (old, other) = (learner.forward(p, rollout.shown, rollout.began, ())[:2] for p in (params, before))
    new, old = (log_softmax(np.asarray(logits)[:, :-1]) for logits in (new, old))
    learned = rollout.real & ~rollout.cut
    forward = (np.exp(new) * (new - old)).sum(-1)[learned].mean()
    assert float(found["occupancy_divergence"]) == pytest.approx(forward, rel=1e-3)
    # The other way round is another number.
    assert abs((np.exp(old) * (old - new)).sum(-1)[learned].mean() - forward) > 0.01
    apart = np.abs(np.exp(new) - np.exp(old)).sum(-1)[learned].mean() / 2
    assert float(found["occupancy_tv"]) == pytest.approx(apart, rel=1e-3)
    for name, values in (("surprise", np.asarray(own)), ("surprise_before", np.asarray(other))):
        difference = rollout.reward + rollout.discount * values[:, 1:] - values[:, :-1]
        assert float(found[name]) == pytest.approx(difference[learned].mean(), rel=1e-3)


def test_nothing_is_learned_from_steps_that_were_not_taken_or_cut_off():
    rollout = jax.tree.map(jnp.asarray, drawn())
    learner = Learner((LENGTH,), 2, SMALL)
    params = learner.init(jax.random.key(0)).params
    idle = ~rollout.real | rollout.cut
    wild = rollout._replace(
        reward=jnp.where(idle, 1e6, rollout.reward), action=jnp.where(idle, 1 - rollout.action, rollout.action)
    )
    slopes = [jax.grad(learner.loss, has_aux=True)(params, some)[0] for some in (rollout, wild)]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), *slopes)))
    moved = rollout._replace(reward=rollout.reward + 1.0)
    other = jax.grad(learner.loss, has_aux=True)(params, moved)[0]
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b)), slopes[0], other)))


@pytest.mark.parametrize(("places", "reuse"), [(1, 3), (4, 8), (4, 2)])
def test_every_game_is_used_as_often_as_said(places, reuse):
    games, size, batches = 6, 3, 24
    rollout = jax.tree.map(jnp.asarray, drawn(rows=games))
    replay = empty_replay(rollout, places)
    used = np.zeros((batches, games))
    for number in range(batches):
        # The reward says which batch and which game it is.
        mark = jnp.full(rollout.reward.shape, 100.0 * number) + jnp.arange(games)[:, None]
        replay = remember(replay, rollout._replace(reward=mark))
        place, row = draw(replay, jax.random.key(number), reuse=reuse, size=size)
        assert place.shape == (reuse * games // size, size)
        read = np.asarray(take(replay, place.ravel(), row.ravel()).reward[:, 0]).astype(int)
        assert read.min() // 100 >= max(0, number - places + 1)
        np.add.at(used, (read // 100, read % 100), 1)
    assert used.sum() == batches * reuse * games
    whole = used[places : batches - places]
    if reuse % places == 0:
        assert (whole == reuse).all()
    else:
        assert abs(whole.mean() - reuse) < 0.25 * reuse


def test_the_loss_of_every_method():
    log_prob, log_old = jnp.log(jnp.array([[0.6, 0.2, 0.5]])), jnp.log(jnp.array([[0.3, 0.4, 0.45]]))
    ratio, gains = jnp.exp(log_prob - log_old), jnp.array([[2.0, -1.0, 3.0]])
    by_hand = {
        "clipped": -jnp.minimum(ratio * gains, jnp.clip(ratio, 0.8, 1.2) * gains),
        "importance_weighted": -ratio * gains,
        "truncated": -jnp.minimum(ratio, 1) * gains * log_prob,
    }
    for method in METHODS.values():
        np.testing.assert_allclose(policy_loss(method, log_prob, ratio, gains), by_hand[method.surrogate], rtol=1e-5)


@pytest.mark.parametrize("name", ["ppo", "vtrace", "kl"])
def test_methods_learn_the_corridor(name):
    settings = dataclasses.replace(
        SMALL,
        method=METHODS[name],
        steps=16,
        iterations=30,
        reuse=4,
        entropy=0.0,
        measured=False,
        optimizer=OptimizerSettings(learning_rate=1e-2, epsilon=1e-5, max_grad_norm=0.5),
    )
    metrics = train(GameTrainer(Corridor(), settings), [0], every=30).metrics
    share = metrics["returns"].sum(0) / np.maximum(metrics["ended"].sum(0), 1)
    assert share[:2].mean() < 0.2
    assert share[-5:].mean() > 0.8


class Stopped(Exception):
    pass


def stop_at(share):
    def say(said):
        if said == share:
            raise Stopped

    return say


@pytest.mark.parametrize("memory", [0, 4])
def test_a_run_goes_on_to_the_bit(tmp_path, memory):
    trainer = GameTrainer(Corridor(), dataclasses.replace(SMALL, memory=memory))
    whole = train(trainer, [0, 1], every=2)
    with pytest.raises(Stopped):
        train(trainer, [0, 1], every=2, folder=tmp_path, say=stop_at("50%"))
    again = train(trainer, [0, 1], every=2, folder=tmp_path)
    assert state_hash(again.state) == state_hash(whole.state)
    for name, values in whole.metrics.items():
        np.testing.assert_array_equal(again.metrics[name], values)


def test_seeds_are_runs_of_their_own():
    trainer = GameTrainer(Corridor(), SMALL)
    together, alone = train(trainer, [3, 5], every=4), train(trainer, [5], every=4)
    np.testing.assert_allclose(together.metrics["loss"][1], alone.metrics["loss"][0], rtol=1e-4, atol=1e-6)


def test_another_game_another_action_or_another_setting_is_refused(tmp_path):
    train(GameTrainer(Corridor(), SMALL), [0], every=4, folder=tmp_path)
    others = {
        "actions": GameTrainer(Corridor(actions=("left", "right", "wait")), SMALL),
        "reuse": GameTrainer(Corridor(), dataclasses.replace(SMALL, reuse=4)),
    }
    for name, trainer in others.items():
        with pytest.raises(ChangedSettingsError, match=rf"\n  {name}: "):
            train(trainer, [0], every=4, folder=tmp_path)
    trainer = GameTrainer(Corridor(), SMALL)
    with pytest.raises(ChangedSettingsError, match=r"\n  seeds: \[0\] -> \[1\]"):
        train(trainer, [1], every=4, folder=tmp_path)
    with pytest.raises(ChangedSettingsError, match=r"\n  every: 4 -> 2"):
        train(trainer, [0], every=2, folder=tmp_path)


def test_whole_games_are_played_to_their_end():
    trainer = GameTrainer(Corridor(), dataclasses.replace(SMALL, games=64))
    learning = trainer.init(jnp.arange(2)).learning
    # All weights zero, all actions as probable: five steps right are one game in 32.
    nothing = learning._replace(params=jax.tree.map(jnp.zeros_like, learning.params))
    chance = np.asarray(trainer.play_whole(nothing, jax.random.key(0), limit=10))
    assert chance.shape == (2, 64)
    assert set(np.unique(chance)) <= {0.0, 1.0}
    assert chance.mean() < 0.15
    # A policy that always goes right wins each, once, whatever comes after.
    params = nothing.params
    params.policy.bias[...] = jnp.tile(jnp.array([-50.0, 50.0]), (2, 1))
    assert (trainer.play_whole(nothing._replace(params=params), jax.random.key(0), limit=10) == 1).all()
    assert (trainer.play_whole(nothing._replace(params=params), jax.random.key(0), limit=4) == 0).all()


class Broken(HostCorridor):
    """Its simulator fails in the second batch."""

    steps = 0

    def step(self, actions):
        self.steps += 1
        if self.steps > 6:
            raise RuntimeError("the simulator is gone")
        return super().step(actions)


def test_a_simulator_that_fails_is_heard():
    with pytest.raises(RuntimeError, match="the simulator is gone"):
        train(HostTrainer(Broken(), SMALL), [0], every=4)


def test_a_reward_that_is_no_number_stops_the_run(tmp_path):
    broken = Corridor(paid=float("nan"))
    settings = dataclasses.replace(SMALL, games=32, steps=32, iterations=2)
    with pytest.raises(NonFiniteError, match=r"In iteration 1 of corridor \(seed 7\) .*no checkpoint was saved yet"):
        train(GameTrainer(broken, settings), [7], every=1, folder=tmp_path)


def test_games_on_the_host_are_learned_and_go_on_to_the_bit(tmp_path):
    settings = dataclasses.replace(
        SMALL, iterations=24, steps=16, reuse=4, optimizer=OptimizerSettings(learning_rate=1e-2, epsilon=1e-5)
    )
    whole = train(HostTrainer(HostCorridor(), settings), [0], every=8)
    with pytest.raises(Stopped):
        train(HostTrainer(HostCorridor(), settings), [0], every=8, folder=tmp_path, say=stop_at("67%"))
    game = HostCorridor()
    again = train(HostTrainer(game, settings), [0], every=8, folder=tmp_path)
    assert state_hash(again.state) == state_hash(whole.state)
    np.testing.assert_array_equal(again.metrics["returns"], whole.metrics["returns"])
    assert len(set(game.seeds)) == 1
    share = whole.metrics["returns"][0] / np.maximum(whole.metrics["ended"][0], 1)
    assert share[:2].mean() < 0.3
    assert share[-4:].mean() > 0.7
    with pytest.raises(ValueError, match="one at a time"):
        train(HostTrainer(HostCorridor(), settings), [0, 1], every=8)
    with pytest.raises(ValueError, match=r"games is 8, and 3 are played"):
        HostTrainer(HostCorridor(3), settings)


class Wanted(NamedTuple):
    """A torso and what it reads."""

    torso: str
    shape: tuple[int, ...]


@pytest.mark.parametrize(
    "wanted",
    [Wanted("minatar", (10, 10, 4)), Wanted("nature", (36, 36, 1)), Wanted("small", (20, 20, 2)), Wanted("mlp", (7,))],
)
@pytest.mark.parametrize("memory", [0, 6])
def test_networks_read_rows_as_they_read_steps(wanted, memory):
    from flax import nnx

    network = ActorCritic(wanted.shape, 3, torso=wanted.torso, width=8, memory=memory, rngs=nnx.Rngs(0))
    shown = jax.random.uniform(jax.random.key(0), (2, 4, *wanted.shape))
    began = jnp.array([[True, False, True, False], [True, False, False, False]])
    logits, values, last = network(shown, began, network.start(2))
    carried, rows = network.start(2), []
    for t in range(4):
        one, _, carried = network(shown[:, t : t + 1], began[:, t : t + 1], carried)
        rows.append(one[:, 0])
    np.testing.assert_allclose(logits, jnp.stack(rows, axis=1), rtol=1e-4, atol=1e-5)
    assert values.shape == (2, 4)
    for one, other in zip(last, carried, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    if memory:
        # What was before a game counts for nothing in it.
        shuffled, _, _ = network(shown.at[0, :2].set(0.0), began, network.start(2))
        np.testing.assert_allclose(shuffled[0, 2:], logits[0, 2:], rtol=1e-4, atol=1e-5)
        assert not np.allclose(shuffled[0, :2], logits[0, :2])


@pytest.mark.parametrize("by_index", [False, True])
def test_a_convolution_is_that_of_jax(by_index):
    from flax import nnx

    from jaxrl_llm.training.control.networks import Convolution

    layer = Convolution(3, 5, size=4, stride=2, by_index=by_index, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 11, 9, 3))
    kernel = layer.linear.kernel[...].reshape(4, 4, 3, 5)
    expected = jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(layer(x), jax.nn.relu(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reuse": 0}, "reuse is 0; it must be 1 or more"),
        ({"games": 6, "minibatches": 4}, "games is 6 and minibatches 4"),
        ({"discount": 1.5}, "discount is 1.5"),
        ({"entropy": -1.0}, "entropy is -1.0"),
        ({"value": float("nan")}, "value is nan"),
    ],
)
def test_settings_that_cannot_be(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(SMALL, **changes)


def test_methods_and_torsos_that_are_not_there():
    with pytest.raises(ValueError, match="divergence"):
        Method("mine", divergence="wasserstein")
    with pytest.raises(ValueError, match="coefficient is -1"):
        Method("mine", coefficient=-1.0)
    with pytest.raises(ValueError, match="torso is 'vit'"):
        Learner((4,), 2, dataclasses.replace(SMALL, torso="vit"))
    with pytest.raises(ValueError, match="height, width and channels"):
        Learner((4,), 2, dataclasses.replace(SMALL, torso="nature"))
    with pytest.raises(ValueError, match="larger pictures than 20 x 20"):
        Learner((20, 20, 1), 2, dataclasses.replace(SMALL, torso="nature"))
