"""Laws of index vectors: scalings, second moments, update sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.exploration import indices
from jaxrl_llm.exploration import update_indices

LAWS = list(indices.LAWS.values())
ISOTROPIC = list(indices.CENTRED_ISOTROPIC)
DRAWS, SIZE = 40_000, 5


def by_name(law):
    return law.name


def second_moment(rows):
    rows = np.asarray(rows, np.float64)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("law", ISOTROPIC, ids=by_name)
def test_references_are_centred_and_isotropic(law, key):
    rows = law.reference(key, (DRAWS, SIZE))
    # Entries of the moment have standard deviation at most sqrt(5 / DRAWS) = 0.011.
    np.testing.assert_allclose(second_moment(rows), np.eye(SIZE), atol=0.06)
    np.testing.assert_allclose(np.mean(rows, axis=0), 0, atol=0.03)


@pytest.mark.parametrize("law", LAWS, ids=by_name)
def test_perturbations_have_unit_mean_square_and_all_but_the_gaussian_unit_norm(law, key):
    squares = np.sum(np.square(law.perturbation(key, (DRAWS, SIZE))), axis=1)
    np.testing.assert_allclose(squares.mean(), 1, atol=0.02)
    if law.name == "gaussian":
        np.testing.assert_allclose(squares.var(), 2 / SIZE, rtol=0.1)
    else:
        np.testing.assert_allclose(squares, 1, atol=1e-5)


@pytest.mark.parametrize("law", [law for law in LAWS if law.name != "one_hot"], ids=by_name)
def test_the_reference_is_the_perturbation_times_root_m(law, key):
    reference, perturbation = (draw(key, (7, SIZE)) for draw in (law.reference, law.perturbation))
    np.testing.assert_allclose(reference, np.sqrt(SIZE) * np.asarray(perturbation), rtol=1e-5)


@pytest.mark.parametrize("law", [law for law in LAWS if law.update_set is not None], ids=by_name)
def test_update_sets_are_the_support_of_the_reference(law, key):
    rows = np.asarray(update_indices(law, key, SIZE, draws=1))
    assert len(rows) == law.update_size(SIZE) == len(np.unique(rows.round(4), axis=0))
    drawn = np.unique(np.asarray(law.reference(key, (4000, SIZE))).round(4), axis=0)
    np.testing.assert_allclose(drawn, np.unique(rows.round(4), axis=0), atol=2e-4)


def test_which_update_sets_are_isotropic(key):
    for law in (indices.CUBE, indices.COORDINATE, indices.SPARSE):
        np.testing.assert_allclose(second_moment(update_indices(law, key, SIZE, draws=1)), np.eye(SIZE), atol=1e-6)
    # One sign for both coordinates leaves a correlation of 1 / (M - 1) (errata F9.3).
    expected = np.eye(SIZE) + (1 - np.eye(SIZE)) / (SIZE - 1)
    np.testing.assert_allclose(
        second_moment(update_indices(indices.SPARSE_CONSISTENT, key, SIZE, draws=1)), expected, atol=1e-6
    )
    np.testing.assert_allclose(second_moment(update_indices(indices.ONE_HOT, key, SIZE, draws=1)), np.eye(SIZE) / SIZE)


def test_laws_without_a_set_take_fresh_draws(key):
    rows = update_indices(indices.SPHERE, key, SIZE, draws=16)
    assert rows.shape == (16, SIZE)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), np.sqrt(SIZE), rtol=1e-5)


def test_a_switched_law_is_the_law_of_its_number(key):
    for number, law in enumerate(indices.CENTRED_ISOTROPIC):
        switched = jax.jit(lambda n: indices.switched_law(n).reference(key, (3, SIZE)))(jnp.asarray(number))
        np.testing.assert_allclose(switched, law.reference(key, (3, SIZE)), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda key: indices.get_law("spheer"), "law is 'spheer'; it must be one of .* Did you mean 'sphere'"),
        (lambda key: update_indices(indices.CUBE, key, 17, draws=1), "update set of cube has 131072 vectors"),
        (lambda key: update_indices(indices.CUBE, key, 0, draws=1), "index_dimension is 0; it must be at least 1"),
        (lambda key: indices.SPARSE.reference(key, (1,)), "index_dimension is 1; a sparse index needs at least 2"),
    ],
)
def test_a_mistake_is_answered_in_a_sentence(call, sentence, key):
    with pytest.raises(ValueError, match=sentence):
        call(key)
