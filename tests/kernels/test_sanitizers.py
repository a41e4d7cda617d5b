"""The compiled CPU loops under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; `pytest -m slow`.

native.cpp is built with CRUXY_NATIVE_FLAGS in a cache of its own, the sanitizer's runtime is loaded before Python, and
the kernels' tests run on the backend "native". What the sanitizers would find is made, too: a read past an end, a race.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cruxy_kernels

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
FILES = ["test_rules.py", "test_control.py", "test_telemetry.py", "test_codecs.py", "test_threads.py"]
FILES += ["test_native.py::test_results_do_not_depend_on_threads"]  # the others start processes that are no matter here
SANITIZERS = {
    # name: (flags, runtime, its options, a fault that it has to find: what stands in native.cpp and what is put there)
    "address": (
        "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0"},
        (
            "std::memcpy(out, at<const float>(address) + start, n * sizeof(float));",
            "std::memcpy(out, at<const float>(address) + start, BLOCK * sizeof(float));",
        ),
        "heap-buffer-overflow",
    ),
    "thread": (
        "-fsanitize=thread",
        "libtsan.so",
        # PyTorch and OpenMP are not built for it: what they do by themselves is not looked at.
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66"},
        ("std::atomic<int64_t> next{0};", "int64_t next = 0;"),
        "data race",
    ),
}


def runtime(library: str) -> str:
    if COMPILER is None:
        pytest.skip("no g++ here")
    path = subprocess.run([COMPILER, f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout
    if not os.path.isabs(path.strip()):
        pytest.skip(f"this compiler has no {library}")
    return os.path.realpath(path.strip())


def run(name: str, folder: Path, tests: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    flags, library, options, *_ = SANITIZERS[name]
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CRUXY_BACKEND", "CXX")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow", "-s",
         "-k", "native or threads", "--rootdir", str(HERE.parents[1]), "-c", str(HERE.parents[1] / "pyproject.toml"),
         *[str(HERE / test) for test in tests]],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**kept, **options, **environment, "CXX": str(COMPILER), "CRUXY_CACHE": str(folder / "cache"),
             "CRUXY_NATIVE_FLAGS": f"-g -O1 -fno-omit-frame-pointer {flags}", "LD_PRELOAD": runtime(library),
             "OMP_NUM_THREADS": "3", "PYTHONMALLOC": "malloc"},
    )  # fmt: skip


@pytest.mark.parametrize("name", SANITIZERS)
def test_the_loops_are_clean(name, tmp_path):
    result = run(name, tmp_path, FILES)
    report = result.stdout[-4000:] + result.stderr[-4000:]
    assert result.returncode == 0, report
    assert "Sanitizer" not in result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout.splitlines()[-1], report
    assert len(list((tmp_path / "cache").glob("native-*.so"))) == 1


@pytest.mark.parametrize("name", SANITIZERS)
def test_a_fault_would_be_found(name, tmp_path):
    package = tmp_path / "cruxy_kernels"
    shutil.copytree(Path(cruxy_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = package / "backends" / "native.cpp"
    (old, new), found = SANITIZERS[name][3:]
    assert source.read_text().count(old) == 1
    source.write_text(source.read_text().replace(old, new))
    result = run(name, tmp_path, ["test_telemetry.py"], PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert found in result.stdout + result.stderr, result.stdout[-3000:] + result.stderr[-3000:]
