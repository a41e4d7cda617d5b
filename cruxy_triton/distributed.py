"""Statistics that agree on every rank: DTensor parameters (FSDP2, tensor parallel) and losses that differ.

Under DDP every rank holds the same gradients, so only the loss has to be averaged. Under FSDP2 a rank holds
shards: its four telemetry numbers are gathered from the ranks of the mesh in rank order, and `control_step` adds
them in that order, which gives every rank the same bits. Without torch.distributed nothing here costs anything.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_kernels import layout as L
from cruxy_kernels.codec import Codec
from cruxy_kernels.rules import codec_of


def active() -> bool:
    """Whether a process group exists, so that parameters may be DTensors."""
    return dist.is_available() and dist.is_initialized()


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; the tensor itself where it is not a DTensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def local_state(state: dict[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    """This rank's part of a state; of packed codes and of scales, as many as its part of the parameter needs."""
    kept = {name: local(tensor) for name, tensor in state.items()}
    numel = local(param).numel()
    for name in [name for name in kept if name.endswith("_scale")]:
        codes = name.removesuffix("_scale")
        codec = codec_of(codes, kept[codes])
        kept[name] = kept[name][: codec.scale_count(numel)]
        if codec.packed > 1:
            kept[codes] = kept[codes][: -(-numel // codec.packed)]
    return kept


def local_grad(param: Any, grad: Any) -> Tensor:
    """This rank's part of a gradient, laid out as its parameter is."""
    if not is_sharded(grad):
        return grad
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return grad.to_local()


def statistics_key(param: Any) -> Any:
    """Parameters with equal keys share one reduction; None where a rank holds all of the parameter."""
    if not is_sharded(param):
        return None
    sharded = tuple(i for i, placement in enumerate(param.placements) if placement.is_shard())
    return (param.device_mesh, sharded) if sharded else None


def over_mesh(telemetry: Tensor, key: Any) -> Tensor:
    """The telemetry of every rank whose shards make up the parameters of `key`; all get the same.

    (4,) becomes (ranks, 4); per tensor, (n, 4), the ranks' rows are added up, in the order of the ranks.
    """
    mesh, dimensions = key
    every = telemetry[None]
    for dimension in dimensions:
        every = _gathered(every, mesh.get_group(dimension))
    if telemetry.dim() == 1:
        return every
    total = every.sum(0)
    total[:, L.MAX_ABS] = every[:, :, L.MAX_ABS].amax(0)
    return total


def mean_loss(loss: Tensor, group: Any) -> Tensor:
    """The mean over the ranks of `group` ("auto": all of them; None: the loss as it is)."""
    if group is None:
        return loss
    group = None if group == "auto" else group
    if dist.get_world_size(group) == 1:
        return loss
    return _gathered(loss.reshape(1), group).mean()


def _gathered(value: Tensor, group: Any) -> Tensor:
    """The values of all ranks of `group` one below the other, in the order of the ranks."""
    out = value.new_empty((dist.get_world_size(group), *value.shape))
    dist.all_gather(list(out.unbind(0)), value.contiguous(), group=group)
    return out.flatten(0, 1)


def codes_like(param: Any, codec: Codec) -> Tensor:
    """Zero codes of a state buffer for a parameter; a DTensor where the parameter is one."""
    if codec.packed == 1:
        return torch.zeros_like(param, dtype=codec.dtype, memory_format=torch.contiguous_format)
    return _flat_like(param, lambda numel: -(-numel // codec.packed), codec.dtype)


def scales_like(param: Any, codec: Codec) -> Tensor:
    """Zero scales of a coded state buffer for a parameter; a DTensor where the parameter is one."""
    assert codec.scale_dtype is not None
    return _flat_like(param, codec.scale_count, codec.scale_dtype)


def _flat_like(param: Any, count: Callable[[int], int], dtype: torch.dtype) -> Tensor:
    """`count(numel)` zeros. Every rank keeps as many as the one with the largest shard, so that all have the same."""
    if not is_sharded(param):
        return torch.zeros(count(param.numel()), dtype=dtype, device=param.device)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shape = list(param.shape)
    placements = []
    for dimension, placement in enumerate(param.placements):
        if placement.is_shard():
            shape[placement.dim] = -(-shape[placement.dim] // param.device_mesh.size(dimension))
            placements.append(Shard(0))
        else:
            placements.append(Replicate())
    zeros = torch.zeros(count(torch.Size(shape).numel()), dtype=dtype, device=param.to_local().device)
    return DTensor.from_local(zeros, param.device_mesh, placements, run_check=False)
