"""Continue text with a trained or a published model.

    python -m jaxeff.generate --workdir runs/mine --prompt "def "
    python -m jaxeff.generate --hf path/to/checkpoint --prompt "Once upon" --temperature 0.8
    python -m jaxeff.generate --workdir runs/mine --prompt "a" --prompt "b" --greedy

One prompt is continued as a stream; several (repeat --prompt, or give --prompt_file with one prompt
per line) run as one batch and are printed one after another.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxeff.language import (
    SamplingConfig,
    StreamDecoder,
    TensorMismatchError,
    Tokenizer,
    generate,
    generate_stream,
    load_hf,
    load_tokenizer,
    pad_prompts,
)
from jaxeff.tasks.experiment import task_module
from jaxeff.training import CheckpointError, ConfigError, restore_params
from jaxeff.training.config import build

DTYPES = ("float32", "bfloat16", "float16")
PREFILL_CHUNK = 512  # bounds the memory of the attention scores of a long prompt


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model that is ready to continue text.

    Attributes:
      config, params: of the model.
      tokenizer: the one it was trained with.
      eos_ids: tokens that end a text.
      add_bos: whether its texts began with the bos token.
      module: the model; None is the decoder of the config.
    """

    config: Any
    params: Any
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    add_bos: bool
    module: Any = None

    @property
    def longest(self) -> int | None:
        """Positions that it was made for; None where there is no limit."""
        return getattr(self.config, "max_position_embeddings", None)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How texts are continued: at most `max_new_tokens` tokens, drawn by `sampling` from `seed`."""

    max_new_tokens: int
    sampling: SamplingConfig
    seed: int = 0


def load_run(
    workdir: str | Path,
    *,
    step: int | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
) -> Model:
    """Loads the model of a training run.

    Args:
      workdir: directory of the run, with `config.json` and `checkpoints/`.
      step: which checkpoint; None takes the newest whole one.
      tokenizer: None takes the run's own.
      dtype: of parameters and computation; None takes the run's.

    Raises:
      FileNotFoundError: no such directory, no `config.json` in it, no tokenizer file.
      ConfigError: the run trained no language model.
      CheckpointError: there is no such checkpoint, or none that is whole.
    """
    workdir = Path(workdir)
    file = workdir / "config.json"
    if not workdir.is_dir():
        raise FileNotFoundError(f"no run at {workdir}")
    if not file.is_file():
        raise FileNotFoundError(f"{workdir} has no config.json: it is not the workdir of a run")
    run = json.loads(file.read_text("utf-8"))
    if not run.get("model") or not run.get("data"):
        raise ConfigError(f"{file} describes no language model (task {run.get('task')!r})")
    task = task_module(run["task"])
    if not hasattr(task, "make_model"):
        raise ConfigError(f"{file} describes no language model (task {run['task']!r})")
    config = build(task.MODEL, run["model"], "config.model")
    loaded = load_tokenizer(tokenizer or run["data"].get("tokenizer", "bytes"))
    params = restore_params(workdir, step)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    eos_ids = () if loaded.eos_id is None else (loaded.eos_id,)
    add_bos = loaded.bos_id is not None
    return Model(config, params, loaded, eos_ids, add_bos, task.make_model(config))


def load_checkpoint(
    path: str | Path, *, tokenizer: str | None = None, dtype: str | None = None
) -> Model:
    """Loads a local Hugging Face checkpoint and its tokenizer.

    Args:
      path: folder with `config.json`, safetensors and `tokenizer.json`.
      tokenizer: None takes the folder's own.
      dtype: of parameters and computation; None takes the file's.

    Raises:
      FileNotFoundError, ImportError, ValueError, TensorMismatchError: as `load_hf` and
        `load_tokenizer`.
    """
    path = Path(path)
    config, params = load_hf(path, dtype)
    loaded = load_tokenizer(tokenizer or path)
    add_bos = getattr(loaded, "adds_bos", loaded.bos_id is not None)
    return Model(config, params, loaded, stop_tokens(path, loaded), add_bos)


def stop_tokens(path: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids that end a text: those the checkpoint declares and the tokenizer's own."""
    found = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    for name in ("generation_config.json", "config.json"):
        file = path / name
        declared = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else ()
        found.update([declared] if isinstance(declared, int) else declared or ())
    return tuple(sorted(found))


def encode_prompts(model: Model, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts as padded ids, and their lengths.

    Raises:
      ValueError: a prompt without tokens, or with more than the model has positions for.
    """
    encoded = [model.tokenizer.encode(prompt, add_bos=model.add_bos) for prompt in prompts]
    for number, ids in enumerate(encoded, 1):
        if not len(ids):
            raise ValueError(f"prompt {number} is empty and the tokenizer has no bos token")
        if model.longest is None or model.config.rope.rope_type == "dynamic":
            continue
        if len(ids) > model.longest:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens, more than the model's "
                f"max_position_embeddings={model.longest}"
            )
    return pad_prompts(encoded, pad_id=model.tokenizer.pad_id)


def stream_text(model: Model, prompt: str, settings: Settings) -> Iterator[str]:
    """Yields the continuation of one prompt piece by piece, whole characters only.

    Raises:
      ValueError: as `encode_prompts`.
    """
    decoder = StreamDecoder(model.tokenizer)
    for step in generate_stream(*_arguments(model, [prompt]), **_options(model, settings)):
        if piece := decoder.push(int(step.tokens[0])):
            yield piece
    if rest := decoder.finish():
        yield rest


def complete(model: Model, prompts: Sequence[str], settings: Settings) -> list[str]:
    """Returns the continuations of a batch of prompts.

    Raises:
      ValueError: as `encode_prompts`.
    """
    output = generate(*_arguments(model, prompts), **_options(model, settings))
    tokens, lengths = jax.device_get((output.tokens, output.lengths))
    return [
        model.tokenizer.decode(row[:length]) for row, length in zip(tokens, lengths, strict=True)
    ]


def _arguments(model: Model, prompts: Sequence[str]) -> tuple:
    return (model.params, model.config, *encode_prompts(model, prompts))


def _options(model: Model, settings: Settings) -> dict[str, Any]:
    return {
        "max_new_tokens": settings.max_new_tokens,
        "sampling": settings.sampling,
        "key": jax.random.key(settings.seed),
        "eos_ids": model.eos_ids,
        "pad_id": model.tokenizer.pad_id,
        "prefill_chunk": PREFILL_CHUNK,
        "decoder": model.module,
    }


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxeff.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", metavar="DIR", help="directory of a training run")
    source.add_argument("--hf", metavar="PATH", help="folder of a Hugging Face checkpoint")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    text.add_argument("--prompt_file", metavar="FILE", help="one prompt per line, UTF-8")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--top_k", type=int, default=0, help="0 is off (the default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="1 is off (the default)")
    parser.add_argument("--min_p", type=float, default=0.0, help="0 is off (the default)")
    parser.add_argument("--greedy", action="store_true", help="take the best token every time")
    parser.add_argument("--seed", type=int, default=0, help="of the samples; default: %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of parameters and computation (default: as stored)"
    )
    parser.add_argument(
        "--step", type=int, help="checkpoint of the run to use (default: the newest)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="SPEC",
        help="'bytes' or a tokenizer.json (default: that of the run or checkpoint)",
    )
    return parser


def read_prompts(flags: argparse.Namespace) -> list[str]:
    """Returns the prompts of the command line or of the file, blank lines left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file has no prompts.
    """
    if flags.prompt is not None:
        return flags.prompt
    file = Path(flags.prompt_file)
    if not file.is_file():
        raise FileNotFoundError(f"no prompt file at {file}")
    prompts = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompts")
    return prompts


def read_settings(flags: argparse.Namespace) -> Settings:
    """Returns the settings of the command line.

    Raises:
      ValueError: a value outside its range.
    """
    if flags.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={flags.max_new_tokens} must be at least 1")
    sampling = SamplingConfig(
        temperature=0.0 if flags.greedy else flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        min_p=flags.min_p,
    )
    return Settings(flags.max_new_tokens, sampling, flags.seed)


def run(flags: argparse.Namespace) -> None:
    """Loads the model and prints the prompts with their continuations."""
    prompts, settings = read_prompts(flags), read_settings(flags)
    common = {"tokenizer": flags.tokenizer, "dtype": flags.dtype}
    if flags.hf:
        if flags.step is not None:
            raise ValueError("--step names a checkpoint of a run: it needs --workdir")
        model = load_checkpoint(flags.hf, **common)
    else:
        model = load_run(flags.workdir, step=flags.step, **common)
    _warn_of_long_texts(model, prompts, settings)
    if len(prompts) > 1:
        for number, (prompt, text) in enumerate(
            zip(prompts, complete(model, prompts, settings), strict=True), 1
        ):
            print(f"=== {number} of {len(prompts)}\n{prompt}{text}\n")
        return
    pieces = stream_text(model, prompts[0], settings)
    first = next(pieces, "")  # mistakes in the prompt show before anything is printed
    print(prompts[0] + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _warn_of_long_texts(model: Model, prompts: Sequence[str], settings: Settings) -> None:
    longest = max(encode_prompts(model, prompts)[1]) + settings.max_new_tokens
    if model.longest is not None and longest > model.longest:
        print(
            f"note: texts of up to {longest} tokens go beyond the model's "
            f"max_position_embeddings={model.longest}",
            file=sys.stderr,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character: ?
    flags = make_parser().parse_args(arguments)
    try:
        run(flags)
    except (
        CheckpointError,
        ConfigError,
        FileNotFoundError,
        ImportError,
        TensorMismatchError,
        ValueError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    except BrokenPipeError:  # the reader of the text has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
