"""Configs: converted once, misspelt keys refused with the nearest valid name."""

import dataclasses
import json
from typing import Literal

import ml_collections
import pytest

from jaxeff.training.config import (
    CheckpointConfig,
    ConfigError,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
    build,
    override,
    to_dict,
)


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 4
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None
    rates: tuple[float, ...] = ()
    limit: float | None = None
    source: str | tuple[str, ...] = "x"
    flag: bool = False


def test_a_config_dict_becomes_frozen_dataclasses():
    values = ml_collections.ConfigDict({"name": "n", "inner": {"width": 8}, "rates": (1, 0.5)})
    outer = build(Outer, values)
    assert outer == Outer("n", Inner(8), rates=(1.0, 0.5))
    assert build(Outer, json.loads(json.dumps(to_dict(outer)))) == outer


@pytest.mark.parametrize(
    "values, message",
    [
        ({"name": "n", "inner": {"widht": 8}}, r"unknown setting 'config.inner.widht'.*'width'"),
        ({"name": "n", "limitt": 1}, r"'config.limitt'; did you mean 'limit'"),
        ({}, "'config.name' is required"),
        ({"name": 3}, r"'config.name' is 3 \(int\); expected str"),
        ({"name": "n", "inner": {"width": "wide"}}, "'config.inner.width' is 'wide'"),
        ({"name": "n", "inner": {"width": True}}, "'config.inner.width' is True"),
        ({"name": "n", "inner": {"kind": "c"}}, "'config.inner.kind' is 'c'.*'a', 'b'"),
        ({"name": "n", "rates": 0.5}, "'config.rates' is 0.5"),
        ({"name": "n", "maybe": {"with": 1}}, "unknown setting 'config.maybe.with'"),
    ],
)
def test_bad_settings_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, values)


def test_overrides_take_the_type_of_their_field():
    base = to_dict(Outer("n"))
    overrides = {
        "inner.width": "16",
        "limit": "1e-3",
        "rates": "(0.9, 0.99)",
        "name": "12",
        "flag": "true",
        "inner.kind": "b",
        "maybe.width": "3",
        "source": "('p', 'q')",
    }
    outer = build(Outer, override(base, overrides))
    assert outer == Outer(
        "12", Inner(16, "b"), Inner(3), (0.9, 0.99), 1e-3, source=("p", "q"), flag=True
    )
    assert build(Outer, override(to_dict(outer), {"limit": "None", "maybe": "none"})).maybe is None
    assert build(Outer, override(base, {"source": "some/path"})).source == "some/path"


@pytest.mark.parametrize(
    "dotted, message",
    [
        ("inner.widht", "unknown setting 'config.inner.widht'; did you mean 'width'"),
        ("iner.width", "unknown setting 'config.iner'; did you mean 'inner'"),
        ("name.width", "'config.name' is a single value"),
        ("maybe.widht", "unknown setting 'config.maybe.widht'"),
    ],
)
def test_overrides_of_unknown_settings_are_refused_with_the_nearest_name(dotted, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, override(to_dict(Outer("n")), {dotted: "1"}))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MeshConfig(data=-1, fsdp=-1), "at most one axis of size -1"),
        (lambda: MeshConfig(tensor=0), "mesh.tensor is 0"),
        (lambda: TrainingConfig(num_steps=0), "training.num_steps is 0"),
        (lambda: TrainingConfig(ema_rates=(1.0,)), "training.ema_rates"),
        (lambda: OptimizerConfig(b2=1.0), "optimizer.b2 is 1.0"),
        (lambda: OptimizerConfig(max_grad_norm=0.0), "optimizer.max_grad_norm is 0.0"),
        (lambda: CheckpointConfig(keep=0), "checkpoint.keep is 0"),
    ],
)
def test_values_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
