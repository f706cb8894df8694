"""`show`: episodes of a run on the terminal, with the reward, the advantage and the KL divergence of each token."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from experiments.episodes import Episode
from experiments.episodes import Token
from experiments.episodes import largest_advantage
from experiments.episodes import read_step
from experiments.episodes import steps_written
from experiments.episodes import visible
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError

SPACE = "␣"
"""A space in the text of a token."""
NUMBERS_WIDTH = 69
"""Columns of the terminal that the numbers of the table of a step take."""


def show(run: RunFolder, step: int | None, row: int | None, console: Console | None = None) -> None:
    """Print the table of a step, or one of its rows token by token.

    Args:
        run: the run.
        step: None takes the newest one.
        row: None prints the table of all rows, and the first row.
        console: where to; colours are left out where it is no terminal.

    Raises:
        UserError: there are no such episodes.
    """
    console = console or Console()
    step, episodes = read_step(run, step)
    if row is not None and not 0 <= row < len(episodes):
        raise UserError(f"Step {step} of {run.shown} has the rows 0 to {len(episodes) - 1}; --row is {row}.")
    steps = steps_written(run)
    console.print(f"{run.shown}, step {step} ({len(steps)} written: {_range(steps)})", markup=False, highlight=False)
    if row is None:
        console.print(_table(episodes, width=max(console.width - NUMBERS_WIDTH, 12)))
    if episodes:
        console.print(_detail(episodes[row or 0], largest_advantage(episodes)))


def _range(steps: Sequence[int]) -> str:
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _table(episodes: Sequence[Episode], width: int) -> Table:
    """A line per row; of what was chosen, `width` letters."""
    table = Table(title="Rows", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("row", "group", "return", "tokens", "advantage", "max KL"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ended", no_wrap=True)
    table.add_column("chosen", overflow="ellipsis", no_wrap=True, max_width=width)
    for episode in episodes:
        advantages = [token.advantage for token in episode.chosen if token.advantage is not None]
        divergences = [token.kl for token in episode.chosen if token.kl is not None]
        table.add_row(
            str(episode.row),
            str(episode.group),
            f"{episode.earned:g}",
            str(len(episode.chosen)),
            f"{sum(advantages) / len(advantages):+.3g}" if advantages else "",
            f"{max(divergences):.2g}" if divergences else "",
            "yes" if episode.ended else "cut",
            Text(visible("".join(token.piece for token in episode.chosen)[: width + 1])),
        )
    return table


def _detail(episode: Episode, scale: float) -> Table:
    """A line per chosen token; what was given stands between them as it is."""
    title = f"Row {episode.row}: group {episode.group}, return {episode.earned:g}, {len(episode.chosen)} chosen tokens"
    title = Text(title if episode.ended else f"{title}, cut off")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("token", overflow="fold")
    for name in ("reward", "advantage", "KL [nats]", "log-prob [nats]"):
        table.add_column(escape(name), justify="right", no_wrap=True)
    given = ""
    for token in episode.tokens:
        if not token.chosen:
            given += token.piece
            continue
        if given:
            table.add_row(Text(visible(given), style="dim"))
            given = ""
        table.add_row(
            Text(visible(token.piece).replace(" ", SPACE), style=_style(token, scale)),
            f"{token.reward:+g}" if token.reward else "",
            "" if token.advantage is None else f"{token.advantage:+.3g}",
            "" if token.kl is None else f"{token.kl:.2g}",
            "" if token.log_prob is None else f"{token.log_prob:.3g}",
        )
    if given:
        table.add_row(Text(visible(given), style="dim"))
    return table


def _style(token: Token, scale: float) -> str:
    """Blue for what is to become likelier, red for what is not; bold where the advantage is large."""
    if not token.advantage:
        return ""
    colour = "blue" if token.advantage > 0 else "red"
    return f"bold {colour}" if abs(token.advantage) > scale / 2 else colour
