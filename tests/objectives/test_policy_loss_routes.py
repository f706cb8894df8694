"""From hidden states to the loss: `token_loss`, its gradient made forward, against `token_statistics` and its VJP."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels import Reference
from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import policy_loss
from jaxrl_llm.objectives import policy_weights
from jaxrl_llm.objectives import token_losses
from jaxrl_llm.objectives.aggregation import token_weights

B, T, D, V = 4, 3, 8, 37
BOTH = {name: recipe for name, recipe in RECIPES.items() if recipe.ratio == "token"}
NAMES = ("log_prob", "entropy", "kl", "kl_reverse")


def make_batch():
    keys = jax.random.split(jax.random.key(5), 8)
    hidden, head = jax.random.normal(keys[0], (B * T, D)), jax.random.normal(keys[1], (D, V))
    mask = jnp.arange(T)[None, :] < jnp.array([3, 1, 2, 3])[:, None]
    targets = jax.random.randint(keys[2], (B * T,), 0, V)
    # Two sequences that every trust region accepts, and two that none does.
    far = jnp.repeat(jnp.array([0.004, 0.5, 0.008, 0.5]), T)[:, None]
    other = Reference(hidden + far * jax.random.normal(keys[3], hidden.shape), head)
    log_prob = token_statistics(*other[:2], targets, statistics=("log_prob",)).log_prob
    assert log_prob is not None
    noise = [0.2 * jax.random.normal(key, (B, T)) for key in keys[4:7]]
    old, behaviour, ref = (log_prob.reshape(B, T) + x for x in noise)
    given = {
        "response_mask": mask,
        "advantages": jnp.array([1.0, -0.5, 0.3, -1.2]),
        "log_prob_old": old,
        "log_prob_behaviour": behaviour,
        "log_prob_ref": ref,
    }
    return hidden, head, targets, other, given


def names_of(recipe):
    return ("log_prob", "entropy", "kl") if recipe.log_min_p is not None else NAMES


def by_statistics(recipe, hidden, head, targets, other, given):
    found = token_statistics(
        hidden, head, targets, reference=other, log_min_p=recipe.log_min_p, statistics=names_of(recipe)
    )
    shaped = jax.tree.map(lambda x: x.reshape(B, T), found)
    total, count = policy_loss(
        recipe,
        log_prob=shaped.log_prob,
        kl_t=None if shaped.kl_reverse is None else jax.lax.stop_gradient(shaped.kl_reverse),
        kl_ref_t=shaped.kl,
        entropy=shaped.entropy,
        target_kept=shaped.target_kept,
        **given,
    ).loss
    return total / count


def by_token_loss(recipe, hidden, head, targets, other, given):
    """Constants from a scoring pass, then the loss of each token from its own statistics."""
    fixed = jax.lax.stop_gradient((hidden, head))
    first = token_statistics(*fixed, targets, reference=other, log_min_p=recipe.log_min_p, statistics=names_of(recipe))
    shaped = jax.tree.map(lambda x: x.reshape(B, T), first)
    mask = given["response_mask"]
    constants, accepted = policy_weights(
        recipe,
        log_prob=shaped.log_prob,
        response_mask=mask,
        log_prob_old=given["log_prob_old"],
        log_prob_behaviour=given["log_prob_behaviour"],
        kl_t=shaped.kl_reverse,
        target_kept=shaped.target_kept,
    )
    kept = mask & accepted[:, None] if recipe.normalise_by == "accepted" else mask
    share, count = token_weights(kept, mode=recipe.aggregation)
    sides = (
        jnp.broadcast_to(given["advantages"][:, None], (B, T)),
        given[f"log_prob_{recipe.denominator}"],
        given["log_prob_ref"],
        constants,
        share,
    )

    def loss(values, advantages, below, ref, weights, share):
        log_prob = values.log_prob
        if values.target_kept is not None:
            log_prob = jnp.where(values.target_kept, log_prob, 0.0)
        each = token_losses(
            recipe,
            log_prob=log_prob,
            advantages=advantages,
            log_ratio=log_prob - below,
            weights=weights,
            log_ratio_ref=log_prob - ref,
            kl_ref_t=values.kl,
            entropy=values.entropy,
        )
        return share * each

    total, _ = token_loss(
        hidden,
        head,
        targets,
        loss,
        *(side.reshape(-1) for side in sides),
        reference=other,
        log_min_p=recipe.log_min_p,
        mask=mask.reshape(-1),
        statistics=("log_prob", "entropy", "kl"),
    )
    return total / count


def test_both_routes_of_the_kernels_give_the_same_loss_and_gradient():
    """Loss and gradients of every recipe by both routes, from one program."""
    hidden, head, targets, other, given = make_batch()

    def everything(hidden, head):
        def of(route, recipe):
            return jax.value_and_grad(lambda h, w: route(recipe, h, w, targets, other, given), (0, 1))(hidden, head)

        return {name: [of(route, recipe) for route in (by_statistics, by_token_loss)] for name, recipe in BOTH.items()}

    routes = jax.jit(everything)(hidden, head)
    for name, ((one, slopes), (other_one, other_slopes)) in routes.items():
        np.testing.assert_allclose(one, other_one, rtol=1e-5, atol=1e-6, err_msg=name)
        for slope, other_slope in zip(slopes, other_slopes, strict=True):
            largest = float(jnp.max(jnp.abs(slope)))
            assert largest > 1e-3, name
            np.testing.assert_allclose(slope, other_slope, rtol=0, atol=1e-5 * largest, err_msg=name)
    losses = {round(float(pair[0][0]), 5) for pair in routes.values()}
    assert len(losses) > len(routes) / 2, "the agreement must not be that of one loss with itself"
