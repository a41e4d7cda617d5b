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
from cruxy_triton.cli.arguments import Parser, translated
from cruxy_triton.errors import UserError
from cruxy_triton.settings import suggestion

# name: one line of help; its module is cruxy_triton.cli.<name>
COMMANDS = {
    "plan": "does a model train on a card, and with which settings",
    "page": "the planner as a web page: static files for any host",
    "finetune": "fine-tune a causal language model, with LoRA or every weight",
    "generate": "ask a model, or what a run trained",
    "merge": "base model and adapter as one model for plain transformers",
    "kernels": "cross-compile every kernel; registers, spills, load widths",
    "bench": "the optimizer step against others; the momentum codec",
    "doctor": "what this machine has, which backend will be used, known problems",
}
EPILOG = """\
start with
  cruxy-triton finetune --demo
  cruxy-triton plan tinyllama-1.1b --gpu gtx1650
"""


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="cruxy-triton",
        description="Fine-tune language models on small consumer GPUs.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"cruxy-triton {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        # The description is filled in by configure(); unchosen commands need only their name.
        sub = commands.add_parser(name, help=summary, formatter_class=raw)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == chosen:
            importlib.import_module(f"cruxy_triton.cli.{name}").configure(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if not word.startswith("-")), None)
    speaker = f"cruxy-triton {chosen}" if chosen in COMMANDS else "cruxy-triton"
    try:
        if chosen is not None and chosen not in COMMANDS:
            near = suggestion(chosen, COMMANDS)
            raise UserError(f"unknown command {chosen!r}; expected one of {', '.join(COMMANDS)}{near}")
        parser = build_parser(chosen)
        if not argv:
            parser.print_help()
            raise UserError(f"which command? One of {', '.join(COMMANDS)}")
        words, notes = translated(chosen, argv)
        for note in notes:
            print(f"{speaker}: note: {note}", file=sys.stderr)
        args = parser.parse_args(words)
        return importlib.import_module(f"cruxy_triton.cli.{args.command}").run(args)
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"{speaker}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{speaker}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cruxy-triton ... | head`: the reader has gone, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--debug" in argv:
            raise
        first_line = str(error).strip().partition("\n")[0]
        print(
            f"{speaker}: error: {type(error).__name__}: {first_line} (run again with --debug for the traceback)",
            file=sys.stderr,
        )
        return 1
