"""Where experience comes from, as settings: the task's own sampler, another engine, a file, and who teaches."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from typing import Literal

from experiments.named import load_function
from experiments.run_folder import UserError
from jaxrl_llm.environments import Curriculum
from jaxrl_llm.models import Transformer
from jaxrl_llm.models.chat import CHATML
from jaxrl_llm.models.chat import QWEN2
from jaxrl_llm.models.chat import QWEN2_5
from jaxrl_llm.models.chat import SMOLLM2
from jaxrl_llm.models.chat import ChatFormat
from jaxrl_llm.models.lora import merge_lora
from jaxrl_llm.models.pretrained import load_pretrained
from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.weights import save_hf
from jaxrl_llm.rollouts.collect import Brings
from jaxrl_llm.rollouts.collect import Collector
from jaxrl_llm.rollouts.collect import DemonstrationCollector
from jaxrl_llm.rollouts.collect import EngineSampler
from jaxrl_llm.rollouts.collect import Law
from jaxrl_llm.rollouts.collect import PreferenceCollector
from jaxrl_llm.rollouts.collect import Sampler
from jaxrl_llm.rollouts.collect.demonstrations import check_demonstrations
from jaxrl_llm.rollouts.collect.preferences import check_preferences
from jaxrl_llm.rollouts.collect.samplers import pruned_with_policy
from jaxrl_llm.rollouts.engines import EngineError
from jaxrl_llm.rollouts.engines import EngineSettings
from jaxrl_llm.rollouts.engines import LlamaCppEngine
from jaxrl_llm.rollouts.engines import OpenAIEngine
from jaxrl_llm.rollouts.perturb import bf16_weights
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.training import Parts
from jaxrl_llm.training import TrainSettings
from jaxrl_llm.training import end_tokens
from jaxrl_llm.training.saved_run import load_run
from jaxrl_llm.training.text.objective import get_objective

KEY_VARIABLE = "OPENAI_API_KEY"
"""Where the key of a server is read from; it is no setting, so that it is written down nowhere."""


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """Where experience comes from.

    Attributes:
        engine: who samples: the built-in sampler, llama.cpp in this process, or a server of OpenAI's completions.
        sync_dtype: precision in which weights are pushed to llama.cpp.
        engine_slots: sequences that llama.cpp samples at a time; one gives the same bits for the same call.
        engine_threads: of llama.cpp's computation.
        url: of the server, with /v1 at its end; its key is read from OPENAI_API_KEY.
        served_model: the name under which the server knows the model.
        reload: my_module:my_function, called with a Hugging Face folder of the new weights after every update; it makes
            the server load them.
        demonstrations: a file of demonstrations to learn from instead of a task's answers (JSON lines or Parquet).
        preferences: a file of preference pairs to learn from.
        chat_format: how the turns of a file are written; "none" joins a prompt and a response as they are.
        teacher: the reference of divergences, imitation, preferences and distillation: "smollm2_135m", a Hugging Face
            folder, a GGUF file, or the folder of a run; the policy before training where None.
    """

    engine: Literal["jax", "llama_cpp", "openai"] = "jax"
    sync_dtype: Literal["F32", "F16", "BF16", "Q8_0"] = "F32"
    engine_slots: int = 4
    engine_threads: int = 1
    url: str | None = None
    served_model: str = "policy"
    reload: str | None = None
    demonstrations: str | None = None
    preferences: str | None = None
    chat_format: Literal["none", "chatml", "smollm2", "qwen2", "qwen2_5"] = "none"
    teacher: str | None = None

    def check(self) -> None:
        """Refuse what cannot be together, before anything is loaded.

        Raises:
            UserError: naming the fields.
        """
        if self.demonstrations and self.preferences:
            raise UserError("Fields --demonstrations and --preferences: one file at a time.")
        if self.engine != "jax" and (self.demonstrations or self.preferences):
            raise UserError(f"Field --engine is {self.engine!r}, but experience from a file is sampled by nobody.")
        if self.engine == "openai" and not self.url:
            raise UserError("Field --engine is 'openai', so --url must say where the server is.")
        if self.engine == "openai" and not self.reload:
            raise UserError(
                "Field --engine is 'openai', so --reload must say how the server takes new weights: "
                "my_module:my_function of a Hugging Face folder (jaxrl_llm.rollouts.engines.reload)."
            )
        if self.engine != "openai" and (self.url or self.reload):
            raise UserError(f"Fields --url and --reload belong to --engine openai; --engine is {self.engine!r}.")
        readers = {"demonstrations": check_demonstrations, "preferences": check_preferences}
        for name, path in (("demonstrations", self.demonstrations), ("preferences", self.preferences)):
            if path and not Path(path).is_file():
                raise UserError(f"Field --{name}: there is no file {path!r}.")
            try:
                if path:
                    readers[name](path, chat=CHAT_FORMATS[self.chat_format] is not None)
            except (ValueError, OSError, ModuleNotFoundError) as error:
                raise UserError(f"Field --{name}: {error}") from error

    @property
    def from_file(self) -> bool:
        """Whether a file brings the experience."""
        return bool(self.demonstrations or self.preferences)

    @property
    def brings(self) -> Brings:
        """What the experience has beside its tokens."""
        if self.demonstrations:
            return DemonstrationCollector.brings
        return PreferenceCollector.brings if self.preferences else Brings()


def open_collector(sources: SourceSettings, tokenizer: Tokenizer, settings: TrainSettings) -> Collector | None:
    """The collector of a file, if one is named: `prompts` demonstrations, or pairs, per batch.

    Raises:
        ValueError, OSError, ModuleNotFoundError: the file cannot be used, in a sentence.
    """
    width = settings.prompt_length + settings.response_length
    common: dict[str, Any] = {"width": width, "seed": settings.seed, "samples": settings.samples}
    common["chat_format"] = CHAT_FORMATS[sources.chat_format]
    if sources.demonstrations:
        return DemonstrationCollector(sources.demonstrations, tokenizer, rows=settings.prompts, **common)
    if sources.preferences:
        return PreferenceCollector(sources.preferences, tokenizer, pairs=settings.prompts, **common)
    return None


CHAT_FORMATS: dict[str, ChatFormat | None] = {
    "none": None,
    "chatml": CHATML,
    "smollm2": SMOLLM2,
    "qwen2": QWEN2,
    "qwen2_5": QWEN2_5,
}

PROBE = "Sum: 12 + 7 = 19\nWhy? Because 12 + 7 is 19; é中."
"""A text on which tokenizers that differ are apart."""


def open_teacher(sources: SourceSettings, tokenizer: Tokenizer) -> Transformer | None:
    """The teacher, if one is named.

    Args:
        sources: which one.
        tokenizer: of the policy; the teacher's must give the same tokens.

    Raises:
        ValueError, OSError, TrainingError: it cannot be loaded, or has other tokens, in a sentence.
    """
    name = sources.teacher
    if name is None:
        return None
    if name == "smollm2_135m":
        model, own = smollm2_135m()
    elif (Path(name) / "model.json").exists():
        run = load_run(name)
        model, own = merge_lora(run.model), run.tokenizer
    else:
        model, own = load_pretrained(name)
    if own.vocab_size != tokenizer.vocab_size or own.encode(PROBE) != tokenizer.encode(PROBE):
        raise UserError(
            f"Field --teacher: {name} has another tokenizer than the policy ({own.vocab_size} tokens, the policy's "
            f"{tokenizer.vocab_size}); a divergence between them needs the same tokens."
        )
    return model


@contextmanager
def open_sampler(sources: SourceSettings, parts: Parts, settings: TrainSettings) -> Iterator[Sampler | None]:
    """The engine that samples, if another one than the built-in sampler does; it is stopped at the end.

    Args:
        sources: which engine.
        parts: model, tokenizer, and the task whose stop ends an answer.
        settings: sizes and sampling.

    Raises:
        UserError: the engine does not start, or cannot do what is asked.
    """
    if sources.engine == "jax":
        yield None
        return
    assert parts.task is not None
    assert not isinstance(parts.task, Curriculum)
    model, tokenizer, task = parts.model, parts.tokenizer, parts.task
    objective = get_objective(parts.objective, parts.recipe)
    reload = None if sources.reload is None else load_function(sources.reload, "reload", ())
    engine_settings = EngineSettings(
        max_new_tokens=settings.response_length,
        group_size=settings.group_size,
        eos_ids=end_tokens(tokenizer, task.stop),
        pad_id=tokenizer.pad_id,
        sampling=pruned_with_policy(settings.sampling, objective.log_min_p, objective.name),
    )
    with tempfile.TemporaryDirectory(prefix="jaxrl_llm_weights_") as folder:

        def push(newest: Transformer) -> None:
            assert reload is not None
            place = Path(folder) / "weights"
            shutil.rmtree(place, ignore_errors=True)
            save_hf(newest, place, tokenizer=tokenizer)
            reload(str(place))

        try:
            engine: LlamaCppEngine | OpenAIEngine
            if sources.engine == "llama_cpp":
                engine = LlamaCppEngine(
                    merge_lora(model),
                    engine_settings,
                    sync_dtype=sources.sync_dtype,
                    cache_dtype="F32" if sources.sync_dtype == "F32" else "F16",
                    slots=sources.engine_slots,
                    context=settings.prompt_length + settings.response_length,
                    n_threads=sources.engine_threads,
                )
            else:
                engine = OpenAIEngine(
                    str(sources.url),
                    sources.served_model,
                    engine_settings,
                    vocab_size=model.config.vocab_size,
                    tokenizer=tokenizer,
                    reload=None if reload is None else push,
                    api_key=os.environ.get(KEY_VARIABLE, "none"),
                )
        except (EngineError, ModuleNotFoundError, ValueError) as error:
            raise UserError(f"Field --engine: {error}") from error
        with engine:
            yield EngineSampler(engine, law_of(sources, engine_settings.sampling), repeatable=False)


def law_of(sources: SourceSettings, sampling: SamplingSettings) -> Law:
    """What the trainer can compute of the engine's distribution: that of the pushed weights in its own arithmetic,
    where it can round them so. What the engine rounds besides, activations and cache, is in the measured mismatch only.
    """
    if sources.engine != "llama_cpp" or sampling.truncated:
        return Law(known=False)
    known = {"F32": Law(known=True), "BF16": Law(known=True, weights=bf16_weights)}
    return known.get(sources.sync_dtype, Law(known=False))
