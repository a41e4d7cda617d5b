"""Cruxy-Triton: fine-tune language models on small consumer GPUs.

`CruxyOptimizer` is a drop-in for `torch.optim.AdamW`, `MetaLion` its smallest form;
`cruxy_triton.kernels` is the package `cruxy_kernels`. They are imported on first use, so that the
command line and the memory planner start without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cruxy_kernels as kernels
    from cruxy_triton.optimizer import CruxyOptimizer, MetaLion
    from cruxy_triton.release import release_gradients

__version__ = "0.1.0"
__all__ = ["CruxyOptimizer", "MetaLion", "__version__", "kernels", "release_gradients"]

_LAZY = {
    "CruxyOptimizer": ("cruxy_triton.optimizer", "CruxyOptimizer"),
    "MetaLion": ("cruxy_triton.optimizer", "MetaLion"),
    "release_gradients": ("cruxy_triton.release", "release_gradients"),
    "kernels": ("cruxy_kernels", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
