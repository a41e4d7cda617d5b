"""The kernels without the optimizer class: one training loop with telemetry, control law and Lion by hand.

Runs on a CUDA device (Triton), else on the CPU. `python examples/kernels_on_their_own.py`
"""

import torch

import cruxy_kernels as kernels
from cruxy_kernels import layout

device = "cuda" if torch.cuda.is_available() else "cpu"
backend, reason = kernels.explain_backend(device)
print(f"{backend}: {reason}")

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).to(device)
x = torch.randn(512, 32, device=device)
y = x[:, :4].sum(dim=1, keepdim=True).sin()

# One row of control values: what the user sets, and where the law starts.
control = kernels.new_control(lr=2e-3, betas=(0.9, 0.99), device=device)

params = list(model.parameters())
# Momentum in 8 bits: int8 codes of the parameters' shapes, and a bfloat16 scale for every 64 values.
momentum = [kernels.quantize_blockwise(torch.zeros_like(p)) for p in params]
codes, scales = [c for c, _ in momentum], [s for _, s in momentum]

for step in range(201):
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    grads = [p.grad for p in params if p.grad is not None]
    telemetry = kernels.gradient_telemetry(grads, partial=True)
    kernels.control_step(control, telemetry, loss.detach(), law="meta3")
    kernels.lion_update_(params, grads, codes, control, exp_avg_scales=scales)
    model.zero_grad()
    if step % 50 == 0:  # the only time the host looks
        row = control[0].tolist()
        print(f"step {step:3d}  loss {loss.item():.4f}  lr {row[layout.LR_OUT]:.2e}  phase {row[layout.PHASE]:.3f}")

# AdamW by hand is the same with two fp32 moments.
first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
loss = torch.nn.functional.mse_loss(model(x), y)
loss.backward()
grads = [p.grad for p in params if p.grad is not None]
kernels.control_step(control, kernels.gradient_telemetry(grads), loss.detach(), law="stability_v2")
kernels.adamw_update_(params, grads, first, second, control)
restored = kernels.dequantize_blockwise(codes[0], scales[0])
print(f"loss after one AdamW step: {torch.nn.functional.mse_loss(model(x), y).item():.4f}")
print(f"largest momentum of the first layer: {restored.abs().max().item():.2e}")
