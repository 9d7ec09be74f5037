"""Targets by name, and errors that help."""

import subprocess
import sys

import pytest

from jaxeff.aot import environment
from jaxeff.aot.environment import CompilerMissingError, check_compiler
from jaxeff.aot.targets import CHIPS, TargetError, parse_target


@pytest.mark.parametrize(
    ("text", "chip", "topology", "devices"),
    [
        ("v5e:2x2", "v5e", (2, 2), 4),
        ("v6e:4x4", "v6e", (4, 4), 16),
        ("v5p:4x4x4", "v5p", (4, 4, 4), 64),
        ("v4:2x2x1", "v4", (2, 2, 1), 4),
        ("tpu7x:2x2x1", "tpu7x", (2, 2, 1), 8),
        ("h100", "h100", (1,), 1),
        ("h200:8", "h200", (8,), 8),
    ],
)
def test_a_target_names_a_chip_and_its_devices(text, chip, topology, devices):
    target = parse_target(text)
    assert (target.chip.name, target.topology, target.num_devices) == (chip, topology, devices)
    assert parse_target(str(target)) == target


def test_a_chip_alone_is_one_chip():
    assert parse_target("v5p").topology == (1, 1, 1)
    assert parse_target("tpu7x").num_devices == 2


def test_a_plane_of_a_three_dimensional_chip_may_leave_out_its_depth():
    assert parse_target("v5p:2x2") == parse_target("v5p:2x2x1")


def test_other_names_of_a_chip_are_known():
    assert parse_target("trillium:2x2").chip.name == "v6e"
    assert parse_target("V5E:2x2").chip.name == "v5e"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5ee:2x2", "did you mean 'v5e'"),
        ("h10", "did you mean 'h100'"),
        ("gtx", "Known: h100, h200, tpu7x, v4, v5e, v5p, v6e"),
        ("v5e:two", "not of the form v5e:AxB"),
        ("v5e:2x2x2", "expected a topology of the form v5e:AxB"),
        ("v5p:4", "expected a topology of the form v5p:AxBxC"),
        ("v5e:3x2", "expected even sizes"),
        ("v5e:0x2", "expected a topology"),
        ("h100:9", "N from 1 to 8"),
        ("h100:2x4", "expected h100:N"),
    ],
)
def test_a_wrong_target_is_refused_with_what_was_expected(text, message):
    with pytest.raises(TargetError, match=message):
        parse_target(text)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_the_clock_that_follows_from_peak_and_matrix_units_is_a_chips(chip):
    assert 0.9e9 < chip.clock < 2.3e9


def test_peaks_agree_with_those_of_the_training_loop():
    from jaxeff.training.chips import PEAK_BF16_FLOPS

    for chip in CHIPS.values():
        name = {"h100": "NVIDIA H100", "h200": "NVIDIA H200"}.get(chip.name, chip.description)
        assert chip.peak_flops == pytest.approx(PEAK_BF16_FLOPS[name], rel=1e-3)


@pytest.mark.parametrize(
    ("target", "check", "line"),
    [
        ("v5e", "has_tpu_compiler", 'pip install "jaxeff[aot]"'),
        ("h100", "has_cuda_compiler", 'pip install "jaxeff[aot-cuda]"'),
    ],
)
def test_a_missing_compiler_is_named_with_the_line_that_installs_it(
    monkeypatch, target, check, line
):
    monkeypatch.setattr(environment, check, lambda: False)
    with pytest.raises(CompilerMissingError) as error:
        check_compiler(parse_target(target))
    assert line in str(error.value)


def test_the_environment_can_be_prepared_before_jax_is_imported():
    code = (
        "import sys, os, jaxeff.aot, jaxeff.aot.__main__ as command\n"
        "command.prepare(command.parse_target('v5e:2x2'))\n"
        "assert 'jax' not in sys.modules\n"
        "assert os.environ['JAX_PLATFORMS'] == 'cpu'\n"
        "assert '--xla_jf_dump_to=' in os.environ['LIBTPU_INIT_ARGS']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_environment_that_may_use_accelerators_is_left_alone(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environment.prepare_compiler(parse_target("h100"))
    assert "CUDA_VISIBLE_DEVICES" not in environment.os.environ
