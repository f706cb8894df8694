"""Our own client of OpenAI's completions against our own server: what a trainer would do."""

import jax
import numpy as np
import pytest

from jaxrl_llm.models.weights import save_hf
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts.engines import EngineSettings
from jaxrl_llm.rollouts.engines import JaxEngine
from jaxrl_llm.rollouts.engines import OpenAIEngine
from jaxrl_llm.rollouts.engines.reload import weights_reload
from tests.serving.conftest import KEY
from tests.serving.conftest import NAME
from tests.serving.conftest import model
from tests.serving.conftest import served
from tests.serving.conftest import tokenizer

WIDTH, GROUP = 10, 3


@pytest.fixture(scope="module")
def settings() -> EngineSettings:
    ends = (tokenizer().eos_id, ord("e"))
    sampling = SamplingSettings()
    return EngineSettings(
        max_new_tokens=WIDTH, group_size=GROUP, sampling=sampling, eos_ids=ends, pad_id=tokenizer().pad_id
    )


def test_rollouts_have_the_log_probs_of_scoring_and_follow_pushed_weights(tmp_path, settings):
    prompts, mask = tokenizer().encode_batch(["a prompt that all of a group share", "b"])
    number = iter(range(9))

    with served(weights=tmp_path) as address:
        tell = weights_reload(address, api_key=KEY)

        def reload(policy) -> None:
            name = f"push-{next(number)}"
            save_hf(policy, tmp_path / name, tokenizer=tokenizer())
            tell(name)

        engine = OpenAIEngine(
            f"{address}/v1",
            NAME,
            settings,
            vocab_size=tokenizer().vocab_size,
            tokenizer=tokenizer(),
            api_key=KEY,
            reload=reload,
            attempts=1,
        )
        for policy in (model(), model(1)):
            local = JaxEngine(policy, settings)
            rollout = engine.generate(prompts, mask, jax.random.key(0))
            scores = local.score(rollout.tokens, rollout.token_mask, response_width=WIDTH)
            response = rollout.response_mask[:, -WIDTH:]
            np.testing.assert_allclose(rollout.log_prob_behaviour[:, -WIDTH:], scores, atol=2e-5)
            echoed = engine.score(rollout.tokens, rollout.token_mask, response_width=WIDTH)
            np.testing.assert_allclose(echoed, scores, atol=2e-5)
            assert response.sum() > len(response)
            assert len({tuple(row) for row in rollout.tokens[:GROUP].tolist()}) == GROUP
            engine.push_weights(model(1))
