"""Each recipe against an independent NumPy transcription of its paper's formula: loss and gradient, and wrong formulas
must be told apart.

The transcriptions loop over sequences and tokens as the papers' sums do. `now` are the log-probs that the gradient
moves; `frozen` is a second copy for the places where the paper has a stop-gradient, so that central differences in
`now` give the paper's gradient and not that of the value.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import SIGNALS
from jaxrl_llm.objectives import SignalInputs
from jaxrl_llm.objectives import advantages_of
from jaxrl_llm.objectives import policy_loss

B, T = 6, 7
GROUPS = np.array([4, 9, 4, 9, 4, 9])


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    starts, lengths = np.array([2, 1, 3, 2, 1, 2]), np.array([5, 3, 4, 1, 6, 2])
    mask = np.array([[s <= t < s + n for t in range(T)] for s, n in zip(starts, lengths, strict=True)])
    old = rng.normal(-1.5, 0.5, (B, T))
    data = {
        "mask": mask,
        "rewards": np.array([1.0, 0.0, 0.2, 0.7, 0.0, 0.1]),
        "now": old + rng.normal(0, 0.35, (B, T)),
        "old": old,
        "behaviour": old + rng.normal(0, 0.25, (B, T)),
        "ref": old + rng.normal(0, 0.5, (B, T)),
        "kl": rng.uniform(0.0, 0.03, (B, T)),
        "kl_ref": rng.uniform(0.0, 0.5, (B, T)),
        "entropy": rng.uniform(0.1, 1.5, (B, T)),
        "kept": rng.random((B, T)) < 0.8,
        "steps": np.where(np.arange(T) < 4, 0, 1) + np.zeros((B, 1), int),
        "values": rng.normal(0.3, 0.2, (B, T)),
    }
    data["kl"][0, 3] = 0.2  # rejected by every maximum test
    data["kl"][4] = 0.0004  # accepted by every average test
    data["kl"][1] = np.where(mask[1], 0.0015, 0.0)  # accepted by the loose average only
    return data


def spans(mask):
    return [np.flatnonzero(row) for row in mask]


def group_standardised(rewards):
    out = np.empty(B)
    for i in range(B):
        same = rewards[GROUPS[i] == GROUPS]
        out[i] = (rewards[i] - same.mean()) / same.std(ddof=1)
    return out


def reinforce(d, now, frozen):
    a = d["rewards"] - d["rewards"].mean()
    return -np.mean([sum(a[i] * now[i, t] for t in s) for i, s in enumerate(spans(d["mask"]))])


def rloo(d, now, frozen):
    total = 0.0
    for i, s in enumerate(spans(d["mask"])):
        others = [d["rewards"][j] for j in range(B) if GROUPS[j] == GROUPS[i] and j != i]
        total += (d["rewards"][i] - np.mean(others)) * now[i, s].sum()
    return -total / B


def group_reinforce(d, now, frozen):
    total = 0.0
    for group in np.unique(GROUPS):
        answers = np.flatnonzero(group == GROUPS)
        mean = sum(d["rewards"][i] for i in answers) / len(answers)
        for i in answers:
            total += (d["rewards"][i] - mean) * sum(now[i, t] for t in range(T) if d["mask"][i, t]) / len(answers)
    return -total / len(np.unique(GROUPS))


def ppo_term(now, old, a, low, high):
    r = np.exp(now - old)
    return min(r * a, np.clip(r, 1 - low, 1 + high) * a)


def ppo_token_mean(d, now, a, low=0.2, high=0.2):
    terms = [ppo_term(now[i, t], d["old"][i, t], a[i], low, high) for i, s in enumerate(spans(d["mask"])) for t in s]
    return -np.mean(terms)


def reinforce_plus_plus(d, now, frozen):
    a = (d["rewards"] - d["rewards"].mean()) / d["rewards"].std(ddof=1)
    return ppo_token_mean(d, now, a)


def reinforce_plus_plus_baseline(d, now, frozen):
    a = np.array([d["rewards"][i] - d["rewards"][GROUPS[i] == GROUPS].mean() for i in range(B)])
    return ppo_token_mean(d, now, (a - a.mean()) / a.std(ddof=1))


def grpo(d, now, frozen):
    a, total = group_standardised(d["rewards"]), 0.0
    for i, s in enumerate(spans(d["mask"])):
        inner = 0.0
        for t in s:
            q = np.exp(d["ref"][i, t] - now[i, t])
            inner += ppo_term(now[i, t], d["old"][i, t], a[i], 0.2, 0.2) - 0.04 * (q - np.log(q) - 1)
        total += inner / len(s)
    return -total / B


def dr_grpo(d, now, frozen):
    a = np.array([d["rewards"][i] - d["rewards"][GROUPS[i] == GROUPS].mean() for i in range(B)])
    terms = [ppo_term(now[i, t], d["old"][i, t], a[i], 0.2, 0.2) for i, s in enumerate(spans(d["mask"])) for t in s]
    return -sum(terms) / B


def dapo(d, now, frozen):
    return ppo_token_mean(d, now, group_standardised(d["rewards"]), 0.2, 0.28)


def gspo(d, now, frozen, low=3e-4, high=4e-4):
    a, total = group_standardised(d["rewards"]), 0.0
    for i, s in enumerate(spans(d["mask"])):
        ratio = np.exp((now[i, s] - d["old"][i, s]).sum() / len(s))
        total += min(ratio * a[i], np.clip(ratio, 1 - low, 1 + high) * a[i])
    return -total / B


def cispo(d, now, frozen):
    a, terms = group_standardised(d["rewards"]), []
    for i, s in enumerate(spans(d["mask"])):
        terms += [min(np.exp(frozen[i, t] - d["old"][i, t]), 5.0) * a[i] * now[i, t] for t in s]
    return -np.mean(terms)


def mean_of_others(d, i):
    return np.mean([d["rewards"][j] for j in range(B) if GROUPS[j] == GROUPS[i] and j != i])


def ppo(d, now, frozen):
    a = {}
    for i, s in enumerate(spans(d["mask"])):
        later_value, later = 0.0, 0.0
        for n, t in reversed(list(enumerate(s))):
            reward = d["rewards"][i] if n == len(s) - 1 else 0.0
            later = reward + later_value - d["values"][i, t] + 0.95 * later
            later_value, a[i, t] = d["values"][i, t], later
    flat = np.array(list(a.values()))
    scaled = {key: (x - flat.mean()) / flat.std(ddof=1) for key, x in a.items()}
    return -np.mean([ppo_term(now[i, t], d["old"][i, t], x, 0.2, 0.2) for (i, t), x in scaled.items()])


def trm(maximum, average):
    def loss(d, now, frozen):
        a, total = group_standardised(d["rewards"]), 0.0
        for i, s in enumerate(spans(d["mask"])):
            if d["kl"][i, s].max() <= maximum and d["kl"][i, s].mean() <= average:
                total += sum(a[i] * np.exp(now[i, t] - d["behaviour"][i, t]) for t in s)
        return -total / B  # all sequences, not the accepted ones

    return loss


def empg(d, now, frozen):
    a = group_standardised(d["rewards"])
    steps = [(i, k, s[d["steps"][i, s] == k]) for i, s in enumerate(spans(d["mask"])) for k in (0, 1)]
    steps = [(i, k, ts) for i, k, ts in steps if len(ts)]
    h = np.array([d["entropy"][i, ts].mean() for i, _, ts in steps])
    hn = (h - h.min()) / (h.max() - h.min())
    g = np.exp(-hn) / np.exp(-hn).mean()
    bonus = {(i, k): np.exp(-x) for (i, k, _), x in zip(steps, hn, strict=True)}
    mod = np.array([a[i] * gk + 0.1 * bonus.get((i, k + 1), 0.0) for (i, k, _), gk in zip(steps, g, strict=True)])
    mod -= mod.mean()
    terms = [
        ppo_term(now[i, t], d["old"][i, t], m, 0.2, 0.2) for (i, _, ts), m in zip(steps, mod, strict=True) for t in ts
    ]
    return -np.mean(terms)


def dvp(d, now, frozen):
    total = 0.0
    for i, s in enumerate(spans(d["mask"])):
        others = [d["rewards"][j] for j in range(B) if GROUPS[j] == GROUPS[i] and j != i]
        for t in s[d["kept"][i, s]]:
            weight = min(np.exp(d["old"][i, t] - d["behaviour"][i, t]), 2.0)
            total += weight * (d["rewards"][i] - np.mean(others)) * now[i, t]
    return -total / B


def hybrid(d, now, frozen):
    # Its KL is exact and enters as numbers here, so it moves the value and not the gradient in log_prob.
    total = 0.0
    for i, s in enumerate(spans(d["mask"])):
        log_ratio = d["old"][i] - d["ref"][i]
        for t in s:
            future = sum(log_ratio[u] for u in s if u > t)
            total += d["kl_ref"][i, t] + (future - (d["rewards"][i] - mean_of_others(d, i))) * now[i, t]
    return total / B


def divergence_augmented(d, now, frozen):
    gamma, own, divergence = 0.99, {}, {}
    for i, s in enumerate(spans(d["mask"])):
        phi = d["old"][i] - d["behaviour"][i]
        cut = np.minimum(1.0, np.exp(phi))
        value = dict.fromkeys(range(T + 1), 0.0) | {t: d["values"][i, t] for t in s}
        follower = dict(zip(s, [*s[1:], T], strict=True))
        reward = dict.fromkeys(s, 0.0) | {s[-1]: d["rewards"][i]}

        def target(t, value=value, follower=follower, reward=reward, cut=cut):
            # IMPALA eq. 1, its sum written out
            if t == T:
                return 0.0
            total, weight, u = value[t], 1.0, t
            while u != T:
                total += weight * cut[u] * (reward[u] + gamma * value[follower[u]] - value[u])
                weight, u = weight * gamma * cut[u], follower[u]
            return total

        for n, t in enumerate(s):
            own[i, t] = reward[t] + gamma * target(follower[t]) - value[t]
            divergence[i, t], trace = phi[t], 1.0
            for m, u in enumerate(s[n + 1 :], start=1):
                trace *= cut[u]
                divergence[i, t] += gamma**m * trace * phi[u]
    scale = np.sqrt(np.mean([x**2 for x in own.values()]))
    terms = [-(x / scale - divergence[key]) * np.exp(now[key] - d["behaviour"][key]) for key, x in own.items()]
    return np.mean(terms)


TRANSCRIPTIONS = {
    "empg": empg,
    "dvp": dvp,
    "hybrid": hybrid,
    "divergence_augmented": divergence_augmented,
    "reinforce": reinforce,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "rloo": rloo,
    "group_reinforce": group_reinforce,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "ppo": ppo,
    "trm_max": trm(0.05, np.inf),
    "trm_avg": trm(np.inf, 0.001),
    "trm": trm(0.1, 0.002),
}


def central_difference(f, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (f(up) - f(down)) / (2 * step)
    return gradient


def signal_inputs(d):
    """The batch as signals read it; the outcome stands at the last response token."""
    mask, f = jnp.asarray(d["mask"]), lambda x: jnp.asarray(x, jnp.float32)
    last = np.array([s[-1] for s in spans(d["mask"])])
    return SignalInputs(
        response_mask=mask,
        rewards=f(d["rewards"]),
        rewards_t=f(np.where(np.arange(T) == last[:, None], d["rewards"][:, None], 0.0)),
        group_ids=jnp.asarray(GROUPS),
        step_ids=jnp.asarray(np.where(d["mask"], d["steps"], -1)),
        actor_ids=jnp.asarray(np.where(d["mask"], 0, -1)),
        ended=jnp.ones(B, bool),
        steps=2,
        log_prob_old=f(d["old"]),
        log_prob_behaviour=f(d["behaviour"]),
        log_prob_ref=f(d["ref"]),
        entropy=f(d["entropy"]),
        values=f(d["values"]),
    )


def evaluate(recipe, d, log_prob=None):
    def f(x):
        return jnp.asarray(x, jnp.float32)

    a = advantages_of(recipe, signal_inputs(d))

    def loss(log_prob):
        terms = policy_loss(
            recipe,
            log_prob=log_prob,
            advantages=a,
            response_mask=jnp.asarray(d["mask"]),
            log_prob_old=f(d["old"]),
            log_prob_behaviour=f(d["behaviour"]),
            log_prob_ref=f(d["ref"]),
            kl_t=f(d["kl"]),
            kl_ref_t=f(d["kl_ref"]),
            target_kept=jnp.asarray(d["kept"]) if recipe.log_min_p is not None else None,
        )
        return terms.loss[0] / terms.loss[1], terms.metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        f(d["now"] if log_prob is None else log_prob)
    )
    return np.asarray(value, np.float64), np.asarray(gradient, np.float64), metrics


def test_every_recipe_has_a_transcription():
    assert set(TRANSCRIPTIONS) == set(RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_loss_and_gradient_equal_the_papers_formula(batch, name):
    value, gradient, _ = evaluate(RECIPES[name], batch)
    expected = TRANSCRIPTIONS[name](batch, batch["now"], batch["now"])
    slope = central_difference(lambda x: TRANSCRIPTIONS[name](batch, x, batch["now"]), batch["now"])
    scale = np.abs(slope).max()
    assert scale > 1e-3
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(gradient, slope, atol=3e-5 * scale)
    # The formula with its sign flipped, or with the policies of its ratio exchanged, must not pass the same comparison.
    assert np.abs(gradient + slope).max() > 0.1 * scale
    swapped = {**batch, "old": 2 * batch["now"] - batch["old"], "behaviour": 2 * batch["now"] - batch["behaviour"]}
    if RECIPES[name].surrogate != "score_function":
        wrong = central_difference(lambda x: TRANSCRIPTIONS[name](swapped, x, batch["now"]), batch["now"])
        assert np.abs(gradient - wrong).max() > 1e-3 * scale


def test_gspo_gradient_inside_its_clip(batch):
    # With the paper's narrow interval most sequences are clipped; a wide one lets the gradient through every sequence.
    wide = dataclasses.replace(RECIPES["gspo"], clip_low=0.9, clip_high=9.0)
    value, gradient, _ = evaluate(wide, batch)
    slope = central_difference(lambda x: gspo(batch, x, None, 0.9, 9.0), batch["now"])
    np.testing.assert_allclose(value, gspo(batch, batch["now"], None, 0.9, 9.0), rtol=2e-5)
    np.testing.assert_allclose(gradient, slope, atol=3e-5 * np.abs(slope).max())
    assert (np.abs(gradient) > 1e-4).sum() == batch["mask"].sum()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_gradient_is_zero_outside_the_mask_whatever_is_there(batch, name):
    dirty = {
        k: np.where(batch["mask"], v, np.nan) if np.shape(v) == (B, T) and v.dtype == float else v
        for k, v in batch.items()
    }
    value, gradient, metrics = evaluate(RECIPES[name], dirty)
    clean_value, clean_gradient, _ = evaluate(RECIPES[name], batch)
    np.testing.assert_allclose(value, clean_value, rtol=1e-6)
    np.testing.assert_allclose(gradient, clean_gradient, rtol=1e-6)
    assert np.all(gradient[~batch["mask"]] == 0)
    assert all(np.isfinite(part) for pair in metrics.values() for part in pair)


@pytest.mark.parametrize(
    "name", sorted(n for n, r in RECIPES.items() if not SIGNALS[r.advantage].needs and r.kl_estimator == "none")
)
def test_equal_rewards_give_exactly_zero(batch, name):
    _, gradient, _ = evaluate(RECIPES[name], {**batch, "rewards": np.full(B, 0.1)})
    assert np.all(gradient == 0)
