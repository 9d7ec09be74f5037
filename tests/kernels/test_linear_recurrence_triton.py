"""The Triton kernels of linear recurrences, interpreted and compiled for an absent GPU."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.linear_recurrence import linear_recurrence

ROOT = Path(__file__).parents[2]


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
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    script = Path(__file__).with_name("linear_recurrence_triton_interpreter.py")
    paths = os.pathsep.join([str(ROOT), str(script.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "states agree" in run.stdout
