"""The package as it is installed: what is importable under which name, and what a wheel holds.

What may import what is in test_house.py.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_folder_kernels_is_no_package() -> None:
    """transformers looks for Hugging Face's package with find_spec("kernels")."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_copy_of_the_kernels_works_under_any_name(tmp_path: Path) -> None:
    """The Hugging Face Kernel Hub loads a folder under a name of its own."""
    shutil.copytree(ROOT / "kernels" / "cruxy_kernels", tmp_path / "some_kernels")
    code = """
import sys, torch, some_kernels as k
p, g, m = torch.ones(70), torch.full((70,), 0.5), torch.zeros(70)
control = k.new_control(lr=0.1, weight_decay=0.0)
k.control_step(control, k.gradient_telemetry([g]))
k.update_("lion", [p], [g], {"exp_avg": [m]}, control)
assert (p < 1).all() and (m > 0).all() and k.quantize_blockwise(m)[0].dtype == torch.int8
assert not [name for name in sys.modules if name.startswith("cruxy")], "the copy imports the original"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    kept = {f"cruxy_triton/page/site/{p.name}" for p in (ROOT / "cruxy_triton" / "page" / "site").iterdir()}
    assert {*kept, "cruxy_triton/planner/picture.css"} <= set(names)
