"""The registry: light, complete, and strict about names and settings."""

import dataclasses
import json
import subprocess
import sys

import pytest

from jaxeff.bench.registry import ROWS, find_row, make_settings
from jaxeff.training.config import ConfigError, to_dict

DECODE = find_row("decoder_decode")
TRAIN = find_row("decoder_train")


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_every_row_loads_and_its_settings_are_plain_on_every_platform(row):
    assert row.claim and not row.claim.endswith(".")
    for platform in ("cpu", "gpu", "tpu"):
        settings = make_settings(row, platform, {})
        assert dataclasses.is_dataclass(settings) and callable(settings.cases)
        json.dumps(to_dict(settings))
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.other = 1


def test_nothing_that_measures_is_imported_before_it_is_run():
    code = (
        "import sys, jaxeff.bench.__main__\n"
        "print([m for m in sys.modules if m.startswith(('jaxeff.bench.rows.', 'torch'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_an_unknown_row_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="'decoder_trian'; did you mean 'decoder_train'"):
        find_row("decoder_trian")


def test_settings_take_their_type_from_the_field():
    settings = make_settings(DECODE, "cpu", {"batch_sizes": "(2, 3)", "new_tokens": "5"})
    assert settings.batch_sizes == (2, 3)
    assert settings.new_tokens == 5


def test_a_dotted_setting_is_an_entry_of_a_mapping():
    settings = make_settings(TRAIN, "cpu", {"config.model.num_layers": "2"})
    assert settings.config == {"model.num_layers": "2"}


def test_accelerators_get_larger_sizes_which_can_still_be_changed():
    on_cpu, on_tpu = (make_settings(DECODE, platform, {}) for platform in ("cpu", "tpu"))
    assert on_tpu.new_tokens > on_cpu.new_tokens
    assert on_tpu.batch_sizes == on_cpu.batch_sizes
    changed = make_settings(TRAIN, "tpu", {"config.data.batch_size": "16"})
    assert changed.config == {**TRAIN.load().ON_ACCELERATOR["config"], "data.batch_size": "16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"new_token": "5"},
            "decoder_decode has no setting 'new_token'; did you mean 'new_tokens'",
        ),
        ({"new_tokens": "many"}, "'decoder_decode.new_tokens' is 'many'.*expected int"),
        ({"new_tokens.x": "5"}, "decoder_decode has no setting 'new_tokens.x'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_settings(DECODE, "cpu", changes)
