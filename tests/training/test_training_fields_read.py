"""What a callable reads of a batch is seen from its trace, however it was made."""

import jax
import jax.numpy as jnp

from jaxrl_llm.training.text.objective import fields_read


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
