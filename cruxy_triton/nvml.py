"""What the NVIDIA driver says of its cards (NVML, https://docs.nvidia.com/deploy/nvml-api/), through ctypes.

The library comes with the driver, so that nothing has to be installed; where it is not, `Driver.open()` is None. On
Windows it counts the memory on the card alone, which PyTorch's own figures do not tell from what has been moved off it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from typing import Any

# From this version on the driver for Windows moves memory off a full card instead of refusing more.
PAGES_FROM = (536, 40)


class _Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Driver:
    """The driver, asked through the library `nvml`."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    @classmethod
    def open(cls, path: str | None = None) -> Driver | None:
        """The driver of this machine; None where there is none, or none that answers."""
        names = [path] if path else _names()
        for name in names:
            try:
                nvml = ctypes.CDLL(name)
            except OSError:
                continue
            if nvml.nvmlInit_v2() == 0:
                return cls(nvml)
        return None

    @property
    def version(self) -> tuple[int, ...] | None:
        """As (551, 86); None where it is not told."""
        text = ctypes.create_string_buffer(80)
        if self._nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))):
            return None
        parts = text.value.decode().split(".")
        return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else None

    def memory(self, uuid: str) -> tuple[int, int] | None:
        """(used, total) bytes of the card with that UUID (as torch names it), by all processes; None if not told."""
        handle, found = ctypes.c_void_p(), _Memory()
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        if self._nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)):
            return None
        if self._nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(found)):
            return None
        return found.used, found.total


def _names() -> list[str]:
    if sys.platform == "win32":
        return ["nvml.dll", os.path.join(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvml.dll")]
    return ["libnvidia-ml.so.1"]


def on_windows() -> bool:
    """Whether Windows manages the cards' memory: there, and in its subsystem for Linux."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def pages(driver: Driver | None) -> bool:
    """Whether a full card's memory may be moved to that of the system; an unknown version counts as a new one."""
    version = None if driver is None else driver.version
    return on_windows() and (version is None or version >= PAGES_FROM)
