"""The recurrent language model's task: training, its bounds, resuming, the command lines."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.aot.__main__ import main as aot
from jaxeff.generate import Settings, complete, load_run
from jaxeff.language import SamplingConfig
from jaxeff.recurrent import count_parameters
from jaxeff.tasks import load_experiment, make_task, make_trainer
from jaxeff.training import ConfigError, MeshConfig

ONE = jax.devices()[:1]

CONFIG = """
def get_config():
    return {{
        "task": "recurrent_language_model",
        "seed": 1,
        "model": dict(vocab_size=264, hidden_size=32, intermediate_size=64, num_layers=2,
                      num_heads=2, dtype="float32", max_recurrent_weight=0.2),
        "data": dict(corpus={corpus!r}, seq_len=32, batch_size=8, eval_batches=3,
                     heldout_fraction=0.3),
        "optimizer": dict(learning_rate=2e-2, schedule="constant"),
        "training": dict(num_steps=20, log_every=5, eval_every=10),
        "checkpoint": dict(every=10),
        "options": dict(sample_tokens=8, z_loss=1e-4),
    }}
"""


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def config_file(corpus, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "recurrent.py"
    file.write_text(CONFIG.format(corpus=str(corpus)))
    return file


@pytest.fixture(scope="module")
def run(config_file, tmp_path_factory):
    """A run of 20 steps: its experiment, task, result and directory."""
    workdir = tmp_path_factory.mktemp("run")
    experiment = load_experiment(config_file)
    task = make_task(experiment)
    trainer = make_trainer(experiment, task=task, devices=ONE)
    return experiment, task, trainer.fit(workdir, experiment.to_dict()), workdir


def test_a_short_run_learns_and_its_states_are_solved_for(run):
    _, task, result, workdir = run
    # 259 equally likely symbols cost 8.02 bits.
    assert result.evaluation["bits_per_byte"] < 3.5
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    residuals = [r["newton_residual"] for r in records if r["kind"] == "train"]
    assert len(residuals) == 4 and max(residuals) < 1e-4
    report = task.report(result.state.params, result.evaluation)
    assert report.partition("sample:\n")[2].startswith("def ")


def test_recurrent_weights_stay_in_their_bound(run, config_file, tmp_path):
    def largest(params):
        found = [
            jnp.abs(x).max()
            for path, x in jax.tree_util.tree_leaves_with_path(params)
            if path[-1].key == "a"
        ]
        return float(max(found))

    assert largest(run[2].state.params) == pytest.approx(0.2, abs=1e-6)
    free = load_experiment(config_file, {"model.max_recurrent_weight": "None"})
    assert make_task(free).final_transform() is None
    assert largest(make_trainer(free, devices=ONE).fit(tmp_path).state.params) > 0.21


def test_the_run_can_be_continued_as_text(run):
    _, task, result, workdir = run
    model = load_run(workdir)
    assert model.config == task.model and model.longest is None
    greedy = Settings(8, SamplingConfig(temperature=0.0))
    [text] = complete(model, ["alpha be"], greedy)
    tokens = jnp.asarray([[task.tokenizer.bos_id, *b"alpha be"]])
    logits = task.decoder.apply({"params": result.state.params}, tokens).logits
    assert text.startswith(chr(int(jnp.argmax(logits[0, -1]))))


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(run, config_file, tmp_path):
    half = load_experiment(config_file, {"training.num_steps": "10"})
    make_trainer(half, devices=ONE).fit(tmp_path, half.to_dict())
    experiment = run[0]
    resumed = make_trainer(experiment, devices=ONE).fit(tmp_path, experiment.to_dict())
    for x, y in zip(leaves(resumed.state.params), leaves(run[2].state.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_fine_tuning_starts_from_another_run_and_from_nothing_else(run, config_file, tmp_path):
    experiment, _, result, workdir = run
    options = dataclasses.replace(experiment.options, init_from=str(workdir))
    start = make_trainer(dataclasses.replace(experiment, options=options), devices=ONE).init_state()
    for x, y in zip(leaves(start.params), leaves(result.state.params), strict=True):
        np.testing.assert_array_equal(x, y)
    wrong = load_experiment(config_file, {"options.init_from": str(tmp_path)})
    with pytest.raises(ConfigError, match="not the workdir of a run"):
        make_trainer(wrong, devices=ONE).init_state()


@pytest.mark.slow
def test_eight_devices_train_like_one(config_file, tmp_path):
    # Adam's first steps would show the sign of gradients that are zero but for rounding.
    experiment = load_experiment(config_file, {"training.num_steps": "3", "optimizer.name": "sgd"})
    one = make_trainer(experiment, devices=ONE).fit(tmp_path / "one")
    split = dataclasses.replace(experiment, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    many = make_trainer(split, devices=jax.devices()[:8]).fit(tmp_path / "many")
    for x, y in zip(leaves(one.state.params), leaves(many.state.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=5e-5)


def test_only_dense_matrices_are_labelled_for_muon(run):
    _, task, result, _ = run
    labels = jax.tree_util.tree_leaves_with_path(task.param_labels(result.state.params))
    found = {path[-2].key for path, label in labels if label == "matrix"}
    expected = {"in_proj", "gate_proj", "out_proj", "up_proj", "down_proj"}
    assert found == expected


def test_heads_that_a_mesh_cannot_split_are_refused(config_file):
    experiment = load_experiment(config_file)
    split = dataclasses.replace(experiment, mesh=MeshConfig(data=2, tensor=4))
    with pytest.raises(ConfigError, match="heads"):
        make_trainer(split, devices=jax.devices()[:8])


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
def test_the_7b_config_fits_a_slice_of_64_chips(tpu, capsys):
    task = make_task(load_experiment("pararnn_7b"))
    assert count_parameters(task.model) == pytest.approx(6.757e9, rel=1e-3)
    assert aot(["--config", "pararnn_7b", "--target", "v5p:4x4x4"]) == 0
    text = capsys.readouterr().out
    assert "fits, with room for" in text
    assert "fused_gru" in text and "fused_gru_adjoint" in text


@pytest.mark.slow
def test_training_through_newton_is_training_step_by_step(tmp_path):
    """The shipped experiment, shortened: three iterations, and curves within 1 %."""

    def curve(method):
        changes = {"training.num_steps": "80", "optimizer.warmup_steps": "10"}
        changes |= {"model.method": method, "data.eval_batches": "4"}
        experiment = load_experiment("pararnn_stdlib", changes)
        assert experiment.model.newton.num_iterations == 3
        result = make_trainer(experiment, devices=ONE).fit(tmp_path / method)
        lines = (tmp_path / method / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses = [r["loss"] for r in records if r["kind"] == "train"]
        return np.asarray([*losses, result.evaluation["loss"]])

    newton, sequential = curve("newton"), curve("sequential")
    assert newton[-1] < 2.2  # nats a byte; 5.5 before the first step
    np.testing.assert_allclose(newton, sequential, rtol=0.01)
