"""Rotary embedding: what rotation must preserve, and where the variants bend."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.language import DecoderConfig, RopeConfig, apply_rope, rerotate, rope_frequencies

SIZES = {
    "vocab_size": 7,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 2,
}


def random(*shape, seed=0, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def test_pairs_are_the_two_halves_rotated_by_position_times_frequency():
    x, positions = random(1, 5, 1, 6), jnp.asarray([[0, 1, 2, 7, 100]])
    inv_freq, _ = rope_frequencies(RopeConfig(), 6)
    np.testing.assert_allclose(inv_freq, [1, 10000 ** (-1 / 3), 10000 ** (-2 / 3)], rtol=1e-6)
    angles = np.asarray(positions[0])[:, None] * inv_freq
    pairs = np.asarray(x[0, :, 0, :3]) + 1j * np.asarray(x[0, :, 0, 3:])
    rotated = pairs * np.exp(1j * angles)
    found = apply_rope(x, positions, inv_freq)[0, :, 0]
    np.testing.assert_allclose(found[:, :3], rotated.real, atol=1e-5)
    np.testing.assert_allclose(found[:, 3:], rotated.imag, atol=1e-5)


def test_scores_depend_on_distances_only():
    q, k = random(1, 8, 2, 16), random(1, 8, 2, 16, seed=1)
    inv_freq, _ = rope_frequencies(RopeConfig(), 16)

    def scores(offset):
        positions = offset + jnp.arange(8)[None]
        rotated = (apply_rope(a, positions, inv_freq) for a in (q, k))
        return jnp.einsum("bthd,bshd->bhts", *rotated)

    np.testing.assert_allclose(scores(0), scores(1000), atol=2e-3)


def test_angles_are_float32_even_for_bfloat16():
    """In bfloat16 position 4097 would round to 4096."""
    x = jnp.ones((1, 1, 1, 64), jnp.bfloat16)
    inv_freq, _ = rope_frequencies(RopeConfig(), 64)
    out = apply_rope(x, jnp.asarray([[4097]]), inv_freq)
    exact = apply_rope(x.astype(jnp.float32), jnp.asarray([[4097]]), inv_freq)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2e-2)


def test_scaling_multiplies_the_rotated_vector():
    x, positions = random(1, 4, 1, 8), jnp.arange(4)[None]
    inv_freq, _ = rope_frequencies(RopeConfig(), 8)
    plain, scaled = (apply_rope(x, positions, inv_freq, s) for s in (1.0, 1.3))
    np.testing.assert_allclose(scaled, 1.3 * plain, rtol=1e-6)


def test_linear_divides_positions():
    plain, _ = rope_frequencies(RopeConfig(), 8)
    scaled, _ = rope_frequencies(RopeConfig("linear", factor=4.0), 8)
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)


def test_dynamic_bends_only_beyond_the_trained_length():
    rope = RopeConfig("dynamic", factor=2.0, max_position_embeddings=64)
    plain, _ = rope_frequencies(RopeConfig(), 8)
    for length in (None, 10, 64):
        np.testing.assert_allclose(rope_frequencies(rope, 8, length)[0], plain, rtol=1e-6)
    theta = 10000 * (2 * 128 / 64 - 1) ** (8 / 6)
    expected, _ = rope_frequencies(RopeConfig(theta=theta), 8)
    np.testing.assert_allclose(rope_frequencies(rope, 8, 128)[0], expected, rtol=1e-6)


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    rope = RopeConfig("llama3", theta=5e5, factor=8.0, original_max_position_embeddings=8192)
    plain, _ = rope_frequencies(RopeConfig(theta=5e5), 128)
    bent, scaling = rope_frequencies(rope, 128)
    waves = 2 * math.pi / plain
    assert scaling == 1.0
    np.testing.assert_array_equal(bent[waves < 8192 / 4], plain[waves < 8192 / 4])
    np.testing.assert_allclose(bent[waves > 8192], plain[waves > 8192] / 8, rtol=1e-6)
    between = (waves > 8192 / 4) & (waves < 8192)
    assert np.all((bent[between] < plain[between]) & (bent[between] > plain[between] / 8))


def test_yarn_scales_attention_by_the_log_of_the_factor():
    rope = RopeConfig("yarn", factor=4.0, original_max_position_embeddings=32)
    assert rope_frequencies(rope, 8)[1] == pytest.approx(0.1 * math.log(4) + 1)
    given = dataclasses.replace(rope, attention_factor=1.5)
    assert rope_frequencies(given, 8)[1] == 1.5
    assert rope_frequencies(dataclasses.replace(rope, factor=1.0), 8)[1] == 1.0


def test_longrope_chooses_its_list_by_length():
    rope = RopeConfig(
        "longrope",
        original_max_position_embeddings=32,
        max_position_embeddings=128,
        short_factor=(1.0, 2.0),
        long_factor=(4.0, 8.0),
    )
    plain, _ = rope_frequencies(RopeConfig(), 4)
    short, scaling = rope_frequencies(rope, 4, 32)
    long, _ = rope_frequencies(rope, 4, 33)
    np.testing.assert_allclose(short, plain / [1, 2], rtol=1e-6)
    np.testing.assert_allclose(long, plain / [4, 8], rtol=1e-6)
    assert scaling == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))


@pytest.mark.parametrize("rope", [RopeConfig(), RopeConfig("yarn", factor=4.0)])
def test_rerotated_keys_equal_keys_rotated_at_the_new_position(rope):
    rope = dataclasses.replace(rope, max_position_embeddings=32)
    keys, old = random(2, 6, 2, 8), jnp.arange(6)[None]
    inv_freq, scaling = rope_frequencies(rope, 8)
    at_old = apply_rope(keys, old, inv_freq, scaling)
    for delta in (17, -3, jnp.asarray([[5], [-2]])):
        expected = apply_rope(keys, old + delta, inv_freq, scaling)
        found = rerotate(at_old, delta, inv_freq, rope=rope)
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_dynamic_keys_cannot_be_rerotated():
    rope = RopeConfig("dynamic", factor=2.0, max_position_embeddings=64)
    with pytest.raises(ValueError, match="dynamic"):
        rerotate(random(1, 2, 1, 8), 3, rope_frequencies(rope, 8)[0], rope=rope)


def test_the_decoders_context_length_reaches_the_variants_that_need_it():
    config = DecoderConfig(**SIZES, rope=RopeConfig("dynamic"), max_position_embeddings=77)
    assert config.rope.max_position_embeddings == 77


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_type": "ntk"}, "rope_type='ntk'"),
        ({"theta": 0.0}, "theta=0.0"),
        ({"factor": -1.0}, "factor=-1.0"),
        ({"rope_type": "llama3"}, "original_max_position_embeddings"),
        ({"rope_type": "longrope"}, "short_factor"),
    ],
)
def test_wrong_settings_are_named(fields, named):
    with pytest.raises(ValueError, match=named):
        RopeConfig(**fields)


def test_odd_heads_and_missing_lengths_are_refused():
    with pytest.raises(ValueError, match="head_dim=7"):
        rope_frequencies(RopeConfig(), 7)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        rope_frequencies(RopeConfig("dynamic"), 8)
