"""A world of two turns: the policy says a letter, the world says which way the right one is, the policy says another.

It is a collector from outside of the project, as docs/training.md shows it.
"""

import jax
import numpy as np

from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts.collect import BatchShape
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.rollouts.collect import PolicySampler
from jaxrl_llm.trajectory import Trajectories

PROMPT, TURN = 2, 2
"""Tokens of the prompt, and of each turn."""


class TwoTurns:
    """Letters near `m` earn most; each turn is two letters, of which the first counts."""

    def __init__(self, parts, *, prompts: int, group_size: int) -> None:
        self.shape = BatchShape(prompts * group_size, group_size, PROMPT + 3 * TURN, 2 * TURN)
        self.tokenizer = parts.tokenizer
        options = {"response_length": TURN, "end_ids": (), "pad_id": parts.tokenizer.pad_id}
        self.first = PolicySampler(parts.model, SamplingSettings(), group_size=group_size, **options)
        self.second = PolicySampler(parts.model, SamplingSettings(), group_size=1, **options)

    def collect(self, policy, key, step, cursor) -> Experience:
        texts = [f"{(step + index) % 10}>" for index in range(self.shape.groups)]
        prompt = self.tokenizer.encode_batch(texts, length=PROMPT)
        one = self.first.sample(policy, *prompt, jax.random.fold_in(key, 1), step)
        said = one.tokens[:, PROMPT]
        world = np.where(said < ord("m"), ord("+"), ord("-"))[:, None].repeat(TURN, axis=1)
        asked = np.concatenate([one.tokens, world], axis=1).astype(np.int32)
        two = self.second.sample(policy, asked, np.ones_like(asked, bool), jax.random.fold_in(key, 2), step)
        chosen = np.zeros(two.tokens.shape, bool)
        chosen[:, PROMPT : PROMPT + TURN] = chosen[:, -TURN:] = True
        steps = np.where(chosen, np.arange(chosen.shape[1]) >= PROMPT + TURN, -1).astype(np.int32)
        log_probs = np.array(two.log_prob_behaviour)
        log_probs[:, PROMPT : PROMPT + TURN] = one.log_prob_behaviour[:, -TURN:]
        rewards = np.zeros(chosen.shape, np.float32)
        for column, letter in ((PROMPT + TURN - 1, said), (-1, two.tokens[:, -TURN])):
            rewards[:, column] = np.maximum(0, 1 - abs(letter - ord("m")) / 128) / 2
        trajectories = Trajectories(
            tokens=two.tokens,
            token_mask=np.ones_like(chosen),
            action_mask=chosen,
            group_ids=np.asarray(one.group_ids),
            rewards=rewards,
            log_prob_behaviour=log_probs,
            step_ids=steps,
            actor_ids=np.where(chosen, np.int32(0), np.int32(-1)),
            versions=np.where(chosen, np.int32(policy.version), np.int32(-1)),
            ended=np.ones(len(chosen), bool),
        )
        return Experience(trajectories, cursor={"batches": cursor.get("batches", 0) + 1})
