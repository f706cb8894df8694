"""Damage small sound checkpoints at random: each loads, or ends in one ModelFileError with a sentence, soon and small.

    python -m tests.fuzz.model_files --seconds 60 --seed 0
    python -m tests.fuzz.model_files --seed 0 --case 1234        # one case again, with its traceback

A case is a kind of checkpoint (GGUF file, Hugging Face folder) and a few changes of its bytes, of its JSON or of what
its files are. Every case follows from seed and number alone.
"""

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import normalizers

from jaxrl_llm.models.chat import chat_ids
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.hf_config import config_from_hf
from jaxrl_llm.models.hf_io import INDEX
from jaxrl_llm.models.hf_io import SINGLE
from jaxrl_llm.models.pretrained import load_pretrained
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.tokenizers import byte_alphabet
from jaxrl_llm.models.weights import build_model
from jaxrl_llm.models.weights import load_hf
from jaxrl_llm.models.weights import model_tensors
from jaxrl_llm.models.weights import save_gguf
from jaxrl_llm.models.weights import save_hf
from tests.golden.tiny_checkpoints import CHECKPOINTS
from tests.golden.tiny_checkpoints import tensors_of

SECONDS, BYTES = 5.0, 1e9
"""What a case may take."""
ROWS = 265
TEXT = "a é\n<|eos|><|bos|> 12345 <think> hello"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
NUMBERS = (0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    3,
    1.5,
    2**31,
    10**30,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e308,
    "",
    "x",
    "../x",
    "\ud800",
    "a" * 10_000,
    "4",
    [],
    [None],
    [[[]]],
    list(range(300)),
    {},
    {"a": {"a": {}}},
    {"content": 3},
)


class OutOfTime(BaseException):
    """A case took longer than it may; no reader may take this for content."""


def make_tokenizer() -> Tokenizer:
    """Bytes, three merges and four special tokens; texts begin with one of them."""
    tokens = [*byte_alphabet(), "he", "ll", "hell", "<|eos|>", "<|bos|>", "<think>", "<|im_end|>"]
    entries = {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": [1] * 259 + [3, 3, 4, 3]}
    entries |= {"merges": ["h e", "l l", "he ll"], "eos_token_id": 259, "bos_token_id": 260}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in entries.items()}
    return Tokenizer.from_gguf_metadata({**metadata, "tokenizer.chat_template": TEMPLATE})


def make_sources(folder: Path) -> dict[str, Path]:
    """Sound checkpoints, by name."""
    sources = {}
    tokenizer = make_tokenizer()
    for name in ("llama_grouped_tied", "llama_scaled_rotation_untied", "qwen2_biases", "qwen3_head_norms"):
        settings, tensors = {**CHECKPOINTS[name], "vocab_size": ROWS}, tensors_of(name)
        for table in ("model.embed_tokens.weight", "lm_head.weight"):
            if table in tensors:
                tensors[table] = np.resize(tensors[table], (ROWS, tensors[table].shape[1]))
        model = build_model(config_from_hf(settings), tensors)
        save_gguf(model, folder / f"{name}.gguf", tokenizer=tokenizer)
        save_hf(model, folder / name, tokenizer=tokenizer)
        sources |= {f"{name}.gguf": folder / f"{name}.gguf", name: folder / name}
    split = folder / "split"
    shutil.copytree(folder / "qwen2_biases", split)
    (split / SINGLE).unlink()
    backend = tokenizers.Tokenizer.from_file(str(split / "tokenizer.json"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "yy")])
    backend.save(str(split / "tokenizer.json"))
    settings = json.loads((split / "tokenizer_config.json").read_text())
    settings |= {"added_tokens_decoder": {"259": {"content": "<|eos|>", "special": True}}}
    settings |= {"additional_special_tokens": ["<think>"]}
    (split / "tokenizer_config.json").write_text(json.dumps(settings))
    tensors = model_tensors(load_hf(folder / "qwen2_biases"))
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: np.ascontiguousarray(tensors[name]) for name in held}, split / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (split / INDEX).write_text(json.dumps(index))
    return {**sources, "split": split}


def damage_bytes(data: bytes, dice: random.Random, header: int) -> bytes:
    """One change of a file's bytes, most often within the first `header` of them."""
    place = dice.randrange(max(1, min(header, len(data)) if dice.random() < 0.9 else len(data)))
    number = dice.choice(NUMBERS)
    raw = struct.pack("<Q", number) if dice.random() < 0.5 else struct.pack("<I", number & 0xFFFFFFFF)
    piece = data[place : place + dice.randrange(1, 64)]
    changes: list[Callable[[], bytes]] = [
        lambda: data[:place],
        lambda: data[:place] + bytes([dice.randrange(256)]) + data[place + 1 :],
        lambda: data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :] if data else data,
        lambda: data[:place] + raw + data[place + len(raw) :],
        lambda: data[:place] + raw + data[place:],
        lambda: data[:place] + piece * dice.randrange(2, 9) + data[place + len(piece) :],
        lambda: data[:place] + data[place + len(piece) :],
        lambda: data + bytes(dice.randrange(1, 5000)),
    ]
    return dice.choice(changes)()


def gguf_numbers(data: bytes) -> list[tuple[int, int]]:
    """Place and width of every number of a sound GGUF header: lengths, types, values, dimensions and offsets."""
    from jaxrl_llm.models import gguf_header

    places: list[tuple[int, int]] = []

    class Recording(gguf_header._Cursor):
        def number(self, code: str) -> Any:
            places.append((self.place, struct.calcsize(f"<{code}")))
            return super().number(code)

    plain = gguf_header._Cursor
    gguf_header._Cursor = Recording
    try:
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            file.write(data)
            file.flush()
            gguf_header.read_header(Path(file.name))
    finally:
        gguf_header._Cursor = plain
    return places


def damage_gguf(path: Path, dice: random.Random) -> None:
    """Cut at, or change, a number of the header; or any byte."""
    data = path.read_bytes()
    places = gguf_numbers(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        place, width = dice.choice(places)
        kind = dice.randrange(4)
        if kind == 0:
            data = data[: place + dice.choice((0, width // 2, width))]
        elif kind == 1:
            old = int.from_bytes(data[place : place + width], "little")
            new = dice.choice((*NUMBERS, old + 1, old - 1, old * 2)) % 2 ** (8 * width)
            data = data[:place] + new.to_bytes(width, "little") + data[place + width :]
        else:
            data = damage_bytes(data, dice, places[-1][0])
    path.write_bytes(data)


def damage_json(content: Any, dice: random.Random) -> Any:
    """One change of a JSON value, anywhere in it."""
    root: dict[str, Any] = {"": copy.deepcopy(content)}
    holder: Any = root
    key: Any = ""
    while isinstance(holder[key], dict | list) and holder[key] and dice.random() < 0.8:
        holder = holder[key]
        key = dice.choice(list(holder)) if isinstance(holder, dict) else dice.randrange(len(holder))
        if len(holder) > 40 and dice.random() < 0.8:  # vocabularies are long, and their entries alike
            break
    kind = dice.randrange(4)
    if kind == 0 and key != "":
        del holder[key]
    elif kind == 1 and isinstance(holder[key], int):
        holder[key] = dice.choice((holder[key] + 1, -holder[key], holder[key] * 10**9, str(holder[key])))
    elif kind == 2 and isinstance(holder, dict) and key != "":
        holder[dice.choice(("x", "type", "content", "0"))] = holder.pop(key)
    else:
        holder[key] = copy.deepcopy(dice.choice(ODD_VALUES))
    return root[""]


def damage_folder(folder: Path, dice: random.Random) -> None:
    """Change a file of a folder: what it says, its bytes, or that it is one."""
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        path = dice.choice(sorted(folder.iterdir()))
        if not path.is_file() or path.is_symlink():
            continue
        kind = dice.random()
        if kind < 0.1:
            path.unlink()
            stand_ins = [lambda path: None, Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")]
            dice.choice(stand_ins)(path)
        elif path.suffix == ".json" and kind < 0.8:
            try:
                path.write_text(json.dumps(damage_json(json.loads(path.read_text()), dice)))
            except (ValueError, RecursionError):  # an earlier change left no JSON
                continue
        elif path.suffix == ".safetensors" and kind < 0.6:
            damage_safetensors(path, dice)
        else:
            path.write_bytes(damage_bytes(path.read_bytes(), dice, 4000))


def damage_safetensors(path: Path, dice: random.Random) -> None:
    """Change the header of a safetensors file, whose length is put right."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return
    for _ in range(dice.choice((1, 2))):
        header = damage_json(header, dice)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise OutOfTime after so many seconds of the block."""

    def stop(signum: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def load(path: Path) -> str:
    """Load a checkpoint and use its tokenizer; what came of it, in a word."""
    try:
        model, tokenizer = load_pretrained(path)
        ids = tokenizer.encode(TEXT)
        tokenizer.decode(ids)
        tokenizer.has_text(model.config.vocab_size)
    except ModelFileError as error:
        text = str(error)
        if len(text.splitlines()) != 1 or len(text) > 3000:
            raise AssertionError(f"the sentence is none: {text[:200]!r}") from error
        return "refused"
    if max(ids) >= model.config.vocab_size or not set(tokenizer.eos_ids) <= set(range(model.config.vocab_size)):
        raise AssertionError("ids beyond the model's rows")
    try:
        chat_ids([{"role": "user", "content": "hi"}], tokenizer)
    except ValueError:
        return "loaded; its chat template is refused"
    return "loaded"


def run_case(sources: dict[str, Path], work: Path, seed: int, case: int) -> str:
    """One case: what came of it, or a line that begins with FAULT.

    Args:
        sources: see `make_sources`.
        work: a folder to write in.
        seed: of the run.
        case: number of the case.
    """
    dice = random.Random(f"{seed} {case}")
    name = dice.choice(sorted(sources))
    target = work / f"case{sources[name].suffix}"
    if sources[name].is_dir():
        shutil.copytree(sources[name], target)
        damage_folder(target, dice)
    else:
        shutil.copy(sources[name], target)
        damage_gguf(target, dice)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        with within(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load(target)
    except (Exception, OutOfTime) as error:
        traceback.print_exc()
        return f"FAULT: {name}, seed {seed}, case {case}: {type(error).__name__}"
    finally:
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    if grown > BYTES or time.monotonic() - start > SECONDS:
        return f"FAULT: {name}, seed {seed}, case {case}: {grown / 1e9:.1f} GB, {time.monotonic() - start:.1f} s"
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 where a case was a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case only")
    chosen = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAXRL_LLM_CACHE"] = f"{folder}/cache"
        work = Path(folder) / "work"
        work.mkdir()
        sources = make_sources(Path(folder))
        end, case = time.monotonic() + chosen.seconds, chosen.case or 0
        while time.monotonic() < end:
            found = run_case(sources, work, chosen.seed, case)
            counts[found.split(":")[0]] += 1
            if found.startswith("FAULT"):
                faults.append(found)
                print(found, flush=True)
            case += 1
            if chosen.case is not None:
                break
    print(f"model files, seed {chosen.seed}: {dict(counts)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
