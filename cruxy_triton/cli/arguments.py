"""Command lines made from `cruxy_triton.settings`: options, their help, one sentence for a mistake, old names."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from cruxy_triton import settings
from cruxy_triton.errors import UserError
from cruxy_triton.settings import Setting, suggestion


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence (UserError), without the usage; knows no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (`{self.prog} --help` lists the options)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises UserError for words that belong to no option, naming the nearest option."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            command = getattr(known, "command", "")
            sub = next((a.choices[command] for a in self._actions if isinstance(a, argparse._SubParsersAction)), self)
            word = unknown[0].partition("=")[0]
            options = list(sub._option_string_actions)
            now = settings.RENAMED.get(word)
            near = f"; it is {now}" if now and now.split()[0] in options else suggestion(word, options)
            sub.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return known


class _Store(argparse.Action):
    """Puts a setting's value into `namespace.given`, where only what was typed is."""

    def __init__(self, *args: Any, setting: Setting, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.setting = setting

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = namespace.__dict__.setdefault("given", {})
        if self.setting.name in given:
            raise UserError(f"{option_string} is given twice; give it once")
        if self.setting.kind == "switch":
            value: Any = not (option_string or "").startswith("--no-")
        else:
            value = self.setting.parse(",".join(values) if isinstance(values, list) else values)
        given[self.setting.name] = value


def add_settings(parser: argparse.ArgumentParser, command: str, names: Sequence[str] | None = None) -> None:
    """Adds the options of every setting that `command` takes, or of `names`, in their groups."""
    groups: dict[str, Any] = {"": parser}
    for setting in settings.of_command(command) if names is None else map(settings.SETTINGS.__getitem__, names):
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        add = groups[setting.group].add_argument
        shown: dict[str, Any] = {"action": _Store, "setting": setting, "default": argparse.SUPPRESS}
        shown["help"] = setting.explained(command).replace("%", "%%")
        if not setting.flag:
            add(setting.name, nargs="?", metavar=setting.metavar, **shown)
        elif setting.kind == "switch":
            add(setting.flag, f"--no-{setting.flag[2:]}", nargs=0, **shown)
        else:
            metavar = setting.metavar or "|".join(map(str, setting.choices)) if setting.choices else setting.metavar
            nargs = "+" if setting.kind in ("names", "pattern") else None
            add(setting.flag, *setting.aliases, nargs=nargs, metavar=metavar, **shown)


def given(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """The settings that were typed; says on standard error which of them have no effect."""
    found = dict(getattr(args, "given", {}))
    for note in settings.without_effect(found, command):
        print(f"cruxy-triton {command}: note: {note}", file=sys.stderr)
    return found


def translated(command: str | None, words: list[str]) -> tuple[list[str], list[str]]:
    """`words` with the options that `plan` had before by their present names, and a note for each.

    Raises UserError for one that nothing stands for any more.
    """
    if command != "plan":
        return words, []
    found, notes, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not equals and name in ("--precision", "--optimizer", "--accumulation") and rest:
            value = rest[0]
        old = f"{name} {value}" if f"{name} {value}" in settings.RENAMED else name
        if old in settings.RENAMED:
            notes.append(f"{old} is now {settings.RENAMED[old]}")
            found += settings.RENAMED[old].split()
            if " " in old and not equals:
                rest.pop(0)
            elif equals and " " not in old:
                found.append(value)
        elif name in settings.GONE:
            raise UserError(f"{name} is no option any more: {settings.GONE[name]}")
        else:
            found.append(word)
    return found, notes


def columns(lines: list[list[str]]) -> str:
    """A table as text: each column as wide as its widest cell."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )
