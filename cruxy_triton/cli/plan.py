"""`cruxy-triton plan`: will it fit, and what should be set? Starts without torch unless it has to ask a card.

Exit codes: 0 it fits, 1 it does not, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from cruxy_triton.cli.arguments import add_settings, given
from cruxy_triton.errors import UserError
from cruxy_triton.planner import Card, Plan, card_names, load_model, model_names, plan
from cruxy_triton.planner.card import chosen_card
from cruxy_triton.planner.render import render
from cruxy_triton.planner.search import step_of

DESCRIPTION = """\
Says whether a LoRA or full fine-tuning run of MODEL fits a card, and what to set. What is given on the command
line stays; what is marked "searched" is chosen otherwise: length, precision, adapters, optimizer, micro-batch,
checkpointing. Settings have the names and meanings of `cruxy-triton finetune`.

MODEL is a name of profiles/models (tinyllama-1.1b), a Hugging Face id, a folder, or a config.json.

  cruxy-triton plan tinyllama-1.1b --gpu gtx1650
  cruxy-triton plan Qwen/Qwen2.5-1.5B --vram 4GiB --max-seq-length 2048 --save plan.json
  cruxy-triton plan ./my-model --gpu rtx3060-12gb --os windows --json

exit codes: 0 fits, 1 does not fit, 2 bad input
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.usage = "cruxy-triton plan MODEL [options]"
    parser.add_argument("--list", action="store_true", help="list the models and cards that are known by name")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--save", metavar="FILE", help="write the plan as JSON for cruxy-triton finetune --plan")
    parser.add_argument("--html", metavar="FILE", help="write the plan as one HTML file, with a chart of the step")
    parser.add_argument("--verify", action="store_true", help="trace the real training step too (imports torch)")
    add_settings(parser, "plan")


def _verified(found: Plan, card: Card, model: str) -> Plan:
    if card.device == "cpu":
        raise UserError("--verify traces a CUDA run; leave it out with --device cpu")
    try:
        from cruxy_triton.planner.trace import verify
    except ImportError as error:
        raise UserError(
            f"--verify needs torch, transformers, peft and trl: {error}; pip install 'cruxy-triton[train]'"
        ) from None
    return replace(found, verified=verify(step_of(load_model(model), card, found.config)))


def _write_html(path: str, found: Plan, card: Card, model: str) -> None:
    from cruxy_triton import files
    from cruxy_triton.page.build import one_file
    from cruxy_triton.page.words import document
    from cruxy_triton.planner.timeline import timeline

    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise UserError(f"--html {path}: expected the name of a file in a folder that exists")
    moments = timeline(step_of(load_model(model), card, found.config))
    files.write_text(path, one_file(*document(found, moments)))


def run(args: argparse.Namespace) -> int:
    if args.list:
        print("models: " + ", ".join(model_names()))
        print("cards:  " + ", ".join(card_names()))
        return 0
    settings = given(args, "plan")
    where = {name: settings.pop(name, None) for name in ("gpu", "vram_bytes", "os", "capability", "device")}
    model = settings.pop("model", None)
    if model is None:
        raise UserError("which model? For example: cruxy-triton plan tinyllama-1.1b --gpu gtx1650 (--list names them)")
    load_model(model)  # an unknown name is said before the card's
    card = chosen_card(where)
    found = plan(model, card, os=where["os"], **settings)
    if args.verify:
        found = _verified(found, card, model)
    if args.save is not None:
        found.save(args.save)
    if args.html is not None:
        _write_html(args.html, found, card, model)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(render(found, args.save))
    return 0 if found.fits else 1
