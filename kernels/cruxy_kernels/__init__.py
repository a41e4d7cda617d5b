"""The fast loop of an optimizer step: telemetry, control, update. Imports torch and triton only.

    telemetry = gradient_telemetry(grads)                    # one read of every gradient -> (4,)
    control_step(control, telemetry, loss, law="meta3")      # the per-step law, in place
    lion_update_(params, grads, exp_avgs, control)           # or adamw_update_

Nothing in between is read by the host. `layout` names the slots of the control vector. Every function runs as
Triton kernels, compiled CPU loops or PyTorch operators; `explain_backend(device)` says which, and why.
"""

from cruxy_kernels import layout
from cruxy_kernels.dispatch import (
    adamw_update_,
    control_step,
    dequantize_blockwise,
    gradient_telemetry,
    lion_update_,
    quantize_blockwise,
)
from cruxy_kernels.dispatch import explain as explain_backend

__all__ = [
    "adamw_update_",
    "control_step",
    "dequantize_blockwise",
    "explain_backend",
    "gradient_telemetry",
    "layout",
    "lion_update_",
    "quantize_blockwise",
]
