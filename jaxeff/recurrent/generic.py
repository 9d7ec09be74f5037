"""A cell of one's own as a linen module, run over all steps at once."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeff.recurrent import time_axis
from jaxeff.recurrent.newton import NewtonConfig, System, parallel_rnn


class ParallelRNN(nn.Module):
    """h_t = cell_fn(params, x_t, h_{t-1}); see `parallel_rnn` for the cell's conditions.

    Its only parameter is the tree `cell`. Whether `structure` is right, `check_structure` tells.

    Attributes:
      cell_fn: (params, x_t (B, D), state) -> state; a state is (B, H), or (B, m, H) for "block".
      param_init: (key, D) -> params.
      state_shape: (H,), or (m, H).
      structure: of its Jacobian: "diagonal", "block" or "dense".
      newton: how the states are solved for.
      method: "newton" or "sequential".
      jacobian_fn: as for `parallel_rnn`; None takes forward derivatives of `cell_fn`.
      axis_name: mesh axis over which T is split, for calls inside a `shard_map`.
    """

    cell_fn: Callable
    param_init: Callable
    state_shape: tuple[int, ...]
    structure: str = "diagonal"
    newton: NewtonConfig = NewtonConfig()
    method: str = "newton"
    jacobian_fn: Callable | None = None
    axis_name: str | None = None

    def initial_state(self, batch: int) -> jax.Array:
        """Zeros (batch, *state_shape) float32."""
        return jnp.zeros((batch, *self.state_shape), jnp.float32)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        h0: jax.Array | None = None,
        *,
        reset: jax.Array | None = None,
        return_carry: bool = False,
        lengths: jax.Array | None = None,
    ) -> Any:
        """The states (B, T, *state_shape) for `x` (B, T, D), and with `return_carry` the last one.

        Arguments as for `ParaGRU`; sows `solve_info` into "intermediates".
        """
        if x.ndim != 3:
            raise ValueError(f"x has shape {x.shape}, expected (B, T, D)")
        time_axis.check_lengths(lengths, x.shape[0], return_carry)
        system = self._system(x, h0)
        options = {"newton": self.newton, "method": self.method, "axis_name": self.axis_name}
        states, info = parallel_rnn(**system._asdict(), **options, reset=reset)
        self.sow("intermediates", "solve_info", info)
        if not return_carry:
            return states
        return states, time_axis.after(states, system.h0, lengths, self.axis_name)

    @nn.compact
    def system(self, x: jax.Array, h0: jax.Array | None = None) -> System:
        """What the layer solves for `x` (B, T, D): arguments of `parallel_rnn`."""
        return self._system(x, h0)

    @nn.compact
    def step(self, state: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The next state, twice, from the state and `x_t` (B, D)."""
        params = self.param("cell", self.param_init, x_t.shape[-1])
        state = self.cell_fn(params, x_t, state)
        return state, state

    def _system(self, x, h0):
        params = self.param("cell", self.param_init, x.shape[-1])
        h0 = self.initial_state(x.shape[0]) if h0 is None else h0
        return System(self.cell_fn, params, x, h0, self.structure, self.jacobian_fn)
