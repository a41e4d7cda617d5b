"""What there is here: versions that decide a result, the packages of the `train` extra, the Hugging Face hub."""

import importlib.metadata
import importlib.util
import logging
import os
import platform
import warnings

from cruxy_triton.errors import UserError

TRAIN_EXTRA = ("transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "matplotlib")
PACKAGES = ("cruxy-triton", "torch", "triton", *TRAIN_EXTRA, "bitsandbytes")


class MissingPackage(UserError, ImportError):
    """A package that a command needs is not installed; the message holds the command that installs it."""


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide the result; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def missing_train_packages() -> list[str]:
    return [name for name in TRAIN_EXTRA if importlib.util.find_spec(name) is None]


def require_train_extra() -> None:
    """Raises MissingPackage where fine-tuning cannot be imported."""
    if missing := missing_train_packages():
        raise MissingPackage(
            f"fine-tuning needs packages that are not installed ({', '.join(missing)}); install them with "
            "pip install 'cruxy-triton[train]'"
        )


def require_reporter(name: str) -> None:
    """Raises MissingPackage where the package of `--report-to` is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise MissingPackage(f"--report-to {name} needs the package {name}, which is not installed; pip install {name}")


def expect_no_hub_in_vain() -> None:
    """Asks once whether the Hugging Face hub answers; if not, only the cache is used for the rest of the process.

    Its libraries would ask five times for each file, with longer and longer pauses and a warning each.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for datasets, which reads it when it is imported


def quiet_libraries(*, one_gpu: bool = True) -> None:
    """One GPU, and no third-party progress bars and notices, which would bury ours; what they warn of stays."""
    if one_gpu and "LOCAL_RANK" not in os.environ:  # not under torchrun or accelerate launch
        # With several GPUs in sight of one process transformers would use DataParallel, which TRL refuses.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for package in ("transformers", "trl", "peft", "accelerate", "bitsandbytes"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=package)
    # "No module named 'kernels'": an optional download of CPU kernels that would be used for inference only.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
