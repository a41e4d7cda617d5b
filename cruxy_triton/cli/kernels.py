"""`cruxy-triton kernels`: every kernel cross-compiled for named architectures, and what each needs there.

No GPU is used. Exit code 1 when a limit is broken: spills, more than 64 registers per thread, parameters or
gradients not loaded 128 bits at a time, or an instruction that the project does not allow.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

from cruxy_triton.cli.arguments import columns
from cruxy_triton.errors import UserError

# The LoRA adapters (r=8, all linears) of TinyLlama: the census that predicted times are for.
DEFAULT_PARAMETERS = 6_307_840


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument(
        "--arch", action="append", help="sm_75, sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120; default: all"
    )
    parser.add_argument("--only", metavar="WORD", help="variants whose name contains WORD")
    parser.add_argument("--gpu", help="predict times at the bandwidth of this GPU profile, for example gtx1650")
    parser.add_argument("--bandwidth-gb-s", type=float, help="predict times at this bandwidth, in GB/s")
    parser.add_argument(
        "--parameters", type=int, default=DEFAULT_PARAMETERS, help="parameters per step (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=2, help="compile in this many processes")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 replaces the compiler; unset it to cross-compile")
    try:
        from cruxy_kernels.inspect.resources import ARCHITECTURES
        from cruxy_kernels.inspect.variants import all_variants
    except ImportError as error:
        raise UserError(f"cross-compiling needs triton, which cannot be imported here ({error})") from error

    architectures = [architecture(text, ARCHITECTURES) for text in args.arch] if args.arch else list(ARCHITECTURES)
    if args.parameters <= 0 or args.processes <= 0:
        raise UserError("--parameters and --processes must be at least 1")
    names = [v.name for v in all_variants() if args.only is None or args.only in v.name]
    if not names:
        raise UserError(f"no variant has {args.only!r} in its name; leave --only out to see all")
    bandwidth, where = chosen_bandwidth(args)
    work = [(index, arch) for arch in architectures for index in names]
    if args.processes == 1:
        rows = [inspect_one(item) for item in work]
    else:
        # A forked child would inherit torch's threads in an unknown state.
        context = multiprocessing.get_context("spawn")
        # Without a handler a SIGTERM would end this process alone and leave the others behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with context.Pool(args.processes) as pool:
            rows = pool.map(inspect_one, work, chunksize=4)
    for row in rows:
        moved = row["bytes_moved"]
        row["predicted_ms"] = moved * args.parameters / bandwidth / 1e6 if bandwidth and moved else None
    broken = [row for row in rows if row["broken"]]
    if args.json:
        report = {
            "bandwidth_gb_s": bandwidth,
            "bandwidth_source": where,
            "parameters": args.parameters,
            "variants": rows,
            "ok": not broken,
        }
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        sys.stdout.write(table(rows, bandwidth, where, args.parameters))
    return 1 if broken else 0


def architecture(text: str, known: tuple[int, ...]) -> int:
    """75 of "sm_75" or "75"."""
    digits = text.removeprefix("sm_")
    if not digits.isdigit() or int(digits) not in known:
        raise UserError(f"unknown architecture {text!r}: expected one of {', '.join(f'sm_{a}' for a in known)}")
    return int(digits)


def chosen_bandwidth(args: argparse.Namespace) -> tuple[float | None, str | None]:
    """(GB/s or None, where the figure comes from)."""
    if args.bandwidth_gb_s is not None:
        if args.bandwidth_gb_s <= 0:
            raise UserError(f"--bandwidth-gb-s is {args.bandwidth_gb_s}; expected a positive number")
        return args.bandwidth_gb_s, "--bandwidth-gb-s"
    if args.gpu is None:
        return None, None
    from cruxy_triton.planner.card import load_card

    card = load_card(args.gpu)
    return card.bandwidth_gb_s, f"{card.name}, its data sheet"


def inspect_one(item: tuple[str, int]) -> dict[str, Any]:
    """One variant on one architecture, as plain data."""
    from cruxy_kernels.inspect.resources import broken_limits, inspect
    from cruxy_kernels.inspect.variants import all_variants

    name, arch = item
    variant = next(v for v in all_variants() if v.name == name)
    usage = inspect(variant, arch)
    return asdict(usage) | {
        "bytes_moved": variant.bytes_moved,
        "floor": variant.floor,
        "broken": broken_limits(variant, usage),
    }


def widths(counts: dict[str, int]) -> str:
    """{"128": 2, "64": 17} as "2x128 17x64"."""
    return " ".join(f"{counts[bits]}x{bits}" for bits in sorted(counts, key=int, reverse=True)) or "-"


def table(rows: list[dict[str, Any]], bandwidth: float | None, where: str | None, parameters: int) -> str:
    """The report for people."""
    heads = ["kernel", "arch", "regs", "spills", "shared", "occupancy", "main loads", "main stores", "B/param", "floor"]
    if bandwidth:
        heads.append("ms")
    lines = []
    for row in rows:
        line = [
            row["name"],
            f"sm_{row['arch']}",
            str(row["registers"]),
            str(row["spills"]),
            str(row["shared"]),
            f"{row['occupancy']:.0%}",
            widths(row["main_loads"]),
            widths(row["main_stores"]),
            f"{row['bytes_moved']:.2f}" if row["bytes_moved"] else "-",
            f"{row['floor']:.2f}" if row["floor"] else "-",
        ]
        if bandwidth:
            line.append(f"{row['predicted_ms']:.3f}" if row["predicted_ms"] else "-")
        lines.append(line)
    text = [columns([heads, *lines])]
    if bandwidth:
        text.append(f"ms: predicted, {parameters:,} parameters at {bandwidth:g} GB/s ({where}); no card was measured")
    broken = [f"{row['name']} on sm_{row['arch']}: {problem}" for row in rows for problem in row["broken"]]
    text += [f"broken: {line}" for line in broken] or [f"{len(rows)} variants, no limit broken"]
    return "\n".join(text) + "\n"
