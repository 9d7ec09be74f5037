"""ParaGRU and ParaLSTM as linen modules (arXiv 2510.21450, section 3 and appendix)."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeff.language.sharding import mesh_axes
from jaxeff.recurrent import cells, time_axis
from jaxeff.recurrent.newton import NewtonConfig, System, parallel_rnn, solved
from jaxeff.recurrent.nonlinearities import NONLINEARITIES
from pallas_kernels import fused_gru, fused_lstm

METHODS = ("newton", "sequential", "fused")
MOST_SEPARATE_HEADS = 8
STANDARD = {("gate", "sigmoid"), ("candidate", "tanh"), ("squash", "tanh")}


def small_normal(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Truncated normal of standard deviation 1 / sqrt(H), clipped to [-0.5, 0.5]."""
    init = nn.initializers.truncated_normal(shape[-1] ** -0.5)
    return jnp.clip(init(key, shape, dtype), -0.5, 0.5)


def input_shape(width: int, features: int, num_heads: int) -> tuple[int, int, int, int]:
    """Shape (heads, D / heads, 3, H / heads) of an input projection.

    Raises:
      ValueError: for widths that the heads do not divide.
    """
    for name, size in (("features", features), ("the width of x", width)):
        if num_heads < 1 or size % num_heads:
            raise ValueError(f"{name}, {size}, is not divisible by num_heads={num_heads}")
    return num_heads, width // num_heads, 3, features // num_heads


def input_init(key, shape, dtype=jnp.float32):
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
      method: "newton"; "sequential", a loop over time; or "fused": the kernels `fused_gru` and
        `fused_lstm`, which choose between the two and keep the states in `dtype`. They have no
        resets, tolerance or fallback, and to ask for one is an error.
      recurrent_init: initialiser of `a` (and `peephole`).
      dtype: of the input projection and the outputs; the solver is float32 whatever it is.
      implementation: of the kernels: None | "xla" | "mosaic_tpu" | "triton".
      axis_name: mesh axis over which T is split, for calls inside a `shard_map`; not with "fused".
      partitioned: the parameters carry logical axes: "heads" is H, and the heads of `b`, whose
        second axis is "embed".
      gate_activation, candidate_activation: names in `NONLINEARITIES`. With others than these the
        Jacobian is automatic, and there are no fused kernels.
    """

    features: int
    num_heads: int = 1
    newton: NewtonConfig = NewtonConfig()
    method: str = "newton"
    recurrent_init: Callable = small_normal
    dtype: jnp.dtype = jnp.float32
    implementation: str | None = None
    axis_name: str | None = None
    partitioned: bool = False
    gate_activation: str = "sigmoid"
    candidate_activation: str = "tanh"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        h0: Any = None,
        *,
        reset: jax.Array | None = None,
        return_carry: bool = False,
        lengths: jax.Array | None = None,
        return_info: bool = False,
    ) -> Any:
        """Runs the cell over a whole sequence; sows `solve_info` into "intermediates".

        Args:
          x: (B, T, D), floating.
          h0: the state before the first step, like `initial_state`; None is that.
          reset: bool (B, T): where it is true the state before that step is zero, as where a packed
            document begins.
          return_carry: also return the state after the last step.
          lengths: int (B,): the steps each row really has, padding behind them; the state returned
            is the one after those, `h0` where there is none. Only with `return_carry`. With
            `axis_name` they count the steps of all devices, and all get the state.
          return_info: also return the SolveInfo. That of "fused" has the residual of the states
            returned, which are rounded to `dtype`, and the iterations asked for.

        Returns:
          the outputs (B, T, H) in `dtype`, or a tuple of them, the state (float32) and the
          SolveInfo, as far as asked for.

        Raises:
          ValueError: for shapes, dtypes or arguments that do not fit one another, by name.
        """
        self._check(x, reset, lengths, return_carry)
        system = self._system(x, h0)
        if self.method == "fused":
            states, info = self._run_fused(system)
        else:
            options = {"newton": self.newton, "method": self.method, "axis_name": self.axis_name}
            states, info = parallel_rnn(**system._asdict(), **options, reset=reset)
        self.sow("intermediates", "solve_info", info)
        results = [self._output(states)]
        if return_carry:
            results.append(
                self._unstacked(time_axis.after(states, system.h0, lengths, self.axis_name))
            )
        if return_info:
            results.append(info)
        return results[0] if len(results) == 1 else tuple(results)

    @nn.compact
    def system(self, x: jax.Array, h0: Any = None) -> System:
        """What the layer solves for `x` (B, T, D): arguments of `parallel_rnn`."""
        self._check(x, None, None, False)
        return self._system(x, h0)

    @nn.compact
    def step(self, state: Any, x_t: jax.Array) -> tuple[Any, jax.Array]:
        """The next state and its output (B, H), from the state and `x_t` (B, D)."""
        step, _ = self._functions()
        stacked = step(self._recurrent(), self._project(x_t), self._stacked(state))
        return self._unstacked(stacked), self._output(stacked)

    def _system(self, x, h0):
        step, jacobian = self._functions()
        first = self._stacked(self.initial_state(x.shape[0]) if h0 is None else h0)
        u = self._project(x)
        return System(step, self._recurrent(), u, first, self._structure, jacobian)

    def _activations(self):
        return {"gate": self.gate_activation, "candidate": self.candidate_activation}

    def _functions(self):
        """The step and its Jacobian, None where that is to be automatic."""
        given = self._activations()
        for name in given.values():
            if name not in NONLINEARITIES:
                raise ValueError(f"activation {name!r} is not one of {', '.join(NONLINEARITIES)}")
        if set(given.items()) <= STANDARD:
            return self._step, self._jacobian
        if self.method == "fused":
            raise ValueError(f"method='fused' has no kernel for the activations {given}")
        return _with_activations(self._step, **given), None

    def _check(self, x, reset, lengths, return_carry):
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not one of {METHODS}")
        if x.ndim != 3:
            raise ValueError(f"x has shape {x.shape}, expected (B, T, D)")
        time_axis.check_lengths(lengths, x.shape[0], return_carry)
        if self.method != "fused":
            return
        if reset is not None:
            raise ValueError("method='fused' has no reset inside a row; it needs reset=None")
        if self.axis_name is not None:
            raise ValueError(f"method='fused' cannot split time over axis_name={self.axis_name!r}")
        if self.newton.tolerance > 0 or self.newton.fallback != "none":
            raise ValueError(
                f"method='fused' runs a fixed number of iterations, without tolerance="
                f"{self.newton.tolerance} or fallback={self.newton.fallback!r}"
            )

    def _parameter(self, name, init, shape, axes):
        if self.partitioned:
            init = nn.with_logical_partitioning(init, axes)
        return self.param(name, init, shape)

    def _weights(self, name, rows):
        return self._parameter(name, self.recurrent_init, (rows, self.features), (None, "heads"))

    def _project(self, x):
        """The inputs of the gates, (..., 3, H) float32, from `x` (..., D)."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x has dtype {x.dtype}, expected a floating one")
        shape = input_shape(x.shape[-1], self.features, self.num_heads)
        b = self._parameter("b", input_init, shape, ("heads", "embed", None, None))
        bias = self._parameter("bias", nn.initializers.zeros, (3, self.features), (None, "heads"))
        return project(x.astype(self.dtype), b.astype(self.dtype), bias)

    def _run_fused(self, system):
        options = {
            "num_iterations": self.newton.num_iterations,
            "damping": self.newton.damping,
            "implementation": self.implementation,
        }
        rounded = system.inputs.astype(self.dtype)
        states = self._fused(rounded, system.params, system.h0, options).astype(jnp.float32)
        system = system._replace(inputs=rounded.astype(jnp.float32))
        return states, solved(system, states, self.newton)


@functools.lru_cache
def _with_activations(step, **names):
    """Made once for each choice, so that it is traced once."""
    return functools.partial(step, **{part: NONLINEARITIES[name] for part, name in names.items()})


def project(x: jax.Array, b: jax.Array, bias: jax.Array) -> jax.Array:
    """x b + bias, (..., 3, H) float32, from `x` (..., D), `b` of `input_shape`, `bias` (3, H).

    XLA puts the heads of a batched product outermost, and copies it into place; the products of
    few heads by themselves are written side by side, in two thirds less traffic on TPU.
    """
    heads = b.shape[0]
    x = x.reshape(*x.shape[:-1], *b.shape[:2])
    if heads > MOST_SEPARATE_HEADS or mesh_axes("heads", heads):
        u = jnp.einsum("...ki,kivj->...vkj", x, b)
        u = u.reshape(*u.shape[:-2], -1)
    else:
        products = [jnp.einsum("...i,ivj->...vj", x[..., k, :], b[k]) for k in range(heads)]
        u = jnp.concatenate(products, axis=-1)
    return u.astype(jnp.float32) + bias


class ParaGRU(_ParaCell):
    """GRU with a diagonal recurrence; its state is (B, H) float32. See `_ParaCell`."""

    _step, _jacobian = staticmethod(cells.gru_step), staticmethod(cells.gru_jacobian)
    _structure = "diagonal"

    def initial_state(self, batch: int) -> jax.Array:
        """Zeros (batch, H)."""
        return jnp.zeros((batch, self.features), jnp.float32)

    def _recurrent(self):
        return {"a": self._weights("a", 3)}

    def _stacked(self, state):
        return state

    def _unstacked(self, states):
        return states

    def _output(self, states):
        return states.astype(self.dtype)

    def _fused(self, u, weights, first, options):
        return fused_gru(u, weights["a"], h0=first, **options)


class ParaLSTM(_ParaCell):
    """LSTM with coupled gates and peepholes, `peephole` (2, H) in addition; its state is (c, h),
    two arrays (B, H) float32. See `_ParaCell`.

    Attributes:
      state_activation: what c passes before the output gate, a name in `NONLINEARITIES`.
    """

    state_activation: str = "tanh"

    _step, _jacobian = staticmethod(cells.lstm_step), staticmethod(cells.lstm_jacobian)
    _structure = "block"

    def _activations(self):
        return super()._activations() | {"squash": self.state_activation}

    def initial_state(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """Zeros, (batch, H) twice."""
        zeros = jnp.zeros((batch, self.features), jnp.float32)
        return zeros, zeros

    def _recurrent(self):
        return {"a": self._weights("a", 3), "peephole": self._weights("peephole", 2)}

    def _stacked(self, state):
        return jnp.stack(state, axis=-2)

    def _unstacked(self, states):
        return states[..., 0, :], states[..., 1, :]

    def _output(self, states):
        return states[..., 1, :].astype(self.dtype)

    def _fused(self, u, weights, first, options):
        state0 = self._unstacked(first)
        c, h = fused_lstm(u, weights["a"], weights["peephole"], state0=state0, **options)
        return jnp.stack([c, h], axis=2)
