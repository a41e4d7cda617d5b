"""Several processes for one run, one per device, as torchrun and `accelerate launch` start them.

Every process does the same work on its part of the batches; the first one alone writes and speaks. What must be the
same in all of them is agreed upon here: whether the input is refused, what the card is, when to stop. torch is imported
only where there are several: a command of one process can ask here before anything slow is imported.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from cruxy_triton.errors import UserError

T = TypeVar("T")

# How launchers tell a process that it is one of several (torchrun and accelerate, Open MPI, MPICH, MVAPICH).
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # which torchrun and `accelerate launch` set
ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
           "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config"}  # fmt: skip


class Elsewhere(UserError):
    """Input that is refused in all processes; the first one says so."""


@dataclass(frozen=True)
class Processes:
    """Those of one run: how many, which of them this is, and how many there are on this machine."""

    count: int = 1
    rank: int = 0
    local: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order, in each of them."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Returns when every process is here."""
        self.gather(None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """For work that may refuse the input, and waits for no other process: a UserError of one is one of all."""
        error = None
        try:
            yield
        except UserError as refused:
            error = refused
        found = [(rank, text) for rank, text in enumerate(self.gather(None if error is None else str(error))) if text]
        if not found:
            return
        rank, text = found[0]
        if error is not None and self.first:
            raise error
        raise UserError(f"process {rank}: {text}") if self.first else Elsewhere(text)

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, which alone does it; a UserError of it is one of all."""
        if self.count == 1:
            return work()
        import torch.distributed as dist

        found: list[Any] = [None, None]
        error = None
        if self.first:
            try:
                found[0] = work()
            except UserError as refused:
                error = refused
                found[1] = str(error)
        dist.broadcast_object_list(found, src=0)
        if error is not None:
            raise error
        if found[1] is not None:
            raise Elsewhere(found[1])
        return found[0]


def _one_of() -> tuple[str, int]:
    """The variable that says how many processes there are, and what it says."""
    for name in COUNTS:
        if os.environ.get(name, "1") not in ("", "0", "1"):
            return name, int(os.environ[name])
    return "", 1


def start(device: str) -> Processes:
    """Joins the processes of this run, on `device` ("auto", "cpu" or "cuda"); once, a second call answers the same.

    Raises UserError for a launch that sets up something else than one process per device with the whole model on each.
    """
    name, count = _one_of()
    if count == 1:
        return Processes()
    import torch
    import torch.distributed as dist

    if missing := [needed for needed in NEEDED if needed not in os.environ]:
        raise UserError(
            f"this is one of {count} processes ({name} is set), but {missing[0]} is not; start them with "
            "`torchrun --nproc-per-node N -m cruxy_triton finetune ...`, or so with `accelerate launch`"
        )
    for variable, engine in ENGINES.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise UserError(
                f"{engine} is asked for ({variable} is set), and a run keeps the whole model on each device (DDP); "
                "leave it out of the launch, and where the model does not fit give --load-in-4bit or a smaller one"
            )
    local_rank, local = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", count))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda and local > torch.cuda.device_count():
        raise UserError(
            f"{local} processes were started on a machine with {torch.cuda.device_count()} GPUs; start one per GPU"
        )
    if cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return Processes(dist.get_world_size(), dist.get_rank(), local)


def lost(error: RuntimeError) -> bool:
    """Whether this is the failure of a connection, as where another process has ended."""
    import torch.distributed as dist

    text = str(error)
    named = "gloo" in text or "NCCL" in text or "closed by peer" in text
    return dist.is_available() and dist.is_initialized() and (named or isinstance(error, dist.DistError))


def leave() -> None:
    """Takes leave of the other processes, where there are any."""
    if _one_of()[1] == 1:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group()
