"""Triton kernels of the fused cells, interpreted and compiled for an absent GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from interpreted import run_in_tritons_interpreter

from pallas_kernels import fused_gru, fused_lstm

CELLS = {"fused_gru": fused_gru, "fused_lstm": fused_lstm}
BOTH = pytest.mark.parametrize("cell", list(CELLS))


@pytest.mark.optional_dependency
def test_states_and_gradients_are_those_of_the_definition_in_tritons_interpreter():
    run_in_tritons_interpreter("fused_cells_triton_interpreter.py", "states and gradients agree")


def operands(cell, shape, dtype):
    batch, steps, width = shape
    rows = [3] if cell == "fused_gru" else [3, 2]
    u = jax.ShapeDtypeStruct((batch, steps, 3, width), dtype)
    return u, *(jax.ShapeDtypeStruct((n, width), jnp.float32) for n in rows)


def kernels(cuda, cell, shape, dtype, **options):
    """What the kernels of the states and of all gradients use on an H100, by name."""
    pytest.importorskip("jax_triton")
    given = operands(cell, shape, dtype)

    def loss(*given):
        states = jax.tree.leaves(CELLS[cell](*given, **options))
        return sum((x.astype(jnp.float32) ** 2).sum() for x in states)

    report = cuda(jax.value_and_grad(loss, argnums=range(len(given))), given, "h100")
    return {kernel.resources.entry: kernel.resources for kernel in report.kernels}


@pytest.mark.cuda_compile
@BOTH
@pytest.mark.parametrize("method", ["newton", "sequential"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8, 2048, 1024), (1, 3, 5)])
def test_states_and_gradients_compile_without_spills(cuda, cell, method, dtype, shape):
    found = kernels(cuda, cell, shape, dtype, method=method, implementation="triton")
    assert set(found) == {f"{cell}_{method}", f"{cell}_adjoint"}
    most = {f"{cell}_newton": 176, f"{cell}_sequential": 72, f"{cell}_adjoint": 176}
    for name, used in found.items():
        assert used.spill_bytes == 0
        assert used.registers <= most[name]
        assert used.blocks == shape[0] * -(-shape[2] // (16 if name.endswith("newton") else 32))


@pytest.mark.cuda_compile
@BOTH
def test_the_longest_tile_compiles_without_spills(cuda, cell):
    options = {"method": "newton", "tile": 256, "implementation": "triton"}
    found = kernels(cuda, cell, (8, 2048, 1024), "float32", **options)
    assert found[f"{cell}_newton"].spill_bytes == 0


@pytest.mark.cuda_compile
@BOTH
def test_on_a_gpu_the_door_takes_the_pass_over_time_by_itself(cuda, cell):
    found = kernels(cuda, cell, (2, 9, 33), "bfloat16")
    assert set(found) == {f"{cell}_sequential", f"{cell}_adjoint"}


@pytest.mark.cuda_compile
@BOTH
@pytest.mark.parametrize("method", ["newton", "sequential"])
def test_projections_are_read_once_and_states_written_once(cuda, cell, method):
    pytest.importorskip("jax_triton")
    given = operands(cell, (8, 2048, 1024), "bfloat16")
    options = {"method": method, "num_iterations": 5, "implementation": "triton"}
    report = cuda(functools.partial(CELLS[cell], **options), given, "h100")
    states = 1 if cell == "fused_gru" else 2
    whole = (3 + states) * 8 * 2048 * 1024 * 2
    assert whole < report.costs.hbm_bytes < 1.01 * whole


@pytest.mark.slow
@pytest.mark.cuda_compile
@BOTH
def test_without_kernels_newtons_method_moves_fifty_times_the_bytes(cuda, cell):
    pytest.importorskip("jax_triton")
    given = operands(cell, (8, 2048, 1024), "bfloat16")

    def moved(implementation):
        solve = functools.partial(CELLS[cell], method="newton", implementation=implementation)
        return cuda(solve, given, "h100").costs.hbm_bytes

    assert moved("xla") > 50 * moved("triton")


@pytest.mark.cuda_compile
@BOTH
def test_a_vmapped_axis_joins_the_rows_of_the_batch(cuda, cell):
    pytest.importorskip("jax_triton")
    given = [
        jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in operands(cell, (3, 9, 33), "float32")
    ]
    report = cuda(jax.vmap(functools.partial(CELLS[cell], implementation="triton")), given, "h100")
    (kernel,) = report.kernels
    assert kernel.resources.blocks == 2 * 3 * 2


@pytest.mark.cuda_compile
@pytest.mark.parametrize("cell", ["fused_gru", pytest.param("fused_lstm", marks=pytest.mark.slow)])
def test_on_several_gpus_each_runs_the_kernels_on_its_own_rows(cuda, cell):
    pytest.importorskip("jax_triton")
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxeff.aot import target_mesh

    mesh = target_mesh("h100:4", (4,), ("data",))
    given = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for x, axes in zip(operands(cell, (8, 64, 64), "bfloat16"), (("data",), (), ()))
    ]

    def loss(*given):
        states = jax.tree.leaves(CELLS[cell](*given))
        return sum((x.astype(jnp.float32) ** 2).sum() for x in states)

    report = cuda(jax.grad(loss, argnums=range(len(given))), given, "h100:4")
    found = {kernel.resources.entry: kernel.resources.blocks for kernel in report.kernels}
    assert found == {f"{cell}_sequential": 2 * 2, f"{cell}_adjoint": 2 * 2}


@pytest.mark.cuda_compile
def test_what_the_kernels_do_not_serve_is_refused(cuda):
    pytest.importorskip("jax_triton")

    def refused(shape, message, dtype="float32", **options):
        call = functools.partial(fused_gru, implementation="triton", **options)
        with pytest.raises(NotImplementedError, match=message):
            cuda(call, operands("fused_gru", shape, dtype), "h100")

    refused((2, 50, 5), "tile=48 is not a power of two", method="newton", tile=48)
    refused((2, 600, 5), "tile=512 is above 256", method="newton", tile=512)
    refused((0, 9, 5), "is empty")


def test_a_named_kernel_needs_a_gpu():
    pytest.importorskip("jax_triton")
    with pytest.raises(NotImplementedError, match="runs on GPU"):
        fused_gru(jnp.zeros((1, 2, 3, 4)), jnp.zeros((3, 4)), implementation="triton")
