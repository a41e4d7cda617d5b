"""The package's own rules: what imports what, what is importable, what a wheel holds."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that the file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    assert imported(path) <= {"torch", "triton", "cruxy_kernels"} | set(sys.stdlib_module_names)


def test_the_folder_kernels_is_no_package() -> None:
    """transformers looks for Hugging Face's package with find_spec("kernels")."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, cruxy_triton, cruxy_triton.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.anchor).returncode == 0


def test_lazy_names() -> None:
    import cruxy_kernels
    import cruxy_triton

    assert cruxy_triton.kernels is cruxy_kernels
    assert set(cruxy_triton.__all__) <= set(dir(cruxy_triton))
    assert all(getattr(cruxy_triton, name) is not None for name in cruxy_triton.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = cruxy_triton.nothing


def test_wheel(tmp_path: Path) -> None:
    """A wheel holds both packages and the profiles, and nothing called `kernels`."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"cruxy_kernels", "cruxy_triton"}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "cruxy_triton").rglob("*.py")}
    assert modules <= set(names)
    for folder in ("gpus", "models"):
        files = {f"cruxy_triton/profiles/{folder}/{p.name}" for p in (ROOT / "profiles" / folder).glob("*.toml")}
        assert files
        assert files <= set(names)
