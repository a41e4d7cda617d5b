"""What this machine has: versions, devices, the backend and why, known problems and what to do about each."""

import os
import platform
import shutil
import sys
import sysconfig
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOW_DISK = 8 << 30  # bytes; a model of 3 billion parameters in 16 bits takes 6 GiB


@dataclass
class Problem:
    """`severity` is "error" (training will not run as asked) or "note" (it runs, but know this)."""

    severity: str
    what: str
    remedy: str


def examine() -> dict[str, Any]:
    """All findings as plain data: versions, system, devices, backend and problems."""
    import torch

    import cruxy_kernels
    from cruxy_triton.environment import versions
    from cruxy_triton.nvml import Driver

    problems: list[Problem] = []
    driver = Driver.open()
    with warnings.catch_warnings(record=True) as said:  # torch warns, once, of a driver that it cannot use
        warnings.simplefilter("always")
        devices = _devices(problems)
    _check_torch_build(problems, [str(warning.message) for warning in said])
    _check_triton(devices, problems)
    _check_packages(problems)
    folders = _folders(problems)
    if devices:
        _check_paging(driver, problems)
    main_device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, reason = cruxy_kernels.explain_backend(main_device)
    return {
        "versions": versions(),
        "system": {
            "os": platform.platform(),
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": memory_bytes(),
        },
        "torch": {"cuda_build": torch.version.cuda, "threads": torch.get_num_threads()},
        "driver": None if driver is None or driver.version is None else ".".join(map(str, driver.version)),
        "devices": devices,
        "folders": folders,
        "backend": {"device": str(main_device), "name": backend, "reason": reason},
        "problems": [asdict(p) for p in problems],
    }


def memory_bytes() -> int | None:
    """Installed system memory in bytes; None where the system does not tell (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _devices(problems: list[Problem]) -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        with torch.cuda.device(index):  # asked of the current device; with emulation torch says yes of any card
            bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "name": properties.name,
                "compute_capability": f"{capability[0]}.{capability[1]}",
                "multiprocessors": properties.multi_processor_count,
                "total_bytes": total,
                "free_bytes": free,
                "training_dtype": "bfloat16" if bfloat16 else "float16",
            }
        )
        if not _has_code_for(capability, torch.cuda.get_arch_list()):
            problems.append(
                Problem(
                    "error",
                    f"{properties.name} has compute capability {capability[0]}.{capability[1]}, for which this torch "
                    f"{torch.__version__} holds no code ({', '.join(torch.cuda.get_arch_list())})",
                    "install a torch built for an older CUDA version, which still supports this card",
                )
            )
        elif wrong := _computes_wrong(index, "bfloat16" if bfloat16 else "float16"):
            found[-1]["training_dtype"] = "float32"
            problems.append(
                Problem(
                    "note",
                    f"{properties.name} computes wrong in 16 bits: {wrong}",
                    "finetune takes float32 on this card, twice the memory for what is not in 4 bits; another driver "
                    "or version of torch may be right",
                )
            )
        if not bfloat16:
            problems.append(
                Problem(
                    "note",
                    f"{properties.name} computes bfloat16 by emulation only (torch.cuda.is_bf16_supported() may still "
                    "say True)",
                    "nothing to do: finetune takes float16 with a gradient scaler and float32 adapters on this card",
                )
            )
    return found


def _computes_wrong(index: int, dtype: str) -> str:
    """What card `index` gets wrong in `dtype`, in words; "" where it is right or busy with other things."""
    import torch

    from cruxy_triton.finetune import selftest

    try:
        return "; ".join(selftest.faults(torch.device("cuda", index), getattr(torch, dtype)))
    except torch.OutOfMemoryError:
        return ""
    except RuntimeError as error:
        return f"trying it fails with {str(error).strip().partition(chr(10))[0]}"
    finally:
        torch.cuda.empty_cache()


def _has_code_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether binary code (same major, minor not above) or PTX (any lower) in `architectures` runs there."""
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        if not digits.isdecimal():
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and built <= capability:
            return True
        if kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
    return False


def _check_torch_build(problems: list[Problem], said: list[str]) -> None:
    """`said` is what torch warned of when it was asked for devices."""
    import torch

    why = f" ({'; '.join(' '.join(text.split()) for text in said)})" if said else ""

    driver = shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version")
    if driver and torch.version.cuda is None:
        problems.append(
            Problem(
                "error",
                f"this machine has an NVIDIA driver, but torch {torch.__version__} is built without CUDA",
                "install the CUDA build of torch (the selector on pytorch.org/get-started names the command)",
            )
        )
    elif driver and not torch.cuda.is_available():
        problems.append(
            Problem(
                "error",
                f"torch is built for CUDA {torch.version.cuda}, but finds no usable device{why}",
                "check that nvidia-smi lists the card, that its driver is new enough for that CUDA version, and that "
                "CUDA_VISIBLE_DEVICES does not hide it",
            )
        )


def _check_triton(devices: list[dict[str, Any]], problems: list[Problem]) -> None:
    try:
        import triton
    except ImportError as error:
        if devices:
            package = "triton-windows" if sys.platform == "win32" else "triton"
            problems.append(
                Problem(
                    "note",
                    f"Triton cannot be imported ({error}); the optimizer runs as plain PyTorch, with more launches",
                    f"pip install {package}",
                )
            )
        return
    if devices:
        _check_compiler(Path(triton.__file__ or "").parent, problems)
    if any(d["compute_capability"] == "7.5" for d in devices):
        problems.append(
            Problem(
                "note",
                "Triton no longer tests Turing cards (compute capability 7.5) since 3.3; kernels of other packages may "
                "fail to compile",
                "the kernels of cruxy_kernels keep to what this card has; if one fails all the same, set "
                "CRUXY_BACKEND=torch and report it",
            )
        )


def _check_compiler(triton: Path, problems: list[Problem]) -> None:
    """Triton, in the folder `triton`, compiles a few lines of C the first time that it starts a kernel."""
    asked = os.environ.get("CC")
    lacks, remedy = "", "install one (Debian, Ubuntu: apt install gcc)"
    if asked is not None:
        if shutil.which(asked) is None:
            lacks, remedy = f"the C compiler that CC names ({asked}) is not there", "unset CC, or correct it"
    elif sys.platform == "win32":
        if next(triton.rglob("tcc.exe"), None) is None and shutil.which("cl") is None:
            lacks, remedy = "no C compiler is there", "pip install -U triton-windows, which brings one"
    elif shutil.which("gcc") is None and shutil.which("clang") is None:
        lacks = "no C compiler (gcc, clang) is there"
    if not lacks and sys.platform != "win32":
        header = Path(sysconfig.get_paths(scheme="posix_prefix")["include"]) / "Python.h"
        if not header.is_file():
            lacks = f"{header} is not there"
            remedy = "install Python's headers (Debian, Ubuntu: apt install python3-dev)"
    if lacks:
        problems.append(
            Problem(
                "error",
                f"Triton cannot start kernels: {lacks}",
                f"{remedy}, or set CRUXY_BACKEND=torch to do without Triton",
            )
        )


def _check_paging(driver: Any, problems: list[Problem]) -> None:
    from cruxy_triton.nvml import pages

    if pages(driver):
        problems.append(
            Problem(
                "note",
                "on Windows the driver moves GPU memory to system memory when a card is full, so a run that does not "
                "fit is not refused but becomes several times slower (finetune says so when it sees it)",
                "keep to the plan's figure for Windows (cruxy-triton plan --os windows), or set 'CUDA - Sysmem "
                "Fallback Policy' to 'Prefer No Sysmem Fallback' in the NVIDIA control panel",
            )
        )


def _check_packages(problems: list[Problem]) -> None:
    from cruxy_triton.environment import missing_train_packages

    if missing := missing_train_packages():
        problems.append(
            Problem(
                "note",
                f"`cruxy-triton finetune` cannot run: {', '.join(missing)} not installed",
                "pip install 'cruxy-triton[train]'",
            )
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes  # noqa: F401
    except ImportError as error:
        problems.append(
            Problem("note", f"bitsandbytes cannot be imported ({error}): no --load-in-4bit", "pip install bitsandbytes")
        )


def _folders(problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """Where a run writes and models are kept: path, free bytes and whether it can be written."""
    from cruxy_kernels.backends.native import cache_folder

    hugging_face = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
    found = {}
    for name, path, variable in (
        ("here", Path.cwd(), "--output"),
        ("cache", cache_folder(), "CRUXY_CACHE"),
        ("models", Path(hugging_face).expanduser(), "HF_HOME"),
    ):
        existing = next(p for p in (path, *path.parents) if p.exists())
        free, writable = shutil.disk_usage(existing).free, os.access(existing, os.W_OK)
        found[name] = {"path": str(path), "free_bytes": free, "writable": writable}
        if not writable or free < LOW_DISK:
            state = f"has {free / 2**30:.1f} GiB free" if writable else "cannot be written"
            problems.append(Problem("note", f"{path} ({name}) {state}", f"choose another place with {variable}"))
    return found


def render(findings: dict[str, Any]) -> str:
    """The findings as text for a terminal."""
    system, backend = findings["system"], findings["backend"]
    memory = system["memory_bytes"]
    lines = ["versions"]
    lines += [f"  {name:<14}{version}" for name, version in findings["versions"].items()]
    lines += [
        "",
        "system",
        f"  {system['os']}, {system['cores']} cores" + (f", {memory / 2**30:.1f} GiB memory" if memory else ""),
        f"  torch is built {'for CUDA ' + cuda if (cuda := findings['torch']['cuda_build']) else 'for the CPU only'}; "
        f"{findings['torch']['threads']} threads",
        *([f"  NVIDIA driver {findings['driver']}"] if findings["driver"] else []),
        "",
        "devices",
    ]
    lines += [
        f"  cuda:{i}  {d['name']}, compute capability {d['compute_capability']}, {d['multiprocessors']} SMs, "
        f"{d['free_bytes'] / 2**30:.2f} of {d['total_bytes'] / 2**30:.2f} GiB free, trains in {d['training_dtype']}"
        for i, d in enumerate(findings["devices"])
    ] or ["  cpu only: trains in float32"]
    lines += ["", "folders"]
    lines += [
        f"  {name:<8}{folder['path']}: {folder['free_bytes'] / 2**30:.1f} GiB free"
        for name, folder in findings["folders"].items()
    ]
    lines += ["", f"backend for {backend['device']}: {backend['name']}, because {backend['reason']}", ""]
    if not findings["problems"]:
        lines.append("no known problems")
    for problem in findings["problems"]:
        lines += [f"{problem['severity']}: {problem['what']}", f"  -> {problem['remedy']}"]
    return "\n".join(lines)
