"""What the trainer may take as known of another engine's distribution."""

import pytest

from experiments.run_folder import UserError
from experiments.settings import RunSettings
from experiments.sources import SourceSettings
from experiments.sources import law_of
from jaxrl_llm.rollouts import SamplingSettings


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("truncation", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_truncated_vocabulary_is_no_known_law(dtype, truncation):
    sources = SourceSettings(engine="llama_cpp", sync_dtype=dtype)
    assert law_of(sources, SamplingSettings()).known
    assert not law_of(sources, SamplingSettings(**truncation)).known


@pytest.mark.parametrize("sources", [SourceSettings(engine="llama_cpp"), SourceSettings(demonstrations="some.jsonl")])
def test_a_mismatch_of_a_sampler_that_does_not_sample_is_refused(sources):
    with pytest.raises(UserError, match="--mismatch is 'gaussian_noise', which only the built-in sampler can do"):
        RunSettings(mismatch="gaussian_noise", sources=sources).get_perturbation()
    RunSettings(sources=sources).get_perturbation()
