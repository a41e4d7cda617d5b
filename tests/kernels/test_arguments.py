"""Arguments that do not fit: every backend refuses them in the same words, and nothing has been written then.

Kernels and compiled loops follow addresses: what passes here and does not fit is memory that is overwritten.
"""

import math

import pytest
import torch
from cases import PLACES, RULE_CASES

from cruxy_kernels import (
    CODECS,
    RULES,
    adamw_update_,
    control_step,
    dequantize_blockwise,
    gradient_telemetry,
    lion_update_,
    new_control,
    quantize_blockwise,
    refresh_outputs,
    update_,
)
from cruxy_kernels import layout as L
from cruxy_kernels.backends import native

OTHER = "cuda" if PLACES[0].device == "cpu" and torch.cuda.is_available() else "meta"  # a device of other tensors


def call(rule, device, coded=False):
    """The arguments of a good call of two tensors, to be spoilt."""
    shapes = [(100,), (3, 43)]
    control = new_control(2, device=device)
    control_step(control, torch.tensor([5.0, 4.0, 2.0, 0.0], device=device), backend="torch")
    made = {
        "rule": rule,
        "params": [torch.randn(s, device=device) for s in shapes],
        "grads": [torch.randn(s, device=device) for s in shapes],
        "control": control,
        "rows": [0, 1],
        "ids": [3, 4],
        "lr_multipliers": torch.ones(2, device=device),
    }
    state = {name: [torch.rand(s, device=device) for s in shapes] for name in RULES[rule].state}
    if coded:  # 8 bits, or so many
        for name, codec in zip(RULES[rule].state, RULES[rule].codecs(8 if coded is True else coded), strict=True):
            pairs = [quantize_blockwise(t, codec=codec.name, backend="torch") for t in state[name]]
            state[name], state[name + "_scale"] = [c for c, _ in pairs], [s for _, s in pairs]
    return made | {"state": state}


def named(name, arguments):
    """STATE and SCALE are those of the rule's first state."""
    first = RULES[arguments["rule"]].state[0]
    return {"STATE": first, "SCALE": first + "_scale"}.get(name, name)


def replace(place, index, change):
    """A spoiler: puts change(what is there) in place of a list's element, or of the whole list."""

    def spoil(arguments):
        name = named(place, arguments)
        owner = arguments["state"] if name in arguments["state"] else arguments
        if index is None:
            owner[name] = change(owner[name])
        else:
            owner[name] = [change(v) if i == index else v for i, v in enumerate(owner[name])]

    return spoil


def drop(name):
    return lambda arguments: arguments["state"].pop(named(name, arguments))


def strided(t):
    return torch.stack([t, t], -1)[..., 0]


BAD = {
    "a shorter gradient": replace("grads", 0, lambda t: t[:50]),
    "a gradient of one element": replace("grads", 0, lambda t: t[:1]),
    "a gradient of another shape": replace("grads", 1, lambda t: t.t()),
    "too few gradients": replace("grads", None, lambda ts: ts[:1]),
    "too many gradients": replace("grads", None, lambda ts: [*ts, ts[0]]),
    "too few parameters": replace("params", None, lambda ts: ts[:1]),
    "a gradient elsewhere": replace("grads", 0, lambda t: t.to(OTHER)),
    "integer gradients": replace("grads", 0, lambda t: t.int()),
    "complex gradients": replace("grads", 0, lambda t: t.to(torch.complex64)),
    "sparse gradients": replace("grads", 0, lambda t: t.to_sparse()),
    "integer parameters": replace("params", 0, lambda t: t.int()),
    "a shorter state": replace("STATE", 0, lambda t: t[:99]),
    "a longer state": replace("STATE", 0, lambda t: torch.cat([t, t])),
    "a state of another shape": replace("STATE", 1, lambda t: t.reshape(43, 3)),
    "too few states": replace("STATE", None, lambda ts: ts[:1]),
    "a state elsewhere": replace("STATE", 0, lambda t: t.to(OTHER)),
    "integer state": replace("STATE", 0, lambda t: t.int()),
    "int8 without scales": replace("STATE", 0, lambda t: t.to(torch.int8)),
    "uint8 state": replace("STATE", 0, lambda t: t.to(torch.uint8)),
    "a float64 state of fp32 parameters": replace("STATE", 0, lambda t: t.double()),
    "no state": drop("STATE"),
    "a strange state": lambda arguments: arguments["state"].update(exp_inf=arguments["params"]),
    "rows below 0": replace("rows", None, lambda _: [0, -1]),
    "rows beyond the control vector": replace("rows", None, lambda _: [0, 2]),
    "row 40 of 2": replace("rows", None, lambda _: [40, 0]),
    "too few rows": replace("rows", None, lambda _: [0]),
    "ids below 0": replace("ids", None, lambda _: [-1, 0]),
    "ids beyond 31 bits": replace("ids", None, lambda _: [0, 1 << 31]),
    "too many ids": replace("ids", None, lambda _: [0, 1, 2]),
    "float64 multipliers": replace("lr_multipliers", None, lambda t: t.double()),
    "too few multipliers": replace("lr_multipliers", None, lambda t: t[:1]),
    "multipliers of two dimensions": replace("lr_multipliers", None, lambda t: t[:, None]),
    "multipliers elsewhere": replace("lr_multipliers", None, lambda t: t.to("meta")),
    "float64 control": replace("control", None, lambda t: t.double()),
    "one-dimensional control": replace("control", None, lambda t: t[0]),
    "a control vector of fewer slots": replace("control", None, lambda t: t[:, :-1].contiguous()),
    "control with a stride": replace("control", None, strided),
    "a transposed control": replace("control", None, lambda t: t.t().contiguous().t()),
    "control elsewhere": replace("control", None, lambda t: t.to("meta")),
    "an unknown rule": replace("rule", None, lambda _: "sgd"),
    "an unknown flag": lambda arguments: arguments.update(amsgrad=True),
}
BAD_CODES = {
    "too few scales": replace("SCALE", 1, lambda t: t[:2]),
    "one scale": replace("SCALE", 1, lambda t: t[:1]),
    "too many scales": replace("SCALE", 1, lambda t: torch.cat([t, t])),
    "fp16 scales": replace("SCALE", 1, lambda t: t.half()),
    "fp32 scales": replace("SCALE", 1, lambda t: t.float()),
    "int16 scales": replace("SCALE", 1, lambda t: t.view(torch.int16)),
    "scales of two dimensions": replace("SCALE", 1, lambda t: t[:, None]),
    "scales elsewhere": replace("SCALE", 1, lambda t: t.to("meta")),
    "fewer codes": replace("STATE", 1, lambda t: t[:1]),
    "floating-point codes": replace("STATE", 1, lambda t: t.float()),
    "int16 codes": replace("STATE", 1, lambda t: t.to(torch.int16)),
    "no scales for one": replace("SCALE", None, lambda ts: ts[:1]),
    "scales dropped": drop("SCALE"),
}
CODED = [(name, bits) for name in RULE_CASES for bits in RULES[name].state_bits if bits != 32]


def written(arguments):
    lists = [arguments["params"], *arguments["state"].values()]
    return [t for ts in lists for t in ts if t.device.type != "meta" and not t.is_sparse]


def refused(arguments, backend):
    """The refusal of update_, after making sure that it wrote nothing."""
    before = [t.clone() for t in written(arguments)]
    with pytest.raises((ValueError, TypeError)) as caught:
        update_(backend=backend, **arguments)
    after = written(arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return f"{caught.type.__name__}: {caught.value}"


def serving(place, rule):
    return "torch" if place.backend == "native" and rule not in native.RULES_SERVED else place.backend


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("rule", RULE_CASES)
def test_updates_refuse(place, rule, fault):
    arguments = call(rule, place.device)
    backend = serving(place, rule)
    update_(backend=backend, **arguments)  # good, and with a table at these addresses
    BAD[fault](arguments)
    assert refused(arguments, backend) == refused(arguments, "torch")


@pytest.mark.parametrize("fault", BAD_CODES)
@pytest.mark.parametrize(("rule", "bits"), CODED)
def test_coded_updates_refuse(place, rule, bits, fault):
    arguments = call(rule, place.device, coded=bits)
    backend = serving(place, rule)
    update_(backend=backend, **arguments)
    BAD_CODES[fault](arguments)
    assert refused(arguments, backend) == refused(arguments, "torch")


@pytest.mark.parametrize("rule", RULE_CASES)
def test_only_the_rules_own_storage(place, rule):
    """A state dtype or codec that the rule does not name is refused: there a formula loses what it needs."""
    names = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int8: 8}
    for dtype, name in names.items():
        if name in RULE_CASES[rule].STORAGE:
            continue
        for buffer in RULES[rule].state:
            arguments = call(rule, place.device)
            arguments["state"][buffer][0] = arguments["state"][buffer][0].to(dtype)
            assert "expected float32" in refused(arguments, place.backend)
        if dtype == torch.int8:
            assert "no such codes" in refused(call(rule, place.device, coded=True), place.backend)


def test_what_the_refusals_say(place):
    """What was wrong, and what was expected."""

    def message(fault, rule="lion", faults=BAD, coded=False):
        arguments = call(rule, place.device, coded)
        faults[fault](arguments)
        return refused(arguments, place.backend)

    assert "grads[0] has shape (50,)" in message("a shorter gradient")
    assert "expected the shape and device of params[0], (100,)" in message("a shorter gradient")
    assert "rows are 0 to 40; control has 2 rows" in message("row 40 of 2")
    assert "129 codes need scales of shape (3,), got (2,)" in message("too few scales", faults=BAD_CODES, coded=True)
    assert "int8 codes need their scales" in message("int8 without scales")
    assert "lists of one length" in message("too few gradients")
    assert "control is torch.float64" in message("float64 control")
    assert "not contiguous" in message("control with a stride")
    assert f"unknown rule 'sgd'; expected one of {', '.join(RULES)}" in message("an unknown rule")
    assert "lion has no flag amsgrad; it has none" in message("an unknown flag")
    assert "adamw has no flag amsgrad; it has nesterov, decoupled" in message("an unknown flag", "adamw")


def test_the_thin_forms_pass_everything_on(place):
    """lion_update_ and adamw_update_ are update_: the same results, the same refusals."""
    for coded in (False, True):
        one, two = (call("lion", place.device, coded) for _ in range(2))
        for key in ("params", "grads"):
            two[key] = [t.clone() for t in one[key]]
        two["state"] = {name: [t.clone() for t in ts] for name, ts in one["state"].items()}
        one["lr_multipliers"] = two["lr_multipliers"] = torch.tensor([0.3, 2.0], device=place.device)
        update_(backend=place.backend, **one)
        state, _ = two.pop("state"), two.pop("rule")
        params, grads, control = (two.pop(key) for key in ("params", "grads", "control"))
        scales = state.get("exp_avg_scale")
        lion_update_(params, grads, state["exp_avg"], control, exp_avg_scales=scales, backend=place.backend, **two)
        assert all(torch.equal(a, b) for a, b in zip(one["params"], params, strict=True))
        assert all(torch.equal(a, b) for n in state for a, b in zip(one["state"][n], state[n], strict=True))
    one, two = call("adamw", place.device), call("adamw", place.device)
    for flags in ({"nesterov": False, "decoupled": True}, {"nesterov": True, "decoupled": False}):
        for key in ("params", "grads"):
            two[key] = [t.clone() for t in one[key]]
        two["state"] = {name: [t.clone() for t in ts] for name, ts in one["state"].items()}
        update_(backend=place.backend, **one, **flags)
        adamw_update_(
            two["params"], two["grads"], two["state"]["exp_avg"], two["state"]["exp_avg_sq"], two["control"],
            rows=two["rows"], ids=two["ids"], lr_multipliers=two["lr_multipliers"], backend=place.backend, **flags,
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(one["params"], two["params"], strict=True))
    with pytest.raises(ValueError, match="lists of one length"):
        lion_update_(params, grads, state["exp_avg"][:1], control, backend=place.backend)


# -- the other functions -------------------------------------------------------------------------------------


def same_refusal(place, function, *arguments, **named):
    messages = []
    for backend in (place.backend, "torch"):
        with pytest.raises((ValueError, TypeError)) as caught:
            function(*arguments, backend=backend, **named)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    return messages[0]


def test_telemetry_refuses(place):
    ones = torch.ones(2, device=place.device)
    for gamma in (0.5, 4.5, math.nan):
        assert "from 1 to 4" in same_refusal(place, gradient_telemetry, [ones], gamma=gamma)
    assert "no gradients" in same_refusal(place, gradient_telemetry, [])
    for bad in (ones.int(), ones.to(torch.complex64), ones.to_sparse()):
        assert "grads[1] is" in same_refusal(place, gradient_telemetry, [ones, bad])


def test_control_refuses(place):
    device = place.device
    good, control = torch.zeros(4, device=device), new_control(2, device=device)
    one = torch.ones((), device=device)
    before = control.clone()
    bad = [
        ("unknown law 'meta4'", (control, good), {"law": "meta4"}),
        ("expected float32", (control[0], good), {}),
        ("expected float32", (control.double(), good), {}),
        ("expected float32", (control[:, :-1].contiguous(), good), {}),
        ("not contiguous", (control.t().contiguous().t(), good), {}),
        ("not contiguous", (strided(control), good), {}),
        ("telemetry is torch.float32 of shape (5,)", (control, torch.zeros(5, device=device)), {}),
        ("telemetry is torch.float32 of shape (3,)", (control, torch.zeros(3, device=device)), {}),
        ("telemetry is", (control, torch.zeros((1, 1, 4), device=device)), {}),
        ("telemetry is", (control, torch.zeros((), device=device)), {}),
        ("telemetry is torch.float64", (control, good.double()), {}),
        ("log is torch.float32 of shape", (control, good), {"log": torch.zeros((5, 4), device=device)}),
        ("log is not contiguous", (control, good), {"log": torch.zeros((L.NUM_SLOTS, 5), device=device).t()}),
        ("log is on meta", (control, good), {"log": control.to("meta")}),
        ("log has no row", (control, good), {"log": control[:0]}),
        ("telemetry is on meta", (control, good.to("meta")), {}),
        ("loss is on meta", (control, good, one.to("meta")), {}),
        ("expected one real number", (control, good, torch.zeros(2, device=device)), {}),
        ("expected one real number", (control, good, one.to(torch.complex64)), {}),
    ]
    for name in ("found_inf", "grad_scale"):
        bad.append((f"{name} is on meta", (control, good), {name: one.to("meta")}))
        bad.append((f"{name} is", (control, good), {name: torch.ones(3, device=device)}))
    for message, arguments, named in bad:
        assert message in same_refusal(place, control_step, *arguments, **named)
    assert torch.equal(control, before)


def test_refresh_refuses(place):
    control = new_control(2, device=place.device)
    before = control.clone()
    for message, log in (
        ("log is torch.float32 of shape", control[:, :4]),
        ("log is on meta", control.to("meta")),
        ("log has no row", control[:0]),
    ):
        assert message in same_refusal(place, refresh_outputs, control, log=log)
    assert torch.equal(control, before)


def test_a_sign_that_is_only_a_bit_is_refused(place):
    """Where a gradient's negative bit is set, memory holds the other sign."""
    turned = torch._neg_view(torch.ones(100, device=place.device))
    assert "resolve_neg" in same_refusal(place, gradient_telemetry, [turned])
    arguments = call("lion", place.device)
    arguments["grads"][0] = turned
    assert "resolve_neg" in same_refusal(place, update_, **arguments)


def test_codecs_refuse(place):
    x = torch.ones(100, device=place.device)
    assert "floating-point" in same_refusal(place, quantize_blockwise, x.int())
    assert "no codec has 3 bits; expected 8" in same_refusal(place, quantize_blockwise, x, bits=3)
    assert "no codec has 32 bits" in same_refusal(place, quantize_blockwise, x, bits=32)
    for codec in [codec for codec in CODECS.values() if codec.block]:

        def says(*arguments, codec=codec, **named):
            return same_refusal(place, dequantize_blockwise, *arguments, codec=codec.name, **named)

        codes, scales = quantize_blockwise(x, codec=codec.name)
        for bad in (scales[:1], torch.cat([scales, scales]), scales[:, None]):
            assert "need scales of shape (2,)" in says(codes, bad)
        for bad in (scales.float(), scales.half()):
            assert "bfloat16 scales" in says(codes, bad)
        for bad in (codes.int(), x):
            assert f"expected {str(codec.dtype).removeprefix('torch.')}" in says(bad, scales)
        assert "floating-point" in says(codes, scales, torch.int32)
        assert "meta" in says(codes, scales.to("meta"))
        assert "of a tensor of shape (7,)" in says(codes, scales, shape=(7,))


def test_empty_lists_and_tensors(place):
    assert gradient_telemetry([torch.zeros(0, device=place.device)], backend=place.backend).numel() == L.NUM_TELEMETRY
    codes, scales = quantize_blockwise(torch.zeros((0, 3), device=place.device), backend=place.backend)
    assert (codes.shape, scales.shape) == ((0, 3), (0,))
    assert dequantize_blockwise(codes, scales, backend=place.backend).shape == (0, 3)
