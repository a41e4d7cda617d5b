"""The house as such: which room may import which, and that what is written about it is there.

Nothing is imported but the command line's parsers, so this runs in about two seconds and without torch.
"""

import ast
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cruxy_triton", "kernels", "profiles", "tests", "examples", "docs")
PACKAGES = {"cruxy_triton": ROOT / "cruxy_triton", "cruxy_kernels": ROOT / "kernels" / "cruxy_kernels"}

# -- the rooms, lowest first: a module imports from its own floor and from those below it -------------------------
# Under all of them lies cruxy_kernels, which imports nothing of cruxy_triton.

FLOORS = [
    {f"cruxy_triton.{name}" for name in ("errors", "files", "settings", "environment", "nvml")},
    {
        "cruxy_triton.controllers",
        "cruxy_triton.batches",
        "cruxy_triton.groups",
        "cruxy_triton.rows",
        "cruxy_triton.metrics",
        "cruxy_triton.distributed",
        "cruxy_triton.checkpoint",
        "cruxy_triton.clipping",
        "cruxy_triton.passes",
        "cruxy_triton.optimizer",
    },
    {"cruxy_triton.release"},
    {"cruxy_triton.guard"},
    {"cruxy_triton.integrations"},
    {"cruxy_triton.planner"},
    {"cruxy_triton.page"},
    {"cruxy_triton.finetune"},
    {"cruxy_triton.bench", "cruxy_triton.doctor"},
    {"cruxy_triton.cli", "cruxy_triton.__main__"},
]
KERNEL_FLOORS = [
    {f"cruxy_kernels.{name}" for name in ("_triton", "laws.layout", "tables", "launch", "storage")},
    {f"cruxy_kernels.{name}" for name in ("codec", "rounding", "laws", "rules")},
    {"cruxy_kernels.update", "cruxy_kernels.backends"},
    {"cruxy_kernels.backends.dispatch"},
    {"cruxy_kernels.backends.judge", "cruxy_kernels.backends.prepared"},
    {"cruxy_kernels.inspect", "cruxy_kernels"},
]
# The front door: it imports every room when somebody asks for a name, and offers its version to all of them.
FRONT_DOOR = "cruxy_triton"
OFFERED_BY_THE_FRONT_DOOR = {"__version__"}


def report(wrong: Iterable[str]) -> None:
    """Fails with every line of `wrong`."""
    lines = sorted(set(wrong))
    assert not lines, "\n" + "\n".join(lines)


def module_name(package: str, path: Path) -> str:
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def modules() -> dict[str, Path]:
    return {module_name(p, f): f for p, folder in PACKAGES.items() for f in sorted(folder.rglob("*.py"))}


def imports(name: str) -> Iterator[tuple[str, str | None, ast.stmt]]:
    """(module, name taken from it, statement) of every import in the file, wherever in it."""
    path = modules()[name]
    base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node
        elif isinstance(node, ast.ImportFrom):
            above = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join((*above, *((node.module or "").split(".") if node.module else ())))
            for alias in node.names:
                yield source, alias.name, node


@cache
def arrows() -> dict[str, frozenset[str]]:
    """For each module, the modules of both packages that it imports, lazily or not, or names in a string."""
    known = modules()
    found: dict[str, set[str]] = {name: set() for name in known}
    for name in known:
        for source, taken, _ in imports(name):
            inner = f"{source}.{taken}"
            if taken is not None and inner in known:
                found[name].add(inner)
            elif source in known and not (source == FRONT_DOOR and taken in OFFERED_BY_THE_FRONT_DOOR):
                found[name].add(source)
        for node in ast.walk(tree(known[name])):  # importlib.import_module("...")
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in known:
                found[name].add(node.value)
        found[name].discard(name)
    return {name: frozenset(targets) for name, targets in found.items()}


def floor(name: str, floors: list[set[str]]) -> int | None:
    """The floor of the longest listed prefix of a module's name; a package's own name stands for itself only."""
    parts = name.split(".")
    for end in range(len(parts), min(len(parts), 2) - 1, -1):
        for number, rooms in enumerate(floors):
            if ".".join(parts[:end]) in rooms:
                return number
    return None


def upward(floors: list[set[str]], package: str) -> list[str]:
    wrong = [f"{room} is on a floor and nowhere else" for room in set().union(*floors) - set(arrows())]
    for name, targets in arrows().items():
        if not (name + ".").startswith(package + ".") or name == FRONT_DOOR:
            continue
        here = floor(name, floors)
        if here is None:
            wrong.append(f"{name} is in no room: give it a floor in {Path(__file__).name}")
            continue
        for target in targets:
            there = floor(target, floors)
            if target == FRONT_DOOR:
                wrong.append(f"{name} imports through the front door; name the module")
            elif there is not None and there > here:
                wrong.append(f"{name} (floor {here}) imports {target} (floor {there})")
    return sorted(wrong)


def circles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in graph[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(sorted(component))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_no_arrow_points_upwards() -> None:
    report(upward(FLOORS, "cruxy_triton"))


def test_no_arrow_points_upwards_in_the_kernels() -> None:
    report(upward(KERNEL_FLOORS, "cruxy_kernels"))


def test_no_circle() -> None:
    inside = {name: targets - {FRONT_DOOR} for name, targets in arrows().items() if name != FRONT_DOOR}
    report(" <-> ".join(circle) for circle in circles(inside))


def test_a_circle_would_be_found() -> None:
    graph = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a"), "d": frozenset("a")}
    assert circles(graph) == [["a", "b", "c"]]


def test_kernels_import_only_torch_triton_and_themselves_relatively() -> None:
    """A copy of the folder loads under any name, which is how the Hugging Face Kernel Hub loads it."""
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    wrong = []
    for name, path in modules().items():
        if not name.startswith("cruxy_kernels"):
            continue
        for source, _, node in imports(name):
            relative = isinstance(node, ast.ImportFrom) and node.level > 0
            if not relative and source.partition(".")[0] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {source}")
    report(wrong)


# -- what is written --------------------------------------------------------------------------------------


@cache
def texts() -> dict[Path, str]:
    """Every text file of the repository that people write."""
    paths = [p for p in ROOT.iterdir() if p.suffix in (".md", ".toml", ".txt")]
    for folder in FOLDERS:
        paths += (p for p in (ROOT / folder).rglob("*") if p.suffix in (".md", ".py", ".cpp", ".toml", ".json"))
    paths = [p for p in paths if "__pycache__" not in p.parts and not any("egg-info" in part for part in p.parts)]
    return {p: p.read_text(encoding="utf-8") for p in sorted(paths)}


@cache
def prose(path: Path) -> str:
    """What a file says to people: all of a Markdown file; comments and docstrings of Python, one line each kept."""
    text = texts()[path]
    if path.suffix == ".md":
        return text
    if path.suffix == ".json":
        return ""
    if path.suffix != ".py":
        return "\n".join(re.findall(r"//(.*)" if path.suffix == ".cpp" else r"#(.*)", text))
    lines = [m.group(1) for m in re.finditer(r"^[^\"'\n]*?#(.*)$", text, re.MULTILINE)]
    lines += [m.group(1) for m in re.finditer(r"  #(.*)$", text, re.MULTILINE)]
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            lines.append(ast.get_docstring(node, clean=False) or "")
    return "\n".join(lines)


def files() -> set[str]:
    """Every file of the repository, relative to its root."""
    found = {p.name for p in ROOT.iterdir() if p.is_file()} | {".ci/run"}
    for folder in FOLDERS:
        found |= {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
    return found


# Files that are cited and belong to somebody else: a run writes them, a model or another project has them.
ELSEWHERE = {
    "book.txt", "config.json", "llama.cpp", "plan.json", "plot.png", "report.md", "run.json",
    "train_network.py",
}  # fmt: skip
OTHER_PROJECTS = (
    "adv_optm/", "aten/", "bitsandbytes/", "c10/", "flashoptim/", "llama.cpp/", "lomo_optim/", "modules/trainer/",
    "recipes/", "torch/", "trl/",
)  # fmt: skip
CITED = re.compile(r"(?<![\w/.:*-])((?:[\w.-]+/)*[\w-]+\.(?:md|py|cpp|toml|json|svg|png|txt))(?![\w/*])")


def test_every_file_that_is_cited_exists() -> None:
    there = files()
    names = {part for name in there for part in (name, name.rpartition("/")[2])}
    missing = []
    for path in texts():
        if path == Path(__file__) or path.name == "constraints.txt":
            continue
        for cited in CITED.findall(re.sub(r"https?://\S+|\b[\w.-]+\.(?:com|org|io)/\S+", " ", prose(path))):
            if cited in names or cited in ELSEWHERE or cited.startswith(OTHER_PROJECTS):
                continue
            if (path.parent / cited).exists() or any(name.endswith(f"/{cited}") for name in there):
                continue
            missing.append(f"{path.relative_to(ROOT)} cites {cited}")
    report(missing)


@cache
def headings(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE)


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_every_section_that_is_cited_exists() -> None:
    """`docs/laws.md section 3` (or `laws.md section 3, 5`) needs a heading that begins with that number."""
    missing = []
    for path in texts():
        if path == Path(__file__):
            continue
        flat = re.sub(r"\s+", " ", prose(path))
        for name, numbers in re.findall(r"([\w/-]+\.md)`?,? sections? (\d[\d.]*(?:(?:,| and| to) \d[\d.]*)*)", flat):
            target = ROOT / name if (ROOT / name).exists() else ROOT / "docs" / Path(name).name
            have = {h.split()[0].rstrip(".") for h in headings(target)} if target.exists() else set()
            for number in re.findall(r"\d+(?:\.\d+)*", numbers):
                if number not in have:
                    missing.append(f"{path.relative_to(ROOT)} cites {name} section {number}")
    report(missing)


def test_links_in_markdown_resolve() -> None:
    broken = []
    for path in texts():
        if path.suffix != ".md":
            continue
        text = re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", texts()[path], flags=re.MULTILINE | re.DOTALL))
        targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
        for target in targets:
            if re.match(r"[a-z]+:", target):
                continue
            name, _, fragment = target.partition("#")
            file = (path.parent / name).resolve() if name else path
            if not file.exists():
                broken.append(f"{path.relative_to(ROOT)}: {target} is not there")
            elif fragment and fragment not in {anchor(h) for h in headings(file)}:
                broken.append(f"{path.relative_to(ROOT)}: {target}: {file.name} has no such heading")
    report(broken)


@cache
def defined(name: str) -> frozenset[str]:
    """What a module's file binds at its top level, and its submodules."""
    found = {n.rpartition(".")[2] for n in modules() if n.rpartition(".")[0] == name}
    for node in ast.walk(tree(modules()[name])):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)}
    return frozenset(found)


def unknown_names(text: str) -> Iterator[str]:
    """Dotted names of our packages in a text that nothing defines."""
    for dotted in re.findall(r"(?<![\w/.])(cruxy_(?:triton|kernels)(?:\.\w+)+)(?!\w*[/.]\w)", text):
        parts = dotted.split(".")
        end = max(i for i in range(1, len(parts) + 1) if ".".join(parts[:i]) in modules())
        home = ".".join(parts[:end])
        if end < len(parts) and parts[end] not in defined(home) | {"profiles"}:
            yield dotted


def test_every_name_of_ours_that_is_cited_exists() -> None:
    wrong = []
    for path in texts():
        if path.suffix in (".py", ".md") and path != Path(__file__):
            wrong += [f"{path.relative_to(ROOT)} cites {name}" for name in unknown_names(prose(path))]
    report(wrong)


# -- words ------------------------------------------------------------------------------------------------

UNITS = (
    "block|byte|call|card|chunk|command|core|dtype|element|epoch|forward|group|kernel|launch|layer|line|matrix|micro-batch|"
    "mode|model|optimizer|page|pair|parameter|pass|process|program|rank|record|row|rule|run|scale|second|sequence|shard|"
    "step|tensor|thread|token|tile|use|value|vector"
)
COUNTED = "file|launch|line|logsumexp|memory|object|process|program|record|row|scale|state|thread|value"
# Words before "a" that make it an article: "as" and the like, and verbs in s.
ARTICLE = (
    "as|is|was|has|this|does|thus|less|its|us|adds|asks|becomes|begins|changes|compares|contains|continues|counts|encodes|"
    "ends|fits|fills|finds|gets|gives|hands|holds|keeps|leaves|makes|meets|moves|needs|opens|profiles|reads|releases|"
    "removes|replaces|runs|saves|sees|serves|shows|skips|starts|stops|stores|takes|trains|turns|uses|wants|windows|writes"
)
A_FOR_PER = re.compile(
    rf"\b(?!(?i:{ARTICLE})\b)(?:\w+s|{COUNTED}|one|two|three|int32|[\d.,]*\d) (?:a|an) (?:{UNITS})\b"
)
WORDS = {
    r"\btwins?\b": "say reference",
    r"\w*[qQ]uantis\w*": "say quantize",
    r"\bseeds' ": "say the published laws, or PyPI cruxy",
    r"(?i)(?<!_as)_a_\w+": "say per in names",
    r"\b(?:TODO|FIXME|XXX)\b": "finish it",
}


def spoken(path: Path) -> str:
    """A file's text without line breaks and comment signs; names of test functions are sentences, so they go."""
    text = re.sub(r"\bdef test_\w+|\.py::\w+", " ", texts()[path])
    return re.sub(r"\s+(?:#|//)?\s*", " ", text)


def offences(text: str) -> Iterator[tuple[str, str]]:
    for pattern, advice in {A_FOR_PER: "say per", **WORDS}.items():
        for match in re.finditer(pattern, text):
            yield match.group(), advice


def test_words() -> None:
    wrong = []
    for path in texts():
        if path == Path(__file__) or path.suffix == ".txt":
            continue
        name = path.relative_to(ROOT).as_posix()
        wrong += [f"{name}: {w!r}: {why}" for w, why in offences(spoken(path))]
    report(wrong)


@pytest.mark.parametrize(
    "text", ["8.03 bytes a parameter", "one launch a step", "a row a tensor", "ROWS_A_PROGRAM", "its twin", "quantised"]
)
def test_an_offence_would_be_found(text: str) -> None:
    assert list(offences(text))


# -- the front door ---------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """(file, words after `cruxy-triton`) of every command line in a code block of the documents."""
    found = []
    for path in texts():
        if path.suffix != ".md":
            continue
        for language, block in blocks(texts()[path]):
            if language == "python":
                continue
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|\||;", line):
                    match = re.match(r"\s*(?:\$ )?(?:\.venv/bin/)?cruxy-triton (.*)", part)
                    if match:
                        found.append((path.name, shlex.split(match.group(1), comments=True)))
    return found


def test_readme_is_short() -> None:
    assert len(README.split()) < 900


def test_commands_in_the_documents_parse() -> None:
    from cruxy_triton import cli

    lines = commands()
    assert {"plan", "finetune"} <= {words[0] for _, words in lines}
    wrong = []
    for name, words in lines:
        try:
            cli.build_parser(words[0]).parse_args(words)
        except (SystemExit, ValueError) as stop:
            if getattr(stop, "code", 2) != 0:
                wrong.append(f"{name}: cruxy-triton {shlex.join(words)}")
    report(wrong)


def test_the_readme_shows_what_plan_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Every line of the block is printed by the command above it, in that order; lines may be left out."""
    from cruxy_triton import cli

    command, shown = re.findall(r"<!-- plan-output: (.*?) -->\s*```\w*\n(.*?)```", README, re.DOTALL)[0]
    assert cli.main(shlex.split(command)[1:]) == 0
    printed = iter(capsys.readouterr().out.splitlines())
    for line in shown.splitlines():
        if line.strip() and line.strip() != "...":
            assert any(line.rstrip() == there.rstrip() for there in printed), f"plan does not print: {line}"


def test_code_in_the_documents_compiles_and_names_what_exists() -> None:
    for path in texts():
        if path.suffix != ".md":
            continue
        for language, block in blocks(texts()[path]):
            if language != "python":
                continue
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cruxy_"):
                    assert node.module in modules(), f"{path.name}: {node.module}"
                    missing = {a.name for a in node.names} - defined(node.module)
                    assert not missing, f"{path.name}: {node.module} has no {missing}"


def test_paths_in_command_lines_exist() -> None:
    """`python examples/x.py`, `pytest tests/y.py -k z`: the file is there, and a test of it matches."""
    wrong = []
    for path in texts():
        if path.suffix != ".md":
            continue
        for name in re.findall(r"\b((?:examples|tests|docs|profiles)/[\w./-]+)", texts()[path]):
            if not (ROOT / name.rstrip("/.")).exists():
                wrong.append(f"{path.name}: {name}")
        for name, wanted in re.findall(r"pytest (tests/[\w/]+\.py) -k (\w+)", texts()[path]):
            if (ROOT / name).exists() and not re.search(rf"def test_\w*{wanted}", texts()[ROOT / name]):
                wrong.append(f"{path.name}: no test of {name} matches {wanted}")
    report(wrong)


def test_the_commands_that_ci_reads() -> None:
    for marker in ("main-command", "test-command"):
        found = re.findall(rf"<!-- {marker} -->\n```\n(.*)\n```\n<!-- /{marker} -->", README)
        assert len(found) == 1, marker
        assert found[0].startswith("python -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ")
