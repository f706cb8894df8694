"""The simulation of how large an index must be: its law is that of the update, and what it finds is what it says."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.exploration import Hypermodel
from jaxrl_llm.exploration import hypermodel_update
from jaxrl_llm.exploration import isotropic_prior
from theory_checks import cli
from theory_checks import index_size


def test_the_simulated_walk_has_the_law_of_the_update(key):
    """Failures of the blocks of `index_size` against those of the library's update, round by round, M = 30, d = 2."""
    dimension, size, rounds, runs = 2, 30, 8, 2000
    rows = np.random.default_rng(0).normal(size=(rounds, dimension))  # those of index_size.blocks with seed 0
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def failed(walk_key):
        first, rest = jax.random.split(walk_key)
        factor = jax.random.normal(first, (dimension, size)) / size**0.5
        stored = jax.random.normal(rest, (rounds, size)) / size**0.5
        start = Hypermodel(isotropic_prior(dimension, 1.0), factor)

        def step(model, row):
            x, z = row
            after = hypermodel_update(model, x, jnp.zeros(()), z, noise_scale=1.0)
            return after, outside(after)

        _, left = jax.lax.scan(step, start, (jnp.asarray(rows), stored))
        return outside(start) | jnp.any(left)

    def outside(model):
        white = jnp.linalg.inv(jnp.linalg.cholesky(model.posterior.covariance)) @ model.factor
        return jnp.any(jnp.abs(jnp.linalg.eigvalsh(white @ white.T) - 1) > index_size.BAND)

    expected = jnp.mean(jax.vmap(failed)(jax.random.split(key, runs)).astype(float))
    found = index_size.failures(key, *index_size.blocks(0, dimension, rounds), jnp.float32(size), runs)
    assert 0.5 < expected < 0.95
    assert abs(found - expected) < 4 * 0.5 * (2 / runs) ** 0.5
    # An index of another size would be seen.
    other = index_size.failures(key, *index_size.blocks(0, dimension, rounds), jnp.float32(size + 8), runs)
    assert abs(other - expected) > 0.08


def test_the_needed_index_is_the_smallest_of_the_bisection():
    found = index_size.needed(0, 1, 100, runs=200)
    known = index_size.blocks(0, 1, 100)
    at, below = (
        index_size.failures(jax.random.key(0), *known, jnp.float32(found.size - less), 200) for less in (0, 12)
    )
    assert found.failures == at <= index_size.FAILURE < below
    assert 50 < found.size < 120 < index_size.lemma_size(found)


def test_what_is_found_is_printed_and_written(monkeypatch, capsys):
    found = index_size.Needed(dimension=4, rounds=1000, size=182, failures=0.048)
    monkeypatch.setattr(cli, "needed_sizes", lambda seed: [found])
    monkeypatch.setattr(cli, "search", lambda seed: [])
    monkeypatch.setattr(cli.chain_search, "growth", lambda **_: [])
    assert cli.main(["exploration.isotropy", "--full", "--instances", "20"]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("182", "4.8%"))
    (row,) = json.loads(cli.as_json([], sizes=[found]))
    assert row["name"] == "index_size.d4_t1000"
    assert row["passed"]
    assert row["size"] == 182
    np.testing.assert_allclose(row["tightness"], 182 / index_size.lemma_size(found))
