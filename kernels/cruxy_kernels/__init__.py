"""The fast loop of an optimizer step: telemetry, control, update. Imports torch and triton only.

    control = new_control(lr=1e-3)                           # one row of named slots per parameter group
    telemetry = gradient_telemetry(grads)                    # one read of every gradient -> (4,)
    control_step(control, telemetry, loss, law="meta3")      # the per-step law, in place
    lion_update_(params, grads, exp_avgs, control)           # or adamw_update_, or update_(rule, ...)

Nothing in between is read by the host. `layout` names the slots of the control vector. Every function runs as
Triton kernels, compiled CPU loops or PyTorch operators; `explain_backend(device)` says which, and why.
"""

from .backends.dispatch import (
    adamw_update_,
    blade_step,
    control_step,
    dequantize_blockwise,
    gradient_telemetry,
    lion_update_,
    quantize_blockwise,
    refresh_outputs,
    update_,
)
from .backends.dispatch import explain as explain_backend
from .backends.judge import GradientJudge
from .backends.prepared import PreparedUpdate
from .codec import CODECS
from .laws import layout
from .laws.blade import BladeState, LayerTensors, new_blade_state
from .laws.clipping import TensorClip
from .laws.control import control_inputs, new_control
from .laws.judge import Limits
from .rules import RULES

__all__ = [
    "CODECS",
    "RULES",
    "BladeState",
    "GradientJudge",
    "LayerTensors",
    "Limits",
    "PreparedUpdate",
    "TensorClip",
    "adamw_update_",
    "blade_step",
    "control_inputs",
    "control_step",
    "dequantize_blockwise",
    "explain_backend",
    "gradient_telemetry",
    "layout",
    "lion_update_",
    "new_blade_state",
    "new_control",
    "quantize_blockwise",
    "refresh_outputs",
    "update_",
]
