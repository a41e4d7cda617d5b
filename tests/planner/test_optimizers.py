"""The planner's table of optimizers, which knows the codecs without torch, against the codecs."""

import pytest

from cruxy_triton.planner.optimizers import CODECS, Optimizer

kernels = pytest.importorskip("cruxy_kernels")


@pytest.mark.parametrize("bits", CODECS)
def test_bytes_of_a_state_are_those_of_its_codec(bits):
    codec, optimizer = kernels.CODECS[bits], Optimizer(1, bits)
    assert optimizer.bytes_per_parameter == codec.bytes_per_value
    for size in (1, 64, 1000):
        scales = [codec.scale_count(size) * codec.scale_dtype.itemsize] if codec.block else []
        assert optimizer.tensors(size) == [-(-size * bits // 8), *scales]
