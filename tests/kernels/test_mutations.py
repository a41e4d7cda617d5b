"""Do the tests notice? Each mutation is made in a copy of the package, and the tests of the kernels run against it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cruxy_kernels

HERE = Path(__file__).parent
FORMULA = "test_rules.py::test_flags_rows_multipliers_and_sign"
GUARDS = "test_rules.py::test_neighbours_of_a_view_keep_their_bits"
STORAGE = "test_rules.py::test_dtypes_and_storage"
REFUSALS = "test_arguments.py::test_updates_refuse"

# name: (file, what stands there, what is put there instead, tests that have to fail)
MUTATIONS = {
    "flipped sign": ("rules/lion.py", "- lr * multiplier * sign", "+ lr * multiplier * sign", [FORMULA]),
    "no mask on loads": (
        "storage.py",
        "mask=local < remaining, other=0)",
        "mask=local < BLOCK_END, other=0)",
        ["test_telemetry.py::test_sizes"],
    ),
    # By four elements only: a whole block overwrites the table that says how often the kernel loops.
    "stores past the end": (
        "storage.py",
        "values, mask=local < remaining)",
        "values, mask=local < remaining + 4)",
        [GUARDS],
    ),
    "two columns swapped": (
        "tables.py",
        "PARAM, GRAD = 0, 1",
        "PARAM, GRAD = 1, 0",
        ["test_triton_tables.py::test_entries_are_where_kernels_look"],
    ),
    "NaN rounded away": (
        "storage.py",
        "tl.where(magnitude < 0x7F800000, nearest, special)",
        "nearest",
        ["test_triton_rounding.py::test_nearest_is_the_processors"],
    ),
    "lengths unchecked": (
        "backends/dispatch.py",
        "if grads[i].shape != p.shape or grads[i].device != p.device:",
        "if False:",
        [f"{REFUSALS}[triton-cpu-adamw-a shorter gradient]"],
    ),
}
MORE = {
    "beta1 for beta2": ("rules/lion.py", "m = beta2 * m + (1 - beta2)", "m = beta1 * m + (1 - beta1)", [FORMULA]),
    "no decay": ("rules/adamw.py", "keep = 1 - lr * weight_decay", "keep = 1.0", [FORMULA]),
    "skip ignored": (
        "update.py",
        "if tl.load(slots + L.SKIP) == 0:",
        "if tl.load(slots + L.SKIP) >= 0:",
        ["test_rules.py::test_skip_changes_no_bit"],
    ),
    "factor ignored": ("update.py", "factor = tl.load(slots + L.GRAD_FACTOR)", "factor = 1.0", [FORMULA]),
    "first row for all": ("update.py", "tl.load(entry + T.ROW) * L.NUM_SLOTS", "tl.load(entry + T.ROW) * 0", [FORMULA]),
    "place for id": ("update.py", "tl.load(entry + T.ID)", "tl.load(entry + T.INDEX)", [STORAGE]),
    "one seed for all": ("update.py", "tl.load(slots + L.SEED).to(tl.int32)", "tl.load(slots).to(tl.int32)", [STORAGE]),
    "first state twice": ("update.py", "if not CODED:\n            m = load_state(entry, 0,",
                          "if not CODED:\n            m = load_state(entry, STATES - 1,", [FORMULA]),
    "32-bit offsets": (
        "laws/telemetry.py",
        "tl.load(chunk_index + chunk).to(tl.int64) * (LINES * 8)",
        "(tl.load(chunk_index + chunk) * (LINES * 8)).to(tl.int64)",
        ["test_triton_telemetry.py::test_element_offsets_have_64_bits"],
    ),
    "NaN in the sums": (
        "laws/telemetry.py",
        "a = tl.where(finite, tl.abs(g), 0.0)",
        "a = tl.abs(g)",
        ["test_telemetry.py::test_non_finite_elements_are_counted_and_left_out"],
    ),
    "scale not rounded to even": (
        "codec.py",
        "(largest + 0x7FFF + ((largest >> 16) & 1)) >> 16",
        "largest >> 16",
        ["test_codecs.py::test_codes_are_those_of_the_formula"],
    ),
    "codec that overflows": (
        "codec.py",
        "return quotient * (0.125 * (1 + _SHARPNESS) * LEVELS)",
        "return (magnitude * (0.125 * (1 + _SHARPNESS) * LEVELS)) / (scale * 0.125 + magnitude * (0.125 * _SHARPNESS))",
        ["test_codecs.py::test_the_end_of_the_range"],
    ),
    "halves swapped": (
        "codec.py",
        "((first & 15) | (second << 4))",
        "((second & 15) | (first << 4))",
        ["test_codecs.py::test_codes_are_those_of_the_formula"],
    ),
    "up by the level and not by the value": (
        "codec.py",
        "usable, low + tl.where(chance > threshold_kernel(random) * whole",
        "usable, low + tl.where(exact - low > threshold_kernel(random)",
        ["test_rules.py::test_dtypes_and_storage"],
    ),
    "the parameter's bits for the momentum's": (
        "codec.py",
        "((random >> 16).to(tl.int32) + 1)",
        "((random & 0xFFFF).to(tl.int32) + 1)",
        ["test_rules.py::test_dtypes_and_storage"],
    ),
    "rounding always down": (
        "rounding.py",
        "tl.minimum((magnitude + (random & 0xFFFF)) >> 16, 0x7F7F)",
        "tl.minimum(magnitude >> 16, 0x7F7F)",
        ["test_triton_rounding.py::test_right_on_average"],
    ),
    "NaN made infinite": (
        "rounding.py",
        "tl.where(magnitude > 0x7F800000, 0x40, 0)",
        "0",
        ["test_triton_rounding.py::test_any_bit_pattern"],
    ),
    "slow EMA with the fast one's alpha": (
        "laws/control.py",
        "v_slow = L.ALPHA_SLOW * v_slow + (1 - L.ALPHA_SLOW) * sigma",
        "v_slow = L.ALPHA_FAST * v_slow + (1 - L.ALPHA_FAST) * sigma",
        ["test_control.py::test_sixty_steps"],
    ),
    "history one place off": ("laws/control.py", "slots + L.FAST_HISTORY + k - 1", "slots + L.FAST_HISTORY + k",
                              ["test_control.py::test_sixty_steps"]),
    "scale left in a maximum": ("laws/control.py", "max_abs = max_abs * inverse", "max_abs = max_abs",
                                       ["test_control.py::test_it_is_the_law"]),
    "histories that a skipped step moves": (
        "laws/clipping.py",
        "said = (own > 0) & good",
        "said = own > 0",
        ["test_clipping.py::test_histories_and_factors_are_the_papers"],
    ),
    "another tensor's factor": (
        "update.py",
        "tl.load(grad_factors + tl.load(entry + T.INDEX))",
        "tl.load(grad_factors)",
        ["test_clipping.py::test_the_factor_comes_before_the_momentum"],
    ),
    "a captured table lent again": (
        "tables.py",
        "            self.keep(table)\n",
        "            self._tables[key] = table\n",
        ["test_triton_tables.py::test_a_table_of_a_captured_graph_is_never_handed_out_again"],
    ),
    "copies not written back": ("update.py", "        batch.finish()\n", "",
                                ["test_rules.py::test_strided_state_and_scales"]),
    "a captured table's source dropped": (
        "tables.py",
        "tables.keep(copy)",
        "pass",
        ["test_triton_tables.py::test_what_a_captured_graph_copies_from_stays"],
    ),
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
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip
    assert (package / "imported").exists(), result.stdout + result.stderr
    return result


def survives(tmp_path: Path, file: str, old: str, new: str, tests: list[str]) -> bool:
    package = mutate(tmp_path, file, old, new)
    try:
        result = run(
            tmp_path, package, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow",
            "--rootdir", str(HERE.parents[1]), "-c", str(HERE.parents[1] / "pyproject.toml"),
            *[str(HERE / test) for test in tests], interpret=not torch.cuda.is_available(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False  # what it overwrote may have said how long a loop is: noticed as well
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
    package = mutate(tmp_path, "storage.py", "tl.load(tl.multiple_of(pointer, 16) + start", "tl.load(pointer + start")
    words = ["kernels", "--arch", "75", "--only", "lion fp16/fp16 state int8", "--processes", "1"]
    result = run(tmp_path, package, "-m", "cruxy_triton", *words, interpret=False)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "0 loads of 128 bits in the main path" in result.stdout
