"""What a decoder refuses, by name: wrong configurations and wrong calls."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import params_of, tiny, tokens_of

from jaxeff.language import Decoder, DecoderConfig, MoEConfig, RopeConfig, init_cache


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_heads": 6}, "hidden_size=32 must be a multiple of num_heads=6"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocab_size": 6.0}, "vocab_size=6.0"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
        ({"remat": "some"}, "remat='some'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"attention_implementation": "flash"}, "attention_implementation='flash'"),
        ({"moe": {"num_experts": 2, "num_experts_per_token": 3}}, "exceeds moe.num_experts=2"),
        ({"moe": {"num_experts": 2, "mlp_only_layers": (3,)}}, "mlp_only_layers holds 3"),
    ],
)
def test_wrong_configs_are_named(fields, named):
    with pytest.raises(ValueError, match=named):
        tiny(**fields)


def test_config_survives_json():
    moe = MoEConfig(4, mlp_only_layers=(1,))
    config = tiny(rope=RopeConfig("yarn", factor=2.0), moe=moe, dtype=jnp.bfloat16)
    again = DecoderConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"tokens": None}, "tokens or inputs_embeds"),
        ({"tokens": jnp.zeros((2, 3))}, "tokens .* must be integers"),
        ({"tokens": None, "inputs_embeds": jnp.zeros((2, 3, 5))}, "inputs_embeds"),
        ({"positions": jnp.zeros((2, 4), jnp.int32)}, "positions"),
        ({"segment_ids": jnp.zeros((2, 4), jnp.int32)}, "segment_ids"),
        ({"mask": jnp.ones((2, 3, 4), bool)}, "mask"),
        ({"layer_gates": np.ones((2, 2), bool)}, "layer_gates"),
        ({"layer_gates": np.ones((3, 2))}, "layer_gates"),
        ({"cache": init_cache(tiny(num_layers=2), 2, 8)}, "cache of"),
        ({"cache": init_cache(tiny(), 2, 2)}, "exceed the cache's capacity=2"),
    ],
)
def test_wrong_calls_are_named(call, named):
    config = tiny()
    tokens = {"tokens": tokens_of(2, 3)}
    with pytest.raises(ValueError, match=named):
        Decoder(config).apply({"params": params_of(config)}, **(tokens | call))
