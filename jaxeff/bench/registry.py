"""The registry of claims. Data only: what measures a claim is imported when it is run."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from jaxeff.training.config import CommandLineText, ConfigError, build, nearest, to_dict


@dataclasses.dataclass(frozen=True)
class Row:
    """One claim.

    Attributes:
      name: what the command line calls it.
      claim: what is claimed, in a sentence.
      module: ``module:Class`` of the settings that measure it, in ``jaxeff.bench.rows``.
      paper: the paper's figure, with the hardware it was measured on; empty where there is none.
      source: where the claim comes from: paper title and arXiv id.
    """

    name: str
    claim: str
    module: str
    paper: str = ""
    source: str = ""

    def load(self) -> type:
        """Returns the class of the row's settings."""
        module, _, name = self.module.partition(":")
        return getattr(importlib.import_module(f"jaxeff.bench.rows.{module}"), name)


_ALL = (
    Row(
        name="decoder_train",
        claim="A training step takes little more than its matrix products alone, and no step waits "
        "for data",
        module="training:DecoderTrain",
    ),
    Row(
        name="decoder_decode",
        claim="Cached greedy decoding runs near the rate at which parameters and cache can be read "
        "from memory",
        module="language:DecoderDecode",
    ),
    Row(
        name="checkpoint",
        claim="Saving in the background hardly slows training; saving in the foreground stops it",
        module="training:Checkpoint",
    ),
    Row(
        name="torch_step",
        claim="A training step of the default model is not slower than that of the same model in "
        "PyTorch eager",
        module="torch_step:TorchStep",
    ),
    Row(
        name="bleu",
        claim="BLEU of a batch on the device is many times faster than a loop over its sentences "
        "on the host, in memory that grows with the batch and with no vocabulary",
        module="bleu:Bleu",
        paper="10x to 40x (T4, A100)",
        source="TensorBLEU, arXiv 2510.05485",
    ),
    Row(
        name="pararnn",
        claim="On an accelerator, a nonlinear recurrence solved for all steps at once takes a "
        "fraction of the time of a loop over them, and about that of a linear recurrence",
        module="pararnn:ParaRnn",
        paper="665x over a Python loop (GRU), 2.6x (GRU) and 1.5x (LSTM) over Mamba, T = 512, A100",
        source="ParaRNN, arXiv 2510.21450",
    ),
)

ROWS: Mapping[str, Row] = {row.name: row for row in _ALL}


def find_row(name: str) -> Row:
    """Returns the row called ``name``.

    Raises:
      ConfigError: when there is none, with the nearest name.
    """
    if name not in ROWS:
        raise ConfigError(f"there is no benchmark {name!r}{nearest(name, ROWS)}")
    return ROWS[name]


def make_settings(row: Row, platform: str, changes: Mapping[str, str]) -> Any:
    """Returns the settings of a row.

    Args:
      row: the row.
      platform: ``cpu``, or an accelerator, which gets the class's ``ON_ACCELERATOR`` on top.
      changes: setting to text, from the command line. A dotted name is an entry of a setting that
        is itself a mapping: ``config.model.num_layers`` sets ``model.num_layers`` of ``config``.

    Raises:
      ConfigError: for a setting that the row does not have, with the nearest one, or a value that
        does not fit.
    """
    cls = row.load()
    values = {} if platform == "cpu" else dict(getattr(cls, "ON_ACCELERATOR", {}))
    values = to_dict(build(cls, values, row.name))
    for name, text in changes.items():
        head, _, entry = name.partition(".")
        if entry and isinstance(values.get(head), Mapping):
            values[head] = {**values[head], entry: text}
        elif name in values:
            values[name] = CommandLineText(text)
        else:
            raise ConfigError(f"{row.name} has no setting {name!r}{nearest(name, values)}")
    return build(cls, values, row.name)
