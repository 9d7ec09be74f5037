"""Checkpoints: written in the background, verified when read, restored onto any mesh.

``<workdir>/checkpoints/<step>/`` holds the items ``params``, ``state`` (all else of the
``TrainState``), ``data`` (position of the data iterator), ``controller``, ``config`` and
``manifest`` (shape, dtype and fingerprint of every array). ``<workdir>/snapshots/<step>/`` holds
``params`` and ``manifest`` alone. Both are Orbax checkpoints; a directory gets its final name only
once complete, so a process killed at any moment leaves either a whole checkpoint or none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxeff.training.config import CheckpointConfig
from jaxeff.training.state import TrainState

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
CORRUPT = "corrupt_checkpoints"
CONFIG_FILE = "config.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which, and what is intact."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    step: int
    state: TrainState
    data: dict[str, Any]
    controller: dict[str, Any]


class Checkpoints:
    """Saves and restores one run.

    Args:
      workdir: directory of the run.
      config: how often and how many.
      run_config: the resolved config, stored in every checkpoint; JSON-able.
    """

    def __init__(
        self, workdir: str | os.PathLike, config: CheckpointConfig, run_config: Mapping[str, Any]
    ):
        self.workdir = Path(workdir).absolute()
        self.config = config
        self._run_config = dict(run_config)
        self._manager = self._make_manager(CHECKPOINTS, config.keep, config.keep_every)
        self._snapshots = None
        if config.snapshot_every:
            self._snapshots = self._make_manager(SNAPSHOTS, config.snapshot_keep, None)

    def _make_manager(self, name: str, keep: int | None, keep_every: int | None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            enable_async_checkpointing=self.config.asynchronous,
            cleanup_tmp_directories=True,
            step_format_fixed_length=None,
        )
        return ocp.CheckpointManager(self.workdir / name, options=options)

    def all_steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Mapping[str, Any], controller: Mapping[str, Any]):
        """Starts writing a checkpoint of ``state``; returns once the state may be donated again.

        Raises:
          CheckpointError: when this or an earlier background write failed.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        rest = state.replace(params=None)
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            state=ocp.args.StandardSave(rest),
            data=ocp.args.JsonSave(dict(data)),
            controller=ocp.args.JsonSave(dict(controller)),
            config=ocp.args.JsonSave(self._run_config),
            manifest=ocp.args.JsonSave(manifest({"params": state.params, "state": rest})),
        )
        with self.reporting(f"checkpoint of step {step}"):
            self._manager.save(step, args=args)

    def save_snapshot(self, step: int, params: Any):
        """Starts writing a raw parameter snapshot."""
        if self._snapshots is None or step in self._snapshots.all_steps():
            return
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            manifest=ocp.args.JsonSave(manifest({"params": params})),
        )
        with self.reporting(f"snapshot of step {step}"):
            self._snapshots.save(step, args=args)

    def wait(self):
        """Blocks until everything is on disk; raises ``CheckpointError`` if a write failed."""
        for manager in self._managers():
            with self.reporting("checkpoint"):
                manager.wait_until_finished()

    def close(self):
        """Waits for pending writes and releases the managers' threads."""
        try:
            self.wait()
        finally:
            for manager in self._managers():
                with contextlib.suppress(Exception):
                    manager.close()

    def _managers(self):
        return [m for m in (self._manager, self._snapshots) if m is not None]

    @contextlib.contextmanager
    def reporting(self, what: str):
        """Turns a failed write of ``what`` into a ``CheckpointError`` that says what is intact."""
        try:
            yield
        # Orbax reports a failed write by whatever exception the storage layer used.
        except Exception as error:
            complete = steps_in(self.workdir / CHECKPOINTS)
            intact = f"step {complete[-1]} is intact" if complete else "none was written before"
            raise CheckpointError(
                f"could not write the {what} under {self.workdir}: {first_line(error)}; "
                f"last complete checkpoint: {intact}"
            ) from error

    def restore_latest(self, abstract_state: TrainState) -> Restored | None:
        """Restores the newest checkpoint that is whole; returns None when there is none at all.

        A checkpoint that cannot be read, or whose arrays do not have the fingerprints recorded when
        it was saved, is reported and moved to ``<workdir>/corrupt_checkpoints``, and the one
        before it is tried.

        Args:
          abstract_state: ``jax.ShapeDtypeStruct`` leaves with the shardings to restore to, which
            need not be those the checkpoint was saved from.

        Raises:
          CheckpointError: when the checkpoints are of another model, or all are corrupt.
        """
        steps = self.all_steps()
        for step in reversed(steps):
            try:
                restored = self._restore(step, abstract_state)
            except CheckpointError:
                raise
            # Whatever goes wrong while reading a damaged file, the one before it may be whole.
            except Exception as error:
                log.error("checkpoint of step %d is damaged: %s", step, first_line(error))
                self._set_aside(step)
                continue
            log.info("restored the checkpoint of step %d", step)
            return restored
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {steps} under {self.workdir} can be read; they are now "
                f"in {self.workdir / CORRUPT}. Start again in another workdir, or delete this one"
            )
        return None

    def _restore(self, step: int, abstract_state: TrainState) -> Restored:
        json_items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                manifest=ocp.args.JsonRestore(),
                data=ocp.args.JsonRestore(),
                controller=ocp.args.JsonRestore(),
            ),
        )
        rest = abstract_state.replace(params=None)
        wanted = {"params": abstract_state.params, "state": rest}
        check_layout(json_items["manifest"], wanted, f"checkpoint of step {step}")
        arrays = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract_state.params),
                state=ocp.args.StandardRestore(rest),
            ),
        )
        check_fingerprints(
            json_items["manifest"], {"params": arrays["params"], "state": arrays["state"]}
        )
        state = arrays["state"].replace(params=arrays["params"])
        return Restored(step, state, json_items["data"], json_items["controller"])

    def _set_aside(self, step: int):
        if jax.process_index() == 0:
            target = self.workdir / CORRUPT / str(step)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(self.workdir / CHECKPOINTS / str(step), target)
        if jax.process_count() > 1:
            jax.experimental.multihost_utils.sync_global_devices(f"set_aside_{step}")
        self._manager.reload()


def steps_in(directory: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a directory, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def restore_params(
    workdir: str | os.PathLike,
    step: int | None = None,
    *,
    shardings: Any = None,
    snapshots: bool = False,
) -> Any:
    """Restores the parameters alone, for generation, fine-tuning or averaging.

    Args:
      workdir: directory of a run.
      step: which checkpoint; None takes the newest one that is whole.
      shardings: tree of shardings like the parameters; None gives arrays on the default device.
      snapshots: read a raw parameter snapshot instead of a checkpoint.

    Returns:
      The parameters as a nested dict.

    Raises:
      CheckpointError: when there is no such checkpoint or it is damaged.
    """
    directory = Path(workdir).absolute() / (SNAPSHOTS if snapshots else CHECKPOINTS)
    steps = steps_in(directory)
    if not steps:
        raise CheckpointError(f"no checkpoint under {directory}")
    if step is not None:
        if step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} under {directory}; have {steps}")
        return _restore_params(directory / str(step), shardings)
    for candidate in reversed(steps):
        try:
            return _restore_params(directory / str(candidate), shardings)
        except CheckpointError as error:
            log.error("%s", error)
    raise CheckpointError(f"none of the checkpoints {steps} under {directory} can be read")


def _restore_params(directory: Path, shardings: Any) -> Any:
    try:
        record = _read_manifest(directory)
        layout = _unflatten(
            {
                name.removeprefix("params/"): jax.ShapeDtypeStruct(
                    tuple(entry["shape"]), jnp.dtype(entry["dtype"])
                )
                for name, entry in record.items()
                if name.startswith("params/")
            }
        )
        if shardings is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shardings = jax.tree.map(lambda _: device, layout)
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), layout, shardings
        )
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(directory / "params", abstract)
        check_fingerprints(record, {"params": params})
    except Exception as error:
        raise CheckpointError(f"{directory} is damaged: {first_line(error)}") from error
    return params


def _read_manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest" / "metadata").read_text())


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def manifest(tree: Any) -> dict[str, Any]:
    """Returns shape, dtype and fingerprint of every array, JSON-able.

    The fingerprint is two 32-bit sums over the bits of the array, one of them weighted by position,
    computed where the array lies. It does not depend on how the array is sharded.
    """
    leaves = _named_leaves(tree)
    sums = jax.device_get(_fingerprints(tuple(leaves.values())))
    return {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "sum": [int(v) for v in s]}
        for (name, x), s in zip(leaves.items(), sums)
    }


@jax.jit
def _fingerprints(leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(_fingerprint(x) for x in leaves)


def _fingerprint(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize < 4):
        bits = x.astype(jnp.uint32)
    elif x.dtype.itemsize < 4 and jnp.finfo(x.dtype).bits in (8, 16):
        width = jnp.uint8 if x.dtype.itemsize == 1 else jnp.uint16
        bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    weight = jnp.ones((), jnp.uint32)
    for axis in range(bits.ndim):
        position = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        weight = weight * jnp.uint32(0x9E3779B1) + 2 * position
    weight = weight | jnp.uint32(1)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * weight, dtype=jnp.uint32)])


def check_fingerprints(recorded: Mapping[str, Any], tree: Any) -> None:
    """Raises ``CheckpointError``'s cause, a ``ValueError``, when an array is not what was saved."""
    for name, entry in manifest(tree).items():
        if entry["sum"] != recorded[name]["sum"]:
            raise ValueError(f"array {name} does not have the fingerprint it was saved with")


def check_layout(recorded: Mapping[str, Any], wanted: Any, what: str) -> None:
    """Raises ``CheckpointError`` when the checkpoint holds another model than the config makes."""
    leaves = _named_leaves(wanted)
    missing, extra = sorted(set(leaves) - set(recorded)), sorted(set(recorded) - set(leaves))
    if missing or extra:
        raise CheckpointError(
            f"the {what} does not fit this config: it lacks {missing[:5]} and has {extra[:5]} "
            "which the config does not make"
        )
    for name, leaf in leaves.items():
        shape, dtype = tuple(recorded[name]["shape"]), recorded[name]["dtype"]
        if shape != tuple(leaf.shape) or dtype != str(leaf.dtype):
            raise CheckpointError(
                f"the {what} does not fit this config: {name} is {dtype}{list(shape)} in the "
                f"checkpoint and {leaf.dtype}{list(leaf.shape)} by the config"
            )


def local_workdir(workdir: str | os.PathLike) -> Path:
    """Returns the directory of a run as a path.

    Raises:
      CheckpointError: when it is a URL: metrics and plots are written as local files.
    """
    if "://" in str(workdir):
        raise CheckpointError(
            f"workdir {workdir} is a URL; expected a directory. Mount the bucket (gcsfuse, s3fs) "
            "where every host sees it"
        )
    return Path(workdir)


def check_workdir(workdir: str | os.PathLike, state_bytes: int, keep: int) -> None:
    """Checks, before any training, that checkpoints can be written.

    Args:
      workdir: directory of the run; made if absent.
      state_bytes: size of one checkpoint.
      keep: number of checkpoints on disk at once (one more exists while it replaces another).

    Raises:
      CheckpointError: when the directory cannot be written, or the disk has too little room.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write_test_{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"workdir {workdir} cannot be written: {error}") from error
    present = sum(
        f.stat().st_size for f in (workdir / CHECKPOINTS).rglob("*") if f.is_file()
    )  # a run that goes on replaces these
    needed = state_bytes * (keep + 1) - present
    free = shutil.disk_usage(workdir).free
    if needed > free:
        raise CheckpointError(
            f"workdir {workdir} has {free / 1e9:.2f} GB free, but {keep + 1} checkpoints need up "
            f"to {needed / 1e9:.2f} GB more; free some space or lower checkpoint.keep"
        )


def state_nbytes(abstract_state: Any) -> int:
    """Returns the bytes of all leaves of an abstract state."""
    return sum(
        int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(abstract_state)
    )


def first_line(error: BaseException) -> str:
    """Returns the type and the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
