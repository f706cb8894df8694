"""Every signal against a transcription that loops over rows and tokens; what a batch may lack or hold."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import SIGNALS
from jaxrl_llm.objectives import SignalInputs
from jaxrl_llm.objectives import advantages_of
from jaxrl_llm.objectives import signals
from jaxrl_llm.objectives import value_targets

B, R = 5, 6
GROUPS = (3, 8, 3, 8, 3)
LENGTHS = (6, 3, 4, 1, 5)
STEPS = ((0, 0, 1, 1, 2, 2), (0, 1, 1), (0, 0, 0, 2), (0,), (0, 1, 1, 1, 1))
PLAIN = dataclasses.replace(
    RECIPES["grpo"],
    name="plain",
    discount=0.9,
    trace=0.7,
    sharpness=1.3,
    clarity_sharpness=0.6,
    clarity_weight=0.2,
    reward_weight=1.7,
    divergence_coefficient=0.4,
    trace_cap=0.8,
)


def recipe(advantage, **changes):
    return dataclasses.replace(PLAIN, advantage=advantage, **changes)


@functools.cache
def data():
    """One batch in float64: rewards within the row, and an outcome."""
    rng = np.random.default_rng(5)
    mask = np.arange(R) < np.array(LENGTHS)[:, None]
    rewards_t = np.where(mask, rng.choice([0.0, 0.0, 0.5, -0.25], (B, R)), 0.0)
    rewards_t[np.arange(B), np.array(LENGTHS) - 1] += rng.choice([0.0, 1.0], B)
    old = -rng.exponential(1.0, (B, R))
    steps = np.full((B, R), -1)
    for row, own in zip(steps, STEPS, strict=True):
        row[: len(own)] = own
    return {
        "response_mask": mask,
        "rewards": rewards_t.sum(1),
        "rewards_t": rewards_t,
        "group_ids": np.array(GROUPS),
        "step_ids": steps,
        "actor_ids": np.where(mask, 0, -1),
        "ended": np.array([True, True, False, True, True]),
        "log_prob_old": old,
        "log_prob_behaviour": old + rng.normal(0, 0.4, (B, R)),
        "log_prob_ref": old + rng.normal(0, 0.6, (B, R)),
        "entropy": rng.uniform(0.1, 2.0, (B, R)),
        # Between p^2 and p^2 + (1 - p)^2, as a sum of squares of probabilities is.
        "collision": np.exp(2 * old) + (1 - np.exp(old)) ** 2 * rng.uniform(0.1, 0.9, (B, R)),
        "kl_ref_t": rng.uniform(0.0, 0.5, (B, R)),
        "values": rng.normal(0.3, 0.3, (B, R)),
    }


def inputs(d=None, **changes):
    d = (data() if d is None else d) | changes
    kinds = {"f": jnp.float32, "i": jnp.int32, "b": bool}
    return SignalInputs(
        steps=3, **{k: None if x is None else jnp.asarray(x, kinds[x.dtype.kind]) for k, x in d.items()}
    )


def tokens(d):
    return [(i, list(np.flatnonzero(row))) for i, row in enumerate(d["response_mask"])]


def group(d, i):
    return [j for j in range(B) if d["group_ids"][j] == d["group_ids"][i]]


def normalised(d):
    return np.array(
        [(d["rewards"][i] - d["rewards"][group(d, i)].mean()) / d["rewards"][group(d, i)].std(ddof=1) for i in range(B)]
    )


def centred(d):
    return np.array([d["rewards"][i] - d["rewards"][group(d, i)].mean() for i in range(B)])


def others(d, i):
    return np.mean([d["rewards"][j] for j in group(d, i) if j != i])


def gae(d):
    """A_t = sum_k (discount trace)^k delta_{t+k}, written out."""
    out = np.zeros((B, R))
    for i, s in tokens(d):
        value = [*d["values"][i, s], 0.0]
        delta = [d["rewards_t"][i, t] + 0.9 * value[n + 1] - value[n] for n, t in enumerate(s)]
        for n, t in enumerate(s):
            out[i, t] = sum((0.9 * 0.7) ** k * x for k, x in enumerate(delta[n:]))
    return out


def gae_normalised(d):
    a, m = gae(d), d["response_mask"]
    return np.where(m, (a - a[m].mean()) / a[m].std(ddof=1), 0.0)


def step_entropies(d, *, renyi=False):
    entropy, h = -np.log(d["collision"]) if renyi else d["entropy"], {}
    for i, s in tokens(d):
        for k in sorted({d["step_ids"][i, t] for t in s}):
            h[i, k] = np.mean([entropy[i, t] for t in s if d["step_ids"][i, t] == k])
    return h


def empg(d, *, potential=False, renyi=False):
    h, a, out = step_entropies(d, renyi=renyi), normalised(d), np.zeros((B, R))
    low, high = min(h.values()), max(h.values())
    hn = {key: (x - low) / (high - low) for key, x in h.items()}
    mean = np.mean([math.exp(-1.3 * x) for x in hn.values()])
    modulated = {}
    for (i, k), x in hn.items():
        after = hn.get((i, k + 1))
        bonus = -math.exp(-0.6 * x) if potential else 0.0 if after is None else math.exp(-0.6 * after)
        modulated[i, k] = a[i] * math.exp(-1.3 * x) / mean + 0.2 * bonus
    centre = np.mean(list(modulated.values()))
    for i, s in tokens(d):
        for t in s:
            out[i, t] = modulated[i, d["step_ids"][i, t]] - centre
    return out


def empg_per_sign(d):
    h, a, out = step_entropies(d), normalised(d), np.zeros((B, R))
    low, high = min(h.values()), max(h.values())
    certain = {key: math.exp(-1.3 * (x - low) / (high - low)) for key, x in h.items()}
    for i, s in tokens(d):
        side = [key for key in certain if a[key[0]] * a[i] > 0]
        whole, weighed = sum(abs(a[j]) for j, _ in side), sum(abs(a[j]) * certain[j, k] for j, k in side)
        for t in s:
            out[i, t] = a[i] * certain[i, d["step_ids"][i, t]] * whole / weighed
    return out


def sparse(d, *, exact=False):
    per_token = d["kl_ref_t"] if exact else d["log_prob_old"] - d["log_prob_ref"]
    out = np.zeros((B, R))
    for i, s in tokens(d):
        for n, t in enumerate(s):
            future = sum(0.9 ** (m - n) * per_token[i, u] for m, u in enumerate(s) if m > n)
            earned = sum(0.9 ** (m - n) * d["rewards_t"][i, u] for m, u in enumerate(s) if m >= n)
            out[i, t] = 1.7 * (earned - others(d, i)) - future
    return out


def v_trace(d):
    """(v, Q - V) of IMPALA's eq. 1 with both caps 1, its sum written out."""
    targets, own = np.zeros((B, R)), np.zeros((B, R))
    for i, s in tokens(d):
        value = [*d["values"][i, s], 0.0]
        cut = [min(1.0, math.exp(d["log_prob_old"][i, t] - d["log_prob_behaviour"][i, t])) for t in s]
        reward = [d["rewards_t"][i, t] for t in s]
        v = []
        for n in range(len(s)):
            terms = [
                0.9 ** (m - n) * math.prod(cut[n : m + 1]) * (reward[m] + 0.9 * value[m + 1] - value[m])
                for m in range(n, len(s))
            ]
            v.append(value[n] + sum(terms))
        v.append(0.0)
        for n, t in enumerate(s):
            targets[i, t], own[i, t] = v[n], reward[n] + 0.9 * v[n + 1] - value[n]
    return targets, own


def divergence_augmented(d):
    _, own = v_trace(d)
    scale = np.sqrt(np.mean(own[d["response_mask"]] ** 2))
    out = np.zeros((B, R))
    for i, s in tokens(d):
        phi = [d["log_prob_old"][i, t] - d["log_prob_behaviour"][i, t] for t in s]
        for n, t in enumerate(s):
            total = phi[n]
            for m in range(n + 1, len(s)):
                trace = math.prod(min(0.8, math.exp(x)) for x in phi[n + 1 : m]) * min(1.0, math.exp(phi[m]))
                total += 0.9 ** (m - n) * trace * phi[m]
            out[i, t] = own[i, t] / scale - 0.4 * total
    return out


def baseline(d, *, cumulated):
    norm = np.where(d["response_mask"], 1 - 2 * np.exp(d["log_prob_old"]) + d["collision"], 0.0)
    # A token weighs 1 / length in the loss of `PLAIN`: its score squared weighs 1 / length^2 (errata F5.4).
    norm = norm if cumulated else norm / d["response_mask"].sum(axis=1, keepdims=True) ** 2
    spent, out = (np.cumsum(norm, axis=1) if cumulated else norm), np.zeros((B, R))
    for i, s in tokens(d):
        for t in s:
            there = [j for j in group(d, i) if d["response_mask"][j, t]]
            if len(there) > 1:
                weights = spent[there, t]
                out[i, t] = d["rewards"][i] - (weights * d["rewards"][there]).sum() / weights.sum()
    return out


TRANSCRIPTIONS = {
    "group_normalised": normalised,
    "group_centred": centred,
    "leave_one_out": lambda d: np.array([d["rewards"][i] - others(d, i) for i in range(B)]),
    "batch_centred": lambda d: d["rewards"] - d["rewards"].mean(),
    "batch_normalised": lambda d: (d["rewards"] - d["rewards"].mean()) / d["rewards"].std(ddof=1),
    "group_centred_batch_normalised": lambda d: (centred(d) - centred(d).mean()) / centred(d).std(ddof=1),
    "optimal_token_baseline": functools.partial(baseline, cumulated=True),
    "own_token_baseline": functools.partial(baseline, cumulated=False),
    "gae": gae,
    "gae_normalised": gae_normalised,
    "empg": empg,
    "empg_all_groups": empg,
    "empg_renyi": functools.partial(empg, renyi=True),
    "empg_potential": functools.partial(empg, potential=True),
    "empg_per_sign": empg_per_sign,
    "sparse_imitation": sparse,
    "sparse_imitation_exact": functools.partial(sparse, exact=True),
    "divergence_augmented": divergence_augmented,
}


def test_every_rule_has_a_transcription():
    assert set(TRANSCRIPTIONS) == set(SIGNALS)


@pytest.mark.parametrize("name", SIGNALS)
def test_every_rule_equals_its_transcription(name):
    expected = TRANSCRIPTIONS[name](data())
    result = advantages_of(recipe(name), inputs())
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=3e-6)
    assert np.abs(np.asarray(result) + expected).max() > 0.1
    if result.ndim == 2:
        assert np.all(np.asarray(result)[~data()["response_mask"]] == 0)


def test_the_own_baseline_of_tokens_that_all_weigh_the_same():
    found = [
        advantages_of(recipe("own_token_baseline", aggregation=name), inputs())
        for name in ("token-mean", "token-sum", "seq-mean-token-sum")
    ]
    weighed = advantages_of(recipe("own_token_baseline"), inputs())
    assert np.abs(np.asarray(found[0]) - np.asarray(weighed)).max() > 0.01
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


READS = {
    "gae": ("discount", "trace"),
    "gae_normalised": ("discount", "trace"),
    "empg": ("sharpness", "clarity_sharpness", "clarity_weight"),
    "empg_all_groups": ("sharpness", "clarity_sharpness", "clarity_weight"),
    "empg_renyi": ("sharpness", "clarity_sharpness", "clarity_weight"),
    "empg_potential": ("sharpness", "clarity_sharpness", "clarity_weight"),
    "empg_per_sign": ("sharpness",),
    "sparse_imitation": ("discount", "reward_weight"),
    "sparse_imitation_exact": ("discount", "reward_weight"),
    "divergence_augmented": ("discount", "divergence_coefficient", "trace_cap"),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_a_rule_reads_the_numbers_of_its_recipe_and_no_others(name):
    base = np.asarray(advantages_of(recipe(name), inputs()))
    own = READS.get(name, ())
    others_changed = {field: 0.5 for fields in READS.values() for field in fields if field not in own}
    np.testing.assert_array_equal(advantages_of(recipe(name, **others_changed), inputs()), base)
    for field in own:
        changed = np.asarray(advantages_of(recipe(name, **{field: 0.5}), inputs()))
        assert np.abs(changed - base).max() > 1e-4, field


def test_the_pseudo_reward_is_that_of_the_recipes_divergence():
    base = np.asarray(advantages_of(recipe("divergence_augmented"), inputs()))
    for divergence in ("reverse_kl", "hellinger", "total_variation", "entropy"):
        other = advantages_of(recipe("divergence_augmented", divergence=divergence), inputs())
        assert np.abs(other - base).max() > 0.01
    # A fresh batch has the two policies equal: nothing of a divergence is left.
    fresh = inputs(log_prob_behaviour=data()["log_prob_old"])
    with_it, without = (
        advantages_of(recipe("divergence_augmented", divergence_coefficient=c), fresh) for c in (1.0, 0.0)
    )
    np.testing.assert_array_equal(with_it, without)


@pytest.mark.parametrize("name", SIGNALS)
def test_what_a_rule_needs_is_named_and_nothing_else_is_read(name):
    optional = [f.name for f in dataclasses.fields(SignalInputs) if f.default is None]
    needs = SIGNALS[name].needs
    assert set(needs) <= set(optional)
    least = inputs(**{key: None for key in optional if key not in needs})
    np.testing.assert_array_equal(advantages_of(recipe(name), least), advantages_of(recipe(name), inputs()))
    for missing in needs:
        with pytest.raises(ValueError, match=f"{missing} of the signal's inputs is None; recipe 'plain' needs it"):
            advantages_of(recipe(name), inputs(**{missing: None}))
    if len(needs) == 2:
        with pytest.raises(ValueError, match=f"{needs[0]} and {needs[1]} of the signal's inputs are None"):
            advantages_of(recipe(name), inputs(**dict.fromkeys(needs)))


@pytest.mark.parametrize("name", SIGNALS)
def test_nothing_outside_the_mask_enters_and_nothing_is_nan(name):
    d, own = data(), recipe(name)
    per_token = [k for k, x in d.items() if x.shape == (B, R) and x.dtype.kind == "f"]
    dirty = inputs(**{k: np.where(d["response_mask"], d[k], np.nan) for k in per_token})
    np.testing.assert_array_equal(advantages_of(own, dirty), advantages_of(own, inputs()))
    # Rows without a token, and then a batch without any.
    empty_row = d["response_mask"] & (np.arange(B) != 2)[:, None]
    for mask in (empty_row, np.zeros((B, R), bool)):
        result = np.asarray(advantages_of(own, inputs(response_mask=mask, step_ids=np.where(mask, d["step_ids"], -1))))
        assert np.isfinite(result).all()
        assert result.ndim == 1 or np.all(result[~mask] == 0)
    # Equal rewards, and critics that are right: no rounding becomes an advantage.
    flat = np.zeros((B, R))
    equal = inputs(
        rewards=np.full(B, 0.1),
        rewards_t=flat,
        values=flat,
        kl_ref_t=flat,
        log_prob_ref=d["log_prob_old"],
        log_prob_behaviour=d["log_prob_old"],
        group_ids=np.arange(B),
    )
    result = np.asarray(advantages_of(own, equal))
    assert np.isfinite(result).all()
    if name != "empg_all_groups":  # whose bonus has no sign (errata F4.2)
        np.testing.assert_array_equal(result, np.zeros_like(result))


def test_groups_that_only_fail_or_only_succeed_teach_empg_nothing_unless_asked():
    d = data()
    alike = d["rewards"].copy()
    alike[group(d, 0)] = 1.0
    others_only = np.isin(np.arange(B), group(d, 0), invert=True)
    rest = d["response_mask"] & others_only[:, None]
    for name in ("empg", "empg_renyi", "empg_potential", "empg_per_sign"):
        found = np.asarray(advantages_of(recipe(name), inputs(rewards=alike)))
        assert np.all(found[group(d, 0)] == 0)
        # The others have what they have without that group: its steps are in no mean and in no range.
        alone = inputs(rewards=alike, response_mask=rest, step_ids=np.where(rest, d["step_ids"], -1))
        np.testing.assert_allclose(found, advantages_of(recipe(name), alone), rtol=1e-6, atol=1e-7)
    asked = np.asarray(advantages_of(recipe("empg_all_groups"), inputs(rewards=alike)))
    assert np.abs(asked[group(d, 0)][d["response_mask"][group(d, 0)]]).min() > 0


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_are_constants_and_compile_with_steps_static(name):
    own, x = recipe(name), inputs()
    floats = ("rewards", "rewards_t", "log_prob_old", "values", "entropy", "kl_ref_t", "collision")

    def total(given):
        return jnp.sum(jnp.square(advantages_of(own, dataclasses.replace(x, **given))))

    slopes = jax.jit(jax.grad(total))({f: vars(x)[f] for f in floats})
    assert all(np.all(np.asarray(slope) == 0) for slope in slopes.values())


def test_targets_of_the_critic():
    d = data()
    expected = np.where(d["response_mask"], gae(d) + d["values"], 0.0)
    for name in ("gae", "gae_normalised"):
        np.testing.assert_allclose(value_targets(recipe(name), inputs()), expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        value_targets(recipe("divergence_augmented"), inputs()), v_trace(d)[0], rtol=2e-5, atol=1e-6
    )
    # With discount and trace 1 a target is what was earned from the token on.
    earned = np.where(d["response_mask"], np.cumsum(d["rewards_t"][:, ::-1], axis=1)[:, ::-1], 0.0)
    np.testing.assert_allclose(value_targets(recipe("gae", discount=1.0, trace=1.0), inputs()), earned, atol=1e-5)
    assert set(signals.VALUE_TARGETS) == {name for name, rule in SIGNALS.items() if "values" in rule.needs}
    with pytest.raises(ValueError, match="has the advantage 'empg', which has no critic; it must be one of gae"):
        value_targets(recipe("empg"), inputs())
    with pytest.raises(ValueError, match="values of the signal's inputs is None"):
        value_targets(recipe("gae"), inputs(values=None))


def test_normalised_over_tokens():
    a = jnp.array([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    deviation = math.sqrt((16 + 1 + 25) / 9 / 2)
    expected = [[-4 / 3 / deviation, -1 / 3 / deviation, 0], [5 / 3 / deviation, 0, 0]]
    np.testing.assert_allclose(signals.normalised_over_tokens(a, mask), expected, rtol=1e-6)
    # The mean of equal numbers can miss them by a rounding; that is no advantage. One token has none either.
    for same in (jnp.full((2, 3), 0.1), jnp.full((2, 3), 1e30), jnp.where(mask, 0.3, jnp.nan)):
        np.testing.assert_array_equal(signals.normalised_over_tokens(same, mask), np.zeros((2, 3)))
    np.testing.assert_array_equal(signals.normalised_over_tokens(a, mask & (a == 2.0)), np.zeros((2, 3)))
    assert np.isnan(signals.normalised_over_tokens(a.at[0, 0].set(jnp.nan), mask)).any()


def test_mean_of_others():
    rewards, ids = jnp.array([1.0, 5.0, 2.0, 6.0]), jnp.array([4, 7, 4, 4])
    np.testing.assert_allclose(signals.mean_of_others(rewards, ids), [4.0, 0.0, 3.5, 1.5], rtol=1e-6)
    np.testing.assert_array_equal(signals.mean_of_others(jnp.full(4, 0.1), ids)[jnp.array([0, 2, 3])], jnp.full(3, 0.1))
