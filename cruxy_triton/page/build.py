"""Writes the page as a folder of static files: the site, the form, the planner as it is in the package, Pyodide.

Pyodide is either named by its address on a CDN or copied from a folder; the page runs neither unless its SHA-384 is
the one below.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from cruxy_triton import __version__, files
from cruxy_triton.errors import UserError
from cruxy_triton.page.form import form
from cruxy_triton.planner.markup import Markup, joined, tag
from cruxy_triton.planner.picture import stylesheet

PYODIDE = "314.0.7"
CDN = f"https://cdn.jsdelivr.net/npm/pyodide@{PYODIDE}/"
# What is loaded of the npm package pyodide: name, bytes, SHA-384.
LOADED = (
    ("pyodide.mjs", 17_931, "sha384-Lp79fMwxa4n2BLtugpUAoQMlbxIdg8iCUiP1r3h7nJLkQjwlXT1JzZTeHVL+f4Dg"),
    ("pyodide.asm.mjs", 1_250_344, "sha384-/2281iaC0Iimw0B3Kagy1DBfZcJG3W4KYW+EmOqhsdY3fR9BJ88FE2Zt6y0KQKpa"),
    ("pyodide.asm.wasm", 9_598_218, "sha384-y++qrQ72KPA1fTjLIuGMP+jppgGxjbLCgfdb0zMrnNnQVhxRUXTOTF6rTxNzllSu"),
    ("python_stdlib.zip", 2_545_637, "sha384-xW3A5jmenkrPXbsgrIaB1FCJh9OuLT7FRMagsJMgtlhVc19k/mSy3+7nMaF/d767"),
)
SITE = ("app.js", "chart.js", "engine.js", "icon.svg", "style.css", "sw.js", "worker.js")
SHIPPED = ("page", "planner", "profiles")
GROUND = ("__init__.py", "errors.py", "files.py", "settings.py")
MARK = "page.json"  # by this file a folder is known as one that was written here


def site(name: str) -> str:
    return resources.files("cruxy_triton.page").joinpath("site").joinpath(name).read_text(encoding="utf-8")


def build(folder: str | Path, pyodide: str | Path | None = None) -> dict[str, int]:
    """Write the page to `folder`, which is made, or replaced where it holds an older one. Returns bytes by file.

    pyodide: a folder with the files of the npm package `pyodide`, which are copied; None loads them from the CDN.
    Raises UserError for a folder with something else in it, and for another Pyodide.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MARK).is_file())):
        raise UserError(f"{target}: there is something else; name a new folder, or one that holds an older page")
    if not target.parent.is_dir():
        raise UserError(f"{target}: the folder {target.parent} does not exist")
    contents = _contents(None if pyodide is None else Path(pyodide))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        partial = Path(name) / "page"
        for path, content in contents.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_bytes(content)
        files.move_folder(partial, target)
    return {path: len(content) for path, content in sorted(contents.items())}


def _contents(pyodide: Path | None) -> dict[str, bytes]:
    found = {name: site(name).encode() for name in SITE}
    found["picture.css"] = stylesheet().encode()
    about = f"Cruxy-Triton {__version__}, computed by Python in your browser (Pyodide {PYODIDE}). "
    about += "The planner is the one of the command cruxy-triton plan, unchanged. No run on a card is promised: "
    about += "the verdict says by how much it may be off."
    page = site("index.html").replace("<!-- form -->", form()).replace("<!-- about -->", joined(about))
    found["index.html"] = page.encode()
    packed = archive()
    name = f"planner-{hashlib.sha256(packed).hexdigest()[:12]}.zip"
    found[name] = packed
    base = CDN
    if pyodide is not None:
        base = f"pyodide-{PYODIDE}/"
        found.update({base + file: _local(pyodide, file, integrity) for file, _, integrity in LOADED})
    manifest: dict[str, Any] = {
        "pyodide": [{"name": n, "url": base + n, "size": size, "integrity": check} for n, size, check in LOADED],
        "archive": {"name": name, "url": name, "size": len(packed), "integrity": integrity_of(packed)},
        "site": [*SITE, "picture.css", MARK],
    }
    found[MARK] = json.dumps(manifest, indent=1).encode()
    return found


def integrity_of(content: bytes) -> str:
    return "sha384-" + base64.b64encode(hashlib.sha384(content).digest()).decode()


def _local(folder: Path, name: str, integrity: str) -> bytes:
    advice = f"expected the npm package pyodide {PYODIDE} (npm install pyodide@{PYODIDE}; node_modules/pyodide)"
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise UserError(f"{folder / name}: {error.strerror}; {advice}") from None
    if integrity_of(content) != integrity:
        raise UserError(f"{folder / name} is not the file of that version; {advice}")
    return content


def archive() -> bytes:
    """Planner, profiles and what they import, as they are in the package: a ZIP, the same for the same files."""
    ground = resources.files(__name__.partition(".")[0])
    members = {f"cruxy_triton/{name}": ground.joinpath(name).read_bytes() for name in GROUND}
    for package in SHIPPED:
        members.update(_members(resources.files(f"cruxy_triton.{package}"), f"cruxy_triton/{package}"))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, content in sorted(members.items()):
            file.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED, 9)
    return packed.getvalue()


def _members(folder: Any, path: str) -> Iterator[tuple[str, bytes]]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _members(item, f"{path}/{item.name}")
        elif item.name.endswith((".py", ".toml")) or item.name == "picture.css":
            yield f"{path}/{item.name}", item.read_bytes()


# -- one file ------------------------------------------------------------------------------------------------


def one_file(title: str, body: Markup) -> str:
    """A page of its own around `body`, with the styles and the chart's reader inside: no request is made."""
    script, style = site("chart.js"), stylesheet() + site("style.css")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'"
    head = joined(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    page = tag("body", body, tag("script", Markup(script)), class_="file-page")
    return f"<!doctype html>\n{tag('html', tag('head', head), page, lang='en')}\n"
