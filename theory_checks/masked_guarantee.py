"""What can be certified when some contexts are outside the trust region: the repaired guarantee (errata F2.7)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import context_mask
from jaxrl_llm.bounds import masked_gain_lower_bound
from jaxrl_llm.bounds import sampled_context_masked_gain
from jaxrl_llm.bounds import sampled_hit_probability
from jaxrl_llm.bounds import surrogate_error_bounds
from theory_checks import token_trees as trees
from theory_checks.check import Check
from theory_checks.check import Sides
from theory_checks.check import World

DERIVED = "derived (docs/theory.md)"
THRESHOLD, VOCABULARY, HORIZON = 0.02, 3, 5


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    """Small differences everywhere, and four per cent of the contexts with fresh logits."""
    pi, mu, rewards = trees.draw(
        generator,
        worlds=count,
        vocabulary=VOCABULARY,
        horizon=HORIZON,
        noise=np.full(count, 0.05),
        share=np.ones(count),
        kind=np.arange(count) % 3,
    )
    broken = [jnp.where(generator.random((*p.shape[:2], 1)) < 0.04, 2 * generator.normal(size=p.shape), p) for p in pi]
    return [(broken, mu, rewards)]


def _measure(pi: Any, mu: Any, rewards: jax.Array) -> dict[str, jax.Array]:
    _, kl, _ = trees.divergences(pi, mu)
    mixed = [jnp.where((k <= THRESHOLD)[:, None], p, m) for k, p, m in zip(kl, pi, mu, strict=True)]
    law_mu = jnp.exp(trees.sequence_log_probs(mu))
    law_pi = jnp.exp(trees.sequence_log_probs(pi))
    kl_t, ratios = trees.per_sequence(kl), trees.token_log_ratios(pi, mu)
    every = jnp.ones(ratios.shape, bool)
    inside = context_mask(kl_t, every, threshold=THRESHOLD)
    hit = jnp.any(~inside, axis=1)
    excess = jnp.where(inside, jnp.expm1(ratios), 0.0)
    inputs = trees.bound_inputs(mixed, mu)
    context = trees.error_of_surrogate(mixed, mu, rewards)[1]
    row = jnp.ones((1, HORIZON), bool)
    hits = jax.vmap(lambda k: sampled_hit_probability(k[None], row, threshold=THRESHOLD).value)(kl_t)
    sampled = sampled_context_masked_gain(ratios, kl_t, every, law_mu * rewards * law_mu.size, threshold=THRESHOLD)
    error_bound = surrogate_error_bounds(inputs).unified_sharp
    return {
        "gain": trees.error_of_surrogate(pi, mu, rewards)[0],
        "certified": masked_gain_lower_bound(
            context_masked_gain=context,
            error_bound=error_bound,
            hit_probability=jnp.sum(jnp.where(hit, law_mu, 0.0)),
            sequence_tv=inputs.sequence_tv,
        ),
        "without_hit": context - error_bound,
        "context": context,
        "sampled_context": sampled.value,
        "sequence": jnp.sum(law_mu * jnp.where(hit, 0.0, rewards) * jnp.sum(jnp.expm1(ratios), axis=1)),
        "between": jnp.sum(law_mu * jnp.where(hit, rewards, 0.0) * jnp.sum(excess, axis=1)),
        "hit_mu": jnp.sum(jnp.where(hit, law_mu, 0.0)),
        "sampled_hit": jnp.sum(law_mu * hits),
        "hit_pi": jnp.sum(jnp.where(hit, law_pi, 0.0)),
        "sequence_tv": inputs.sequence_tv,
        "max_kl": inputs.max_kl,
        "max_kl_everywhere": jnp.max(jnp.concatenate(kl)),
    }


WORLD = World(name="masked_guarantee", draw=_draw, measure=_measure)

CHECKS = [
    Check(
        name="masked_guarantee.lower_bound",
        paper=DERIVED,
        statement="L'(pi~) - (J(pi) - J(mu)) <= B(pi~) + span (P_mu(hit) + TV); wrong without the hit term",
        functions=("bounds.masked_guarantee.masked_gain_lower_bound",),
        world=WORLD,
        sides=lambda m: Sides(m["context"] - m["gain"], m["context"] - m["certified"]),
        wrong=lambda m: Sides(m["context"] - m["gain"], m["context"] - m["without_hit"]),
    ),
    Check(
        name="masked_guarantee.hit_probability",
        paper=DERIVED,
        statement="P_pi(hit) <= P_mu(hit) + TV(P^{pi~}, P^mu); wrong without the TV",
        functions=("bounds.masked_guarantee.sampled_hit_probability",),
        world=WORLD,
        sides=lambda m: Sides(m["hit_pi"], m["hit_mu"] + m["sequence_tv"]),
        wrong=lambda m: Sides(m["hit_pi"], m["hit_mu"]),
    ),
    Check(
        name="masked_guarantee.sampled_hit_probability",
        paper=DERIVED,
        statement="E of the sampled hit = P_mu(some visited context has KL > delta)",
        functions=("bounds.masked_guarantee.sampled_hit_probability",),
        world=WORLD,
        sides=lambda m: Sides(m["sampled_hit"], m["hit_mu"]),
        wrong=lambda m: Sides(m["sampled_hit"], m["hit_pi"]),
        equality=True,
    ),
    Check(
        name="masked_guarantee.context_masked_gain",
        paper=DERIVED,
        statement="E_mu[R sum_t 1[c_t in G](rho_t - 1)] = L'(pi~)",
        functions=("bounds.masked_guarantee.sampled_context_masked_gain", "bounds.masked_guarantee.context_mask"),
        world=WORLD,
        sides=lambda m: Sides(m["sampled_context"], m["context"]),
        wrong=lambda m: Sides(m["sequence"], m["context"]),
        equality=True,
    ),
    Check(
        name="masked_guarantee.sequence_mask_differs",
        paper=DERIVED,
        statement="context-masked gain = sequence-masked gain + E_mu[1(hit) R sum_{c_t in G} (rho_t - 1)]",
        functions=("bounds.masked_guarantee.sampled_context_masked_gain",),
        world=WORLD,
        sides=lambda m: Sides(m["context"], m["sequence"] + m["between"]),
        wrong=lambda m: Sides(m["context"], m["sequence"] - m["between"]),
        equality=True,
    ),
    Check(
        name="masked_guarantee.premise",
        paper=DERIVED,
        statement="the largest KL of pi~ <= delta; not so for pi, whatever is masked",
        functions=("bounds.masked_guarantee.context_masked_inputs",),
        world=WORLD,
        sides=lambda m: Sides(m["max_kl"], np.full_like(m["max_kl"], THRESHOLD)),
        wrong=lambda m: Sides(m["max_kl_everywhere"], np.full_like(m["max_kl"], THRESHOLD)),
    ),
]
