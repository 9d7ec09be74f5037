"""The small pieces of the decoder: linear map, RMS norm, embedding, gated MLP.

Any object with the fields and the call of `Linear` can take its place in a decoder
(`Decoder(config, linear_cls=...)`): quantised, low-rank adapted, sparse.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jaxeff.language.config import DecoderConfig
from jaxeff.language.sharding import constrain, target_platform


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMS norm over the last axis (arXiv 1910.07467).

    Mean and reciprocal root are float32; the result is cast to x's dtype before the gain is
    multiplied, which is what the published bfloat16 checkpoints were trained with.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def matmul(x: jax.Array, kernel: jax.Array, output_dtype: str | None = None) -> jax.Array:
    """x (..., in) @ kernel (in, out) in `output_dtype` (None: x's).

    On CPU the gradient is written by hand: left to itself XLA transposes the wider operand of the
    kernel's gradient, and that product is two to four times slower.
    """
    output_dtype = output_dtype or x.dtype.name
    # Under shard_map the hand-written gradient would have to know which axes x differs along.
    if target_platform() == "cpu" and not jax.sharding.get_abstract_mesh().manual_axes:
        return _cpu_matmul(x, kernel, output_dtype)
    return jnp.matmul(x, kernel, preferred_element_type=output_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cpu_matmul(x, kernel, output_dtype):
    return jnp.matmul(x, kernel, preferred_element_type=output_dtype)


def _cpu_matmul_fwd(x, kernel, output_dtype):
    return _cpu_matmul(x, kernel, output_dtype), (x, kernel)


def _cpu_matmul_bwd(output_dtype, residuals, g):
    del output_dtype
    x, kernel = residuals
    d_x = jnp.einsum("...f,df->...d", g, kernel)
    rows = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return d_x.astype(x.dtype), jnp.einsum("nd,nf->df", *rows).astype(kernel.dtype)


_cpu_matmul.defvjp(_cpu_matmul_fwd, _cpu_matmul_bwd)


class Linear(nn.Module):
    """y = x @ kernel + bias, kernel (in, features) with logical axes `kernel_axes`.

    Parameters are kept in `param_dtype` and cast to `dtype` for the product, which is returned in
    `output_dtype` (default: dtype).
    """

    features: int
    kernel_axes: tuple[str, str]
    use_bias: bool = False
    init_std: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    output_dtype: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(nn.initializers.normal(self.init_std), self.kernel_axes),
            (x.shape[-1], self.features),
            self.param_dtype,
        )
        y = matmul(x.astype(self.dtype), kernel.astype(self.dtype), self.output_dtype)
        if not self.use_bias:
            return y
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(nn.initializers.zeros, self.kernel_axes[1:]),
            (self.features,),
            self.param_dtype,
        )
        return y + bias.astype(y.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned gain `scale`."""

    eps: float
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
            (x.shape[-1],),
            self.param_dtype,
        )
        return rms_norm(x, scale, self.eps)


class Embedding(nn.Module):
    """Token embedding (vocab_size, hidden_size); `attend` is the tied head."""

    config: DecoderConfig

    def setup(self):
        config = self.config
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(
                nn.initializers.normal(config.initializer_range), ("vocab", "embed")
            ),
            (config.vocab_size, config.hidden_size),
            config.param_dtype,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.embedding.astype(self.config.dtype), tokens, axis=0, mode="clip")

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits (..., vocab_size), float32."""
        return matmul(x, self.embedding.astype(self.config.dtype).T, "float32")


@jax.checkpoint  # to compute it again is cheaper, on every platform, than to keep its parts
def gated_silu(gate: jax.Array, value: jax.Array) -> jax.Array:
    """silu(gate) * value, keeping only its operands for the backward pass."""
    return nn.silu(gate) * value


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    config: DecoderConfig
    linear_cls: Callable[..., nn.Module] = Linear

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        up = {"features": config.intermediate_size, "kernel_axes": ("embed", "mlp")}
        gate = self.linear(name="gate_proj", **up)(x)
        gate = checkpoint_name(constrain(gate, "act_batch", "act_seq", "act_mlp"), "mlp_gate")
        value = self.linear(name="up_proj", **up)(x)
        value = checkpoint_name(constrain(value, "act_batch", "act_seq", "act_mlp"), "mlp_up")
        return self.linear(
            name="down_proj",
            features=config.hidden_size,
            kernel_axes=("mlp", "embed"),
            init_std=residual_std(config),
        )(gated_silu(gate, value))

    def linear(self, **fields) -> nn.Module:
        return make_linear(self.linear_cls, self.config, use_bias=self.config.mlp_bias, **fields)


def make_linear(linear_cls: Callable[..., nn.Module], config: DecoderConfig, **fields) -> nn.Module:
    """One linear piece with the decoder's dtypes and initial standard deviation."""
    fields.setdefault("init_std", config.initializer_range)
    return linear_cls(dtype=config.dtype, param_dtype=config.param_dtype, **fields)


def residual_std(config: DecoderConfig) -> float:
    """Initial standard deviation of the matrices that write into the residual stream."""
    if not config.scale_residual_init:
        return config.initializer_range
    return config.initializer_range / (2 * config.num_layers) ** 0.5
