"""Named decoder shapes: the published models, and tiny ones of every family for tests.

Sizes are those of the `config.json` that each model was published with. `dtype` and `param_dtype`
keep the defaults of `DecoderConfig` (bfloat16 computation on float32 parameters), except for the
tiny shapes, which compute in float32.
"""

import difflib

from jaxeff.language.config import DecoderConfig, MoEConfig, RopeConfig


def preset(name: str, **overrides) -> DecoderConfig:
    """Returns the configuration called `name`.

    Args:
      name: one of `list_presets()`.
      **overrides: fields of `DecoderConfig` to set instead, such as `scan_layers=False`.

    Raises:
      ValueError: an unknown name; the message suggests the nearest one.
      TypeError: an override that is not a field.
    """
    if name not in _PRESETS:
        nearest = difflib.get_close_matches(name.lower(), _PRESETS, n=1, cutoff=0.3)
        hint = f": did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(f"no preset {name!r}{hint} There are {', '.join(_PRESETS)}")
    return DecoderConfig(**_PRESETS[name] | overrides)


def list_presets() -> tuple[str, ...]:
    """Returns the names of all presets."""
    return tuple(_PRESETS)


def _shape(hidden, intermediate, layers, heads, kv_heads, **others):
    """The arguments of a `DecoderConfig`."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        **others,
    }


_LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope": RopeConfig(theta=500000.0),
}


def _llama3_long(factor):
    rope = RopeConfig(
        rope_type="llama3",
        theta=500000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    return _LLAMA3 | {"max_position_embeddings": 131072, "rope": rope}


_MISTRAL = {"rms_norm_eps": 1e-5, "rope": RopeConfig(theta=1e6)}
_QWEN2 = {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope": RopeConfig(theta=1e6),
    "qkv_bias": True,
}
_QWEN3 = {
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope": RopeConfig(theta=1e6),
    "head_dim": 128,
    "qk_norm": True,
}
_TINY = {
    "vocab_size": 259,
    "max_position_embeddings": 256,
    "dtype": "float32",
    "param_dtype": "float32",
}
_TIED = {"tie_embeddings": True}

_PRESETS = {
    "llama2-7b": _shape(4096, 11008, 32, 32, 32, **_LLAMA2),
    "llama2-13b": _shape(5120, 13824, 40, 40, 40, **_LLAMA2),
    "llama3-8b": _shape(4096, 14336, 32, 32, 8, **_LLAMA3),
    "llama3.1-8b": _shape(4096, 14336, 32, 32, 8, **_llama3_long(8.0)),
    "llama3.2-1b": _shape(2048, 8192, 16, 32, 8, head_dim=64, **_llama3_long(32.0), **_TIED),
    "llama3.2-3b": _shape(3072, 8192, 28, 24, 8, head_dim=128, **_llama3_long(32.0), **_TIED),
    # Version 0.3, the one with full attention.
    "mistral-7b": _shape(
        4096, 14336, 32, 32, 8, vocab_size=32768, max_position_embeddings=32768, **_MISTRAL
    ),
    "qwen2.5-0.5b": _shape(896, 4864, 24, 14, 2, **_QWEN2, **_TIED),
    "qwen2.5-1.5b": _shape(1536, 8960, 28, 12, 2, **_QWEN2, **_TIED),
    "qwen2.5-3b": _shape(2048, 11008, 36, 16, 2, **_QWEN2, **_TIED),
    "qwen2.5-7b": _shape(3584, 18944, 28, 28, 4, **_QWEN2 | {"vocab_size": 152064}),
    "qwen3-0.6b": _shape(1024, 3072, 28, 16, 8, **_QWEN3, **_TIED),
    "qwen3-1.7b": _shape(2048, 6144, 28, 16, 8, **_QWEN3, **_TIED),
    "qwen3-4b": _shape(2560, 9728, 36, 32, 8, **_QWEN3, **_TIED),
    "qwen3-8b": _shape(4096, 12288, 36, 32, 8, **_QWEN3),
    "mixtral-8x7b": _shape(
        4096,
        14336,
        32,
        32,
        8,
        vocab_size=32000,
        max_position_embeddings=32768,
        moe=MoEConfig(num_experts=8, num_experts_per_token=2, router_aux_loss_coef=0.02),
        **_MISTRAL,
    ),
    "qwen3-30b-a3b": _shape(
        2048,
        6144,
        48,
        32,
        4,
        moe=MoEConfig(num_experts=128, num_experts_per_token=8, intermediate_size=768),
        **_QWEN3,
    ),
    "tiny": _shape(64, 176, 2, 4, 2, **_TINY),
    "tiny-qwen2": _shape(64, 176, 2, 4, 2, qkv_bias=True, **_TINY, **_TIED),
    "tiny-qwen3": _shape(64, 176, 2, 4, 2, head_dim=24, qk_norm=True, **_TINY),
    "tiny-mixtral": _shape(64, 96, 2, 4, 2, moe=MoEConfig(num_experts=4), **_TINY),
    "tiny-qwen3-moe": _shape(
        64,
        176,
        3,
        4,
        2,
        qk_norm=True,
        moe=MoEConfig(num_experts=4, intermediate_size=48, mlp_only_layers=(1,)),
        **_TINY,
    ),
}
