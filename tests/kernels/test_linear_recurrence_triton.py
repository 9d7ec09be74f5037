"""The Triton kernels of linear recurrences, interpreted and compiled for an absent GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from interpreted import run_in_tritons_interpreter

from pallas_kernels.linear_recurrence import linear_recurrence


@pytest.mark.cuda_compile
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("blocks", [None, 2, 3])
@pytest.mark.parametrize("batch, steps, channels", [(8, 2048, 1024), (1, 3, 5)])
def test_states_and_gradients_compile_without_spills(cuda, dtype, blocks, batch, steps, channels):
    pytest.importorskip("jax_triton")
    inner = () if blocks is None else (blocks,)
    a = jax.ShapeDtypeStruct((batch, steps, *inner * 2, channels), dtype)
    b = jax.ShapeDtypeStruct((batch, steps, *inner, channels), dtype)
    solve = functools.partial(linear_recurrence, implementation="triton")
    report = cuda(lambda a, b, g: jax.vjp(solve, a, b)[1](g), (a, b, b), "h100")
    assert len(report.kernels) == 2
    for kernel in report.kernels:
        assert kernel.resources.spill_bytes == 0
        assert kernel.resources.blocks == batch * -(-channels // 32)


@pytest.mark.cuda_compile
def test_what_the_kernels_do_not_serve_is_refused(cuda):
    pytest.importorskip("jax_triton")
    spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    solve = functools.partial(linear_recurrence, implementation="triton")
    with pytest.raises(NotImplementedError, match="4 x 4 blocks, more than 3"):
        cuda(solve, (spec((1, 8, 4, 4, 8)), spec((1, 8, 4, 8))), "h100")


@pytest.mark.optional_dependency
def test_states_are_those_of_the_loop_in_tritons_interpreter():
    run_in_tritons_interpreter("linear_recurrence_triton_interpreter.py", "states agree")
