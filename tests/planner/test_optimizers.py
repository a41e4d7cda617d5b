"""The planner's table of optimizers, which knows the codecs without torch, against the codecs."""

import pytest

from cruxy_triton.planner.optimizers import OPTIMIZERS

kernels = pytest.importorskip("cruxy_kernels")
torch = pytest.importorskip("torch")


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_bytes_of_a_state_are_those_of_its_codecs(optimizer):
    names = {2: "adamw", 1: "lion"}
    if optimizer.moments not in names or optimizer.bits not in kernels.RULES[names[optimizer.moments]].state_bits:
        assert optimizer.moments == 0  # SGD
        return
    codecs = [kernels.CODECS[name] for name in kernels.RULES[names[optimizer.moments]].state_bits[optimizer.bits]]
    assert optimizer.bytes_per_parameter == sum(codec.bytes_per_value for codec in codecs)
    for size in (1, 64, 1000):
        expected = []
        for codec in codecs:
            scales = [codec.scale_count(size) * codec.scale_dtype.itemsize] if codec.block else []
            expected += [-(-size * optimizer.bits // 8), *scales]
        assert optimizer.tensors(size) == expected


def test_bytes_beside_the_state_are_those_of_the_optimizer():
    from cruxy_kernels import layout, tables
    from cruxy_triton import CruxyOptimizer

    optimizer, sizes = OPTIMIZERS["lion-4bit"], (1, 1024, 3000)
    params = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    table = tables.build({tables.PARAM: params})
    of_tensors = 3 * 4 * (layout.NUM_TELEMETRY + layout.NUM_HISTORY)
    launch = [table.chunk_entry.nbytes, table.chunk_index.nbytes, table.entries.nbytes + of_tensors]
    assert optimizer.beside(sizes, "cuda") == launch
    assert optimizer.beside(sizes, "cpu") == [of_tensors]
    assert optimizer.history == [CruxyOptimizer(params)._history._rows.nbytes]
    assert OPTIMIZERS["torch-adamw"].history == OPTIMIZERS["sgd"].beside(sizes, "cuda") == []
