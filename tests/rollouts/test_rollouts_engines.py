"""The engines against each other: the built-in one, llama.cpp in this process, and llama.cpp over OpenAI's protocol."""

import json
import socket
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.chat import format_chat
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.weights import load_gguf
from jaxrl_llm.models.weights import save_gguf
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts.engines import DistributionEngine
from jaxrl_llm.rollouts.engines import EngineError
from jaxrl_llm.rollouts.engines import EngineSettings
from jaxrl_llm.rollouts.engines import IncompleteRolloutsError
from jaxrl_llm.rollouts.engines import JaxEngine
from jaxrl_llm.rollouts.engines import LlamaCppEngine
from jaxrl_llm.rollouts.engines import OpenAIEngine
from jaxrl_llm.rollouts.engines import openai_server
from jaxrl_llm.rollouts.engines.openai_server import UNTRUNCATED
from jaxrl_llm.rollouts.engines.rows import request_seeds
from jaxrl_llm.rollouts.engines.transport import Limits
from jaxrl_llm.rollouts.engines.transport import Server
from jaxrl_llm.rollouts.engines.vocabulary import require_same_pieces
from jaxrl_llm.rollouts.engines.vocabulary import require_same_tokens

TOKENIZER = ByteTokenizer()
SETTINGS = EngineSettings(
    max_new_tokens=12, group_size=3, eos_ids=(TOKENIZER.eos_id, ord("e")), pad_id=TOKENIZER.pad_id
)
PROMPTS = TOKENIZER.encode_batch(["Hello", "a b c d"])
KEY = jax.random.key(7)


def model_of(seed: int, config: TransformerConfig | None = None) -> Transformer:
    """Random weights with logits of a spread that a language model has."""
    model = Transformer(config or tiny(vocab_size=TOKENIZER.vocab_size), rngs=nnx.Rngs(seed))
    model.final_norm.scale[...] = 25 * model.final_norm.scale[...]
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return model_of(0)


@pytest.fixture(scope="module")
def ours(model: Transformer) -> JaxEngine:
    return JaxEngine(model, SETTINGS)


@pytest.fixture(scope="module")
def llama(model: Transformer):
    with LlamaCppEngine(model, SETTINGS, cache_dtype="F32", slots=2, context=64) as engine:
        yield engine


@pytest.fixture(scope="module")
def served(model: Transformer, tmp_path_factory: pytest.TempPathFactory):
    """A file with a vocabulary, half of whose tokens are no whole character, as any server would serve it."""
    path = tmp_path_factory.mktemp("served") / "model.gguf"
    save_gguf(model, path, tokenizer=TOKENIZER)
    settings = EngineSettings(max_new_tokens=12, group_size=3, eos_ids=(TOKENIZER.eos_id,), pad_id=TOKENIZER.pad_id)
    with LlamaCppEngine(path, settings, cache_dtype="F32", context=64, tokenizer=TOKENIZER) as engine:
        yield engine


def test_llama_cpp_samples_what_jax_would_and_keeps_ids(llama: LlamaCppEngine, ours: JaxEngine) -> None:
    rollout = llama.generate(*PROMPTS, KEY)
    width = PROMPTS[0].shape[1]
    assert rollout.tokens.shape == (6, width + 12)
    np.testing.assert_array_equal(rollout.tokens[:, :width], np.repeat(PROMPTS[0], 3, axis=0))
    np.testing.assert_array_equal(rollout.group_ids, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(rollout.token_mask[:, width:], rollout.response_mask[:, width:])
    scores = ours.score(rollout.tokens, rollout.token_mask, response_width=12)
    mask = np.asarray(rollout.response_mask)[:, width:]
    difference = np.abs(scores - rollout.log_prob_behaviour[:, width:])[mask]
    assert difference.mean() < 2e-4  # of log-probs that spread over several nats
    assert np.std(scores[mask]) > 0.5
    # Had ids been shifted by one, the scores would be those of other tokens.
    shifted = np.where(rollout.response_mask, (np.asarray(rollout.tokens) + 1) % 256, rollout.tokens)
    wrong = ours.score(shifted, rollout.token_mask, response_width=12)
    assert np.abs(wrong - rollout.log_prob_behaviour[:, width:])[mask].mean() > 0.5


def test_responses_end_at_an_end_token_and_only_there(llama: LlamaCppEngine) -> None:
    settings = EngineSettings(max_new_tokens=40, group_size=8, eos_ids=SETTINGS.eos_ids, pad_id=TOKENIZER.pad_id)
    before, llama.settings = llama.settings, settings
    rollout = llama.generate(*PROMPTS, KEY, step=1)
    llama.settings = before
    tokens, mask = (np.asarray(array)[:, -40:] for array in (rollout.tokens, rollout.response_mask))
    ends = np.isin(tokens, SETTINGS.eos_ids) & mask
    lengths = mask.sum(axis=1)
    assert (lengths < 40).any()
    for row in range(len(tokens)):
        assert ends[row].sum() == (lengths[row] < 40 or ends[row, 39])
        assert not ends[row].any() or ends[row, lengths[row] - 1]
        assert (tokens[row, lengths[row] :] == TOKENIZER.pad_id).all()


def test_sampling_frequencies_are_the_distribution(llama: LlamaCppEngine, ours: JaxEngine) -> None:
    """First tokens of 300 samples against the exact distribution: chi-square over tokens that are expected often."""
    before = llama.settings
    llama.settings = EngineSettings(max_new_tokens=1, group_size=300, eos_ids=before.eos_ids, pad_id=0)
    prompts = (PROMPTS[0][:1], PROMPTS[1][:1])
    drawn = np.asarray(llama.generate(*prompts, KEY).tokens)[:, -1]
    llama.settings = before
    extended = (np.pad(prompts[0], ((0, 0), (0, 1))), np.pad(prompts[1], ((0, 0), (0, 1)), constant_values=True))
    expected = 300 * np.exp(ours.distributions(*extended, response_width=1)[0, 0])
    often = expected > 5
    counts = np.bincount(drawn, minlength=len(expected))
    table = [np.append(array[often], array[~often].sum()) for array in (counts, expected)]
    statistic = ((table[0] - table[1]) ** 2 / table[1]).sum()
    freedom = len(table[0]) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    flatter = 300 * np.exp(0.6 * np.log(expected / 300)) / np.exp(0.6 * np.log(expected / 300)).sum()
    other = np.append(flatter[often], flatter[~often].sum())
    assert ((table[0] - other) ** 2 / other).sum() > freedom + 4 * (2 * freedom) ** 0.5


def test_scores_are_the_log_probs_of_sampling_and_stand_in_the_distributions(llama: LlamaCppEngine) -> None:
    rollout = llama.generate(*PROMPTS, KEY)
    texts = (rollout.tokens, rollout.token_mask)
    scores = llama.score(*texts, response_width=12)
    np.testing.assert_allclose(scores, rollout.log_prob_behaviour[:, -12:], atol=2e-5)
    distributions = llama.distributions(*texts, response_width=12)
    mask = np.asarray(rollout.response_mask)[:, -12:]
    np.testing.assert_allclose(np.exp(distributions).sum(axis=-1)[mask], 1, atol=1e-5)
    chosen = np.take_along_axis(distributions, np.asarray(rollout.tokens)[:, -12:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen[mask], scores[mask], atol=2e-5)
    assert isinstance(llama, DistributionEngine)


def test_distributions_are_those_of_jax(llama: LlamaCppEngine, ours: JaxEngine) -> None:
    rollout = ours.generate(*PROMPTS, KEY)
    texts = (np.asarray(rollout.tokens)[::3], np.asarray(rollout.token_mask)[::3])
    mask = texts[1][:, -12:]
    theirs, expected = (engine.distributions(*texts, response_width=12)[mask] for engine in (llama, ours))
    np.testing.assert_allclose(theirs, expected, atol=2e-3)
    scores = [engine.score(*texts, response_width=12)[mask] for engine in (ours, llama)]
    np.testing.assert_allclose(*scores, atol=2e-3)


def test_a_rollout_has_random_numbers_of_its_own(llama: LlamaCppEngine) -> None:
    whole = llama.generate(*PROMPTS, KEY)
    second = llama.generate(PROMPTS[0][1:], PROMPTS[1][1:], KEY, prompt_index=np.array([1]))
    np.testing.assert_array_equal(np.asarray(whole.tokens)[3:], second.tokens)
    assert not np.array_equal(np.asarray(llama.generate(*PROMPTS, KEY, step=1).tokens), np.asarray(whole.tokens))
    seeds = np.array(request_seeds(KEY, 0, None, 50, 20))
    assert len(np.unique(seeds)) == 1000
    assert (seeds < 2**31).all()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(temperature=0.7),
        SamplingSettings(temperature=1.3, top_p=0.8),
        SamplingSettings(temperature=0.9, top_p=0.9, min_p=0.1),
        SamplingSettings(temperature=1.2, top_k=9, top_p=0.7),
        SamplingSettings(temperature=0.0),
    ],
)
def test_tempered_and_truncated_log_probs_are_those_of_the_sampler(sampling, llama, ours: JaxEngine) -> None:
    """Recomputed from the whole distribution by the definition in `sampling`."""
    before = llama.settings
    llama.settings = EngineSettings(
        max_new_tokens=12, group_size=3, eos_ids=before.eos_ids, pad_id=before.pad_id, sampling=sampling
    )
    rollout = llama.generate(*PROMPTS, KEY)
    llama.settings = before
    tokens, mask = (np.asarray(array)[:, -12:] for array in (rollout.tokens, rollout.response_mask))
    logits = ours.distributions(rollout.tokens, rollout.token_mask, response_width=12).astype(np.float64)
    if sampling.greedy:
        np.testing.assert_array_equal(tokens[mask], logits.argmax(axis=-1)[mask])
        assert (rollout.log_prob_behaviour == 0).all()
        return
    p = np.exp(logits / sampling.temperature)
    if sampling.top_k is not None:
        p = np.where(p >= np.sort(p, axis=-1)[..., -sampling.top_k, None], p, 0)
    p /= p.sum(axis=-1, keepdims=True)
    keep = p >= (sampling.min_p or 0) * p.max(axis=-1, keepdims=True)
    if sampling.top_p is not None:
        ordered = np.sort(p, axis=-1)[..., ::-1]
        last = (np.cumsum(ordered, axis=-1) - ordered < sampling.top_p).sum(axis=-1, keepdims=True) - 1
        keep &= p >= np.take_along_axis(ordered, last, axis=-1)
    p = np.where(keep, p, 0)
    p /= p.sum(axis=-1, keepdims=True)
    chosen = np.take_along_axis(p, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(rollout.log_prob_behaviour[:, -12:][mask], np.log(chosen[mask]), atol=2e-3)


def test_pushed_weights_are_the_new_ones(ours: JaxEngine) -> None:
    first, second = model_of(1), model_of(2)
    rollout = ours.generate(*PROMPTS, KEY)
    texts = (rollout.tokens, rollout.token_mask)
    with LlamaCppEngine(first, SETTINGS, cache_dtype="F32", slots=1, context=64) as engine:
        mine = JaxEngine(first, SETTINGS)
        one = engine.score(*texts, response_width=12)
        engine.push_weights(second)
        mine.push_weights(second)
        two = engine.score(*texts, response_width=12)
        np.testing.assert_allclose(two, mine.score(*texts, response_width=12), atol=2e-3)
        assert np.abs(one - two).max() > 0.1
        wrong = model_of(0, tiny(vocab_size=64))
        with pytest.raises(ValueError, match="model has 64 tokens; this engine has 259"):
            engine.push_weights(wrong)
        with pytest.raises(ValueError, match="that this engine was not built for"):
            mine.push_weights(wrong)
    with pytest.raises(EngineError, match="was stopped"):
        engine.score(*texts, response_width=12)
    engine.stop()


@pytest.mark.parametrize(("dtype", "low", "high"), [("F16", 1e-6, 4e-3), ("BF16", 1e-4, 3e-2), ("Q8_0", 1e-4, 0.1)])
def test_the_precision_of_the_sync_is_the_size_of_the_mismatch(dtype, low: float, high: float, model, ours) -> None:
    with LlamaCppEngine(model, SETTINGS, sync_dtype=dtype, slots=1, context=64) as engine:
        rollout = engine.generate(*PROMPTS, KEY)
    scores = ours.score(rollout.tokens, rollout.token_mask, response_width=12)
    mask = np.asarray(rollout.response_mask)[:, -12:]
    assert low < np.abs(scores - rollout.log_prob_behaviour[:, -12:])[mask].mean() < high


def test_log_probs_that_llama_cpp_leaves_out_are_asked_for(served: LlamaCppEngine, ours: JaxEngine) -> None:
    """In a byte vocabulary its server sends none for a byte that does not end a character."""
    rollout = served.generate(*PROMPTS, KEY)
    tokens, mask = (np.asarray(array)[:, -12:] for array in (rollout.tokens, rollout.response_mask))
    assert (tokens[mask] >= 128).any()
    scores = ours.score(rollout.tokens, rollout.token_mask, response_width=12)
    np.testing.assert_allclose(rollout.log_prob_behaviour[:, -12:][mask], scores[mask], atol=2e-3)


def test_top_k_of_minus_one_is_the_whole_vocabulary(llama: LlamaCppEngine, ours: JaxEngine) -> None:
    """llama.cpp's own probabilities after its top-k sampler, which is asked for here and left out by the engines."""
    prompt = PROMPTS[0][:1]
    text = (np.pad(prompt, ((0, 0), (0, 1))), np.ones((1, prompt.shape[1] + 1), bool))
    body = {"prompt": prompt[0].tolist(), "n_predict": 1, "n_probs": TOKENIZER.vocab_size, "samplers": ["top_k"]}

    def kept(top_k: int) -> np.ndarray:
        answer = llama._complete({**body, "top_k": top_k, "post_sampling_probs": True})
        entries = answer["completion_probabilities"][0]["top_probs"]
        return np.array([[entry["id"], entry["prob"]] for entry in entries])

    found = kept(UNTRUNCATED["top_k"])
    assert len(found) == TOKENIZER.vocab_size
    expected = np.exp(ours.distributions(*text, response_width=1)[0, 0])
    np.testing.assert_allclose(found[:, 1], expected[found[:, 0].astype(int)], atol=1e-4)
    assert len(kept(40)) == 40  # the server's default


def test_the_server_in_this_process_wants_a_key_and_listens_on_loopback_only(served: LlamaCppEngine) -> None:
    assert served.address.startswith("http://127.0.0.1:")
    assert len(served.api_key) >= 32
    body = json.dumps({"prompt": [1, 2], "n_predict": 1}).encode()
    for key, status in ((None, 401), ("wrong", 401), (served.api_key, 200)):
        for path in ("/completion", "/v1/completions", "/tokenize"):
            answer = Server(served.address, api_key=key, direct=True).post(path, body, Limits(60, 10**7)).answer()
            assert (answer.status == 401) == (status == 401), (path, key, answer.status)
    # Nobody answers on the machine's other addresses.
    port = int(served.address.rpartition(":")[2])
    for *_, (host, *_) in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM):
        if not host.startswith("127."):
            with pytest.raises(OSError, match=r"."):
                socket.create_connection((host, port), timeout=1).close()


def test_what_openais_protocol_asks_for_samples_the_whole_softmax(served, ours: JaxEngine, monkeypatch) -> None:
    """300 first tokens with llama.cpp's top-k sampler switched on, so that top_k says what is sampled from."""
    fields = {**UNTRUNCATED, "samplers": ["top_k", "temperature"]}
    monkeypatch.setattr(openai_server, "UNTRUNCATED", fields)
    settings = EngineSettings(max_new_tokens=1, group_size=300, eos_ids=(TOKENIZER.eos_id,), pad_id=TOKENIZER.pad_id)
    with OpenAIEngine(
        f"{served.address}/v1",
        "m",
        settings,
        vocab_size=259,
        tokenizer=None,
        scoring="forced",
        api_key=served.api_key,
    ) as engine:
        rollout = engine.generate(PROMPTS[0][:1], PROMPTS[1][:1], KEY)
    text = (np.asarray(rollout.tokens)[:1], np.asarray(rollout.token_mask)[:1])
    log_p = ours.distributions(*text, response_width=1)[0, 0]
    drawn = np.asarray(rollout.tokens)[:, -1]
    np.testing.assert_allclose(rollout.log_prob_behaviour[:, -1], log_p[drawn], atol=2e-3)
    cut = np.where(log_p >= np.sort(log_p)[-40], log_p, -np.inf)
    for expected, right in ((np.exp(log_p), True), (np.exp(cut) / np.exp(cut).sum(), False)):
        # Bins by the rank of a token under the model, the last one beyond llama.cpp's default top-k of 40.
        bins = np.digitize(np.argsort(np.argsort(-log_p)), [1, 3, 10, 40])
        mass = 300 * np.bincount(bins, weights=expected) + 1e-9
        counts = np.bincount(bins[drawn], minlength=5)
        assert (((counts - mass) ** 2 / mass).sum() < 4 + 4 * 8**0.5) == right


def test_a_server_behind_openais_protocol(served: LlamaCppEngine, ours: JaxEngine) -> None:
    url = f"{served.address}/v1"
    engine = OpenAIEngine(
        url,
        "model",
        served.settings,
        vocab_size=TOKENIZER.vocab_size,
        tokenizer=TOKENIZER,
        scoring="forced",
        api_key=served.api_key,
    )
    with engine:
        rollout = engine.generate(*PROMPTS, KEY)
        tokens, mask = (np.asarray(array)[:, -12:] for array in (rollout.tokens, rollout.response_mask))
        assert (tokens[mask] >= 128).any()
        # The same seeds in the same engine: the same tokens, whichever protocol asks.
        np.testing.assert_array_equal(rollout.tokens, served.generate(*PROMPTS, KEY).tokens)
        scores = ours.score(rollout.tokens, rollout.token_mask, response_width=12)
        np.testing.assert_allclose(rollout.log_prob_behaviour[:, -12:][mask], scores[mask], atol=2e-3)
        again = engine.score(rollout.tokens[:2], rollout.token_mask[:2], response_width=12)
        np.testing.assert_allclose(again[mask[:2]], scores[:2][mask[:2]], atol=2e-3)
        with pytest.raises(ValueError, match="cannot be changed from here; give the engine a `reload`"):
            engine.push_weights(model_of(0))
    with pytest.raises(EngineError, match="did not echo the log-probs"):
        OpenAIEngine(url, "m", served.settings, vocab_size=259, tokenizer=None, api_key=served.api_key).score(
            rollout.tokens[:1], rollout.token_mask[:1], response_width=12
        )


class _Gone:
    """A server that nobody is."""

    listening_address = "http://127.0.0.1:9"


def test_complete_rollouts_of_a_failed_batch_are_kept(model: Transformer, monkeypatch) -> None:
    """The third of six requests finds no server; the next call asks for the third and those after it."""
    asked: list[int] = []
    with LlamaCppEngine(model, SETTINGS, cache_dtype="F32", slots=1, context=64) as engine:
        whole = engine.generate(*PROMPTS, KEY)
        ask = engine._ask

        def lost_once(body):
            asked.append(body.get("seed"))
            with monkeypatch.context() as patch:
                if len(asked) == 3:
                    patch.setattr(engine, "_server", _Gone())
                return ask(body)

        monkeypatch.setattr(engine, "_ask", lost_once)
        with pytest.raises(IncompleteRolloutsError, match=r"2 of 6 .*did not answer within .* or broke off") as caught:
            engine.generate(*PROMPTS, KEY)
        assert (caught.value.completed, caught.value.wanted, len(asked)) == (2, 6, 3)
        engine.generate(*PROMPTS, KEY, step=1)
        asked.clear()
        asked.extend([0, 0, 0])
        again = engine.generate(*PROMPTS, KEY)
        seeds = np.array(request_seeds(KEY, 0, None, 2, 3)).ravel()
        np.testing.assert_array_equal(asked[3:], seeds[2:])
        np.testing.assert_array_equal(again.tokens, whole.tokens)
        np.testing.assert_allclose(again.log_prob_behaviour, whole.log_prob_behaviour, atol=2e-5)

        asked.clear()
        with pytest.raises(IncompleteRolloutsError, match="2 of 6"):
            engine.generate(*PROMPTS, KEY)
        engine.push_weights(model_of(1))
        engine.generate(*PROMPTS, KEY)
        assert len(asked) == 3 + 6
        with monkeypatch.context() as patch:
            patch.setattr(engine, "timeout", 1e-6)
            with pytest.raises(EngineError, match=r"did not answer within 1e-06 s"):
                engine.distributions(whole.tokens, whole.token_mask, response_width=SETTINGS.max_new_tokens)
    with pytest.raises(EngineError, match=r"^this llama\.cpp engine was stopped"):
        engine.generate(*PROMPTS, KEY)


def test_an_engine_that_was_never_asked_can_be_stopped(model: Transformer) -> None:
    """Weights pushed before any request drop a server too."""
    with LlamaCppEngine(model, SETTINGS, slots=1, context=32) as engine:
        engine.push_weights(model)
    with pytest.raises(EngineError, match="was stopped"):
        engine.generate(*PROMPTS, KEY)


def test_another_vocabulary_is_refused_with_its_first_token(model, tmp_path: Path) -> None:
    other = ByteTokenizer(specials=("<|new|>",))
    save_gguf(model, tmp_path / "model.gguf", tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match=r"first that is missing there is token 259, '<\|new\|>'"):
        LlamaCppEngine(tmp_path / "model.gguf", SETTINGS, tokenizer=other)
    with pytest.raises(ValueError, match=r"first token that differs is 1, 'b' there and 'x'"):
        require_same_tokens(["a", "x", None], ["a", "b", "c"], engine="that engine")
    with pytest.raises(ValueError, match=r"number 3, is 7 there and 32 .*'Ġ'"):
        require_same_pieces(TOKENIZER, [*b"The", 7, *b"x"], engine="that server", text="The x")
    with pytest.raises(ValueError, match="number 2, is None there"):
        require_same_pieces(TOKENIZER, [*b"Th"], engine="that server", text="The")
    save_gguf(model, tmp_path / "bare.gguf")
    with pytest.raises(ValueError, match="has no vocabulary to compare with"):
        LlamaCppEngine(tmp_path / "bare.gguf", SETTINGS, tokenizer=TOKENIZER)


def test_end_tokens_of_a_file_that_the_trainer_does_not_know(served: LlamaCppEngine) -> None:
    before = served.settings
    served.settings = EngineSettings(max_new_tokens=40, group_size=30, eos_ids=(ord("e"),), pad_id=0)
    with pytest.raises(EngineError, match=r"cut off after \d+ of 40 tokens by 'eos', and its last token \[258\]"):
        served.generate(*PROMPTS, KEY)
    served.settings = before


def test_impossible_requests(model: Transformer, llama: LlamaCppEngine, tmp_path: Path) -> None:
    for arguments, sentence in (
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"sync_dtype": "Q4_1"}, "sync_dtype is 'Q4_1'; expected one of F32, F16, BF16, Q8_0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            LlamaCppEngine(model, SETTINGS, **arguments)
    settings = EngineSettings(max_new_tokens=1, group_size=1, eos_ids=(), pad_id=0)
    with pytest.raises(ValueError, match="can name one to 3 end tokens"):
        LlamaCppEngine(model, settings)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        EngineSettings(max_new_tokens=1, group_size=0, eos_ids=(1,), pad_id=0)
    with pytest.raises(ValueError, match="prompt and response take 72 tokens; context is 64"):
        llama.generate(np.ones((1, 60), np.int32), np.ones((1, 60), bool), KEY)
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        llama.generate(np.ones((1, 6), np.int32), np.zeros((1, 6), bool), KEY)
    with pytest.raises(ValueError, match=r"prompt 0 has the tokens 300 \.\. 300; the engine's are 0 \.\. 258"):
        llama.generate(np.full((1, 6), 300), np.ones((1, 6), bool), KEY)
    with pytest.raises(ValueError, match=r"response_width must leave at least one prompt column: 1 \.\. 5 of 6, got 6"):
        llama.score(np.ones((1, 6), np.int32), np.ones((1, 6), bool), response_width=6)
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="truncated or not a GGUF file"):
        LlamaCppEngine(tmp_path / "no.gguf", SETTINGS)


def test_a_missing_package_is_named_with_its_extra(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxrl_llm\[engines\]'"):
        LlamaCppEngine(model, SETTINGS)


def test_the_built_in_engine_is_the_sampler(model: Transformer, ours: JaxEngine) -> None:
    from jaxrl_llm.rollouts import make_generate

    graphdef, state = nnx.split(model)
    plain = make_generate(
        graphdef,
        max_new_tokens=12,
        group_size=3,
        sampling=SETTINGS.sampling,
        eos_id=SETTINGS.eos_ids,
        pad_id=SETTINGS.pad_id,
    )(state, jnp.asarray(PROMPTS[0]), jnp.asarray(PROMPTS[1]), KEY, 0, jnp.arange(2))
    jax.tree.map(np.testing.assert_array_equal, plain, ours.generate(*PROMPTS, KEY))


def test_reading_back_what_was_pushed(model: Transformer, tmp_path: Path) -> None:
    """The placeholder vocabulary does not hinder the reader."""
    from jaxrl_llm.models.gguf_io import write_gguf
    from jaxrl_llm.models.gguf_tokenizer import placeholder_metadata
    from jaxrl_llm.models.weights import model_tensors

    metadata = placeholder_metadata(vocab_size=259, end_ids=(258, 7))
    write_gguf(tmp_path / "m.gguf", model.config, model_tensors(model), dtype="F32", metadata=metadata)
    np.testing.assert_array_equal(load_gguf(tmp_path / "m.gguf").embedding[...], model.embedding[...])
    with pytest.raises(ValueError, match="end_ids has 259, which is not a token"):
        placeholder_metadata(vocab_size=259, end_ids=(259,))


def test_smollm2_in_llama_cpp_is_smollm2_in_jax() -> None:
    """A trained model of real size."""
    model, tokenizer = smollm2_135m()
    settings = EngineSettings(max_new_tokens=8, group_size=1, eos_ids=(tokenizer.eos_id,), pad_id=tokenizer.pad_id)
    prompts = tokenizer.encode_batch([format_chat([{"role": "user", "content": "Say 1 2 3"}])])
    with LlamaCppEngine(model, settings, cache_dtype="F32", slots=1, context=64) as engine:
        rollout = engine.generate(*prompts, KEY)
    scores = JaxEngine(model, settings).score(rollout.tokens, rollout.token_mask, response_width=8)
    assert np.abs(rollout.log_prob_behaviour[:, -8:] - scores).mean() < 1e-3
