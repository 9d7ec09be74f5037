"""Fixtures for tests that compile for chips that are not there.

A test asks for ``tpu`` or ``cuda`` (a function that compiles, and the reason to skip where the
compiler is not installed) and carries the marker that says so::

    @pytest.mark.tpu_compile
    @pytest.mark.parametrize("chip", ["v5e", "v6e"])
    def test_kernel_compiles(tpu, chip):
        report = tpu(kernel, (spec,), chip)
        assert report.kernel("my_kernel").schedule.cycles < 2 * report.costs.cycles

All devices live in the pytest process, beside the eight CPU devices. Several processes may compile
for TPU at the same time.
"""

import pytest

from jaxeff.aot import environment, targets


def prepare_compilers() -> None:
    """Sets what libtpu and the CUDA plugin read when they are loaded; call it from a conftest.

    It must come before any test makes a TPU topology by itself, or kernels have no schedules.
    """
    for name in ("v5e", "h100"):
        environment.prepare_compiler(targets.parse_target(name))


@pytest.fixture(scope="session")
def tpu():
    """``compile_for_target`` for TPU targets; skips without libtpu."""
    if not environment.has_tpu_compiler():
        pytest.skip(f"needs the TPU compiler: {environment.TPU_INSTALL}")
    from jaxeff.aot import compile_for_target

    return compile_for_target


@pytest.fixture(scope="session")
def cuda():
    """``compile_for_target`` for "h100" and "h200"; skips without the CUDA wheels."""
    if not environment.has_cuda_compiler():
        pytest.skip(f"needs the CUDA wheels: {environment.CUDA_INSTALL}")
    from jaxeff.aot import compile_for_target

    return compile_for_target
