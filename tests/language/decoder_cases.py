"""Tiny decoders, meshes and rules shared by the tests of this folder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh

from jaxeff.language import Decoder, DecoderConfig, MoEConfig

AXES = ("data", "fsdp", "expert", "context", "tensor")
RULES = (
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("expert", "expert"),
    ("act_batch", ("data", "fsdp", "expert")),
    ("act_seq", "context"),
    ("act_heads", "tensor"),
    ("act_kv_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
)


def make_mesh(devices=None, **sizes) -> Mesh:
    """A mesh with all five axes over the first devices; axes not named have size 1."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = jax.devices() if devices is None else devices
    devices = np.asarray(devices[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def tiny(**changes) -> DecoderConfig:
    """Three layers, grouped queries, float32."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "dtype": "float32",
        "initializer_range": 0.3,  # large enough that every term of the model shows
    }
    return DecoderConfig(**(sizes | changes))


FAMILIES = {
    "llama": {},
    "qwen3": {"qk_norm": True, "head_dim": 12, "tie_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4},
    "mixtral": {"moe": MoEConfig(4)},
    "qwen3_moe": {
        "moe": MoEConfig(5, intermediate_size=24, norm_topk_prob=False, mlp_only_layers=(1,))
    },
}


@functools.cache
def params_of(config: DecoderConfig, seed: int = 0):
    """Plain parameters, the same for both layouts of the layers."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return nn.meta.unbox(Decoder(config).init(jax.random.key(seed), tokens))["params"]


def tokens_of(batch: int, length: int, vocab_size: int = 61, seed: int = 0) -> jax.Array:
    """Random ids (batch, length)."""
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, vocab_size)


def relative_error(found, expected) -> float:
    """|found - expected| / |expected| over all leaves of two pytrees."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    error = sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)
    return (error / sum(float(jnp.sum(b**2)) for _, b in pairs)) ** 0.5
