"""docs/metrics.md has every name that training writes, and no other; what runs write is compared where they are run."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxrl_llm.bounds import BOUND_NAMES
from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.objectives.balance import BalanceMetrics
from jaxrl_llm.objectives.loss_metrics import loss_metrics
from jaxrl_llm.objectives.preferences import preference_metrics
from jaxrl_llm.objectives.values import explained_variance_sums
from jaxrl_llm.training.run.reporting import PhaseClock
from jaxrl_llm.training.run.reporting import Quiet
from jaxrl_llm.training.text.diagnostics import mismatch_metrics
from jaxrl_llm.training.text.scoring import Shift
from jaxrl_llm.training.text.step_metrics import shift_metrics
from jaxrl_llm.training.text.step_metrics import update_metrics
from tests.glossary import PAGE
from tests.glossary import glossary

ROOT = Path(__file__).parents[2]
TEXTS = [*ROOT.glob("jaxrl_llm/training/**/*.py"), *ROOT.glob("jaxrl_llm/rollouts/collect/*.py")]
NAME = re.compile(r'"([a-z_]+(?:/[a-z0-9_]+)+)"')
STEMS = ("critic/rewards", "critic/advantages", "response_length")
OF_PAIRS = ("equal", "ties", "dropped")
"""Why `PreferenceCollector` leaves a pair out; it is run by the tests of every objective."""


def written_in_code() -> set[str]:
    """Names that stand in the code as they are, and those of evaluations."""
    texts = [*TEXTS, ROOT / "experiments/metric_names.py"]
    return {name for path in texts for name in NAME.findall(path.read_text())} - set(STEMS)


def made_by_losses() -> set[str]:
    """Names that the update's metrics get, from everything that a loss can return."""
    numbers, mask, rows = jnp.zeros((2, 3)), jnp.ones((2, 3), bool), jnp.arange(2)
    optional = ("log_ratio", "log_ratio_old", "log_ratio_behaviour", "log_ratio_ref", "kl_t", "kl_ref_t", "entropy")
    given = {"weights": numbers, "accepted": jnp.ones(2, bool), "advantages": numbers}
    given |= dict.fromkeys(optional, numbers)
    recipes = [partial(loss_metrics, get_recipe(name)) for name in RECIPES]
    losses = {name for recipe in recipes for name in jax.eval_shape(recipe, mask, **given)}
    losses |= set(jax.eval_shape(preference_metrics, numbers, numbers, mask, rows, numbers[:, 0]))
    losses |= {f"value_{name}" for name in jax.eval_shape(explained_variance_sums, numbers, numbers, mask)}
    losses |= {"router_balance_loss", *(f"router_{name}" for name in BalanceMetrics._fields)}
    losses |= {"loss", "mtp_loss", "value_loss", "grad_norm", "skipped", "entropy", "log_prob", "kl_old_k3", "kl_ref"}
    return set(update_metrics([dict.fromkeys(losses, (1.0, 1.0))]))


def made_by_comparisons() -> set[str]:
    numbers, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    shift = Shift(*[numbers] * len(Shift._fields))
    arrays = (shift, mask, numbers[:, 0], jnp.arange(2))
    after = jax.eval_shape(lambda *given: shift_metrics(*given, reward_range=(0.0, 1.0)), *arrays)
    return set(after) | set(jax.eval_shape(mismatch_metrics, numbers, numbers, mask))


def timed() -> set[str]:
    phases = re.findall(r'clock\.phase\("(\w+)"\)', (ROOT / "jaxrl_llm/training/text/loop.py").read_text())
    return {*phases, *PhaseClock(Quiet()).seconds(tokens=1)}


def test_the_page_has_the_names_that_are_written_and_no_other() -> None:
    expected = written_in_code() | made_by_losses() | made_by_comparisons() | timed()
    expected |= {f"{stem}/{what}" for stem in STEMS for what in ("mean", "max", "min")}
    expected |= {f"preferences/{why}" for why in OF_PAIRS}
    assert set(glossary()) - expected == set(), "the page has names that nothing writes"
    assert expected - set(glossary()) == set(), "the page lacks names"


def test_the_page_says_which_bound_has_which_number() -> None:
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith("`<bound>` is"))
    assert tuple(re.findall(r"`(\w+)`", line)) == BOUND_NAMES
