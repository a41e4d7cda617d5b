"""Which backend serves what, and that no choice is made in silence."""

import inspect

import pytest
import torch

import cruxy_kernels
from cruxy_kernels import RULES
from cruxy_kernels.backends import dispatch


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


@pytest.mark.parametrize("name", [name for name in RULES if hasattr(cruxy_kernels, f"{name}_update_")])
def test_thin_forms_have_the_arguments_of_update(name):
    """What they leave out is refused there and here: no default of theirs differs."""
    general = inspect.signature(cruxy_kernels.update_).parameters
    thin = inspect.signature(getattr(cruxy_kernels, f"{name}_update_")).parameters
    shared = [p for p in general if p not in ("rule", "state", "flags")]
    assert [p for p in thin if p in general] == shared
    for parameter in shared:
        assert thin[parameter].default == general[parameter].default
        assert thin[parameter].kind == general[parameter].kind
    assert {flag: thin[flag].default for flag in RULES[name].flags} == dict(RULES[name].flags)
    buffers = {f"{buffer}s" for buffer in RULES[name].state}
    assert set(thin) - set(shared) <= buffers | {f"{b}_scales" for b in RULES[name].state} | set(RULES[name].flags)
    assert buffers <= set(thin)


def test_codes_and_scales_belong_together():
    p = torch.ones(64)
    codes, scales = cruxy_kernels.quantize_blockwise(p)
    control = torch.zeros((1, cruxy_kernels.layout.NUM_SLOTS))
    with pytest.raises(ValueError, match="int8 codes need their scales"):
        cruxy_kernels.lion_update_([p], [p.clone()], [codes], control)
    with pytest.raises(TypeError, match=r"torch\.float32 with scales; lion has no such codes"):
        cruxy_kernels.lion_update_([p], [p.clone()], [p.clone()], control, exp_avg_scales=[scales])


def test_a_codec_that_the_loops_do_not_have_goes_to_pytorch(monkeypatch):
    monkeypatch.delitem(dispatch.native.CODES, "softsign4")
    p, (codes, scales) = torch.ones(1 << 19), cruxy_kernels.quantize_blockwise(torch.ones(1 << 19), bits=4)
    arguments = ([p], [p.clone()], {"exp_avg": [codes], "exp_avg_scale": [scales]})
    assert dispatch.choose_for_update(RULES["lion"], *arguments, None) == "torch"
    if dispatch.native.library()[0] is not None:
        with pytest.raises(TypeError, match=r"cannot serve the codec softsign4: native\.cpp has softsign8"):
            dispatch.choose_for_update(RULES["lion"], *arguments, "native")
