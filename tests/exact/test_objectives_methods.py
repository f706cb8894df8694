"""What EMPG, vocabulary pruning and divergence augmentation do to the exact gradient, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import categorical
from jaxrl_llm.objectives import divergence_augmented as augmented
from jaxrl_llm.objectives import modulation
from jaxrl_llm.objectives import pruning
from jaxrl_llm.objectives.token_baseline import own_token_baseline
from theory_checks import token_trees as trees


class TestEntropyModulation:
    """Two trajectories of two steps: after the first choice the policy is certain on branch 0 and uncertain on branch
    1.
    """

    step_h = jnp.array([[0.5, 0.0], [0.5, 1.0]])
    steps = jnp.ones((2, 2), bool)

    def pull_towards_branch_one(self, returns, bonus, zeta):
        # Exact policy gradient of the root's log-odds at probability 1/2, up to the factor p (1 - p).
        return float(returns[1] - returns[0] + zeta * (bonus[1, 0] - bonus[0, 0]))

    def test_the_bonus_changes_which_branch_is_optimal(self):
        returns = jnp.array([0.5, 0.6])  # the uncertain branch is worth more
        normalised = modulation.normalised_entropy(self.step_h, self.steps)
        clarity = modulation.future_clarity(normalised, self.steps)
        assert self.pull_towards_branch_one(returns, clarity, 0.05) > 0
        assert self.pull_towards_branch_one(returns, clarity, 0.5) < 0

    def test_one_shaping_reward_alone_changes_it_as_well_and_its_sum_does_not(self):
        # (errata F4.3)
        returns = jnp.array([0.5, 0.6])
        potential = jnp.exp(-modulation.normalised_entropy(self.step_h, self.steps))
        shaped = modulation.potential_shaping(potential, self.steps)
        bonus = modulation.potential_bonus(potential, self.steps)
        assert self.pull_towards_branch_one(returns, shaped, 0.5) < 0
        for zeta in (0.05, 0.5, 50.0):
            np.testing.assert_allclose(self.pull_towards_branch_one(returns, bonus, zeta), 0.1, rtol=1e-9)
        np.testing.assert_allclose(bonus, shaped[:, ::-1].cumsum(1)[:, ::-1], atol=1e-12)

    def test_the_invariant_bonus_is_a_baseline_only_if_it_is_known_before_the_step(self):
        # (errata F4.3) a step of two tokens, or two steps of one, all four responses by enumeration
        root, later = jnp.array([0.3, -0.2]), jnp.array([[2.0, -2.0], [0.1, 0.0]])
        entropy = jnp.stack([jnp.broadcast_to(categorical.entropy(root), 2), categorical.entropy(later)], axis=1)
        entropy = jnp.repeat(entropy, 2, axis=0)  # rows: responses 00, 01, 10, 11
        law = (jax.nn.softmax(root)[:, None] * jax.nn.softmax(later)).reshape(-1)
        score = jax.jacobian(categorical.log_probs)(root)[jnp.array([0, 0, 1, 1])]
        every = jnp.ones((4, 2), bool)

        def pull(step_entropy, ids):
            step_ids = jnp.broadcast_to(jnp.array(ids), (4, 2))
            h, has = step_entropy(entropy, step_ids, every, steps=2)
            bonus = modulation.potential_bonus(jnp.exp(-h), has)
            return jnp.sum(law[:, None] * bonus[:, :1] * score, axis=0)

        np.testing.assert_allclose(pull(modulation.step_entropy, [0, 0]), [-0.0419, 0.0419], atol=5e-5)
        for step_entropy, ids in (
            (modulation.step_entropy, [0, 1]),
            (modulation.entropy_before_step, [0, 0]),
            (modulation.entropy_before_step, [0, 1]),
        ):
            np.testing.assert_allclose(pull(step_entropy, ids), [0, 0], atol=1e-15)

    def test_the_entropy_before_a_step_is_that_of_its_first_response_token(self):
        entropy = jnp.arange(1.0, 7.0)[None].at[0, 1].set(jnp.nan)
        mask = jnp.array([[True, False, True, True, True, True]])
        found = modulation.entropy_before_step(entropy, jnp.array([[-1, 0, 0, 2, 0, 2]]), mask, steps=4)
        np.testing.assert_array_equal(found[0], [[3.0, 0.0, 4.0, 0.0]])
        np.testing.assert_array_equal(found[1], [[True, False, True, False]])

    def test_the_scale_has_mean_one_but_weights_the_signs_unevenly(self):
        # (errata F4.4) failures happen where the policy is uncertain: mean of A g is not zero although both means are
        # right.
        normalised = modulation.normalised_entropy(self.step_h, self.steps)
        scale = modulation.self_calibrating_scale(normalised, self.steps)
        np.testing.assert_allclose(scale.mean(), 1.0, rtol=1e-12)
        advantages = jnp.array([1.0, -1.0])
        assert abs(float(jnp.mean(advantages[:, None] * scale))) > 0.1


class TestPruning:
    V, T = 4, 3
    log_min_p = float(np.log(0.25))

    @pytest.fixture
    def world(self):
        keys = jax.random.split(jax.random.key(3), 3)
        train = trees.random_policy(keys[0], vocabulary=self.V, horizon=self.T, scale=1.5)
        infer = trees.perturb(keys[1], train, noise=0.3)
        return train, infer, jax.random.uniform(keys[2], (self.V**self.T,))

    def pruned(self, policy):
        return [categorical.restrict(z, categorical.safe_set(z, log_min_p=self.log_min_p)) for z in policy]

    def sequences(self):
        grid = np.indices((self.V,) * self.T).reshape(self.T, -1).T
        contexts = [np.zeros(len(grid), int)]
        for t in range(self.T - 1):
            contexts.append(contexts[-1] * self.V + grid[:, t])
        return jnp.asarray(grid), [jnp.asarray(c) for c in contexts]

    def token_values(self, policy):
        tokens, contexts = self.sequences()
        each = [
            pruning.pruned_log_prob(policy[t][contexts[t]], tokens[:, t], log_min_p=self.log_min_p)
            for t in range(self.T)
        ]
        return jnp.stack([x.log_prob for x in each], 1), jnp.stack([x.kept for x in each], 1)

    def test_the_gradient_of_the_pruned_objective(self, world):
        train, _, rewards = world
        exact = jax.grad(lambda p: jnp.sum(jnp.exp(trees.sequence_log_probs(self.pruned(p))) * rewards))(train)

        def loss(p):
            log_prob, kept = self.token_values(p)
            law = jnp.where(jnp.all(kept, 1), jnp.exp(jnp.sum(jax.lax.stop_gradient(log_prob), 1)), 0.0)
            return jnp.sum(law * (rewards - 0.5) * jnp.sum(log_prob, axis=1))

        pruned_away = 0
        for ours, theirs, z in zip(jax.grad(loss)(train), exact, train, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-13)
            outside = ~np.asarray(categorical.safe_set(z, log_min_p=self.log_min_p))
            pruned_away += outside.sum()
            assert np.all(np.asarray(ours)[outside] == 0)
        assert pruned_away > 5
        unpruned = jax.grad(lambda p: jnp.sum(jnp.exp(trees.sequence_log_probs(p)) * rewards))(train)
        assert max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(unpruned, exact, strict=True)) > 1e-3

    def test_importance_weights_miss_exactly_what_the_sampler_cannot_produce(self, world):
        train, infer, _ = world
        log_prob, kept = self.token_values(train)
        log_behaviour, kept_behaviour = self.token_values(infer)
        every = jnp.ones(kept.shape, bool)
        law_infer = jnp.where(jnp.all(kept_behaviour, 1), jnp.exp(log_behaviour.sum(1)), 0.0)
        law_train = jnp.where(jnp.all(kept, 1), jnp.exp(log_prob.sum(1)), 0.0)
        np.testing.assert_allclose(law_train.sum(), 1.0, rtol=1e-12)
        weights = pruning.pruned_sequence_weights(log_prob, log_behaviour, kept, every, cap=jnp.inf)
        f = jnp.linspace(-1.0, 2.0, weights.size)
        left = jnp.sum(law_infer * weights * f)
        right = jnp.sum(jnp.where(jnp.all(kept_behaviour, 1), law_train * f, 0.0))
        np.testing.assert_allclose(left, right, rtol=1e-10)
        assert abs(float(left - jnp.sum(law_train * f))) > 1e-4  # the missing mass


class TestDivergenceAugmentation:
    """Occupancies of a random MDP, all in closed form."""

    S, A, discount = 5, 3, 0.9

    @pytest.fixture
    def mdp(self):
        rng = np.random.default_rng(0)
        kernel = jnp.asarray(rng.dirichlet(np.ones(self.S), (self.S, self.A)))
        old = jnp.asarray(rng.normal(size=(self.S, self.A)))
        return kernel, old, old + 0.5 * jnp.asarray(rng.normal(size=(self.S, self.A)))

    def occupancy(self, kernel, logits):
        pi = jax.nn.softmax(logits)
        step = jnp.einsum("sa,sat->st", pi, kernel)
        start = jnp.zeros(self.S).at[0].set(1.0)
        return (1 - self.discount) * jnp.linalg.solve(jnp.eye(self.S) - self.discount * step.T, start)

    def policy_gradient(self, kernel, logits, phi, *, future=True, states=None):
        """E_{d, pi}[Q grad log pi] with Q the discounted sum of the fixed pseudo-reward phi."""
        pi = jax.nn.softmax(logits)
        step = jnp.einsum("sa,sat->st", pi, kernel)
        value = jnp.linalg.solve(jnp.eye(self.S) - self.discount * step, jnp.sum(pi * phi, 1))
        q = phi + (self.discount * jnp.einsum("sat,t->sa", kernel, value) if future else 0.0)
        states = self.occupancy(kernel, logits) if states is None else states
        return jax.grad(lambda z: jnp.sum(states[:, None] * pi * q * jax.nn.log_softmax(z)))(logits)

    def test_the_divergence_is_a_policy_gradient_with_a_pseudo_reward(self, mdp):
        kernel, old, new = mdp

        def divergence(z):
            return jnp.sum(self.occupancy(kernel, z) * categorical.kl(z, old))

        exact = jax.grad(divergence)(new)
        phi = augmented.pseudo_reward(jax.nn.log_softmax(new), jax.nn.log_softmax(old))
        np.testing.assert_allclose(self.policy_gradient(kernel, new, phi), exact, atol=1e-14)
        scale = float(jnp.max(jnp.abs(exact)))
        assert scale > 1e-3
        # Dropping the future, or taking the states of the old policy, is another gradient.
        short = self.policy_gradient(kernel, new, phi, future=False)
        stale = self.policy_gradient(kernel, new, phi, states=self.occupancy(kernel, old))
        assert float(jnp.max(jnp.abs(short - exact))) > 0.002 * scale
        assert float(jnp.max(jnp.abs(stale - exact))) > 0.01 * scale

    def test_the_full_entropy_needs_the_ratio_of_state_densities(self, mdp):
        # (errata F8.4) F = sum mu log mu: phi = log pi/pi_old + log d/d_old, and without the second term it is wrong.
        kernel, old, far = mdp
        d_old = self.occupancy(kernel, old)

        def divergence(z):
            d = self.occupancy(kernel, z)
            return jnp.sum(d * (categorical.kl(z, old) + jnp.log(d / d_old)))

        for step in (1.0, 0.01):
            new = old + step * (far - old)
            exact = jax.grad(divergence)(new)
            phi = jax.nn.log_softmax(new) - jax.nn.log_softmax(old)
            density = jnp.log(self.occupancy(kernel, new) / d_old)[:, None]
            scale = float(jnp.max(jnp.abs(exact)))
            np.testing.assert_allclose(self.policy_gradient(kernel, new, phi + density), exact, atol=1e-13)
            assert float(jnp.max(jnp.abs(self.policy_gradient(kernel, new, phi) - exact))) > 0.005 * scale


def test_the_own_baseline_of_weighted_tokens():
    """errata F5.4: responses of one or two tokens, each weighing 1 / length, all drawn equally often by enumeration."""
    # Token 1 ends a response; half of all draws end at once. Rows: 1, 1, 00, 01.
    mask = jnp.array([[True, False], [True, False], [True, True], [True, True]])
    tokens = np.array([[1, 0], [1, 0], [0, 0], [0, 1]])
    rewards, ids = jnp.array([0.2, 0.2, 1.0, -0.4]), jnp.zeros(4, int)
    log_prob, collision = jnp.full((4, 2), jnp.log(0.5)), jnp.full((4, 2), 0.5)
    weights = jnp.where(mask, 1 / mask.sum(axis=1, keepdims=True), 0.0)
    scores = np.zeros((4, 2, 2, 2))  # response, token, context, logit: every context has logits of its own
    for row, token in np.ndindex(4, 2):
        scores[row, token, token] = np.where(mask[row, token], np.eye(2)[tokens[row, token]] - 0.5, 0.0)

    def second_moment(advantages):
        step = np.einsum("bt,btcv->bcv", np.asarray(weights * advantages), scores)
        return float((step**2).sum(axis=(1, 2)).mean())

    best = own_token_baseline(rewards, log_prob, collision, mask, ids, token_weights=weights)
    baseline = jnp.where(mask, rewards[:, None] - best, 0.0)
    np.testing.assert_allclose(baseline[:, 0], (0.4 + 0.25 * 0.6) / 2.5)  # weights 1, 1, 1/4, 1/4
    plain = own_token_baseline(rewards, log_prob, collision, mask, ids)
    assert second_moment(best) < second_moment(plain)
    for moved in (-0.05, 0.05):
        for column in (0, 1):
            other = jnp.where(mask & (jnp.arange(2)[None] == column), best + moved, best)
            assert second_moment(best) < second_moment(other)
    equal = own_token_baseline(rewards, log_prob, collision, mask, ids, token_weights=jnp.full((4, 2), 3.0))
    np.testing.assert_allclose(equal, plain)
