"""MinAtar's games: what they show, when they end, the stickiness that gymnax leaves out, and what is refused."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.environments.pixels import MinAtar

GAMES = 16


def play(game, key, steps=60):
    """Random play of many games: what is chosen, what is taken, and the answers."""
    state, shown = jax.vmap(game.reset)(jax.random.split(key, GAMES))

    def step(state, key):
        choose, move = jax.random.split(key)
        action = jax.random.randint(choose, (GAMES,), 0, len(game.actions))
        state, answer = jax.vmap(game.step)(jax.random.split(move, GAMES), state, action)
        return state, (action, state.action, answer)

    return shown, jax.jit(lambda: jax.lax.scan(step, state, jax.random.split(key, steps))[1])()


@pytest.fixture(scope="module")
def breakout():
    return MinAtar("breakout", sticky=0.3)


def test_a_game_shows_a_board_and_starts_again_when_it_is_over(breakout):
    shown, (_, _, answer) = play(breakout, jax.random.key(0))
    assert shown.shape == (GAMES, *breakout.observation_shape)
    assert shown.dtype == bool
    assert set(np.unique(answer.reward)) <= {0.0, 1.0}
    over = np.asarray(answer.terminated)
    assert over.any()
    assert not np.asarray(answer.truncated).any()
    # All 30 bricks are there after a game that is over, and the paddle in its place.
    first = np.asarray(answer.observation)[over]
    assert (first[..., 3].sum((1, 2)) == 30).all()
    assert first[:, 9, 4, 0].all()


def test_the_last_action_is_repeated_as_often_as_said(breakout):
    _, (chosen, taken, answer) = play(breakout, jax.random.key(1), steps=400)
    chosen, taken, over = (np.asarray(x) for x in (chosen, taken, answer.terminated))
    before, running = taken[:-1], ~over[1:]
    differs = running & (chosen[1:] != before)
    repeated = (taken[1:] == before)[differs].mean()
    assert abs(repeated - 0.3) < 0.03
    # A new game has not moved yet.
    assert (taken[over] == 0).all()
    never = MinAtar("breakout", sticky=0.0)
    _, (chosen, taken, answer) = play(never, jax.random.key(1))
    assert (np.asarray(chosen) == np.asarray(taken))[~np.asarray(answer.terminated)].all()


def test_a_game_is_cut_off_at_its_limit(breakout):
    state, _ = breakout.reset(jax.random.key(0))
    late = state._replace(game=state.game.replace(time=jnp.asarray(999, jnp.int32)))
    _, answer = jax.jit(breakout.step)(jax.random.key(1), late, jnp.asarray(0))
    assert bool(answer.truncated)
    assert not bool(answer.terminated)


def test_a_program_is_compiled_once(breakout):
    state, _ = breakout.reset(jax.random.key(0))
    after, _ = breakout.step(jax.random.key(1), state, jnp.asarray(0))
    kinds = [jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), tree) for tree in (state, after)]
    assert kinds[0] == kinds[1]


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"game is 'breakot'.*did you mean breakout"):
        MinAtar("breakot")
    with pytest.raises(ValueError, match="sticky is 1"):
        MinAtar("breakout", sticky=1.0)
    with pytest.raises(ValueError, match="sticky is nan"):
        MinAtar("breakout", sticky=float("nan"))
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxrl_llm\[control\]'"):
        MinAtar("breakout")
