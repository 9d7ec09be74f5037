"""TPU kernels of the fused cells: against the definition in the interpreter, and compiled."""

import functools
import itertools

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


BATCH, STEPS, WIDTH = 8, 2048, 1024
SIZE = BATCH * STEPS * WIDTH
COMPILED = [("v5e", "newton", "bfloat16"), ("v6e", "sequential", "float32")]  # the rest is slow

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
@pytest.mark.parametrize(
    ("chip", "method", "dtype"),
    [
        pytest.param(*case, marks=() if case in COMPILED else pytest.mark.slow)
        for case in itertools.product(
            ("v5e", "v6e"), ("newton", "sequential"), ("float32", "bfloat16")
        )
    ],
)
def test_states_and_gradients_compile_for_tpu(tpu, chip, method, dtype):
    options = {"implementation": "mosaic_tpu", "method": method}
    u = jax.ShapeDtypeStruct((BATCH, STEPS, 3, WIDTH), dtype)
    a, peephole = (jax.ShapeDtypeStruct((n, WIDTH), jnp.float32) for n in (3, 2))

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


@pytest.fixture(scope="module")
def compiled(tpu):
    """Reports of a kernel alone, by cell, direction and options, on arrays as in a large model."""

    @functools.cache
    def compile_once(cell, direction, method="sequential", num_iterations=3, dtype="float32"):
        config = recurrent_tiles.Config(cell, method, "mosaic_tpu", num_iterations, 1.0, 128)
        args = [
            jax.ShapeDtypeStruct((BATCH, STEPS, 3, WIDTH), dtype),
            jax.ShapeDtypeStruct((BATCH, cell.num_weights, WIDTH), jnp.float32),
            jax.ShapeDtypeStruct((BATCH, cell.num_states, WIDTH), jnp.float32),
        ]
        if direction == "adjoint":
            states = jax.ShapeDtypeStruct((BATCH, STEPS, WIDTH), dtype)
            args += [states] * (2 * cell.num_states)
        kernel = functools.partial(getattr(recurrent_tiles_tpu, direction), config)
        return tpu(kernel, args, "v5e")

    return compile_once


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@CELLS
def test_projections_are_read_once_and_states_written_once_whatever_the_iterations(compiled, cell):
    reports = [compiled(cell, "forward", "newton", k) for k in (1, 3, 8)]
    reports += [compiled(cell, "forward"), compiled(cell, "forward", "newton", 3, "bfloat16")]
    arrays = 3 + cell.num_states
    for report in reports[:4]:
        # Of the whole program: nothing is copied, turned or padded around the kernel.
        assert report.costs.hbm_bytes == pytest.approx(4 * arrays * SIZE, rel=0.01)
        assert report.costs.hbm_bytes == reports[0].costs.hbm_bytes
        assert report.kernel(cell.name).nbytes == reports[0].kernel(cell.name).nbytes
    assert reports[4].costs.hbm_bytes == pytest.approx(2 * arrays * SIZE, rel=0.01)
    # And each window on an array moves on with the grid, so that the kernel fetches none twice.
    assert reports[0].kernel(cell.name).schedule.grid_steps == STEPS // 128 * (WIDTH // 256)


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@CELLS
def test_the_adjoint_moves_each_array_once(compiled, cell):
    report = compiled(cell, "adjoint")
    # The projections, their gradient; the states and theirs.
    nbytes = 4 * (3 + 3 + 2 * cell.num_states) * SIZE
    assert report.costs.hbm_bytes == pytest.approx(nbytes, rel=0.05)
    assert report.kernel(f"{cell.name}_adjoint").nbytes == pytest.approx(nbytes, rel=0.01)


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
def test_a_matrix_product_writes_projections_as_the_kernel_reads_them(tpu):
    batch, steps, width = 8, 512, 1024
    x = jax.ShapeDtypeStruct((batch, steps, width), jnp.bfloat16)
    b = jax.ShapeDtypeStruct((width, 3, width), jnp.bfloat16)
    a = jax.ShapeDtypeStruct((3, width), jnp.float32)

    def states(x, b, a):
        return fused_gru(jnp.einsum("bti,ivj->btvj", x, b), a)

    report = tpu(states, (x, b, a), "v5e")
    # In large arrays, x and b are read, u is written, read, and the states are written.
    size = batch * steps * width
    nbytes = 2 * (size + 3 * width**2 + 3 * size + 3 * size + size)
    assert report.costs.hbm_bytes <= 1.05 * nbytes


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@CELLS
def test_the_sequential_pass_takes_far_fewer_cycles_than_newton(compiled, cell):
    cycles = {
        method: compiled(cell, "forward", method).kernel(cell.name).schedule.cycles
        for method in ("newton", "sequential")
    }
    assert 2.5 * cycles["sequential"] < cycles["newton"] < 1.2e6
    adjoint = compiled(cell, "adjoint").kernel(f"{cell.name}_adjoint").schedule
    assert adjoint.cycles < 2.1 * cycles["sequential"]
