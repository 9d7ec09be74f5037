"""Warped distributions match the golden data; the limits of every setting hold."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.language.sampling import SamplingConfig, draw, warp_logits

GOLDEN = Path(__file__).parents[1] / "golden" / "decoder_lm" / "sampling.npz"
CASES = {
    "p_temp_0p7": SamplingConfig(temperature=0.7),
    "p_topk_5": SamplingConfig(top_k=5),
    "p_topp_0p9": SamplingConfig(top_p=0.9),
    "p_minp_0p1": SamplingConfig(min_p=0.1),
    "p_temp1p3_topk20_topp0p8": SamplingConfig(temperature=1.3, top_k=20, top_p=0.8),
}


def probabilities(logits, sampling):
    return np.asarray(jax.nn.softmax(warp_logits(jnp.asarray(logits), sampling), axis=-1))


@pytest.mark.parametrize("name", CASES)
def test_golden_distributions(name):
    golden = np.load(GOLDEN)
    ours, expected = probabilities(golden["logits"], CASES[name]), golden[name]
    np.testing.assert_allclose(ours[[0, 2, 3]], expected[[0, 2, 3]], atol=1e-6, rtol=0)
    # Row 1 has equal logits: which of them survive is a tie-break, how many is not.
    assert np.count_nonzero(ours[1]) == np.count_nonzero(expected[1])
    np.testing.assert_allclose(ours[1].max(), expected[1].max(), atol=1e-6)


def test_default_settings_change_nothing():
    logits = jax.random.normal(jax.random.key(0), (3, 11))
    np.testing.assert_array_equal(warp_logits(logits, SamplingConfig()), logits)


def test_top_k_keeps_ties_with_the_kth():
    logits = jnp.array([3.0, 1.0, 2.0, 2.0, 0.0])
    kept = jnp.isfinite(warp_logits(logits, SamplingConfig(top_k=2)))
    assert kept.tolist() == [True, False, True, True, False]


def test_top_k_beyond_the_vocabulary_is_off():
    logits = jnp.arange(4.0)
    np.testing.assert_array_equal(warp_logits(logits, SamplingConfig(top_k=9)), logits)


def test_tiny_top_p_keeps_the_best_token_only():
    kept = jnp.isfinite(warp_logits(jnp.array([0.0, 2.0, 2.0]), SamplingConfig(top_p=1e-6)))
    assert kept.tolist() == [False, True, False]


def test_top_p_keeps_the_token_that_crosses_the_mass():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    kept = jnp.isfinite(warp_logits(logits, SamplingConfig(top_p=0.6)))
    assert kept.tolist() == [True, True, False, False]


def test_min_p_is_relative_to_the_best():
    logits = jnp.log(jnp.array([0.6, 0.29, 0.07, 0.04]))
    kept = jnp.isfinite(warp_logits(logits, SamplingConfig(min_p=0.1)))
    assert kept.tolist() == [True, True, True, False]
    assert jnp.isfinite(warp_logits(logits, SamplingConfig(min_p=1.0))).sum() == 1


@pytest.mark.parametrize("temperature", [0.0, 9e-6])
def test_greedy_is_a_point_mass_on_the_first_best(temperature):
    sampling = SamplingConfig(temperature=temperature)
    assert sampling.greedy
    p = probabilities([[1.0, 4.0, 4.0, -jnp.inf]], sampling)
    assert p.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert not SamplingConfig(temperature=1e-5).greedy


def test_half_precision_logits_are_warped_in_float32():
    logits = jnp.array([1.0, 2.0, 3.0], jnp.bfloat16)
    assert warp_logits(logits, SamplingConfig(top_p=0.5)).dtype == jnp.float32


def test_warping_works_under_jit_and_vmap():
    logits = jax.random.normal(jax.random.key(1), (4, 5, 17))
    sampling = SamplingConfig(0.8, top_k=9, top_p=0.9, min_p=0.05)
    expected = warp_logits(logits, sampling)
    mapped = jax.jit(jax.vmap(lambda x: warp_logits(x, sampling)))(logits)
    np.testing.assert_array_equal(mapped, expected)


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
    keys = jax.random.split(jax.random.key(2), 20000)
    tokens = jax.vmap(lambda key: draw(key, logits, greedy=False))(keys)
    frequencies = np.bincount(tokens, minlength=3) / len(keys)
    np.testing.assert_allclose(frequencies, [0.1, 0.6, 0.3], atol=0.015)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
    ],
)
def test_values_outside_their_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        SamplingConfig(**{field: value})
