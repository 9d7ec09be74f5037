"""python -m jaxeff.train: flags, errors, resume, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxeff import train
from jaxeff.training import ConfigError
from jaxeff.training.trackers import read_metrics


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config on a corpus of its own."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "corpus").mkdir()
    for index in range(30):
        (folder / "corpus" / f"{index}.txt").write_text(f"line {index} of text\n" * (20 + index))
    file = folder / "small.py"
    file.write_text(
        f"""
def get_config():
    return {{
        "model": dict(vocab_size=259, hidden_size=16, intermediate_size=32, num_layers=1,
                      num_heads=2, num_kv_heads=2, dtype="float32", max_position_embeddings=16),
        "data": dict(corpus={str(folder / "corpus")!r}, seq_len=16, batch_size=8, eval_batches=2,
                     heldout_fraction=0.3),
        "training": dict(num_steps=6, log_every=2),
        "options": dict(sample_tokens=4),
    }}
"""
    )
    return file


def test_list_names_the_shipped_configs(capsys):
    assert train.main(["--list"]) == 0
    assert re.search(r"^lm_stdlib +Byte-level decoder", capsys.readouterr().out, re.M)


def test_help_explains_overrides(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--workdir" in text and "--config.training.num_steps=500" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--confg", "x"], "unknown argument '--confg'; did you mean 'config'"),
        ([], "--config is required"),
    ],
)
def test_wrong_flags_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.training.num_step=3", "did you mean 'num_steps'"),
        ("--config.data.corpus=/does/not/exist", "does not exist"),
        ("--config.mesh.tensor=3", "devices"),
        ("--config.data.seq_len=100000", "longer than"),
    ],
)
def test_mistakes_end_with_a_message_and_status_1(config, argument, message, capsys, tmp_path):
    status = train.main(["--config", str(config), "--workdir", str(tmp_path / "w"), argument])
    assert status == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_overrides_with_and_without_an_equals_sign():
    arguments = ["--config", "x", "--config.a.b=1=2", "--config.c", "3", "--workdir", "w"]
    assert train.split_overrides(arguments) == (
        {"a.b": "1=2", "c": "3"},
        ["--config", "x", "--workdir", "w"],
    )
    with pytest.raises(ConfigError, match="needs a value"):
        train.split_overrides(["--config.a"])


def test_a_run_and_its_continuation(config, tmp_path, capsys):
    command = ["--config", str(config), "--workdir", str(tmp_path)]
    command += ["--config.mesh.data=8"]
    assert train.main(command) == 0
    out = capsys.readouterr().out
    assert "held-out bits per byte" in out and "sample:" in out
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["training"]["num_steps"] == 6 and saved["mesh"]["data"] == 8
    assert train.main([*command, "--config.training.num_steps=10"]) == 0
    steps = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == [2, 4, 6, 8, 10]
    assert json.loads((tmp_path / "config.json").read_text())["training"]["num_steps"] == 10


def test_without_workdir_a_run_gets_a_directory_of_its_own(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--config", str(config), "--config.training.num_steps=1"]
    assert train.main(command) == 0
    (directory,) = (tmp_path / "runs" / "small").iterdir()
    assert (directory / "metrics.jsonl").exists()


def test_sigterm_saves_and_exits_with_status_0(config, tmp_path):
    command = [sys.executable, "-m", "jaxeff.train", "--config", str(config)]
    command += ["--workdir", str(tmp_path / "run"), "--config.training.num_steps=1000000"]
    environment = os.environ | {"XLA_FLAGS": ""}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    step = int(re.search(r"stopped at step (\d+)", output)[1])
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
