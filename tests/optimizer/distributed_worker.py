"""One of the gloo processes of test_distributed.py: runs every scenario until one fails.

    python distributed_worker.py RANK WORLD_SIZE FOLDER

Writes FOLDER/SCENARIO.RANK when one is through, and ends with the traceback of the first that is not.
"""

import math
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cruxy_kernels import layout
from cruxy_triton import CruxyOptimizer

SETTINGS = {
    "adamw": {"lr": 1e-2},
    "lion": {"lr": 1e-3, "use_lion": True, "betas": (0.9, 0.99)},
    "lion8": {"lr": 1e-3, "use_lion": True, "betas": (0.9, 0.99), "state_bits": 8},
    "adamw8": {"lr": 1e-3, "state_bits": 8},
    "lion4": {"lr": 1e-3, "use_lion": True, "betas": (0.9, 0.99), "state_bits": 4},
    "v1": {"lr": 1e-2, "mode": "stability_v1"},
    "v2": {"lr": 1e-2, "mode": "stability_v2"},
    "clip": {"lr": 1e-2, "clip": "tensor"},
}
layout.TENSOR_CLIP_WARMUP = 5  # so that 30 steps go beyond it


class Model(nn.Module):
    """Odd sizes: 33 rows do not divide by two ranks, and one row leaves the second rank with none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 33), nn.Linear(33, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def batch(step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8 * world, 6, generator=torch.Generator().manual_seed(step))
    part = slice(8 * rank, 8 * rank + 8)
    return x[part], x[part].sin().sum(1, keepdim=True)


def train(model: nn.Module, optimizer: CruxyOptimizer, first: int, last: int, rank: int, world: int) -> None:
    for step in range(first, last):
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


def whole(parameters) -> list[torch.Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in parameters]


def alone(settings: dict, steps: int, world: int) -> tuple[list[torch.Tensor], CruxyOptimizer]:
    """The same run in one process: the whole batch, no communication."""
    model = Model()
    optimizer = CruxyOptimizer(model.parameters(), **settings, process_group=None)
    for step in range(steps):
        x = torch.randn(8 * world, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    return [p.detach() for p in model.parameters()], optimizer


def same_on_all_ranks(tensors: list[torch.Tensor], world: int) -> None:
    for tensor in tensors:
        others = [torch.empty_like(tensor) for _ in range(world)]
        dist.all_gather(others, tensor.contiguous())
        assert all(torch.equal(tensor.nan_to_num(), other.nan_to_num()) for other in others)


def near(got: list[torch.Tensor], expected: list[torch.Tensor], steps: int, settings: dict) -> None:
    """The distributed run sums gradients in another order; Lion may flip a sign of a value near 0.

    Shards of the 8-bit momentum have other blocks than the whole, hence other scales.
    """
    if settings.get("state_bits", 32) != 32:
        difference = sum((a - b).square().sum() for a, b in zip(got, expected, strict=True))
        assert (difference / sum(b.square().sum() for b in expected)).sqrt() < 0.01
        return
    if not settings.get("use_lion"):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        return
    flipped = sum(((a - b).abs() > settings["lr"] / 2).sum().item() for a, b in zip(got, expected, strict=True))
    assert flipped <= 0.02 * steps


def sharded(settings: dict) -> tuple[nn.Module, CruxyOptimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, CruxyOptimizer(model.parameters(), **settings)


# -- scenarios -------------------------------------------------------------------------------------------------


def ddp(rank: int, world: int, folder: Path) -> None:
    for settings in SETTINGS.values():
        model = DistributedDataParallel(Model())
        optimizer = CruxyOptimizer(model.parameters(), **settings)
        train(model, optimizer, 0, 30, rank, world)
        same_on_all_ranks([*whole(model.parameters()), optimizer.control], world)
        expected, single = alone(settings, 30, world)
        near(whole(model.parameters()), expected, 30, settings)
        assert math.isclose(optimizer.metrics()["loss"], single.metrics()["loss"], rel_tol=1e-2)
        assert math.isclose(optimizer.metrics()["lr"], single.metrics()["lr"], rel_tol=1e-3)


def ddp_layers(rank: int, world: int, folder: Path) -> None:
    """Layer-wise control goes by the mean loss and the gradients of all ranks: the same multipliers on each."""
    for kind in ("blade", "sketch_align"):
        model = DistributedDataParallel(Model())
        optimizer = CruxyOptimizer(model.named_parameters(), lr=1e-2, layerwise=kind)
        for step in range(20):
            optimizer.set_entropy(1.0 + rank + step % 2)  # every rank's own
            train(model, optimizer, step, step + 1, rank, world)
        state = [t.double() for t in optimizer.param_groups[0]["layers"].values() if isinstance(t, torch.Tensor)]
        same_on_all_ranks([*whole(model.parameters()), *state], world)
        assert optimizer.param_groups[0]["layers"]["shared"].min() > 0
        assert any(m != 1 for m in optimizer.layer_multipliers().values())


def ddp_bad_steps(rank: int, world: int, folder: Path) -> None:
    """A NaN in one rank's batch or loss skips the step on both."""
    model = DistributedDataParallel(Model())
    optimizer = CruxyOptimizer(model.parameters())
    train(model, optimizer, 0, 5, rank, world)
    before = [p.detach().clone() for p in model.parameters()]
    for bad in ("batch", "loss"):
        x, y = batch(5, rank, world)
        if rank == 1 and bad == "batch":
            x = x * math.nan
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step(loss=math.nan if rank == 1 and bad == "loss" else loss)
        assert optimizer.metrics()["skipped"] == 1
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    train(model, optimizer, 6, 8, rank, world)
    assert not torch.equal(next(model.parameters()), before[0])
    same_on_all_ranks([*whole(model.parameters()), optimizer.control], world)


def fsdp(rank: int, world: int, folder: Path) -> None:
    for settings in SETTINGS.values():
        model, optimizer = sharded(settings)
        train(model, optimizer, 0, 30, rank, world)
        same_on_all_ranks([optimizer.control], world)
        expected, single = alone(settings, 30, world)
        near(whole(model.parameters()), expected, 30, settings)
        for name in ("grad_norm", "gamma_norm", "v_fast", "loss", "lr"):
            assert math.isclose(optimizer.metrics()[name], single.metrics()[name], rel_tol=2e-2), name
        held = sum(s["exp_avg"].to_local().numel() for s in optimizer.state.values())
        total = sum(p.numel() for p in Model().parameters())
        assert held < 0.7 * total, "the state is not sharded"
        if settings.get("clip") == "tensor":  # a tensor's norm is that of all its shards
            histories = [[s["clip"] for s in o.state.values()] for o in (optimizer, single)]
            assert all(one[1] == 5 for one in histories[0])
            torch.testing.assert_close(*map(torch.stack, histories), rtol=2e-2, atol=1e-4)
            same_on_all_ranks(histories[0], world)


def fsdp_bad_steps(rank: int, world: int, folder: Path) -> None:
    """A NaN in one rank's shard of the gradients skips the step on both."""
    for settings in (SETTINGS["adamw"], SETTINGS["lion8"], SETTINGS["lion4"]):
        model, optimizer = sharded(settings)
        train(model, optimizer, 0, 5, rank, world)
        before = [t.clone() for t in whole(model.parameters())]
        x, y = batch(5, rank, world)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if rank == 1:
            model.up.weight.grad.to_local()[0, 0] = math.nan
        optimizer.step(loss=1.0)
        assert optimizer.metrics()["skipped"] == 1
        assert all(torch.equal(p, q) for p, q in zip(whole(model.parameters()), before, strict=True))
        train(model, optimizer, 6, 8, rank, world)
        same_on_all_ranks([optimizer.control], world)


def fsdp_checkpoint(rank: int, world: int, folder: Path) -> None:
    """Through torch.distributed.checkpoint: the resumed run is the same, bit for bit."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    for name in ("adamw", "adamw8", "lion8", "lion4", "clip"):
        model, optimizer = sharded(SETTINGS[name])
        train(model, optimizer, 0, 15, rank, world)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(folder / name))
        train(model, optimizer, 15, 30, rank, world)
        other, resumed = sharded(SETTINGS[name])
        weights, state = get_state_dict(other, resumed)
        target = {"model": weights, "optimizer": state}
        dcp.load(target, checkpoint_id=str(folder / name))
        set_state_dict(other, resumed, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
        assert resumed.metrics()["step"] == 15
        train(other, resumed, 15, 30, rank, world)
        pairs = zip(whole(model.parameters()), whole(other.parameters()), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


SCENARIOS = (ddp, ddp_layers, ddp_bad_steps, fsdp, fsdp_bad_steps, fsdp_checkpoint)


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", FutureWarning)  # a step must not announce the end of what it calls, again and again
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for scenario in SCENARIOS:
        scenario(rank, world, folder)
        (folder / f"{scenario.__name__}.{rank}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
