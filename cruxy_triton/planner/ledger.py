"""A ledger of device memory, and tensors that have a size and a lifetime but no values.

`footprint.py` writes the training step down once more with these tensors: every operation states what it
allocates, what autograd keeps of it, and what its backward allocates (the rules are PyTorch's own,
`tools/autograd/derivatives.yaml`). A storage is booked when it is made and released when the last reference to
it goes, which in CPython is at once; so local variables of a forward function keep memory alive exactly as they
do in the function they mirror. No torch is imported: a step of a few layers costs milliseconds.

Sizes are bytes; a storage is rounded up to 512 bytes, as CUDA's caching allocator does
(`c10/cuda/CUDACachingAllocator.cpp`, kMinBlockSize).
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ROUND = 512  # bytes: kMinBlockSize of CUDACachingAllocator.cpp


class Ledger:
    """Live bytes in all and by component, the peak of each phase, and (if asked) the stream of events.

    `round_to` is 512 for CUDA and 1 for the CPU, whose allocator counts what was asked for.
    """

    def __init__(self, round_to: int = ROUND, record: bool = False):
        self.round_to = round_to
        self.live = 0
        self.by_component: dict[str, int] = {}
        self.component = "activations"
        self.phase = "load"
        self.phases: dict[str, int] = {}  # phase: peak bytes
        self.parts: dict[str, dict[str, int]] = {}  # phase: bytes by component at that peak
        self.events: list[tuple[int, int]] | None = [] if record else None  # (storage id, +bytes or -bytes)
        self.marks: list[tuple[int, str]] = []  # (number of events so far, phase that begins there)
        self.next_id = 0
        self.sequence = 0
        self.scope = ""
        self.frames: list[_Frame] = []  # checkpointed regions being run for the first time
        self.recomputing: _Frame | None = None
        self.autocast_cache: dict[int, Tensor] | None = None

    def book(self, nbytes: int, component: str) -> int:
        self.live += nbytes
        by = self.by_component
        by[component] = by.get(component, 0) + nbytes
        if self.live > self.phases.get(self.phase, -1):
            self.phases[self.phase] = self.live
            self.parts[self.phase] = dict(by)
        self.next_id += 1
        if self.events is not None:
            self.events.append((self.next_id, nbytes))
        return self.next_id

    def release(self, ident: int, nbytes: int, component: str) -> None:
        self.live -= nbytes
        self.by_component[component] -= nbytes
        if self.events is not None:
            self.events.append((ident, -nbytes))

    def enter(self, phase: str) -> None:
        """Begin a phase; what is live now counts for it from the start."""
        self.phase = phase
        if self.live > self.phases.get(phase, -1):
            self.phases[phase] = self.live
            self.parts[phase] = dict(self.by_component)
        if self.events is not None:
            self.marks.append((len(self.events), phase))

    @contextmanager
    def booked_as(self, component: str) -> Iterator[None]:
        """Storages made inside are booked under `component`."""
        before, self.component = self.component, component
        try:
            yield
        finally:
            self.component = before

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The scope of torch.autocast's cache of converted trainable weights."""
        outer = self.autocast_cache
        if outer is None:
            self.autocast_cache = {}
        try:
            yield
        finally:
            self.autocast_cache = outer

    # -- tensors ---------------------------------------------------------------------------------

    def new(self, n: int, b: int, component: str | None = None) -> Tensor:
        """A tensor of `n` elements of `b` bytes, in a storage of its own."""
        return Tensor(Storage(self, n * b, component or self.component), n, b)

    def parameter(self, n: int, b: int, component: str, trainable: bool) -> Parameter:
        return Parameter(Storage(self, n * b, component), n, b, trainable)

    def buffer(self, nbytes: int, component: str) -> Storage:
        """Bytes held until the returned handle is dropped."""
        return Storage(self, nbytes, component)


class Storage:
    """Bytes on the device. Gone when the last reference to it goes."""

    __slots__ = ("component", "ident", "ledger", "nbytes")

    def __init__(self, ledger: Ledger, nbytes: int, component: str):
        unit = ledger.round_to
        self.nbytes = -(-nbytes // unit) * unit
        self.component = component
        self.ledger = ledger
        self.ident = ledger.book(self.nbytes, component)

    def __del__(self):
        self.ledger.release(self.ident, self.nbytes, self.component)


class Tensor:
    """`n` elements of `b` bytes in `storage`; `node` is what made it, where a gradient flows back."""

    __slots__ = ("b", "n", "node", "storage")

    def __init__(self, storage: Storage, n: int, b: int, node: Node | None = None):
        self.storage = storage
        self.n = n
        self.b = b
        self.node = node

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    def detach(self) -> Tensor:
        return Tensor(self.storage, self.n, self.b)


class Parameter(Tensor):
    """A leaf. `grad` is filled by the backward pass when it is trainable."""

    __slots__ = ("grad", "trainable")

    def __init__(self, storage: Storage, n: int, b: int, trainable: bool):
        super().__init__(storage, n, b)
        self.trainable = trainable
        self.grad: Tensor | None = None

    @property
    def requires_grad(self) -> bool:
        return self.trainable


class Node:
    """One recorded operation: where its gradients go, what it saved, how it computes them."""

    __slots__ = ("component", "edges", "expected", "fn", "saved", "scope", "seq")

    def __init__(self, ledger: Ledger, fn: Callable, edges: list, saved: list, expected: list[tuple[int, int]] | None):
        self.expected: list[tuple[int, int]] = (
            expected or []
        )  # (elements, bytes each) of every gradient, where the engine has to make it so
        self.seq = ledger.sequence
        self.scope = ledger.scope  # where in the model: "layer0" ... "head"
        self.component = ledger.component  # its gradients are booked where its output was
        self.fn = fn
        self.edges = edges
        self.saved = saved


class _StopRecompute(Exception):
    """Everything that the backward pass needs has been recomputed."""


class _Frame:
    """A checkpointed region (torch.utils.checkpoint, use_reentrant=False): what it saved is recomputed on demand."""

    def __init__(self, run: Callable[[], Tensor]):
        self.run = run
        self.count = 0
        self.recomputed: list[Tensor | None] | None = None


class _Held:
    """Stands in for a tensor that a checkpointed region would have saved."""

    __slots__ = ("frame", "index")

    def __init__(self, frame: _Frame, index: int):
        self.frame = frame
        self.index = index


def save(ledger: Ledger, tensor: Tensor) -> object:
    """What autograd keeps of `tensor`: itself, or a promise to recompute it."""
    if ledger.recomputing is not None:
        frame = ledger.recomputing
        assert frame.recomputed is not None
        frame.recomputed.append(tensor.detach())
        if len(frame.recomputed) == frame.count:
            raise _StopRecompute
        return None
    if ledger.frames:
        frame = ledger.frames[-1]
        frame.count += 1
        return _Held(frame, frame.count - 1)
    return tensor.detach() if tensor.node is not None else tensor


def _unpack(ledger: Ledger, held: object) -> Tensor:
    if not isinstance(held, _Held):
        return held  # type: ignore[return-value]
    frame = held.frame
    if frame.recomputed is None:
        frame.recomputed = []
        ledger.recomputing = frame
        ledger.component = "activations"
        try:
            frame.run()
        except _StopRecompute:
            pass
        finally:
            ledger.recomputing = None
    tensor = frame.recomputed[held.index]
    assert tensor is not None, "a saved tensor was taken twice"
    frame.recomputed[held.index] = None
    return tensor


def checkpoint(ledger: Ledger, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """torch.utils.checkpoint(fn, x, use_reentrant=False)."""

    def run() -> Tensor:
        with ledger.autocast():
            return fn(x)

    frame = _Frame(run)
    ledger.frames.append(frame)
    try:
        return fn(x)
    finally:
        ledger.frames.pop()


def record(
    ledger: Ledger,
    out: Tensor,
    inputs: tuple[Tensor | None, ...],
    fn: Callable | None,
    saved: list,
    expected: list[tuple[int, int]] | None = None,
) -> Tensor:
    """Attach a node to `out`; `fn(g, *saved)` returns one gradient (or None) per input. Returns `out`.

    Gradients of another size or dtype than `expected` are summed and cast by the engine afterwards, as torch's
    `validate_outputs` does: the output's gradient lives through that, recomputed saved tensors do not.
    """
    ledger.sequence += 1
    edges = []
    for x in inputs:
        if x is None or not x.requires_grad:
            edges.append(None)
        else:
            edges.append(x if isinstance(x, Parameter) else x.node)
    out.node = Node(ledger, fn or (lambda g: (g,) * len(edges)), edges, saved, expected)
    return out


def _alone(tensor: Tensor) -> bool:
    """Whether the gradient buffer is the only owner (torch adds in place then): one name in the caller's frame,
    one slot in the buffer, the argument here and getrefcount's own argument; one owner of the storage."""
    return sys.getrefcount(tensor) <= 4 and sys.getrefcount(tensor.storage) <= 2


def backward(ledger: Ledger, root: Tensor) -> None:
    """Run the recorded graph back from `root`, newest node first, as torch's engine does.

    Each part of the model is a phase of its own, `backward:<scope>`.
    """
    assert root.node is not None
    buffers: dict[Node, Tensor] = {root.node: ledger.new(root.n, root.b)}
    heap: list[tuple[int, int, Node]] = [(-root.node.seq, 0, root.node)]
    ties = 0
    scope = None
    while heap:
        node = heapq.heappop(heap)[2]
        if node.scope != scope:
            scope = node.scope
            ledger.enter(f"backward:{scope}")
        saved = [_unpack(ledger, held) for held in node.saved]
        ledger.component = node.component
        g = buffers.pop(node)
        grads: list[Tensor | None] = list(node.fn(g, *saved))
        del saved
        for i, size in enumerate(node.expected):
            grad = grads[i]
            if grad is not None and (grad.n, grad.b) != size:
                grads[i] = ledger.new(*size)
            del grad
        del g
        node.saved = []
        for i, edge in enumerate(node.edges):
            grad, grads[i] = grads[i], None
            if edge is None or grad is None:
                continue
            if isinstance(edge, Parameter):
                _accumulate(ledger, edge, grad)
                continue
            old = buffers.get(edge)
            if old is None:
                buffers[edge] = grad
                ties += 1
                heapq.heappush(heap, (-edge.seq, ties, edge))
            elif not _alone(old):
                buffers[edge] = ledger.new(old.n, max(old.b, grad.b))
            del old, grad
    ledger.component = "activations"


def _accumulate(ledger: Ledger, parameter: Parameter, grad: Tensor) -> None:
    """torch's AccumulateGrad: the first gradient is taken over, later ones are added in place."""
    if parameter.grad is None:
        by = ledger.by_component
        by[grad.storage.component] -= grad.storage.nbytes
        by["gradients"] = by.get("gradients", 0) + grad.storage.nbytes
        grad.storage.component = "gradients"
        parameter.grad = grad
