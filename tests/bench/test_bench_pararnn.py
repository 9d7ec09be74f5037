"""The row on nonlinear recurrences at tiny sizes: ways agree, and what is counted is right."""

import dataclasses
import json
import logging
import math

import jax
import numpy as np
import pytest

from jaxeff.bench.measure import BenchError, measure_case
from jaxeff.bench.registry import find_row, make_settings
from jaxeff.bench.rows import pararnn, static_schedules
from jaxeff.bench.rows import pararnn_contenders as ways
from jaxeff.bench.rows import pararnn_schedules as schedules

DEVICE = jax.devices()[0]
TINY = pararnn.ParaRnn(batch=2, width=8, lengths=(3,), lstm_lengths=(2,), schedule_chips=())
ONE = dataclasses.replace(TINY, lstm_lengths=())
CELLS = pytest.mark.parametrize("cell", [ways.GRU, ways.LSTM], ids=["gru", "lstm"])


def figures_of(result):
    return {figure.name: figure.spread.median for figure in result.figures}


def test_each_cell_is_compared_with_all_others_forward_and_with_gradients():
    results = {case.name: measure_case(case, rounds=1) for case in TINY.cases(DEVICE)}
    compiled = {
        "fused Newton",
        "fused sequential",
        "associative-scan Newton",
        "lax.scan",
        "linear recurrence",
    }
    assert {name: set(result.seconds) for name, result in results.items()} == {
        "GRU forward, T=3": compiled | {"Python loop"},
        "GRU with gradients, T=3": compiled,
        "LSTM forward, T=2": compiled | {"Python loop"},
        "LSTM with gradients, T=2": compiled,
    }
    for result in results.values():
        assert result.ratio_name == "lax.scan / fused Newton"
        assert all(spread.low > 0 for spread in result.seconds.values())
        assert all(math.isfinite(value) for value in figures_of(result).values())


def test_the_papers_figures_stand_beside_its_length_forward_and_long_python_loops_are_left_out(
    monkeypatch,
):
    assert {cell for cell, _ in pararnn.PAPER} == {ways.GRU.name, ways.LSTM.name}
    monkeypatch.setattr(pararnn, "PAPER", {("GRU", 2): "7x", ("GRU", 3): "8x", ("LSTM", 2): "9x"})
    cases = list(dataclasses.replace(ONE, lengths=(2,), loop_steps=1).cases(DEVICE))
    assert [case.paper for case in cases] == ["7x", "-"]
    assert all(ways.PYTHON not in [variant.name for variant in c.variants] for c in cases)


@CELLS
def test_the_python_loop_gives_the_states_of_the_compiled_one(cell):
    u, weights, _ = pararnn.make_operands(cell, 2, 6, 8)
    compiled = jax.jit(ways.contenders(cell, 6, None)[ways.SCAN])(u, weights)
    np.testing.assert_allclose(ways.python_loop(cell, u, weights), compiled, atol=1e-6)


def test_results_that_differ_are_not_timed(monkeypatch):
    right = ways._parallel
    monkeypatch.setattr(ways, "_parallel", lambda *arguments: 1.01 * right(*arguments))
    with pytest.raises(BenchError, match=r"fused Newton differs from lax\.scan by"):
        next(ONE.cases(DEVICE))


def test_without_the_kernels_of_a_device_those_ways_are_left_out_with_the_reason(
    monkeypatch, caplog
):
    monkeypatch.setattr(pararnn.doors, "KERNEL_OF_PLATFORM", {"cpu": "mosaic_tpu"})
    with caplog.at_level(logging.WARNING):
        case = next(ONE.cases(DEVICE))
    assert [variant.name for variant in case.variants] == [
        "associative-scan Newton",
        "lax.scan",
        "Python loop",
    ]
    for name in ("fused Newton", "fused sequential", "kernel-scan Newton", "linear recurrence"):
        assert f"GRU, T=3: {name} is left out: " in caplog.text
    assert "it runs on TPU" in caplog.text


def with_failing_newton(monkeypatch, message):
    everything = ways.contenders

    def failing(*arguments):
        raise jax.errors.JaxRuntimeError(message)

    def contenders(*arguments):
        return everything(*arguments) | {ways.ASSOCIATIVE: failing}

    monkeypatch.setattr(ways, "contenders", contenders)


def test_what_needs_too_much_memory_is_left_out_and_other_failures_are_not(monkeypatch, caplog):
    with_failing_newton(monkeypatch, "RESOURCE_EXHAUSTED: Out of memory")
    with caplog.at_level(logging.WARNING):
        case = next(ONE.cases(DEVICE))
    assert ways.ASSOCIATIVE not in [variant.name for variant in case.variants]
    assert "GRU, T=3: associative-scan Newton is left out: it needs more memory" in caplog.text
    with_failing_newton(monkeypatch, "INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        next(ONE.cases(DEVICE))


def test_achieved_rates_follow_from_the_arrays_that_must_be_moved():
    settings = dataclasses.replace(ONE, memory_rate=True)
    case = next(settings.cases(DEVICE))
    result = measure_case(case, rounds=1)
    figures, seconds = figures_of(result), {n: s.median for n, s in result.seconds.items()}
    array = 4 * 2 * 3 * 8
    memory = 4 * array / seconds["read and write"]
    assert figures["memory's rate"] == pytest.approx(memory / 1e9)
    newton = 4 * array / seconds["fused Newton"]  # three projections and the states
    assert figures["rate of fused Newton"] == pytest.approx(newton / 1e9)
    assert figures["share of memory's rate: fused Newton"] == pytest.approx(100 * newton / memory)
    linear = 3 * array / seconds["linear recurrence"]
    share = figures["share of memory's rate: linear recurrence"]
    assert share == pytest.approx(100 * linear / memory)


@CELLS
def test_the_arrays_that_must_be_moved_are_operands_and_results_once(cell):
    u, weights, cotangent = pararnn.make_operands(cell, 2, 6, 8)
    array, states = cotangent.size, cell.num_states
    assert ways.least_arrays(states, gradients=False) == u.size / array + states
    both = ways.with_gradients(ways.contenders(cell, 6, None)[ways.SCAN])
    _, of_u, _ = jax.eval_shape(both, u, weights, cotangent)
    backward = (u.size + of_u.size + cotangent.size) / array + states
    assert ways.least_arrays(states, gradients=True) == u.size / array + states + backward


def test_accelerators_get_the_papers_sizes_and_rates():
    row = find_row("pararnn")
    on_cpu, on_gpu = (make_settings(row, platform, {}) for platform in ("cpu", "gpu"))
    assert (on_gpu.batch, on_gpu.width, on_gpu.memory_rate) == (8, 1024, True)
    assert on_gpu.lengths == on_gpu.lstm_lengths == on_cpu.lengths
    assert (on_cpu.lengths[0], on_cpu.lengths[-1]) == (2**6, 2**14)


def test_without_libtpu_schedules_are_left_out_with_a_line(caplog, monkeypatch):
    monkeypatch.setattr(static_schedules.environment, "has_tpu_compiler", lambda: False)
    settings = pararnn.ParaRnn(lengths=(), lstm_lengths=())
    with caplog.at_level(logging.WARNING):
        assert not list(settings.cases(DEVICE))
    assert "static TPU schedules are left out" in caplog.text


def test_a_kernel_that_waits_for_memory_takes_the_time_of_its_traffic():
    cycles = {"kernel": 100.0, "lax.scan": 900.0, "associative scan": 600.0}
    found = schedules.Schedule("v5e", 1e9, "linear recurrence", False, 200.0, cycles)
    case = pararnn._schedule_case(found, schedules.Sizes(8, 16, 128))
    assert case.name == "v5e static, linear recurrence forward, 8x16x128"
    assert case.limit == 600 / 200
    result = measure_case(case, rounds=1)
    assert result.ratio_name == "associative scan / kernel"
    assert result.ratio.median == pytest.approx(600 / 200)
    assert result.seconds["kernel"].median == pytest.approx(200e-9)
    figures = figures_of(result)
    assert figures["kernel"] == pytest.approx(0.1)
    assert figures["least HBM traffic"] == pytest.approx(0.2)
    assert figures["kernel / least HBM traffic"] == pytest.approx(0.5)


def test_schedules_are_compiled_in_processes_of_their_own(monkeypatch):
    shown = {"chip": "v5e", "clock": 1.0, "subject": "GRU", "gradients": False, "hbm_bound": 2.0,
             "cycles": {"fused Newton": 3.0}}  # fmt: skip
    asked = []

    def from_processes(*arguments):
        asked.append(arguments)
        return [[shown], [shown | {"chip": "v6e"}]]

    monkeypatch.setattr(static_schedules, "from_processes", from_processes)
    found = schedules.measure_schedules(("v5e", "v6e"), schedules.Sizes(8, 16, 128))
    assert [entry.chip for entry in found] == ["v5e", "v6e"]
    assert asked == [(schedules.__name__, ("v5e", "v6e"), ["8x16x128"])]
    assert schedules.Sizes.parse("8x16x128") == schedules.Sizes(8, 16, 128)


def test_each_chip_has_a_process_that_prints_json(tmp_path, monkeypatch):
    (tmp_path / "shows_arguments.py").write_text(
        "import json, os, sys\nprint(json.dumps([os.environ['JAX_PLATFORMS'], *sys.argv[1:]]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = static_schedules.from_processes("shows_arguments", ("a", "b"), ["c"])
    assert found == [["cpu", "a", "c"], ["cpu", "b", "c"]]
    with pytest.raises(BenchError, match=r"schedules for a failed: .*named no_such_thing"):
        static_schedules.from_processes("no_such_thing", ("a",), [])


SIZES = schedules.Sizes(8, 2048, 1024)


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fused_newton_takes_a_third_of_the_cycles_of_xlas_associative_scan(tpu, gradients):
    names = (ways.FUSED, ways.ASSOCIATIVE)
    options = {"gradients": gradients, "names": names}
    found = schedules.cell_schedule(tpu, "v5e", ways.GRU, SIZES, **options)
    assert 3 * found.at_least(ways.FUSED) < found.cycles[ways.ASSOCIATIVE]


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@CELLS
def test_the_fused_sequential_pass_takes_fewer_cycles_than_xlas_loop(tpu, cell):
    names = (ways.FUSED_SEQUENTIAL, ways.SCAN)
    found = schedules.cell_schedule(tpu, "v5e", cell, SIZES, gradients=False, names=names)
    assert 10 * found.at_least(ways.FUSED_SEQUENTIAL) < found.cycles[ways.SCAN]


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
def test_the_linear_recurrence_is_limited_by_memory(tpu):
    options = {"gradients": False, "names": (schedules.KERNEL,)}
    found = schedules.linear_schedule(tpu, "v5e", SIZES, **options)
    assert found.cycles[schedules.KERNEL] < found.hbm_bound == found.at_least(schedules.KERNEL)


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
def test_every_program_of_the_static_part_compiles(tpu, capsys, monkeypatch):
    monkeypatch.setattr(static_schedules, "compiler_for", lambda chip: tpu)
    schedules.main(["v6e", "8x64x128"])
    found = [schedules.Schedule(**entry) for entry in json.loads(capsys.readouterr().out)]
    assert {(entry.subject, entry.gradients) for entry in found} == {
        (subject, gradients)
        for subject in ("linear recurrence", "GRU", "LSTM")
        for gradients in (False, True)
    }
    assert all(cycles > 0 for entry in found for cycles in entry.cycles.values())
    assert all(len(entry.cycles) == (3 if "linear" in entry.subject else 5) for entry in found)
