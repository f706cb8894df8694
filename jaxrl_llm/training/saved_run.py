"""The model of a run, from its folder alone: `load_run(folder).model` has the weights of a checkpoint.

A checkpoint holds the parameters that learn; the others follow from how the model was made before training, which
`model.json` says: from which weights or which seed, and which parameters learn.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import RopeScaling
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.files import one_line
from jaxrl_llm.models.files import read_json
from jaxrl_llm.models.files import whole_file
from jaxrl_llm.models.files import write_json
from jaxrl_llm.models.lora import LoraSettings
from jaxrl_llm.models.pretrained import load_pretrained
from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.stored import check_memory
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.trainable import Trainable
from jaxrl_llm.models.trainable import combine
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training.run.checkpoints import checkpoint_steps
from jaxrl_llm.training.run.checkpoints import read_progress
from jaxrl_llm.training.run.checkpoints import settings_difference
from jaxrl_llm.training.run.errors import StorageError
from jaxrl_llm.training.run.seals import what_is_broken
from jaxrl_llm.training.run.state import state_hash
from jaxrl_llm.training.text.policy import describe_model
from jaxrl_llm.training.text.policy import split_policy

FILE = "model.json"
FORMAT = 1
"""Version of the file; another one is not read."""
SMOLLM2 = "smollm2_135m"
BYTES, OWN = "bytes", "folder"
"""Tokenizers of models without a source: `ByteTokenizer()`, or what lies in the run's folder `tokenizer`."""

ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    ModuleNotFoundError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What values that nobody thought of raise, in Python, JAX and XLA."""


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """The policy of a run after some of its steps.

    Attributes:
        model: with the trained weights; adapters are still beside the matrices (`models.merge_lora` adds them in).
        tokenizer: of the model.
        settings: of the run: those of its config.json where there is one, else those of the checkpoint.
        step: rollout batches taken; 0 is the model before training.
    """

    model: Transformer
    tokenizer: Tokenizer
    settings: dict[str, Any]
    step: int


def write_model(
    folder: str | Path,
    model: Transformer,
    trainable: Trainable,
    tokenizer: Tokenizer,
    *,
    source: str | None,
    seed: int = 0,
) -> Path:
    """Write `model.json`: how to make this model again, before training takes its parameters over.

    Args:
        folder: of the run; made if it is not there.
        model: before training, prepared by `trainable`.
        trainable: which parameters learn, those that checkpoints hold.
        tokenizer: of the model; that of a source is read from there again.
        source: "smollm2_135m", the path of a Hugging Face folder or GGUF file, or None for
            `Transformer(model.config, rngs=nnx.Rngs(seed))`.
        seed: of the random weights; not looked at where there is a source.

    Returns:
        the file.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
    named = source if source in (None, SMOLLM2) else str(Path(source).absolute())
    own = type(tokenizer) is not ByteTokenizer or tokenizer.vocab_size != ByteTokenizer().vocab_size
    content = {
        "format": FORMAT,
        "source": named,
        "seed": seed,
        "config": dataclasses.asdict(model.config),
        "param_dtype": model.numerics.param_dtype.name,
        "compute_dtype": model.numerics.compute_dtype.name,
        "tokenizer": None if source is not None else OWN if own else BYTES,
        "trainable": dataclasses.asdict(trainable),
        "frozen_sha256": state_hash(split_policy(model, trainable)[2]),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if content["tokenizer"] == OWN:
            (folder / "tokenizer").mkdir(exist_ok=True)
            tokenizer.save(folder / "tokenizer")
        with whole_file(folder / FILE, size=len(json.dumps(content))) as draft:
            write_json(draft, content)
    except OSError as error:
        raise StorageError(f"Cannot write {folder / FILE}: {error.strerror or error}.") from error
    return folder / FILE


def load_run(run: str | Path, *, step: int | None = None) -> SavedRun:
    """The model that a run trained, with its tokenizer and settings; nothing in the folder is changed.

    Args:
        run: its folder.
        step: of which checkpoint; None is the newest one, 0 the model before training, which needs no checkpoint.

    Raises:
        StorageError: the folder is no run, has no such checkpoint, or something in it is missing or damaged; or the
            weights that training started from are not the same any more; or the model is another one than its
            checkpoint was trained as.

    Warns:
        UserWarning: the checkpoint is of a version that did not write down which model it belongs to.
    """
    folder = Path(run)
    content = _described(folder)
    step = _chosen(folder, step)
    with _sentences(f"The model before training of {folder}, as {folder / FILE} describes it, cannot be made"):
        model, tokenizer = _before_training(folder, content)
        trainable = _trainable(content["trainable"])
        model = trainable.prepare(model, rngs=nnx.Rngs(0))
        policy, params, frozen = split_policy(model, trainable)
    if state_hash(frozen) != content["frozen_sha256"]:
        raise StorageError(
            f"The parameters that run {folder} did not train differ from those it started from "
            f"({content['source'] or 'random weights'}): the weights there were changed, or random numbers are "
            "others on this machine."
        )
    settings, place = _settings(folder, step), (folder / "checkpoints").absolute()
    if step:
        _require_sound(place, step)
        params = _restored(place / str(step), params)
    _require_same_model(place, step, describe_model(model, trainable))
    return SavedRun(nnx.merge(policy.graphdef, combine(params, frozen)), tokenizer, settings, step)


def _described(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise StorageError(f"{folder} is not a folder; expected that of a run.")
    try:
        content = read_json(folder / FILE)
    except FileNotFoundError as error:
        raise StorageError(
            f"{folder} has no {FILE}; it is not the folder of a run that trains, or of one from before runs wrote one."
        ) from error
    except (ValueError, OSError) as error:
        raise StorageError(f"Cannot read how the model was made: {error}") from error
    if content.get("format") != FORMAT:
        raise StorageError(f"{folder / FILE} has the format {content.get('format')!r}; this version reads {FORMAT}.")
    lacking = {"source", "seed", "config", "tokenizer", "trainable", "frozen_sha256"} - set(content)
    if lacking:
        raise StorageError(f"{folder / FILE} lacks {', '.join(sorted(lacking))}; it is damaged.")
    return content


@contextmanager
def _sentences(what: str) -> Iterator[None]:
    """Failures of what a file describes as one sentence."""
    try:
        yield
    except StorageError:
        raise
    except ERRORS as error:
        raise StorageError(f"{what}: {one_line(error) or type(error).__name__}") from error


def _before_training(folder: Path, content: Mapping[str, Any]) -> tuple[Transformer, Tokenizer]:
    source = content["source"]
    param_dtype, compute_dtype = (jnp.dtype(content[name]) for name in ("param_dtype", "compute_dtype"))
    if source is not None:
        if source == SMOLLM2:
            return smollm2_135m(dtype=param_dtype, compute_dtype=compute_dtype)
        return load_pretrained(source, dtype=param_dtype, compute_dtype=compute_dtype)
    fields = dict(content["config"])
    for name, kind in (("rope_scaling", RopeScaling), ("experts", ExpertsConfig)):
        if fields.get(name) is not None:
            fields[name] = kind(**fields[name])
    config = TransformerConfig(**fields)
    check_memory(config, param_dtype.itemsize, source=str(folder / FILE))
    rngs = nnx.Rngs(content["seed"])
    model = Transformer(config, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype)
    own = content["tokenizer"] == OWN
    return model, Tokenizer.from_folder(folder / "tokenizer") if own else ByteTokenizer()


def _trainable(fields: Mapping[str, Any]) -> Trainable:
    adapters = fields["adapters"]
    if adapters is not None:
        adapters = LoraSettings(**{**adapters, "projections": tuple(adapters["projections"])})
    return Trainable(top=fields["top"], adapters=adapters, further=fields.get("further", False))


def _chosen(folder: Path, step: int | None) -> int:
    """The step whose checkpoint is read; 0 for the model before training.

    Raises:
        StorageError: there is none.
    """
    steps = checkpoint_steps(folder / "checkpoints")[::-1]
    if step == 0:
        return step
    if not steps:
        raise StorageError(f"{folder} has no complete checkpoint yet; step=0 is the model before training.")
    if step is not None and step not in steps:
        raise StorageError(
            f"{folder} has no checkpoint of step {step}; there are those of {', '.join(map(str, steps))} "
            "(keep_checkpoints says how many are kept), and step 0, the model before training."
        )
    return steps[-1] if step is None else step


def _require_sound(place: Path, step: int) -> None:
    """Raise unless a checkpoint is as it was written, naming one that is.

    Args:
        place: of all checkpoints.
        step: of the one that is asked for.

    Raises:
        StorageError: it is not.
    """
    reason = what_is_broken(place / str(step))
    if not reason:
        return
    others = (other for other in checkpoint_steps(place) if other != step)
    sound = next((other for other in others if not what_is_broken(place / str(other))), None)
    instead = (
        "no other one is sound; step=0 is the model before training" if sound is None else f"step={sound} is sound"
    )
    raise StorageError(f"Checkpoint {place / str(step)} cannot be read: {reason}; {instead}.")


def _settings(folder: Path, step: int) -> dict[str, Any]:
    with _sentences(f"The settings of {folder} cannot be read"):
        if (folder / "config.json").exists():
            return dict(read_json(folder / "config.json")["settings"])
        return dict(read_json(folder / "checkpoints" / str(step) / "progress" / "metadata")["settings"]) if step else {}


def _require_same_model(place: Path, step: int, model: Mapping[str, Any]) -> None:
    """Raise unless a model is the one that was trained, beyond the shapes of its arrays.

    Args:
        place: of all checkpoints.
        step: of the one that is read; at 0 the newest sound one says which model it was, if there is one.
        model: what `describe_model` says of it.

    Raises:
        StorageError: it is another one.
    """
    steps = [step] if step else [other for other in checkpoint_steps(place) if not what_is_broken(place / str(other))]
    if not steps:
        return
    trained = read_progress(place / str(steps[0]), steps[0]).model
    if not trained:
        warnings.warn(
            f"Checkpoint {place / str(steps[0])} does not say which model it belongs to, as older versions did not: "
            f"that {FILE} was not changed cannot be seen.",
            stacklevel=3,
        )
        return
    changes = settings_difference(trained, model)
    if changes:
        raise StorageError(
            f"{FILE}, or what it names, describes another model than checkpoint {place / str(steps[0])} was trained "
            f"as: {'; '.join(changes)}."
        )


def _is_alike(saved: Any, wanted: jax.ShapeDtypeStruct) -> bool:
    return tuple(saved.shape) == wanted.shape and str(saved.dtype) == str(wanted.dtype)


def _restored(place: Path, params: nnx.State) -> nnx.State:
    """The trained parameters of a checkpoint, laid out like `params`; the optimiser's state stays on the disk."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    wanted = {
        f"params.{jax.tree_util.keystr(path, simple=True, separator='.')}": jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        )
        for path, leaf in leaves
    }
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
    try:
        found = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))
        saved = dict((found.metadata(place).item_metadata or {})["state"])
        differing = [name for name in wanted if name not in saved or not _is_alike(saved[name], wanted[name])]
        differing += [name for name in saved if name.startswith("params.") and name not in wanted]
        if differing:
            raise StorageError(
                f"Checkpoint {place} holds other arrays than the model of {FILE}; the first is {differing[0]}."
            )
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        items = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
        arrays = found.restore(place, args=ocp.args.Composite(state=items))["state"]
    except StorageError:
        raise
    except Exception as error:
        # Orbax and TensorStore report missing and damaged files under several exception types.
        reason = str(error).strip().splitlines()
        raise StorageError(
            f"Checkpoint {place} cannot be read ({reason[0] if reason else type(error).__name__})."
        ) from error
    return jax.tree.unflatten(structure, [arrays[name] for name in wanted])
