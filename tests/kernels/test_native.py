"""The compiled CPU loops: threads, compilers that fail or are not there, and what they are asked for.

What they compute is in the files that take `place`.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from cruxy_kernels import gradient_telemetry, lion_update_, new_control, update_
from cruxy_kernels import layout as L
from cruxy_kernels.backends import dispatch, native

needs_compiler = pytest.mark.skipif(native.library()[0] is None, reason=native.library()[1])


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads, which the loops take for theirs."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("per_tensor", [False, True])
def test_results_do_not_depend_on_threads(threads, control_rows, per_tensor):
    sizes = [0, 1, 63, 64, 65, 2048, 16384, 40001]
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        torch.manual_seed(0)
        p, g, m = ([torch.randn(n) for n in sizes] for _ in range(3))
        telemetry = gradient_telemetry(g, per_tensor=per_tensor, backend="native")
        lion_update_(p, g, m, control_rows(), backend="native")
        results.append([telemetry, *p, *m])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


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
    fake.write_text('#!/bin/sh\necho version 1\n[ "$1" = --version ] || { echo no such luck >&2; exit 1; }\n')
    fake.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", CHOICE], capture_output=True, text=True, check=True,
        env={**os.environ, "CXX": str(fake), "CRUXY_CACHE": str(tmp_path), "CRUXY_BACKEND": ""},
    )  # fmt: skip
    assert "no such luck" in result.stdout
    assert "[524288.0, 524288.0, 1.0, 0.0]" in result.stdout


def _lion_state(grads, state):
    """The momentum after a step of Lion that keeps nothing of the old one: the gradient, through both conversions."""
    control = new_control(betas=(0.0, 0.0))
    control[:, [L.SKIP, L.BETA1_OUT, L.BETA2_OUT]], control[:, L.GRAD_FACTOR] = 0.0, 1.0
    update_("lion", [torch.zeros(grads.shape)], [grads], {"exp_avg": [state]}, control, backend="native")
    return state


@needs_compiler
def test_every_float16_is_read_and_written_as_torch_does_it():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    torch.testing.assert_close(
        _lion_state(every, torch.zeros(every.shape)), every.float(), rtol=0, atol=0, equal_nan=True
    )
    finite = every[every.isfinite()].float()
    between = (finite + torch.nextafter(every, torch.tensor(math.inf).half())[every.isfinite()].float()) / 2
    near = [torch.nextafter(between, torch.tensor(end)) for end in (-math.inf, math.inf)]
    wide = torch.cat([finite, between, *near, torch.tensor([1e-45, 65519.996, 65520.0, 1e30, -math.inf, math.nan])])
    written = _lion_state(wide, torch.zeros(wide.shape, dtype=torch.float16))
    torch.testing.assert_close(written, wide.half(), rtol=0, atol=0, equal_nan=True)


@needs_compiler
def test_small_and_unusual_steps_go_to_pytorch(monkeypatch):
    large = [torch.ones(1 << 19)]
    monkeypatch.setattr(native, "built", lambda: False)
    assert dispatch.choose([torch.ones(10)]) == "torch"  # no compiler is started for so little
    assert dispatch.choose(large) == "native"
    monkeypatch.setattr(native, "built", lambda: True)
    assert dispatch.choose([torch.ones(10)]) == "native"
    assert dispatch.choose([large[0].half(), large[0].bfloat16()]) == "native"
    assert dispatch.choose([large[0].double()]) == "torch"
    assert dispatch.choose([torch.ones(1024, 1024).t()]) == "native"
    assert dispatch.choose([torch.ones(10)], "native") == "native"
    assert dispatch.choose(large, None, "a rule of somebody's") == "torch"
    with pytest.raises(TypeError, match="needs float32, float16 or bfloat16"):
        dispatch.choose([torch.ones(10).double()], "native")
    with pytest.raises(TypeError, match="cannot serve the rule a rule of somebody's"):
        dispatch.choose(large, "native", "a rule of somebody's")


@needs_compiler
def test_flags_of_the_user_make_another_library(tmp_path):
    """CRUXY_NATIVE_FLAGS, for sanitizers and profilers: compiled in, and never mistaken for the usual loops."""
    code = "from cruxy_kernels.backends import native; print(native.library()[1])"
    for flags in ("", "-DCRUXY_TEST=1", "-DCRUXY_TEST=1", "-no-such-flag"):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "CRUXY_CACHE": str(tmp_path), "CRUXY_NATIVE_FLAGS": flags},
        )  # fmt: skip
        assert ("loops compiled by" in result.stdout) == (flags != "-no-such-flag"), result.stdout
    assert len(list(tmp_path.glob("native-*.so"))) == 2
