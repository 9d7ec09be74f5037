"""What nonlinear recurrences are measured against, with the call of `ParaGRU`.

A selective diagonal linear recurrence, as in Mamba (arXiv 2312.00752), in the form of Griffin's
RG-LRU (arXiv 2402.19427, section 2.4), and one layer of causal attention.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeff.language.attention import attention
from jaxeff.language.config import RopeConfig
from jaxeff.language.rope import apply_rope, rope_frequencies
from jaxeff.recurrent.layers import input_init, input_shape, project
from pallas_kernels import linear_recurrence

_SHARPNESS = 8.0  # c of RG-LRU: how far the gate moves the decay


def _check(x: jax.Array) -> None:
    if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype} {x.shape}, expected a floating (B, T, D)")


def _slow_decays(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Logits of decays uniform between 0.9 and 0.999."""
    decay = jax.random.uniform(key, shape, dtype, 0.9, 0.999)
    return jnp.log(decay) - jnp.log1p(-decay)


class DiagonalRecurrence(nn.Module):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t v_t, every channel for itself.

    The decay a_t = sigmoid(decay)^(8 r_t), in (0, 1), and the input gate i_t depend on x_t and not
    on the state: r_t and i_t are sigmoids, v_t is linear in x_t. No such channel can change sign
    for ever, as parity asks for (arXiv 2411.12537). The parameters, float32: those of `ParaGRU` but
    its recurrent weights, `b` (heads, D / heads, 3, H / heads), rows r, i, v, and `bias` (3, H);
    and `decay` (H,).

    Attributes:
      features: H.
      num_heads: blocks of the input projection; divides D and H.
      dtype: of the input projection and the output; the recurrence is float32 whatever it is.
      implementation: of the linear recurrence: None | "xla" | "mosaic_tpu" | "triton".
    """

    features: int
    num_heads: int = 1
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, H) in `dtype` from `x` (B, T, D), floating.

        Raises:
          ValueError: for another rank or dtype, or widths that the heads do not divide.
        """
        _check(x)
        b = self.param("b", input_init, input_shape(x.shape[-1], self.features, self.num_heads))
        bias = self.param("bias", nn.initializers.zeros, (3, self.features))
        slowest = jax.nn.log_sigmoid(self.param("decay", _slow_decays, (self.features,)))
        u = project(x.astype(self.dtype), b.astype(self.dtype), bias)
        log_a = _SHARPNESS * jax.nn.sigmoid(u[:, :, 0]) * slowest
        # 1 - a^2 without cancellation, and above 0, where the root has no slope.
        scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), 1e-12))
        value = scale * jax.nn.sigmoid(u[:, :, 1]) * u[:, :, 2]
        h = linear_recurrence(jnp.exp(log_a), value, implementation=self.implementation)
        return h.astype(self.dtype)


class CausalAttention(nn.Module):
    """Multi-head causal attention with rotary positions (arXiv 2104.09864).

    The parameters, float32: `qkv` (D, 3, heads, H / heads) and `out` (H, H), as for `features`
    equal to the width of a Transformer.

    Attributes:
      features: H.
      num_heads: divides H into heads of even width.
      dtype: of the projections and the output.
      implementation: of the attention: None | "xla" | "mosaic_tpu" | "cudnn".
    """

    features: int
    num_heads: int = 1
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, H) in `dtype` from `x` (B, T, D), floating.

        Raises:
          ValueError: for another rank or dtype, or heads that do not divide H into even widths.
        """
        _check(x)
        if self.num_heads < 1 or self.features % self.num_heads:
            raise ValueError(
                f"features, {self.features}, is not divisible by num_heads={self.num_heads}"
            )
        width = self.features // self.num_heads
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", 0, (1, 2, 3))
        qkv = self.param("qkv", init, (x.shape[-1], 3, self.num_heads, width))
        out = self.param("out", nn.initializers.lecun_normal(), (self.features, self.features))
        q, k, v = jnp.einsum("btd,dvkh->vbtkh", x.astype(self.dtype), qkv.astype(self.dtype))
        positions = jnp.arange(x.shape[1])[None]
        frequencies, _ = rope_frequencies(RopeConfig(), width)
        q, k = (apply_rope(a, positions, frequencies) for a in (q, k))
        y = attention(q, k, v, implementation=self.implementation)
        return y.reshape(*x.shape[:2], self.features) @ out.astype(self.dtype)
