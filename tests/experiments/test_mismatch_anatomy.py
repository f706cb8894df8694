"""The mismatch laboratory: its exact statistics against sums written out, and its tiny twin from end to end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import main
from experiments.mismatch_anatomy import MismatchSettings
from experiments.mismatch_anatomy import kept_responses
from experiments.mismatch_page import bound_table
from experiments.mismatch_page import estimators
from experiments.mismatch_statistics import EDGES
from experiments.mismatch_statistics import LOG_MIN_P
from experiments.mismatch_statistics import bucket_means
from experiments.mismatch_statistics import exact_statistics
from experiments.mismatch_statistics import flatness
from experiments.mismatch_statistics import flatness_interval
from experiments.mismatch_statistics import noise_scale
from experiments.run_folder import RunFolder
from experiments.study import read_results


def distributions(scale: float, *, rows: int = 2, peak: float = 3.0):
    """Two sides of 100 contexts a row, Gaussian logit noise between them; float32 and float64 log-probs."""
    keys = jax.random.split(jax.random.key(0), 2)
    z = peak * jax.random.normal(keys[0], (rows, 100, 60))
    noisy = z + scale * jax.random.normal(keys[1], z.shape)
    log_mu, log_pi = (np.asarray(jax.nn.log_softmax(side)) for side in (noisy, z))
    wide = [side.astype(np.float64) for side in (log_mu, log_pi)]
    return (log_mu, log_pi), [side - np.log(np.exp(side).sum(axis=-1, keepdims=True)) for side in wide]


def test_statistics_are_their_sums() -> None:
    narrow, (log_mu, log_pi) = distributions(0.3)
    found = exact_statistics(*narrow)
    mu, pi, x = np.exp(log_mu), np.exp(log_pi), log_mu - log_pi
    expected = {
        "kl": (mu * x).sum(-1),
        "tv": np.abs(mu - pi).sum(-1) / 2,
        "collision": (pi * pi).sum(-1),
        "noise": np.ptp(x, axis=-1) / 2,
        "k2": (mu * x * x).sum(-1) / 2,
        "k1_variance": (mu * x**2).sum(-1) - (mu * x).sum(-1) ** 2,
        "k2_variance": (mu * x**4 / 4).sum(-1) - (mu * x * x / 2).sum(-1) ** 2,
        "k3_variance": (mu * (np.exp(-x) - 1 + x) ** 2).sum(-1) - (mu * (np.exp(-x) - 1 + x)).sum(-1) ** 2,
        "k1_negative": (mu * (x < 0)).sum(-1),
        "largest_two_sided": (np.abs(x) / (np.ptp(x, axis=-1)[..., None] * (1 - np.minimum(mu, pi)))).max(-1),
        "largest_printed": (np.abs(x) / (np.ptp(x, axis=-1)[..., None] * (1 - pi))).max(-1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-4, atol=1e-6, err_msg=name)
    bucket = np.searchsorted(EDGES, pi)
    for index in range(len(EDGES) + 1):
        np.testing.assert_allclose(
            found["bucket_bias"][..., index], np.where(bucket == index, mu * x, 0).sum(-1), atol=1e-5
        )
        ratio = np.where(bucket == index, mu * np.abs(x) / (1 - pi), 0).sum(-1)
        np.testing.assert_allclose(found["bucket_ratio"][..., index], ratio, atol=1e-5)
    for place, threshold in enumerate(LOG_MIN_P):
        keep_mu, keep_pi = (side >= side.max(-1, keepdims=True) + threshold for side in narrow)
        np.testing.assert_array_equal(found["flips"][..., place], (keep_mu != keep_pi).sum(-1))
        # Each side renormalised on its own set: at the largest threshold the sums without that are a third too small.
        wasted = (mu * (keep_mu & ~keep_pi)).sum(-1) / (mu * keep_mu).sum(-1)
        missing = (pi * (keep_pi & ~keep_mu)).sum(-1) / (pi * keep_pi).sum(-1)
        np.testing.assert_allclose(found["wasted_mass"][..., place], wasted, atol=1e-6)
        np.testing.assert_allclose(found["missing_mass"][..., place], missing, atol=1e-6)
        np.testing.assert_allclose(found["pruned_mass"][..., place], (pi * ~keep_pi).sum(-1), atol=1e-6)


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    """At noise of 1e-3 the plain float32 sum of mu log(mu / pi) is wrong by five per cent and more."""
    narrow, (log_mu, log_pi) = distributions(1e-3)
    kl = (np.exp(log_mu) * (log_mu - log_pi)).sum(-1)
    np.testing.assert_allclose(exact_statistics(*narrow)["kl"], kl, rtol=0.02)
    plain = np.asarray(jnp.sum(jnp.exp(narrow[0]) * (narrow[0] - narrow[1]), axis=-1))
    assert np.abs(plain / kl - 1).max() > 0.05


def test_the_law_is_measured_where_p_is_one_but_for_rounding() -> None:
    """1 - p is 1e-8 here, below the spacing of float32 at 1."""
    generator = np.random.default_rng(0)
    log_pi = np.concatenate([np.full((1, 40, 1), 22.0), generator.normal(size=(1, 40, 59))], axis=-1).astype(np.float32)
    log_mu = log_pi + generator.normal(scale=0.05, size=log_pi.shape).astype(np.float32)
    # Of the most likely token: log p = -log1p(S), with S the sum over the others.
    rest_mu, rest_pi = (np.exp((side - side[..., :1])[..., 1:].astype(np.float64)).sum(-1) for side in (log_mu, log_pi))
    expected = np.abs(np.log1p(rest_pi) - np.log1p(rest_mu)) / (rest_pi / (1 + rest_pi))
    found = exact_statistics(log_mu, log_pi)
    np.testing.assert_allclose(found["bucket_ratio"][..., -1], expected, rtol=1e-3)
    plain = np.asarray(jax.nn.log_softmax(log_mu) - jax.nn.log_softmax(log_pi))[..., 0]
    assert (plain == 0).all()


def test_gaussian_noise_obeys_its_laws_and_a_wrong_one_is_seen() -> None:
    scale = 0.05
    narrow, _ = distributions(scale, rows=20)
    part = exact_statistics(*narrow) | {"full_mask": np.ones((20, 100), bool)}
    assert noise_scale(part) == pytest.approx(scale, rel=0.05)
    measured, law = (bucket_means(part, name) for name in ("selection", "variance"))
    known = np.isfinite(measured) & (part["bucket_mass"].sum((0, 1)) > 5)
    np.testing.assert_allclose(measured[known] / scale**2, law[known], rtol=0.25)
    # With one sign turned, 1 - 2 p - C, the tokens above one half would have a negative variance.
    assert (bucket_means(part, "variance")[known] > 0).all()
    assert np.abs(bucket_means(part, "bias")[known] / scale**2 - bucket_means(part, "law")[known]).max() < 3
    assert (part["largest_two_sided"] <= 1 + 1e-3).all()
    assert flatness(part) > 0.6
    low, high = flatness_interval(part)
    assert 0.5 < low < flatness(part) <= high < 1


def test_noise_that_is_not_of_the_logits_is_not_flat() -> None:
    """A change of the log-prob that does not shrink with 1 - p: the law is seen to fail."""
    narrow, _ = distributions(0.05, rows=4, peak=6.0)
    part = exact_statistics(*narrow) | {"full_mask": np.ones((4, 100), bool)}
    constant = part | {"bucket_ratio": part["bucket_mass"] * np.append(np.ones(10), 30.0)}
    assert flatness(constant) < 0.2
    assert flatness_interval(constant)[1] < 0.2


def test_truncation_has_no_finite_noise() -> None:
    (log_mu, log_pi), _ = distributions(0.1)
    cut = np.where(log_mu < -6, -np.inf, log_mu)
    found = exact_statistics(cut, log_pi)
    assert np.isinf(found["noise"]).any()
    for name in ("kl", "tv", "k2", "bucket_ratio", "wasted_mass"):
        assert np.isfinite(found[name]).all(), name


def top_k(log_pi: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Statistics of an engine that samples the trainer's k likeliest tokens, in the trainer's proportions."""
    cut = np.where(log_pi >= np.sort(log_pi, axis=-1)[..., -k, None], log_pi, -np.inf)
    return exact_statistics(cut, log_pi) | {"full_mask": np.ones(log_pi.shape[:2], bool)}


def test_an_estimator_without_noise_in_any_context_has_none() -> None:
    """k1 of every token is then the KL of its context, -log of the kept mass, which differs between contexts."""
    part = top_k(distributions(0.1)[0][1], 20)
    assert part["kl"].std() > 0.3 * part["kl"].mean()
    row = estimators({"top_k": part}).rows[0]
    assert row[3:6] == ("0.0", "0.0", "0.0")


def test_a_sampler_that_leaves_tokens_out_has_no_proof_of_most_bounds() -> None:
    part = top_k(distributions(0.1)[0][1], 20)
    table = bound_table(
        {"cut": part, "whole": top_k(distributions(0.1)[0][1], 60)}, MismatchSettings(response_length=100)
    )
    cells = {row[0]: row[1:] for row in table.rows}
    for name in ("classical", "coupling", "adaptive", "mixed tv", "adaptive, as printed"):
        assert cells[name][0] == "no proof"
    for name in ("sequence kl", "linear", "average only", "mixed kl", "mixed kl, as printed"):
        assert cells[name][0] != "no proof"
    assert all(row[1] != "no proof" for row in cells.values())


def test_a_response_with_a_number_that_is_none_is_dropped_and_counted() -> None:
    generator = np.random.default_rng(0)
    part = {name: generator.normal(size=(5, 4)) for name in ("log_mu", "log_pi")} | {"mask": np.ones((5, 4), bool)}
    part |= {f"full_{name}": value[:3].copy() for name, value in part.items()} | {"kl": np.arange(12.0).reshape(3, 4)}
    sound = np.ones(3, bool)
    whole = kept_responses("engine", part, sound)
    assert whole["dropped"] == 0
    assert len(whole["log_mu"]) == 5
    part["mask"][4, 3] = False
    part["log_mu"][4, 3] = part["log_pi"][3, 0] = np.nan  # padding of one response, a token of another
    part["log_mu"][2, 1] = -np.inf  # drawn, and impossible
    with pytest.warns(UserWarning, match="engine: dropped 2 of 5 responses"):
        kept = kept_responses("engine", part, sound)
    assert kept["dropped"] == 2
    np.testing.assert_array_equal(kept["log_mu"][:, 0], part["log_mu"][[0, 1, 4], 0])
    np.testing.assert_array_equal(kept["kl"], part["kl"][:2])
    with pytest.raises(ValueError, match="engine: 3 of 5 responses"):
        kept_responses("engine", part, np.array([True, False, True]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("runs")
    assert main(["run", "mismatch_anatomy", "--tiny", "--id", "first", "--runs-folder", str(folder)]) == 0
    return folder


def test_the_tiny_twin_measures_both_sides(runs) -> None:
    run = RunFolder(runs / "mismatch_anatomy" / "first")
    summary, results = json.loads(run.summary.read_text()), read_results(run)
    exact, rounded = summary["engine_F32"], summary["engine_Q8_0"]
    assert exact["mean_change"] < 0.01 < rounded["mean_change"]
    assert exact["mean_kl"] < rounded["mean_kl"]
    assert summary["perturbation_top_p"]["largest_noise"] is None
    for name in ("worst_surrogate_error", "unified_sharp", "unified_printed", "vacuous"):
        assert summary["perturbation_top_p"][name] is None  # it has no responses of its own
    assert exact["dropped"] == 0
    assert exact["worst_surrogate_error"] < rounded["worst_surrogate_error"]
    # What the engine said while it sampled is what its whole distributions say of the same tokens.
    part = results["engine_F32"]
    said, whole = part["log_mu"][:2][part["full_mask"]], part["full_log_mu"][part["full_mask"]]
    np.testing.assert_allclose(said, whole, atol=1e-4)
    page = run.report.read_text()
    for text in (
        "Is the (1 - p) law obeyed?",
        "Signed bias",
        "acceptance against delta",
        "TRM-Avg",
        "0 dropped",
        "not vacuous?",
        "no claim",
    ):
        assert text in page


def test_settings_that_cannot_be_are_refused(capsys, tmp_path) -> None:
    run = ["run", "mismatch_anatomy", "--tiny", "--runs-folder", str(tmp_path)]
    for changes, sentence in (
        (["--engines", "Q4_1"], "--engines has 'Q4_1'; with this model it may have F32, F16, BF16, Q8_0"),
        (["--perturbations", "magic"], "--perturbations has 'magic'"),
        (["--full-sequences", "9"], "must satisfy 2 <= full <= all <= 24"),
        (["--model", "gpt"], "--model is 'gpt'"),
    ):
        assert main([*run, *changes]) == 2
        assert sentence in capsys.readouterr().err
