"""Files of what experts do: read back as demonstrations, with where they come from; nothing half written."""

import json

import numpy as np
import pytest

from jaxrl_llm.environments.worlds import PROVENANCE
from jaxrl_llm.environments.worlds import Panel
from jaxrl_llm.environments.worlds import Shop
from jaxrl_llm.environments.worlds import split_panels
from jaxrl_llm.environments.worlds import write_expert
from jaxrl_llm.models.chat import CHATML
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.rollouts.collect.demonstrations import DemonstrationCollector
from tests.environments.worlds.countdown import Countdown


def test_an_expert_is_read_back_as_demonstrations(tmp_path) -> None:
    world, path = Shop(), tmp_path / "expert.jsonl"
    train = split_panels(world)[0]
    panel = Panel(world.name, train.seeds[:3])
    assert write_expert(world, panel, path) == (3, 0, 0)
    for line, seed in zip(path.read_text().splitlines(), panel.seeds, strict=True):
        record = json.loads(line)
        assert tuple(record) == ("messages", *PROVENANCE)
        assert (record["world"], record["seed"], record["panel"]) == (world.name, seed, panel.sha256)
        assert (record["expert"], record["reward"]) == ("jaxrl_llm.environments.worlds.shop.world.Shop", 1.0)
        # Said again to the world, the actions earn what the file says.
        episode, messages = world.reset(int(seed)), record["messages"]
        assert messages[0] == {"role": "user", "content": episode.prompt}
        for acted, answered in zip(messages[1::2], [*messages[2::2], None], strict=True):
            reply = episode.step(acted["content"])
            assert answered is None or answered["content"] == reply.text
        assert (reply.done, reply.reward) == (True, 1.0)
    tokenizer = ByteTokenizer(("<|im_start|>", "<|im_end|>"))
    made = DemonstrationCollector(path, tokenizer, rows=3, width=3000, chat_format=CHATML, ignored=PROVENANCE)
    rows = made.collect(None, None, 0, {}).trajectories
    texts = [tokenizer.decode(row[steps == 0]) for row, steps in zip(rows.tokens, rows.step_ids, strict=True)]
    assert all(text.startswith("search[") for text in texts)
    assert int(np.max(rows.step_ids)) >= 2


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, (4, 0, 0)), ({"hangs": "step"}, (3, 0, 1)), ({"hangs": "close"}, (4, 0, 0))]
)
def test_what_hangs_is_counted_and_left_out(tmp_path, settings, expected) -> None:
    world, path = Countdown(**settings), tmp_path / "expert.jsonl"
    assert write_expert(world, Panel(world.name, np.arange(4)), path, seconds=0.2) == expected
    seeds = [json.loads(line)["seed"] for line in path.read_text().splitlines()]
    assert seeds == [seed for seed in range(4) if seed != 1 or expected[0] == 4]
    assert not (tmp_path / "expert.jsonl.part").exists()


@pytest.mark.parametrize("settings", [{"expert": False}, {"broken": "never pays"}, {"broken": "sleeps"}])
def test_an_expert_that_solves_nothing_leaves_no_file(tmp_path, settings) -> None:
    world, path = Countdown(**settings), tmp_path / "expert.jsonl"
    with pytest.raises(ValueError, match="the expert of countdown solves none of the 4 tasks of the panel"):
        write_expert(world, Panel(world.name, np.arange(4)), path)
    assert not [*tmp_path.iterdir()]


def test_a_panel_of_another_world_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="the panel is of rooms; the world is countdown"):
        write_expert(Countdown(), Panel("rooms", np.arange(4)), tmp_path / "expert.jsonl")
