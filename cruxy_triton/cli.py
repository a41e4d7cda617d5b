"""The `cruxy-triton` command: finds the sub-command's module and turns its errors into exit codes.

Exit codes: 0 success, 1 the command ran and its answer is no (does not fit, a limit is broken, training
failed), 2 bad input, 130 interrupted. A sub-command is a module with `configure(parser)` and
`run(args) -> int`; only the chosen one is imported, so that `plan` starts without torch.
"""

import argparse
import importlib
import os
import sys

from cruxy_triton import __version__
from cruxy_triton.errors import UserError

# name: (module, one line of help)
COMMANDS = {
    "plan": ("cruxy_triton.planner.command", "does a model train on a card, and with which settings"),
    "finetune": ("cruxy_triton.finetune.command", "fine-tune a causal language model with LoRA"),
    "kernels": ("cruxy_triton.kernels_command", "cross-compile every kernel; registers, spills, load widths"),
    "bench": ("cruxy_triton.bench.command", "the optimizer step against others; the momentum codec"),
    "doctor": ("cruxy_triton.doctor", "what this machine has, which backend will be used, known problems"),
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cruxy-triton", description="Fine-tune language models on small consumer GPUs."
    )
    parser.add_argument("--version", action="version", version=f"cruxy-triton {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        # The description is filled in by configure(); unchosen commands need only their name.
        sub = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == chosen:
            importlib.import_module(module).configure(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if word in COMMANDS), None)
    args = build_parser(chosen).parse_args(argv)
    module = importlib.import_module(COMMANDS[args.command][0])
    try:
        return module.run(args)
    except UserError as error:
        if args.debug:
            raise
        print(f"cruxy-triton {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cruxy-triton {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cruxy-triton ... | head`: the reader has gone, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        first_line = str(error).strip().partition("\n")[0]
        print(
            f"cruxy-triton {args.command}: error: {type(error).__name__}: {first_line} "
            "(run again with --debug for the traceback)",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
