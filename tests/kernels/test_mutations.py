"""Do the tests notice? Each mutation is made in a copy of the package, and the tests of device/ run against it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cruxy_kernels

DEVICE = Path(__file__).parent / "device"
LION = "test_updates.py::test_lion_sizes"
TELEMETRY = "test_telemetry.py::test_sizes"

# name: (file, what stands there, what is put there instead, tests that have to fail)
MUTATIONS = {
    "flipped sign": ("lion.py", "p * keep - step_size * sign", "p * keep + step_size * sign", [f"{LION}[129]"]),
    "no mask on loads": (
        "tables.py",
        "mask=local < remaining, other=0)",
        "mask=local < BLOCK_END, other=0)",
        [f"{TELEMETRY}[127-torch.float32]"],
    ),
    "no mask on stores": (
        "tables.py",
        "values, mask=local < remaining)",
        "values, mask=local < BLOCK_END)",
        ["test_updates.py::test_neighbours_of_a_view_keep_their_bits"],
    ),
    "two columns swapped": (
        "tables.py",
        "PARAM = tl.constexpr(0)\nGRAD = tl.constexpr(1)",
        "PARAM = tl.constexpr(1)\nGRAD = tl.constexpr(0)",
        ["test_tables.py::test_rows_are_where_kernels_look"],
    ),
}
MORE = {
    "beta1 for beta2": ("lion.py", "m = beta2 * m + (1 - beta2) * g", "m = beta1 * m + (1 - beta1) * g", [LION]),
    "skip ignored": (
        "lion.py",
        "if tl.load(slots + SKIP) == 0:",
        "if tl.load(slots + SKIP) >= 0:",
        ["test_updates.py::test_skip_changes_no_bit"],
    ),
    "clip ignored": ("lion.py", "factor = tl.load(slots + CLIP_COEF)", "factor = 1.0", [f"{LION}[129]"]),
    "first row for all": (
        "lion.py",
        "tl.load(row + GROUP) * NUM_SLOTS",
        "tl.load(row + GROUP) * 0",
        ["test_updates.py::test_lion_several_rows_multipliers_scale_and_ascent"],
    ),
    "32-bit offsets": (
        "telemetry.py",
        "tl.load(block_chunk + block).to(tl.int64) * (ROWS * 8)",
        "(tl.load(block_chunk + block) * (ROWS * 8)).to(tl.int64)",
        ["test_telemetry.py::test_element_offsets_have_64_bits"],
    ),
    "NaN in the sums": (
        "telemetry.py",
        "a = tl.where(finite, tl.abs(g), 0.0)",
        "a = tl.abs(g)",
        ["test_telemetry.py::test_non_finite_elements_are_counted_and_left_out"],
    ),
    "scale not rounded to even": (
        "codec.py",
        "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16",
        "bits >> 16",
        ["test_codec.py::test_kernel_equals_twin"],
    ),
    "rounding always down": (
        "rounding.py",
        "(magnitude + (random & 0xFFFF)) >> 16",
        "magnitude >> 16",
        ["test_codec.py::test_rounding_is_right_on_average"],
    ),
    "slow EMA with the fast one's alpha": (
        "control.py",
        "v_slow = L.ALPHA_SLOW * v_slow + (1 - L.ALPHA_SLOW) * sigma",
        "v_slow = L.ALPHA_FAST * v_slow + (1 - L.ALPHA_FAST) * sigma",
        ["test_control.py::test_sixty_steps"],
    ),
    "history one place off": ("control.py", "slots + L.FAST_HISTORY + k - 1", "slots + L.FAST_HISTORY + k",
                              ["test_control.py::test_sixty_steps"]),
    "no decay": ("adamw.py", "keep = 1 - lr * decay", "keep = 1.0", ["test_updates.py::test_adamw"]),
}  # fmt: skip


def mutate(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the package with one change, in a folder for PYTHONPATH. It notes that it was imported."""
    package = folder / "cruxy_kernels"
    shutil.copytree(Path(cruxy_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = (package / file).read_text()
    assert source.count(old) == 1, f"{file} has {source.count(old)} times: {old}"
    new = new.replace("BLOCK_END", "1 << 20")
    (package / file).write_text(source.replace(old, new))
    with (package / "__init__.py").open("a") as init:
        init.write("\nimport pathlib\npathlib.Path(__file__).with_name('imported').touch()\n")
    return package


def run(folder: Path, package: Path, *command: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    environment |= {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert (package / "imported").exists(), result.stdout + result.stderr
    return result


def survives(tmp_path: Path, file: str, old: str, new: str, tests: list[str]) -> bool:
    package = mutate(tmp_path, file, old, new)
    result = run(
        tmp_path, package, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow",
        "--rootdir", str(DEVICE.parents[2]), "-c", str(DEVICE.parents[2] / "pyproject.toml"),
        *[str(DEVICE / test) for test in tests], interpret=not torch.cuda.is_available(),
    )  # fmt: skip
    # 1: a test failed; below 0: the process died of a wild address. Anything else is no verdict.
    assert result.returncode in (0, 1) or result.returncode < 0, result.stdout[-3000:] + result.stderr[-2000:]
    return result.returncode == 0


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_tests_notice(name, tmp_path):
    assert not survives(tmp_path, *MUTATIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_the_tests_notice_more(name, tmp_path):
    assert not survives(tmp_path, *MORE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS | MORE)
def test_without_a_mutation_they_pass(name, tmp_path):
    file, old, _, tests = (MUTATIONS | MORE)[name]
    assert survives(tmp_path, file, old, old, tests)


def test_narrow_loads_are_noticed(tmp_path):
    """Without the promise of alignment every load falls to one element, and `cruxy-triton kernels` says no."""
    package = mutate(tmp_path, "tables.py", "tl.load(tl.multiple_of(pointer, 16) + start", "tl.load(pointer + start")
    words = ["kernels", "--arch", "75", "--only", "lion fp16/fp16 momentum int8", "--processes", "1"]
    result = run(tmp_path, package, "-m", "cruxy_triton", *words, interpret=False)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "0 loads of 128 bits in the main path" in result.stdout
