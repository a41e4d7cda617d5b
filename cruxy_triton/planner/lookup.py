"""Names to data: the profiles that ship with the package, files, and configs on the Hugging Face hub."""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import sys
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from cruxy_triton.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


@functools.lru_cache
def profiles(kind: str) -> Mapping[str, Mapping[str, Any]]:
    """{name: data} of every file in profiles/<kind> ("gpus" or "models")."""
    folder = resources.files("cruxy_triton.profiles").joinpath(kind)
    return {
        item.name[: -len(".toml")]: tomllib.loads(item.read_text(encoding="utf-8"))
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(".toml")
    }


def model_names() -> list[str]:
    """The names of profiles/models."""
    return list(profiles("models"))


def simple(name: str) -> str:
    """What two spellings of one name have in common; a dot tells 1.5b from 15b."""
    return "".join(c for c in name.lower() if c.isalnum() or c == ".")


def unknown(what: str, text: str, names: Collection[str]) -> str:
    """The sentence for a name that nothing has, with the nearest ones."""
    by_simple = {simple(name): name for name in names}
    close = difflib.get_close_matches(simple(text), by_simple, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(by_simple[c] for c in close)}" if close else f"known: {', '.join(names)}"
    return f"unknown {what} {text!r}; {hint}."


def read_toml(path: Path) -> dict[str, Any]:
    """The data of a TOML file. Raises UserError where it is none."""
    try:
        return tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None


def find_config(text: str) -> tuple[Mapping[str, Any], str, str]:
    """(config, name, source) of a model by a profile's name, a folder, a file or a Hugging Face id.

    Raises UserError where nothing of that name is found; the nearest names are in the message.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UserError(f"{path.parent}: the folder has no config.json")
    if path.is_file():
        if path.suffix == ".toml":
            return read_toml(path), path.stem, str(path)
        name = path.parent.name if path.name == "config.json" else path.stem
        return json_object(_text(path), str(path)), name, str(path)
    if (profile := model_profile(text)) is not None:
        return profile
    if is_hub_id(text):
        return hub_config(_cached_config(text) or _hub_config(text), text)
    raise UserError(unknown_model(text))


def model_profile(text: str) -> tuple[Mapping[str, Any], str, str] | None:
    """(config, name, source) of a profile by its name, its Hugging Face id or an alias."""
    wanted = simple(text)
    for name, data in profiles("models").items():
        aliases = (data.get("hf_id", ""), *data.get("aliases", ()))
        if wanted in {simple(x) for alias in (name, *aliases) if alias for x in (alias, alias.rpartition("/")[2])}:
            return data, name, ""
    return None


def is_hub_id(text: str) -> bool:
    """Whether a model's name has the form of a Hugging Face id."""
    return text.count("/") == 1 and not text.startswith((".", "/")) and not text.endswith((".json", ".toml"))


def hub_config(config: Mapping[str, Any], hf_id: str) -> tuple[Mapping[str, Any], str, str]:
    """(config, name, source) of a Hugging Face id's config."""
    return {**config, "hf_id": hf_id}, hf_id, "huggingface.co"


def unknown_model(text: str) -> str:
    others = "A Hugging Face id (owner/name), a folder or a config.json serve as well."
    return f"{unknown('model', text, model_names())} {others}"


def json_object(text: str, where: str) -> dict[str, Any]:
    """The object that a config.json holds. Raises UserError where it is none."""
    if _depth(text) > 100:  # a parser's stack may not hold as much; in a browser that ends the interpreter
        raise UserError(f"{where}: nested more than 100 levels deep; a model's configuration is not")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not a JSON file: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a JSON object with the model's configuration")
    return data


def _depth(text: str) -> int:
    """How deep the brackets of a JSON text are nested."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(depth, deepest)
    return deepest


def _cached_config(hf_id: str) -> dict[str, Any] | None:
    """The config.json of a Hugging Face id as the local cache has it."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    try:
        path = try_to_load_from_cache(hf_id, "config.json")
    except ValueError:  # not a name that the hub could have
        return None
    return json_object(_text(Path(path)), path) if isinstance(path, str) else None


def _hub_config(hf_id: str) -> dict[str, Any]:
    """The same from the hub: one request, 10 s."""
    import urllib.parse
    import urllib.request

    base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{base}/{urllib.parse.quote(hf_id)}/resolve/main/config.json")
    if os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read().decode("utf-8", errors="replace")
    except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
        raise not_from_hub(hf_id, getattr(error, "code", None), error) from None
    return json_object(text, hf_id)


def not_from_hub(hf_id: str, status: int | None, reason: object) -> UserError:
    """The sentence for a config that the hub does not give; `status` is HTTP's, None where there was no answer."""
    if status in (401, 403):
        why = "The hub asks for a login: set HF_TOKEN after accepting the model's licence there."
    elif status == 404:
        why = "The hub has no such model."
    else:
        why = f"The hub could not be asked ({reason})."
    return UserError(f"{unknown_model(hf_id)} {why}")
