"""Reports: JSON with a stable layout, a Markdown section for each run, tables."""

import dataclasses
import io
import json

import jax
import pytest
from rich.console import Console

from jaxeff.bench.measure import BenchError, RowResult, environment, measure_case
from jaxeff.bench.report import (
    RESULTS_HEADER,
    Failure,
    Report,
    append_results,
    busy,
    check_writable,
    number,
    print_row,
    to_markdown,
    write_json,
)


@pytest.fixture
def report(sleepless_case):
    row = RowResult(
        name="row",
        claim="Nothing takes no time",
        paper="2x (A100)",
        source="On nothing, arXiv 0000.00000",
        settings={"size": 3, "shape": (1, 2)},
        rounds=2,
        cases=(measure_case(sleepless_case, rounds=2),),
    )
    return Report(environment(jax.devices()[0]), (row,), (Failure("other", "no such chip"),))


def test_json_has_the_documented_layout(report, tmp_path):
    write_json(report, tmp_path / "figures.json")
    values = json.loads((tmp_path / "figures.json").read_text())
    assert set(values) == {"schema", "environment", "rows", "failures"}
    assert values["schema"] == 1
    assert values["environment"]["platform"] == "cpu"
    assert values["environment"]["versions"]["jax"] == jax.__version__
    assert values["failures"] == [{"name": "other", "reason": "no such chip"}]
    (row,) = values["rows"]
    assert set(row) == {"name", "claim", "paper", "source", "settings", "rounds", "cases"}
    assert row["settings"] == {"size": 3, "shape": [1, 2]}
    (case,) = row["cases"]
    assert set(case["ratio"]) == {"median", "low", "high"}
    assert set(case["seconds"]) == {"ours", "theirs"}
    assert case["limit"] == 2.0 and case["fastest"] > 0


def test_results_are_appended_under_one_heading(report, tmp_path):
    path = tmp_path / "RESULTS.md"
    append_results(report, path)
    once = path.read_text()
    append_results(report, path)
    twice = path.read_text()
    assert once.startswith(RESULTS_HEADER)
    assert twice.startswith(once)
    assert twice.count("# Results\n") == 1
    assert twice.count("## row\n") == 2


def test_the_markdown_section_says_what_where_and_with_which_settings(report):
    text = to_markdown(report)
    where = report.environment
    assert text.startswith(f"## {where.date} · cpu: {where.processor}")
    assert f"jax {jax.__version__}" in text
    assert "Nothing takes no time. (On nothing, arXiv 0000.00000; paper: 2x (A100))" in text
    assert "| nothing | theirs / ours |" in text
    assert "| 1.5x | 2 |" in text
    assert "* limit (nothing): half of nothing." in text
    assert "size=3, shape=(1, 2); 2 rounds" in text
    assert "other was not measured: no such chip" in text


def test_a_busy_machine_is_mentioned(report):
    quiet = dataclasses.replace(report.environment, load=0.1, cores=2)
    loaded = dataclasses.replace(report.environment, load=3.0, cores=2)
    unknown = dataclasses.replace(report.environment, load=None)
    assert busy(quiet) == busy(unknown) == ""
    text = to_markdown(dataclasses.replace(report, environment=loaded))
    assert "The machine was busy (load 3.0 on 2 cores)" in text


def test_the_table_shows_paper_ratio_and_limit(report):
    console = Console(file=io.StringIO(), width=140)
    print_row(report.rows[0], console)
    text = console.file.getvalue()
    for expected in ("theirs / ours", "1.5x", "ours (s)", "half of nothing."):
        assert expected in text


def test_files_that_cannot_be_written_are_refused(report, tmp_path):
    missing = tmp_path / "nowhere" / "file"
    for act in (
        lambda: check_writable(missing),
        lambda: check_writable(tmp_path),
        lambda: write_json(report, missing),
        lambda: append_results(report, missing),
    ):
        with pytest.raises(BenchError, match="cannot write"):
            act()
    check_writable(tmp_path / "new")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.012345, "0.0123"),
        (1.0, "1"),
        (99.96, "100"),
        (999.7, "1,000"),
        (1e6, "1,000,000"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text
