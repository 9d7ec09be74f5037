"""Frozen configuration of a run, and the conversion that refuses misspelt keys.

A config file builds an ``ml_collections.ConfigDict``. It is converted once, here, into frozen
dataclasses; everything after that sees only those. A key that no dataclass has is an error that
names the nearest key that exists, so that a misspelt setting never runs as its default.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting is unknown, has the wrong type, or has a value that cannot work."""


class CommandLineText(str):
    """A value given as text on the command line; its type is decided by the field it is for."""


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """Returns a hint such as ``; did you mean 'num_steps'?``, or the list of valid names."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid names: {', '.join(sorted(valid))}"


def build(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Converts a mapping (a ``ConfigDict`` or a ``dict``) into the dataclass ``cls``.

    Args:
      cls: a dataclass type; its fields may be dataclasses, optional, or tuples.
      values: the settings; keys that are absent take the dataclass's defaults.
      path: dotted name of this mapping, used in error messages.

    Raises:
      ConfigError: for an unknown key (with the nearest valid one), a missing required key, or a
        value that does not have the type of its field.
    """
    values = as_dict(values)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"unknown setting '{path}.{key}'{nearest(key, fields)}")
        kwargs[key] = coerce(value, hints[key], f"{path}.{key}")
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in kwargs:
            raise ConfigError(f"setting '{path}.{name}' is required and was not given")
    try:
        return cls(**kwargs)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def coerce(value: Any, annotation: Any, path: str) -> Any:
    """Converts ``value`` to the annotated type, or raises ``ConfigError`` naming ``path``."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return _literal(value) if isinstance(value, CommandLineText) else value
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, args, path)
    if origin is Literal:
        if str(value) in [str(a) for a in args]:
            return next(a for a in args if str(a) == str(value))
        raise ConfigError(f"'{path}' is {value!r}; expected one of {', '.join(map(repr, args))}")
    if dataclasses.is_dataclass(annotation):
        if isinstance(value, annotation):
            return value
        if isinstance(value, CommandLineText):
            value = _literal(value)
        if isinstance(value, Mapping):
            return build(annotation, value, path)
        raise _wrong_type(path, value, annotation.__name__)
    if annotation is tuple or origin is tuple:
        return _coerce_tuple(value, args, path)
    return _coerce_scalar(value, annotation, path)


def _coerce_union(value: Any, args: tuple[Any, ...], path: str) -> Any:
    if value is None or (isinstance(value, CommandLineText) and value.lower() == "none"):
        if type(None) in args:
            return None
        raise _wrong_type(path, value, " or ".join(_name(a) for a in args))
    choices = [a for a in args if a is not type(None)]
    # `str` accepts any text, so it is tried last.
    for choice in sorted(choices, key=lambda a: a is str):
        try:
            return coerce(value, choice, path)
        except ConfigError as error:
            if len(choices) == 1 or isinstance(value, Mapping):
                raise
            del error
    raise _wrong_type(path, value, " or ".join(_name(a) for a in args))


def _coerce_tuple(value: Any, args: tuple[Any, ...], path: str) -> tuple:
    if isinstance(value, CommandLineText):
        value = _literal(value)
    if not isinstance(value, (tuple, list)):
        raise _wrong_type(path, value, "tuple")
    if not args:
        return tuple(value)
    element_types = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
    if len(element_types) != len(value):
        raise _wrong_type(path, value, f"tuple of {len(element_types)}")
    return tuple(coerce(v, t, f"{path}[{i}]") for i, (v, t) in enumerate(zip(value, element_types)))


def _coerce_scalar(value: Any, annotation: type, path: str) -> Any:
    if isinstance(value, CommandLineText):
        value = str(value) if annotation is str else _literal(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is int and isinstance(value, float) and value == int(value):
        return int(value)
    if isinstance(value, bool) and annotation is not bool:
        raise _wrong_type(path, value, _name(annotation))
    if not isinstance(value, annotation):
        raise _wrong_type(path, value, _name(annotation))
    return value


def _literal(text: str) -> Any:
    lowered = text.lower()
    if lowered in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[lowered]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return str(text)


def _name(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation))


def _wrong_type(path: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"'{path}' is {value!r} ({type(value).__name__}); expected {expected}")


def override(values: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Returns ``values`` with dotted command-line overrides applied.

    Args:
      values: a nested mapping that holds *every* key (a resolved config).
      overrides: dotted name to text, e.g. ``{"training.num_steps": "500"}``.

    Raises:
      ConfigError: when a dotted name does not exist, with the nearest name that does.
    """
    result = as_dict(values)
    for dotted, text in overrides.items():
        *parents, last = dotted.split(".")
        node, path = result, "config"
        for parent in parents:
            if isinstance(node, Mapping) and parent in node and node[parent] is None:
                node[parent] = _Opened()
            node = _child(node, parent, path)
            path = f"{path}.{parent}"
        if not isinstance(node, _Opened):
            _child(node, last, path)
        node[last] = CommandLineText(text)
    return result


class _Opened(dict):
    """An optional section that was None: it has no keys to compare with; ``build`` checks them."""


def _child(node: Any, key: str, path: str) -> Any:
    if not isinstance(node, Mapping):
        raise ConfigError(f"'{path}' is a single value; '{path}.{key}' does not exist")
    if key not in node:
        raise ConfigError(f"unknown setting '{path}.{key}'{nearest(key, node)}")
    return node[key]


def as_dict(values: Any) -> Any:
    """Returns a ``ConfigDict``, or any nest of mappings, as nested plain dicts."""
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    if isinstance(values, Mapping):
        return {k: as_dict(v) for k, v in values.items()}
    return values


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a dataclass config as nested plain dicts, ready for JSON."""
    return dataclasses.asdict(config)


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises ``ConfigError`` naming the setting, its value, and what was expected."""
    if not condition:
        raise ConfigError(f"{name} is {value!r}; expected {expected}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left.

    Attributes:
      data: replicas; parameters are copied along it.
      fsdp: data-parallel replicas over which parameters and optimiser state are split.
      expert: experts of mixture-of-experts layers; also splits the batch.
      context: splits the sequence.
      tensor: splits heads, MLP width and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name}", size, "-1 or a positive integer")
        free = [name for name, size in sizes.items() if size == -1]
        require(len(free) <= 1, "mesh", sizes, "at most one axis of size -1")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser, learning-rate schedule, clipping and decay.

    Attributes:
      name: ``adamw``, ``adam``, ``lion``, ``sgd`` or ``muon``. ``muon`` updates the matrices
        inside the layers with Muon and everything else with AdamW.
      learning_rate: peak learning rate.
      schedule: ``cosine``, ``linear`` or ``wsd`` (warm-up, stable, decay), which end with the run;
        ``constant`` or ``rsqrt`` (falls with the root of the step), which do not depend on its
        length, so that a run may be prolonged as if it had been longer from the start.
      warmup_steps: steps of linear warm-up from 0.
      decay_steps: length of the decay of ``wsd``; None takes a fifth of the steps.
      final_learning_rate_ratio: learning rate at the last step over the peak.
      b1: decay of the first moment; momentum of ``sgd``.
      b2: decay of the second moment.
      eps: added to the denominator of Adam.
      weight_decay: decoupled decay; not applied to vectors (norm gains, biases).
      muon_momentum: momentum of the matrices under ``muon``.
      max_grad_norm: clips the global gradient norm; None does not clip.
    """

    name: Literal["adamw", "adam", "lion", "sgd", "muon"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "linear", "constant", "wsd", "rsqrt"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_learning_rate_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    muon_momentum: float = 0.95
    max_grad_norm: float | None = 1.0

    def __post_init__(self):
        prefix = "optimizer."
        require(self.learning_rate >= 0, prefix + "learning_rate", self.learning_rate, ">= 0")
        require(self.warmup_steps >= 0, prefix + "warmup_steps", self.warmup_steps, ">= 0")
        for name in ("b1", "b2", "muon_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, prefix + name, value, "in [0, 1)")
        require(self.eps > 0, prefix + "eps", self.eps, "> 0")
        require(self.weight_decay >= 0, prefix + "weight_decay", self.weight_decay, ">= 0")
        ratio = self.final_learning_rate_ratio
        require(0 <= ratio <= 1, prefix + "final_learning_rate_ratio", ratio, "in [0, 1]")
        norm = self.max_grad_norm
        require(norm is None or norm > 0, prefix + "max_grad_norm", norm, "None or > 0")
        decay = self.decay_steps
        require(decay is None or decay >= 1, prefix + "decay_steps", decay, "None or >= 1")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Length of the run and what happens every so many steps.

    Attributes:
      num_steps: optimiser steps.
      log_every: steps between two records of the training metrics.
      eval_every: steps between evaluations; 0 evaluates at the end only.
      accumulation_steps: micro-batches per optimiser step.
      ema_rates: decay rates of exponential moving averages of the parameters that are kept, and
        evaluated, beside them.
      stop_on_nonfinite: end the run with an error when a metric is NaN or infinite.
      profile_from: first step of a profiler window; None takes no profile.
      profile_steps: length of the profiler window.
      tensorboard: write TensorBoard events.
      progress: show a progress bar on a terminal (plain lines otherwise).
    """

    num_steps: int = 1000
    log_every: int = 10
    eval_every: int = 0
    accumulation_steps: int = 1
    ema_rates: tuple[float, ...] = ()
    stop_on_nonfinite: bool = True
    profile_from: int | None = None
    profile_steps: int = 3
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self):
        for name in ("num_steps", "log_every", "accumulation_steps", "profile_steps"):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), ">= 1")
        require(self.eval_every >= 0, "training.eval_every", self.eval_every, ">= 0")
        for rate in self.ema_rates:
            require(0 < rate < 1, "training.ema_rates", self.ema_rates, "rates in (0, 1)")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, how often, and for how long.

    Attributes:
      every: steps between checkpoints; 0 saves at the end of the run only.
      keep: number of newest checkpoints kept.
      keep_every: checkpoints at multiples of this step are kept for good.
      asynchronous: write in the background while training goes on.
      snapshot_every: steps between raw parameter snapshots (parameters alone, for averaging
        over a training run); 0 takes none.
      snapshot_keep: number of newest snapshots kept; None keeps all.
    """

    every: int = 0
    keep: int = 2
    keep_every: int | None = None
    asynchronous: bool = True
    snapshot_every: int = 0
    snapshot_keep: int | None = None

    def __post_init__(self):
        require(self.every >= 0, "checkpoint.every", self.every, ">= 0")
        require(self.keep >= 1, "checkpoint.keep", self.keep, ">= 1")
        require(self.snapshot_every >= 0, "checkpoint.snapshot_every", self.snapshot_every, ">= 0")
        for name in ("keep_every", "snapshot_keep"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"checkpoint.{name}", value, "None or >= 1")
