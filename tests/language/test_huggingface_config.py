"""`config.json` of every family, both layouts of RoPE, and everything that must be refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from jaxeff.language.config import DecoderConfig, MoEConfig, RopeConfig
from jaxeff.language.huggingface_config import config_from_hf, config_to_hf, hf_model_type
from jaxeff.language.presets import list_presets, preset

GOLDEN = Path(__file__).parents[1] / "golden" / "decoder_lm"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
QWEN2 = LLAMA | {"model_type": "qwen2"}


def golden(folder, name="config.json"):
    return config_from_hf(json.loads((GOLDEN / folder / name).read_text()))


@pytest.mark.parametrize(
    "kind", ["linear", "dynamic", "yarn", "yarn_full", "llama3"], ids=lambda kind: f"rope_{kind}"
)
def test_both_layouts_of_rope_settings_read_the_same(kind):
    new, old = golden(f"llama_rope_{kind}"), golden(f"llama_rope_{kind}", "config_legacy.json")
    assert new == old
    assert new.rope.rope_type == kind.split("_")[0]


def test_legacy_type_key_names_the_rope_type():
    settings = {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert config_from_hf(LLAMA | settings).rope == RopeConfig("linear", theta=5e4, factor=4.0)


def test_yarn_settings_are_all_read():
    rope = golden("llama_rope_yarn_full").rope
    assert (rope.theta, rope.factor, rope.original_max_position_embeddings) == (5e4, 8.0, 32)
    assert (rope.beta_fast, rope.beta_slow, rope.attention_factor) == (24.0, 2.0, 1.2)


def test_switches_of_each_family():
    switches = ("attention_bias", "qkv_bias", "mlp_bias", "qk_norm", "tie_embeddings")

    def on(config):
        return {name for name in switches if getattr(config, name)}

    assert on(golden("llama")) == set()
    assert on(golden("llama_bias_tied_headdim")) == {"attention_bias", "mlp_bias", "tie_embeddings"}
    assert on(golden("qwen2")) == {"qkv_bias", "tie_embeddings"}
    assert on(golden("qwen3")) == {"qk_norm"}
    assert golden("mixtral").moe == MoEConfig(num_experts=5, num_experts_per_token=2)
    assert golden("qwen3_moe").moe == MoEConfig(
        num_experts=6, num_experts_per_token=2, intermediate_size=24, mlp_only_layers=(1,)
    )


def test_head_dim_of_the_file_wins():
    assert golden("llama_bias_tied_headdim").resolved_head_dim == 10


def test_absent_keys_take_the_defaults_of_the_family():
    assert config_from_hf(LLAMA).num_kv_heads == 4
    assert config_from_hf(LLAMA).rms_norm_eps == 1e-6
    mistral = LLAMA | {"model_type": "mistral", "num_key_value_heads": 2}
    assert config_from_hf(mistral).sliding_window == 4096
    assert config_from_hf(mistral | {"sliding_window": None}).sliding_window is None
    qwen3 = config_from_hf(LLAMA | {"model_type": "qwen3", "num_key_value_heads": None})
    assert (qwen3.head_dim, qwen3.num_kv_heads) == (128, 4)
    mixtral = config_from_hf(LLAMA | {"model_type": "mixtral", "num_key_value_heads": 4})
    assert (mixtral.rope.theta, mixtral.moe.num_experts) == (1e6, 8)


def test_dtype_of_the_file_is_that_of_computation_and_parameters():
    for key in ("dtype", "torch_dtype"):
        config = config_from_hf(LLAMA | {key: "float16"})
        assert (config.dtype, config.param_dtype) == ("float16", "float16")


class TestSlidingWindow:
    BASE = QWEN2 | {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 16}

    def test_it_is_off_unless_used(self):
        assert config_from_hf(self.BASE | {"use_sliding_window": False}).sliding_window is None

    def test_it_starts_at_max_window_layers(self):
        assert config_from_hf(self.BASE | {"max_window_layers": 0}).sliding_window == 16
        assert config_from_hf(self.BASE | {"max_window_layers": 4}).sliding_window is None

    def test_layer_types_decide_where_given(self):
        types = {"layer_types": ["sliding_attention"] * 4, "max_window_layers": 9}
        assert config_from_hf(self.BASE | types).sliding_window == 16

    def test_windows_on_some_layers_only_are_refused(self):
        with pytest.raises(ValueError, match="sliding_window=16 on 2 of 4 layers"):
            config_from_hf(self.BASE | {"max_window_layers": 2})


def test_longrope_factor_becomes_the_attention_factor():
    settings = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
    }
    rope = config_from_hf(LLAMA | {"rope_scaling": settings}).rope
    assert rope.long_factor == (2.0, 2.0, 2.0, 2.0)
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not one of llama, mistral"),
        ({"model_type": None}, "model_type=None"),
        ({"vocab_size": None, "hidden_size": None}, "lacks vocab_size, hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type='mrope' is not one of"),
        ({"rope_scaling": {"type": "su"}}, "rope_type='su' is not one of"),
        ({"rope_parameters": {"rope_type": "yarn", "mscale": 1.0}}, "does not take mscale"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "does not take factor"),
        ({"rope_parameters": {"rope_type": "yarn", "truncate": False}}, "truncate=false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(LLAMA | change)


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_survives_the_round_trip(name):
    config = preset(name, dtype="float32")
    restored = config_from_hf(json.loads(json.dumps(config_to_hf(config))))
    assert restored == dataclasses.replace(config, head_dim=restored.head_dim)
    assert restored.resolved_head_dim == config.resolved_head_dim


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig("linear", factor=4.0),
        RopeConfig("dynamic", factor=3.0),
        RopeConfig("llama3", factor=8.0, original_max_position_embeddings=32),
        RopeConfig("yarn", factor=4.0),
        RopeConfig(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=9,
            attention_factor=1.2,
            beta_fast=9,
        ),
        RopeConfig(
            "longrope",
            short_factor=(1.0,) * 8,
            long_factor=(1.5,) * 8,
            original_max_position_embeddings=64,
        ),
    ],
    ids=lambda rope: rope.rope_type,
)
def test_every_rope_type_survives_the_round_trip(rope):
    config = preset("tiny", rope=rope)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_written_config_reads_the_same_in_the_old_layout():
    hf = config_to_hf(preset("tiny", rope=RopeConfig("yarn", theta=5e4, factor=4.0)))
    old = {key: value for key, value in hf.items() if key != "rope_parameters"}
    new = {key: value for key, value in hf.items() if key not in ("rope_scaling", "rope_theta")}
    assert config_from_hf(old) == config_from_hf(new) == config_from_hf(hf)


@pytest.mark.parametrize(
    ("switches", "model_type"),
    [
        ({}, "llama"),
        ({"attention_bias": True, "mlp_bias": True}, "llama"),
        ({"attention_bias": True, "qkv_bias": True}, "llama"),
        ({"sliding_window": 8}, "mistral"),
        ({"qkv_bias": True, "sliding_window": 8}, "qwen2"),
        ({"qk_norm": True, "attention_bias": True}, "qwen3"),
        ({"moe": MoEConfig(4)}, "mixtral"),
        ({"moe": MoEConfig(4, norm_topk_prob=False), "qk_norm": True}, "qwen3_moe"),
    ],
)
def test_the_family_is_the_one_that_can_express_the_switches(switches, model_type):
    assert hf_model_type(preset("tiny", **switches)) == model_type


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"qk_norm": True, "mlp_bias": True}, "combines mlp_bias, qk_norm"),
        ({"moe": MoEConfig(4, norm_topk_prob=False)}, "combines moe with MoEConfig"),
        ({"moe": MoEConfig(4), "qkv_bias": True}, "combines moe, qkv_bias"),
    ],
)
def test_what_no_family_can_express_is_refused(switches, message):
    with pytest.raises(ValueError, match=message):
        config_to_hf(preset("tiny", **switches))


def test_a_second_context_length_cannot_be_written():
    rope = RopeConfig("dynamic", factor=2.0, max_position_embeddings=64)
    config = DecoderConfig(97, 32, 56, 2, 4, 2, rope=rope)
    with pytest.raises(ValueError, match=r"rope\.max_position_embeddings=64 differs"):
        config_to_hf(config)
