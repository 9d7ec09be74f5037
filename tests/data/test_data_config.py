"""Settings of the data that cannot work are refused with the field, the value and the rule."""

import dataclasses
import json

import pytest

from jaxeff.data import DataConfig


def test_defaults_are_the_standard_library_as_bytes():
    config = DataConfig()
    assert (config.corpus, config.tokenizer, config.heldout_fraction) == ("stdlib", "bytes", 0.05)
    assert config.packing and config.seed is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("corpus", ""),
        ("corpus", ()),
        ("corpus", ("a.txt", "")),
        ("corpus", 3),
        ("text_field", ""),
        ("tokenizer", ""),
        ("seq_len", 0),
        ("seq_len", 1.5),
        ("batch_size", -4),
        ("batch_size", True),
        ("num_workers", 0),
        ("prefetch", -1),
        ("seed", -1),
        ("eval_batch_size", 0),
        ("eval_batches", 0),
        ("heldout_fraction", 1.0),
        ("heldout_fraction", -0.1),
        ("heldout_fraction", float("nan")),
        ("heldout_fraction", "5%"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} is ") as error:
        DataConfig(**{field: value})
    assert repr(value) in str(error.value)
    assert "expected" in str(error.value)


def test_a_list_of_sources_becomes_a_tuple_so_that_the_config_is_hashable():
    config = DataConfig(corpus=["stdlib", "notes.txt"])
    assert config.corpus == ("stdlib", "notes.txt")
    assert hash(config) == hash(DataConfig(corpus=("stdlib", "notes.txt")))


def test_the_config_can_be_written_as_json():
    assert json.loads(json.dumps(dataclasses.asdict(DataConfig())))["seq_len"] == 128
