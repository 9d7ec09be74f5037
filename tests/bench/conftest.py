"""A tiny model on a tiny text, as the settings of a row."""

import pytest

from jaxeff.bench.measure import Case, Variant

TINY_MODEL = {
    "model.hidden_size": "32",
    "model.intermediate_size": "48",
    "model.num_layers": "2",
    "model.num_heads": "2",
    "model.num_kv_heads": "2",
    "data.seq_len": "16",
    "data.batch_size": "2",
}


@pytest.fixture
def tiny(tmp_path):
    """Overrides of configs/lm_stdlib.py."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    return TINY_MODEL | {"data.corpus": str(text)}


@pytest.fixture
def sleepless_case():
    """A case that measures nothing, for tests of what is around it."""
    return Case(
        name="nothing",
        technique=Variant("ours", lambda: lambda: None),
        baselines=(Variant("theirs", lambda: lambda: None),),
        limit=2.0,
        limit_note="half of nothing.",
        paper="1.5x",
    )
