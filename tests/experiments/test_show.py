"""Episodes on the terminal and in the report: the numbers of each token, and texts that can do no harm."""

import html.parser
import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from synthetic_episodes import EPISODES
from synthetic_episodes import columns
from synthetic_episodes import write_episodes
from synthetic_run import write_synthetic_run

from experiments.cli import main
from experiments.episode_page import choose
from experiments.episode_page import episodes_section
from experiments.episodes import Episode
from experiments.episodes import Token
from experiments.episodes import episodes_of
from experiments.episodes import read_step
from experiments.episodes import steps_written
from experiments.episodes import visible
from experiments.records import read
from experiments.registry import get_experiment
from experiments.report import render
from experiments.report import report_context
from experiments.run_folder import RunFolder
from experiments.show import show
from jaxrl_llm.trajectory_files import read_episodes


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    """A run with episodes of three steps."""
    made = write_synthetic_run(tmp_path_factory.mktemp("shown") / "sums" / "one", steps=12)
    for step in (4, 8, 12):
        write_episodes(made.path, step)
    return made


def page_of(run: RunFolder) -> str:
    """The report, without its figures, which take seconds to draw."""
    return render("report.html.j2", report_context(read(run), {}))


def printed(run: RunFolder, step: int | None = None, row: int | None = None, *, terminal: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=120, force_terminal=terminal, color_system="truecolor" if terminal else None
    )
    show(run, step, row, console)
    return console.file.getvalue()


def test_tokens_have_their_own_numbers(run: RunFolder) -> None:
    step, episodes = read_step(run)
    assert step == 12
    for row, (episode, (group, outcome, turns)) in enumerate(zip(episodes, EPISODES, strict=True)):
        assert (episode.row, episode.group, episode.earned) == (row, group, outcome)
        assert "".join(token.piece for token in episode.tokens).replace("<|eos|>", "") == "".join(
            text for text, _ in turns
        )
        chosen = "".join(token.piece for token in episode.chosen)
        assert chosen == "".join(f"{text}<|eos|>" for text, own in turns if own)
        most = int(columns().action_mask.sum(axis=1).max())
        ramp = np.arange(1, len(episode.chosen) + 1) / most
        np.testing.assert_allclose(
            [token.advantage for token in episode.chosen], (1 if outcome > 0.25 else -1) * ramp, rtol=1e-6
        )
        np.testing.assert_allclose([token.kl for token in episode.chosen], 1e-3 * ramp)
        assert [token.reward for token in episode.chosen] == [0.0] * (len(episode.chosen) - 1) + [outcome]
        assert all(token.log_prob is None for token in episode.tokens)
        assert all(token.advantage is None and not token.reward for token in episode.tokens if not token.chosen)


def test_the_table_and_the_first_row_are_printed(run: RunFolder) -> None:
    text = printed(run)
    assert "step 12 (3 written: 4 to 12)" in text
    assert "KL [nats]   log-prob [nats]" in text, "units are no markup"
    assert re.search(r" 0 +0 +1 +37 +\+0\.514 +0\.001 +yes", text)
    assert re.search(r" 3 +1 +-0\.25 +8 +-0\.122 +0\.00022 +yes", text)
    assert "Row 0: group 0, return 1" in text
    last = next(line for line in text.splitlines() if "<|eos|>" in line and "+1 " in line and "group" not in line)
    assert re.search(r"\+1 +\+1 +0\.001", last)


def test_the_numbers_are_whole_on_a_narrow_terminal(run: RunFolder) -> None:
    narrow = Console(file=io.StringIO(), width=80)
    show(run, None, None, narrow)
    text = narrow.file.getvalue()
    assert re.search(r" 3 +1 +-0\.25 +8 +-0\.122 +0\.00022 +yes +give", text)
    assert max(len(line) for line in text.splitlines()[1:]) <= 80


def test_a_row_of_a_step_is_printed_token_by_token(run: RunFolder) -> None:
    text = printed(run, step=4, row=2)
    assert "step 4 (3 written" in text
    assert "Rows" not in text
    assert "⏎2 hits⏎" in text
    assert "漢" in text
    assert len(re.findall(r"<\|eos\|>", text)) == 2


def test_colours_are_for_terminals_only(run: RunFolder) -> None:
    assert "\x1b" not in printed(run)
    coloured = printed(run, row=0, terminal=True)
    assert "\x1b[1;34m" in coloured  # a large advantage
    assert "\x1b[31m" not in coloured
    assert "\x1b[31m" in printed(run, row=1, terminal=True)


def test_the_command(run: RunFolder, capsys) -> None:
    folder = str(run.path.parent.parent)
    assert main(["show", "sums/one", "--row", "1", "--step", "8", "--runs-folder", folder]) == 0
    out = capsys.readouterr().out
    assert "Row 1: group 0, return 0, 4 chosen tokens" in out
    assert "\x1b" not in out
    for words, said in [
        (["--step", "9"], "has no episodes of step 9; the nearest step with episodes is 8."),
        (["--row", "4"], "has the rows 0 to 3; --row is 4."),
        (["--row", "-1"], "has the rows 0 to 3; --row is -1."),
        (["--stepp", "4"], "show has no field --stepp. Did you mean --step?"),
    ]:
        assert main(["show", "one", *words, "--runs-folder", folder]) == 2
        assert said in capsys.readouterr().err


def test_a_run_without_episodes_says_so(tmp_path: Path, capsys) -> None:
    run = write_synthetic_run(tmp_path / "sums" / "none", steps=3)
    assert main(["show", str(run.path)]) == 2
    assert "has no episodes; a run writes them every --episodes-every steps." in capsys.readouterr().err
    assert "<h2>Episodes</h2>" not in page_of(run)
    (run.path / "episodes" / "latest").mkdir(parents=True)
    assert steps_written(run) == []


def test_damaged_episodes_are_a_sentence_here_and_in_the_report(tmp_path: Path, capsys) -> None:
    run = write_synthetic_run(tmp_path / "sums" / "bad", steps=3)
    folder = write_episodes(run.path, 3)
    content = (folder / "arrays.safetensors").read_bytes()
    (folder / "arrays.safetensors").write_bytes(content[:-1] + b"\xff")
    assert main(["show", str(run.path)]) == 2
    assert "arrays.safetensors is damaged" in capsys.readouterr().err
    assert "The newest episodes cannot be shown: " in page_of(run)


def test_what_was_not_written_is_left_out(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "sums" / "bare", steps=3)
    write_episodes(run.path, 1, pieces=False, extra=False)
    _, episodes = read_step(run)
    assert episodes[1].chosen[0].piece == f"[{ord(' ')}]"
    assert episodes[1].chosen[0].advantage is None
    assert "[258]" in printed(run, row=1)
    section = episodes_section(run)
    assert section is not None
    assert section["scale"] == ""
    assert "[258]" in page_of(run)


HOSTILE = '</span><script>alert(1)</script>" onmouseover="x\x1b[2J\x1b]0;title\x07\u202eback\r[red]markup[/red]&amp;'


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> RunFolder:
    run = write_synthetic_run(tmp_path_factory.mktemp("hostile") / "sums" / "evil", steps=3)
    write_episodes(run.path, 1, [(0, 1.0, [(HOSTILE, False), (HOSTILE, True)]), (0, 0.0, [("q", False), ("a", True)])])
    return run


def test_a_hostile_text_cannot_drive_the_terminal(hostile: RunFolder) -> None:
    text = printed(hostile) + printed(hostile, row=0)
    for letter in ("\x1b", "\x07", "\u202e", "\r"):
        assert letter not in text
    assert "[red]markup[/red]" in text.replace("\n", "")
    assert visible("a\x1b[2J\u202e\n\u2028") == "a\ufffd[2J\ufffd⏎\ufffd"


class Spans(html.parser.HTMLParser):
    """Every attribute of every element within the episodes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.names, self.text, self.inside = set(), set(), "", False

    def handle_starttag(self, tag, attrs) -> None:
        self.inside = self.inside or ("class", "episode") in attrs
        if self.inside:
            self.tags.add(tag)
            self.names |= {name for name, _ in attrs}

    def handle_data(self, data) -> None:
        self.text += data if self.inside else ""


def test_a_hostile_text_stays_text_in_the_report(hostile: RunFolder) -> None:
    page = page_of(hostile)
    assert "<script" not in page
    spans = Spans()
    spans.feed(page.split("<h2>Episodes</h2>")[1].split("<h2>What it took</h2>")[0])
    assert spans.tags <= {"div", "span", "b", "h3"}
    assert spans.names <= {"class", "style", "title"}
    assert '</span><script>alert(1)</script>" onmouseover="x' in spans.text
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_report_colours_tokens_by_their_advantage(run: RunFolder) -> None:
    page = page_of(run)
    episodes = page.split("<h2>Episodes</h2>")[1].split("<h2>What it took</h2>")[0]
    assert "4 of the 4 episodes of step 12" in episodes
    spans = re.findall(r'<span class="token (\w+)" style="([^"]*)" title="([^"]*)">([^<]*)</span>', episodes)
    by_kind = {kind: [span for span in spans if span[0] == kind] for kind in ("up", "down", "given")}
    assert by_kind["up"][-1][1] == "--share:50%" or "--share:50%" in {span[1] for span in by_kind["up"]}
    assert all(span[2].startswith("advantage +") and "KL " in span[2] for span in by_kind["up"])
    assert all(span[2].startswith("advantage -") for span in by_kind["down"])
    assert all(span[2] == "given" and not span[1] for span in by_kind["given"])
    assert "reward +1" in episodes
    assert '<b class="earned">-0.25</b>' in episodes
    assert "python -m experiments show " in episodes
    # Groups whose answers differ most come first, and of each the best before the worst.
    assert re.findall(r"<h3>Row (\d)", episodes) == ["0", "1", "2", "3"]


def test_the_best_and_the_worst_of_each_group_are_chosen() -> None:
    def episode(row: int, group: int, earned: float) -> Episode:
        return Episode(row, group, True, earned, ())

    made = [
        episode(0, 7, 0.1),
        episode(1, 7, 0.2),
        episode(2, 7, 0.15),
        episode(3, 2, -1),
        episode(4, 2, np.nan),
        episode(5, 2, 2),
    ]
    assert [chosen.row for chosen in choose(made, 6)] == [5, 3, 1, 0]
    assert [chosen.row for chosen in choose(made, 2)] == [5, 3]
    assert [chosen.row for chosen in choose([episode(0, 0, np.nan)], 3)] == [0]
    assert choose([], 3) == []


def test_long_episodes_are_cut_in_the_report(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "sums" / "long", steps=3)
    write_episodes(
        run.path, 1, [(0, 1.0, [("g" * 900, False), ("c" * 500, True)]), (0, 0.0, [("g", False), ("c", True)])]
    )
    section = episodes_section(run)
    assert section is not None
    spans = section["rows"][0]["spans"]
    assert spans[0]["text"] == "… " + "g" * 600
    assert len([span for span in spans if span["kind"] != "given"]) == 400
    assert spans[-1]["text"] == " …"


def test_a_folder_is_shown_without_a_run(tmp_path: Path) -> None:
    (episode, *_) = episodes_of(read_episodes(write_episodes(tmp_path, 3)))
    assert episode.chosen[0] == Token(" ", True, 0.0, None, episode.chosen[0].advantage, episode.chosen[0].kl)


@pytest.mark.parametrize("name", ["from_scratch", "smollm2_arithmetic"])
def test_every_run_has_episodes_to_show(name: str) -> None:
    experiment = get_experiment(name)
    for settings in (experiment.settings, experiment.tiny):
        assert settings.train.episodes_every, "else `show RUN` has nothing to show"
        assert not settings.train.steps % settings.train.episodes_every, "the last batch is one of them"
