"""ParaGRU and ParaLSTM as linen modules (arXiv 2510.21450, section 3 and appendix)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeff.recurrent import cells
from jaxeff.recurrent.newton import METHODS, NewtonConfig, parallel_rnn


def small_normal(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Truncated normal of standard deviation 1 / sqrt(H), clipped to [-0.5, 0.5]."""
    init = nn.initializers.truncated_normal(shape[-1] ** -0.5)
    return jnp.clip(init(key, shape, dtype), -0.5, 0.5)


def _input_init(key, shape, dtype=jnp.float32):
    """Kaiming uniform with the D / heads inputs of a head as fan-in."""
    bound = (3 / shape[1]) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class _ParaCell(nn.Module):
    """What the two cells share. The parameters, float32: `a` (3, H), `b` (heads, D / heads, 3,
    H / heads), `bias` (3, H).

    Attributes:
      features: H.
      num_heads: blocks of the input projection; divides D and H.
      newton: how the states are solved for.
      method: "newton", or "sequential" for a loop over time.
      recurrent_init: initialiser of `a` (and `peephole`).
      dtype: of the input projection and the outputs; the solver is float32 whatever it is.
    """

    features: int
    num_heads: int = 1
    newton: NewtonConfig = NewtonConfig()
    method: str = "newton"
    recurrent_init: Callable = small_normal
    dtype: jnp.dtype = jnp.float32

    def _project(self, x):
        """The inputs of the gates, (..., 3, H) float32, from `x` (..., D)."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x has dtype {x.dtype}, expected a floating one")
        heads, width = self.num_heads, x.shape[-1]
        for name, size in (("features", self.features), ("the width of x", width)):
            if heads < 1 or size % heads:
                raise ValueError(f"{name}, {size}, is not divisible by num_heads={heads}")
        shape = (heads, width // heads, 3, self.features // heads)
        b = self.param("b", _input_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (3, self.features))
        x = x.astype(self.dtype).reshape(*x.shape[:-1], *shape[:2])
        u = jnp.einsum("...ki,kivj->...vkj", x, b.astype(self.dtype))
        return u.reshape(*u.shape[:-2], self.features).astype(jnp.float32) + bias

    def _run(self, x, h0, step, jacobian, structure):
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not one of {METHODS}")
        if x.ndim != 3:
            raise ValueError(f"x has shape {x.shape}, expected (B, T, D)")
        u = self._project(x)
        states, info = parallel_rnn(
            step,
            self._recurrent(),
            u,
            h0,
            structure=structure,
            newton=self.newton,
            method=self.method,
            jacobian_fn=jacobian,
        )
        self.sow("intermediates", "solve_info", info)
        return states


class ParaGRU(_ParaCell):
    """GRU with a diagonal recurrence; its state is (B, H) float32. See `_ParaCell`."""

    def _recurrent(self):
        return {"a": self.param("a", self.recurrent_init, (3, self.features))}

    def initial_state(self, batch: int) -> jax.Array:
        """Zeros (batch, H)."""
        return jnp.zeros((batch, self.features), jnp.float32)

    @nn.compact
    def __call__(self, x: jax.Array, h0: jax.Array | None = None) -> jax.Array:
        """Outputs (B, T, H) for `x` (B, T, D); sows `solve_info` into "intermediates"."""
        h0 = self.initial_state(x.shape[0]) if h0 is None else h0
        states = self._run(x, h0, cells.gru_step, cells.gru_jacobian, "diagonal")
        return states.astype(self.dtype)

    @nn.compact
    def step(self, state: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The next state and its output (B, H), from the state and `x_t` (B, D)."""
        state = cells.gru_step(self._recurrent(), self._project(x_t), state)
        return state, state.astype(self.dtype)


class ParaLSTM(_ParaCell):
    """LSTM with coupled gates and peepholes, `peephole` (2, H) in addition; its state is (c, h),
    two arrays (B, H) float32. See `_ParaCell`."""

    def _recurrent(self):
        return {
            "a": self.param("a", self.recurrent_init, (3, self.features)),
            "peephole": self.param("peephole", self.recurrent_init, (2, self.features)),
        }

    def initial_state(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """Zeros, (batch, H) twice."""
        zeros = jnp.zeros((batch, self.features), jnp.float32)
        return zeros, zeros

    @nn.compact
    def __call__(self, x: jax.Array, h0: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """Outputs (B, T, H) for `x` (B, T, D); sows `solve_info` into "intermediates"."""
        h0 = jnp.stack(self.initial_state(x.shape[0]) if h0 is None else h0, axis=1)
        states = self._run(x, h0, cells.lstm_step, cells.lstm_jacobian, "block")
        return states[:, :, 1].astype(self.dtype)

    @nn.compact
    def step(self, state: tuple[jax.Array, jax.Array], x_t: jax.Array):
        """The next state and its output (B, H), from the state and `x_t` (B, D)."""
        stacked = jnp.stack(state, axis=1)
        stacked = cells.lstm_step(self._recurrent(), self._project(x_t), stacked)
        return (stacked[:, 0], stacked[:, 1]), stacked[:, 1].astype(self.dtype)
