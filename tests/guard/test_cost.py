"""What a step under the guard costs: operators, launches, reads by the host."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cruxy_kernels.backends import native
from cruxy_triton.guard import TrainingGuard
from cruxy_triton.guard.telemetry import Verdict


class Counting(TorchDispatchMode):
    """Counts operators, those that make the host read a value, and judgements that the host waits for."""

    def __init__(self):
        super().__init__()
        self.count = self.reads = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Views launch nothing.
        self.count += not any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def operators(tensors: int, on_device: bool, monkeypatch, guarded: bool = True) -> Counting:
    params = [nn.Parameter(torch.randn(4, 4)) for _ in range(tensors)]
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    guard = TrainingGuard(optimizer) if guarded else None
    monkeypatch.setattr(TrainingGuard, "_decides_on_device", lambda *_: on_device)
    for p in params:
        p.grad = torch.randn(4, 4)
    for _ in range(33):  # the 34th step is calm and not one of those whose update is measured
        optimizer.step()
    counting, wait = Counting(), Verdict.read

    def counted(verdict):
        counting.waits += 1
        return wait(verdict)

    monkeypatch.setattr(Verdict, "read", counted)
    loss = torch.tensor(1.0)
    with counting, warnings.catch_warnings():
        if guard is not None:
            guard.observe(loss)
        optimizer.step()
    return counting


@pytest.mark.parametrize("compiled", [True, False])
def test_operators_per_step(monkeypatch, compiled):
    """A calm step: as many small operators whatever the number of tensors, and no read by the host."""
    if compiled and native.library()[0] is None:
        pytest.skip(native.library()[1])
    monkeypatch.setenv("CRUXY_BACKEND", "native" if compiled else "torch")
    plain = operators(8, True, monkeypatch, guarded=False)
    few = operators(8, True, monkeypatch)
    many = operators(300, True, monkeypatch)
    more = operators(300, True, monkeypatch, guarded=False)
    assert (few.reads, few.waits) == (many.reads, many.waits) == (plain.reads, 0)
    assert few.count - plain.count == many.count - more.count
    # Compiled, the judgement is no operator of torch; then there are addresses, memory for it, and the host's copy.
    assert many.count - more.count <= (6 if compiled else 70)
    # Decided by the host (a CPU, or an optimizer without found_inf): one read.
    by_host = operators(8, False, monkeypatch)
    assert (by_host.reads, by_host.waits) == (plain.reads, 1)


SCRIPT = """
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from cruxy_kernels import launch
from cruxy_kernels.laws.control import control_kernel
from cruxy_kernels.laws.judge import judge_kernel
from cruxy_kernels.laws.telemetry import telemetry_kernel
from cruxy_kernels.update import update_kernel
from cruxy_triton import CruxyOptimizer
from cruxy_triton.guard import Policy, TrainingGuard

class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns):
            made.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))

made = []
launch.observers.append(made.append)
TrainingGuard._decides_on_device = lambda *_: True

def run(guarded):
    params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 150, 70)]
    optimizer = CruxyOptimizer(params, lr=1e-3)
    guard = TrainingGuard(optimizer, policy=Policy(update_ratio_limit=None)) if guarded else None
    def step():
        for p in params:
            p.grad = torch.ones_like(p)
        loss = torch.tensor(1.0)
        made.clear()
        with Operators():
            if guard is not None:
                guard.observe(loss)
            optimizer.set_loss(loss)
            optimizer.step()
    step()
    step()
    # The interpreter is made of operators too: from here on kernels are only counted.
    kernels = (control_kernel, judge_kernel, telemetry_kernel, update_kernel)
    runs = [kernel.run for kernel in kernels]
    for kernel in kernels:
        kernel.run = lambda *args, **kwargs: None
    step()
    for kernel, real in zip(kernels, runs):
        kernel.run = real
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
    return list(made)

alone = run(False)
print(*sorted(name for name in run(True) if name not in alone or alone.remove(name)))
"""


def test_one_more_launch_on_an_accelerator():
    """Above CruxyOptimizer: the kernel, memory for what it says, and the host's copy of that.

    What else there is works on the table of addresses, on the host; torch's own is what any hook costs.
    """
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CRUXY_BACKEND": "triton"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    table = {"bitwise_and", "copy_", "eq", "remainder"}
    hooks = {"_record_function_enter_new", "_record_function_exit"}
    assert [name for name in done.stdout.split() if name not in table | hooks] == [
        "_to_copy", "empty", "judge_kernel",
    ], done.stderr  # fmt: skip
