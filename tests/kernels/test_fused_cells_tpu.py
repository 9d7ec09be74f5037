"""TPU kernels of the fused cells: against the definition in the interpreter, and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fused_gru, fused_lstm, recurrent_tiles, recurrent_tiles_tpu
from pallas_kernels.fused_gru.reference import CELL as GRU
from pallas_kernels.fused_lstm.reference import CELL as LSTM

CELLS = pytest.mark.parametrize("cell", [GRU, LSTM], ids=["gru", "lstm"])


def operands(cell, batch, steps, width, dtype=jnp.float32):
    rng = np.random.default_rng(steps)
    u = jnp.asarray(rng.normal(size=(batch, steps, 3, width)), dtype)
    weights = jnp.asarray(rng.uniform(-0.5, 0.5, (cell.num_weights, width)), jnp.float32)
    first = jnp.asarray(rng.uniform(-0.9, 0.9, (cell.num_states, batch, width)), jnp.float32)
    return u, weights, first


# Of a program that runs once, the compiler's optimisations cost more than they save.
QUICKLY = {"xla_backend_optimization_level": 0}


def interpreted(direction, config):
    kernel = getattr(recurrent_tiles_tpu, direction)
    run = functools.partial(kernel, config, interpret=True)
    return jax.jit(run, compiler_options=QUICKLY)


def defined(method, config):
    run = functools.partial(getattr(recurrent_tiles, method), config)
    return jax.jit(run, compiler_options=QUICKLY)


@pytest.mark.parametrize(
    ("cell", "method", "batch", "steps", "width"),
    [
        # Two blocks of rows, five tiles and a step (the adjoint: one and a step), three of lanes.
        (GRU, "newton", 9, 65, 300),
        (GRU, "sequential", 2, 1, 5),
        (LSTM, "newton", 2, 17, 128),
        pytest.param(GRU, "newton", 2, 1, 130, marks=pytest.mark.slow),
        pytest.param(GRU, "sequential", 2, 129, 130, marks=pytest.mark.slow),
        pytest.param(LSTM, "newton", 9, 65, 300, marks=pytest.mark.slow),
        pytest.param(LSTM, "sequential", 9, 3, 128, marks=pytest.mark.slow),
        pytest.param(LSTM, "sequential", 2, 129, 130, marks=pytest.mark.slow),
    ],
)
def test_states_and_gradients_are_those_of_the_definition(cell, method, batch, steps, width):
    config = recurrent_tiles.Config(cell, method, "mosaic_tpu", 3, 0.9, 16)
    u, weights, first = operands(cell, batch, steps, width)
    by_row = jnp.broadcast_to(weights, (batch, *weights.shape)), jnp.moveaxis(first, 0, 1)
    expected = defined(method, config)(u, weights, first)
    found = interpreted("forward", config)(u, *by_row)
    np.testing.assert_allclose(jnp.stack(found), expected, atol=2e-6)
    grad = jnp.asarray(np.random.default_rng(0).normal(size=expected.shape), jnp.float32)
    exact = defined("adjoint", config)(u, weights, first, expected, grad)
    of_u, of_weights, of_first = interpreted("adjoint", config)(u, *by_row, *expected, *grad)
    by_kernel = of_u, of_weights.sum(0), jnp.moveaxis(of_first, 1, 0)
    for x, y in zip(by_kernel, exact, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * max(1, float(jnp.abs(y).max())))


@pytest.mark.parametrize(
    "cell", [GRU, pytest.param(LSTM, marks=pytest.mark.slow)], ids=["gru", "lstm"]
)
def test_bf16_projections_give_bf16_states(cell):
    config = recurrent_tiles.Config(cell, "newton", "mosaic_tpu", 3, 1.0, 16)
    u, weights, first = operands(cell, 2, 17, 128, jnp.bfloat16)
    by_row = jnp.broadcast_to(weights, (2, *weights.shape)), jnp.moveaxis(first, 0, 1)
    found = interpreted("forward", config)(u, *by_row)
    exact = defined("sequential", config)(u.astype(jnp.float32), weights, first)
    for states, expected in zip(found, exact, strict=True):
        assert states.dtype == jnp.bfloat16
        np.testing.assert_allclose(states.astype(jnp.float32), expected, atol=1e-2)


def test_a_named_kernel_that_cannot_serve_says_why():
    u, a, _ = operands(GRU, 2, 9, 5)
    with pytest.raises(NotImplementedError, match="tile=12 is not a multiple of 8"):
        fused_gru(u, a, method="newton", tile=12, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="runs on TPU"):
        fused_gru(u, a, implementation="mosaic_tpu")


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("method", ["newton", "sequential"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_and_gradients_compile_for_tpu(tpu, chip, method, dtype):
    options = {"implementation": "mosaic_tpu", "method": method}
    u = jax.ShapeDtypeStruct((8, 2048, 3, 1024), dtype)
    a, peephole = (jax.ShapeDtypeStruct((n, 1024), jnp.float32) for n in (3, 2))

    def gru(u, a):
        return fused_gru(u, a, **options).astype(jnp.float32).sum()

    def lstm(u, a, peephole):
        return fused_lstm(u, a, peephole, **options)[1].astype(jnp.float32).sum()

    for name, loss, args in (("gru", gru, (u, a)), ("lstm", lstm, (u, a, peephole))):
        report = tpu(jax.value_and_grad(loss, argnums=range(len(args))), args, chip)
        assert report.memory.fits
        names = sorted(kernel.name for kernel in report.kernels)  # with jvp around them
        assert len(names) == 2 and all(f"fused_{name}" in kernel for kernel in names)
        assert sum("adjoint" in kernel for kernel in names) == 1


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@CELLS
def test_the_sequential_pass_takes_a_third_of_the_cycles_of_newton(tpu, cell):
    u = jax.ShapeDtypeStruct((8, 2048, 3, 1024), jnp.float32)
    weights = jax.ShapeDtypeStruct((8, cell.num_weights, 1024), jnp.float32)
    first = jax.ShapeDtypeStruct((8, cell.num_states, 1024), jnp.float32)

    cycles = {}
    for method in ("newton", "sequential"):
        config = recurrent_tiles.Config(cell, method, "mosaic_tpu", 3, 1.0, 128)
        report = tpu(
            functools.partial(recurrent_tiles_tpu.forward, config), (u, weights, first), "v5e"
        )
        cycles[method] = report.kernel(cell.name).schedule.cycles
    assert 3 * cycles["sequential"] < cycles["newton"] < 1.5e6
