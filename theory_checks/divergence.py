"""Divergence-augmented policy optimisation (arXiv 2501.15034): occupancies exactly, recursions by brute force."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import categorical
from jaxrl_llm import tabular
from jaxrl_llm.objectives import divergence_augmented as augmented
from theory_checks.check import Check
from theory_checks.check import World
from theory_checks.check import compare

PAPER = "arXiv 2501.15034"
DERIVED = "derived (docs/theory.md)"
STATES, ACTIONS, DISCOUNT = 5, 3, 0.9
ROWS, LENGTH = 3, 6


def _draw_mdps(generator: np.random.Generator, count: int) -> list[Any]:
    """Transition kernels, an old policy, and a policy one to a tenth of a normal step away."""
    kernel = generator.dirichlet(np.ones(STATES), (count, STATES, ACTIONS))
    old = generator.normal(size=(count, STATES, ACTIONS))
    step = generator.uniform(0.1, 1.0, size=(count, 1, 1))
    return [tuple(jnp.asarray(x) for x in (kernel, old, old + step * generator.normal(size=old.shape)))]


def _occupancy(kernel: jax.Array, logits: jax.Array) -> jax.Array:
    """(1 - discount) sum_t discount^t P(s_t = s), from state 0."""
    start = jnp.zeros(STATES).at[0].set(1.0)
    return tabular.discounted_occupancy(kernel, jax.nn.softmax(logits), start, discount=DISCOUNT)


def _policy_gradient(kernel, logits, phi, *, future=True, states=None) -> jax.Array:
    """E_{d, pi}[Q grad log pi], Q the discounted sum of the pseudo-reward phi held fixed."""
    pi = jax.nn.softmax(logits)
    value = tabular.discounted_sums(kernel, pi, jnp.sum(pi * phi, axis=1), discount=DISCOUNT)
    q = phi + (DISCOUNT * jnp.einsum("sat,t->sa", kernel, value) if future else 0.0)
    states = _occupancy(kernel, logits) if states is None else states
    weights = jax.lax.stop_gradient(states[:, None] * pi * q)
    return jax.grad(lambda z: jnp.sum(weights * jax.nn.log_softmax(z)))(logits)


def _f_divergences(new: jax.Array, old: jax.Array) -> dict[str, jax.Array]:
    """Gradient of sum_a pi_old f(pi / pi_old) with respect to the logits, next to E_pi[phi grad log pi]."""
    generators = {
        "kl": lambda ratio: ratio * jnp.log(ratio),
        "reverse_kl": lambda ratio: ratio - 1 - jnp.log(ratio),
        "hellinger": lambda ratio: jnp.square(jnp.sqrt(ratio) - 1),
        "total_variation": lambda ratio: jnp.abs(ratio - 1) / 2,
    }
    log_new, log_old = jax.nn.log_softmax(new), jax.nn.log_softmax(old)
    exact, ours = [], []
    for name, f in generators.items():

        def divergence(z, f=f):
            log_ratio = jax.nn.log_softmax(z) - log_old
            return jnp.sum(jnp.exp(log_old) * f(jnp.exp(log_ratio)))

        phi = augmented.pseudo_reward(log_new, log_old, divergence=name)
        exact.append(jax.grad(divergence)(new))
        ours.append(jax.grad(lambda z, phi=phi: jnp.sum(jnp.exp(jax.nn.log_softmax(z)) * phi))(new))
    return {"f_exact": jnp.stack(exact), "f_ours": jnp.stack(ours)}


def _measure_mdp(kernel: jax.Array, old: jax.Array, new: jax.Array) -> dict[str, jax.Array]:
    log_new, log_old = jax.nn.log_softmax(new), jax.nn.log_softmax(old)
    d_old, d_new = _occupancy(kernel, old), _occupancy(kernel, new)
    phi = augmented.pseudo_reward(log_new, log_old)

    def conditional(z):
        return jnp.sum(_occupancy(kernel, z) * categorical.kl(z, old))

    def full(z):
        d = _occupancy(kernel, z)
        return jnp.sum(d * (categorical.kl(z, old) + jnp.log(d / d_old)))

    density = jnp.log(d_new / d_old)[:, None]
    # phi is a constant, so an augmented advantage is the policy gradient of the reward r - phi / eta.
    reward = jnp.sin(jnp.arange(STATES * ACTIONS, dtype=phi.dtype)).reshape(STATES, ACTIONS)

    def regularised(z):
        d = _occupancy(kernel, z)
        return jnp.sum(d[:, None] * jax.nn.softmax(z) * reward) - 0.5 * conditional(z)

    return {
        "gradient": _policy_gradient(kernel, new, phi),
        "exact": jax.grad(conditional)(new),
        "no_future": _policy_gradient(kernel, new, phi, future=False),
        "old_states": _policy_gradient(kernel, new, phi, states=d_old),
        "full_gradient": _policy_gradient(kernel, new, phi + density),
        "full_exact": jax.grad(full)(new),
        "augmented": _policy_gradient(kernel, new, augmented.augmented_advantages(reward, phi, coefficient=0.5)),
        "augmented_wrong": _policy_gradient(kernel, new, augmented.augmented_advantages(reward, phi, coefficient=-0.5)),
        "augmented_exact": jax.grad(regularised)(new),
        # Within the clamp of 3 nats that keeps the pseudo-rewards finite; beyond it they are not f' any more.
        **_f_divergences(old[0] + jnp.tanh(new[0] - old[0]), old[0]),
    }


MDPS = World(name="divergence_mdps", draw=_draw_mdps, measure=_measure_mdp)


def _draw_chains(generator: np.random.Generator, count: int) -> list[Any]:
    """Chains on which the first action goes forward and the others stay; the new policy goes forward more often."""
    forward = np.zeros((STATES, ACTIONS, STATES))
    forward[:, 1:] = np.eye(STATES)[:, None]
    forward[:, 0] = np.eye(STATES)[np.minimum(np.arange(STATES) + 1, STATES - 1)]
    old = generator.normal(size=(count, STATES, ACTIONS))
    old[..., 0] -= np.geomspace(1, 20, count)[:, None]
    move = np.zeros_like(old)
    move[..., 0] = generator.uniform(-1, 12, size=(count, 1))
    return [tuple(jnp.asarray(x) for x in (np.broadcast_to(forward, (count, *forward.shape)), old, old + move))]


def _measure_chain(kernel: jax.Array, old: jax.Array, new: jax.Array) -> dict[str, jax.Array]:
    d_old, d_new = _occupancy(kernel, old), _occupancy(kernel, new)
    change = jnp.sum(d_old * categorical.total_variation(new, old))
    return {
        "drift": jnp.sum(jnp.abs(d_new - d_old)) / 2,
        "drift_bound": DISCOUNT / (1 - DISCOUNT) * change,
    }


CHAINS = World(name="divergence_chains", draw=_draw_chains, measure=_measure_chain)


def _draw_rows(generator: np.random.Generator, count: int) -> list[Any]:
    shape = (count, ROWS, LENGTH)
    phi, values, rewards = (generator.normal(size=shape) for _ in range(3))
    ratio = np.exp(0.7 * generator.normal(size=shape))
    # The first row has no hole: on it recursions are compared with sums.
    mask = generator.random(shape) < 0.7
    mask[:, 0] = True
    return [tuple(jnp.asarray(x) for x in (phi, values, rewards, ratio, mask))]


def _products(phi: jax.Array, ratio: jax.Array, *, cap: float) -> jax.Array:
    """D_t = phi_t + sum_{u>t} discount^(u-t) (prod_{t<j<u} min(cap, rho_j)) min(1, rho_u) phi_u, term by term."""
    terms = []
    for t in range(LENGTH):
        total, trace = phi[t], 1.0
        for u in range(t + 1, LENGTH):
            total = total + DISCOUNT ** (u - t) * trace * jnp.minimum(1.0, ratio[u]) * phi[u]
            trace = trace * jnp.minimum(cap, ratio[u])
        terms.append(total)
    return jnp.stack(terms)


def _v_trace_products(values: jax.Array, rewards: jax.Array, ratio: jax.Array) -> jax.Array:
    """v_t = V_t + sum_{u>=t} discount^(u-t) (prod_{t<=j<u} min(1, rho_j)) delta_u, term by term."""
    following = jnp.append(values[1:], 0.0)
    clipped = jnp.minimum(1.0, ratio)
    delta = clipped * (rewards + DISCOUNT * following - values)
    targets = []
    for t in range(LENGTH):
        total, trace = values[t], 1.0
        for u in range(t, LENGTH):
            total = total + DISCOUNT ** (u - t) * trace * delta[u]
            trace = trace * clipped[u]
        targets.append(total)
    return jnp.stack(targets)


def _released(phi: jax.Array) -> jax.Array:
    """The released recursion on-policy, which takes phi of the step after its own: for the twin only."""
    later = jnp.append(phi[1:], 0.0)
    return jnp.stack([jnp.sum(DISCOUNT ** jnp.arange(LENGTH - t, dtype=phi.dtype) * later[t:]) for t in range(LENGTH)])


def _measure_rows(phi, values, rewards, ratio, mask) -> dict[str, jax.Array]:
    every, ones = jnp.ones(mask.shape, bool), jnp.ones(ratio.shape)

    def recursion(ratio, mask, cap):
        return augmented.multi_step_divergence(phi, ratio, mask, discount=DISCOUNT, trace_cap=cap)

    def returns(x):
        return jnp.stack([jnp.sum(DISCOUNT ** jnp.arange(LENGTH - t, dtype=phi.dtype) * x[t:]) for t in range(LENGTH)])

    masked_mean_square = jnp.sum(jnp.where(mask, jnp.square(rewards), 0.0)) / jnp.sum(mask, dtype=phi.dtype)
    scaled = augmented.scaled_by_root_mean_square(rewards, mask)
    fixture = augmented.multi_step_divergence(
        jnp.array([[0.1, -0.2, 0.3, 0.05]]), jnp.ones((1, 4)), jnp.ones((1, 4), bool), discount=0.9
    )
    targets, q = augmented.v_trace(values, rewards, ratio, every, discount=DISCOUNT)
    on_policy, _ = augmented.v_trace(values, rewards, ones, every, discount=DISCOUNT)
    # Holes are skipped: the steps that exist, moved to the front, give the same numbers in the same order.
    order = jnp.argsort(~mask[1], stable=True)
    packed = augmented.multi_step_divergence(
        phi[1][order][None], ratio[1][order][None], mask[1][order][None], discount=DISCOUNT
    )[0]
    return {
        "n_step": recursion(ratio, every, 1.0)[0],
        "n_step_products": _products(phi[0], ratio[0], cap=1.0),
        "one_step": recursion(ratio, every, 0.0)[0],
        "one_step_terms": phi[0] + DISCOUNT * jnp.append((jnp.minimum(1.0, ratio[0]) * phi[0])[1:], 0.0),
        "on_policy": recursion(ones, every, 1.0)[0],
        "sums": returns(phi[0]),
        "released": _released(phi[0]),
        "fixture": fixture[0],
        "masked": recursion(ratio, mask, 1.0)[1][order],
        "packed": packed,
        "unmasked": recursion(ratio, every, 1.0)[1][order],
        "v_trace": targets[0],
        "v_trace_products": _v_trace_products(values[0], rewards[0], ratio[0]),
        "v_trace_on_policy": on_policy[0],
        "reward_sums": returns(rewards[0]),
        "q": q[0],
        "q_from_targets": rewards[0] + DISCOUNT * jnp.append(targets[0][1:], 0.0),
        "q_from_values": rewards[0] + DISCOUNT * jnp.append(values[0][1:], 0.0),
        "scaled": scaled,
        "scaled_expected": jnp.where(mask, rewards / jnp.sqrt(masked_mean_square), 0.0),
        "unscaled": jnp.where(mask, rewards, 0.0),
    }


ROWS_WORLD = World(name="divergence_rows", draw=_draw_rows, measure=_measure_rows)


def _check(name, statement, function, left, right, *, world=MDPS, paper=DERIVED, **options) -> Check:
    names = " ".join(f"objectives.divergence_augmented.{part}" for part in function.split())
    return compare(f"divergence.{name}", statement, names, left, right, world=world, paper=paper, **options)


CHECKS = [
    _check(
        "occupancy_gradient",
        "grad sum_s d(s) KL(pi || pi_old) = E_{d,pi}[Q^phi grad log pi], phi = log pi/pi_old",
        "pseudo_reward",
        lambda m: m["gradient"],
        lambda m: m["exact"],
        wrong_left=lambda m: m["no_future"],
        paper=PAPER,
        equality=True,
    ),
    _check(
        "occupancy_states",
        "the states are those of the trained policy: with the old ones it is another gradient",
        "pseudo_reward",
        lambda m: m["gradient"],
        lambda m: m["exact"],
        wrong_left=lambda m: m["old_states"],
        equality=True,
    ),
    _check(
        "full_entropy",
        "erratum F8.4: F = sum mu log mu needs phi + log d/d_old",
        "pseudo_reward",
        lambda m: m["full_gradient"],
        lambda m: m["full_exact"],
        wrong_left=lambda m: m["gradient"],
        equality=True,
    ),
    _check(
        "augmented_advantage",
        "reward - phi / eta in place of the reward: the gradient of return - D / eta",
        "augmented_advantages",
        lambda m: m["augmented"],
        lambda m: m["augmented_exact"],
        wrong_left=lambda m: m["augmented_wrong"],
        paper=PAPER,
        equality=True,
    ),
    _check(
        "occupancy_drift",
        "TV(d_pi, d_old) <= g/(1 - g) E_{d_old} TV(pi, pi_old): small steps can move the states far",
        "pseudo_reward",
        lambda m: m["drift"],
        lambda m: m["drift_bound"],
        wrong=lambda m: (1 - DISCOUNT) * m["drift_bound"],
        world=CHAINS,
    ),
    _check(
        "pseudo_rewards",
        "E_pi[phi grad log pi] = grad D_f for KL, reverse KL, Hellinger and TV, within the clamp of 3 nats",
        "pseudo_reward",
        lambda m: m["f_ours"],
        lambda m: m["f_exact"],
        wrong=lambda m: -m["f_exact"],
        equality=True,
    ),
    _check(
        "multi_step",
        "the recursion of D_t = its sum over products of truncated ratios",
        "multi_step_divergence",
        lambda m: m["n_step"],
        lambda m: m["n_step_products"],
        wrong_left=lambda m: m["on_policy"],
        paper=PAPER,
        world=ROWS_WORLD,
        equality=True,
    ),
    _check(
        "one_step",
        "trace cap 0 keeps phi_t + discount min(1, rho_{t+1}) phi_{t+1}",
        "multi_step_divergence",
        lambda m: m["one_step"],
        lambda m: m["one_step_terms"],
        wrong_left=lambda m: m["n_step"],
        paper=PAPER,
        world=ROWS_WORLD,
        equality=True,
    ),
    _check(
        "on_policy_sums",
        "erratum F8.1: on-policy D_t is the discounted sum of phi from t on, not from t + 1 on",
        "multi_step_divergence",
        lambda m: m["on_policy"],
        lambda m: m["sums"],
        wrong_left=lambda m: m["released"],
        world=ROWS_WORLD,
        equality=True,
    ),
    _check(
        "fixture",
        "phi = (.1, -.2, .3, .05): (.19945, .1105, .345, .05); the released code gives (.44695, -.1145, ...)",
        "multi_step_divergence",
        lambda m: m["fixture"],
        lambda m: np.tile([0.19945, 0.1105, 0.345, 0.05], (m["fixture"].shape[0], 1)),
        wrong=lambda m: np.tile([0.44695, -0.1145, 0.345, 0.05], (m["fixture"].shape[0], 1)),
        world=ROWS_WORLD,
        equality=True,
    ),
    _check(
        "masked_steps",
        "steps outside the mask are skipped as if they were not there",
        "multi_step_divergence",
        lambda m: m["masked"],
        lambda m: m["packed"],
        wrong_left=lambda m: m["unmasked"],
        world=ROWS_WORLD,
        equality=True,
    ),
    _check(
        "v_trace",
        "the recursion of v_t = V_t + sum of traced temporal differences",
        "v_trace",
        lambda m: m["v_trace"],
        lambda m: m["v_trace_products"],
        wrong_left=lambda m: m["v_trace_on_policy"],
        paper="arXiv 1802.01561",
        world=ROWS_WORLD,
        equality=True,
    ),
    _check(
        "v_trace_on_policy",
        "on-policy v_t is the discounted return",
        "v_trace",
        lambda m: m["v_trace_on_policy"],
        lambda m: m["reward_sums"],
        wrong_left=lambda m: m["v_trace"],
        paper="arXiv 1802.01561",
        world=ROWS_WORLD,
        equality=True,
    ),
    _check(
        "v_trace_q",
        "Q_t = r_t + discount v_{t+1}, with the target and not the value",
        "v_trace",
        lambda m: m["q"],
        lambda m: m["q_from_targets"],
        wrong=lambda m: m["q_from_values"],
        paper=PAPER,
        world=ROWS_WORLD,
        equality=True,
    ),
    _check(
        "root_mean_square",
        "advantages over their root mean square, not centred",
        "scaled_by_root_mean_square",
        lambda m: m["scaled"],
        lambda m: m["scaled_expected"],
        wrong_left=lambda m: m["unscaled"],
        paper=PAPER,
        world=ROWS_WORLD,
        equality=True,
    ),
]
