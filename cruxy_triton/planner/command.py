"""`cruxy-triton plan`: will it fit, and what should be set? Starts without torch unless it has to ask a card.

Exit codes: 0 it fits, 1 it does not, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from cruxy_triton.errors import UserError
from cruxy_triton.planner.card import SYSTEMS, Card, card_names, load_card, parse_bytes
from cruxy_triton.planner.lookup import model_names
from cruxy_triton.planner.optimizers import OPTIMIZERS
from cruxy_triton.planner.plan import Plan
from cruxy_triton.planner.render import render
from cruxy_triton.planner.search import ATTENTIONS, plan, step_of
from cruxy_triton.planner.shape import load_model

DESCRIPTION = """\
Says whether a LoRA or full fine-tuning run of MODEL fits a card, and what to set. What is given on the command
line stays; everything else is searched over: precision, rank, targets, batch, length, checkpointing, optimizer.

MODEL is a name of profiles/models (tinyllama-1.1b), a Hugging Face id, a folder, or a config.json.

  cruxy-triton plan tinyllama-1.1b --gpu gtx1650
  cruxy-triton plan Qwen/Qwen2.5-1.5B --vram 4GiB --seq 2048 --save plan.toml
  cruxy-triton plan ./my-model --gpu rtx3060 --os windows --json

exit codes: 0 fits, 1 does not fit, 2 bad input
"""


def _switch(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model to plan for")
    card = parser.add_mutually_exclusive_group()
    card.add_argument("--gpu", metavar="NAME", help="a card of profiles/gpus, a .toml file, or auto (default: auto)")
    card.add_argument("--vram", metavar="SIZE", help="a plain budget for the process, for example 4GiB")
    card.add_argument("--cpu", metavar="SIZE", help="train on the CPU in so much RAM, float32")
    parser.add_argument("--list", action="store_true", help="list the models and cards that are known by name")
    parser.add_argument("--os", choices=SYSTEMS, help="decides how much of the card is usable (default: linux)")
    parser.add_argument("--capability", metavar="X.Y", help="compute capability of a --vram budget (default: 7.5)")
    parser.add_argument("--seq", type=int, metavar="N", help="tokens a sequence")
    parser.add_argument("--batch", type=int, metavar="N", help="sequences a forward pass")
    parser.add_argument("--accumulation", type=int, metavar="N", help="forward passes an optimizer step")
    parser.add_argument("--precision", metavar="P", help="float16, bfloat16, float32 or nf4")
    _switch(parser, "--double-quant", "quantise the 4-bit scales too")
    parser.add_argument("--method", default="lora", choices=("lora", "full"), help="what learns (default: lora)")
    parser.add_argument("--lora-r", type=int, metavar="R", help="rank of the adapters")
    parser.add_argument("--lora-dropout", type=float, default=0.0, metavar="P", help="dropout before the adapters")
    parser.add_argument("--targets", metavar="A,B", help="layers with adapters, or all")
    _switch(parser, "--checkpointing", "recompute activations in the backward pass")
    _switch(parser, "--chunked-loss", "TRL's tiled head; without it transformers' stock loss")
    parser.add_argument("--attention", choices=ATTENTIONS, help="attention kernel")
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), help="optimizer state codec")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--save", metavar="FILE", help="write the plan as TOML for cruxy-triton finetune")
    parser.add_argument("--verify", action="store_true", help="trace the real training step too (imports torch)")


def _card(args: argparse.Namespace) -> Card:
    if args.capability is not None and args.vram is None:
        raise UserError("--capability belongs to --vram; a card of --gpu has its own")
    if args.cpu is not None:
        return Card.cpu(args.cpu)
    if args.vram is not None:
        major, dot, minor = (args.capability or "7.5").partition(".")
        if not (dot and major.isdigit() and minor.isdigit()):
            raise UserError(f"--capability must look like 7.5, not {args.capability!r}")
        return Card.budget(parse_bytes(args.vram), (int(major), int(minor)))
    return load_card(args.gpu or "auto")


def _verified(found: Plan, card: Card, args: argparse.Namespace) -> Plan:
    if card.device == "cpu":
        raise UserError("--verify traces a CUDA run; leave it out with --cpu")
    try:
        from cruxy_triton.planner.trace import verify
    except ImportError as error:
        raise UserError(
            f"--verify needs torch, transformers, peft and trl: {error}; pip install 'cruxy-triton[train]'"
        ) from None
    return replace(found, verified=verify(step_of(load_model(args.model), card, found.config)))


def run(args: argparse.Namespace) -> int:
    if args.list:
        print("models: " + ", ".join(model_names()))
        print("cards:  " + ", ".join(card_names()))
        return 0
    if args.model is None:
        raise UserError("which model? For example: cruxy-triton plan tinyllama-1.1b --gpu gtx1650 (--list names them)")
    shape = load_model(args.model)
    card = _card(args)
    found = plan(
        shape,
        card,
        seq=args.seq,
        batch=args.batch,
        precision=args.precision,
        double_quant=args.double_quant,
        lora_r=args.lora_r,
        targets=args.targets,
        checkpointing=args.checkpointing,
        chunked_loss=args.chunked_loss,
        attention=args.attention,
        optimizer=args.optimizer,
        os=args.os,
        accumulation=args.accumulation,
        lora_dropout=args.lora_dropout,
        method=args.method,
    )
    if args.verify:
        found = _verified(found, card, args)
    if args.save is not None:
        found.save(args.save)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(render(found, args.save))
    return 0 if found.fits else 1
