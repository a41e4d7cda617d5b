"""The driver's library, played by one that is compiled here from the header's declarations."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cruxy_triton import nvml

# nvmlMemory_t and the signatures as in nvml.h; 2 is NVML_ERROR_INVALID_ARGUMENT.
SOURCE = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct device *device_t;
static int card;
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    if (length < 80) return 2;
    strcpy(version, VERSION);
    return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device_t *device) {
    if (strcmp(uuid, "GPU-01234567-89ab-cdef-0123-456789abcdef")) return 2;
    *device = (device_t)&card;
    return 0;
}
int nvmlDeviceGetMemoryInfo(device_t device, memory_t *memory) {
    if (device != (device_t)&card) return 2;
    memory->total = 4ULL << 30;
    memory->free = 1ULL << 30;
    memory->used = 3ULL << 30;
    return 0;
}
"""


@pytest.fixture
def library(tmp_path: Path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler here")

    def build(version: str) -> str:
        source, built = tmp_path / "nvml.c", tmp_path / f"nvml-{version}.so"
        source.write_text(SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", f'-DVERSION="{version}"', source, "-o", built], check=True)
        return str(built)

    return build


def test_what_the_driver_says(library) -> None:
    driver = nvml.Driver.open(library("551.86"))
    assert driver.version == (551, 86)
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    assert driver.memory(uuid) == driver.memory(f"GPU-{uuid}") == (3 << 30, 4 << 30)
    assert driver.memory("another") is None
    assert nvml.Driver.open(library("strange")).version is None


@pytest.mark.parametrize(
    ("system", "release", "version", "paging"),
    [
        ("win32", "10", "551.86", True),
        ("win32", "10", "531.18", False),
        ("win32", "10", None, True),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", "551.86", True),
        ("linux", "6.8.0-45-generic", "550.107", False),
    ],
)
def test_which_drivers_page(system, release, version, paging, library, monkeypatch) -> None:
    driver = None if version is None else nvml.Driver.open(library(version))
    monkeypatch.setattr(nvml.sys, "platform", system)
    monkeypatch.setattr(nvml.platform, "release", lambda: release)
    assert nvml.pages(driver) is paging


def test_a_machine_without_a_driver() -> None:
    assert nvml.Driver.open("no-such-library.so.1") is None
