"""Presets have the sizes of the models they are named after."""

import pytest

from jaxeff.language import count_parameters, list_presets, preset

# Totals of the published checkpoints, tied weights counted once.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_total(name):
    assert count_parameters(preset(name)) == PUBLISHED[name]


def test_every_other_preset_is_tiny():
    rest = set(list_presets()) - set(PUBLISHED)
    assert rest == {"tiny", "tiny-qwen2", "tiny-qwen3", "tiny-mixtral", "tiny-qwen3-moe"}
    assert all(count_parameters(preset(name)) < 300_000 for name in rest)


def test_overrides_replace_fields():
    assert preset("llama3-8b", scan_layers=False, dtype="float32").dtype == "float32"


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"no preset 'llama-3-8b': did you mean 'llama3-8b'\?"):
        preset("llama-3-8b")
    with pytest.raises(ValueError, match=r"no preset 'zzz'\. There are llama2-7b, "):
        preset("zzz")
