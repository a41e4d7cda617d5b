"""BLADE on every backend, against the law of docs/laws.md section 7 in Python floats, and against sums by hand."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from cruxy_kernels import LayerTensors, blade_step, gradient_telemetry, new_blade_state
from cruxy_kernels import layout as L

# Layer, shape and dtype of each tensor; layer 3 has a tensor that is often absent, one tensor is empty.
TENSORS = [
    (0, (7, 9), torch.float32), (2, (50,), torch.float16), (1, (3, 1), torch.float32), (2, (40, 30), torch.bfloat16),
    (0, (5,), torch.float32), (1, (64,), torch.float16), (2, (0,), torch.float32), (3, (200,), torch.float32),
    (3, (300,), torch.float16),
]  # fmt: skip
LAYERS = 4
NUMELS = [math.prod(shape) for _, shape, _ in TENSORS]
STARTS = [sum(NUMELS[j] for j in range(i) if TENSORS[j][0] == TENSORS[i][0]) for i in range(len(TENSORS))]
ELEMENTS = [sum(n for n, (layer, _, _) in zip(NUMELS, TENSORS, strict=True) if layer == i) for i in range(LAYERS)]


def tensors_of(there, device):
    return LayerTensors(
        [TENSORS[i][0] for i in there], [STARTS[i] for i in there], [NUMELS[i] for i in there],
        [TENSORS[i][2].itemsize for i in there], LAYERS, device=device,
    )  # fmt: skip


def hash32(x: int) -> int:
    """lowbias32 on Python's integers."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ x >> 16


def drawn(seed: int, layer: int, number: int, element: int) -> int:
    """31 random bits."""
    key = hash32((number * 0x9E3779B9 + hash32((layer + hash32(seed)) & 0xFFFFFFFF)) & 0xFFFFFFFF)
    return hash32(element ^ hash32(key)) >> 1


class Oracle:
    """The law, one layer after the other."""

    def __init__(self, seed: int = 13) -> None:
        self.seed, self.steps, self.loss, self.entropy = seed, 0, None, None
        self.norm: list = [None] * LAYERS
        self.alignment: list = [None] * LAYERS
        self.samples = [[drawn(seed, i, 0, k) * ELEMENTS[i] >> 31 for k in range(16)] for i in range(LAYERS)]
        self.signs: list[list] = [[None] * 16 for _ in range(LAYERS)]

    def sign(self, layer, sample, grads):
        """True where negative, None where there is no gradient."""
        for i, g in grads.items():
            if TENSORS[i][0] == layer and STARTS[i] <= sample < STARTS[i] + NUMELS[i]:
                return bool(g.reshape(-1)[sample - STARTS[i]] < 0)
        return None

    def step(self, grads, loss, entropy, scale, response):
        self.steps += 1
        scores: list = []
        for layer in range(LAYERS):
            now = [self.sign(layer, sample, grads) for sample in self.samples[layer]]
            pairs = [(a, b) for a, b in zip(now, self.signs[layer], strict=True) if None not in (a, b)]
            aligned = 1 - sum(a != b for a, b in pairs) / len(pairs) if pairs else None
            mine = [g for i, g in grads.items() if TENSORS[i][0] == layer]
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in mine)) / scale
            ratios = [(value / mean) for value, mean in ((loss, self.loss), (entropy, self.entropy))
                      if value is not None and mean is not None]  # fmt: skip
            score = None
            if norm > 0 and self.norm[layer] is not None:
                ratios.append(norm / self.norm[layer])
                score = math.prod(ratios) ** (1 / len(ratios))
                if aligned is not None and self.alignment[layer] is not None:
                    score *= ((1 + aligned) / (1 + self.alignment[layer])) ** -0.5
            scores.append(score)
            if norm > 0:
                self.norm[layer] = self.average(self.norm[layer], norm)
            if aligned is not None:
                self.alignment[layer] = self.average(self.alignment[layer], aligned)
            self.signs[layer] = [a if a is not None else b for a, b in zip(now, self.signs[layer], strict=True)]
            if self.steps % 100 == 0:
                number = self.steps // 100
                one = drawn(self.seed, layer, number, 2) % 16
                two = (one + 1 + drawn(self.seed, layer, number, 3) % 15) % 16
                for place, element in ((one, 0), (two, 1)):
                    sample = drawn(self.seed, layer, number, element) * ELEMENTS[layer] >> 31
                    self.samples[layer][place] = sample
                    self.signs[layer][place] = self.sign(layer, sample, grads)
        self.loss = self.average(self.loss, loss) if loss is not None else self.loss
        self.entropy = self.average(self.entropy, entropy) if entropy is not None else self.entropy
        there = [d for d in scores if d is not None]
        if not there:
            return [1.0] * LAYERS
        middle = statistics.median(there)
        each = [1.0 if d is None else middle * d if response == "paper" else middle / d for d in scores]
        return [min(max(m, 0.3), 1.7) if d is not None else m for m, d in zip(each, scores, strict=True)]

    @staticmethod
    def average(mean, value):
        return value if mean is None else 0.98 * mean + 0.02 * value


def gradients(generator, step, device) -> dict[int, Tensor]:
    found = {}
    for i, (layer, shape, dtype) in enumerate(TENSORS):
        size = (1 + layer) * (8 if step % 7 == layer else 1) * (0 if layer == 1 and step == 1 else 1)
        if (i == 8 and step % 3 == 0) or (layer == 3 and step % 5 == 4):
            continue
        found[i] = (size * (torch.randn(shape, generator=generator) + 0.4)).to(device, dtype)
    return found


@pytest.mark.parametrize(
    ("response", "signals"), [("paper", "loss and entropy"), ("damped", "loss"), ("damped", "late loss")]
)
def test_it_is_the_law(place, response, signals):
    """Spikes, absent tensors and layers, a layer of zeros, skipped steps, a loss scale, two refreshes."""
    generator, oracle = torch.Generator().manual_seed(1), Oracle()
    state = new_blade_state(ELEMENTS, device=place.device)
    seen: set[float] = set()
    steps = 11 if place.backend == "triton" else 215
    for step in range(steps):
        if step == 6:  # shortly before a refresh, for the interpreter too
            oracle.steps = 97
            state.shared[L.SHARED_STEPS] = 97
        grads = gradients(generator, step, place.device)
        tensors = tensors_of(list(grads), place.device)
        loss = None if signals == "late loss" and step < 4 else 2 + math.sin(step)
        entropy = 1.5 + math.cos(step) if signals == "loss and entropy" else None
        given = {"loss": loss, "entropy": entropy, "grad_scale": 8.0}
        given = {k: None if v is None else torch.tensor(v, device=place.device) for k, v in given.items()}
        values = list(grads.values())
        telemetry = gradient_telemetry(values, per_tensor=True, backend=place.backend)
        skip = torch.tensor(float(step in (0, 8)), device=place.device)
        before = {name: tensor.clone() for name, tensor in state.tensors().items()}
        blade_step(state, tensors, telemetry, skip, values, response=response, backend=place.backend, **given)
        if skip:
            assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())
            continue
        wanted = oracle.step(grads, loss, entropy, 8.0, response)
        assert state.multipliers.tolist() == pytest.approx(wanted, rel=2e-4)
        seen.update(round(m, 4) for m in wanted)
        assert tensors.factors.tolist() == [state.multipliers[TENSORS[i][0]].item() for i in grads]
        assert state.index.tolist() == oracle.samples
        signs = [[(s >> k) & 1 if (n >> k) & 1 else None for k in range(16)]
                 for s, n in zip(state.signs.tolist(), state.known.tolist(), strict=True)]  # fmt: skip
        assert signs == oracle.signs
    assert state.averages[:, L.LAYER_NORM].tolist() == pytest.approx(oracle.norm, rel=1e-4)
    assert (state.averages[:, L.LAYER_ALIGNMENT] - 1).tolist() == pytest.approx(oracle.alignment, rel=1e-4)
    assert state.shared[L.SHARED_STEPS] == oracle.steps >= 100
    assert len(seen) > 5


def by_hand(place, norms, signs, response="paper", **given):
    """Multipliers after each step of three layers of 16 elements, each sampled once: norms and negative signs."""
    state = new_blade_state([16] * 3, device=place.device)
    state.index.copy_(torch.arange(16))
    tensors = LayerTensors([0, 1, 2], [0] * 3, [16] * 3, [4] * 3, 3, device=place.device)
    found = []
    for step, (sizes, negative) in enumerate(zip(norms, signs, strict=True)):
        grads = []
        for size, count in zip(sizes, negative, strict=True):
            g = torch.full((16,), size / 4, device=place.device)
            g[:count] *= -1
            grads.append(g)
        values = {name: torch.tensor(value[step], device=place.device) for name, value in given.items()}
        telemetry = gradient_telemetry(grads, per_tensor=True, backend=place.backend)
        skip = torch.zeros((), device=place.device)
        blade_step(state, tensors, telemetry, skip, grads, response=response, backend=place.backend, **values)
        found.append(state.multipliers.tolist())
    return found, state


def test_by_hand(place):
    """Norms 1, then 4, 1, 2 with a loss that goes from 2 to 4: s = sqrt(2 r) = 2.828, 1.414, 2; median 2.

    In the second step no alignment has an average, so c = 1. Paper: 2 d > 1.7 for all. Damped: 2/2.828, 2/1.414, 1.
    """
    norms, signs = [(1, 1, 1), (4, 1, 2)], [(0, 0, 0), (8, 0, 4)]
    found, state = by_hand(place, norms, signs, loss=[2.0, 4.0])
    assert found == [[1, 1, 1], [pytest.approx(1.7)] * 3]
    assert state.shared.tolist() == pytest.approx([0.98 * 2 + 0.02 * 4, 0, 2])
    assert state.averages.flatten().tolist() == pytest.approx([1.06, 1.5, 1.0, 2.0, 1.02, 1.75])
    found, _ = by_hand(place, norms, signs, "damped", loss=[2.0, 4.0])
    assert found[1] == pytest.approx([math.sqrt(0.5), math.sqrt(2), 1], rel=1e-5)
    # With an entropy that halves the cube root of 2 * 0.5 * r is that of r: 1.587, 1, 1.26.
    found, _ = by_hand(place, norms, signs, "damped", loss=[2.0, 4.0], entropy=[3.0, 1.5])
    assert found[1] == pytest.approx([2 ** (-1 / 3), 2 ** (1 / 3), 1], rel=1e-5)
    # The norm alone: r itself.
    found, _ = by_hand(place, [(1, 1, 1), (0.5, 1, 0.8)], signs)
    assert found[1] == pytest.approx([0.4, 0.8, 0.64], rel=1e-5)


def test_alignment_by_hand(place):
    """Norms all at their average: d = c. In the second step 0, 8 and 4 of 16 signs turn, so that the averages of 1 + a
    are 2, 1.5 and 1.75; in the third 8, 8 and 4: c = sqrt(2 / 1.5), 1 and 1. The median is 1."""
    norms, signs = [(1, 1, 1)] * 3, [(0, 0, 0), (0, 8, 4), (8, 0, 0)]
    found, _ = by_hand(place, norms, signs)
    assert found[2] == pytest.approx([math.sqrt(2 / 1.5), 1, 1], rel=1e-5)
    found, _ = by_hand(place, norms, signs, "damped")
    assert found[2] == pytest.approx([math.sqrt(1.5 / 2), 1, 1], rel=1e-5)


def test_even_counts_and_clamps(place):
    """Of two layers the median is the mean; a zero of either sign counts as +; .3 and 1.7 are the ends."""
    state = new_blade_state([4, 4], device=place.device)
    tensors = LayerTensors([0, 1], [0, 0], [4, 4], [4, 4], 2, device=place.device)
    for scale in (1.0, 3.0):
        grads = [torch.tensor([0.0, -0.0, 1.0, -1.0], device=place.device) * f for f in (1.0, scale)]
        telemetry = gradient_telemetry(grads, per_tensor=True, backend=place.backend)
        blade_step(state, tensors, telemetry, torch.zeros(1, device=place.device), grads, backend=place.backend)
    assert state.multipliers.tolist() == pytest.approx([1.7, 2 / 3])  # median 2 over 1 and over 3
    for k in range(16):
        assert [(s >> k) & 1 for s in state.signs.tolist()] == [int(i == 3) for i in state.index[:, k].tolist()]
    grads[1] = grads[1] * 100
    telemetry = gradient_telemetry(grads, per_tensor=True, backend=place.backend)
    blade_step(state, tensors, telemetry, torch.zeros(1, device=place.device), grads, backend=place.backend)
    assert state.multipliers.tolist() == pytest.approx([1.7, 0.5], abs=0.02)
    blade_step(state, tensors, telemetry, torch.zeros(1, device=place.device), grads, response="paper",
               backend=place.backend)  # fmt: skip
    assert state.multipliers.tolist() == pytest.approx([1.7, 1.7])


def test_the_fingerprint_of_32_layers_is_64_bytes():
    state = new_blade_state([1000] * 32)
    sizes = {name: tensor.nbytes for name, tensor in state.tensors().items()}
    assert sizes["signs"] == 64
    assert sizes == {"signs": 64, "known": 64, "index": 4096, "numels": 256, "averages": 256, "shared": 12,
                     "multipliers": 128}  # fmt: skip


def test_samples_reach_all_of_a_large_layer():
    """Beyond 2^32 elements, and as likely everywhere: the mean of 64,000 draws is within 4 deviations of the half."""
    huge = 5 * 2**32 + 12345
    index = new_blade_state([huge] * 4000).index
    assert int(index.max()) < huge
    assert int(index.min()) >= 0
    mean = index.double().mean().item() / huge
    assert abs(mean - 0.5) < 4 / math.sqrt(12 * index.numel())
    assert not torch.equal(index, new_blade_state([huge] * 4000, seed=14).index)


def test_refusals(place):
    state = new_blade_state([4, 4], device=place.device)
    tensors = LayerTensors([0, 1], [0, 0], [4, 4], [4, 4], 2, device=place.device)
    grads = [torch.ones(4, device=place.device)] * 2
    telemetry, skip = torch.ones((2, 4), device=place.device), torch.zeros((), device=place.device)
    before = state.index.clone()
    for words, change in (
        ("unknown response 'loud'", {"response": "loud"}),
        (r"telemetry is torch.float32 of shape \(3, 4\)", {"telemetry": torch.ones(3, 4, device=place.device)}),
        ("the state is of 3 layers", {"state": new_blade_state([4] * 3, device=place.device)}),
        (r"grads have \[4\] elements", {"grads": grads[:1]}),
        ("loss is torch.float32 of shape", {"loss": torch.ones(2, device=place.device)}),
    ):
        arguments = {"state": state, "tensors": tensors, "telemetry": telemetry, "skip": skip, "grads": grads}
        with pytest.raises(ValueError, match=words):
            blade_step(**{**arguments, **change}, backend=place.backend)
    with pytest.raises(TypeError, match=r"grads\[0\] is torch.int64"):
        blade_step(state, tensors, telemetry, skip, [g.long() for g in grads], backend=place.backend)
    assert torch.equal(state.index, before)
    with pytest.raises(ValueError, match="at least one layer, and an element in each"):
        new_blade_state([3, 0])
    with pytest.raises(ValueError, match="layers are 0 to 2; there are 2"):
        LayerTensors([0, 2], [0, 0], [4, 4], [4, 4], 2, device=place.device)
    with pytest.raises(ValueError, match="not lists of one length"):
        LayerTensors([0, 1], [0], [4, 4], [4, 4], 2, device=place.device)
