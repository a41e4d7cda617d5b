"""The host's work in a step over the 308 tensors of a LoRA: launches, operators, calls. Timings are in `bench step`."""

import json

import pytest
import torch

from cruxy_triton.bench import cases, census, host
from cruxy_triton.cli import main
from cruxy_triton.optimizer import CruxyOptimizer, MetaLion

# What a step may cost at most; lower them where a step gets cheaper.
KERNELS = {"control_kernel": 1, "telemetry_kernel": 1, "update_kernel": 1}
LAUNCHES = {"same": 0, "every tenth": 8}  # beside those: operators, and the kernel that ends the slow loop
# A hundred on top. Gradient and parameter, and after a checkpoint both moments.
CALLS_PER_TENSOR = {"data_ptr": 2, "is_contiguous": 0}
MOMENTS = 2
PYTHON_CALLS = {"same": 105, "moved": 110, "every tenth": 145}  # for all tensors together
TENSORS = 308


@pytest.fixture(scope="module")
def report():
    return host.run(rounds=1)


@pytest.mark.parametrize(
    ("name", "looked_at"),
    [
        ("cruxy-triton MetaLion", 0),
        ("cruxy-triton meta3 AdamW", 0),
        ("cruxy-triton meta3 AdamW, after a checkpoint", MOMENTS),
    ],
)
def test_work_of_a_step(report, name, looked_at):
    assert report["tensors"] == TENSORS
    work = report["work"][name]
    for kind, limit in PYTHON_CALLS.items():
        launches = work[kind]["launches"]
        assert {kernel: launches[kernel] for kernel in KERNELS} == KERNELS
        if kind in LAUNCHES:
            more = sum(launches.values()) - len(KERNELS) + sum(work[kind]["operators"].values())
            assert more <= LAUNCHES[kind], work[kind]
        for method, calls in CALLS_PER_TENSOR.items():
            assert work[kind][method] <= (calls + looked_at * (method == "data_ptr")) * TENSORS + 100, (kind, method)
        assert work[kind]["python_calls"] <= limit + 2 * looked_at, kind


def test_a_capturable_step_has_its_slow_loop_every_time():
    """A CUDA graph is one step for all: the turn of the slow loop is found on the device."""
    with host.counted_launches() as launches:
        case = host.Case("capturable", lambda p: MetaLion(p, backend="triton", capturable=True), [(4, 8)])
        for _ in range(3):
            work = host.work(case, launches, move=False)
            assert {name: work["launches"][name] for name in KERNELS} == KERNELS
            more = sum(work["launches"].values()) - len(KERNELS) + sum(work["operators"].values())
        assert more == LAUNCHES["every tenth"], work


@pytest.mark.parametrize("make", [MetaLion, CruxyOptimizer])
def test_the_counter_sees_what_is_there(make):
    """A second dtype is a second launch, a gradient that is not contiguous is copied, and nothing is started."""
    with host.counted_launches() as launches:
        case = host.Case("mixed", lambda params: make(params, backend="triton"), [(4, 8), (3,)])
        case.set_grads(0)
        assert host.work(case, launches, move=False)["launches"] == KERNELS
        first = case.params[0]
        first.data = first.data.half()
        first.grad = torch.ones(8, 4, dtype=torch.float16).T
        launches.clear()
        with host.Operators() as operators:
            case.step()
        assert launches == {"control_kernel": 1, "telemetry_kernel": 2, "update_kernel": 2}
        assert operators.counts["clone"] == 2  # the gradient, for telemetry and update
    assert not any(p.any() for p in case.params)


def test_cases_command(monkeypatch, capsys):
    """Every case runs, and takes the same step as in any other loop."""
    for name, case in cases.CASES.items():
        monkeypatch.setitem(cases.CASES, name, case._replace(elements=min(case.elements, 300)))
    assert main(["bench", "step", "--cases", "--rounds", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["case"] for row in report["rows"]] == list(cases.CASES)
    for row in report["rows"]:
        assert row["torch AdamW, ms"] > 0
        assert row["MetaLion x torch"] > 0
    assert main(["bench", "step", "--cases", "--only", "no such thing"]) == 2
    assert "expected a part of one of 3 M, fp32" in capsys.readouterr().err


def test_command(monkeypatch, capsys):
    monkeypatch.setitem(census.CENSUSES, "tiny", lambda: [(8, 64), (64, 8), (3,)])
    assert main(["bench", "step", "--host", "--census", "tiny", "--rounds", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["rows"]][-1].startswith("torch AdamW fused")
    for row in report["rows"]:
        assert 0 < row["least_us"] <= row["median_us"]
        assert 0 < row["moved_least_us"] <= row["moved_median_us"]
