"""Registers, spills and occupancy of Triton kernels, from their PTX.

A kernel called through jax-triton carries its PTX in the custom call; one lowered by XLA (Pallas)
is found in XLA's dump. ``ptxas -v``, which comes with the CUDA wheels, gives what the assembled
kernel uses.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from jaxeff.aot.hlo import Instruction
from jaxeff.aot.targets import Chip

ARCHITECTURE = "sm_90a"
REGISTERS_PER_SM = 65536
THREADS_PER_SM = 2048
BLOCKS_PER_SM = 32
THREADS_PER_WARP = 32
REGISTER_GRANULE = 256  # registers are handed out per warp in multiples of this
RESERVED_SHARED = 1024  # shared memory the system takes for each block


@dataclasses.dataclass(frozen=True)
class KernelResources:
    """What one GPU kernel uses.

    Attributes:
      name: name of the instruction.
      entry: name of the kernel.
      blocks: thread blocks of the grid.
      threads: threads per block.
      registers: registers per thread.
      spill_bytes: bytes a thread stores to and loads from local memory for want of registers.
      shared_bytes: shared memory per block, or None when the module does not say.
      blocks_per_sm: blocks that fit on a multiprocessor at once.
      waves: rounds of blocks over the whole chip; 1.1 leaves most of the second round empty.
      tensor_core_instructions: matrix instructions in the program text.
    """

    name: str
    entry: str
    blocks: int
    threads: int
    registers: int
    spill_bytes: int
    shared_bytes: int | None
    blocks_per_sm: int
    waves: float
    tensor_core_instructions: int


@dataclasses.dataclass(frozen=True)
class _Source:
    """A kernel's PTX and launch."""

    entry: str
    ptx: str
    blocks: int
    threads: int
    shared_bytes: int | None


def kernel_resources(
    instruction: Instruction, dump_directory: str | Path | None, chip: Chip
) -> KernelResources | None:
    """Returns the resources of the kernel that a custom call launches.

    None when its PTX is not at hand (Mosaic GPU kernels), or no assembler accepts it.

    Args:
      instruction: a custom call.
      dump_directory: where XLA dumped the module (``xla_dump_to``), for Pallas kernels.
      chip: the GPU.
    """
    if instruction.target == "triton_kernel_call":
        source = _from_jax_triton(instruction)
    else:
        source = _from_dump(instruction, dump_directory)
    if source is None:
        return None
    listing = assemble(source.ptx)
    usage = parse_listing(listing, source.entry) if listing else None
    if usage is None:
        return None
    registers, spill_bytes, static_shared = usage
    shared = source.shared_bytes
    if shared is not None:
        shared = max(shared, static_shared)
    resident = blocks_per_sm(registers, source.threads, shared or static_shared, chip)
    return KernelResources(
        name=instruction.name,
        entry=source.entry,
        blocks=source.blocks,
        threads=source.threads,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=shared,
        blocks_per_sm=resident,
        waves=source.blocks / (chip.num_sms * resident) if resident else math.inf,
        tensor_core_instructions=len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", source.ptx)),
    )


def blocks_per_sm(registers: int, threads: int, shared_bytes: int, chip: Chip) -> int:
    """Returns how many blocks fit on one multiprocessor."""
    warps = math.ceil(threads / THREADS_PER_WARP)
    per_warp = math.ceil(registers * THREADS_PER_WARP / REGISTER_GRANULE) * REGISTER_GRANULE
    limits = [
        BLOCKS_PER_SM,
        THREADS_PER_SM // (warps * THREADS_PER_WARP),
        REGISTERS_PER_SM // max(per_warp * warps, 1),
        chip.vmem_bytes // (shared_bytes + RESERVED_SHARED),
    ]
    return min(limits)


def assemble(ptx: str) -> str | None:
    """Returns ``ptxas -v``'s listing for a PTX module, or None when no assembler accepts it."""
    with tempfile.TemporaryDirectory(prefix="jaxeff_ptx_") as directory:
        path = Path(directory) / "kernel.ptx"
        path.write_text(ptx)
        for program in _assemblers():
            command = [program, "-v", f"-arch={ARCHITECTURE}", str(path), "-o", f"{path}.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stdout + done.stderr
    return None


def _assemblers() -> Iterator[str]:
    """Newest first: an assembler refuses PTX that is newer than itself."""
    for package, pattern in (("nvidia", "cu*/bin/ptxas"), ("triton", "backends/nvidia/bin/ptxas*")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            yield from map(str, sorted(Path(root).glob(pattern), reverse=True))
    on_path = shutil.which("ptxas")
    if on_path:
        yield on_path


def parse_listing(listing: str, entry: str) -> tuple[int, int, int] | None:
    """Returns registers, spilled bytes and static shared memory of kernel ``entry``."""
    parts = listing.split("Compiling entry function '")
    for part in parts[1:]:
        if not part.startswith(f"{entry}'"):
            continue
        registers = re.search(r"Used (\d+) registers", part)
        if registers is None:
            return None
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        return (
            int(registers.group(1)),
            sum(map(int, spills.groups())) if spills else 0,
            int(shared.group(1)) if shared else 0,
        )
    return None


def _from_jax_triton(instruction: Instruction) -> _Source | None:
    """Reads the call's message: kernel (name, warps, shared bytes, PTX) and grid."""
    match = re.search(r'backend_config="((?:[^"\\]|\\.)*)"', instruction.attributes)
    if match is None:
        return None
    try:
        message = dict(_fields(zlib.decompress(unescape(match.group(1)))))
        call = dict(_fields(message[1]))
        kernel = dict(_fields(call[1]))
        ptx = kernel[4].decode()
    except (zlib.error, KeyError, ValueError, IndexError):
        return None
    return _Source(
        entry=kernel[1].decode(),
        ptx=ptx,
        blocks=math.prod(call.get(i, 1) for i in (2, 3, 4)),
        threads=kernel.get(2, 1) * THREADS_PER_WARP,
        shared_bytes=kernel.get(3, 0),
    )


def unescape(text: str) -> bytes:
    """Undoes the C escapes of a byte string in HLO text."""
    simple = {"n": 10, "t": 9, "r": 13}
    out, i = bytearray(), 0
    while i < len(text):
        if text[i] != "\\":
            out += text[i].encode()
            i += 1
        elif text[i + 1] in "01234567":
            out.append(int(text[i + 1 : i + 4], 8))
            i += 4
        else:
            out.append(simple.get(text[i + 1], ord(text[i + 1])))
            i += 2
    return bytes(out)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, value) of a protocol buffer message."""
    i = 0

    def varint() -> int:
        nonlocal i
        value = shift = 0
        while True:
            byte = message[i]
            i += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while i < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
        elif kind == 2:
            length = varint()
            yield key >> 3, message[i : i + length]
            i += length
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            yield key >> 3, message[i : i + size]
            i += size
        else:
            raise ValueError(f"wire type {kind} in a kernel's message")


def _from_dump(instruction: Instruction, directory: str | Path | None) -> _Source | None:
    names = re.search(r'\bname = "([^"]*)"', instruction.attributes)
    if names is None or directory is None:
        return None
    entry = names.group(1)
    for path in sorted(Path(directory).glob("*.ptx")):
        ptx = path.read_text(errors="replace")
        if re.search(rf"\.entry {re.escape(entry)}\b", ptx):
            break
    else:
        return None
    numbers = dict(re.findall(r"\b(\w+) = (\d+) : i\d+", instruction.attributes))
    return _Source(
        entry=entry,
        ptx=ptx,
        blocks=math.prod(int(numbers.get(f"grid_{axis}", 1)) for axis in "xyz"),
        threads=int(numbers.get("num_warps", 4)) * THREADS_PER_WARP,
        shared_bytes=None,
    )
