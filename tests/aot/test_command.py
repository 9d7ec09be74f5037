"""python -m jaxeff.aot: sizes a real config, and refuses what cannot work."""

import json

import pytest

from jaxeff.aot import environment
from jaxeff.aot.__main__ import DOES_NOT_FIT, main

SMALL = [
    "--config",
    "lm_stdlib",
    "--config.model.num_layers=2",
    "--config.data.batch_size=8",
    "--config.data.seq_len=128",
]


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
def test_a_config_is_sized_for_a_slice(tpu, tmp_path, capsys):
    path = tmp_path / "report.json"
    arguments = [*SMALL, "--target", "v5e:2x2", "--json", str(path)]
    arguments += ["--config.mesh.data=2", "--config.mesh.tensor=2", "--config.model.vocab_size=260"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for line in (
        "train step of lm_stdlib for v5e:2x2 (TPU v5e)",
        "data 2 x tensor 2",
        "memory per device",
        "fits, with room for",
        "least time of a step",
        "MFU bound",
        "all-reduce",
        "splash_mha_fwd",
    ):
        assert line in text
    report = json.loads(path.read_text())
    run = report["run"]
    assert run["mesh"] == {"data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}
    assert run["tokens"] == 8 * 128
    # Arguments are the state and the batch, and little else.
    parts = run["params_bytes"] + run["optimizer_bytes"] + run["batch_bytes"]
    assert report["memory"]["arguments"] == pytest.approx(parts, rel=0.05)
    assert 0.7 < report["flops"]["matmul_all_devices"] / run["six_n_d"] < 2
    assert 0 < report["roofline"]["mfu_bound"] <= 1
    assert {k["schedule"]["grid_steps"] for k in report["kernels"]} != {0}


@pytest.mark.cuda_compile
def test_a_config_is_sized_for_a_gpu_and_the_report_printed_as_json(cuda, capsys):
    assert main([*SMALL, "--target", "h100", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["devices"] == 1 and report["memory"]["fits"]
    assert report["flops"]["matmul_all_devices"] > 0


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
def test_a_run_that_does_not_fit_exits_with_its_own_status(tpu, capsys):
    # Splash attention keeps activations small; the logits of whole vocabularies do not fit.
    arguments = [
        *SMALL,
        "--target",
        "v5e",
        "--config.data.batch_size=4096",
        "--config.options.loss_chunk_size=524288",
        "--config.model.vocab_size=32768",
    ]
    assert main(arguments) == DOES_NOT_FIT
    assert "DOES NOT FIT, too much by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "v5x:2x2"], "unknown chip 'v5x'"),
        (
            ["--target", "v5e:2x2", "--config.mesh.fsdp=3", "--config.mesh.data=1"],
            "needs 3 devices; there are 4",
        ),
        (["--target", "v5e:2x2", "--config.mesh.tensr=2"], "did you mean 'tensor'"),
        (["--target", "v5e:2x2", "--config.data.batch_size=6"], "does not divide over the mesh"),
    ],
)
def test_mistakes_end_with_a_message(tpu, capsys, arguments, message):
    assert main([*SMALL, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_missing_compiler_ends_with_the_line_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(environment, "has_tpu_compiler", lambda: False)
    assert main([*SMALL, "--target", "v5e:2x2"]) == 1
    assert 'pip install "jaxeff[aot]"' in capsys.readouterr().err


def test_an_unknown_argument_is_refused(capsys, tpu):
    with pytest.raises(SystemExit):
        main([*SMALL, "--target", "v5e", "--taget", "v6e"])
    assert "unknown argument '--taget'" in capsys.readouterr().err
