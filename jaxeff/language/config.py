"""Shape and options of one decoder, as frozen, hashable, JSON-able dataclasses.

One `DecoderConfig` describes Llama 2/3, Mistral, Qwen2/2.5, Qwen3, Mixtral and Qwen3-MoE; the
families differ in a few switches only, so no family has a class of its own.
"""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass

import jax.numpy as jnp

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
REMAT_POLICIES = ("none", "full", "dots_with_no_batch_dims", "names", "names_offload")
ATTENTION_IMPLEMENTATIONS = (None, "xla", "mosaic_tpu", "cudnn")
FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_choice(name: str, value: object, allowed: Collection) -> None:
    """Raises ValueError for a value that is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def check_at_least(name: str, value: object, least: int) -> None:
    """Raises ValueError for what is not an integer, or a smaller one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}")


def check_positive(name: str, value: object) -> None:
    """Raises ValueError for what is not a finite number above zero."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value!r} must be a positive finite number")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and its long-context variants.

    Attributes:
      rope_type: "default", "linear" (positions divided by `factor`), "dynamic" (NTK base that
        grows with the length), "llama3", "yarn" (arXiv 2309.00071) or "longrope"
        (arXiv 2402.13753).
      theta: the base of the geometric progression of frequencies.
      factor: the context extension, used as given even where the lengths below suggest another.
      original_max_position_embeddings: context length of pre-training (llama3, yarn, longrope;
        for yarn `max_position_embeddings` when absent).
      max_position_embeddings: context length of the model (dynamic, yarn, longrope);
        `DecoderConfig` fills it in.
      low_freq_factor, high_freq_factor: band limits of llama3.
      beta_fast, beta_slow: rotations that bound the ramp of yarn.
      attention_factor: multiplies cos and sin (yarn, longrope); None takes the paper's formula.
      short_factor, long_factor: head_dim / 2 divisors each (longrope).
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self):
        check_choice("rope.rope_type", self.rope_type, ROPE_TYPES)
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            check_positive(f"rope.{name}", getattr(self, name))
        for name in ("original_max_position_embeddings", "max_position_embeddings"):
            if getattr(self, name) is not None:
                check_at_least(f"rope.{name}", getattr(self, name), 1)
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rope_type == "llama3":
            self._check_llama3()
        if self.rope_type == "longrope" and not (self.short_factor and self.long_factor):
            raise ValueError("rope.rope_type='longrope' needs rope.short_factor and long_factor")

    def _check_llama3(self):
        if self.original_max_position_embeddings is None:
            raise ValueError("rope.rope_type='llama3' needs rope.original_max_position_embeddings")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope.high_freq_factor={self.high_freq_factor} must exceed "
                f"rope.low_freq_factor={self.low_freq_factor}"
            )


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the MLP (Mixtral, arXiv 2401.04088; Qwen3-MoE).

    Attributes:
      num_experts: experts in each MoE layer.
      num_experts_per_token: experts that each token is sent to.
      intermediate_size: width of an expert; None takes the decoder's `intermediate_size`.
      norm_topk_prob: renormalise the chosen probabilities to sum 1 (Mixtral: always).
      decoder_sparse_step: layer l is MoE only if (l + 1) is a multiple of this.
      mlp_only_layers: layers that keep a dense MLP of the decoder's `intermediate_size`.
      router_aux_loss_coef: weight of the load-balancing loss in `moe.router_loss`.
      router_z_loss_coef: weight of mean(logsumexp(router logits)^2) in `moe.router_loss`.
    """

    num_experts: int
    num_experts_per_token: int = 2
    intermediate_size: int | None = None
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))
        check_at_least("moe.num_experts", self.num_experts, 1)
        check_at_least("moe.num_experts_per_token", self.num_experts_per_token, 1)
        check_at_least("moe.decoder_sparse_step", self.decoder_sparse_step, 1)
        if self.intermediate_size is not None:
            check_at_least("moe.intermediate_size", self.intermediate_size, 1)
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"moe.num_experts_per_token={self.num_experts_per_token} exceeds "
                f"moe.num_experts={self.num_experts}"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder-only language model.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads: sizes.
      head_dim: None takes hidden_size / num_heads; given, it wins.
      rms_norm_eps: epsilon of every RMS norm.
      rope: rotary embedding.
      tie_embeddings: the head is the transposed embedding.
      attention_bias: biases on q, k, v and o.
      qkv_bias: biases on q, k, v only.
      mlp_bias: biases on gate, up and down.
      qk_norm: RMS norm over head_dim on queries and keys, before RoPE.
      moe: experts in place of the MLP.
      sliding_window: a query sees the last `sliding_window` positions, itself included.
      max_position_embeddings: nominal context length (RoPE variants use it; no hard limit).
      initializer_range: standard deviation of all matrices at initialisation.
      scale_residual_init: divide that of the residual outputs (o, down) by sqrt(2 num_layers).
      dtype, param_dtype: of the computation and of the stored parameters.
      scan_layers: stack homogeneous layers and scan over them.
      remat: "none", "full", "dots_with_no_batch_dims", "names" (keep the named activations) or
        "names_offload" (keep them in host memory).
      attention_implementation: see `jaxeff.language.attention`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    moe: MoEConfig | None = None
    sliding_window: int | None = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    scale_residual_init: bool = False
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        self._settle_types()
        self._check_sizes()
        check_choice("remat", self.remat, REMAT_POLICIES)
        check_choice("dtype", self.dtype, FLOAT_DTYPES)
        check_choice("param_dtype", self.param_dtype, FLOAT_DTYPES)
        check_choice(
            "attention_implementation", self.attention_implementation, ATTENTION_IMPLEMENTATIONS
        )
        self._check_rope()

    def _settle_types(self):
        """Accept nested dictionaries and dtype objects; keep what is hashable and JSON-able."""
        if isinstance(self.rope, dict):
            object.__setattr__(self, "rope", RopeConfig(**self.rope))
        if isinstance(self.moe, dict):
            object.__setattr__(self, "moe", MoEConfig(**self.moe))
        for name in ("dtype", "param_dtype"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, jnp.dtype(value).name)
        needs_length = self.rope.rope_type in ("dynamic", "yarn", "longrope")
        if needs_length and self.rope.max_position_embeddings is None:
            rope = dataclasses.replace(
                self.rope, max_position_embeddings=self.max_position_embeddings
            )
            object.__setattr__(self, "rope", rope)

    def _check_sizes(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "max_position_embeddings",
        ):
            check_at_least(name, getattr(self, name), 1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads} "
                "when head_dim is not given"
            )
        if self.head_dim is not None:
            check_at_least("head_dim", self.head_dim, 2)
        if self.resolved_head_dim % 2:
            raise ValueError(f"head_dim={self.resolved_head_dim} must be even: RoPE rotates pairs")
        if self.sliding_window is not None:
            check_at_least("sliding_window", self.sliding_window, 1)
        check_positive("rms_norm_eps", self.rms_norm_eps)
        check_positive("initializer_range", self.initializer_range)
        for layer in self.moe.mlp_only_layers if self.moe else ():
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"moe.mlp_only_layers holds {layer}, outside 0..{self.num_layers - 1}"
                )

    def _check_rope(self):
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope, name)
            if factors and len(factors) != self.resolved_head_dim // 2:
                raise ValueError(
                    f"rope.{name} has {len(factors)} entries, "
                    f"expected head_dim / 2 = {self.resolved_head_dim // 2}"
                )

    @property
    def resolved_head_dim(self) -> int:
        """Width of one head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose MLP is a mixture of experts."""
        if self.moe is None:
            return ()
        return tuple(
            layer
            for layer in range(self.num_layers)
            if layer not in self.moe.mlp_only_layers
            and (layer + 1) % self.moe.decoder_sparse_step == 0
        )

    @property
    def homogeneous(self) -> bool:
        """Whether all layers have the same parameters (and so can be stacked)."""
        return len(self.moe_layers) in (0, self.num_layers)

    @property
    def scanned(self) -> bool:
        """Whether the layers' parameters are stacked under `layers`."""
        return self.scan_layers and self.homogeneous
