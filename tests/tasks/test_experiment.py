"""Experiments: shipped configs resolve, unknown keys are refused, sections have their types."""

import json

import pytest

from jaxeff.tasks import load_experiment, make_task
from jaxeff.tasks.experiment import build_experiment, shipped_configs, task_module
from jaxeff.training import ConfigError

LANGUAGE_MODELS = ("lm_stdlib", "lm_moe", "lm_1b", "lm_8b")
RECURRENT = ("pararnn_stdlib", "pararnn_7b")
SYNTHETIC = ("pararnn_parity", "pararnn_synthetic")
CONFIGS = (*LANGUAGE_MODELS, *RECURRENT, *SYNTHETIC, "bleu_translate")


def test_every_shipped_config_is_known_here_and_says_what_it_is():
    shipped = shipped_configs()
    assert {path.rsplit("/", 1)[1] for path in shipped} == {f"{name}.py" for name in CONFIGS}
    assert all(len(summary) > 20 for summary in shipped.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_resolves_and_survives_json(name):
    experiment = load_experiment(name)
    model_type = task_module(experiment.task).MODEL
    assert experiment.name == name and isinstance(experiment.model, model_type)
    values = json.loads(json.dumps(experiment.to_dict()))
    assert build_experiment(name, values) == experiment
    spec = make_task(experiment).batch_spec()
    assert all(x.shape[0] == experiment.data.batch_size for x in spec.values())
    if name in LANGUAGE_MODELS + RECURRENT:
        assert spec["tokens"].shape == (experiment.data.batch_size, experiment.data.seq_len)


def test_the_8b_config_is_llama_3_8b():
    task = make_task(load_experiment("lm_8b"))
    from jaxeff.language import count_parameters

    assert count_parameters(task.model) == 8_030_261_248


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"training.num_step": "5"}, "'config.training.num_step'; did you mean 'num_steps'"),
        ({"trainig.num_steps": "5"}, "'config.trainig'; did you mean 'training'"),
        ({"model.hiden_size": "5"}, "did you mean 'hidden_size'"),
        ({"data.batchsize": "5"}, "did you mean 'batch_size'"),
        ({"model.num_heads": "3"}, "num_heads=3 must be a multiple of num_kv_heads=4"),
        ({"training.num_steps": "many"}, "'config.training.num_steps' is 'many'"),
        ({"task": "langage_model"}, "did you mean 'language_model'"),
    ],
)
def test_bad_overrides_are_refused_by_name(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment("lm_stdlib", overrides)


def test_a_misspelt_key_in_a_config_file_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    return {'training': {'log_evry': 1.0}}\n")
    with pytest.raises(ConfigError, match=r"'config.training.log_evry'.*'log_every'"):
        load_experiment(file)
    file.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="defines no get_config"):
        load_experiment(file)
    with pytest.raises(ConfigError, match="'lm_stdlb' does not exist; did you mean 'lm_stdlib'"):
        load_experiment("lm_stdlb")


def test_a_config_file_can_take_an_argument(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def get_config(size='4'):\n"
        "    model = dict(vocab_size=259, hidden_size=8 * int(size), intermediate_size=16,\n"
        "                 num_layers=1, num_heads=2, num_kv_heads=1)\n"
        "    return {'model': model, 'seed': 5}\n"
    )
    assert load_experiment(file).model.hidden_size == 32
    assert load_experiment(f"{file}:8").model.hidden_size == 64


def test_optional_sections_can_be_opened_from_the_command_line():
    overrides = {"model.moe.num_experts": "4", "model.rope.theta": "5e5", "model.qk_norm": "True"}
    model = load_experiment("lm_stdlib", overrides).model
    assert model.moe.num_experts == 4 and model.rope.theta == 5e5 and model.qk_norm
