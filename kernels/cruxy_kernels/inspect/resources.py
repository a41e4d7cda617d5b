"""What a kernel needs on a named card, found without one: registers, spills, shared memory, load widths.

Triton cross-compiles for any NVIDIA architecture; the ptxas inside its wheel assembles, and the cuobjdump beside
it shows the machine code. Bytes per parameter are counted from the tensors that a kernel reads and writes, and the
table that leads to them; the floor is the tensors alone.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..launch import register_limit

# Threads, registers, blocks and shared memory (KiB) of a multiprocessor. CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability".
MULTIPROCESSOR = {
    75: {"threads": 1024, "blocks": 16, "shared_kib": 64},
    80: {"threads": 2048, "blocks": 32, "shared_kib": 164},
    86: {"threads": 1536, "blocks": 16, "shared_kib": 100},
    89: {"threads": 1536, "blocks": 24, "shared_kib": 100},
    90: {"threads": 2048, "blocks": 32, "shared_kib": 228},
    100: {"threads": 2048, "blocks": 32, "shared_kib": 228},
    120: {"threads": 1536, "blocks": 24, "shared_kib": 100},
}
REGISTERS = 65536  # of a multiprocessor, on every architecture here
ARCHITECTURES = tuple(MULTIPROCESSOR)


@dataclass(frozen=True)
class Variant:
    """One kernel with one choice of its constants.

    types: Triton's type of each argument that is no constant ("*fp32", "*i64", "i32", "fp32").
    aligned: arguments that the launcher knows to be multiples of 16.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    wide_loads: int = 0  # 128-bit loads that the parameters and gradients of a thread take
    wide_stores: int = 0  # the same for storing parameters
    bytes_moved: float = 0.0  # bytes per parameter
    floor: float | None = None  # bytes per parameter of the tensors alone
    counts: bool = False  # its programs count themselves with one integer atomic: no value depends on the order


@dataclass
class Usage:
    """What the assembler says about a variant on an architecture."""

    name: str
    arch: int
    registers: int
    spills: int  # bytes of local memory per thread
    shared: int  # bytes per program
    loads: dict[str, int] = field(default_factory=dict)  # instructions by width in bits
    stores: dict[str, int] = field(default_factory=dict)
    main_loads: dict[str, int] = field(default_factory=dict)  # the same, in the unmasked path alone
    main_stores: dict[str, int] = field(default_factory=dict)
    occupancy: float = 0.0  # resident threads over the most a multiprocessor holds
    forbidden: tuple[str, ...] = ()  # instructions that the card, or the project's rules, do not have


def tool(name: str) -> Path:
    """The path of ptxas or cuobjdump in the installed Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise RuntimeError(f"this Triton ({triton.__version__}) has no {name} at {path}; use the Linux wheel")
    return path


def compile_variant(variant: Variant, arch: int) -> Any:
    """Triton's compiled kernel of `variant` for sm_`arch`; needs no GPU."""
    if arch not in MULTIPROCESSOR:
        raise ValueError(f"unknown architecture sm_{arch}: expected one of {', '.join(map(str, ARCHITECTURES))}")
    if not hasattr(variant.kernel, "cache_key"):
        raise RuntimeError("kernels were imported under TRITON_INTERPRET=1; unset it to cross-compile")
    names = variant.kernel.arg_names
    missing = set(names) - set(variant.types) - set(variant.constants)
    if missing:
        raise ValueError(f"{variant.name}: no type and no constant for {', '.join(sorted(missing))}")
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "maxnreg": register_limit((arch // 10, arch % 10))}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def run_tool(name: str, *arguments: str) -> str:
    result = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{name} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def inspect(variant: Variant, arch: int) -> Usage:
    """Compiles, assembles and reads the machine code of `variant` for sm_`arch`."""
    compiled = compile_variant(variant, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(compiled.asm["cubin"])
        resources = run_tool("cuobjdump", "--dump-resource-usage", cubin)
        sass = run_tool("cuobjdump", "--dump-sass", cubin)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    usage = Usage(
        name=variant.name,
        arch=arch,
        registers=found["REG"],
        spills=found["STACK"] + found["LOCAL"],
        shared=compiled.metadata.shared,
    )
    read_sass(sass, usage)
    if variant.counts:
        usage.forbidden = tuple(name for name in usage.forbidden if name != "ATOMG")
    usage.occupancy = occupancy(arch, usage.registers, usage.shared, variant.num_warps)
    return usage


WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


def memory_width(instruction: str) -> tuple[str, int] | None:
    """("load" or "store", bits per thread) of a global memory instruction, None for any other."""
    found = re.search(r"\b(LDG|STG)((?:\.\w+)*)", instruction)
    if found is None:
        return None
    width = next((WIDTHS[part] for part in found[2].split(".") if part in WIDTHS), 32)
    return ("load" if found[1] == "LDG" else "store"), width


def basic_blocks(sass: str) -> list[list[str]]:
    """The instructions of a cuobjdump listing, cut where a branch leaves or arrives."""
    code = [(int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^/]+?);", sass)]
    targets = {int(at, 16) for _, text in code for at in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", text)}
    blocks: list[list[str]] = [[]]
    for at, text in code:
        if at in targets:
            blocks.append([])
        blocks[-1].append(text)
        if re.search(r"\b(BRA|EXIT|RET)\b", text):
            blocks.append([])
    return [block for block in blocks if block]


# What no kernel here may use: tensor cores, asynchronous copies, TMA and atomics, whose order is not fixed.
FORBIDDEN = re.compile(r"\b(HMMA|IMMA|QGMMA|HGMMA|LDGSTS|UTMA\w*|UBLKCP|ATOM|ATOMG|RED|F2FP\.BF16\w*|HFMA2\.BF16\w*)\b")


def read_sass(sass: str, usage: Usage) -> None:
    """Fills in the widths of memory instructions: of all, and of the blocks that take the unmasked path."""
    everything, main = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for block in basic_blocks(sass):
        widths = [width for width in map(memory_width, block) if width is not None]
        everything.update(widths)
        if any(bits == 128 for _, bits in widths):
            main.update(widths)
        usage.forbidden += tuple(found[0] for found in map(FORBIDDEN.search, block) if found)
    for name, counts in (("loads", everything), ("main_loads", main)):
        setattr(usage, name, {str(bits): n for (kind, bits), n in sorted(counts.items()) if kind == "load"})
    for name, counts in (("stores", everything), ("main_stores", main)):
        setattr(usage, name, {str(bits): n for (kind, bits), n in sorted(counts.items()) if kind == "store"})


def occupancy(arch: int, registers: int, shared: int, num_warps: int) -> float:
    """Resident threads over the most that a multiprocessor holds; registers come in units of 256 per warp."""
    unit = MULTIPROCESSOR[arch]
    threads = 32 * num_warps
    registers_per_program = -(-registers * 32 // 256) * 256 * num_warps
    programs = min(
        unit["threads"] // threads,
        unit["blocks"],
        REGISTERS // registers_per_program,
        unit["shared_kib"] * 1024 // shared if shared else unit["blocks"],
    )
    return programs * threads / unit["threads"]


def broken_limits(variant: Variant, usage: Usage) -> list[str]:
    """The limits that `usage` breaks, as sentences; the register limit is launch.py's."""
    found = []
    if usage.spills:
        found.append(f"{usage.spills} bytes per thread spilled, limit 0")
    limit = register_limit((usage.arch // 10, usage.arch % 10))
    if usage.registers > limit:
        found.append(f"{usage.registers} registers per thread, limit {limit}")
    wide = usage.main_loads.get("128", 0)
    if wide < variant.wide_loads:
        found.append(f"{wide} loads of 128 bits in the main path, expected at least {variant.wide_loads}")
    wide = usage.main_stores.get("128", 0)
    if wide < variant.wide_stores:
        found.append(f"{wide} stores of 128 bits in the main path, expected at least {variant.wide_stores}")
    if usage.forbidden:
        found.append(f"uses {', '.join(sorted(set(usage.forbidden)))}")
    return found
