"""The compiled CPU loops against the PyTorch twins, and what happens without a compiler."""

import os
import subprocess
import sys

import pytest
import torch

from cruxy_kernels import codec_reference, dispatch, native, reference
from cruxy_kernels import layout as L

needs_compiler = pytest.mark.skipif(native.library()[0] is None, reason=native.library()[1])
SIZES = [0, 1, 63, 64, 65, 2048, 16384, 40001]


def control_vector(**slots):
    control = torch.zeros((2, L.NUM_SLOTS))
    values = {"LR_OUT": 1e-3, "WEIGHT_DECAY": 0.1, "BETA1_OUT": 0.9, "BETA2_OUT": 0.97, "CLIP_COEF": 0.7,
              "EPS": 1e-8, "STEP": 4.0, "BIAS_CORRECTION1": 0.3, "BIAS_CORRECTION2_SQRT": 0.2}  # fmt: skip
    for name, value in {**values, **slots}.items():
        control[:, getattr(L, name)] = value
    control[1, L.LR_OUT] = 3e-3
    return control


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for n in SIZES]


@needs_compiler
@pytest.mark.parametrize("gamma", [1.5, 2.0, 1.0, 3.3])
def test_telemetry(gamma):
    grads = tensors()
    grads[4][7], grads[5][3] = float("nan"), float("-inf")
    scale = torch.tensor(4.0)
    for per_tensor in (False, True):
        ours = native.gradient_telemetry(grads, gamma=gamma, grad_scale=scale, per_tensor=per_tensor)
        twin = reference.gradient_telemetry(grads, gamma=gamma, grad_scale=scale, per_tensor=per_tensor)
        torch.testing.assert_close(ours, twin, rtol=2e-6, atol=1e-12)  # both sum in fp32, in their own order
    assert torch.equal(native.gradient_telemetry(grads), native.gradient_telemetry(grads))


@needs_compiler
def test_telemetry_does_not_depend_on_threads():
    grads, threads = tensors(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = native.gradient_telemetry(grads)
        torch.set_num_threads(3)
        assert torch.equal(native.gradient_telemetry(grads), one)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_lion(coded, maximize):
    g, rows = tensors(1), [i % 2 for i in range(len(SIZES))]
    multipliers, scale = torch.linspace(0.5, 1.5, len(SIZES)), torch.tensor(2.0)
    results = []
    for module in (native, reference):
        p, m, scales = tensors(2), tensors(3), None
        if coded:
            pairs = [codec_reference.quantize_blockwise(t) for t in m]
            m, scales = [c for c, _ in pairs], [s for _, s in pairs]
        module.lion_update_(
            p, g, m, control_vector(), exp_avg_scales=scales, rows=rows, lr_multipliers=multipliers,
            grad_scale=scale, maximize=maximize,
        )  # fmt: skip
        results.append((p, m, scales))
    for i in range(len(SIZES)):
        torch.testing.assert_close(results[0][0][i], results[1][0][i], rtol=1e-6, atol=1e-7)
        if coded:  # lerp in the twin, a sum of products here: a value between two codes may fall either way
            assert (results[0][1][i].int() - results[1][1][i].int()).abs().float().sum() <= 1 + SIZES[i] * 1e-3
            assert torch.equal(results[0][2][i], results[1][2][i])
        else:
            torch.testing.assert_close(results[0][1][i], results[1][1][i], rtol=1e-6, atol=1e-7)


@needs_compiler
def test_codes_are_those_of_the_twin():
    """With beta2 = 0 and clip 1 the stored momentum is the code of the gradient itself."""
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3.39e38, -1.0, float("inf"), float("nan")])
    g = torch.cat([torch.randn(640) * torch.exp(3 * torch.randn(640)), special.repeat_interleave(64), special])
    codes = torch.zeros(g.numel(), dtype=torch.int8)
    scales = torch.zeros(codec_reference.scale_count(g.numel()), dtype=torch.bfloat16)
    control = control_vector(BETA2_OUT=0.0, CLIP_COEF=1.0)
    native.lion_update_([torch.zeros_like(g)], [g], [codes], control, exp_avg_scales=[scales])
    want_codes, want_scales = codec_reference.quantize_blockwise(g)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scales.float().nan_to_num(7, 8, 9), want_scales.float().nan_to_num(7, 8, 9))


@needs_compiler
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adamw(nesterov, decoupled):
    results = []
    for module in (native, reference):
        p, g, m, v = tensors(1), tensors(2), tensors(3), [t.abs() for t in tensors(4)]
        module.adamw_update_(p, g, m, v, control_vector(), nesterov=nesterov, decoupled=decoupled)
        results.append((p, m, v))
    for ours, twin in zip(*results, strict=True):
        for a, b in zip(ours, twin, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


@needs_compiler
def test_skip_changes_no_bit():
    p, g, m = tensors(1), tensors(2), tensors(3)
    before = [t.clone() for t in [*p, *m]]
    native.lion_update_(p, g, m, control_vector(SKIP=1.0))
    native.adamw_update_(p, g, m, m, control_vector(SKIP=1.0))
    assert all(torch.equal(a, b) for a, b in zip([*p, *m], before, strict=True))


@needs_compiler
def test_lists_that_do_not_fit():
    p = torch.ones(100)
    with pytest.raises(ValueError, match="elements"):
        native.lion_update_([p], [torch.ones(99)], [torch.ones(100)], control_vector())
    codes, scales = codec_reference.quantize_blockwise(p)
    with pytest.raises(ValueError, match="elements"):
        native.lion_update_([p], [p.clone()], [codes], control_vector(), exp_avg_scales=[scales[:1]])


CHOICE = """
import warnings, torch
from cruxy_kernels import explain_backend, gradient_telemetry
print(explain_backend("cpu"))
grads = [torch.ones(1 << 19)]
print(gradient_telemetry(grads).tolist())
try:
    gradient_telemetry(grads, backend="native")
except RuntimeError as error:
    print("refused:", error)
"""


def test_without_a_compiler_it_says_so_and_uses_pytorch(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", CHOICE], capture_output=True, text=True, check=True,
        env={**os.environ, "PATH": str(tmp_path), "CXX": "", "CRUXY_CACHE": str(tmp_path), "CRUXY_BACKEND": ""},
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert lines[0].startswith("('torch'")
    assert "no C++ compiler found" in lines[0]
    assert lines[1] == "[524288.0, 524288.0, 1.0, 0.0]"
    assert lines[2].startswith("refused: backend='native' cannot run")


def test_a_compiler_that_fails_is_reported(tmp_path):
    fake = tmp_path / "broken-c++"
    fake.write_text("#!/bin/sh\necho version 1\n[ \"$1\" = --version ] || { echo no such luck >&2; exit 1; }\n")
    fake.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", CHOICE], capture_output=True, text=True, check=True,
        env={**os.environ, "CXX": str(fake), "CRUXY_CACHE": str(tmp_path), "CRUXY_BACKEND": ""},
    )  # fmt: skip
    assert "no such luck" in result.stdout
    assert "[524288.0, 524288.0, 1.0, 0.0]" in result.stdout


@needs_compiler
def test_small_and_unusual_steps_go_to_pytorch():
    assert dispatch.choose([torch.ones(10)]) == "torch"
    assert dispatch.choose([torch.ones(1 << 19)]) == "native"
    assert dispatch.choose([torch.ones(1 << 19, dtype=torch.float16)]) == "torch"
    assert dispatch.choose([torch.ones(1024, 1024).t()]) == "torch"
    assert dispatch.choose([torch.ones(10)], "native") == "native"
    with pytest.raises(TypeError, match="needs float32"):
        dispatch.choose([torch.ones(10).half()], "native")
