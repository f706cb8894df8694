"""Perturbed routers: which choices flip, and a sampler that flips them while its trainer does not."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.experts import Router
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.transformer import positions_of
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import perturb
from jaxrl_llm.rollouts.collect.protocol import PolicySnapshot
from jaxrl_llm.rollouts.collect.samplers import PolicySampler

EXPERTS = ExpertsConfig(count=32, chosen=4, width=8, shared=1, dense_layers=1)
WIDTH = 12


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(tiny(num_layers=3, experts=EXPERTS), rngs=nnx.Rngs(0))
    model.final_norm.scale[...] = 12 * model.final_norm.scale[...]
    return model


@pytest.fixture(scope="module")
def texts() -> tuple[jax.Array, jax.Array]:
    tokens = jax.random.randint(jax.random.key(1), (64, WIDTH), 1, 64)
    return tokens, jnp.arange(WIDTH) >= jnp.arange(64)[:, None] % 6


@pytest.fixture(scope="module")
def selections(model, texts) -> Callable[..., jax.Array]:
    """Of the engine with these perturbations, each made once."""

    @functools.cache
    def chosen(*names: str) -> jax.Array:
        engine = perturb.combine(*(perturb.perturbation(name) for name in names))
        return jax.jit(lambda tokens, mask: perturb.perturbed_selections(model, tokens, mask, engine))(*texts)

    return chosen


def test_flips_are_those_of_sets() -> None:
    """Counted token by token; the order of the experts means nothing, nor does padding."""
    generator = np.random.default_rng(0)
    first, second = (np.argsort(generator.random((2, 5, 3, 6)))[..., :2] for _ in range(2))
    second[0] = first[0, ..., ::-1]
    mask = np.array([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]], bool)
    choices = routers = tokens = 0
    for row, place in zip(*np.nonzero(mask), strict=True):
        lost = [len(set(a) - set(b)) for a, b in zip(first[row, place], second[row, place], strict=True)]
        choices, routers, tokens = choices + sum(lost), routers + sum(map(bool, lost)), tokens + any(lost)
    found = perturb.route_flips(jnp.asarray(first), jnp.asarray(second), jnp.asarray(mask))
    assert found == ((choices, 7 * 3 * 2), (routers, 7 * 3), (tokens, 7))
    assert 0 < choices < 2 * routers
    with pytest.raises(ValueError, match=r"selections_other must have the shape \(2, 5, 3, 2\) .* \(2, 4, 3, 2\)"):
        perturb.route_flips(jnp.asarray(first), jnp.asarray(second[:, 1:]), jnp.asarray(mask))


def test_a_rounded_router_multiplies_in_bfloat16(model) -> None:
    """Input, kernel and logits are what an engine in bfloat16 has; the model itself stays as it was."""
    router = next(module for _, module in nnx.iter_modules(model) if isinstance(module, Router))
    rounded = perturb.with_router_rounding(model, perturb.round_to_bf16)
    other = next(module for _, module in nnx.iter_modules(rounded) if isinstance(module, Router))
    x = jax.random.normal(jax.random.key(2), (5, 32))
    narrow = [np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float32) for array in (x, router.kernel[...])]
    logits = (narrow[0] @ narrow[1]).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_allclose(other(x, None)[0].scores, 1 / (1 + np.exp(-logits)), atol=2e-3)
    assert router.rounding is None
    assert np.abs(router(x, None)[0].scores - other(x, None)[0].scores).max() > 1e-4


def test_flips_by_precision(model, texts, selections) -> None:
    """None without a perturbation; few for bfloat16, more for int8, most for fp8; a rounded router makes some too."""
    tokens, mask = texts
    rows = jax.jit(lambda tokens: model.rows(model.embed(tokens), positions_of(mask), Visibility(mask)).routes)(tokens)
    exact = jnp.stack([routes.selection for routes in rows if routes is not None], axis=2)
    shares = {}
    for names in (("none",), ("bf16_router",), ("bf16_weights",), ("int8_weights",), ("fp8_weights",), ("fp8_cache",)):
        flips = perturb.route_flips(exact, selections(*names), mask)
        shares[names[0]] = [float(total / count) for total, count in flips]
    assert shares["none"] == [0, 0, 0]
    routers = {name: share[1] for name, share in shares.items()}
    assert 0 < routers["bf16_router"] < 0.1
    assert 0 < routers["bf16_weights"] < routers["int8_weights"] < routers["fp8_weights"] < 0.9
    assert 0 < routers["fp8_cache"] < routers["fp8_weights"]
    for choices, router, token in list(shares.values())[1:]:
        assert choices < router < token


def test_perturbations_of_routers_and_weights_combine(texts, selections) -> None:
    both = selections("bf16_router", "int8_weights")
    for alone in (("bf16_router",), ("int8_weights",)):
        assert perturb.route_flips(both, selections(*alone), texts[1]).routers[0] > 0


def test_the_sampler_flips_and_records_what_it_drew_from(model) -> None:
    """Its log-probs are those of the perturbed engine, and not of the model."""
    tokens, mask = jax.random.randint(jax.random.key(3), (8, 5), 1, 64), jnp.ones((8, 5), bool)
    engine = perturb.Perturbation(router=lambda x: perturb.quantise_fp8(x, block=8))
    options = {"response_length": 6, "group_size": 4, "end_ids": (), "pad_id": 0}
    sampler = PolicySampler(model, SamplingSettings(), perturbation=engine, **options)
    assert not sampler.law.known
    graphdef, state = nnx.split(model)
    rollout = sampler.sample(
        PolicySnapshot(graphdef, state, 0), np.asarray(tokens), np.asarray(mask), jax.random.key(0), 0
    )
    taken = {}
    for name, one in (("engine", engine), ("model", perturb.Perturbation())):
        logits = perturb.perturbed_logits(model, rollout.tokens, rollout.token_mask, one, response_width=6)
        log_p = np.asarray(jax.nn.log_softmax(logits))
        taken[name] = np.take_along_axis(log_p, rollout.tokens[:, 5:, None], axis=2)[..., 0]
    recorded = rollout.log_prob_behaviour[:, 5:]
    near = np.abs(recorded - taken["engine"])
    # A tie of rounded numbers may fall either way in two programs, so a few tokens may differ.
    assert np.mean(near < 1e-3) > 0.9
    assert np.mean(np.abs(recorded - taken["model"]) < 1e-3) < 0.5


def test_a_dense_model_has_no_routers_to_perturb(texts) -> None:
    dense = Transformer(tiny(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rounds routers, and the model has none"):
        perturb.perturbed_model(dense, perturb.perturbation("bf16_router"))
    with pytest.raises(ValueError, match="the model has no experts"):
        perturb.perturbed_selections(dense, *texts, perturb.Perturbation())
