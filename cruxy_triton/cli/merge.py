"""`cruxy-triton merge`: base model and adapter as one model that plain transformers loads."""

import argparse
from collections.abc import Callable
from pathlib import Path

from cruxy_triton.environment import quiet_libraries, require_train_extra

DESCRIPTION = """\
Adds the adapter of a run (or folder) to the weights of its base model, in float32 on the CPU, and writes a model
folder that plain transformers loads.

  cruxy-triton merge runs/demo
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("adapter", metavar="DIR", help="folder of a run or of an adapter")
    add("--output", metavar="DIR", help="where the model goes (default: merged/ in the run, or beside the adapter)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of what is written (default: as the base model)")
    add("--base", metavar="MODEL", help="another base model than the one that the adapter names")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(args: argparse.Namespace) -> int:
    require_train_extra()
    quiet_libraries()
    merge(args.adapter, args.output, args.dtype, args.base, args.trust_remote_code)
    return 0


def merge(
    name: str,
    output: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    trusted: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Merges and says where the model lies."""
    from cruxy_triton.finetune import adapter

    source = adapter.find(name, base)
    beside = (source.adapter or Path(name)).absolute().parent / "merged"
    target = beside if output is None else Path(output).expanduser().absolute()
    kept = adapter.merge(source, target, dtype, trust_remote_code=trusted)
    say(f"merged model, {kept}: {target}")
