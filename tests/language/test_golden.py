"""The published families against numbers of `transformers` (tests/golden/decoder_lm)."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.language import Decoder, cross_entropy, init_cache, load_hf, rope_frequencies
from jaxeff.language.decoder import unstack_layers
from jaxeff.language.rope import rope_table

GOLDEN = Path(__file__).parents[1] / "golden" / "decoder_lm"
FAMILIES = ("llama", "llama_bias_tied_headdim", "qwen2", "qwen3", "mixtral", "qwen3_moe")
ROPES = ("linear", "dynamic", "yarn", "yarn_full", "llama3")
LAYOUTS = ("config.json", "config_legacy.json")


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def arrays(folder):
    with np.load(GOLDEN / folder / "golden.npz") as stored:
        return dict(stored)


@functools.cache
def family(folder):
    return load_hf(str(GOLDEN / folder), dtype="float32")


@functools.cache
def rope_variant(folder, layout, directory):
    """The RoPE folders share the weights of `llama`."""
    directory = Path(directory)
    shutil.copy(GOLDEN / "llama" / "model.safetensors", directory)
    shutil.copy(GOLDEN / folder / layout, directory / "config.json")
    return load_hf(str(directory), dtype="float32")


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("folder", FAMILIES)
def test_logits_and_hidden_states(folder):
    config, params = family(folder)
    golden = arrays(folder)
    out = jax.jit(functools.partial(Decoder(config).apply, return_hidden_states=True))(
        {"params": params}, jnp.asarray(golden["input_ids"])
    )
    assert out.logits.dtype == jnp.float32
    np.testing.assert_allclose(out.logits, golden["logits"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(out.hidden, golden["hidden_states"][-1], rtol=0, atol=2e-4)
    np.testing.assert_allclose(
        out.aux["hidden_states"], golden["hidden_states"], rtol=1e-5, atol=2e-4
    )


@pytest.mark.parametrize("folder", FAMILIES)
def test_loss_and_gradients(folder):
    config, params = family(folder)
    golden = arrays(folder)
    tokens = jnp.asarray(golden["input_ids"])

    def loss(params):
        out = Decoder(config).apply({"params": params}, tokens)
        total, weight = cross_entropy(out.logits[:, :-1], tokens[:, 1:])
        return total / weight

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(norm, golden["grad_global_norm"], rtol=2e-4)
    first = (gradients if "layers_0" in gradients else unstack_layers(gradients))["layers_0"]
    query = first["attention"]["q_proj"]["kernel"].T  # stored (out, in)
    assert relative(query, golden["grad_q_proj_layer0"]) < 2e-4
    assert relative(gradients["embed"]["embedding"], golden["grad_embed_tokens"]) < 2e-4
    assert relative(gradients["final_norm"]["scale"], golden["grad_final_norm"]) < 2e-4


@pytest.mark.parametrize("folder", FAMILIES)
def test_cache_holds_rotated_keys(folder):
    config, params = family(folder)
    golden = arrays(folder)
    cache = init_cache(config, batch=1, capacity=12)
    out = jax.jit(Decoder(config).apply)(
        {"params": params}, jnp.asarray(golden["input_ids"][:1, :7]), cache=cache
    )
    for found, expected in ((out.cache.k, "cache_k"), (out.cache.v, "cache_v")):
        written = found[:, 0, :7].swapaxes(1, 2)  # (L, K, 7, D)
        np.testing.assert_allclose(written, golden[expected], rtol=0, atol=1e-4)
        assert not np.any(found[:, 0, 7:])


@pytest.mark.parametrize("folder", FAMILIES)
def test_greedy_tokens(folder):
    """Both prompts in one ragged batch, one cached step at a time."""
    config, params = family(folder)
    golden = arrays(folder)
    prompts = [golden["prompt_0"][0], golden["prompt_1"][0]]
    lengths = jnp.asarray([len(prompt) for prompt in prompts])
    padded = np.zeros((2, max(map(len, prompts))), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt

    @jax.jit
    def forward(tokens, cache):
        return Decoder(config).apply({"params": params}, tokens, cache=cache)

    out = forward(jnp.asarray(padded), init_cache(config, 2, capacity=40))
    cache = out.cache.replace(lengths=lengths)
    tokens = jnp.argmax(out.logits[jnp.arange(2), lengths - 1], axis=-1)
    drawn = [tokens]
    for _ in range(23):
        out = forward(tokens[:, None], cache)
        cache, tokens = out.cache, jnp.argmax(out.logits[:, 0], axis=-1)
        drawn.append(tokens)
    expected = np.concatenate([golden["greedy_0"], golden["greedy_1"]])
    np.testing.assert_array_equal(np.stack(drawn, axis=1), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ROPES)
def test_rope_variants(variant, layout, tmp_path):
    folder = f"llama_rope_{variant}"
    config, params = rope_variant(folder, layout, str(tmp_path))
    golden = arrays(folder)
    tokens = jnp.asarray(golden["input_ids"])
    logits = jax.jit(Decoder(config).apply)({"params": params}, tokens).logits
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-4)

    length = tokens.shape[1]
    inv_freq, scaling = rope_frequencies(config.rope, config.resolved_head_dim, length)
    np.testing.assert_allclose(inv_freq, golden["inv_freq"], rtol=2e-6)
    np.testing.assert_allclose(scaling, golden["attention_scaling"], rtol=1e-6)
    tables = rope_table(jnp.arange(length), inv_freq, scaling)
    for table, name in zip(tables, ("cos", "sin"), strict=True):
        np.testing.assert_allclose(np.tile(table, 2), golden[name], rtol=0, atol=2e-5)
