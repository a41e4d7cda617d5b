"""One of the gloo processes of test_distributed.py: python distributed_worker.py RANK WORLD_SIZE FOLDER."""

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cruxy_triton.guard import Policy, TrainingGuard

torch.set_num_threads(1)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 1))


def train(net: nn.Module, guard: TrainingGuard, steps: int, rank: int, fault=None) -> list[str]:
    seen = []
    for step in range(steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(2 * step + rank))
        guard.optimizer.zero_grad()
        loss = (net(x) - x.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        observed = loss.detach()
        if fault is not None:
            observed = fault(step, rank, net, observed)
        guard.observe(observed, batch=step)
        guard.optimizer.step()
        seen.append(f"{guard.regime.value} {guard.lr_factor!r} {guard.metrics.get('loss')!r}")
    return seen


def agree(net: nn.Module, guard: TrainingGuard, seen: list[str], world: int) -> None:
    """Parameters, decisions and events are the same on every rank."""
    mine = [seen, [(e.step, e.kind, e.layer) for e in guard.log]]
    everybody = [None] * world
    dist.all_gather_object(everybody, mine)
    assert all(other == everybody[0] for other in everybody)
    for p in net.parameters():
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
        others = [torch.empty_like(whole) for _ in range(world)]
        dist.all_gather(others, whole.contiguous())
        assert all(torch.equal(others[0], other) for other in others)
        assert bool(torch.isfinite(whole).all())


def nan_loss(step, rank, net, loss):
    return loss * math.nan if step == 12 and rank == 1 else loss


def rising_loss(step, rank, net, loss):
    return loss + 50.0 if step >= 30 and rank == 1 else loss


def broken_parameter(step, rank, net, loss):
    if step == 45:
        with torch.no_grad():
            next(iter(net.parameters())).view(-1)[0] = math.nan
    return loss


def ddp(rank: int, world: int, folder: Path) -> None:
    for fault, kind in ((nan_loss, "skip"), (rising_loss, "rollback"), (broken_parameter, "rollback")):
        net = DistributedDataParallel(model())
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        file = folder / f"{fault.__name__}.jsonl"
        guard = TrainingGuard(optimizer, net, Policy(snapshot_interval=20, snapshot_confirm=5), events=file)
        seen = train(net, guard, 70, rank, fault)
        assert kind in [event.kind for event in guard.log], guard.summary()
        agree(net, guard, seen, world)
        dist.barrier()
        # One rank writes the events.
        assert len(file.read_text().splitlines()) == len(guard.log)


def fsdp(rank: int, world: int, folder: Path) -> None:
    """Sharded norms, ratios and losses are those of the whole: as in one process with both halves of the batch."""
    from torch.distributed.fsdp import fully_shard

    def whole_run() -> tuple[TrainingGuard, list[float]]:
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        guard = TrainingGuard(optimizer, net, process_group=None)
        norms = []
        for step in range(25):
            x = torch.cat([torch.randn(8, 6, generator=torch.Generator().manual_seed(2 * step + r)) for r in range(2)])
            optimizer.zero_grad()
            loss = (net(x) - x.sin().sum(1, keepdim=True)).square().mean()
            loss.backward()
            guard.observe(loss)
            optimizer.step()
            norms.append(guard.metrics.get("grad_norm", 0.0))
        guard.finish()
        return guard, norms

    alone, _ = whole_run()
    net = model()
    fully_shard(net[0])
    fully_shard(net)
    guard = TrainingGuard(torch.optim.AdamW(net.parameters(), lr=3e-3), net)
    seen = train(net, guard, 25, rank)
    guard.finish()
    agree(net, guard, seen, world)
    for name in ("loss", "grad_norm"):
        assert math.isclose(guard.metrics[name], alone.metrics[name], rel_tol=1e-3), name
    mine, theirs = guard._telemetry, alone._telemetry
    assert mine is not None
    assert theirs is not None
    torch.testing.assert_close(mine.state[0], theirs.state[0], rtol=1e-2, atol=1e-2)


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for scenario in (ddp, fsdp):
        scenario(rank, world, folder)
        (folder / f"{scenario.__name__}.{rank}").write_text(json.dumps("done"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
