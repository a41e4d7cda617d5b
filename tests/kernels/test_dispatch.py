"""Which backend serves what, and that no choice is made in silence."""

import inspect

import pytest
import torch

import cruxy_kernels
from cruxy_kernels import dispatch, reference


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_argument_before_variable_before_device(monkeypatch):
    assert dispatch.explain("cpu")[0] in ("native", "torch")
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert dispatch.explain("cpu") == ("torch", "chosen by CRUXY_BACKEND='torch'")
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert dispatch.explain("cpu", "torch") == ("torch", "chosen by backend='torch'")


def test_a_choice_that_cannot_run_raises(monkeypatch):
    with pytest.raises(RuntimeError, match="backend='triton' cannot run on cpu"):
        dispatch.explain("cpu", "triton")
    with pytest.raises(RuntimeError, match="native loops serve the CPU"):
        dispatch.explain("mps", "native")
    with pytest.raises(ValueError, match="unknown backend"):
        dispatch.explain("cpu", "cuda")
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="CRUXY_BACKEND='triton' cannot run"):
        cruxy_kernels.gradient_telemetry([torch.ones(3)])


def test_other_devices_get_pytorch_and_a_reason():
    backend, reason = dispatch.explain("mps")
    assert backend == "torch"
    assert "mps" in reason


def test_old_and_new_cards(monkeypatch):
    def card(capability):
        dispatch._explain.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
        return dispatch.explain("cuda")

    try:
        assert card((6, 1))[0] == "torch"
        assert card((7, 5))[0] == "triton"
        assert "sm_75" in card((7, 5))[1]
        assert card((9, 0)) == ("triton", "a card (sm_90)")
    finally:
        dispatch._explain.cache_clear()


def test_float64_is_served_and_announced(monkeypatch):
    monkeypatch.setattr(dispatch, "explain", lambda *args: ("triton", "a card"))
    dispatch._warn_dtype.cache_clear()
    large = [torch.ones(1 << 19, dtype=torch.float64)]
    with pytest.warns(UserWarning, match="float64 tensors are served by PyTorch"):
        assert dispatch.choose(large) == "torch"
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        dispatch.choose(large, "triton")


@pytest.mark.parametrize("name", ["gradient_telemetry", "control_step", "lion_update_", "adamw_update_"])
def test_arguments_are_those_of_the_reference(name):
    public = inspect.signature(getattr(cruxy_kernels, name)).parameters
    twin = inspect.signature(getattr(reference, name)).parameters
    assert [p for p in public if p in twin] == list(twin)
    for parameter in twin.values():
        assert public[parameter.name].default == parameter.default
        assert public[parameter.name].kind == parameter.kind


def test_codes_and_scales_belong_together():
    p = torch.ones(64)
    codes, scales = cruxy_kernels.quantize_blockwise(p)
    control = torch.zeros((1, cruxy_kernels.layout.NUM_SLOTS))
    with pytest.raises(ValueError, match="int8 codes need their scales"):
        cruxy_kernels.lion_update_([p], [p.clone()], [codes], control)
    with pytest.raises(ValueError, match="int8 codes need their scales"):
        cruxy_kernels.lion_update_([p], [p.clone()], [p.clone()], control, exp_avg_scales=[scales])


def test_nothing_of_triton_is_imported_for_cpu_tensors():
    import subprocess
    import sys

    code = (
        "import sys, torch, cruxy_kernels as k; k.gradient_telemetry([torch.ones(9)]);"
        "assert 'triton' not in sys.modules and 'cruxy_triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
