"""`cruxy-triton doctor`: what it finds here, and what it says about machines that are not here."""

import contextlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cruxy_triton import doctor, nvml
from cruxy_triton.finetune import selftest

TURING = {
    "name": "NVIDIA GeForce GTX 1650",
    "major": 7,
    "minor": 5,
    "multi_processor_count": 14,
}


def test_this_machine(command) -> None:
    done = command("doctor", "--json")
    findings = json.loads(done.stdout)
    assert done.returncode == (1 if any(p["severity"] == "error" for p in findings["problems"]) else 0)
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["backend"]["name"] in ("triton", "native", "torch")
    assert len(findings["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    text = command("doctor").stdout
    assert torch.__version__ in text
    assert f"because {findings['backend']['reason']}" in text


def test_other_libraries_say_nothing_on_the_screen(command) -> None:
    """bitsandbytes would report, at import, which kernels for inference on CPUs it does without."""
    done = command("doctor")
    assert done.stderr == ""
    assert "gemm_4bit" not in done.stdout


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GTX 1650 as torch would report it; only what the doctor asks for is faked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**TURING))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index=0: (3 * 2**30, 4 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_86", "compute_120"])
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    # On cards before Ampere torch says yes, unless it is asked to leave emulation out.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(selftest, "faults", lambda device, dtype: [])


def test_turing_trains_in_float16_and_is_told_about_triton(turing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_check_compiler", lambda *given: None)
    problems: list[doctor.Problem] = []
    devices = doctor._devices(problems)
    doctor._check_triton(devices, problems)
    assert devices[0]["training_dtype"] == "float16"
    assert [p.severity for p in problems] == ["note", "note"]
    assert "bfloat16 by emulation" in problems[0].what
    assert "CRUXY_BACKEND=torch" in problems[1].remedy


def test_bfloat16_is_what_torch_says_without_emulation(turing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    problems: list[doctor.Problem] = []
    assert doctor._devices(problems)[0]["training_dtype"] == "bfloat16"
    assert problems == []


def test_a_card_that_computes_wrong(turing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(selftest, "faults", lambda *given: asked.append(given) or ["the product is off by 3"])
    problems: list[doctor.Problem] = []
    assert doctor._devices(problems)[0]["training_dtype"] == "float32"
    assert asked == [(torch.device("cuda", 0), torch.float16)]
    assert "GTX 1650 computes wrong in 16 bits: the product is off by 3" in problems[0].what

    def fails(*given: object) -> None:
        raise RuntimeError("CUDA error: an illegal instruction\nmore")

    monkeypatch.setattr(selftest, "faults", fails)
    problems = []
    doctor._devices(problems)
    assert "trying it fails with CUDA error: an illegal instruction" in problems[0].what


@pytest.mark.parametrize(
    ("system", "there", "files", "cc", "says", "remedy"),
    [
        ("linux", ["gcc"], ["Python.h"], None, None, None),
        ("linux", ["clang"], ["Python.h"], None, None, None),
        ("linux", [], ["Python.h"], None, "no C compiler (gcc, clang) is there", "apt install gcc"),
        ("linux", ["gcc"], [], None, "Python.h is not there", "python3-dev"),
        ("linux", ["gcc"], ["Python.h"], "icc", "the C compiler that CC names (icc) is not there", "unset CC"),
        ("win32", [], ["triton/runtime/tcc/tcc.exe"], None, None, None),
        ("win32", ["cl"], [], None, None, None),
        ("win32", [], [], None, "no C compiler is there", "pip install -U triton-windows"),
    ],
)
def test_triton_needs_a_compiler(
    system: str, there: list[str], files: list[str], cc: str | None, says: str | None, remedy: str | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "triton").mkdir(exist_ok=True)
    monkeypatch.setattr(doctor.sys, "platform", system)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda **scheme: {"include": str(tmp_path)})
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    problems: list[doctor.Problem] = []
    doctor._check_compiler(tmp_path / "triton", problems)
    assert [p.severity for p in problems] == ([] if says is None else ["error"])
    if says is not None:
        assert says in problems[0].what
        assert remedy in problems[0].remedy
        assert "CRUXY_BACKEND=torch" in problems[0].remedy


@pytest.mark.parametrize(("windows", "version", "pages"), [(True, (551, 86), True), (True, (531, 18), False),
                                                           (False, (551, 86), False)])  # fmt: skip
def test_a_driver_that_pages(windows, version, pages: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "on_windows", lambda: windows)
    problems: list[doctor.Problem] = []
    doctor._check_paging(SimpleNamespace(version=version), problems)
    assert len(problems) == pages
    assert all("Prefer No Sysmem Fallback" in p.remedy for p in problems)


def test_what_torch_says_of_the_driver_is_told_with_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a warning in the middle of the screen otherwise, and gone at the second question."""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    first = iter([True])

    def unavailable() -> bool:
        if next(first, False):
            warnings.warn("CUDA initialization: The NVIDIA driver\nis too old (found version 12020).", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        (problem,) = [p for p in doctor.examine()["problems"] if p["severity"] == "error"]
    assert problem["what"] == (
        "torch is built for CUDA 13.0, but finds no usable device (CUDA initialization: The NVIDIA driver is too old "
        "(found version 12020).)"
    )


def test_a_card_that_torch_has_no_code_for(turing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    problems: list[doctor.Problem] = []
    doctor._devices(problems)
    assert problems[0].severity == "error"
    assert "compute capability 7.5" in problems[0].what


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((7, 5), ["sm_75"], True),
        ((8, 9), ["sm_86"], True),  # binary code runs on later minor versions
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((12, 0), ["compute_90"], True),  # PTX is compiled on the spot
        ((6, 1), ["sm_75", "compute_90"], False),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_code_for_a_capability(capability: tuple[int, int], architectures: list[str], expected: bool) -> None:
    assert doctor._has_code_for(capability, architectures) is expected


def test_a_driver_without_a_cuda_build_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    problems: list[doctor.Problem] = []
    doctor._check_torch_build(problems, [])
    assert problems[0].severity == "error"
    assert "built without CUDA" in problems[0].what


def test_a_missing_bitsandbytes_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    problems: list[doctor.Problem] = []
    doctor._check_packages(problems)
    assert problems[0].severity == "note"
    assert "--load-in-4bit" in problems[0].what


NAKED = """
import importlib.abc, sys
from cruxy_triton import environment

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {*environment.TRAIN_EXTRA, "psutil", "numpy", "bitsandbytes", "huggingface_hub"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
environment.importlib.util.find_spec = lambda name: None
from cruxy_triton.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("words", [["doctor"], ["finetune", "m", "--data", "d.jsonl"], ["finetune", "--help"]])
def test_without_the_train_extra(words: list[str], tmp_path: Path) -> None:
    """The packages of the extra, and what they bring along, cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", NAKED, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr
    if words == ["doctor"]:
        assert done.returncode == 0, done.stderr
        assert "`cruxy-triton finetune` cannot run: transformers, trl, " in done.stdout
        assert "pip install 'cruxy-triton[train]'" in done.stdout
    elif words == ["finetune", "--help"]:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2
        assert "not installed (transformers, trl, " in done.stderr
        assert "pip install 'cruxy-triton[train]'" in done.stderr


def test_folders_that_are_full_or_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRUXY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    problems: list[doctor.Problem] = []
    found = doctor._folders(problems)
    assert problems == []
    assert found["models"] == {"path": str(tmp_path / "hf" / "hub"), "free_bytes": 2**40, "writable": True}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    # Not by chmod: the administrator, as whom tests run in containers, may write everywhere.
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    doctor._folders(problems)
    assert [(p.what.partition(" (")[2], p.remedy.rpartition(" ")[2]) for p in problems] == [
        ("here) cannot be written", "--output"),
        ("cache) cannot be written", "CRUXY_CACHE"),
        ("models) cannot be written", "HF_HOME"),
    ]
