"""Reads the text of an optimised HLO module into computations and instructions.

Only what cost accounting needs is understood: shapes with their memory spaces, operands, called
computations and attributes, and how often a ``while`` loop runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "f4e2m1fn": 4, "f8e3m4": 8, "f8e4m3": 8, "f8e4m3fn": 8,
    "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2": 8, "f8e5m2fnuz": 8, "f8e8m0fnu": 8,
}  # fmt: skip

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([^\]]*)\](\{[^{}]*\})?")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
# An operand; ``%t#1`` is element 1 of tuple ``%t``, without an instruction of its own.
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)*)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array type.

    Attributes:
      dtype: as HLO writes it, e.g. "bf16".
      dims: sizes.
      memory_space: 0 is the device's main memory (HBM), 1 a TPU's vector memory, 5 the host's.
    """

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> float:
        return self.size * BITS.get(self.dtype, 0) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: without the leading percent sign.
      opcode: e.g. "fusion".
      shape_text: shape of the result as written.
      arrays: the arrays of the result, a tuple's elements in order.
      operands: names of the operands.
      arguments: text between the parentheses, such as a constant's value.
      attributes: text after the parentheses.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    shape_text: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def shape(self) -> Array:
        return self.arrays[0]

    @property
    def nbytes(self) -> float:
        return sum(array.nbytes for array in self.arrays)

    def attribute(self, name: str) -> str | None:
        """Returns the value of ``name=value``, or None; values end at a comma outside brackets."""
        match = re.search(rf"(?:^|,\s*){re.escape(name)}=", self.attributes)
        if match is None:
            return None
        return self.attributes[match.end() : _end_of_value(self.attributes, match.end())]

    def called(self, name: str) -> str | None:
        """Returns the computation that attribute ``name`` names, or None."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else None

    @property
    def target(self) -> str | None:
        """Target of a custom call."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match.group(1) if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in program order."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(
            (i for i in self.instructions.values() if i.is_root),
            list(self.instructions.values())[-1],
        )

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                if operand in users:
                    users[operand].append(instruction)
        return users

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, and the name of the one where execution starts."""

    computations: dict[str, Computation]
    entry_name: str

    @property
    def entry(self) -> Computation:
        return self.computations[self.entry_name]

    def operands(self, computation: Computation, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions that produce the operands."""
        table = computation.instructions
        return [table[name] for name in instruction.operands if name in table]


def parse_module(text: str) -> Module:
    """Parses the text of an HLO module (``compiled.as_text()``).

    Raises:
      ValueError: when there is no entry computation in ``text``.
    """
    computations: dict[str, Computation] = {}
    entry_name = None
    current: dict[str, Instruction] | None = None
    name = ""
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                name, current = header.group(2), {}
                entry_name = name if header.group(1) else entry_name
        elif line.strip() == "}":
            if current:
                computations[name] = Computation(name, current)
            current = None
        else:
            instruction = parse_instruction(line)
            if instruction is not None:
                for operand in instruction.operands:
                    _add_elements(current, operand)
                current[instruction.name] = instruction
    if entry_name is None or entry_name not in computations:
        raise ValueError("the text has no ENTRY computation; expected an HLO module")
    return Module(computations, entry_name)


def _add_elements(instructions: dict[str, Instruction], operand: str) -> None:
    """Gives the tuple elements in an operand such as ``t#1#0`` instructions of their own."""
    name, *indices = operand.split("#")
    for index in indices:
        source, name = name, f"{name}#{index}"
        if name in instructions or source not in instructions:
            continue
        shape = _elements(instructions[source].shape_text)[int(index)]
        instructions[name] = Instruction(
            name=name,
            opcode="get-tuple-element",
            shape_text=shape,
            arrays=parse_arrays(shape),
            operands=(source,),
            arguments=f"%{source}",
            attributes=f"index={index}",
            is_root=False,
        )


def _elements(shape: str) -> list[str]:
    """Splits a tuple's shape at its outermost commas."""
    text = _COMMENT.sub("", shape.strip())[1:-1]
    elements, start = [], 0
    while start < len(text):
        end = _end_of_value(text, start)
        elements.append(text[start:end].strip())
        start = end + 1
    return elements


def parse_instruction(line: str) -> Instruction | None:
    """Parses one line; None when it is not an instruction."""
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    root, name, rest = match.groups()
    end = _end_of_shape(rest)
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, parenthesis, _ = rest.partition("(")
    if not parenthesis:
        return None
    start = len(opcode) + 1
    stop = _closing(rest, start - 1)
    arguments = rest[start:stop]
    return Instruction(
        name=name,
        opcode=opcode.strip(),
        shape_text=shape,
        arrays=parse_arrays(shape),
        operands=tuple(_NAME.findall(_COMMENT.sub("", arguments))),
        arguments=arguments,
        attributes=rest[stop + 1 :].lstrip(", "),
        is_root=root is not None,
    )


def parse_arrays(text: str) -> tuple[Array, ...]:
    """Returns the arrays of a shape, a tuple's elements flattened."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(_COMMENT.sub("", text)):
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d.strip())
        space = _MEMORY_SPACE.search(layout)
        arrays.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(arrays)


def _end_of_shape(text: str) -> int:
    if text.startswith("("):
        return _closing(text, 0) + 1
    space = text.find(" ")
    return len(text) if space < 0 else space


_OPEN, _CLOSE = "([{", ")]}"


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at ``start``, quoted text skipped."""
    depth, i, quoted = 0, start, False
    while i < len(text):
        char = text[i]
        if quoted:
            i += char == "\\"
            quoted = char != '"'
        elif char == '"':
            quoted = True
        elif char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return len(text)


def _end_of_value(text: str, start: int) -> int:
    i = start
    while i < len(text):
        if text[i] in _OPEN:
            i = _closing(text, i)
        elif text[i] == '"':
            i = text.find('"', i + 1)
            i = len(text) if i < 0 else i
        elif text[i] == ",":
            return i
        i += 1
    return len(text)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often the ``while`` instruction's body runs, or None when it is not static.

    XLA's annotation is used where there is one (GPU). Elsewhere the loop's condition must compare
    an element of the carried tuple with a constant, as that of ``lax.scan`` and of ``fori_loop``
    with static bounds does; start and step are read from the initial tuple and from the body.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known.group(1))
    condition = module.computations.get(loop.called("condition") or "")
    body = module.computations.get(loop.called("body") or "")
    if condition is None or body is None:
        return None
    test = _loop_test(module, condition)
    if test is None:
        return None
    index, limit, direction = test
    initial = _initial_values(module, computation, loop)
    if isinstance(limit, str):
        limit = initial.get(int(limit))
        if limit is None:
            return None
    start = initial.get(index, 0)
    step = _step(module, body, index)
    if direction == "GT":
        start, limit, step = -start, -limit, -step
    if step <= 0:
        return None
    extra = 1 if direction == "LE" else 0
    return max(0, math.ceil((limit + extra - start) / step))


def _loop_test(module: Module, condition: Computation) -> tuple[int, int | str, str] | None:
    """Index of the counter, the limit (a number, or the index of a carried element as text), and
    the comparison's direction."""
    root = condition.root
    operands = module.operands(condition, root)
    if root.opcode == "fusion":
        inner = module.computations[root.called("calls")]
        compare = inner.root
        if compare.opcode != "compare":
            return None
        sides = []
        for side in module.operands(inner, compare):
            side = _through(module, inner, side)
            if side.opcode == "parameter":
                side = operands[int(side.arguments)]
            sides.append(side)
    elif root.opcode == "compare":
        compare, sides = root, operands
    else:
        return None
    direction = compare.attribute("direction")
    sides = [_through(module, condition, side) for side in sides]
    if len(sides) != 2 or direction not in ("LT", "LE", "GT"):
        return None
    counter, limit = sides
    if counter.opcode != "get-tuple-element":
        return None
    index = int(counter.attribute("index"))
    if limit.opcode == "constant":
        return index, int(limit.arguments), direction
    if limit.opcode == "get-tuple-element":
        return index, limit.attribute("index"), direction
    return None


def _through(module: Module, computation: Computation, instruction: Instruction) -> Instruction:
    """Follows copies and conversions to what they copy."""
    while instruction.opcode in ("copy", "bitcast", "convert") and instruction.operands:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _initial_values(module: Module, computation: Computation, loop: Instruction) -> dict[int, int]:
    """Constants among the elements of the tuple that the loop starts from, by index."""
    start = computation.instructions.get(loop.operands[0]) if loop.operands else None
    if start is None or start.opcode != "tuple":
        return {}
    values = {}
    for index, operand in enumerate(module.operands(computation, start)):
        operand = _through(module, computation, operand)
        if operand.opcode == "constant" and re.fullmatch(r"-?\d+", operand.arguments):
            values[index] = int(operand.arguments)
    return values


def _step(module: Module, body: Computation, index: int) -> int:
    """What the body adds to the counter; 1 unless it is plainly another constant."""
    root = body.root
    if root.opcode != "tuple" or index >= len(root.operands):
        return 1
    update = _through(module, body, body.instructions[root.operands[index]])
    scope = body
    if update.opcode == "fusion":
        scope = module.computations[update.called("calls")]
        update = scope.root
    if update.opcode not in ("add", "subtract"):
        return 1
    for operand in module.operands(scope, update):
        if operand.opcode == "constant" and re.fullmatch(r"-?\d+", operand.arguments):
            value = int(operand.arguments)
            return value if update.opcode == "add" else -value
    return 1
