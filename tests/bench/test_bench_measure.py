"""The skeleton: prepared once, interleaved, ratios within a round."""

import jax.numpy as jnp
import pytest

from jaxeff.bench.measure import Case, Figure, Sample, Spread, Variant, measure_case


def scripted(name, seconds, calls, values=None):
    """A variant that says it took ``seconds[i]`` in its i-th run after the two of the warm-up."""

    def prepare():
        calls.append(f"prepare {name}")
        script = iter([1.0, 1.0, *seconds])

        def run():
            calls.append(name)
            return Sample(next(script), values or {})

        return run

    return Variant(name, prepare)


def test_variants_are_prepared_once_and_run_in_turn_forwards_and_backwards():
    calls = []
    variants = [scripted(name, [1.0] * 3, calls) for name in "abc"]
    measure_case(Case("case", variants[0], variants[1:]), rounds=3)
    assert calls[:3] == ["prepare a", "prepare b", "prepare c"]
    assert calls[3:9] == ["a", "a", "b", "b", "c", "c"]
    assert "".join(calls[9:]) == "abc" + "cba" + "abc"


def test_the_ratio_is_taken_within_a_round_before_the_median():
    # The machine is ten times slower in the second round, and the ratio does not notice.
    ours, theirs = scripted("ours", [1, 10, 2], []), scripted("theirs", [2, 20, 6], [])
    result = measure_case(Case("case", ours, (theirs,)), rounds=3)
    assert result.ratio == Spread(median=2.0, low=2.0, high=3.0)
    assert result.ratio_name == "theirs / ours"
    assert result.fastest == 2.0
    assert result.seconds == {"ours": Spread(2, 1, 10), "theirs": Spread(6, 2, 20)}


def test_figures_and_a_ratio_of_its_own_see_seconds_and_values_of_the_round():
    ours = scripted("ours", [2.0, 4.0], [], values={"bytes": 8.0})
    case = Case(
        "case",
        ours,
        ratio=lambda r: r.values["ours"]["bytes"] / r.seconds["ours"],
        ratio_name="rate",
        figures=[Figure("half", "s", lambda r: r.seconds["ours"] / 2)],
    )
    result = measure_case(case, rounds=2)
    assert result.ratio == Spread(3.0, 2.0, 4.0)
    assert result.ratio_name == "rate"
    assert [(f.name, f.unit, f.spread) for f in result.figures] == [
        ("half", "s", Spread(1.5, 1.0, 2.0))
    ]


def test_short_runs_are_repeated_and_their_arrays_waited_for():
    count = 0

    def run():
        nonlocal count
        count += 1
        return jnp.ones(4) + 1

    result = measure_case(Case("case", Variant("add", lambda: run), ratio=lambda r: 1.0), rounds=1)
    assert count > 3
    assert 0 < result.seconds["add"].median < 1


def test_rounds_below_one_are_refused(sleepless_case):
    with pytest.raises(ValueError, match="rounds is 0; expected at least 1"):
        measure_case(sleepless_case, rounds=0)


def test_a_case_needs_something_to_compare_with():
    only = Variant("only", lambda: lambda: None)
    with pytest.raises(ValueError, match="'case' needs a baseline or a ratio"):
        Case("case", only)
    with pytest.raises(ValueError, match="share a name"):
        Case("case", only, (only,))
