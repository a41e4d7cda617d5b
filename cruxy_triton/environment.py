"""What there is here: versions that decide a result, the packages of the `train` extra, the Hugging Face hub."""

import importlib.metadata
import importlib.util
import os
import platform

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
