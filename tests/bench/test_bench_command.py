"""The command: lists, refuses what it does not know, measures, writes."""

import dataclasses
import json
import sys
import types

import jax
import pytest

from jaxeff.bench import registry
from jaxeff.bench.__main__ import main
from jaxeff.bench.measure import BenchError
from jaxeff.bench.registry import ROWS, Row


@pytest.fixture
def rows(monkeypatch, sleepless_case):
    """Adds a row that works, one that lacks something, and one that runs out of memory."""

    @dataclasses.dataclass(frozen=True)
    class Works:
        size: int = 1

        def cases(self, device):
            yield sleepless_case

    @dataclasses.dataclass(frozen=True)
    class Lacks:
        def cases(self, device):
            raise BenchError("the moon is not here")
            yield

    @dataclasses.dataclass(frozen=True)
    class Overflows:
        def cases(self, device):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore text")
            yield

    module = types.ModuleType("jaxeff.bench.rows.for_tests")
    module.Works, module.Lacks, module.Overflows = Works, Lacks, Overflows
    monkeypatch.setitem(sys.modules, module.__name__, module)
    added = {
        name: Row(name, f"The row {name}", f"for_tests:{name.capitalize()}")
        for name in ("works", "lacks", "overflows")
    }
    monkeypatch.setattr(registry, "ROWS", {**ROWS, **added})


def test_list_shows_every_claim(capsys):
    assert main(["--list"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for row in ROWS.values():
        assert row.name in text and row.claim in text


def test_list_of_a_row_shows_its_settings(rows, capsys):
    assert main(["--list", "works", "--set", "size=7"]) == 0
    assert "--set size=7" in capsys.readouterr().out


def test_a_run_prints_writes_and_records(rows, tmp_path, capsys):
    figures, results = tmp_path / "figures.json", tmp_path / "RESULTS.md"
    arguments = ["works", "--rounds", "2", "--set", "size=3"]
    assert main([*arguments, "--json", str(figures), "--record", str(results)]) == 0
    assert "The row works" in capsys.readouterr().out
    (row,) = json.loads(figures.read_text())["rows"]
    assert row["name"] == "works" and row["settings"] == {"size": 3} and row["rounds"] == 2
    assert "### works" in results.read_text()


def test_record_alone_means_results_md_here(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["works", "--rounds", "1", "--record"]) == 0
    assert (tmp_path / "RESULTS.md").exists()


def test_a_row_that_cannot_be_measured_is_reported_and_the_others_are_kept(rows, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    assert main(["lacks", "overflows", "works", "--rounds", "1", "--json", str(figures)]) == 1
    assert "lacks was not measured: the moon is not here" in capsys.readouterr().out
    values = json.loads(figures.read_text())
    assert [row["name"] for row in values["rows"]] == ["works"]
    assert [failure["reason"] for failure in values["failures"]] == [
        "the moon is not here",
        "RESOURCE_EXHAUSTED: out of memory",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decoder_decod"], "no benchmark 'decoder_decod'; did you mean 'decoder_decode'?"),
        (["works", "--set", "siez=3"], "works has no setting 'siez'; did you mean 'size'?"),
        (["works", "--set", "size"], "--set 'size' has no value; expected KEY=VALUE"),
        (["works", "--json", "nowhere/figures.json"], "cannot write nowhere/figures.json"),
        (["works", "--device", "gpu"], "--device gpu: there is none here"),
    ],
)
def test_what_cannot_be_done_is_an_error_before_anything_is_measured(
    rows, capsys, arguments, message
):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "The row" not in captured.out


def test_asking_for_a_device_that_is_not_there_changes_nothing(rows, capsys):
    before = jax.config.jax_platforms
    main(["works", "--device", "tpu"])
    assert jax.config.jax_platforms == before
    assert main(["works", "--device", "cpu", "--rounds", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["works", "--recrod"], "unknown argument '--recrod'; did you mean 'record'?"),
        ([], "name at least one row"),
        (["works", "--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["works", "--device", "cpus"], "invalid choice"),
    ],
)
def test_arguments_that_cannot_be_understood_end_the_command(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_status:
        main(arguments)
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err
