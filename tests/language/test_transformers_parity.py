"""Live parity with the transformers library: random models of every family, both directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.optional_dependency

from jaxeff.language import (  # noqa: E402
    Decoder,
    RopeConfig,
    SamplingConfig,
    generate,
    load_hf,
    preset,
    save_hf,
)

VOCAB = 101
LENGTH = 41
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def rope(**settings):
    return {"rope_parameters": {"rope_theta": 2e4, **settings}}


MODELS = {
    "llama": ("llama", {"num_key_value_heads": 6}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_linear": ("llama", rope(rope_type="linear", factor=3.0)),
    "llama_dynamic": (
        "llama",
        rope(rope_type="dynamic", factor=2.0) | {"max_position_embeddings": 24},
    ),
    "llama_llama3": (
        "llama",
        rope(
            rope_type="llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama_yarn": (
        "llama",
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=20.0),
    ),
    "llama_longrope": (
        "llama",
        rope(
            rope_type="longrope",
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[1.0, 2.0, 3.0, 4.0],
            factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral_full": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3_biased": ("qwen3", {"head_dim": 12, "attention_bias": True}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 1,
        },
    ),
}


def tokens():
    return np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)


@functools.cache
def random_model(name):
    """A torch model whose every parameter is random, norms and biases included."""
    model_type, settings = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | settings))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def torch_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(tokens()).long(), use_cache=False).logits.numpy()


def jax_logits(config, params):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(Decoder(config).apply)({"params": params}, tokens()).logits)


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_in_both_directions(name, tmp_path):
    model = random_model(name)
    expected = torch_logits(model)
    model.save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    np.testing.assert_allclose(jax_logits(config, params), expected, atol=2e-4)

    save_hf(tmp_path / "ours", config, params)
    reloaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert reloaded.dtype == torch.float32
    np.testing.assert_allclose(torch_logits(reloaded.eval()), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_small_shards_load_in_transformers(name, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    config, params = load_hf(tmp_path / "theirs")
    save_hf(tmp_path / "ours", config, params, max_shard_size=60_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    np.testing.assert_allclose(torch_logits(reloaded.eval()), torch_logits(model), atol=1e-6)


def test_bfloat16_tensors_are_the_same_bits(tmp_path):
    model = random_model("qwen3")
    half = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    assert config.param_dtype == "bfloat16"
    save_hf(tmp_path / "ours", config, params)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.bfloat16
    )
    original = half.state_dict()
    assert all(torch.equal(original[name], x) for name, x in reloaded.state_dict().items())


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-mixtral", "tiny-qwen3-moe"])
def test_our_own_models_load_in_transformers(name, tmp_path):
    config = preset(name, rope=RopeConfig(theta=1e5))
    variables = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    save_hf(tmp_path, config, variables["params"])
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    ours = jax_logits(*load_hf(tmp_path))
    np.testing.assert_allclose(ours, torch_logits(model.eval()), atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "qwen3_moe"])
def test_greedy_generation_agrees(name, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path)
    config, params = load_hf(tmp_path)
    prompts = tokens()[:, :9]
    with torch.no_grad():
        expected = model.generate(
            torch.from_numpy(prompts).long(), max_new_tokens=16, do_sample=False, pad_token_id=0
        )
    with jax.default_matmul_precision("highest"):
        out = generate(
            params,
            config,
            prompts,
            np.full(2, 9),
            max_new_tokens=16,
            sampling=SamplingConfig(temperature=0.0),
        )
    np.testing.assert_array_equal(out.tokens, expected[:, 9:].numpy())
