"""The package alone: what it imports, and that it works under another name and without Triton."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cruxy_kernels

FOLDER = Path(cruxy_kernels.__file__).parent

# A step of both rules on the CPU, by whatever serves it; and a codec.
STEP = """
def step(k):
    import torch
    torch.manual_seed(0)
    for n in (300, 1 << 18):
        p, g, m, v = (torch.randn(n) for _ in range(4))
        before = p.clone()
        codes, scales = k.quantize_blockwise(m)
        control = k.new_control()
        k.control_step(control, k.gradient_telemetry([g]), torch.tensor(1.0))
        k.lion_update_([p], [g], [codes], control, exp_avg_scales=[scales])
        k.adamw_update_([p], [g], [m], [v.abs()], control)
        assert (p != before).all() and p.isfinite().all()
"""


def python(code, folder):
    # cwd is not on the path of a script, and the folder of the tests is not either.
    script = folder / "script.py"
    script.write_text(STEP + code)
    return subprocess.run(
        [sys.executable, str(script)], cwd=folder, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CRUXY_BACKEND")},
    )  # fmt: skip


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda p: str(p.relative_to(FOLDER)))
def test_imports_inside_the_package_are_relative(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("cruxy")]
        elif isinstance(node, ast.ImportFrom):
            assert node.level or not (node.module or "").startswith("cruxy")


def test_a_copy_of_the_folder_works_under_another_name(tmp_path):
    """The folder is what a program that wants the kernels alone takes along, or downloads under a name of its own."""
    shutil.copytree(FOLDER, tmp_path / "anything_else", ignore=shutil.ignore_patterns("__pycache__"))
    result = python(
        "import sys\nsys.modules['cruxy_kernels'] = None\n"
        "import anything_else as k\nstep(k)\nprint(k.__file__, k.explain_backend('cpu'))\n"
        "for name in ('inspect.variants', 'inspect.resources'): __import__('anything_else.' + name)\n"
        "print(len(sys.modules['anything_else.inspect.variants'].all_variants()))",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    file, count = result.stdout.splitlines()
    assert file.startswith(str(tmp_path / "anything_else"))
    assert int(count) > 30


def test_it_works_where_triton_cannot_be_imported(tmp_path):
    """triton has wheels for Linux and Windows only; the rest of the package runs everywhere."""
    result = python(
        "import sys\nsys.modules['triton'] = None\n"
        "import cruxy_kernels as k\nstep(k)\nprint(k.explain_backend('cpu')[0], k.explain_backend('cuda'))\n"
        "try:\n    import torch; k.gradient_telemetry([torch.ones(3)], backend='triton')\n"
        "except RuntimeError as error:\n    print(error)",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first.startswith(
        ("native ('torch', 'triton cannot be imported", "torch ('torch', 'triton cannot be imported")
    )
    assert second.startswith("backend='triton' cannot run on cpu: triton cannot be imported")


def test_it_imports_torch_and_triton_alone(tmp_path):
    """Neither cruxy_triton nor transformers, numpy or anything that PyTorch and Triton have not brought along."""
    result = python(
        "import sys, torch, triton, triton.language\nbefore = set(sys.modules)\n"
        "import cruxy_kernels as k\nnew = {n.partition('.')[0] for n in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))\nstep(k)\n"
        "print(sorted(n for n in sys.modules if n.startswith(('cruxy_kernels.inspect', 'cruxy_triton'))))",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["['cruxy_kernels']", "[]"]
