"""Trains the same run with both backends under TRITON_INTERPRET=1 and prints one line of JSON a run.

    TRITON_INTERPRET=1 python backend_worker.py

The variable has to be set before triton is imported, hence a process of its own.
"""

import json
import sys

import torch
from torch import nn

from cruxy_kernels import layout
from cruxy_triton import CruxyOptimizer

layout.TENSOR_CLIP_WARMUP = 4  # so that the run goes beyond it
STEPS = 12  # one skipped step and one turn of the slow loop
RUNS = {
    "stability_v1 adamw": {"mode": "stability_v1"},
    "stability_v2 adamw": {"mode": "stability_v2"},
    "meta3 adamw": {},
    "stability_v1 lion": {"mode": "stability_v1", "use_lion": True},
    "stability_v2 lion": {"mode": "stability_v2", "use_lion": True},
    "meta3 lion": {"use_lion": True},
    "meta3 lion 8-bit": {"use_lion": True, "state_bits": 8},
    "meta3 adamw 8-bit": {"state_bits": 8},
    "meta3 lion 4-bit": {"use_lion": True, "state_bits": 4},
    "meta3 adamw coupled": {"decoupled_weight_decay": False, "use_nesterov": False, "weight_decay": 0.1},
    "meta3 lion fp16": {"use_lion": True, "dtype": torch.float16},
    "meta3 adamw bf16": {"dtype": torch.bfloat16},
    "meta3 lion clip by tensor": {"use_lion": True, "clip": "tensor"},
}


def run(backend: str, settings: dict) -> tuple[list[torch.Tensor], dict, torch.Tensor]:
    settings = dict(settings)
    dtype = settings.pop("dtype", torch.float32)
    if settings.get("use_lion"):
        settings |= {"betas": (0.9, 0.99), "lr": 1e-3}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 37), nn.Tanh(), nn.Linear(37, 3)).to(dtype)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 2e-3}]
    optimizer = CruxyOptimizer(groups, backend=backend, **settings)
    for step in range(STEPS):
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x.to(dtype)).float() - x[:, :3].sin()).square().mean()
        loss.backward()
        if step == 7:
            model[0].weight.grad[0, 0] = float("nan")
        optimizer.step(loss=loss)
    return [p.detach().float() for p in model.parameters()], optimizer.metrics(), optimizer.control[:, 16:]


def main() -> None:
    torch.set_num_threads(1)
    for name, settings in RUNS.items():
        (a, ma, ca), (b, mb, cb) = run("torch", settings), run("triton", settings)
        difference = sum((p - q).square().sum() for p, q in zip(a, b, strict=True))
        relative = (difference / sum(p.square().sum() for p in a)).sqrt().item()
        control = ((ca - cb).abs() / (cb.abs() + 1e-3)).nan_to_num(posinf=0.0).max().item()
        result = {"run": name, "difference": relative, "control": control, "lr_scale": ma["lr_scale"],
                  "skipped": [ma["skipped_steps"], mb["skipped_steps"]], "loss": [ma["loss"], mb["loss"]]}  # fmt: skip
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
