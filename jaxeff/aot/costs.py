"""What one execution of a compiled module costs, loops counted as often as they run.

XLA's own ``cost_analysis`` counts the body of a ``while`` loop once, so that a model whose layers
are scanned looks as many times too cheap as it has layers (and on a GPU without a device it gives
nothing). Here the costs of a body are multiplied by the loop's trip count.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from jaxeff.aot.collectives import KINDS, Collective, find_collective, started_chains
from jaxeff.aot.hlo import Array, Computation, Instruction, Module, trip_count

KERNEL_TARGETS = ("tpu_custom_call", "triton_kernel_call", "__gpu$xla.gpu.triton", "mosaic_gpu")

# Transfers that a TPU runs in the background.
ASYNC_MOVES = {"copy", "slice", "dynamic-slice", "dynamic-update-slice"}

# Instructions that move nothing: names for data that is already there.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency", "domain",
}  # fmt: skip

# Inside a fusion: operations whose operand is needed only where their result is.
PASSING = {"bitcast", "reshape", "transpose", "convert", "copy", "pad", "negate", "abs"}

ASYNC_COLLECTIVES = ("AsyncCollectiveStart", "AsyncCollectiveDone")

ELEMENTWISE = {
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "compare",
    "select", "and", "or", "xor", "not", "power", "remainder", "floor", "ceil", "sign", "clamp",
    "shift-left", "shift-right-logical", "shift-right-arithmetic", "round-nearest-even",
}  # fmt: skip

TRANSCENDENTAL = {
    "exponential", "exponential-minus-one", "log", "log-plus-one", "tanh", "logistic", "rsqrt",
    "sqrt", "cbrt", "sine", "cosine", "tan", "erf", "atan2",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call of a Pallas or Triton kernel, or of XLA's own sort.

    Attributes:
      instruction: the custom call or the sort.
      count: calls per execution of the program.
      flops: flops of one call as its author estimated them, or None.
      nbytes: bytes of one call: the author's estimate, or its operands and results.
    """

    instruction: Instruction
    count: float
    flops: float | None
    nbytes: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of one device.

    Attributes:
      matmul_flops: of matrix products and convolutions, two per multiply-add.
      kernel_flops: of Pallas and Triton kernels that state an estimate.
      other_flops: of elementwise operations and reductions, one per element.
      transcendentals: exponentials and the like.
      hbm_bytes: read from and written to device memory by instructions outside fusions; operands
        held in vector memory cost nothing, a slice of an operand costs its own size.
      cycles: XLA's estimate for everything but kernels and sorts (TPU only).
      collectives: with their counts.
      kernels: kernel calls with their counts.
      sorts: the same for sorts, of which XLA gives no estimate.
      unknown_loops: loops whose trip count is not static; they are counted as running once.
    """

    matmul_flops: float = 0.0
    kernel_flops: float = 0.0
    other_flops: float = 0.0
    transcendentals: float = 0.0
    hbm_bytes: float = 0.0
    cycles: float = 0.0
    collectives: tuple[Collective, ...] = ()
    kernels: tuple[KernelCall, ...] = ()
    sorts: tuple[KernelCall, ...] = ()
    unknown_loops: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """Flops that run on matrix units."""
        return self.matmul_flops + self.kernel_flops

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            *(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self))
        )

    def __mul__(self, times: float) -> Costs:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        numbers = {k: v * times for k, v in values.items() if isinstance(v, float)}
        return dataclasses.replace(
            self,
            **numbers,
            collectives=tuple(c.scaled(times) for c in self.collectives),
            kernels=_repeated(self.kernels, times),
            sorts=_repeated(self.sorts, times),
        )


def _repeated(calls: tuple[KernelCall, ...], times: float) -> tuple[KernelCall, ...]:
    return tuple(dataclasses.replace(call, count=call.count * times) for call in calls)


def module_costs(module: Module) -> Costs:
    """Returns the costs of one execution of the module on one device."""
    return _Counter(module).of(module.entry)


class _Counter:
    def __init__(self, module: Module):
        self.module = module
        self.chains = started_chains(module)
        self._known: dict[str, Costs] = {}

    def of(self, computation: Computation) -> Costs:
        if computation.name not in self._known:
            # Summed field by field: adding many tuples of collectives would be quadratic.
            parts = [self._instruction(computation, i) for i in computation]
            self._known[computation.name] = _total(parts)
        return self._known[computation.name]

    def _called(self, instruction: Instruction, attribute: str) -> Costs:
        computation = self.module.computations.get(instruction.called(attribute) or "")
        return self.of(computation) if computation else Costs()

    def _instruction(self, computation: Computation, instruction: Instruction) -> Costs:
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            return Costs()
        if opcode == "while":
            return self._loop(computation, instruction)
        if opcode == "conditional":
            return self._branches(instruction)
        if opcode == "call":
            return self._called(instruction, "to_apply")
        if opcode == "async-start":
            return self._called(instruction, "calls")
        costs = Costs(
            hbm_bytes=self._bytes(computation, instruction), cycles=estimated_cycles(instruction)
        )
        if opcode == "fusion":
            return costs + self._fused(instruction)
        if opcode == "custom-call":
            return costs + self._custom_call(computation, instruction, costs.hbm_bytes)
        if opcode == "sort":
            call = KernelCall(instruction, 1.0, None, costs.hbm_bytes)
            return costs + Costs(sorts=(call,))
        return costs + self._arithmetic(computation, instruction)

    def _loop(self, computation: Computation, loop: Instruction) -> Costs:
        trips = trip_count(self.module, computation, loop)
        body = self._called(loop, "body")
        if trips is None:
            return body + Costs(unknown_loops=(loop.name,))
        return body * trips

    def _branches(self, instruction: Instruction) -> Costs:
        """The dearest branch."""
        listed = instruction.attribute("branch_computations")
        names = re.findall(r"%([\w.\-]+)", listed or "") or [
            instruction.called("true_computation"),
            instruction.called("false_computation"),
        ]
        branches = [self.of(self.module.computations[n]) for n in names if n]
        return max(branches, key=lambda c: (c.flops, c.hbm_bytes), default=Costs())

    def _fused(self, fusion: Instruction) -> Costs:
        """Costs inside a fusion: everything but traffic, which happens at its border."""
        inner = self.module.computations.get(fusion.called("calls") or "")
        if inner is None:
            return Costs()
        parts = []
        for instruction in inner:
            if instruction.opcode == "fusion":
                parts.append(self._fused(instruction))
            elif instruction.opcode == "custom-call":
                parts.append(self._custom_call(inner, instruction, 0.0))
            elif instruction.opcode not in FREE:
                parts.append(self._arithmetic(inner, instruction, fused=True))
        return _total(parts)

    def _arithmetic(
        self, computation: Computation, instruction: Instruction, fused: bool = False
    ) -> Costs:
        opcode = instruction.opcode
        collective = find_collective(self.module, computation, instruction, self.chains)
        if collective is not None:
            return Costs(
                collectives=(collective,),
                hbm_bytes=self._collective_bytes(computation, instruction) if fused else 0.0,
            )
        if opcode == "dot":
            return Costs(matmul_flops=dot_flops(self.module, computation, instruction))
        if opcode == "convolution":
            return Costs(matmul_flops=convolution_flops(self.module, computation, instruction))
        if opcode in ELEMENTWISE:
            return Costs(other_flops=float(instruction.shape.size))
        if opcode in TRANSCENDENTAL:
            return Costs(transcendentals=float(instruction.shape.size))
        if opcode in ("reduce", "reduce-window"):
            operands = self.module.operands(computation, instruction)
            return Costs(other_flops=float(operands[0].shape.size if operands else 0))
        return Costs()

    def _custom_call(
        self, computation: Computation, instruction: Instruction, nbytes: float
    ) -> Costs:
        target = instruction.target or ""
        if target.startswith(KERNEL_TARGETS):
            estimate = _kernel_estimate(instruction)
            flops = estimate.get("flops")
            traffic = max(nbytes, estimate.get("bytes_accessed", 0.0))
            kernel = KernelCall(instruction, 1.0, flops, traffic)
            return Costs(
                kernel_flops=flops or 0.0,
                transcendentals=estimate.get("transcendentals", 0.0),
                hbm_bytes=traffic - nbytes,
                kernels=(kernel,),
            )
        if target.startswith("__cublas$"):
            return Costs(matmul_flops=_cublas_flops(self.module, computation, instruction))
        if target.startswith("__cudnn$fmha"):
            return Costs(matmul_flops=_attention_flops(self.module, computation, instruction))
        return Costs()

    def _bytes(self, computation: Computation, instruction: Instruction) -> float:
        opcode = instruction.opcode
        operands = self.module.operands(computation, instruction)
        if opcode == "custom-call" and instruction.target in ("AllocateBuffer", "ConcatBitcast"):
            return 0.0
        if opcode.removesuffix("-start") in ASYNC_MOVES and opcode.endswith("-start"):
            return self._moved_bytes(instruction, operands)
        if opcode == "fusion":
            return self._fusion_bytes(instruction, operands)
        written = sum(a.nbytes for a in instruction.arrays if self._in_hbm(a))
        if _is_collective(instruction):
            return self._collective_bytes(computation, instruction)
        if opcode in ("dynamic-slice", "slice", "gather"):
            return written + (instruction.nbytes if self._in_hbm(operands[0].shape) else 0.0)
        if opcode == "dynamic-update-slice":
            update = operands[1].shape.nbytes
            return 2 * update if self._in_hbm(instruction.shape) else 0.0
        read = sum(a.nbytes for i in operands for a in i.arrays if self._in_hbm(a))
        return written + read

    def _collective_bytes(self, computation: Computation, instruction: Instruction) -> float:
        """Operands read and results written; asynchronous ones list both among their results."""
        operands = self.module.operands(computation, instruction)
        read = sum(a.nbytes for i in operands for a in i.arrays if self._in_hbm(a))
        listed = sum(a.nbytes for a in instruction.arrays if self._in_hbm(a))
        return listed if instruction.opcode.endswith("-start") else listed + read

    def _in_hbm(self, array: Array) -> bool:
        return array.memory_space == 0

    def _moved_bytes(self, start: Instruction, operands: list[Instruction]) -> float:
        """Traffic of a transfer that goes on in the background, at both of its ends."""
        if start.opcode == "copy-start":  # results: destination, source, semaphore
            source, destination = operands[0].shape, start.arrays[0]
            moved = destination.nbytes
        else:  # results: operands, destination, semaphores
            num_operands = sum(len(operand.arrays) for operand in operands)
            destination = start.arrays[num_operands]
            updates = start.opcode == "dynamic-update-slice-start"
            source = operands[1 if updates else 0].shape
            moved = source.nbytes if updates else destination.nbytes
        return sum(moved for end in (source, destination) if self._in_hbm(end))

    def _fusion_bytes(self, fusion: Instruction, operands: list[Instruction]) -> float:
        inner = self.module.computations.get(fusion.called("calls") or "")
        if inner is None:
            return sum(a.nbytes for a in fusion.arrays if self._in_hbm(a))
        read = sum(
            self._read_share(inner, index, operand)
            for index, operand in enumerate(operands)
            if all(self._in_hbm(a) for a in operand.arrays)
        )
        return read + self._written(inner, fusion)

    def _read_share(self, inner: Computation, index: int, operand: Instruction) -> float:
        """Bytes of an operand that a fusion reads: only the slices, if it only slices it."""
        parameter = inner.parameters.get(index)
        if parameter is None:
            return operand.nbytes
        return min(operand.nbytes, self._used(inner, parameter))

    def _used(self, inner: Computation, value: Instruction) -> float:
        """Bytes of ``value``, computed or read inside a fusion, that its users need."""
        total = 0.0
        for user in inner.users[value.name]:
            total += self._used_by(inner, user, value)
        return min(total, value.nbytes)

    def _used_by(self, inner: Computation, user: Instruction, value: Instruction) -> float:
        sliced = user.opcode in ("dynamic-slice", "slice", "gather")
        if sliced and user.operands[0] == value.name:
            return user.nbytes
        if user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            return 0.0  # updated in place
        if user.opcode == "tuple" and value.opcode == "parameter":
            return 0.0  # handed through
        if _is_collective(user) or user.target in ASYNC_COLLECTIVES:
            return 0.0  # counted with the collective
        if user.opcode in PASSING:
            share = 1.0 if user.is_root else self._used(inner, user) / max(user.nbytes, 1.0)
            # A padded array is larger than what it is made of.
            return value.nbytes * min(1.0, share * max(1.0, user.nbytes / max(value.nbytes, 1.0)))
        if user.opcode == "fusion":
            return self._used_by_fusion(inner, user, value)
        return value.nbytes

    def _used_by_fusion(self, inner: Computation, fusion: Instruction, value: Instruction) -> float:
        nested = self.module.computations.get(fusion.called("calls") or "")
        index = fusion.operands.index(value.name)
        if nested is None or index not in nested.parameters:
            return value.nbytes
        parameter = nested.parameters[index]
        root = nested.root
        while root.opcode == "bitcast":
            root = nested.instructions[root.operands[0]]
        if root is not parameter:
            return self._used(nested, parameter)
        return fusion.nbytes if fusion.is_root else self._used(inner, fusion)

    def _written(self, inner: Computation, fusion: Instruction) -> float:
        root = inner.root
        if root.target in ASYNC_COLLECTIVES:
            return 0.0
        results = self.module.operands(inner, root) if root.opcode == "tuple" else [root]
        if len(results) != len(fusion.arrays):
            return sum(a.nbytes for a in fusion.arrays if self._in_hbm(a))
        total = 0.0
        for result, array in zip(results, fusion.arrays, strict=True):
            if not self._in_hbm(array) or result.opcode == "parameter" or _is_collective(result):
                continue
            while result.opcode == "bitcast":
                result = inner.instructions[result.operands[0]]
            if result.opcode == "dynamic-update-slice":
                total += self.module.operands(inner, result)[1].shape.nbytes
            else:
                total += array.nbytes
        return total


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in KINDS


def _total(parts: list[Costs]) -> Costs:
    if not parts:
        return Costs()
    values = {}
    for field in dataclasses.fields(Costs):
        column = [getattr(part, field.name) for part in parts]
        if isinstance(field.default, tuple):
            values[field.name] = tuple(item for items in column for item in items)
        else:
            values[field.name] = float(sum(column))
    return Costs(**values)


def estimated_cycles(instruction: Instruction) -> float:
    """Returns XLA's cycle estimate of an instruction (TPU), or 0 where there is none."""
    match = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return float(match.group(1)) if match else 0.0


def dot_flops(module: Module, computation: Computation, dot: Instruction) -> float:
    """Returns twice the multiply-adds of a dot."""
    lhs = module.operands(computation, dot)[0].shape
    contracting = [int(d) for d in re.findall(r"\d+", dot.attribute("lhs_contracting_dims") or "")]
    return 2.0 * dot.shape.size * float(np.prod([lhs.dims[d] for d in contracting]))


def convolution_flops(module: Module, computation: Computation, conv: Instruction) -> float:
    """Returns twice the multiply-adds of a convolution.

    On TPU every matrix product is one. Its batch dimensions become spatial ones, padded and
    dilated so that most positions of the window fall outside; those are not counted.
    """
    lhs, rhs = (i.shape for i in module.operands(computation, conv)[:2])
    left, right = conv.attribute("dim_labels").split("_")
    right, out = right.split("->")
    windows = _window(conv)
    positions = 1.0
    for axis, window in windows.items():
        label = str(axis)
        positions *= _valid_positions(
            lhs.dims[left.index(label)],
            rhs.dims[right.index(label)],
            conv.shape.dims[out.index(label)],
            window,
        )
    groups = int(conv.attribute("feature_group_count") or 1)
    batch_groups = int(conv.attribute("batch_group_count") or 1)
    features = rhs.dims[right.index("o")] * lhs.dims[left.index("f")] / groups
    return 2.0 * positions * features * lhs.dims[left.index("b")] / batch_groups


def _window(conv: Instruction) -> dict[int, dict[str, int]]:
    """Window of each spatial dimension: stride, padding at the start, dilations."""
    text = conv.attribute("window") or ""
    labels = re.findall(r"\d", (conv.attribute("dim_labels") or "").split("_")[0])
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", text))

    def values(name: str, default: int) -> list[int]:
        if name not in fields:
            return [default] * len(labels)
        return [int(part.split("_")[0]) for part in fields[name].split("x")]

    columns = {
        "stride": values("stride", 1),
        "pad": values("pad", 0),
        "lhs_dilate": values("lhs_dilate", 1),
        "rhs_dilate": values("rhs_dilate", 1),
    }
    return {axis: {k: v[axis] for k, v in columns.items()} for axis in range(len(labels))}


def _valid_positions(size: int, kernel: int, out: int, window: dict[str, int]) -> float:
    """Pairs of output position and window position that fall on an element of the input."""
    end = (size - 1) * window["lhs_dilate"]
    starts = np.arange(out) * window["stride"] - window["pad"]
    count = 0
    for k in range(kernel):
        at = starts + k * window["rhs_dilate"]
        count += int(((at >= 0) & (at <= end) & (at % window["lhs_dilate"] == 0)).sum())
    return float(count)


def _kernel_estimate(instruction: Instruction) -> dict[str, float]:
    match = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.attributes)
    pairs = re.findall(r'"(\w+)":"?(\d+)"?', match.group(1)) if match else []
    return {name: float(value) for name, value in pairs}


def _cublas_flops(module: Module, computation: Computation, gemm: Instruction) -> float:
    lhs = module.operands(computation, gemm)[0].shape
    match = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', gemm.attributes)
    dims = [int(d) for d in re.findall(r"\d+", match.group(1))] if match else [-1]
    return 2.0 * gemm.shape.size * float(np.prod([lhs.dims[d] for d in dims]))


def _attention_flops(module: Module, computation: Computation, call: Instruction) -> float:
    """Two products of queries, keys and values; five where gradients are computed.

    Shapes are (batch, seq, heads, head_dim); masked positions are counted.
    """
    q, k = (i.shape for i in module.operands(computation, call)[:2])
    products = 5 if "Backward" in (call.target or "") else 2
    return 2.0 * products * q.size * k.dims[1]
