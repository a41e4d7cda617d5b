"""`cruxy-triton bench`: the optimizer step against its peers, and the choices behind the 8-bit and 16-bit formats.

cruxy-triton bench step --device cpu --census lora-r8
cruxy-triton bench codec --gradients runs/NAME/gradients
cruxy-triton bench rounding
cruxy-triton bench gpu --out results
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cruxy_triton.bench.census import CENSUSES
from cruxy_triton.cli.arguments import columns
from cruxy_triton.environment import quiet_libraries, require_train_extra
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
    step.add_argument("--host", action="store_true", help="what a step costs its host, kernels counted and not started")
    step.add_argument("--cases", action="store_true", help="shapes that are dear on a CPU, against torch's AdamW")
    codec = kinds.add_parser("codec", help="sign flips of momentum in 8 or 4 bits on recorded gradients")
    codec.add_argument("--gradients", type=Path, help="folder or file of recorded gradients")
    codec.add_argument("--text", type=Path, help="validation losses after training on this text instead")
    codec.add_argument("--seeds", type=int, default=3, help="runs with --text (default: %(default)s)")
    codec.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.99), help="Lion's betas (default: .9 .99)")
    codec.add_argument("--bits", type=int, default=8, choices=(8, 4), help="of a value (default: %(default)s)")
    codec.add_argument("--skip", type=int, default=0, help="steps at the start that are not counted")
    rounding = kinds.add_parser("rounding", help="16-bit parameters: stochastic rounding, compensation byte")
    gpu = kinds.add_parser("gpu", help="all that only a card can show, in 8 minutes, as one JSON file")
    gpu.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON file")
    gpu.add_argument("--device", choices=("cpu", "cuda"), help="cpu: as far as it goes without a card (default: cuda)")
    gpu.add_argument("--minutes", type=float, default=8, help="what does not fit is listed as not run (default: 8)")
    gpu.add_argument("--only", metavar="WORD", help="parts whose name contains WORD")
    stress = kinds.add_parser("stress", help="small models at absurd learning rates, with and without the guard")
    stress.add_argument("--data", type=Path, help="folder of the texts (default: an embedded one)")
    stress.add_argument("--optimizers", nargs="+", metavar="NAME", help="contestants (default: all)")
    stress.add_argument("--seeds", type=int, default=3, help="runs per cell (default: %(default)s)")
    stress.add_argument("--quick", action="store_true", help="a smaller model, 40 steps, two rates")
    faults = kinds.add_parser("faults", help="what a guarded run makes of injected faults")
    faults.add_argument("--count", type=int, default=1000, help="scenarios (default: %(default)s)")
    guard = kinds.add_parser("guard", help="time of a training step with the guard against one without")
    guard.add_argument("--rounds", type=int, default=100, help="interleaved steps of each (default: %(default)s)")
    guard.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    shakespeare = kinds.add_parser("shakespeare", help="the Cruxy white paper's benchmark, with validation losses")
    shakespeare.add_argument("--data", type=Path, help="text file (default: Tiny Shakespeare, fetched once)")
    shakespeare.add_argument("--optimizers", nargs="+", metavar="NAME", help="contestants (default: all)")
    shakespeare.add_argument("--plot", type=Path, help="file for loss curves, learning rates and phases")
    shakespeare.add_argument("--quick", action="store_true", help="a smaller model, 200 steps, three rates, one seed")
    layerwise = kinds.add_parser("layerwise", help="AdamW alone, under BLADE and under SKETCH-ALIGN")
    layerwise.add_argument("--data", type=Path, help="text or question/answer JSONL (default: Tiny Shakespeare); with "
                           "--model smollm2 the folder of gsm8k/train.jsonl and gsm8k/test.jsonl")  # fmt: skip
    layerwise.add_argument("--contestants", nargs="+", metavar="NAME", help="AdamW and controllers (default: all)")
    layerwise.add_argument("--peak", type=float, metavar="LR", help="the tuned peak (default: AdamW's best of five)")
    layerwise.add_argument("--seeds", type=int, default=3, help="runs per cell, 1 to 3 (default: %(default)s)")
    layerwise.add_argument("--plot", type=Path, help="file for heat maps of the multipliers")
    layerwise.add_argument("--quick", action="store_true", help="a smaller model, 60 steps, two rates, fp32, one seed")
    for kind, parameters in ((stress, 0.8), (layerwise, 0.5)):
        kind.add_argument(
            "--model", choices=("characters", "smollm2"), default="characters", help=f"a character model of "
            f"{parameters} M parameters, or LoRA on SmolLM2-135M over GSM8K (default: %(default)s)",
        )  # fmt: skip
    for kind in (stress, shakespeare, layerwise):
        kind.add_argument("--workers", type=int, default=1, help="runs at once, one thread each (default: %(default)s)")
        kind.add_argument("--out", type=Path, help="file for each run as it ends; what it holds is not run again")
    for kind in (step, codec, rounding, gpu, stress, faults, shakespeare, layerwise, guard):
        kind.add_argument("--json", action="store_true", help="print JSON")
        kind.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args: argparse.Namespace) -> int:
    if args.kind == "gpu":
        return run_gpu(args)
    kinds = {"step": run_step, "codec": run_codec, "rounding": run_rounding, "stress": run_stress, "faults": run_faults,
             "shakespeare": run_shakespeare, "layerwise": run_layerwise, "guard": run_guard}  # fmt: skip
    report = kinds[args.kind](args)
    code = report.pop("code", 0)
    if args.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return code
    for name in ("rows", "verdict"):
        rows = report.get(name, [])
        heads = list(dict.fromkeys(head for row in rows for head in row))
        if rows:
            sys.stdout.write(columns([heads, *[[cell(row.get(head)) for head in heads] for row in rows]]) + "\n")
    hidden = ("rows", "verdict", "runs", "absent", "work", "size", "versions")
    facts = {key: value for key, value in report.items() if key not in hidden and value is not None}
    sys.stdout.write(", ".join(f"{key}: {value}" for key, value in facts.items()) + "\n")
    for name, steps in report.get("work", {}).items():
        for kind, work in steps.items():
            sys.stdout.write(f"{name}, {kind}: {', '.join(f'{what} {count}' for what, count in work.items())}\n")
    for name, reason in report.get("absent", {}).items():
        sys.stdout.write(f"did not run: {name} ({reason})\n")
    return code


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_step(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from cruxy_triton.bench import cases, host, step

    if args.rounds < 1 or (args.threads is not None and args.threads < 1):
        raise UserError("--rounds and --threads must be at least 1")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.cases:
        return cases.run(args.rounds, args.only)
    if args.host:
        return host.run(args.census, args.rounds, args.only)
    return step.run(args.device, args.census, args.rounds, args.dtype, args.only)


def run_codec(args: argparse.Namespace) -> dict[str, Any]:
    from cruxy_triton.bench import characters, codec

    if (args.gradients is None) == (args.text is None) or args.seeds < 1:
        raise UserError("give --gradients or --text, and at least one of --seeds")
    if args.text is not None:
        text = characters.Text(characters.read_text(args.text), characters.Size())
        return {"rows": codec.losses(text, args.seeds, lambda line: print(line, file=sys.stderr, flush=True))}
    beta1, beta2 = args.betas
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise UserError(f"--betas are {beta1} and {beta2}; expected two values from 0 to below 1")
    if not args.gradients.exists():
        raise UserError(f"{args.gradients}: no such file or folder; `finetune --record-gradients N` makes one")
    rows, source = codec.table(args.gradients, (beta1, beta2), args.skip, args.bits)
    return {"rows": rows, "betas": [beta1, beta2], "gradients": source}


def run_rounding(args: argparse.Namespace) -> dict[str, Any]:
    from cruxy_triton.bench import rounding

    return {"rows": rounding.table()}


def run_gpu(args: argparse.Namespace) -> int:
    """Exit code 0 when all parts that ran passed, else 1."""
    from cruxy_triton.bench import gpu

    path, report = gpu.run(args.out, None if args.device == "cuda" else args.device, args.minutes, args.only, say)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(map(gpu.line, report["parts"])))
        print(f"\n{path}")
    return 0 if gpu.passed(report) else 1


def run_stress(args: argparse.Namespace) -> dict[str, Any]:
    from cruxy_triton.bench import stress

    return stress.report(
        model=args.model, quick=args.quick, data=args.data, optimizers=args.optimizers, seeds=args.seeds,
        workers=args.workers, out=args.out, say=say,
    )  # fmt: skip


def run_guard(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from cruxy_triton.bench import overhead

    if args.rounds < 1 or args.threads < 1:
        raise UserError("--rounds and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    return overhead.table(args.rounds)


def run_shakespeare(args: argparse.Namespace) -> dict[str, Any]:
    from cruxy_kernels.backends.native import cache_folder
    from cruxy_triton.bench import shakespeare

    return shakespeare.report(
        quick=args.quick, data=args.data, optimizers=args.optimizers, workers=args.workers, out=args.out,
        plot=args.plot, cache=cache_folder(), say=say,
    )  # fmt: skip


def run_layerwise(args: argparse.Namespace) -> dict[str, Any]:
    require_train_extra()
    quiet_libraries()
    from cruxy_kernels.backends.native import cache_folder
    from cruxy_triton.bench import layerwise

    return layerwise.report(
        model=args.model, quick=args.quick, data=args.data, contestants=args.contestants, seeds=args.seeds,
        workers=args.workers, out=args.out, plot=args.plot, peak=args.peak, cache=cache_folder(), say=say,
    )  # fmt: skip


def say(line: str) -> None:
    """Progress, beside the result."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def run_faults(args: argparse.Namespace) -> dict[str, Any]:
    """Exit code 1 where a scenario did not end as it should."""
    from cruxy_triton.bench import faults

    if args.count < 1:
        raise UserError("--count must be at least 1")
    rows = faults.table(args.count)
    missed = sum(row["scenarios"] - row["passed"] for row in rows)
    return {"rows": rows, "scenarios": args.count, "not as they should be": missed, "code": int(missed > 0)}
