"""`cruxy-triton generate`: asks a model, or the adapter of a run, one question or many."""

import argparse
import sys

from cruxy_triton.cli.arguments import add_settings, given
from cruxy_triton.environment import quiet_libraries, require_train_extra
from cruxy_triton.errors import UserError

DESCRIPTION = """\
Answers with the model in a folder, with what a run trained, or with an adapter on its base model, asked as in its
training. Without --prompt every line of the terminal (or of standard input) is a turn; an empty line ends.

  cruxy-triton generate runs/demo --prompt 'What does shutil.rmtree do?'
  cruxy-triton generate runs/demo
"""
SETTINGS = ("dtype", "load_in_4bit", "double_quant", "device", "revision", "trust_remote_code")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("model", metavar="DIR|MODEL", help="folder of a run, an adapter or a model, or a Hugging Face id")
    add("--prompt", metavar="TEXT", help="one question; without it a conversation")
    add("--system", metavar="TEXT", help="what the model is told first, where it has a chat template")
    add("--raw", action="store_true", help="the prompt as it is, without a template")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="longest answer (default: 200)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest token (default)")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    add("--base", metavar="MODEL", help="another base model than the one that the adapter names")
    add_settings(parser, "generate", SETTINGS)


def run(args: argparse.Namespace) -> int:
    require_train_extra()
    quiet_libraries()
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}; expected at least 1")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature is {args.temperature}; expected a number from 0")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty; leave it out for a conversation")
    settings = given(args, "generate")

    import torch

    from cruxy_triton.finetune import adapter

    source = adapter.find(args.model, args.base)
    source.revision = settings.pop("revision", source.revision)
    torch.manual_seed(args.seed)
    model, tokenizer, _ = adapter.open_model(source, **settings)
    talk = adapter.Talk(model, tokenizer, source, raw=args.raw, system=args.system)

    def answer(text: str) -> None:
        show = lambda piece: print(piece, end="", flush=True)  # noqa: E731
        talk.ask(text, args.max_new_tokens, temperature=args.temperature, show=show)
        print()

    if args.prompt is not None:
        answer(args.prompt)
        return 0
    asked = "> " if sys.stdin.isatty() else ""
    if asked:
        turns = "a conversation" if talk.chat else "each line is a question of its own"
        print(f"{source.name}: {turns}; an empty line ends", file=sys.stderr)
    while True:
        try:
            text = input(asked).strip()
        except EOFError:
            return 0
        if not text:
            return 0
        answer(text)
