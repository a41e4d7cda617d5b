"""The planner's table of optimizers, which knows the codecs without torch, against the codecs."""

import pytest

from cruxy_triton.planner.optimizers import CODECS, SCALE, Optimizer

kernels = pytest.importorskip("cruxy_kernels")


@pytest.mark.parametrize("bits", CODECS)
def test_bytes_of_a_state_are_those_of_its_codec(bits):
    codec, (width, shared) = kernels.CODECS[bits], CODECS[bits]
    assert (8 * width, shared) == (codec.bits, codec.block)
    assert Optimizer(1, bits).bytes_per_parameter == codec.bytes_per_value
    for size in (1, 64, 1000):
        scales = [codec.scale_count(size) * SCALE] if codec.block else []
        assert Optimizer(1, bits).tensors(size) == [size * width, *scales]
        assert codec.scale_dtype is None or codec.scale_dtype.itemsize == SCALE
