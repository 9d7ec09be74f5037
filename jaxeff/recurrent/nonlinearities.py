"""The elementwise functions that a cell's gates can be made of (arXiv 2510.21450, appendix)."""

import functools

import jax
import jax.numpy as jnp

NONLINEARITIES = {
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "leaky_relu": functools.partial(jax.nn.leaky_relu, negative_slope=0.01),
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "selu": jax.nn.selu,
    "half_sigmoid": lambda x: 0.5 * jax.nn.sigmoid(x),
    "exp": jnp.exp,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
}
