"""Training on sentence BLEU: the estimator, samples and rewards, the run."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.data.synthetic_translation import EOS_ID, PAD_ID, SEPARATOR_ID
from jaxeff.metrics.bleu import sentence_bleu
from jaxeff.tasks import load_experiment, make_task, make_trainer
from jaxeff.tasks.experiment import build_experiment
from jaxeff.tasks.sequence_reward import (
    Samples,
    best_of_n_weights,
    leave_one_out_advantages,
    nltk_rewards,
    policy_gradient_loss,
)
from jaxeff.training import ConfigError, MeshConfig
from jaxeff.training.mesh import MeshPlacement
from jaxeff.trees import unbox

ONE = jax.devices()[:1]

SMALL = {
    "task": "sequence_reward",
    "model": {
        "vocab_size": 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "max_position_embeddings": 16,
        "dtype": "float32",
    },
    "data": {
        "num_words": 5, "min_length": 2, "max_length": 4, "batch_size": 8, "heldout_sentences": 12
    },
    "options": {"samples_per_prompt": 4, "num_examples": 2, "entropy_bonus": 0.01},
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
    "training": {"num_steps": 4, "log_every": 2, "eval_every": 4},
    "checkpoint": {"every": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def experiment():
    return build_experiment("small", SMALL)


@pytest.fixture(scope="module")
def task(experiment):
    return make_task(experiment)


@pytest.fixture(scope="module")
def batch(task):
    return jax.tree.map(jnp.asarray, next(task.train_iterator(0, 1)))


@pytest.fixture(scope="module")
def params(task, batch):
    return unbox(task.init(jax.random.key(0), batch)[0])


# --- the estimator --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [2, 3])
def test_the_expected_gradient_is_that_of_the_expected_reward(num_samples):
    """By enumeration of all that four outcomes can give in a few draws."""
    theta, rewards = jnp.array([0.3, -1.0, 0.5, 0.1]), jnp.array([0.0, 1.0, 0.2, -2.0])
    exact = jax.grad(lambda t: -jnp.sum(jax.nn.softmax(t) * rewards))(theta)
    draws = jnp.array(list(itertools.product(range(4), repeat=num_samples)))
    chances = jnp.prod(jax.nn.softmax(theta)[draws], axis=-1)

    def gradient(draw):
        weights = leave_one_out_advantages(rewards[draw])
        return jax.grad(lambda t: policy_gradient_loss(jax.nn.log_softmax(t)[draw], weights))(theta)

    expected = jnp.einsum("d,dt->t", chances, jax.vmap(gradient)(draws))
    np.testing.assert_allclose(expected, exact, atol=1e-6)


def test_the_baseline_is_the_mean_of_the_others():
    advantages = leave_one_out_advantages(jnp.array([[1.0, 2.0, 6.0], [1.0, 1.0, 1.0]]))
    np.testing.assert_allclose(advantages, [[-3.0, -1.5, 4.5], [0, 0, 0]])


def test_best_of_n_takes_the_best_where_there_is_one():
    weights = best_of_n_weights(jnp.array([[0.1, 0.9, 0.3], [0.5, 0.5, 0.5], [0.7, 0.7, 0.0]]))
    np.testing.assert_array_equal(weights, [[0, 3, 0], [0, 0, 0], [3, 0, 0]])


# --- samples and rewards --------------------------------------------------------------------------


def test_logprobs_are_those_the_samples_were_drawn_with(task, params, batch):
    from jaxeff.language import SamplingConfig, generate

    prompts = batch["prompts"]
    output = generate(
        params, task.model, prompts, jnp.full(8, 5), max_new_tokens=5, key=jax.random.key(3),
        sampling=SamplingConfig(temperature=1.0), eos_ids=(EOS_ID,), pad_id=PAD_ID,
    )  # fmt: skip
    samples = task.sample(params, prompts, 1.0, jax.random.key(3))
    np.testing.assert_array_equal(samples.tokens, output.tokens)
    logprobs, _ = task.logprobs(params, prompts, samples)
    np.testing.assert_allclose(logprobs, output.logprobs.sum(-1), rtol=1e-5)


def test_the_reward_is_the_bleu_of_the_words_before_the_end(task, batch):
    references, lengths = batch["references"], batch["lengths"]
    places = jnp.arange(5)
    perfect = jnp.pad(references, ((0, 0), (0, 1)))
    perfect = jnp.where(places == lengths[:, None], EOS_ID, perfect)
    samples = Samples(perfect, lengths + 1)
    expected = sentence_bleu(
        references, references, smoothing="floor",
        candidate_lengths=lengths, reference_lengths=lengths,
    )  # fmt: skip
    np.testing.assert_allclose(task.rewards(samples, batch), expected, rtol=1e-6)
    # Padding drawn as a word is a wrong word and not the end.
    worse = Samples(jnp.where(places == 1, PAD_ID, perfect), lengths + 1)
    assert (task.rewards(worse, batch) < expected).all()
    # What comes after the end does not count.
    beyond = jnp.where(places > lengths[:, None], SEPARATOR_ID, perfect)
    np.testing.assert_allclose(task.rewards(Samples(beyond, lengths + 1), batch), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("smoothing", ["none", "floor", "add-k", "exp"])
def test_nltk_on_the_host_gives_the_same_rewards(experiment, batch, smoothing):
    """What the closing report times beside the reward is the same work."""
    options = dataclasses.replace(experiment.options, smoothing=smoothing)
    task = make_task(dataclasses.replace(experiment, options=options))
    repeated = {name: jnp.repeat(x, 8, axis=0) for name, x in batch.items()}
    rng = np.random.default_rng(0)
    # 0 to 5 words, the references' with some replaced; those of 5 have no room for the end.
    words = np.pad(repeated["references"], ((0, 0), (0, 1)), constant_values=4)
    words = np.where(rng.random(words.shape) < 0.3, rng.integers(3, 8, words.shape), words)
    num_words = rng.integers(0, 6, (64, 1))
    tokens = np.where(np.arange(5) < num_words, words, PAD_ID)
    np.put_along_axis(tokens, np.minimum(num_words, 4), np.where(num_words < 5, EOS_ID, 3), axis=1)
    samples = Samples(jnp.asarray(tokens), jnp.asarray(np.minimum(num_words[:, 0] + 1, 5)))
    expected = nltk_rewards(samples, repeated, smoothing)
    assert len(set(expected)) > 2 and max(expected) > 0
    np.testing.assert_allclose(task.rewards(samples, repeated), expected, atol=2e-6)


def test_one_compiled_step_samples_scores_and_learns(task, experiment):
    trainer = make_trainer(experiment, task=task, devices=ONE)
    text = trainer.lower_step().as_text()
    assert "callback" not in text
    assert "while" in text


def test_the_loss_does_not_depend_on_the_devices(experiment, task, params, batch):
    def loss(params, batch):
        return task.loss(params, {}, batch, jax.random.key(5), jnp.int32(0))[0]

    alone = jax.jit(jax.value_and_grad(loss))(params, batch)
    trainer = make_trainer(dataclasses.replace(experiment, mesh=MeshConfig(data=8)), task=task)
    place = MeshPlacement.for_batch(trainer.mesh, 8)
    with jax.set_mesh(trainer.mesh):
        together = jax.jit(jax.value_and_grad(loss))(params, place(jax.device_get(batch)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, together)


def test_the_entropy_bonus_rewards_variety(experiment, params, batch):
    def gradient(bonus):
        options = dataclasses.replace(experiment.options, entropy_bonus=bonus)
        task = make_task(dataclasses.replace(experiment, options=options))
        return jax.jit(
            lambda p: jax.grad(task.loss, has_aux=True)(p, {}, batch, jax.random.key(1), 0)[0]
        )(params)

    def entropy(params, task, samples):
        return jnp.sum(task.logprobs(params, batch["prompts"], samples)[1] * samples.mask)

    task = make_task(experiment)
    samples = task.sample(params, batch["prompts"], 1.0, jax.random.key(2))
    difference = jax.tree.map(lambda a, b: a - b, gradient(1.0), gradient(0.0))
    slope = jax.grad(entropy)(params, task, samples)
    # Descending the loss climbs the entropy.
    along = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(difference), jax.tree.leaves(slope)))
    assert along < 0


# --- the run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["reinforce", "best_of_n"])
def test_a_run_trains_evaluates_and_reports(experiment, objective, tmp_path):
    options = dataclasses.replace(experiment.options, objective=objective)
    run = dataclasses.replace(experiment, options=options)
    task = make_task(run)
    result = make_trainer(run, task=task, devices=ONE).fit(tmp_path, run.to_dict())
    assert set(result.evaluation) == {"sentence_bleu", "corpus_bleu", "exact_match"}
    assert all(0 <= value <= 1 for value in result.evaluation.values())
    report = task.report(result.state.params, result.evaluation)
    assert report.count(" -> ") == 2
    assert "reward of 32 samples" in report and "% of its step" in report
    assert 0 < task.reward_cost(result.state.params).share < 1


def test_an_interrupted_run_ends_as_an_uninterrupted_one(experiment, tmp_path):
    def run(steps, folder):
        # In micro-batches, each of which samples with a key of its own.
        training = dataclasses.replace(experiment.training, num_steps=steps, accumulation_steps=2)
        changed = dataclasses.replace(experiment, training=training)
        trainer = make_trainer(changed, devices=ONE)
        return trainer.fit(tmp_path / folder, changed.to_dict()).state.params

    straight = run(4, "straight")
    run(2, "parts")
    jax.tree.map(np.testing.assert_array_equal, run(4, "parts"), straight)


def test_evaluation_scores_each_heldout_sentence_once(task, params):
    place = MeshPlacement.for_batch(make_trainer_mesh(), 8)
    evaluation = task.evaluate(params, {}, place)
    scores, exact = [], []
    for batch in task.heldout():
        real = batch["lengths"] > 0
        samples = task.sample(params, jnp.asarray(batch["prompts"]), 0.0)
        words = jnp.where(real, samples.num_words, 0)
        bleu = sentence_bleu(
            samples.tokens, batch["references"], smoothing="floor",
            candidate_lengths=words, reference_lengths=batch["lengths"],
        )  # fmt: skip
        scores += np.asarray(bleu)[real].tolist()
        exact += [
            np.array_equal(t[: n + 1], [*r[:n], EOS_ID])
            for t, r, n in zip(samples.tokens, batch["references"], batch["lengths"])
            if n
        ]
    assert len(scores) == 12
    assert evaluation["sentence_bleu"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert evaluation["exact_match"] == pytest.approx(np.mean(exact))


def make_trainer_mesh():
    return make_trainer(build_experiment("small", SMALL), devices=ONE).mesh


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_translation_is_learnt_from_the_reward_alone(seed, tmp_path):
    experiment = load_experiment("bleu_translate", {"seed": str(seed)})
    training = dataclasses.replace(experiment.training, eval_every=500)
    experiment = dataclasses.replace(experiment, training=training)
    task = make_task(experiment)
    trainer = make_trainer(experiment, task=task, devices=ONE)
    start = unbox(trainer.init_state().params)
    place = MeshPlacement.for_batch(trainer.mesh, experiment.data.batch_size)
    assert task.evaluate(start, {}, place)["sentence_bleu"] < 0.1
    result = trainer.fit(tmp_path, experiment.to_dict())
    assert result.evaluation["sentence_bleu"] > 0.9
    assert task.reward_cost(result.state.params).share < 0.05


@pytest.mark.parametrize(
    "section, changes, message",
    [
        ("options", {"samples_per_prompt": 1}, "samples_per_prompt is 1"),
        ("options", {"temperature": 0.0}, "temperature is 0.0"),
        ("options", {"objective": "ppo"}, "objective"),
        ("options", {"smoothing": "flor"}, "smoothing' is 'flor'; expected one of 'none', 'floor'"),
        ("model", {"vocab_size": 7}, "vocab_size is 7; expected at least 8"),
    ],
)
def test_impossible_settings_are_named(section, changes, message):
    values = SMALL | {section: SMALL[section] | changes}
    with pytest.raises(ConfigError, match=message):
        make_task(build_experiment("small", values))
