"""What a callable reads of a batch is seen from its trace, however it was made."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.objectives import loss_needs
from jaxrl_llm.training.text.objective import fields_read
from jaxrl_llm.training.text.objective import recipe_objective


def reinforce(batch):
    losses = -batch.log_prob * batch.advantages[:, None]
    unread = batch.kl_t.sum()
    del unread
    return jnp.where(batch.response_mask, losses, 0).sum(), batch.response_mask.sum().astype(jnp.float32)


def test_a_jitted_loss_reads_what_it_reads_and_not_the_whole_batch():
    expected = {"log_prob", "advantages", "response_mask"}
    assert fields_read(reinforce, "plain") == expected
    assert fields_read(jax.jit(reinforce), "jitted") == expected
    assert fields_read(jax.jit(lambda batch: jax.jit(reinforce)(batch)), "twice") == expected


@pytest.mark.parametrize("mask", ["maximum", "average", "both"])
def test_exact_masks_read_divergences_and_no_log_probs_of_the_sampler(mask):
    recipe = dataclasses.replace(get_recipe("dapo"), mask=mask)
    assert recipe_objective(recipe).needs == {"advantages", *loss_needs(recipe)}
    assert "log_prob_behaviour" not in recipe_objective(recipe).needs
