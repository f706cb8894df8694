"""Hypermodels in the linear-Gaussian case: forms of the update, what the factor tracks, losses over index sets.

Expectations over perturbations and indices are sums over their whole finite support; those over the sphere are closed
forms. Only the sequential projection and the tracked covariance are simulated, with their failures counted.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds.regret import ANTI_CONCENTRATION
from jaxrl_llm.bounds.regret import covariance_tracking_dimension
from jaxrl_llm.bounds.regret import sequential_projection_dimension
from jaxrl_llm.exploration import Data
from jaxrl_llm.exploration import Gaussian
from jaxrl_llm.exploration import Hypermodel
from jaxrl_llm.exploration import given_features
from jaxrl_llm.exploration import hypermodel
from jaxrl_llm.exploration import hypermodel_update
from jaxrl_llm.exploration import index_loss
from jaxrl_llm.exploration import indices
from jaxrl_llm.exploration import separated_loss
from jaxrl_llm.exploration.gaussian import hypermodel_update_inverse_form
from jaxrl_llm.exploration.heads import OutputLayer
from jaxrl_llm.exploration.index_losses import squared_norm
from theory_checks import index_size
from theory_checks.check import Check
from theory_checks.check import Measured
from theory_checks.check import Sides
from theory_checks.check import World

PAPER = "arXiv 2407.13195"
D, M, T, ENUMERATED = 3, 4, 6, 2
"""Dimensions of features and index; rounds; rounds over whose perturbations everything is enumerated."""

NOISE = 0.7
ENUMERABLE = (indices.CUBE, indices.COORDINATE, indices.SPARSE)
WALKS, STEPS, EPS, DELTA, SMALL = 40, 40, 0.5, 0.05, 8
CUBE_M, TRACKED_D = 6, 3


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    roots = generator.normal(size=(count, D, D))
    shapes = ((D,), (D, M), (T, D), (T,), (T, M))
    rest = (generator.normal(size=(count, *shape)) for shape in shapes)
    arms = generator.integers(0, D, (count, T))
    return [tuple(jnp.asarray(x) for x in (roots, *rest, arms))]


def _walk(
    update: Callable[..., Hypermodel], model: Hypermodel, rows: tuple[jax.Array, ...], noise: float
) -> Hypermodel:
    for x, y, z in zip(*rows, strict=True):
        model = update(model, x, y, z, noise_scale=noise)
    return model


def _flat(tree: Any) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _enumerated(law: indices.IndexLaw, start: Hypermodel, rows: tuple[jax.Array, ...], noise: float) -> jax.Array:
    """E A_t A_t^T over every sequence of perturbations of the law."""
    assert law.update_set is not None
    support = law.update_set(M)
    support = support / np.linalg.norm(support[0])
    every = jnp.asarray(list(itertools.product(support, repeat=ENUMERATED)))

    def square(z: jax.Array) -> jax.Array:
        factor = _walk(hypermodel_update, start, (rows[0][:ENUMERATED], rows[1][:ENUMERATED], z), noise).factor
        return factor @ factor.T

    return jnp.mean(jax.vmap(square)(every), axis=0)


def _losses(trained: Any, prior: Any, rows: Data, head: Any) -> dict[str, jax.Array]:
    """Value and gradient of the loss over update sets, and of the separated one."""

    def over(law: indices.IndexLaw) -> jax.Array:
        assert law.update_set is not None
        chosen = jnp.asarray(law.update_set(M))[None]
        loss = jax.value_and_grad(lambda t: jnp.sum(index_loss(head, t, prior, rows, chosen, noise_scale=NOISE)))
        return _flat(loss(trained))

    separated = jax.value_and_grad(lambda t: jnp.sum(separated_loss(head.parts, t, prior, rows, noise_scale=NOISE)))
    return {
        "over_sets": jnp.stack([over(law) for law in ENUMERABLE]),
        "over_one_hot": over(indices.ONE_HOT),
        "separated": _flat(separated(trained)),
    }


def _measure(
    root: jax.Array,
    mean: jax.Array,
    factor: jax.Array,
    x: jax.Array,
    y: jax.Array,
    z: jax.Array,
    arms: jax.Array,
) -> dict[str, jax.Array]:
    noise = NOISE
    covariance = root @ root.T + 0.2 * jnp.eye(D)
    start, rows = Hypermodel(Gaussian(mean, covariance), factor), (x, y, z)
    end = _walk(hypermodel_update, start, rows, noise)
    square_root = jnp.pad(jnp.linalg.cholesky(covariance), ((0, 0), (0, M - D)))
    tracked = start._replace(factor=square_root)
    first = (x[:ENUMERATED], y[:ENUMERATED], z[:ENUMERATED])
    armed = _walk(hypermodel_update, Hypermodel(Gaussian(mean, jnp.eye(D)), factor), (jnp.eye(D)[arms], y, z), noise)
    counts = jnp.sum(jax.nn.one_hot(arms, D), axis=0)[:, None]
    sums = jax.nn.one_hot(arms, D).T @ z
    head = hypermodel(given_features(D), index_dimension=M, prior_features=given_features(D))
    trained = ((), OutputLayer(factor[None], mean[None]))
    prior = ((), OutputLayer(square_root[None], jnp.zeros((1, D))))
    data = Data(x, jnp.zeros(T, int), y, z)
    return {
        "rank_one": _flat(end),
        "inverse": _flat(_walk(hypermodel_update_inverse_form, start, rows, noise)),
        "wrong_inverse": _flat(_walk(hypermodel_update_inverse_form, start, (x, y, z), 1.02 * noise)),
        "natural": jnp.linalg.solve(end.posterior.covariance, end.factor),
        "unrolled_start": jnp.linalg.solve(covariance, factor),
        "unrolled_sum": x.T @ z / noise,
        "squares": jnp.stack([_enumerated(law, tracked, rows, noise) for law in ENUMERABLE]),
        "one_hot_square": _enumerated(indices.ONE_HOT, tracked, rows, noise),
        "covariance": _walk(hypermodel_update, tracked, first, noise).posterior.covariance,
        "armed": armed.factor,
        "armed_formula": (factor + sums / noise) / (1 + counts / noise**2),
        "armed_wrong": (factor + sums) / (1 + counts / noise**2),
        **_losses(trained, prior, data, head),
        **_minimiser(factor, data, head, noise),
    }


def _minimiser(factor: jax.Array, data: Data, head: Any, noise: float) -> dict[str, jax.Array]:
    """Gradient of the loss with its ridge, prior scale 1, at (mu_t, A_t) and with the wrong ridge."""
    start = Hypermodel(Gaussian(jnp.zeros(D), jnp.eye(D)), factor)
    end = _walk(hypermodel_update, start, (data.inputs, data.rewards, data.perturbations), noise)
    best = OutputLayer((end.factor - factor)[None], end.posterior.mean[None])
    prior = ((), OutputLayer(factor[None], jnp.zeros((1, D))))
    chosen = jnp.asarray(indices.COORDINATE.update_set(M))[None]  # pyright: ignore[reportOptionalCall]

    def objective(layer: OutputLayer, ridge: float) -> jax.Array:
        losses = index_loss(head, ((), layer), prior, data, chosen, noise_scale=noise)
        return jnp.sum(losses) + ridge * squared_norm(layer)

    gradient = jax.grad(objective)
    return {"gradient": _flat(gradient(best, noise**2)), "wrong_gradient": _flat(gradient(best, 2 * noise**2))}


WORLD = World(name="exploration", draw=_draw, measure=_measure)


def _draw_index(generator: np.random.Generator, count: int) -> list[Any]:
    directions = generator.normal(size=(count, CUBE_M))
    directions[0] = 1  # equal weights attain the constant of the cube
    directions[1 : 1 + CUBE_M] = np.eye(CUBE_M)[: max(0, min(CUBE_M, count - 1))]
    sizes = generator.integers(2, 400, count).astype(float)
    return [(jnp.asarray(directions), jnp.asarray(sizes))]


def _measure_index(direction: jax.Array, size: jax.Array) -> dict[str, jax.Array]:
    unit = direction / jnp.linalg.norm(direction)

    def moments(law: indices.IndexLaw) -> tuple[jax.Array, jax.Array]:
        assert law.update_set is not None
        along = jnp.asarray(law.update_set(CUBE_M)) @ unit
        return jnp.mean(jnp.square(along)), jnp.mean((along >= 1 - 1e-12).astype(along.dtype))

    found = {law.name: moments(law) for law in (*ENUMERABLE, indices.SPARSE_CONSISTENT)}
    # <xi, v> = sqrt(M) u_1, and u_1^2 ~ Beta(1/2, (M - 1)/2) on the unit sphere.
    sphere = jax.scipy.special.betainc((size - 1) / 2, 0.5, 1 - 1 / size) / 2
    return {
        "second": jnp.stack([found[law.name][0] for law in ENUMERABLE]),
        "second_consistent": found["sparse_consistent"][0],
        "tails": jnp.stack([found["cube"][1], found["coordinate"][1], sphere, jax.scipy.special.ndtr(-1.0)]),
    }


INDEX_WORLD = World(name="exploration_indices", draw=_draw_index, measure=_measure_index)
TABLE = np.array(
    [ANTI_CONCENTRATION["cube"], 1 / (2 * CUBE_M), *(ANTI_CONCENTRATION[n] for n in ("sphere", "gaussian"))]
)
TWO_SIDED = np.array([7 / 32, *TABLE[1:]])


def _draw_walk(generator: np.random.Generator, count: int) -> list[Any]:
    return [(jax.random.split(jax.random.key(int(generator.integers(2**31))), max(count // 20, 4)),)]


def _failures(key: jax.Array, size: int) -> jax.Array:
    """Share of adaptive walks with |s + sum x_i z_i|^2 outside (1 -+ eps)(1 + sum x_i^2) at some time."""

    def walk(walk_key: jax.Array) -> jax.Array:
        first_key, steps_key = jax.random.split(walk_key)
        start = indices.SPHERE.perturbation(first_key, (size,))

        def step(carry: tuple[jax.Array, jax.Array, jax.Array], z: jax.Array) -> tuple[Any, None]:
            total, expected, failed = carry
            # Adaptive: a long step where the sum is already too long, a short one else.
            x = jnp.where(jnp.sum(jnp.square(total)) > expected, 1.0, 0.3)
            total, expected = total + x * z, expected + x**2
            return (total, expected, failed | (jnp.abs(jnp.sum(jnp.square(total)) / expected - 1) > EPS)), None

        draws = indices.SPHERE.perturbation(steps_key, (STEPS, size))
        (_, _, failed), _ = jax.lax.scan(step, (start, jnp.asarray(1.0), jnp.asarray(False)), draws)
        return failed

    return jnp.mean(jax.vmap(walk)(jax.random.split(key, WALKS)).astype(jnp.float64))


def _measure_walk(key: jax.Array) -> dict[str, jax.Array]:
    with jax.ensure_compile_time_eval():
        needed = int(np.ceil(float(sequential_projection_dimension(accuracy=EPS, failure=DELTA, rounds=STEPS))))
    return {"failures": _failures(key, needed), "failures_small": _failures(key, SMALL)}


WALK_WORLD = World(name="exploration_walks", draw=_draw_walk, measure=_measure_walk)


def _measure_tracking(key: jax.Array) -> dict[str, jax.Array]:
    with jax.ensure_compile_time_eval():
        needed = covariance_tracking_dimension(dimension=TRACKED_D, rounds=STEPS, failure=DELTA)
        known = index_size.blocks(0, TRACKED_D, STEPS)
    sizes = jnp.stack([jnp.ceil(needed), jnp.asarray(2.0 * SMALL)]).astype(jnp.float32)
    found = jax.vmap(lambda size: index_size.failures(key, *known, size, WALKS))(sizes)
    return {"failures": found[0], "failures_small": found[1]}


TRACKING_WORLD = World(name="exploration_tracking", draw=_draw_walk, measure=_measure_tracking)


def _check(
    name: str,
    statement: str,
    function: str,
    sides: Callable[[Measured], Sides],
    wrong: Callable[[Measured], Sides],
    *,
    world: World = WORLD,
    equality: bool = True,
    tolerance: float = 1e-10,
) -> Check:
    return Check(
        name=f"exploration.{name}",
        paper=PAPER,
        statement=statement,
        functions=(function,),
        world=world,
        sides=sides,
        wrong=wrong,
        equality=equality,
        tolerance=tolerance,
    )


CHECKS = [
    _check(
        "rank_one",
        "rank-one form of the update = printed form with inverses",
        "exploration.gaussian.hypermodel_update",
        lambda m: Sides(m["rank_one"], m["inverse"]),
        lambda m: Sides(m["rank_one"], m["wrong_inverse"]),
    ),
    _check(
        "unrolled",
        "Sigma_t^-1 A_t = Sigma_0^-1 A_0 + sum x z^T / sigma",
        "exploration.gaussian.hypermodel_update",
        lambda m: Sides(m["natural"], m["unrolled_start"] + m["unrolled_sum"]),
        lambda m: Sides(m["natural"], m["unrolled_start"] - m["unrolled_sum"]),
    ),
    _check(
        "tracking",
        "E A_t A_t^T = Sigma_t for fixed features (cube, coordinate, sparse)",
        "exploration.gaussian.hypermodel_update",
        lambda m: Sides(m["squares"], m["covariance"][:, None]),
        lambda m: Sides(m["one_hot_square"], m["covariance"]),
    ),
    _check(
        "arms",
        "A_a = (A_0a / s^2 + sum z / sigma) / (1 / s^2 + N_a / sigma^2) for the arms of a bandit",
        "exploration.gaussian.hypermodel_update",
        lambda m: Sides(m["armed"], m["armed_formula"]),
        lambda m: Sides(m["armed"], m["armed_wrong"]),
    ),
    _check(
        "loss",
        "mean over an isotropic update set = (mean - r)^2 + |factor - sigma z|^2, with its gradient",
        "exploration.index_losses.separated_loss",
        lambda m: Sides(m["over_sets"], m["separated"][:, None]),
        lambda m: Sides(m["over_one_hot"], m["separated"]),
    ),
    _check(
        "minimiser",
        "the loss with ridge sigma^2 / s^2 is least at (mu_t, A_t)",
        "exploration.index_losses.index_loss",
        lambda m: Sides(m["gradient"], np.zeros_like(m["gradient"])),
        lambda m: Sides(m["wrong_gradient"], np.zeros_like(m["gradient"])),
    ),
    _check(
        "isotropy",
        "mean of <xi, v>^2 over an update set = |v|^2 (cube, coordinate, sparse)",
        "exploration.indices.update_indices",
        lambda m: Sides(m["second"], np.ones_like(m["second"])),
        lambda m: Sides(m["second_consistent"], np.ones_like(m["second_consistent"])),
        world=INDEX_WORLD,
    ),
    _check(
        "anti_concentration",
        "table of P(<xi, v> >= 1), |v| = 1 <= the exact probability (cube, coordinate, sphere, Gaussian)",
        "bounds.regret.ensemble_linear_regret",
        lambda m: Sides(np.broadcast_to(TABLE, m["tails"].shape), m["tails"]),
        lambda m: Sides(np.broadcast_to(TWO_SIDED, m["tails"].shape), m["tails"]),
        world=INDEX_WORLD,
        equality=False,
    ),
    _check(
        "projection",
        "share of adaptive random walks off by eps at some time, at the theorem's M <= delta",
        "bounds.regret.sequential_projection_dimension",
        lambda m: Sides(m["failures"], np.full_like(m["failures"], DELTA)),
        lambda m: Sides(m["failures_small"], np.full_like(m["failures"], DELTA)),
        world=WALK_WORLD,
        equality=False,
    ),
    _check(
        "covariance",
        "share of runs with A_t A_t^T outside (1 -+ 1/2) Sigma_t at some time, at the lemma's M <= delta",
        "bounds.regret.covariance_tracking_dimension",
        lambda m: Sides(m["failures"], np.full_like(m["failures"], DELTA)),
        lambda m: Sides(m["failures_small"], np.full_like(m["failures"], DELTA)),
        world=TRACKING_WORLD,
        equality=False,
    ),
]
