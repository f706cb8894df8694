"""The policy acts in a world over many turns: a batch of whole episodes is one compiled program.

Every turn of every row has as many tokens: one action, then the observation. So all rows stand at the same slot, the
cache of keys and values is kept from the first turn to the last, and each token is read once.
"""

from collections.abc import Mapping
from typing import Any
from typing import NamedTuple
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl_llm.environments.worlds import ArrayWorld
from jaxrl_llm.environments.worlds.protocol import NO_ACTION
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.decode import DecodeWeights
from jaxrl_llm.rollouts.decode import PromptCache
from jaxrl_llm.rollouts.decode import ResponseCache
from jaxrl_llm.rollouts.decode import decode_logits
from jaxrl_llm.rollouts.decode import decode_step
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.rollouts.sampling import rollout_keys
from jaxrl_llm.rollouts.sampling import sample_tokens
from jaxrl_llm.rollouts.sampling import token_uniforms
from jaxrl_llm.trajectory import OUTSIDE
from jaxrl_llm.trajectory import Column
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import Key
from jaxrl_llm.typing import PRNGKey


class Alphabet(NamedTuple):
    """The tokens of a world.

    symbols: of each of its symbols. actions: of each of its actions.
    """

    symbols: Int[np.ndarray, " X"]
    actions: Int[np.ndarray, " A"]


class Turns(NamedTuple):
    """K turns of B rows, turn first.

    Attributes:
        actions: token of each action.
        log_probs: of each action under the distribution that drew it [nats].
        observations: tokens that the world answered.
        rewards: of each step.
        valid: whether the action could be taken.
        acted: whether the row was not yet done.
        done: whether the row came to its end.
    """

    actions: Int[Array, "K B"]
    log_probs: Float[Array, "K B"]
    observations: Int[Array, "K B O"]
    rewards: Float[Array, "K B"]
    valid: Bool[Array, "K B"]
    acted: Bool[Array, "K B"]
    done: Bool[Array, " B"]


class Play(Protocol):
    """What `make_play` returns."""

    def __call__(
        self,
        state: nnx.State,
        seeds: Int[Array, " N"],
        key: PRNGKey,
        step: Int[Array, ""] | int,
        prompt_index: Int[Array, " N"],
        sample_index: Int[Array, " G"] | None = None,
    ) -> tuple[Int[Array, "B P"], Turns]:
        """Tokens of the prompts, row = task * G + sample, and the turns; `sample_index` None is 0 .. G - 1."""
        ...


class _Plan(NamedTuple):
    # Everything that is fixed when the program is compiled.
    world: ArrayWorld
    letters: Alphabet
    group_size: int
    sampling: SamplingSettings
    pad_id: int
    decode_dtype: jnp.dtype | type | None


class _Progress(NamedTuple):
    # What the loop over turns carries.
    turn: Int[Array, ""]
    world: Any
    logits: Float[Array, "V B"]
    cache: ResponseCache
    turns: Turns


def alphabet(world: ArrayWorld, tokenizer: Tokenizer) -> Alphabet:
    """The token of each symbol and action.

    Raises:
        ValueError: one of them is not exactly one token, or two are the same.
    """

    def token(text: str) -> int:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"the tokenizer writes {text!r} of {world.name} as {len(ids)} tokens; it must be one.")
        return ids[0]

    found = Alphabet(np.array([*map(token, world.symbols)]), np.array([*map(token, world.actions)]))
    for what, ids in found._asdict().items():
        if len(set(ids.tolist())) < len(ids):
            raise ValueError(f"two {what} of {world.name} are the same token.")
    return found


def make_play(
    graphdef: nnx.GraphDef[Transformer],
    world: ArrayWorld,
    letters: Alphabet,
    *,
    group_size: int,
    sampling: SamplingSettings,
    pad_id: int,
    decode_dtype: jnp.dtype | type | None = None,
) -> Play:
    """A compiled player for models of one structure.

    The action of sample s of task n in turn k draws with fold_in(fold_in(fold_in(key, step), prompt_index[n]),
    sample_index[s]), then fold_in of k, as `make_generate` does for tokens.

    Args:
        graphdef: first half of `nnx.split(model)`.
        world: where it acts.
        letters: of `alphabet`.
        group_size: G, episodes per task.
        sampling: temperature and truncation; the whole vocabulary is drawn from, and a token that is no action is
            answered by the world as one that cannot be taken.
        pad_id: token written after the end.
        decode_dtype: see `make_generate`.

    Raises:
        ValueError: from the returned function: the model has too few positions.
    """
    plan = _Plan(world, letters, group_size, sampling, pad_id, decode_dtype)

    @jax.jit
    def play(state, seeds, key, step, prompt_index, sample_index=None):
        sample_index = jnp.arange(group_size) if sample_index is None else sample_index
        keys = rollout_keys(key, step, prompt_index, sample_index).reshape(-1)
        return _play(nnx.merge(graphdef, state), plan, seeds, keys)

    return play


def episode_width(world: ArrayWorld) -> int:
    """T, most tokens of an episode: the prompt, every action, and every observation but the last."""
    return world.prompt_length + world.turns * (1 + world.observation_length) - world.observation_length


def _play(
    model: Transformer, plan: _Plan, seeds: Int[Array, " N"], keys: Key[Array, " B"]
) -> tuple[Int[Array, "B P"], Turns]:
    world, width = plan.world, episode_width(plan.world)
    if width > model.config.max_positions:
        raise ValueError(
            f"an episode of {world.name} has up to {width} tokens; the model has "
            f"{model.config.max_positions} positions."
        )
    prompt = jnp.asarray(plan.letters.symbols)[world.reset(seeds)[1]]
    hidden, cache = model.prefill(prompt, jnp.ones(prompt.shape, bool))
    weights = DecodeWeights.of(model, plan.decode_dtype)
    shared = PromptCache.of(cache, weights.dtype)
    slots = world.turns * (1 + world.observation_length)
    meaning = jnp.full(model.config.vocab_size, NO_ACTION)
    meaning = meaning.at[plan.letters.actions].set(jnp.arange(len(plan.letters.actions)))

    def unfinished(now: _Progress) -> Array:
        return (now.turn < world.turns) & ~jnp.all(now.turns.done)

    def advance(now: _Progress) -> _Progress:
        state, said = _act(plan, keys, meaning, now)
        hidden, cache = None, now.cache
        for place, tokens in enumerate([said["actions"], *said["observations"].T]):
            slot = now.turn * (1 + world.observation_length) + place
            hidden, cache = decode_step(weights, tokens, slot, shared, cache)
        assert hidden is not None
        return _Progress(now.turn + 1, state, decode_logits(weights, hidden), cache, _written(now, said))

    logits = jnp.repeat(model.logits(hidden[:, -1]).T, plan.group_size, axis=1)
    progress = _Progress(
        turn=jnp.zeros((), jnp.int32),
        world=world.reset(jnp.repeat(seeds, plan.group_size))[0],
        logits=logits,
        cache=ResponseCache.empty(model.config, len(keys), slots, weights.dtype),
        turns=_no_turns(plan, len(keys), logits.dtype),
    )
    return jnp.repeat(prompt, plan.group_size, axis=0), jax.lax.while_loop(unfinished, advance, progress).turns


def _act(
    plan: _Plan, keys: Key[Array, " B"], meaning: Int[Array, " V"], now: _Progress
) -> tuple[Any, dict[str, Array]]:
    """Draw an action for every row, and have the world answer; rows that are done stand still."""
    drawn, log_probs = sample_tokens(now.logits, token_uniforms(keys, now.turn), plan.sampling)
    acted = ~now.turns.done
    # A row that is done does what the world refuses, so that its state stays.
    state, answer = plan.world.step(now.world, jnp.where(acted, meaning[drawn], NO_ACTION))
    shown = jnp.asarray(plan.letters.symbols)[answer.observation]
    return state, {
        "actions": jnp.where(acted, drawn, plan.pad_id),
        "log_probs": jnp.where(acted, log_probs, 0),
        "observations": jnp.where(acted[:, None], shown, plan.pad_id),
        "rewards": jnp.where(acted, answer.reward, 0),
        "valid": acted & answer.valid,
        "acted": acted,
        "done": now.turns.done | (acted & answer.done),
    }


def _no_turns(plan: _Plan, rows: int, dtype: jnp.dtype) -> Turns:
    shape = (plan.world.turns, rows)
    return Turns(
        actions=jnp.full(shape, plan.pad_id, jnp.int32),
        log_probs=jnp.zeros(shape, dtype),
        observations=jnp.full((*shape, plan.world.observation_length), plan.pad_id, jnp.int32),
        rewards=jnp.zeros(shape, jnp.float32),
        valid=jnp.zeros(shape, bool),
        acted=jnp.zeros(shape, bool),
        done=jnp.zeros(rows, bool),
    )


def _written(now: _Progress, said: Mapping[str, Array]) -> Turns:
    """The turns with one more."""

    def write(name: str) -> Array:
        column: Array = getattr(now.turns, name)
        return jax.lax.dynamic_update_index_in_dim(column, said[name].astype(column.dtype), now.turn, axis=0)

    columns = {name: write(name) for name in Turns._fields if name != "done"}
    return Turns(**columns, done=said["done"])


def expert_turns(world: ArrayWorld, letters: Alphabet, seeds: Int[Array, " B"], pad_id: int) -> Turns:
    """What the world's expert does in these tasks; its log-probs are 0, as it is certain."""
    state, _ = world.reset(seeds)
    done, found = jnp.zeros(len(seeds), bool), []
    for _ in range(world.turns):
        acted = ~done
        action = world.expert(state)
        state, answer = world.step(state, jnp.where(acted, action, NO_ACTION))
        done = done | (acted & answer.done)
        found.append(
            (
                jnp.where(acted, jnp.asarray(letters.actions)[action], pad_id),
                jnp.zeros(len(seeds)),
                jnp.where(acted[:, None], jnp.asarray(letters.symbols)[answer.observation], pad_id),
                jnp.where(acted, answer.reward, 0),
                acted & answer.valid,
                acted,
            )
        )
    return Turns(*map(jnp.stack, zip(*found, strict=True)), done=done)


def action_columns(world: ArrayWorld) -> Int[np.ndarray, " K"]:
    """The column of each turn's action in the rows of `as_trajectories`: the same in every row."""
    return world.prompt_length + np.arange(world.turns) * (1 + world.observation_length)


def as_trajectories(
    prompt: Int[Column, "B P"],
    turns: Turns,
    *,
    group_ids: Int[Column, " B"],
    version: int,
    recorded: bool = True,
) -> Trajectories:
    """Episodes as rows of tokens: the prompt, then an action and what the world answered, turn by turn.

    Args:
        prompt: tokens of the prompts; on the host, or under jit, as all arrays are then.
        turns: the turns.
        group_ids: the task of each row.
        version: updates of the weights that acted.
        recorded: whether somebody sampled the actions, so that their log-probs mean something.
    """
    xp: Any = jnp if isinstance(prompt, jax.Array) else np
    acted, actions, observations = turns.acted, turns.actions, turns.observations
    rows, observed = prompt.shape[0], observations.shape[2]
    # After the last action of a row nothing is shown any more.
    goes_on = acted & xp.concatenate([acted[1:], xp.zeros_like(acted[:1])])
    shown = xp.repeat(goes_on[:, :, None], observed, axis=2)

    def row(first: Column, others: Column, before: Column) -> Any:
        """[B, T] from [K, B], [K, B, O] and [B, P]; the last turn shows nothing."""
        each = xp.concatenate([first[:, :, None], others], axis=2).swapaxes(0, 1).reshape(rows, -1)
        return xp.concatenate([before, each], axis=1)[:, :-observed]

    def chosen(values: Column, outside: int) -> Any:
        """The column of numbers that only actions have."""
        others, before = (xp.full(like.shape, outside, values.dtype) for like in (observations, prompt))
        return row(xp.where(acted, values, outside).astype(values.dtype), others, before)

    step = xp.broadcast_to(xp.arange(len(acted), dtype=np.int32)[:, None], acted.shape)
    return Trajectories(
        tokens=row(actions, observations, prompt).astype(np.int32),
        token_mask=row(acted, shown, xp.ones(prompt.shape, bool)),
        action_mask=row(acted, xp.zeros_like(shown), xp.zeros(prompt.shape, bool)),
        group_ids=group_ids,
        rewards=chosen(turns.rewards.astype(np.float32), 0),
        log_prob_behaviour=chosen(turns.log_probs.astype(np.float32), 0) if recorded else None,
        step_ids=chosen(step, OUTSIDE),
        actor_ids=chosen(xp.zeros_like(step), OUTSIDE),
        versions=chosen(xp.full_like(step, version), OUTSIDE),
        ended=turns.done,
    )
