"""Checkpoints: verified when read, the one before a damaged one is used, parameters alone."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import assert_bit_equal, make_trainer

from jaxeff.training import CheckpointConfig, CheckpointError, Checkpoints, restore_params
from jaxeff.training.checkpoints import manifest, steps_in

EVERY_FIVE = {"every": 5, "keep": 10}


def data_files(directory):
    """The files that hold array data, largest first."""
    files = [f for f in Path(directory).rglob("*") if f.is_file() and "/d/" in str(f)]
    assert files
    return sorted(files, key=lambda f: -f.stat().st_size)


def truncate(directory):
    for file in data_files(directory):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_bits(directory):
    for file in data_files(directory):
        content = bytearray(file.read_bytes())
        middle = len(content) // 2
        content[middle] ^= 0xFF
        file.write_bytes(bytes(content))


def remove_manifest(directory):
    (directory / "manifest" / "metadata").unlink()


def garble_json(directory):
    (directory / "data" / "metadata").write_text("{ not json")


@pytest.mark.parametrize("damage", [truncate, flip_bits, remove_manifest, garble_json])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_is_used(
    tmp_path, damage, caplog
):
    make_trainer(steps=15, checkpoint=EVERY_FIVE).fit(tmp_path / "a")
    damage(tmp_path / "a" / "checkpoints" / "15")
    resumed = make_trainer(steps=20, checkpoint=EVERY_FIVE).fit(tmp_path / "a")
    assert "checkpoint of step 15 is damaged" in caplog.text
    straight = make_trainer(steps=20, checkpoint=EVERY_FIVE).fit(tmp_path / "b")
    assert_bit_equal(straight.state, resumed.state)
    assert steps_in(tmp_path / "a" / "checkpoints") == [5, 10, 15, 20]
    assert (tmp_path / "a" / "corrupt_checkpoints" / "15").is_dir()


def test_when_every_checkpoint_is_damaged_the_run_does_not_silently_start_again(tmp_path):
    make_trainer(steps=5).fit(tmp_path)
    truncate(tmp_path / "checkpoints" / "5")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[5\]"):
        make_trainer(steps=10).fit(tmp_path)


def test_keep_and_keep_every(tmp_path):
    checkpoint = {"every": 2, "keep": 2, "keep_every": 6}
    make_trainer(steps=16, checkpoint=checkpoint).fit(tmp_path)
    assert steps_in(tmp_path / "checkpoints") == [6, 12, 14, 16]


def test_snapshots_are_raw_parameters_in_a_window(tmp_path):
    checkpoint = {"every": 0, "snapshot_every": 3, "snapshot_keep": 4}
    make_trainer(steps=20, checkpoint=checkpoint).fit(tmp_path / "a")
    assert steps_in(tmp_path / "a" / "snapshots") == [9, 12, 15, 18]
    snapshot = restore_params(tmp_path / "a", 12, snapshots=True)
    other = make_trainer(steps=12).fit(tmp_path / "b")
    assert_bit_equal(other.state.params, snapshot)


def test_params_alone_are_restored_from_the_newest_whole_checkpoint(tmp_path, caplog):
    result = make_trainer(steps=10, checkpoint=EVERY_FIVE).fit(tmp_path)
    assert_bit_equal(result.state.params, restore_params(tmp_path))
    truncate(tmp_path / "checkpoints" / "10" / "params")
    restored = restore_params(tmp_path)
    assert "is damaged" in caplog.text
    assert_bit_equal(restore_params(tmp_path, 5), restored)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        restore_params(tmp_path, 7)
    with pytest.raises(CheckpointError, match="no checkpoint under"):
        restore_params(tmp_path / "empty")


def test_params_are_restored_onto_given_shardings(tmp_path):
    result = make_trainer(steps=3).fit(tmp_path)
    mesh = jax.make_mesh((8,), ("x",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda _: spec, result.state.params)
    restored = restore_params(tmp_path, shardings=shardings)
    assert restored["up"]["kernel"].sharding == spec
    assert_bit_equal(result.state.params, restored)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool", "float8_e4m3fn"]
)
def test_a_fingerprint_sees_every_change_and_no_sharding(dtype):
    values = np.arange(64).reshape(8, 8) % 11 % 7
    x = jnp.asarray(values).astype(dtype)
    base = manifest({"x": x})["x"]["sum"]
    mesh = jax.make_mesh((8,), ("x",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    assert manifest({"x": jax.device_put(x, spec)})["x"]["sum"] == base
    for other in (x[::-1], x.T, x.at[3, 3].set(jnp.asarray(not values[3, 3]).astype(x.dtype))):
        assert manifest({"x": other})["x"]["sum"] != base


def test_saving_in_the_background_keeps_the_values_of_the_step_saved(tmp_path):
    """The state is donated to the next step while its checkpoint is still being written."""
    checkpoint = {"every": 1, "keep": 60}
    make_trainer(steps=50, checkpoint=checkpoint).fit(tmp_path)
    for step in (1, 13, 27, 49):
        restore_params(tmp_path, step)  # verifies the fingerprints


def test_a_disk_that_fills_up_ends_the_run_with_the_last_checkpoint_intact(tmp_path):
    script = textwrap.dedent(
        """
        import resource, signal, sys, time
        sys.path[:0] = sys.argv[2:]
        from test_loop import make_trainer
        from toy import RegressionTask
        from jaxeff.training import CheckpointError

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        class Filling(RegressionTask):
            def evaluate(self, params, extra, place):
                time.sleep(3)  # until the checkpoint before is on disk
                # From the first evaluation on no file may grow beyond 40 kB.
                resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
                return {"loss": 0.0}

        trainer = make_trainer(Filling(hidden=4096), steps=60, eval_every=15,
                               checkpoint={"every": 10, "keep": 9})
        try:
            trainer.fit(sys.argv[1])
        except CheckpointError as error:
            print("REFUSED", error)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent), os.getcwd()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "REFUSED could not write the checkpoint" in done.stdout, done.stdout + done.stderr
    assert "step 10 is intact" in done.stdout
    restore_params(tmp_path, 10)


@pytest.mark.slow
def test_kill_at_any_moment_then_restart_equals_an_uninterrupted_run(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        sys.path[:0] = sys.argv[2:]
        from test_loop import make_trainer
        make_trainer(steps=400, checkpoint={"every": 3, "keep": 2}).fit(sys.argv[1])
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    command += [str(Path(__file__).parent), os.getcwd()]
    rng = np.random.default_rng(0)
    for _ in range(5):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        start = steps_in(tmp_path / "a" / "checkpoints")[-1:]
        while steps_in(tmp_path / "a" / "checkpoints")[-1:] == start:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.3)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    reached = steps_in(tmp_path / "a" / "checkpoints")[-1]
    end = reached + 10
    resumed = make_trainer(steps=end).fit(tmp_path / "a")
    straight = make_trainer(steps=end).fit(tmp_path / "b")
    assert_bit_equal(straight.state, resumed.state)


def test_the_config_is_in_every_checkpoint(tmp_path):
    trainer = make_trainer(steps=3)
    trainer.fit(tmp_path, {"seed": 3, "model": {"hidden": 16}})
    file = tmp_path / "checkpoints" / "3" / "config" / "metadata"
    assert json.loads(file.read_text()) == {"seed": 3, "model": {"hidden": 16}}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), {})
    assert checkpoints.all_steps() == [3]
    checkpoints.close()
