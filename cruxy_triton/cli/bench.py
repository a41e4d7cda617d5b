"""`cruxy-triton bench`: the optimizer step against its peers, and the choices behind the 8-bit and 16-bit formats.

cruxy-triton bench step --device cpu --census lora-r8
cruxy-triton bench codec --gradients runs/NAME/gradients
cruxy-triton bench rounding
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cruxy_triton.bench.census import CENSUSES
from cruxy_triton.cli.arguments import columns
from cruxy_triton.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    step = kinds.add_parser("step", help="time of an optimizer step against torch, lion-pytorch, the Cruxy SDK")
    step.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    step.add_argument("--census", default="lora-r8", help=f"{', '.join(CENSUSES)} (default: %(default)s)")
    step.add_argument("--dtype", default="fp32", help="fp32, fp16 or bf16 parameters and gradients")
    step.add_argument("--rounds", type=int, default=30, help="interleaved rounds (default: %(default)s)")
    step.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    step.add_argument("--only", metavar="WORD", help="contestants whose name contains WORD")
    codec = kinds.add_parser("codec", help="sign flips of 8-bit momentum on recorded gradients")
    codec.add_argument("--gradients", type=Path, required=True, help="folder or file of recorded gradients")
    codec.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.99), help="Lion's betas (default: .9 .99)")
    codec.add_argument("--skip", type=int, default=0, help="steps at the start that are not counted")
    rounding = kinds.add_parser("rounding", help="16-bit parameters: stochastic rounding, compensation byte")
    for kind in (step, codec, rounding):
        kind.add_argument("--json", action="store_true", help="print JSON")
        kind.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args: argparse.Namespace) -> int:
    report = {"step": run_step, "codec": run_codec, "rounding": run_rounding}[args.kind](args)
    if args.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return 0
    rows = report["rows"]
    heads = list(dict.fromkeys(head for row in rows for head in row))
    sys.stdout.write(columns([heads, *[[cell(row.get(head)) for head in heads] for row in rows]]))
    facts = {key: value for key, value in report.items() if key not in ("rows", "absent") and value is not None}
    sys.stdout.write("\n" + ", ".join(f"{key}: {value}" for key, value in facts.items()) + "\n")
    for name, reason in report.get("absent", {}).items():
        sys.stdout.write(f"did not run: {name} ({reason})\n")
    return 0


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_step(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from cruxy_triton.bench import step

    if args.rounds < 1 or (args.threads is not None and args.threads < 1):
        raise UserError("--rounds and --threads must be at least 1")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return step.run(args.device, args.census, args.rounds, args.dtype, args.only)


def run_codec(args: argparse.Namespace) -> dict[str, Any]:
    from cruxy_triton.bench import codec

    beta1, beta2 = args.betas
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise UserError(f"--betas are {beta1} and {beta2}; expected two values from 0 to below 1")
    if not args.gradients.exists():
        raise UserError(f"{args.gradients}: no such file or folder; `finetune --record-gradients N` makes one")
    rows, source = codec.table(args.gradients, (beta1, beta2), args.skip)
    return {"rows": rows, "betas": [beta1, beta2], "gradients": source}


def run_rounding(args: argparse.Namespace) -> dict[str, Any]:
    from cruxy_triton.bench import rounding

    return {"rows": rounding.table()}
