"""Decoding against the rate at which memory can be read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.bench.measure import Case, Figure, Round, Variant
from jaxeff.language import Decoder, DecoderConfig, SamplingConfig, generate, preset
from jaxeff.training.config import build, override, to_dict


@dataclasses.dataclass(frozen=True)
class DecoderDecode:
    """Tokens per second of cached greedy decoding with random parameters.

    Attributes:
      preset: of ``jaxeff.language``.
      model: fields of its ``DecoderConfig`` to set instead.
      batch_sizes: sequences decoded together; one case each.
      prompt_length: tokens of each prompt.
      new_tokens: tokens to generate.
      read_bytes: size of the array that is read to measure the memory's bandwidth.
    """

    preset: str = "tiny"
    model: dict = dataclasses.field(
        # 100 MB of float32 parameters: more than a cache holds.
        default_factory=lambda: {
            "hidden_size": "512",
            "intermediate_size": "1408",
            "num_layers": "8",
            "num_heads": "8",
            "num_kv_heads": "4",
        }
    )
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    prompt_length: int = 16
    new_tokens: int = 32
    read_bytes: int = 2**28

    ON_ACCELERATOR: ClassVar[dict] = {
        "preset": "llama3.2-1b",
        "model": {"param_dtype": "bfloat16"},
        "prompt_length": 32,
        "new_tokens": 256,
        "read_bytes": 2**31,
    }

    def cases(self, device: jax.Device) -> Iterator[Case]:
        """Yields one case for each batch size."""
        values = override(to_dict(preset(self.preset)), self.model)
        config = build(DecoderConfig, values, f"{self.preset} model")
        with jax.default_device(device):
            tokens = jnp.zeros((1, 1), jnp.int32)
            init = jax.jit(lambda key: nn.meta.unbox(Decoder(config).init(key, tokens)["params"]))
            params = init(jax.random.key(0))
            for batch_size in self.batch_sizes:
                yield self._case(config, params, batch_size)

    def _case(self, config: DecoderConfig, params: Any, batch_size: int) -> Case:
        needed = self.new_tokens * self.bytes_per_step(config, params, batch_size)
        tokens = batch_size * self.new_tokens

        def bandwidth(r: Round) -> float:
            return max(self.read_bytes / r.seconds["sum"], 2 * self.read_bytes / r.seconds["copy"])

        return Case(
            name=f"batch {batch_size}",
            technique=Variant("decoding", lambda: self._decode(config, params, batch_size)),
            baselines=(
                Variant("sum", lambda: _sum(self.read_bytes)),
                Variant("copy", lambda: _copy(self.read_bytes)),
            ),
            ratio=lambda r: needed / bandwidth(r) / r.seconds["decoding"],
            ratio_name="time to read parameters and cache / decoding",
            limit=1.0,
            limit_note=(
                "every step must read all parameters (of the embedding only a row for each "
                "sequence, unless it is the head too) and the keys and values in use, at the "
                "bandwidth of a large sum or copy on this device, whichever is higher. Large "
                "batches may be bound by arithmetic before that."
            ),
            figures=(
                Figure("tokens per second", "tokens/s", lambda r: tokens / r.seconds["decoding"]),
                Figure(
                    "time per step", "ms", lambda r: 1e3 * r.seconds["decoding"] / self.new_tokens
                ),
                Figure("memory bandwidth", "GB/s", lambda r: bandwidth(r) / 1e9),
                Figure("bytes to read per step", "MB", lambda r: needed / self.new_tokens / 1e6),
            ),
        )

    def bytes_per_step(self, config: DecoderConfig, params: Any, batch_size: int) -> float:
        """Returns the bytes that an average step cannot do without.

        The prefill counts as the step that gives the first token: it reads the parameters once.
        """
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        if not config.tie_embeddings:
            weights -= params["embed"]["embedding"].nbytes
        cached = self.prompt_length + (self.new_tokens - 1) / 2
        width = config.num_layers * config.num_kv_heads * config.resolved_head_dim
        return weights + batch_size * cached * 2 * width * jnp.dtype(config.dtype).itemsize

    def _decode(self, config: DecoderConfig, params: Any, batch_size: int) -> Callable[[], Any]:
        shape = (batch_size, self.prompt_length)
        prompts = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
        lengths = np.full(batch_size, self.prompt_length, np.int32)
        return lambda: generate(
            params,
            config,
            prompts,
            lengths,
            max_new_tokens=self.new_tokens,
            sampling=SamplingConfig(temperature=0.0),
        )


def _sum(num_bytes: int) -> Callable[[], Any]:
    return functools.partial(jax.jit(jnp.sum), _floats(num_bytes))


def _copy(num_bytes: int) -> Callable[[], Any]:
    """Reads and writes an array in place: a fresh one each time would measure page faults."""
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)
    arrays = [_floats(num_bytes)]

    def run():
        arrays[0] = increment(arrays[0])
        return arrays[0]

    return run


def _floats(num_bytes: int) -> jax.Array:
    return jnp.zeros(num_bytes // 4, jnp.float32)
