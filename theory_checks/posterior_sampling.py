"""The steps of the regret proof of posterior sampling, exactly: two episodes of PSRL, one update, one joint law.

The episodes are those of `posterior_episodes`, all of whose parameters, plans and paths are enumerated.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import regret as bounds
from jaxrl_llm.exploration import posteriors
from jaxrl_llm.exploration.episodes import Episode
from theory_checks.check import Check
from theory_checks.check import Sides
from theory_checks.check import World
from theory_checks.posterior_episodes import EPISODES

DERIVED = "derived (docs/theory.md)"


def _draw_update(generator: np.random.Generator, count: int) -> list[Any]:
    batches = []
    for states in (2, 3):
        half, dimension, atoms = max(count // 2, 10), 3, 5
        kernels = generator.dirichlet(np.full(states, 0.4), (half, dimension))
        support = generator.dirichlet(np.full(dimension, 0.3), (half, atoms))
        prior = generator.dirichlet(np.ones(atoms), half)
        values = np.where(generator.random((half, states)) < 0.5, generator.integers(0, 2, (half, states)), 0.0)
        values = np.where(values == 0, generator.uniform(0, 1, (half, states)), values)
        kernels[0], values[0] = np.eye(states)[:2].mean(0), np.arange(states) == 0  # a fair coin has variance 1/4
        batches.append(tuple(jnp.asarray(x) for x in (kernels, support, prior, values)))
    return batches


def _measure_update(
    kernels: jax.Array, support: jax.Array, prior: jax.Array, values: jax.Array
) -> dict[str, jax.Array]:
    _, gamma = (x[0] for x in posteriors.moments(support[None], prior[None]))
    chances = support @ kernels  # [N, S]
    joint = prior[:, None] * chances
    total = jnp.sum(joint, axis=0)
    after = (joint / jnp.where(total > 0, total, 1.0)[None, :]).T  # [S, N]
    _, following = posteriors.moments(jnp.broadcast_to(support[None], (len(total), *support.shape)), after)
    expected = jnp.einsum("s,sij->ij", total, following)
    along = gamma @ (kernels @ values)
    of_mean = along @ (kernels @ values)
    inside = prior @ (chances @ jnp.square(values) - jnp.square(chances @ values))

    def margin(divisor: jax.Array) -> jax.Array:
        excess = expected - (gamma - along[:, None] * along[None, :] / divisor)
        return jnp.linalg.eigvalsh(excess)[-1]

    return {
        "sharp": margin(inside + of_mean + 1e-12),
        "printed": margin(0.25 + of_mean),
        "inside_only": margin(inside + 1e-12),
        "no_variance": margin(of_mean + 1e-12),
        "variance": inside + of_mean,
    }


UPDATE = World(name="posterior_sampling_update", draw=_draw_update, measure=_measure_update)


def _draw_laws(generator: np.random.Generator, count: int) -> list[Any]:
    outcomes, dimension = 7, 3
    probability = generator.dirichlet(np.ones(outcomes), count)
    u = generator.normal(size=(count, outcomes, dimension))
    noise = generator.normal(size=(count, outcomes, dimension))
    share = generator.uniform(0, 1, count) ** 4
    counts = generator.uniform(0.2, 3.0, (count, 4))
    values = generator.uniform(0, 1, (count, 4))
    roots = generator.normal(size=(count, 2, dimension, dimension)) * np.exp(generator.uniform(-3, 3, (count, 1, 1, 1)))
    arrays = (probability, u, noise, share, counts, values, roots)
    return [tuple(jnp.asarray(x) for x in arrays)]


def _decoupled(probability: jax.Array, x: jax.Array, u: jax.Array, gamma: jax.Array) -> dict[str, jax.Array]:
    return {
        "left": jnp.einsum("n,ni,ni->", probability, x, u),
        "square": jnp.einsum("n,ni,ij,nj->", probability, x, gamma, x),
    }


def _measure_laws(
    probability: jax.Array,
    u: jax.Array,
    noise: jax.Array,
    share: jax.Array,
    counts: jax.Array,
    values: jax.Array,
    roots: jax.Array,
) -> dict[str, jax.Array]:
    u = u - (probability @ u)[None]
    gamma = jnp.einsum("n,ni,nj->ij", probability, u, u)
    dual = u @ jnp.linalg.inv(gamma)
    found = {
        name: _decoupled(probability, x, u, gamma)
        for name, x in (("", dual + share * noise), ("attained_", dual), ("other_", u))
    }
    posterior = posteriors.dirichlet(counts[None, None, None, :] * jnp.ones((1, 4, 1, 4)))

    def spread(state: jax.Array) -> jax.Array:
        mean = posterior.mean(state)[0, 0, 0]
        return (mean @ jnp.square(values) - jnp.square(mean @ values)) / (jnp.sum(state[0, 0, 0]) + 1)

    def following(end: jax.Array) -> jax.Array:
        met = Episode(jnp.stack([jnp.zeros_like(end), end]), jnp.zeros(1, int), jnp.zeros(1))
        return spread(posterior.update(posterior.init(), met, jnp.zeros((2, 4))))

    mass, start = jnp.sum(counts), posterior.init()
    covariances = jnp.einsum("hij,hkj->hik", roots, roots)
    sharp = {
        f"bound_{width:g}": bounds.psrl_bayes_regret_sharp(width**2 * covariances, rank=3, episodes=50.0)
        for width in (1.0, 0.7)
    }
    return {
        **{prefix + name: value for prefix, part in found.items() for name, value in part.items()},
        "dirichlet": posterior.mean(start)[0, 0, 0] @ jax.vmap(following)(jnp.arange(4)),
        "shrunk": spread(start) * mass / (mass + 1),
        "shrunk_late": spread(start) * (mass + 1) / (mass + 2),
        **sharp,
        "bound_printed": bounds.psrl_bayes_regret(covariances, episodes=50.0),
    }


LAWS = World(name="posterior_sampling_laws", draw=_draw_laws, measure=_measure_laws)


def _check(name: str, statement: str, functions: tuple[str, ...], world: World, sides, wrong, **rest: Any) -> Check:
    return Check(
        name=f"posterior_sampling.{name}",
        paper=DERIVED,
        statement=statement,
        functions=functions,
        world=world,
        sides=sides,
        wrong=wrong,
        **rest,
    )


POSTERIOR, PLAN = "exploration.posteriors.finite_support", "tabular.plan"
SHARP, POTENTIAL = "bounds.regret.psrl_bayes_regret_sharp", "bounds.regret.psrl_potential_sharp"

CHECKS = [
    _check(
        "posterior",
        "P(history) times the posterior = P(history, parameter), over all histories of an episode",
        (POSTERIOR,),
        EPISODES,
        lambda m: Sides(m["posterior"], m["joint"]),
        lambda m: Sides(m["unchanged"], m["joint"]),
        equality=True,
    ),
    _check(
        "matching",
        "Bayes regret = E[V of the sampled MDP - V of the true one] (twin: plan in the mean)",
        (POSTERIOR, PLAN),
        EPISODES,
        lambda m: Sides(m["regret"], m["matched"]),
        lambda m: Sides(m["regret"], m["matched_mean"]),
        equality=True,
    ),
    _check(
        "simulation",
        "V of a plan in its own MDP - in the true one = E sum_h <X_h, theta_k - theta> on the true path",
        (PLAN, "tabular.evaluate", "exploration.posteriors.value_targets"),
        EPISODES,
        lambda m: Sides(m["simulated"], m["difference"]),
        lambda m: Sides(m["simulated_true"], m["difference"]),
        equality=True,
    ),
    _check(
        "true_part",
        "E<X_h, theta - posterior mean> = 0: X_h has not seen theta_h (twin: the sampled theta)",
        (POSTERIOR,),
        EPISODES,
        lambda m: Sides(m["true_part"], 0 * m["true_part"]),
        lambda m: Sides(m["sampled_part"], 0 * m["true_part"]),
        equality=True,
    ),
    _check(
        "episode",
        "Bayes regret of an episode <= sum_h sqrt(rank E[X^T Gamma X]), three steps (twin: 0.9 of it)",
        (POSTERIOR, SHARP),
        EPISODES,
        lambda m: Sides(m["regrets"], m["decoupled"]),
        lambda m: Sides(m["regrets"], 0.9 * m["decoupled"]),
    ),
    _check(
        "decoupling",
        "E<X, U> <= sqrt(rank E[X^T Gamma X]) for E U = 0, Cov U = Gamma (twin: rank - 1)",
        (SHARP,),
        LAWS,
        lambda m: Sides(m["left"], np.sqrt(3 * m["square"])),
        lambda m: Sides(m["left"], np.sqrt(2 * m["square"])),
    ),
    _check(
        "decoupling_attained",
        "the same with equality for X = Gamma^-1 U (twin: X = U)",
        (SHARP,),
        LAWS,
        lambda m: Sides(m["attained_left"], np.sqrt(3 * m["attained_square"])),
        lambda m: Sides(m["other_left"], np.sqrt(3 * m["other_square"])),
        equality=True,
        tolerance=1e-9,
    ),
    _check(
        "reduction",
        "E[Gamma'] <= Gamma - Gamma X X^T Gamma / Var(y) as matrices (twin: E Var(y|theta) below)",
        (POTENTIAL, "exploration.posteriors.moments"),
        UPDATE,
        lambda m: Sides(m["sharp"], 0 * m["sharp"]),
        lambda m: Sides(m["inside_only"], 0 * m["sharp"]),
        tolerance=1e-9,
    ),
    _check(
        "reduction_printed",
        "E[Gamma'] <= Gamma - Gamma X X^T Gamma / (R^2/4 + X^T Gamma X) (twin: X^T Gamma X alone)",
        ("bounds.regret.psrl_potential",),
        UPDATE,
        lambda m: Sides(m["printed"], 0 * m["printed"]),
        lambda m: Sides(m["no_variance"], 0 * m["printed"]),
    ),
    _check(
        "target_variance",
        "E Var(y|theta) + X^T Gamma X <= R^2/4: a quarter where the printed form has a half",
        (POTENTIAL,),
        UPDATE,
        lambda m: Sides(m["variance"], 0 * m["variance"] + 0.25),
        lambda m: Sides(m["variance"], 0 * m["variance"] + 0.9 * 0.25),
    ),
    _check(
        "dirichlet",
        "one observation multiplies the expected variance by a0 / (a0 + 1)",
        ("exploration.posteriors.dirichlet",),
        LAWS,
        lambda m: Sides(m["dirichlet"], m["shrunk"]),
        lambda m: Sides(m["dirichlet"], m["shrunk_late"]),
        equality=True,
    ),
    _check(
        "width",
        "a prior of 0.7 times the width has the smaller bound",
        (SHARP,),
        LAWS,
        lambda m: Sides(m["bound_0.7"], m["bound_1"]),
        lambda m: Sides(m["bound_1"], m["bound_0.7"]),
    ),
    _check(
        "sharp",
        "the sharp bound <= the printed one",
        (SHARP, "bounds.regret.psrl_bayes_regret"),
        LAWS,
        lambda m: Sides(m["bound_1"], m["bound_printed"]),
        lambda m: Sides(m["bound_1"], 0.7 * m["bound_printed"]),
    ),
]
