"""Two processes with two devices each train, save together, and match one process."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from test_loop import make_trainer

from jaxeff.training import ConfigError, MeshConfig, restore_params
from jaxeff.training.distributed import initialize
from jaxeff.training.trackers import read_metrics

SCRIPT = textwrap.dedent(
    """
    import sys
    sys.path[:0] = sys.argv[4:]
    from jaxeff.training.distributed import initialize
    initialize(sys.argv[1], 2, int(sys.argv[2]))
    import jax
    from jaxeff.training import MeshConfig
    from test_loop import make_trainer
    assert jax.process_count() == 2 and jax.device_count() == 4
    mesh = MeshConfig(data=2, fsdp=2)
    trainer = make_trainer(steps=20, devices=jax.devices(), mesh=mesh, checkpoint={"every": 10})
    result = trainer.fit(sys.argv[3])
    print("ENDED", int(result.state.step), result.stopped)
    """
)


def run_together(workdir):
    """Starts both processes and returns their outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", SCRIPT, address, str(index), str(workdir)),
                *(str(Path(__file__).parent), os.getcwd()),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    return [process.communicate(timeout=300)[0] for process in processes]


def test_two_processes_train_save_and_match_one(tmp_path):
    outputs = run_together(tmp_path / "two")
    assert all("ENDED 20 False" in output for output in outputs), "\n".join(outputs)
    one = make_trainer(steps=20, devices=jax.devices()[:4], mesh=MeshConfig(data=2, fsdp=2)).fit(
        tmp_path / "one"
    )
    two = restore_params(tmp_path / "two")
    for x, y in zip(jax.tree.leaves(one.state.params), jax.tree.leaves(two)):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-6)
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)

    # One process goes on where two left off.
    more = make_trainer(steps=25, devices=jax.devices()[:1]).fit(tmp_path / "two")
    straight = make_trainer(steps=25, devices=jax.devices()[:1]).fit(tmp_path / "straight")
    for x, y in zip(jax.tree.leaves(straight.state), jax.tree.leaves(more.state)):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-6)


def test_incomplete_addresses_are_refused(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    initialize()  # nothing given: one process
    with pytest.raises(ConfigError, match="process_id not given"):
        initialize("localhost:1234", num_processes=2)
