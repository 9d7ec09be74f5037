"""The matrix products of a decoder's training step, alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.bench.measure import BenchError
from jaxeff.language import DecoderConfig


@dataclasses.dataclass(frozen=True)
class MatmulChain:
    """Forward and both backward products of every linear map of a step, each fed by one before it.

    There is nothing between the products but the sums that join branches. Experts count as one
    linear map of the joint width that a token passes through, as if all loads were equal.

    Attributes:
      model: the decoder; its layers must be alike.
      batch_size, seq_len: of the step.
      attention: also the two products of attention, over the whole square of positions.
    """

    model: DecoderConfig
    batch_size: int
    seq_len: int
    attention: bool

    def __post_init__(self):
        if not self.model.homogeneous:
            raise BenchError("the matrix products are measured for models whose layers are alike")

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns (in, out) of every linear map of one layer."""
        model = self.model
        d, head_dim = model.hidden_size, model.resolved_head_dim
        width = model.intermediate_size
        if model.moe:
            width = (model.moe.intermediate_size or width) * model.moe.num_experts_per_token
        return {
            "q": (d, model.num_heads * head_dim),
            "k": (d, model.num_kv_heads * head_dim),
            "v": (d, model.num_kv_heads * head_dim),
            "o": (model.num_heads * head_dim, d),
            "gate": (d, width),
            "up": (d, width),
            "down": (width, d),
        }

    def flops(self) -> float:
        """Returns the flops of one run, a multiply-add counted as two."""
        model, tokens = self.model, self.batch_size * self.seq_len
        layer = sum(rows * columns for rows, columns in self.linear_shapes().values())
        if self.attention:
            layer += 2 * model.num_heads * model.resolved_head_dim * self.seq_len
        weights = model.num_layers * layer + model.hidden_size * model.vocab_size
        return 3.0 * 2 * tokens * weights

    def prepare(self, device: jax.Device) -> Callable[[], Any]:
        """Returns a function that runs all products."""
        with jax.default_device(device):
            weights, tokens = jax.jit(self._create)(jax.random.key(0))
            run = jax.jit(self._run)
            jax.block_until_ready(run(weights, tokens))
        return functools.partial(run, weights, tokens)

    def _create(self, key: jax.Array) -> tuple[Any, jax.Array]:
        model, dtype = self.model, self.model.dtype

        def weight(index, shape):
            scale = shape[-2] ** -0.5
            return scale * jax.random.normal(jax.random.fold_in(key, index), shape, dtype)

        layers = {
            name: weight(i, (model.num_layers, *shape))
            for i, (name, shape) in enumerate(self.linear_shapes().items())
        }
        # So that the products of attention, which has no softmax here, neither grow nor vanish.
        layers["k"] *= jnp.asarray(model.resolved_head_dim**-0.5, dtype)
        layers["v"] *= jnp.asarray(self.seq_len**-0.5, dtype)
        head = weight(100, (model.hidden_size, model.vocab_size))
        shape = (self.batch_size * self.seq_len, model.hidden_size)
        tokens = jax.random.normal(jax.random.fold_in(key, 101), shape, dtype)
        return {"layers": layers, "head": head}, tokens

    def _run(self, weights: Any, x: jax.Array) -> Any:
        """Returns logits, both ends of the chain and all weights' products: nothing is left out."""
        logits = x @ weights["head"]
        dy, head = logits @ weights["head"].T, x.T @ logits
        layer = functools.partial(self._layer, x)
        (y, dx), layers = jax.lax.scan(layer, (x, dy), weights["layers"])
        return logits, y, dx, head, layers

    def _layer(self, x, carry, w):
        # Forward and backward of one layer together. Each product takes operands of the shapes that
        # the step's product has, but whichever are at hand. Every layer starts from the same x:
        # attention without softmax is cubic, and would grow without bounds from layer to layer.
        _, dy = carry
        q, k, v = x @ w["q"], x @ w["k"], x @ w["v"]
        if self.attention:
            heads = self._heads(q), self._heads(k), self._heads(v)
            scores = jnp.einsum("bkqd,bksd->bkqs", heads[0], heads[1])
            out = jnp.einsum("bkqs,bksd->bkqd", scores, heads[2]).reshape(q.shape)
        else:
            out = q
        a = out @ w["o"]
        gate, up = a @ w["gate"], a @ w["up"]
        y = gate @ w["down"]

        dgate = dy @ w["down"].T
        da, da_up = dgate @ w["gate"].T, up @ w["up"].T
        dout = da @ w["o"].T
        if self.attention:
            dout_heads = self._heads(dout)
            dscores = jnp.einsum("bkqd,bksd->bkqs", dout_heads, heads[2])
            dv = jnp.einsum("bkqs,bkqd->bksd", scores, dout_heads).reshape(v.shape)
            dq = jnp.einsum("bkqs,bksd->bkqd", dscores, heads[1]).reshape(q.shape)
            dk = jnp.einsum("bkqs,bkqd->bksd", dscores, heads[0]).reshape(k.shape)
        else:
            dq, dk, dv = dout, k, v
        dx = dq @ w["q"].T + dk @ w["k"].T + dv @ w["v"].T
        grads = {
            "down": gate.T @ dy,
            "gate": a.T @ dgate,
            "up": a.T @ up,
            "o": out.T @ da_up,
            "q": x.T @ dq,
            "k": x.T @ dk,
            "v": x.T @ dv,
        }
        return (y, dx), grads

    def _heads(self, x: jax.Array) -> jax.Array:
        """Returns x as (B, K, queries or keys, D): a reshape, since only the shape matters."""
        model = self.model
        return x.reshape(self.batch_size, model.num_kv_heads, -1, model.resolved_head_dim)
