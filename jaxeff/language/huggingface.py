"""Hugging Face checkpoints in and out: `config.json` and safetensors, never pickle.

A PyTorch `Linear.weight` is (out, in) and becomes a kernel (in, out). Parameters are read and
written tensor by tensor, so that no more than one stacked parameter (in) or one shard (out) is in
host memory; with a mesh, each device's part is read straight from the file.
"""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxeff.language.config import DecoderConfig
from jaxeff.language.decoder import Decoder
from jaxeff.language.huggingface_config import config_from_hf, config_to_hf, hf_model_type
from jaxeff.trees import unbox

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_SIZE = 5 * 1000**3
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

ParamPath = tuple[str, ...]
Rules = Sequence[tuple[str, str | Sequence[str] | None]]

PARAMETER_RULES: Rules = (
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("expert", "expert"),
)

_TOP = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}
_LAYER = {
    "input_norm/scale": "input_layernorm.weight",
    "post_attention_norm/scale": "post_attention_layernorm.weight",
    **{f"attention/{x}_norm/scale": f"self_attn.{x}_norm.weight" for x in "qk"},
    **{f"attention/{x}_proj/kernel": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attention/{x}_proj/bias": f"self_attn.{x}_proj.bias" for x in "qkvo"},
    **{f"mlp/{x}_proj/kernel": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    **{f"mlp/{x}_proj/bias": f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
}
_EXPERTS = {
    "mixtral": {
        "moe/router/kernel": "block_sparse_moe.gate.weight",
        "moe/gate_proj": "block_sparse_moe.experts.{expert}.w1.weight",
        "moe/up_proj": "block_sparse_moe.experts.{expert}.w3.weight",
        "moe/down_proj": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    "qwen3_moe": {
        "moe/router/kernel": "mlp.gate.weight",
        **{
            f"moe/{x}_proj": f"mlp.experts.{{expert}}.{x}_proj.weight"
            for x in ("gate", "up", "down")
        },
    },
}


class TensorMismatchError(KeyError):
    """The tensors of a checkpoint are not those of the model.

    Attributes:
      missing, unexpected: names.
      wrong_shape: sentences that give the name, the shape found and the shape expected.
    """

    def __init__(
        self,
        where: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        wrong_shape: Sequence[str] = (),
    ):
        self.missing, self.unexpected = tuple(missing), tuple(unexpected)
        self.wrong_shape = tuple(wrong_shape)
        parts = [
            f"{kind}: {', '.join(names)}"
            for kind, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("wrong shape", self.wrong_shape),
            )
            if names
        ]
        self.message = f"{where}: {'; '.join(parts)}"
        super().__init__(self.message)

    def __str__(self) -> str:  # a KeyError would print the quoted representation
        return self.message


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where one parameter comes from.

    `names` is an object array of tensor names whose axes are the leading axes of the parameter
    (layers, experts); the remaining axes are the tensor's, swapped if `transposed`.
    """

    names: np.ndarray
    transposed: bool


def load_hf(
    path: str | Path,
    dtype: Any = None,
    *,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    scan_layers: bool = True,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Loads a local Hugging Face checkpoint of one of the supported families.

    Args:
      path: folder with `config.json` and `model.safetensors`, or with shards and their index.
      dtype: of the parameters and of the computation; None keeps that of the file. To train in
        bfloat16 on float32 parameters load "float32" and replace `config.dtype`.
      mesh: put every parameter on this mesh, each process reading only what its devices hold.
      rules: (logical axis, mesh axes) pairs; None takes those of `nn.logical_axis_rules` or,
        without any, the usual ones (embed over fsdp, heads/mlp/vocab over tensor, expert over
        expert).
      scan_layers: stack the parameters of homogeneous layers.

    Returns:
      The configuration and the parameters, a plain nested dictionary.

    Raises:
      FileNotFoundError: no such folder, `config.json` or safetensors file.
      TensorMismatchError: (a KeyError) missing, unexpected or wrongly shaped tensors, by name.
      ValueError: a configuration the decoder does not implement, a tensor that is not of a float
        dtype, a mesh axis that does not divide a parameter's axis.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {path}")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json")
    config = config_from_hf(json.loads((path / "config.json").read_text("utf-8")))
    with _Checkpoint.open(path) as checkpoint:
        stored = checkpoint.dtype("model.embed_tokens.weight", default=config.param_dtype)
        chosen = jnp.dtype(dtype or stored).name
        config = dataclasses.replace(
            config, dtype=chosen, param_dtype=chosen, scan_layers=scan_layers
        )
        boxed = abstract_parameters(config)
        shapes = {k: leaf.shape for k, leaf in flatten_dict(unbox(boxed)).items()}
        sources = {key: _source(key, config) for key in shapes}
        checkpoint.check(sources, shapes, tied=config.tie_embeddings)
        shardings = _shardings(boxed, config, mesh, rules)
        params = {
            key: checkpoint.load(source, shapes[key], dtype and chosen, shardings[key])
            for key, source in sources.items()
        }
    return config, unflatten_dict(params)


def save_hf(
    path: str | Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Saves a checkpoint that transformers (and `load_hf`) load.

    Tensors keep their dtype; tied embeddings are written once. Weight files of an earlier save into
    the same folder are replaced.

    Args:
      path: folder, created if needed.
      config: must be expressible by one of the families.
      params: of either layer layout, boxed or plain, on the host or on devices of this process.
      max_shard_size: bytes per file; more is split into numbered files with an index.
      extra: further entries of `config.json`, such as `{"eos_token_id": 2}`.

    Raises:
      TensorMismatchError: (a KeyError) the parameters are not those of `config`.
      ValueError: no family can express `config`, or `max_shard_size` is not positive.
    """
    if max_shard_size <= 0:
        raise ValueError(f"max_shard_size={max_shard_size} must be positive")
    flat = flatten_dict(unbox(params))
    config = dataclasses.replace(config, scan_layers=any(key[0] == "layers" for key in flat))
    _check_parameters(flat, config)
    stored = jnp.dtype(flat["embed", "embedding"].dtype).name
    hf = config_to_hf(dataclasses.replace(config, param_dtype=stored)) | dict(extra or {})

    tensors = list(_tensors_of(flat, config))
    shards = _split(tensors, max_shard_size)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    names = _shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        arrays = {tensor.name: tensor.read() for tensor in shard}
        partial = path / f"{name}.partial"
        safetensors.numpy.save_file(arrays, partial, metadata={"format": "pt"})
        partial.replace(path / name)
    _remove_stale(path, keep=names)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": {
                t.name: n for n, shard in zip(names, shards, strict=True) for t in shard
            },
        }
        _write_json(path / INDEX_FILE, index)
    _write_json(path / "config.json", hf)


def abstract_parameters(config: DecoderConfig) -> Any:
    """Returns the boxed parameter tree of `Decoder(config)` as `jax.ShapeDtypeStruct` leaves."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]


def _source(key: ParamPath, config: DecoderConfig) -> _Source:
    model_type = hf_model_type(config)
    name = "/".join(key)
    if name in _TOP:
        return _Source(np.array(_TOP[name], object), transposed=name == "lm_head/kernel")
    stacked = key[0] == "layers"
    layers = range(config.num_layers) if stacked else [int(key[0].removeprefix("layers_"))]
    inner = "/".join(key[1:])
    template = (_LAYER | _EXPERTS.get(model_type, {}))[inner]
    of_experts = "{expert}" in template
    experts = range(config.moe.num_experts) if of_experts else [0]
    names = np.array(
        [
            [f"model.layers.{layer}.{template.format(expert=e)}" for e in experts]
            for layer in layers
        ],
        object,
    )
    names = names if of_experts else names[:, 0]
    names = names if stacked else np.asarray(names[0], object)
    return _Source(names, of_experts or inner.endswith("kernel"))


class _Checkpoint:
    """The open safetensors files of one folder."""

    def __init__(self, files: Mapping[str, Any], folder: Path):
        self._files = files  # tensor name -> open file
        self._folder = folder

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator["_Checkpoint"]:
        with contextlib.ExitStack() as stack:
            files = {}
            for file in _weight_files(folder):
                handle = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
                files.update(dict.fromkeys(handle.keys(), handle))
            yield cls(files, folder)

    def dtype(self, name: str, default: str) -> str:
        """Returns the dtype of a tensor, or `default` where there is none of that name."""
        if name not in self._files:
            return default
        stored = self._files[name].get_slice(name).get_dtype()
        if stored not in _FLOATS:
            raise ValueError(
                f"tensor {name} of {self._folder} has dtype {stored}, "
                f"expected one of {', '.join(_FLOATS)}"
            )
        return _FLOATS[stored]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def check(self, sources: Mapping[ParamPath, _Source], shapes: Mapping, tied: bool) -> None:
        """Raises TensorMismatchError unless the tensors are exactly those of `sources`."""
        expected = {}
        for key, source in sources.items():
            shape = tuple(shapes[key][source.names.ndim :])
            expected.update(
                dict.fromkeys(source.names.flat, shape[::-1] if source.transposed else shape)
            )
        missing = sorted(set(expected) - set(self._files))
        unexpected = sorted(
            name
            for name in set(self._files) - set(expected)
            if not name.endswith("rotary_emb.inv_freq")  # old Llama files carry this constant
            and not (tied and self._repeats_embedding(name))
        )
        wrong = [
            f"{name} is {self.shape(name)}, expected {shape}"
            for name, shape in sorted(expected.items())
            if name in self._files and self.shape(name) != shape
        ]
        if missing or unexpected or wrong:
            raise TensorMismatchError(str(self._folder), missing, unexpected, wrong)

    def _repeats_embedding(self, name: str) -> bool:
        if name != "lm_head.weight" or "model.embed_tokens.weight" not in self._files:
            return False
        head, embedding = (
            self._files[x].get_tensor(x) for x in (name, "model.embed_tokens.weight")
        )
        return np.array_equal(head, embedding)

    def load(
        self, source: _Source, shape: tuple[int, ...], dtype: str | None, sharding: Any
    ) -> jax.Array:
        """Returns one parameter, each device's part read from the file once."""
        stored = [jnp.dtype(self.dtype(name, "")) for name in source.names.flat]
        dtype = jnp.dtype(dtype or jnp.result_type(*stored))
        parts: dict[tuple, np.ndarray] = {}

        def read(index: tuple[slice, ...]) -> np.ndarray:
            bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
            if bounds not in parts:
                parts[bounds] = self._read(source, bounds, dtype)
            return parts[bounds]

        return jax.make_array_from_callback(shape, sharding, read, dtype=dtype)

    def _read(self, source: _Source, bounds: tuple, dtype: np.dtype) -> np.ndarray:
        leading = source.names.ndim
        chosen = tuple(slice(*bound) for bound in bounds[:leading])
        names = np.asarray(source.names[chosen], object)
        inner = tuple(slice(*bound) for bound in bounds[leading:])
        inner = inner[::-1] if source.transposed else inner
        out = np.empty([stop - start for start, stop in bounds], dtype)
        for position in np.ndindex(out.shape[:leading]):
            name = names[position]
            tensor = self._files[name].get_slice(name)[inner]
            out[position] = tensor.T if source.transposed else tensor
        return out


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; other formats are not read"
        )
    index = json.loads((folder / INDEX_FILE).read_text("utf-8"))
    files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, named by {INDEX_FILE}")
    return files


def _shardings(
    boxed: Any, config: DecoderConfig, mesh: Mesh | None, rules: Rules | None
) -> dict[ParamPath, Any]:
    specs = flatten_dict(nn.get_partition_spec(boxed))
    if mesh is None:
        return dict.fromkeys(specs, SingleDeviceSharding(jax.local_devices()[0]))
    rules = dict(rules or nn.get_logical_axis_rules() or PARAMETER_RULES)
    shapes = flatten_dict(unbox(boxed))
    return {
        key: _leaf_sharding("/".join(key), shapes[key].shape, spec or (), config, mesh, rules)
        for key, spec in specs.items()
    }


def _leaf_sharding(
    name: str, shape: tuple[int, ...], logical: Any, config: DecoderConfig, mesh: Mesh, rules: dict
) -> NamedSharding:
    axes = []
    for size, axis in zip(shape, tuple(logical) + (None,) * len(shape), strict=False):
        target = rules.get(axis) or ()
        target = (target,) if isinstance(target, str) else tuple(target)
        target = tuple(a for a in target if mesh.shape.get(a, 1) > 1 and a not in axes)
        ways = math.prod(mesh.shape[a] for a in target)
        if axis == "kv_heads" and config.num_kv_heads % ways:
            log.info("%s: %d kv heads are replicated over %s", name, config.num_kv_heads, target)
            target, ways = (), 1
        if size % ways:
            raise ValueError(
                f"mesh axes {target} (size {ways}) do not divide axis {axis!r} "
                f"(size {size}) of {name}"
            )
        axes.append(target if len(target) > 1 else (target[0] if target else None))
    return NamedSharding(mesh, PartitionSpec(*axes))


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor to write; `read` brings it to the host."""

    name: str
    nbytes: int
    read: Callable[[], np.ndarray]


def _tensors_of(flat: Mapping[ParamPath, Any], config: DecoderConfig) -> Iterator[_Tensor]:
    """Yields the tensors of all parameters, one layer and expert at a time."""
    for key, leaf in flat.items():
        source = _source(key, config)
        for position in np.ndindex(source.names.shape):
            name = source.names[position]
            size = math.prod(leaf.shape[source.names.ndim :]) * jnp.dtype(leaf.dtype).itemsize
            yield _Tensor(name, size, _reader(leaf, position, source.transposed))


def _reader(leaf: Any, position: tuple[int, ...], transposed: bool) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        tensor = np.asarray(leaf[position] if position else leaf)
        return np.ascontiguousarray(tensor.T if transposed else tensor)

    return read


def _check_parameters(flat: Mapping[ParamPath, Any], config: DecoderConfig) -> None:
    expected = flatten_dict(unbox(abstract_parameters(config)))
    wrong = [
        f"{'/'.join(key)} is {tuple(flat[key].shape)}, expected {leaf.shape}"
        for key, leaf in expected.items()
        if key in flat and tuple(flat[key].shape) != leaf.shape
    ]
    missing = ["/".join(key) for key in expected if key not in flat]
    unexpected = ["/".join(key) for key in flat if key not in expected]
    if missing or unexpected or wrong:
        raise TensorMismatchError("parameters to save", missing, unexpected, wrong)


def _split(tensors: Sequence[_Tensor], max_shard_size: int) -> list[list[_Tensor]]:
    """Fills files in order; a tensor larger than a file has one to itself."""
    shards: list[list[_Tensor]] = [[]]
    room = max_shard_size
    for tensor in tensors:
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_size
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _remove_stale(folder: Path, keep: Sequence[str]) -> None:
    """Removes the weight files of an earlier save, which a reader might take for the new ones."""
    old = [folder / SINGLE_FILE, folder / INDEX_FILE, *folder.glob("model-*-of-*.safetensors")]
    for file in old:
        if file.name not in keep:
            file.unlink(missing_ok=True)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
