"""Collectives of a compiled module: kind, group, payload, and time on the interconnect."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from jaxeff.aot.hlo import Computation, Instruction, Module
from jaxeff.aot.targets import Chip, Target

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective as every device executes it.

    Attributes:
      kind: one of `KINDS`.
      group: device numbers of one of its groups (all are alike), in mesh order.
      payload: bytes of the whole buffer per device: what a gather yields, what a reduction or an
        exchange starts from.
      count: executions per call of the program, loops unrolled.
    """

    kind: str
    group: tuple[int, ...]
    payload: float
    count: float = 1.0

    def scaled(self, times: float) -> Collective:
        return dataclasses.replace(self, count=self.count * times)

    @property
    def sent(self) -> float:
        """Bytes a device sends per execution, by the best algorithm on a ring."""
        n = len(self.group)
        if n < 2:
            return 0.0
        if self.kind == "all-reduce":
            return 2 * self.payload * (n - 1) / n
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.payload
        return self.payload * (n - 1) / n

    def seconds(self, target: Target, coordinates: Sequence[Sequence[int]] | None) -> float:
        """Returns the time of all executions on the links of the dimensions the group spans."""
        links, hops = _links(self, target.chip, target.topology, coordinates)
        if not self.sent or not links:
            return 0.0
        sent = self.payload * hops if "all-to-all" in self.kind and hops else self.sent
        return self.count * sent / (links * target.chip.link_bandwidth)


def _links(collective, chip: Chip, topology, coordinates) -> tuple[float, float]:
    """Links a device can use within its group, and the mean hops of an exchange.

    Along a torus dimension that the group spans whole there are two directions; where it does not
    close into a ring, the devices at the ends have only one, and they must receive everything.
    """
    if chip.num_dims == 0 or coordinates is None:
        return 1.0, 0.0
    positions = np.array([coordinates[i] for i in collective.group])
    links = hops = 0.0
    for dim, size in enumerate(topology):
        spanned = len(np.unique(positions[:, dim]))
        if spanned == 1:
            continue
        ring = spanned == size and size % chip.wrap == 0
        links += 2 if ring else 1
        hops += spanned / 4 if ring else (spanned**2 - 1) / (3 * spanned)
    if collective.kind == "collective-permute":
        # Permutations come in pairs, one each way round.
        return (2.0 if links else 0.0), 0.0
    # A group within one chip (the two halves of a tpu7x) does not use the interconnect.
    return links, hops


def find_collective(
    module: Module, computation: Computation, instruction: Instruction, chains: frozenset[str]
) -> Collective | None:
    """Returns the collective that ``instruction`` starts, or None.

    TPU modules fuse a collective with the computation that hides it: the same instruction then
    appears in the fusion that starts it, in those it runs beside, and in the one that ends it, all
    with one ``chain_id``. Only the first counts.

    Args:
      chains: see `started_chains`.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    chain = _chain(instruction)
    if chain in chains and not _is_start_of_chain(computation, instruction):
        return None
    group = first_group(instruction)
    nbytes = sum(i.nbytes for i in module.operands(computation, instruction))
    if kind == "all-reduce" and _is_scattered(computation, instruction):
        kind = "reduce-scatter"
    payload = nbytes * len(group) if kind == "all-gather" else nbytes
    return Collective(kind, group, payload)


def started_chains(module: Module) -> frozenset[str]:
    """Returns the chain ids whose starting fusion is in the module."""
    return frozenset(
        _chain(instruction)
        for computation in module.computations.values()
        for instruction in computation
        if _chain(instruction) and _is_start_of_chain(computation, instruction)
    )


def _chain(instruction: Instruction) -> str | None:
    match = re.search(r'frontend_attributes=\{[^}]*chain_id="(\d+)"', instruction.attributes)
    if match is None:
        return None
    channel = instruction.attribute("channel_id")
    return f"{channel}/{match.group(1)}"


def _is_start_of_chain(computation: Computation, instruction: Instruction) -> bool:
    users = computation.users[instruction.name]
    return any(user.target == "AsyncCollectiveStart" for user in users)


def _is_scattered(computation: Computation, instruction: Instruction) -> bool:
    """A TPU reduce-scatter is a fusion of an all-reduce and a slice of its result."""
    users = computation.users[instruction.name]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def first_group(instruction: Instruction) -> tuple[int, ...]:
    """Returns one group of devices of a collective, from any of HLO's notations.

    ``{{0,1},{2,3}}`` lists the groups; ``[2,2]<=[4]T(1,0)`` reshapes the device numbers (here to 2
    groups of 2) after a transposition; ``mesh['a'=2,'b'=4] {'b'}`` names axes of a mesh of devices.
    """
    if instruction.opcode.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute("source_target_pairs") or "")
        pairs = [(int(a), int(b)) for a, b in pairs if a != b]
        return pairs[0] if pairs else (0,)
    text = instruction.attribute("replica_groups") or ""
    if text.startswith("mesh["):
        end = _end_of_groups(instruction.attributes)
        return _mesh_group(instruction.attributes[end[0] : end[1]])
    if text.startswith("{{"):
        return tuple(int(i) for i in re.match(r"\{\{([\d,]*)\}", text).group(1).split(",") if i)
    match = re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match:
        dims = [int(d) for d in match.group(3).split(",")]
        ids = np.arange(int(np.prod(dims))).reshape(dims)
        if match.group(4):
            ids = ids.transpose([int(a) for a in match.group(4).split(",")])
        return tuple(ids.reshape(int(match.group(1)), int(match.group(2)))[0].tolist())
    return (0,)


def _end_of_groups(attributes: str) -> tuple[int, int]:
    start = attributes.index("mesh[")
    return start, attributes.index("}", start) + 1


def _mesh_group(text: str) -> tuple[int, ...]:
    shape = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", text)]
    axes_text = text[text.rindex("{") :]
    # An axis may be split: 'x':(2)4 is the factor of size 4 after a factor of size 2.
    axes = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes_text)
    sizes = [size for _, size in shape]
    ids = np.arange(int(np.prod(sizes))).reshape(sizes)
    index: list[object] = [0] * len(shape)
    for name, before, factor in axes:
        position = [n for n, _ in shape].index(name)
        size = sizes[position]
        if not before:
            index[position] = list(range(size))
            continue
        stride = size // (int(before) * int(factor))
        index[position] = [i * stride for i in range(int(factor))]
    chosen = ids[np.ix_(*[[0] if i == 0 else i for i in index])]
    return tuple(chosen.reshape(-1).tolist())
