"""A prepared update is the plain calls: the same bits, whatever gradients it is given next."""

import pytest
import torch
from cases import RULE_CASES

from cruxy_kernels import RULES, PreparedUpdate, control_step, gradient_telemetry, new_control, update_
from cruxy_kernels.backends import native

SHAPES = [(100,), (3, 43), (), (0,), (2100,)]
each_storage = pytest.mark.parametrize(
    ("rule", "kept"), [(name, kept) for name, case in RULE_CASES.items() for kept in case.STORAGE]
)


def make(rule, kept, device, mixed):
    generator = torch.Generator().manual_seed(0)

    def tensors(dtype=torch.float32):
        return [torch.randn(s, generator=generator).to(device, dtype) for s in SHAPES]

    params, state = tensors(), {}
    if mixed:
        params[1], params[4] = params[1].half(), params[4].bfloat16()
    for i, name in enumerate(RULE_CASES[rule].STATE):
        values = [t.abs() for t in tensors()]
        if isinstance(kept, int):
            pairs = [RULES[rule].codecs(kept)[i].encode(t) for t in values]
            state[name], state[name + "_scale"] = [c for c, _ in pairs], [s for _, s in pairs]
        else:
            state[name] = [t.to(getattr(torch, kept)) for t in values]
    return params, state


def gradients(params, seed, offset=0):
    """Gradients at new addresses; with an offset at such that are no multiples of 16 bytes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for p in params:
        buffer = torch.randn(p.numel() + offset, generator=generator).to(p.device, p.dtype)
        found.append(buffer[offset:].view(p.shape))
    return found


@pytest.mark.parametrize("layout", ["plain", "mixed dtypes", "not contiguous"])
@each_storage
def test_it_is_the_plain_calls(place, rule, kept, layout):
    rows, ids = [0, 1, 1, 0, 1], [7, 3, 9, 1, 4]
    multipliers = torch.linspace(0.5, 1.5, len(SHAPES), device=place.device)
    results = []
    for prepared in (True, False):
        params, state = make(rule, kept, place.device, layout == "mixed dtypes")
        if layout == "not contiguous":
            params[1] = params[1].t().contiguous().t()
        control = new_control(2, device=place.device, lr=1e-2, seed=5)
        control[1, 0] = 3e-3
        step = None
        for seed in range(4):
            grads = gradients(params, seed, offset=seed % 2)
            factors = multipliers if seed > 1 else None
            if prepared and step is None:
                step = PreparedUpdate(rule, params, grads, state, 2, rows=rows, ids=ids, backend=place.backend)
                served = place.backend == "triton" or (place.backend == "native" and rule in native.RULES_SERVED)
                assert step.usable == (served and layout != "not contiguous")
                if not step.usable:
                    return
            elif prepared:
                step.set_grads([g.data_ptr() for g in grads])
            if prepared:
                telemetry = step.telemetry(1.5)
            else:
                telemetry = gradient_telemetry(grads, partial=True, backend=place.backend)
            control_step(control, telemetry, torch.tensor(1.0, device=place.device), backend=place.backend)
            if prepared:
                step.update(control, factors)
            else:
                update_(rule, params, grads, state, control, rows=rows, ids=ids, lr_multipliers=factors,
                        backend=place.backend)  # fmt: skip
        results.append([control, *params, *[t for tensors in state.values() for t in tensors]])
    assert not torch.equal(results[0][1], make(rule, kept, place.device, False)[0][0])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(7) if one.is_floating_point() else one,
                           other.nan_to_num(7) if other.is_floating_point() else other)  # fmt: skip


@pytest.mark.parametrize("rule", RULE_CASES)
def test_it_refuses_what_update_refuses(place, rule):
    params, state = make(rule, "float32", place.device, mixed=False)
    grads = gradients(params, 0)
    good = {"rows": [0] * 5, "ids": [0] * 5, "backend": place.backend}
    if not PreparedUpdate(rule, params, grads, state, 1, **good).usable:
        return  # the plain calls serve, and refuse
    for bad in ({"rows": [0, 1, 0, 0, 0]}, {"rows": [0]}, {"ids": [-1] * 5}):
        with pytest.raises(ValueError, match=r"rows|ids"):
            PreparedUpdate(rule, params, grads, state, 1, **{**good, **bad})
    with pytest.raises(ValueError, match=r"grads\[0\] has shape \(50,\)"):
        PreparedUpdate(rule, params, [grads[0][:50], *grads[1:]], state, 1, **good)
    with pytest.raises(ValueError, match="expected lists of one length"):
        PreparedUpdate(rule, params, grads[:2], state, 1, **good)
    with pytest.raises(TypeError, match="has no flag amsgrad"):
        PreparedUpdate(rule, params, grads, state, 1, **good, amsgrad=True)
