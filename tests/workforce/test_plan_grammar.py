"""The grammar of plans against parse_plan: whatever it takes is a plan, and the plans that planners write are in it."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.constrained import Grammar
from jaxrl_llm.rollouts.constrained import TokenMasker
from jaxrl_llm.rollouts.engines import EngineSettings
from jaxrl_llm.rollouts.engines import JaxEngine
from jaxrl_llm.workforce import EnginePolicy
from jaxrl_llm.workforce import PlanRequest
from jaxrl_llm.workforce import PolicyPlanner
from jaxrl_llm.workforce import Questions
from jaxrl_llm.workforce import Said
from jaxrl_llm.workforce import Turn
from jaxrl_llm.workforce import fictional_base
from jaxrl_llm.workforce import parse_plan
from jaxrl_llm.workforce import plan_grammar
from jaxrl_llm.workforce import render_plan
from jaxrl_llm.workforce.plans import MOST_STEPS

TOKENIZER = ByteTokenizer()
MASKER = TokenMasker(TOKENIZER, 259)
GRAMMAR = Grammar.from_lark(plan_grammar(workers=("files", "Faktenprüfer")))
STRUCTURE = np.frombuffer(b" |#:,\n123", np.uint8)


def takes(text: str, grammar: Grammar = GRAMMAR) -> bool:
    rows = MASKER.start([grammar])
    try:
        for byte in text.encode():
            rows.advance(0, byte)
    except ValueError:
        return False
    return rows.is_accepting(0)


@pytest.mark.parametrize("most_steps", [1, 2, 4, MOST_STEPS])
def test_whatever_it_takes_is_a_plan(most_steps: int) -> None:
    """Random walks over allowed bytes, drawn to what the grammar is made of, ended where they may end."""
    grammar = Grammar.from_lark(plan_grammar(most_steps=most_steps, most_words=3, workers=("files", "f#1")))
    generator, rows = np.random.default_rng(most_steps), MASKER.start([grammar] * 12)
    texts, plans = [b""] * 12, []
    for _ in range(260):
        bits = np.unpackbits(rows.mask().view(np.uint8), axis=1, bitorder="little")
        for row in range(12):
            if bits[row, TOKENIZER.eos_id]:
                assert rows.is_accepting(row)
                plans.append(parse_plan(texts[row].decode()))
            allowed = np.flatnonzero(bits[row, :256])
            inner = allowed[np.isin(allowed, STRUCTURE)]
            if not len(allowed):  # the longest plan of all
                rows.replace(row, grammar)
                texts[row] = b""
                continue
            byte = int(generator.choice(inner if len(inner) and generator.random() < 0.8 else allowed))
            rows.advance(row, byte)
            texts[row] += bytes([byte])
    assert len(plans) > 50
    assert min(most_steps, 3) <= max(len(plan.steps) for plan in plans) <= most_steps
    steps = [step for plan in plans for step in plan.steps]
    assert any(step.worker for step in steps)
    assert any("#" in step.text for step in steps) == (most_steps > 1)
    assert any(len(step.after) > 1 for step in steps) == (most_steps > 2)


def test_the_plans_of_the_oracle_are_in_it() -> None:
    questions = Questions(fictional_base(seed=0, size=6))
    problems = questions.train(seed=0, step=0, count=40)
    plans = [render_plan(problem.metadata["question"].plan) for problem in problems]
    assert all(map(takes, plans))
    assert any("after: 1, 2" in plan for plan in plans)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("1. Straße in 東京\n2. b #1 | worker: Faktenprüfer | after: 1\n3. compute (#1) - #2 | after: 1, 2", True),
        ("1. a\n2. b\n3. c #2 | after: 1, 2", True),
        ("1. a\n2. b\n3. c #2 | after: 1", False),
        ("1. a\n2. b #1", False),
        ("1. a\n2. b #11 | after: 1", False),
        ("1. a\n2. b #01 | after: 1", False),
        ("1. a\n2. b #1१ | after: 1", False),
        ("1. a\n2. b\n3. c | after: 2, 1", False),
        ("1. a\n2. b\n3. c | after: 1, 1", False),
        ("1. a #1", False),
        ("1. a\n2. b | after: 2", False),
        ("1. a | after: 2\n2. b", False),
        ("1. a\n3. b", False),
        ("1. a | worker: nobody", False),
        ("1. a | b", False),
        ("1. a \n2. b", False),
        ("1. ", False),
        ("", False),
        ("\n".join(f"{k}. a" for k in range(1, 10)), False),
        ("1. " + " ".join(["a"] * 25), False),
        ("1. " + "a" * 25, False),
    ],
)
def test_lines(text: str, taken: bool) -> None:
    assert takes(text) == taken


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"most_steps": 21}, "most_steps must be in 1 .. 20, got 21"),
        ({"most_steps": 0}, "most_steps"),
        ({"most_words": 64}, "most_words must be in 1 .. 63"),
        ({"workers": ["a b"]}, "workers has the name 'a b'"),
        ({"workers": ["a\x00"]}, "workers has the name"),
    ],
)
def test_grammars_that_cannot_be(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan_grammar(**options)


def test_a_policy_that_knows_nothing_writes_plans() -> None:
    """A model with random weights, held by the grammar, from the request to what is recorded."""
    model = Transformer(tiny(vocab_size=259, num_layers=1, max_positions=512), rngs=nnx.Rngs(0))
    settings = EngineSettings(max_new_tokens=60, group_size=1, eos_ids=TOKENIZER.eos_ids, pad_id=TOKENIZER.pad_id)
    engine = JaxEngine(model, settings, masker=MASKER)
    policy = EnginePolicy(engine, TOKENIZER, jax.random.key(0))
    requests = [PlanRequest(f"{letter}?", (), (Turn("user", Said(f"{letter}?")),)) for letter in "abcdef"]
    short = Grammar.from_lark(plan_grammar(most_steps=2, most_words=1))
    written = PolicyPlanner(policy, TOKENIZER, grammar=short).plan(requests)
    ended = [said for said in written if said.tokens and said.tokens[-1] == TOKENIZER.eos_id]
    assert len(ended) >= 2
    for said in ended:
        parse_plan(said.text)
        assert said.log_probs is not None
        assert said.tokens is not None
        assert said.log_probs[:3] == (0, 0, 0)  # "1. " was no choice
        assert min(said.log_probs) < 0
        masks = MASKER.replay([short], np.array([said.tokens]), np.ones((1, len(said.tokens)), bool))
        assert masks.shape == (1, len(said.tokens), 9)
    assert len({said.text for said in ended}) > 1


def test_engines_that_cannot() -> None:
    model = Transformer(tiny(vocab_size=259, num_layers=1), rngs=nnx.Rngs(0))
    settings = EngineSettings(max_new_tokens=4, group_size=2, eos_ids=(1,), pad_id=0)
    with pytest.raises(ValueError, match="masker ends at the tokens"):
        JaxEngine(model, settings, masker=MASKER)
    engine = JaxEngine(model, settings)
    with pytest.raises(ValueError, match="group_size 2; it must be 1"):
        EnginePolicy(engine, TOKENIZER, jax.random.key(0))
    with pytest.raises(ValueError, match="without a masker"):
        engine.generate(np.ones((1, 2), int), np.ones((1, 2), bool), jax.random.key(0), grammars=[GRAMMAR])
