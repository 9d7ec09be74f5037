"""Sentence BLEU of samples: where a sample ends, and what of it is the candidate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.metrics.bleu import bleu_reward, sentence_bleu

EOS = 9
LENGTH = 8


@functools.cache
def rewarder(**options):
    return jax.jit(functools.partial(bleu_reward, method="pairwise", **options))


@jax.jit
def score(candidates, candidate_lengths, references, reference_lengths):
    return sentence_bleu(
        candidates,
        references,
        smoothing="floor",
        candidate_lengths=candidate_lengths,
        reference_lengths=reference_lengths,
        method="pairwise",
    )


def padded(rows, fill=0):
    return np.array([row + [fill] * (LENGTH - len(row)) for row in rows])


def expected(candidates, references):
    """The scores of ragged lists of ids."""
    arguments = []
    for rows in (candidates, references):
        arguments += [padded(rows), np.array(list(map(len, rows)))]
    return score(*arguments)


REFERENCES = [[1, 2, 3, 4, 5], [5, 4, 3], [1, 1, 2], [2]]
SAMPLES = [
    [1, 2, 3, 4, 9, 5, 9, 1],
    [9, 5, 4, 3, 5, 4, 3, 2],
    [1, 1, 2, 0, 0, 0, 0, 0],
    [2, 9, 9, 2, 2, 2, 2, 2],
]


def test_the_first_eos_ends_the_candidate_and_is_not_of_it():
    rewards = rewarder(eos_id=EOS)(np.array(SAMPLES), padded(REFERENCES))
    candidates = [[1, 2, 3, 4], [], [1, 1, 2], [2]]
    np.testing.assert_array_equal(rewards, expected(candidates, REFERENCES))
    assert rewards.dtype == jnp.float32
    assert float(rewards[1]) == 0 < float(rewards[0]) < 1


def test_eos_can_be_of_the_candidate():
    references = [[*row, EOS] for row in REFERENCES]
    rewards = rewarder(eos_id=EOS, include_eos=True)(np.array(SAMPLES), padded(references))
    candidates = [[1, 2, 3, 4, 9], [9], [1, 1, 2], [2, 9]]
    np.testing.assert_array_equal(rewards, expected(candidates, references))


def test_without_an_eos_id_nothing_but_padding_ends_the_candidate():
    rewards = rewarder()(np.array(SAMPLES), padded(REFERENCES))
    candidates = [SAMPLES[0], SAMPLES[1], [1, 1, 2], SAMPLES[3]]
    np.testing.assert_array_equal(rewards, expected(candidates, REFERENCES))


def test_the_candidate_is_what_the_mask_leaves_closed_up():
    """A prompt in front, a hole in the middle; where a mask is given the pad id is a token."""
    samples = np.array([[7, 7, 1, 2, 8, 3, 4, 9], [0, 1, 0, 9, 1, 1, 1, 1], SAMPLES[0], [3] * 8])
    mask = np.array([[0, 0, 1, 1, 0, 1, 1, 1], [1] * 8, [1, 1, 1, 1, 0, 1, 1, 1], [0] * 8])
    references = [[1, 2, 3, 4, 5], [1, 1], [1, 2, 3, 4, 5], [3]]
    candidates = [[1, 2, 3, 4], [0, 1, 0], [1, 2, 3, 4, 5], []]
    for kind in (bool, np.float32):
        rewards = rewarder(eos_id=EOS)(samples, padded(references), mask.astype(kind))
        np.testing.assert_array_equal(rewards, expected(candidates, references))
    assert float(rewards[2]) == 1


def test_with_reference_lengths_the_pad_id_is_a_token_of_references():
    references = np.array([[0, 0, 3, 0]])
    samples, mask = np.array([[0, 0, 3, 9]]), np.ones((1, 4), bool)
    reward = rewarder(eos_id=EOS, weights=(1,))
    lengths = np.array([3])
    np.testing.assert_allclose(reward(samples, references, mask, reference_lengths=lengths), 1)
    without = reward(samples, references, mask)
    np.testing.assert_allclose(without, 1 / 3, rtol=1e-6)


def test_any_number_of_samples_shares_one_compiled_step_with_its_loss():
    """REINFORCE's surrogate: the reward weighs log probabilities, and has no gradient itself."""
    references = padded(REFERENCES)[:, None]  # one reference of each prompt
    logits, noise = np.random.default_rng(0).gumbel(size=(2, 4, 3, LENGTH, 10))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def surrogate(logits):
        samples = jnp.argmax(logits + noise, axis=-1)
        spread = jnp.broadcast_to(references[:, None], (4, 3, 1, LENGTH))
        rewards = bleu_reward(samples, spread, eos_id=EOS)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), samples[..., None], -1)[..., 0]
        return jnp.sum(rewards * chosen.sum(-1)), (samples, rewards)

    gradient, (samples, rewards) = surrogate(logits)
    assert rewards.shape == (4, 3) and np.any(rewards > 0)
    one_hot = jax.nn.one_hot(samples, 10) - jax.nn.softmax(logits)
    np.testing.assert_allclose(gradient, rewards[..., None, None] * one_hot, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"mask": np.ones((4, 7))}, r"mask \(4, 7\) must have the shape of samples \(4, 8\)"),
        ({"samples": np.ones((4, 8))}, "samples has dtype float.*expected integers"),
        ({"references": np.ones((3, 8), int)}, r"references \(3, 1, 8\)"),
        ({"reference_lengths": [9] * 4}, "reference_lengths range from 9 to 9, expected 0 to 8"),
        ({"smoothing": "nltk9"}, "smoothing='nltk9' is not one of"),
        ({"weights": ()}, "weights are empty"),
    ],
)
def test_what_cannot_work_is_refused(changes, complaint):
    arguments = {"samples": np.array(SAMPLES), "references": padded(REFERENCES)} | changes
    with pytest.raises(ValueError, match=complaint):
        bleu_reward(**arguments)
