"""One layer on the synthetic tasks: the model, what is scored, Newton against step by step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.data.synthetic_sequences import evaluation_batches
from jaxeff.tasks import load_experiment, make_task, make_trainer
from jaxeff.tasks.experiment import build_experiment
from jaxeff.tasks.synthetic_sequences import SequenceModel, SequenceModelConfig
from jaxeff.training import ConfigError, MeshConfig
from jaxeff.training.mesh import MeshPlacement, make_mesh
from jaxeff.trees import unbox

ONE = jax.devices()[:1]
ONE_LENGTH = {"eval_lengths": ()}

SMALL = {
    "task": "synthetic_sequences",
    "model": {"mixer": "gru", "width": 8},
    "data": {"task": "k_hop", "seq_len": 10, "batch_size": 8, "vocab_size": 4},
    "options": {"eval_lengths": (13,), "eval_sequences": 20},
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
    "training": {"num_steps": 4, "log_every": 2, "tensorboard": False, "progress": False},
}


def experiment(**changes):
    return build_experiment(
        "small",
        {k: v | changes.get(k, {}) for k, v in SMALL.items() if k != "task"}
        | {"task": SMALL["task"]},
    )


def task_and_params(**changes):
    task = make_task(experiment(**changes))
    batch = jax.tree.map(jnp.asarray, next(task.train_iterator(0, 1)))
    params = jax.jit(lambda key: unbox(task.init(key, batch)[0]))(jax.random.key(0))
    return task, params, batch


def place():
    return MeshPlacement.for_batch(make_mesh(MeshConfig(), ONE), 8)


def enlarged(params, factor):
    """The same parameters with recurrent weights that Newton's method finds hard."""
    mixer = params["mixer"]
    return {**params, "mixer": {**mixer, "a": mixer["a"] + factor, "b": 4 * mixer["b"]}}


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, vocab_size, published",
    [
        ("keep_nth", 128, (19.8e3, 20.0e3)),
        ("mqar", 128, (32.7e3, 32.8e3)),
        ("k_hop", 10, (17.6e3, 17.7e3)),
        ("2_hop", 5, (17.0e3, 17.1e3)),
    ],
)
def test_the_models_have_the_published_sizes(name, vocab_size, published):
    model = load_experiment(f"pararnn_synthetic:{name}").model
    tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    for mixer, expected in zip(("gru", "lstm"), published, strict=True):
        module = SequenceModel(dataclasses.replace(model, mixer=mixer), vocab_size)
        params = jax.eval_shape(module.init, jax.random.key(0), tokens)
        size = sum(x.size for x in jax.tree.leaves(params))
        assert size == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "mixer, block",
    [("gru", "gated"), ("lstm", "bare"), ("linear", "gated"), ("attention", "bare")],
)
def test_a_logit_depends_on_the_tokens_so_far(mixer, block):
    config = SequenceModelConfig(mixer=mixer, block=block, width=8, num_heads=2, positional=True)
    model = SequenceModel(config, 5)
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 5)
    variables = jax.jit(model.init)(jax.random.key(1), tokens)
    run = jax.jit(model.apply)
    logits, mixed = run(variables, tokens)
    assert logits.shape == (2, 7, 5) and mixed.shape == (2, 7, 8)
    changed, _ = run(variables, tokens.at[:, 3].set((tokens[:, 3] + 1) % 5))
    moved = np.abs(changed - logits).max(axis=(0, 2))
    assert moved[:3].max() < 1e-6 and moved[3:].min() > 1e-6


def test_only_positions_make_a_bare_recurrence_tell_the_order_of_equal_tokens():
    """The same token forever leads to the same state; with positions it does not."""
    tokens = jnp.ones((1, 400), jnp.int32)

    def last_two(positional):
        config = SequenceModelConfig(mixer="gru", width=8, positional=positional)
        model = SequenceModel(config, 3)
        variables = jax.jit(model.init)(jax.random.key(1), tokens)
        return jax.jit(model.apply)(variables, tokens)[0][0, -2:]

    np.testing.assert_allclose(*last_two(False), atol=1e-5)
    assert np.abs(np.diff(last_two(True), axis=0)).max() > 1e-4


# --- what is scored -------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_targets_alone():
    task, params, batch = task_and_params()
    loss, aux = jax.jit(task.loss)(params, {}, batch, jax.random.key(0), 0)
    logits, _ = jax.jit(task.model.apply)({"params": params}, batch["tokens"])
    logits = np.asarray(logits, np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taken = np.take_along_axis(logs, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    there = np.asarray(batch["loss_mask"]) > 0
    assert 0 < there.sum() < there.size and float(aux.weight) == there.sum()
    assert float(loss) == pytest.approx(-taken[there].mean(), rel=1e-5)
    right = logits.argmax(-1) == np.asarray(batch["targets"])
    assert float(aux.metrics["accuracy"]) == pytest.approx(right[there].mean())
    assert 0 <= float(aux.metrics["newton_residual"]) < 1e-2


@pytest.mark.parametrize("mixer", ["gru", "linear"])
def test_accuracies_are_over_all_targets_and_over_the_last_of_each_sequence(mixer):
    task, params, _ = task_and_params(model={"mixer": mixer})
    metrics, run = task.evaluate(params, {}, place()), jax.jit(task.model.apply)
    for length in (10, 13):
        right, last = [], []
        for batch in evaluation_batches(task.data, 20, length):
            answers = np.argmax(run({"params": params}, batch["tokens"])[0], -1)
            for row, given, mask in zip(answers, batch["targets"], batch["loss_mask"]):
                marks = [bool(a == g) for a, g, m in zip(row, given, mask) if m]
                right += marks
                last += marks[-1:]
        assert len(last) == 20
        assert metrics[f"accuracy_{length}"] == pytest.approx(np.mean(right))
        assert metrics[f"last_accuracy_{length}"] == pytest.approx(np.mean(last))
    assert ("max_recurrent_weight" in metrics) == (mixer == "gru")


@pytest.mark.parametrize("mixer", ["gru", pytest.param("lstm", marks=pytest.mark.slow)])
def test_the_same_weights_step_by_step_are_scored_beside_newtons(mixer):
    task, params, _ = task_and_params(
        model={"mixer": mixer, "newton": {"num_iterations": 9}}, options=ONE_LENGTH
    )
    exact = task.evaluate(params, {}, place())
    assert exact["state_difference_10"] < 1e-5
    assert exact["sequential_accuracy_10"] == exact["accuracy_10"]
    assert exact["max_recurrent_weight"] == pytest.approx(np.abs(params["mixer"]["a"]).max())

    rough = make_task(
        experiment(model={"mixer": mixer, "newton": {"num_iterations": 1}}, options=ONE_LENGTH)
    )
    hard = enlarged(params, 3.0)
    metrics = rough.evaluate(hard, {}, place())
    assert metrics["state_difference_10"] > 1e-2
    stepwise = make_task(
        experiment(model={"mixer": mixer, "method": "sequential"}, options=ONE_LENGTH)
    )
    expected = stepwise.evaluate(hard, {}, place())
    assert expected["state_difference_10"] == 0
    for name in ("accuracy_10", "last_accuracy_10"):
        assert metrics[f"sequential_{name}"] == expected[name]


def test_the_iterations_reported_are_the_first_that_suffice():
    task, params, batch = task_and_params()
    params, tokens = enlarged(params, 2.0), batch["tokens"]
    diagnosis = jax.jit(task.diagnose)(params, tokens)
    count = int(diagnosis.convergence.iterations)
    assert 3 < count < 10

    def outputs(**model):
        other = make_task(experiment(model=model)).model
        return jax.jit(other.apply)({"params": params}, tokens)[1]

    exact = outputs(method="sequential")
    enough, few = (outputs(newton={"num_iterations": n}) for n in (count, count - 1))
    assert np.abs(enough - exact).max() <= 1e-5 < np.abs(few - exact).max()


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_clips_the_recurrent_weights_and_reports(tmp_path):
    small = experiment(model={"max_recurrent_weight": 0.05})
    task = make_task(small)
    result = make_trainer(small, task=task, devices=ONE).fit(tmp_path)
    assert 0.04 < result.evaluation["max_recurrent_weight"] <= 0.05 + 1e-6
    assert make_task(experiment()).final_transform() is None
    text = task.report(result.state.params, result.evaluation)
    assert "length 10: " in text and "length 13: " in text and "step by step" in text
    assert "largest recurrent weight 0.05" in text
    assert "at initialisation" in text and "trained with 3" in text
    without = task.report(None, result.evaluation)
    assert "at initialisation" not in without and "at the end" in without


def test_a_baseline_reports_accuracies_alone(tmp_path):
    small = experiment(model={"mixer": "attention", "width": 4}, options=ONE_LENGTH)
    task = make_task(small)
    result = make_trainer(small, task=task, devices=ONE).fit(tmp_path)
    assert set(result.evaluation) == {"accuracy_10", "last_accuracy_10"}
    text = task.report(result.state.params, result.evaluation)
    assert text.startswith("length 10: ") and "\n" not in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"mixer": "gur"}}, "config.model.mixer.* is 'gur'"),
        ({"model": {"num_heads": 3}}, "model.num_heads is 3; expected a divisor of model.width=8"),
        ({"model": {"max_recurrent_weight": 0.0}}, "model.max_recurrent_weight is 0.0"),
        ({"data": {"task": "hop"}}, "task is 'hop'"),
        ({"options": {"eval_sequences": 0}}, "options.eval_sequences is 0"),
        ({"options": {"eval_lengths": (0,)}}, "options.eval_lengths"),
    ],
)
def test_bad_settings_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        experiment(**changes)


def test_a_length_too_short_for_the_task_is_refused_before_training():
    data = {"task": "mqar", "num_pairs": 2}
    task = make_task(experiment(data=data, options={"eval_lengths": (5,)}))
    with pytest.raises(ConfigError, match=r"config.data: num_pairs is 2; expected 1 to 1"):
        task.train_iterator(0, 1)


# --- the claim ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parity_is_learnt_through_newton_and_by_no_linear_recurrence(tmp_path):
    """Shortened from the config: right on lengths seen and beyond, and the same step by step."""

    def run(mixer):
        short = {"model.mixer": mixer, "training.num_steps": "800", "options.eval_lengths": "(64,)"}
        parity = load_experiment("pararnn_parity", short)
        return make_trainer(parity, devices=ONE).fit(tmp_path / mixer).evaluation

    nonlinear, linear = run("gru"), run("linear")
    for length in (32, 64):
        for name in ("accuracy", "last_accuracy"):
            assert nonlinear[f"{name}_{length}"] == 1.0
            assert nonlinear[f"sequential_{name}_{length}"] == 1.0
        assert nonlinear[f"state_difference_{length}"] < 1e-2
        assert 0.4 < linear[f"last_accuracy_{length}"] < 0.6
        assert linear[f"accuracy_{length}"] < 0.65
    # Weights above 1 are what parity needs, and what three iterations are not enough for.
    assert nonlinear["max_recurrent_weight"] > 1 and nonlinear["newton_iterations"] > 3
