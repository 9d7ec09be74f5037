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


SHORT = [(9, 3, 128), (2, 2, 256)]
CASES = [
    ("newton", 2, 1, 130),
    ("newton", 2, 33, 130),  # two tiles of 16 and a step
    ("newton", 9, 3, 128),
    ("sequential", 2, 2, 256),
    ("sequential", 2, 129, 130),
]


@pytest.mark.parametrize(
    ("cell", "method", "batch", "steps", "width"),
    # The interpreter takes long to compile the LSTM's kernels: one small case of each, the rest
    # with the long tests.
    [(GRU, *case) for case in CASES]
    + [
        pytest.param(LSTM, *case, marks=[] if case[1:] in SHORT else pytest.mark.slow)
        for case in CASES
    ],
)
def test_states_and_gradients_are_those_of_the_definition(cell, method, batch, steps, width):
    config = recurrent_tiles.Config(cell, method, "mosaic_tpu", 3, 0.9, 16)
    u, weights, first = operands(cell, batch, steps, width)
    expected = getattr(recurrent_tiles, method)(config, u, weights, first)
    found = recurrent_tiles_tpu.forward(config, u, weights, first, interpret=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    grad = jnp.asarray(np.random.default_rng(0).normal(size=expected.shape), jnp.float32)
    saved = u, weights, first, expected, grad
    exact = recurrent_tiles.adjoint(config, *saved)
    by_kernel = recurrent_tiles_tpu.adjoint(config, *saved, interpret=True)
    for x, y in zip(by_kernel, exact, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * max(1, float(jnp.abs(y).max())))


@CELLS
def test_bf16_projections_give_bf16_states(cell):
    config = recurrent_tiles.Config(cell, "newton", "mosaic_tpu", 3, 1.0, 16)
    u, weights, first = operands(cell, 2, 17, 128, jnp.bfloat16)
    found = recurrent_tiles_tpu.forward(config, u, weights, first, interpret=True)
    exact = recurrent_tiles.sequential(config, u.astype(jnp.float32), weights, first)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=1e-2)


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
    u = jax.ShapeDtypeStruct((8, 2048, 3 * 1024), jnp.float32)
    weights = jax.ShapeDtypeStruct((cell.num_weights, 1024), jnp.float32)
    first = jax.ShapeDtypeStruct((cell.num_states, 8, 1024), jnp.float32)

    def states(u, weights, first, config):
        u = u.reshape(8, 2048, 3, 1024)
        return recurrent_tiles_tpu.forward(config, u, weights, first)

    cycles = {}
    for method in ("newton", "sequential"):
        config = recurrent_tiles.Config(cell, method, "mosaic_tpu", 3, 1.0, 128)
        report = tpu(functools.partial(states, config=config), (u, weights, first), "v5e")
        cycles[method] = report.kernel(cell.name).schedule.cycles
    assert 3 * cycles["sequential"] < cycles["newton"] < 1.5e6
