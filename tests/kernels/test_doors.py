"""Which implementation an operation takes."""

import jax
import pytest

from pallas_kernels import doors


def refusals(reason=None):
    return {"xla": lambda: None, "mosaic_tpu": lambda: reason, "triton": lambda: "it never does"}


@pytest.fixture
def on_tpu(monkeypatch):
    """Pretends that the program is traced for one TPU chip."""
    monkeypatch.setattr(doors, "target_platform", lambda: "tpu")
    with jax.set_mesh(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])):
        yield


def test_the_platforms_kernel_is_taken_where_it_serves(on_tpu):
    assert doors.choose_implementation(None, refusals()) == "mosaic_tpu"
    assert doors.choose_implementation(None, refusals("too large")) == "xla"
    assert doors.choose_implementation("xla", refusals()) == "xla"


def test_an_operation_without_the_platforms_kernel_takes_xla(on_tpu):
    assert doors.choose_implementation(None, {"xla": lambda: None}) == "xla"


def test_a_kernel_is_not_taken_where_the_compiler_may_have_to_partition_it(monkeypatch):
    monkeypatch.setattr(doors, "target_platform", lambda: "tpu")
    assert jax.device_count() > 1
    assert doors.choose_implementation(None, refusals()) == "xla"


def test_a_named_implementation_is_never_replaced(on_tpu):
    with pytest.raises(NotImplementedError, match="'mosaic_tpu' cannot serve this call: too large"):
        doors.choose_implementation("mosaic_tpu", refusals("too large"))
    with pytest.raises(ValueError, match="'cuda' is not one of None, 'xla', 'mosaic_tpu'"):
        doors.choose_implementation("cuda", refusals())


def test_a_gpu_that_is_not_there_is_known_by_the_meshs_devices():
    with pytest.raises(NotImplementedError, match="known are A100, H100"):
        doors.compute_capability()
