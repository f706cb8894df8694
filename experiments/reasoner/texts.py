"""What the model learns from before it answers itself: text of the tasks, and conversations of a teacher who errs."""

import dataclasses
import json
import random
from collections.abc import Iterable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.reasoner.chains import Chain
from experiments.reasoner.chains import ChainTask
from experiments.reasoner.chains import chains
from experiments.reasoner.prices import PricesEpisode
from experiments.reasoner.prices import conversation
from experiments.reasoner.settings import ReasonerSettings
from jaxrl_llm.durable import write_whole
from jaxrl_llm.environments import stable_key
from jaxrl_llm.models.glm_answers import parse_answer
from jaxrl_llm.rollouts.select import SampledAnswer
from jaxrl_llm.rollouts.select import best_of_each
from jaxrl_llm.rollouts.select import earned
from jaxrl_llm.rollouts.select import ended
from jaxrl_llm.rollouts.select import long_between
from jaxrl_llm.rollouts.select import sift
from jaxrl_llm.rollouts.select import unpaired

Line = dict[str, Any]
START = "[gMASK]<sop>"
CALLED = 0.25
"""Share of the text that calls tools."""
ABOUT = ("kind", "identity")
"""Keys of a line beside those of a conversation."""


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """JSON lines; the file is there when it is whole."""
    with write_whole(path) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def text_lines(settings: ReasonerSettings, seed: int, panel: Sequence[int]) -> list[Line]:
    """Lines of text: chains worked out without errors, and single calls of tools; what follows the question is learned.

    They have the tags of thinking and of tools, and nobody speaks in them: roles and modes come with the cold start.
    One line is one row, since in a text with several chains a letter would name several steps.
    """
    rng, count = random.Random(stable_key("text", seed)), settings.pretrain_rows * settings.pretrain_steps
    pool = chains(settings.operations, min(count, 8192), "text", seed, held_out=False)
    short = [task for task in panel if len(PricesEpisode(task).plan) == 1]
    return [_called(rng.choice(short)) if rng.random() < CALLED else _worked(chain) for chain in pool]


def _worked(chain: Chain) -> Line:
    pad, answer = chain.worked()
    return {"prompt": f"{START}{chain.question}\n", "response": f"<think>{pad}</think>\n{answer}"}


def _called(task: int) -> Line:
    episode = PricesEpisode(task)
    result = f"<tool_response>\n{episode.answer}\n</tool_response>"
    return {"prompt": f"{START}{episode.question}\n", "response": f"{episode.said(0)}\n{result}\n{episode.answer}"}


def thinking_line(chain: Chain, thinking: str, answer: str) -> Line:
    """A chain with its scratchpad."""
    said = {"role": "assistant", "reasoning_content": thinking, "content": answer}
    return _line("thinking", chain.question, [{"role": "user", "content": chain.question}, said], thinking=True)


def direct_line(question: str, answer: str) -> Line:
    """A chain without."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _line("direct", question, messages, thinking=False)


def _line(kind: str, identity: str, messages: list[dict[str, Any]], *, thinking: bool) -> Line:
    return {"messages": messages, "thinking": thinking, "kind": kind, "identity": identity}


def cold_start(settings: ReasonerSettings, seed: int, phase: int, panel: Sequence[int]) -> list[Line]:
    """Conversations of a teacher who errs: in the first phase all chains are thought through, in the second half of
    them; no question is there in both modes.

    Args:
        settings: how many, and how often the teacher errs.
        seed, phase: of the questions and of the slips.
        panel: tasks with tools to train on.
    """
    rng, slips = random.Random(stable_key("teacher", seed, phase)), settings.slips
    asked = chains(settings.operations, 2 * settings.conversations, "teacher", seed, phase, held_out=False)
    thought = asked[: settings.conversations]
    lines = [thinking_line(chain, *chain.worked(slips=slips, rng=rng)) for chain in thought]
    if phase:
        known = {chain.question for chain in thought}
        direct = [chain for chain in asked[settings.conversations :] if chain.question not in known]
        lines += [direct_line(chain.question, chain.worked(slips=slips, rng=rng)[1]) for chain in direct]
    for _ in range(settings.conversations):
        task = int(rng.choice(panel))
        lines.append(_line("tools", str(task), conversation(task, slips=slips, rng=rng), thinking=False))
    return lines


def chain_lines(answers: Sequence[SampledAnswer], task: ChainTask, seed: int) -> tuple[list[Line], dict[str, int]]:
    """What an expert answered, as conversations: right answers, up to two to a question, half of the questions with
    their thinking and the others without it.

    Returns:
        Lines, and how many answers each filter rejected.
    """
    most = 4 * task.operations + 8
    sifted = sift(answers, {"truncated": ended, "length": long_between(4, most), "wrong": earned(1.0)})
    best = best_of_each(sifted.kept, 2)
    stripped = [dataclasses.replace(answer, text=parse_answer(answer.text).content) for answer in best]
    thought, direct = unpaired(best, best_of_each(stripped), share=0.5, seed=seed)
    lines = []
    for answer in thought:
        said = parse_answer(answer.text)
        messages = [{"role": "user", "content": answer.identity}, said.message()]
        lines.append(_line("thinking", answer.identity, messages, thinking=True))
    lines += [direct_line(answer.identity, answer.text) for answer in direct]
    return lines, sifted.rejected


def tool_line(task: int, actions: Sequence[str]) -> Line:
    """An episode as it was played, as a conversation."""
    episode = PricesEpisode(task)
    messages: list[dict[str, Any]] = [{"role": "user", "content": episode.question}]
    for action in actions:
        said = parse_answer(action)
        messages.append(said.message() | {"reasoning_content": ""})
        if said.tool_calls:
            messages.append({"role": "tool", "content": episode.step(action).text})
    return _line("tools", str(task), messages, thinking=False)
