"""Hugging Face `config.json` and `DecoderConfig`: one table of families, both directions.

Both layouts of the RoPE settings are read: `rope_parameters` (transformers 5) and `rope_theta` with
`rope_scaling` (transformers 4, the kind under `rope_type` or, older, `type`). What the decoder does
not implement is refused by name, never ignored.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxeff.language.config import ROPE_TYPES, DecoderConfig, MoEConfig, RopeConfig


@dataclass(frozen=True)
class Family:
    """One `model_type`: what sets it apart and what its config class assumes of absent keys.

    `requires` and `allows` name the switches of `DecoderConfig` that must and may be on.
    """

    architecture: str
    requires: frozenset[str]
    allows: frozenset[str]
    defaults: Mapping[str, Any]


def _family(architecture: str, requires: str, allows: str, **defaults: Any) -> Family:
    common = {
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": None,
        "num_key_value_heads": None,
        "router_aux_loss_coef": 0.001,
    }
    required = frozenset(requires.split())
    return Family(architecture, required, required | set(allows.split()), common | defaults)


_QWEN = {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096}

FAMILIES = {
    "llama": _family(
        "LlamaForCausalLM", "", "attention_bias mlp_bias", max_position_embeddings=2048
    ),
    "mistral": _family(
        "MistralForCausalLM",
        "",
        "sliding_window",
        num_key_value_heads=8,
        sliding_window=4096,
        max_position_embeddings=131072,
    ),
    "qwen2": _family(
        "Qwen2ForCausalLM",
        "qkv_bias",
        "sliding_window",
        num_key_value_heads=32,
        max_window_layers=28,
        **_QWEN,
    ),
    "qwen3": _family(
        "Qwen3ForCausalLM",
        "qk_norm",
        "attention_bias sliding_window",
        num_key_value_heads=32,
        head_dim=128,
        max_window_layers=28,
        **_QWEN,
    ),
    "mixtral": _family(
        "MixtralForCausalLM",
        "moe",
        "sliding_window",
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=131072,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "qwen3_moe": _family(
        "Qwen3MoeForCausalLM",
        "moe qk_norm",
        "attention_bias sliding_window",
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=None,
        **_QWEN,
    ),
}
_SWITCHES = ("attention_bias", "qkv_bias", "mlp_bias", "qk_norm", "sliding_window", "moe")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Keys of a RoPE dictionary that each kind reads, by Hugging Face name; ours are the same.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
    ),
    "longrope": (
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
        "factor",
        "attention_factor",
    ),
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face `config.json` describes.

    Keys that are absent take the defaults of the family's config class. `dtype` and `param_dtype`
    follow the stated `dtype` (or `torch_dtype`) where there is one.

    Args:
      hf: the parsed `config.json`.

    Raises:
      ValueError: an unknown `model_type` or RoPE type, a missing size, or a setting that the
        decoder does not implement (another activation, windows on some layers only, ...).
    """
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r} is not one of {', '.join(sorted(FAMILIES))}")
    missing = [name for name in _SIZES if hf.get(name) is None]
    if missing:
        raise ValueError(f"the {model_type} config lacks {', '.join(missing)}")
    family = FAMILIES[model_type]
    get = {**family.defaults, **hf}.get
    if get("hidden_act") != "silu":
        raise ValueError(f"hidden_act={get('hidden_act')!r} is not supported, only 'silu'")
    dtype = hf.get("dtype") or hf.get("torch_dtype")
    biased = "attention_bias" in family.allows and bool(get("attention_bias"))
    return DecoderConfig(
        vocab_size=get("vocab_size"),
        hidden_size=get("hidden_size"),
        intermediate_size=get("intermediate_size"),
        num_layers=get("num_hidden_layers"),
        num_heads=get("num_attention_heads"),
        num_kv_heads=get("num_key_value_heads") or get("num_attention_heads"),
        head_dim=get("head_dim"),
        rms_norm_eps=get("rms_norm_eps"),
        rope=_rope_from_hf(hf, get("rope_theta"), get("max_position_embeddings")),
        tie_embeddings=bool(get("tie_word_embeddings")),
        attention_bias=biased,
        qkv_bias="qkv_bias" in family.requires,
        mlp_bias="mlp_bias" in family.allows and bool(get("mlp_bias")),
        qk_norm="qk_norm" in family.requires,
        moe=_moe_from_hf(model_type, get),
        sliding_window=_sliding_window(get),
        max_position_embeddings=get("max_position_embeddings"),
        initializer_range=get("initializer_range"),
        **({"dtype": dtype, "param_dtype": dtype} if dtype else {}),
    )


def _rope_from_hf(hf: Mapping[str, Any], theta: float, max_positions: int) -> RopeConfig:
    settings = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    legacy_type = settings.pop("type", "default")
    rope_type = settings.pop("rope_type", legacy_type)
    theta = settings.pop("rope_theta", theta)
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type!r} is not one of {', '.join(ROPE_TYPES)}")
    partial = settings.pop("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor={partial} is not supported, only 1.0")
    if settings.pop("truncate", True) is not True:
        raise ValueError("truncate=false in the yarn settings is not supported")
    unknown = sorted(set(settings) - set(_ROPE_KEYS[rope_type]))
    if unknown:
        raise ValueError(
            f"rope_type={rope_type!r} does not take {', '.join(unknown)}; "
            f"it takes {', '.join(_ROPE_KEYS[rope_type]) or 'nothing but rope_theta'}"
        )
    settings = {name: value for name, value in settings.items() if value is not None}
    if hf.get("original_max_position_embeddings") and rope_type in ("llama3", "yarn", "longrope"):
        settings["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    if rope_type in ("llama3", "longrope"):
        settings.setdefault("original_max_position_embeddings", max_positions)
    if rope_type == "longrope":
        settings = _settle_longrope(settings)
    return RopeConfig(rope_type=rope_type, theta=float(theta), **settings)


def _settle_longrope(settings: dict[str, Any]) -> dict[str, Any]:
    """Replaces `factor`, which serves longrope only in the formula of its attention factor."""
    factor = settings.pop("factor", None)
    if factor is not None and "attention_factor" not in settings:
        original = settings["original_max_position_embeddings"]
        growth = math.log(factor) / math.log(original) if factor > 1 else 0.0
        settings["attention_factor"] = math.sqrt(1 + growth)
    return settings


def _moe_from_hf(model_type: str, get: Any) -> MoEConfig | None:
    if model_type == "mixtral":
        return MoEConfig(
            num_experts=get("num_local_experts"),
            num_experts_per_token=get("num_experts_per_tok"),
            norm_topk_prob=True,
            router_aux_loss_coef=get("router_aux_loss_coef"),
        )
    if model_type == "qwen3_moe":
        return MoEConfig(
            num_experts=get("num_local_experts") or get("num_experts"),
            num_experts_per_token=get("num_experts_per_tok"),
            intermediate_size=get("moe_intermediate_size"),
            norm_topk_prob=bool(get("norm_topk_prob")),
            decoder_sparse_step=get("decoder_sparse_step"),
            mlp_only_layers=tuple(get("mlp_only_layers") or ()),
            router_aux_loss_coef=get("router_aux_loss_coef"),
        )
    return None


def _sliding_window(get: Any) -> int | None:
    """Returns the window of all layers, or None; the Qwen families may give one to some only."""
    window = get("sliding_window")
    if get("use_sliding_window") is False or window is None:
        return None
    num_layers = get("num_hidden_layers")
    windowed = [True] * num_layers
    if get("max_window_layers") is not None:
        windowed = [layer >= get("max_window_layers") for layer in range(num_layers)]
        if get("layer_types"):
            windowed = [kind == "sliding_attention" for kind in get("layer_types")]
    if any(windowed) and not all(windowed):
        raise ValueError(
            f"sliding_window={window} on {sum(windowed)} of {num_layers} layers is not supported, "
            "only on all layers or none"
        )
    return window if all(windowed) else None


def hf_model_type(config: DecoderConfig) -> str:
    """Returns the `model_type` that can express `config`.

    Raises:
      ValueError: no family has this combination of switches; the message names them.
    """
    switched_on = {name for name in _SWITCHES if getattr(config, name)}
    if "attention_bias" in switched_on:
        switched_on.discard("qkv_bias")  # attention_bias already says it
    for model_type, family in FAMILIES.items():
        if not family.requires <= switched_on <= family.allows:
            continue
        if model_type == "mixtral" and not _is_plain_mixture(config):
            continue
        return model_type
    raise ValueError(
        f"no Hugging Face family combines {', '.join(sorted(switched_on))}"
        + (f" with {config.moe}" if config.moe else "")
    )


def _is_plain_mixture(config: DecoderConfig) -> bool:
    moe = config.moe
    return (
        moe.norm_topk_prob
        and moe.decoder_sparse_step == 1
        and not moe.mlp_only_layers
        and moe.intermediate_size in (None, config.intermediate_size)
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the `config.json` of `config`, readable by transformers 4 and 5.

    Raises:
      ValueError: no family of Hugging Face can express the configuration.
    """
    model_type = hf_model_type(config)
    family = FAMILIES[model_type]
    rope = _rope_to_hf(config)
    hf = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": rope if config.rope.rope_type != "default" else None,
        "rope_parameters": {**rope, "rope_theta": config.rope.theta},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": config.param_dtype,
        "torch_dtype": config.param_dtype,
    }
    if config.head_dim is not None or family.defaults["head_dim"] is not None:
        hf["head_dim"] = config.resolved_head_dim
    for bias in ("attention_bias", "mlp_bias"):
        if bias in family.allows:
            hf[bias] = getattr(config, bias)
    if "sliding_window" in family.allows:
        hf["sliding_window"] = config.sliding_window
    if "use_sliding_window" in family.defaults:
        hf["use_sliding_window"] = config.sliding_window is not None
        hf["max_window_layers"] = config.num_layers if config.sliding_window is None else 0
    return hf | _moe_to_hf(model_type, config)


def _rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    rope = config.rope
    if rope.max_position_embeddings not in (None, config.max_position_embeddings):
        raise ValueError(
            f"rope.max_position_embeddings={rope.max_position_embeddings} differs from "
            f"max_position_embeddings={config.max_position_embeddings}: config.json holds only one"
        )
    values = dataclasses.asdict(rope)
    settings = {"rope_type": rope.rope_type}
    for name in _ROPE_KEYS[rope.rope_type]:
        value = values[name]
        if value is None or (rope.rope_type, name) == ("longrope", "factor"):
            continue
        settings[name] = list(value) if isinstance(value, tuple) else value
    return settings


def _moe_to_hf(model_type: str, config: DecoderConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    shared = {
        "num_experts_per_tok": moe.num_experts_per_token,
        "router_aux_loss_coef": moe.router_aux_loss_coef,
        "output_router_logits": False,
    }
    if model_type == "mixtral":
        return {**shared, "num_local_experts": moe.num_experts}
    return {
        **shared,
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.intermediate_size or config.intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": moe.decoder_sparse_step,
        "mlp_only_layers": list(moe.mlp_only_layers),
    }
