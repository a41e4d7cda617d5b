"""What only the telemetry kernel has: programs that add several chunks, and 64-bit offsets."""

import pytest
import torch

from cruxy_kernels import gradient_telemetry, tables
from cruxy_kernels.launch import launch
from cruxy_kernels.laws import telemetry


def sums(g):
    g = g.double()
    return [g.abs().pow(1.5).sum().item(), g.square().sum().item(), g.abs().max().item(), 0.0]


def test_several_chunks_per_program(device, monkeypatch):
    # 65,537 elements are 65 chunks; with 4 programs each adds 17, and the last fewer.
    monkeypatch.setattr(telemetry, "MAX_PARTIALS", 4)
    grads = [torch.randn(65537, device=device)]
    assert len(gradient_telemetry(grads, partial=True, backend="triton")) == 4
    assert gradient_telemetry(grads, backend="triton").tolist() == pytest.approx(sums(grads[0]), rel=1e-5)


def test_element_offsets_have_64_bits(device):
    """An entry that claims to start 2^33 elements before the data, and a map that asks for the end of it."""
    data = torch.randn(1024, device=device)
    far = 2**33
    entries = torch.zeros((1, tables.COLUMNS), dtype=torch.int64)
    entries[0, tables.GRAD] = data.data_ptr() - 4 * far
    entries[0, tables.NUMEL] = far + 1024
    entries[0, tables.ALIGNED] = int(data.data_ptr() % 16 == 0)
    chunk = torch.tensor([far // tables.CHUNK], dtype=torch.int32, device=device)
    partials = torch.zeros((1, 4), device=device)
    launch(
        telemetry.telemetry_kernel, 1, entries.to(device), torch.zeros_like(chunk), chunk, 1, 1, 1.5, partials, chunk,
        GRAD_TYPE="fp32", GAMMA_IS_1_5=True, BY_TENSOR=False, LINES=tables.CHUNK // 8, LAYOUT=tables.KEY,
    )  # fmt: skip
    assert partials[0].tolist() == pytest.approx(sums(data), rel=1e-5)
