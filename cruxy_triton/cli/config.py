"""`--config FILE`: the options of a command from a YAML file, each under its own name, checked as if they were typed.

A key is an option without its dashes (`lr` or `learning_rate`, `load_in_4bit`, `vram`, `plan`, `model`); its value is
what would be typed, true or false for a switch, a list for several words, null for what is left open. Each becomes
words of the command line and goes through its parser, so that a file can say all that a line can, and no more.
What is typed wins. Paths count from the current folder, as typed ones do.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cruxy_triton.cli.arguments import Parser
from cruxy_triton.errors import UserError
from cruxy_triton.settings import suggestion

# Options that belong to a single call: a file cannot ask for its own description or another file.
NOT_IN_FILES = ("help", "config", "debug")
OPEN = ("", "~", "null")
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def with_file(args: argparse.Namespace, parser: Parser) -> None:
    """Fills `args`, made by `parser`, with the options of the file `args.config` that were not typed.

    Raises UserError, naming the file, for one that cannot be read, keys that are no options and values that the
    options refuse.
    """
    path = args.config
    try:
        known, unknown = parser.parse_known_args(list(_words(_read(path), parser)))
        if unknown:  # argparse takes a value that looks like an option for one
            raise UserError(f"{' '.join(unknown)} cannot be understood")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for name, value in vars(known).items():
        if name == "given":
            args.given = {**value, **getattr(args, "given", {})}
        elif getattr(args, name) == parser.get_default(name):
            setattr(args, name, value)


def _read(path: str) -> dict[str, Any]:
    """The file's mapping with every value as it is written: YAML's types would make 1.1 of 1.10 and False of no."""
    import yaml

    class Loader(yaml.BaseLoader):
        """Refuses a key that comes twice, of which YAML would keep the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise UserError(f"{twice[0]} is set twice; set it once")
            return super().construct_mapping(node, deep=True)

    try:
        found = yaml.load(Path(path).expanduser().read_text(encoding="utf-8-sig"), Loader)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text; expected YAML, as `lr: 2e-4`") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}: {getattr(error, 'problem', '')})" if mark else ""
        raise UserError(f"is not YAML{where}; expected lines like `lr: 2e-4`") from None
    if not isinstance(found, dict):
        raise UserError("holds no settings; expected lines like `lr: 2e-4`")
    return found


def _words(values: dict[str, Any], parser: Parser) -> Iterator[str]:
    """The words of the command line that say the same as the file."""
    options = _options(parser)
    for key, value in values.items():
        action = options.get(key.replace("-", "_"))
        if action is None:
            near = suggestion(key.replace("-", "_"), options)
            raise UserError(f"unknown key {key}{near or '; expected the options of --help, without dashes'}")
        switch = SWITCH.get(value.lower()) if isinstance(value, str) else None
        flags = action.option_strings
        if value in OPEN:
            continue
        if flags and (action.nargs == 0 or (action.nargs == "?" and switch is not None)):
            negative = [flag for flag in flags if flag.startswith("--no-")]
            if switch is None:
                raise UserError(f"{key} is {value!r}; expected true or false")
            if switch:
                yield next(flag for flag in flags if flag not in negative)
            elif negative:
                yield negative[0]
        else:
            text = _text(key, value)
            yield f"{flags[0]}={text}" if flags else text


def _options(parser: Parser) -> dict[str, argparse.Action]:
    """Every option by its names in a file: its flags, or its place on the line, without dashes."""
    found = {}
    for action in parser._actions:
        for name in action.option_strings or [action.dest]:
            plain = name.lstrip("-").replace("-", "_")
            if plain not in NOT_IN_FILES and not name.startswith("--no-"):
                found[plain] = action
        setting = getattr(action, "setting", None)
        if setting is not None:
            found.setdefault(setting.name, action)
    return found


def _text(key: str, value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_text(key, item) for item in value)
    if isinstance(value, dict):
        return ",".join(f"{name}={_text(key, item)}" for name, item in value.items())
    return value
