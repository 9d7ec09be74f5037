"""The language-model task: loss, evaluation, sharding, accumulation, sample."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.language import Decoder, cross_entropy, save_hf
from jaxeff.tasks import load_experiment, make_task, make_trainer
from jaxeff.training import CheckpointError, ConfigError, MeshConfig
from jaxeff.training.mesh import MeshPlacement, make_mesh
from jaxeff.trees import unbox

ONE = jax.devices()[:1]


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def experiment(config_file):
    return load_experiment(config_file)


@pytest.fixture(scope="module")
def task(experiment):
    return make_task(experiment)


def test_the_loss_is_the_token_weighted_mean_over_unmasked_targets(task):
    batch = next(task.train_iterator(0, 1))
    params, extra = task.init(jax.random.key(0), batch)
    params = unbox(params)
    loss, aux = task.loss(params, extra, batch, jax.random.key(1), 0)
    output = Decoder(task.model).apply(
        {"params": params},
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
    )
    log_probs = np.asarray(jax.nn.log_softmax(output.logits), np.float64)
    chosen = np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    expected = -(chosen * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(aux.weight) == batch["loss_mask"].sum()


def test_the_chunked_loss_equals_the_whole_one(task, experiment):
    options = dataclasses.replace(experiment.options, loss_chunk_size=64)
    chunked = make_task(dataclasses.replace(experiment, options=options))
    batch = next(task.train_iterator(0, 1))
    params, extra = task.init(jax.random.key(0), batch)
    params = unbox(params)

    def grad(task):
        return jax.value_and_grad(lambda p: task.loss(p, extra, batch, jax.random.key(1), 0)[0])(
            params
        )

    for x, y in zip(leaves(grad(task)), leaves(grad(chunked))):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_evaluation_is_over_the_held_out_text_in_bits_per_byte(task):
    batch = next(task.train_iterator(0, 1))
    params = unbox(task.init(jax.random.key(0), batch)[0])
    place = MeshPlacement.for_batch(make_mesh(MeshConfig(), ONE), 8)
    result = task.evaluate(params, {}, place)
    total = weight = 0.0
    for rows in task._eval_batches():
        logits = task.decoder.apply(
            {"params": params},
            rows["tokens"],
            positions=rows["positions"],
            segment_ids=rows["segment_ids"],
        ).logits
        loss, count = cross_entropy(logits, jnp.asarray(rows["targets"]), rows["loss_mask"])
        total, weight = total + float(loss), weight + float(count)
    assert result["loss"] == pytest.approx(total / weight, rel=1e-5)
    bits = result["loss"] / math.log(2) / task.streams[1].bytes_per_target
    assert result["bits_per_byte"] == pytest.approx(bits)


def test_a_short_run_beats_nothing_and_reports(task, experiment, tmp_path):
    trainer = make_trainer(experiment, task=task, devices=ONE)
    result = trainer.fit(tmp_path, experiment.to_dict())
    # 259 equally likely symbols cost 8.02 bits.
    assert result.evaluation["bits_per_byte"] < 4
    report = task.report(result.state.params, result.evaluation)
    assert "held-out bits per byte" in report and "order-2 byte n-gram" in report
    assert report.partition("sample:\n")[2].startswith("def ")


@pytest.mark.parametrize(
    "mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "context": 2, "tensor": 2}]
)
def test_eight_devices_train_like_one(task, experiment, tmp_path, mesh):
    """One key/value head over tensor=2 is replicated; everything else is split."""
    training = dataclasses.replace(experiment.training, num_steps=4, eval_every=0)
    experiment = dataclasses.replace(experiment, training=training)
    one = make_trainer(experiment, task=task, devices=ONE).fit(tmp_path / "one")
    split = dataclasses.replace(experiment, mesh=MeshConfig(**mesh))
    trainer = make_trainer(split, task=make_task(split), devices=jax.devices()[:8])
    many = trainer.fit(tmp_path / "many")
    assert many.evaluation["loss"] == pytest.approx(one.evaluation["loss"], rel=1e-5)
    for x, y in zip(leaves(one.state.params), leaves(many.state.params)):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_parameters_and_moments_are_split_over_devices(experiment):
    mesh = MeshConfig(data=1, fsdp=4, tensor=2)
    trainer = make_trainer(dataclasses.replace(experiment, mesh=mesh), devices=jax.devices()[:8])
    state = trainer.init_state()
    total = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    local = sum(
        x.addressable_shards[0].data.nbytes
        for x in jax.tree.leaves((state.params, state.opt_state))
    )
    assert local < 1.3 * total / 8
    text = trainer.lower_step().compile().as_text()
    assert "all-reduce" in text or "reduce-scatter" in text
    assert "all-gather" in text


def test_experts_over_devices_train_like_one(config_file, tmp_path):
    overrides = {
        "model.moe.num_experts": "4",
        "model.moe.intermediate_size": "32",
        "training.num_steps": "3",
    }
    one = load_experiment(config_file, overrides)
    result = make_trainer(one, devices=ONE).fit(tmp_path / "one")
    many = dataclasses.replace(one, mesh=MeshConfig(data=2, expert=4))
    sharded = make_trainer(many, devices=jax.devices()[:8]).fit(tmp_path / "many")
    for x, y in zip(leaves(result.state.params), leaves(sharded.state.params)):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(experiment):
    model = dataclasses.replace(experiment.model, vocab_size=256)
    with pytest.raises(ConfigError, match="vocab_size is 256; expected at least 259"):
        _ = make_task(dataclasses.replace(experiment, model=model)).streams


def test_muon_trains_the_matrices_and_adam_the_rest(config_file, tmp_path):
    overrides = {"optimizer.name": "muon", "training.num_steps": "10"}
    experiment = load_experiment(config_file, overrides)
    trainer = make_trainer(experiment, devices=ONE)
    labels = trainer.task.param_labels(trainer.abstract_state.params)
    assert labels["layers"]["mlp"]["up_proj"]["kernel"] == "matrix"
    assert labels["layers"]["input_norm"]["scale"] == "other"
    assert labels["embed"]["embedding"] == labels["lm_head"]["kernel"] == "other"
    result = trainer.fit(tmp_path)
    assert result.evaluation["bits_per_byte"] < 5


@pytest.mark.parametrize("source", ["run", "hugging_face"])
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_run_starts_from_given_parameters(experiment, tmp_path, source, mesh):
    result = make_trainer(experiment, devices=ONE).fit(tmp_path / "run")
    if source == "hugging_face":
        save_hf(tmp_path / "hugging_face", experiment.model, result.state.params)
    options = dataclasses.replace(experiment.options, init_from=str(tmp_path / source))
    training = dataclasses.replace(experiment.training, ema_rates=(0.9,))
    tuned = dataclasses.replace(
        experiment, options=options, training=training, mesh=MeshConfig(**mesh)
    )
    state = make_trainer(tuned, devices=jax.devices()[: 8 if mesh else 1]).init_state()
    for x, y in zip(leaves(result.state.params), leaves(state.params)):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(leaves(result.state.params), leaves(state.ema["0.9"])):
        np.testing.assert_array_equal(x, y)
    assert int(state.step) == 0


def test_parameters_of_another_shape_are_refused(config_file, tmp_path):
    small = load_experiment(config_file, {"training.num_steps": "1"})
    make_trainer(small, devices=ONE).fit(tmp_path)
    overrides = {"model.intermediate_size": "96", "options.init_from": str(tmp_path)}
    with pytest.raises(CheckpointError, match="down_proj/kernel is float32"):
        make_trainer(load_experiment(config_file, overrides), devices=ONE).init_state()
    overrides = {"options.init_from": str(tmp_path / "nothing")}
    with pytest.raises(ConfigError, match="init_from: no checkpoint folder"):
        make_trainer(load_experiment(config_file, overrides), devices=ONE).init_state()
