"""PyTorch's autograd engine on tensors that have a size and a lifetime but no values.

`walk` writes the training step down with them: every operation states what it allocates, what autograd keeps of it,
and what its backward allocates (the rules are PyTorch's own, tools/autograd/derivatives.yaml). A storage is booked
when it is made and released when the last reference to it goes, which in CPython is at once; so local variables of
a forward function keep memory alive exactly as they do in the function they mirror. No torch is imported: a step of
a few layers costs milliseconds.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from cruxy_triton.planner.ledger import Ledger, Storage

Size = tuple[int, int]  # elements, bytes of each


class Tape(Ledger):
    """A ledger on which operations are recorded."""

    def __init__(self, round_to: int = 512, record: bool = False):
        super().__init__(round_to, record)
        self.sequence = 0
        self.scope = ""  # where in the model: "layer0" ... "head"
        self.frames: list[_Frame] = []  # checkpointed regions being run for the first time
        self.recomputing: _Frame | None = None
        self.autocast_cache: dict[int, Tensor] | None = None

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

    def new(self, n: int, b: int, component: str | None = None) -> Tensor:
        """A tensor of `n` elements of `b` bytes, in a storage of its own."""
        return Tensor(Storage(self, n * b, component or self.component), n, b)

    def parameter(self, n: int, b: int, component: str, trainable: bool) -> Parameter:
        return Parameter(Storage(self, n * b, component), n, b, trainable)

    def buffer(self, nbytes: int, component: str) -> Storage:
        """Bytes held until the returned handle is dropped."""
        return Storage(self, nbytes, component)


class Tensor:
    """`n` elements of `b` bytes in `storage`; `node` is what made it, where a gradient flows back.

    `view`: torch has another tensor on the storage, so that nothing is added to it in place.
    """

    __slots__ = ("b", "n", "node", "storage", "view")

    def __init__(self, storage: Storage, n: int, b: int, node: Node | None = None):
        self.storage = storage
        self.n = n
        self.b = b
        self.node = node
        self.view = False

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    def detach(self) -> Tensor:
        return Tensor(self.storage, self.n, self.b)


class Parameter(Tensor):
    """A leaf. `grad` is filled by the backward pass when it is trainable, once as many gradients have come as it has
    `uses` (tied tables have two)."""

    __slots__ = ("grad", "trainable", "uses")

    def __init__(self, storage: Storage, n: int, b: int, trainable: bool):
        super().__init__(storage, n, b)
        self.trainable = trainable
        self.grad: Tensor | None = None
        self.uses = 0

    @property
    def requires_grad(self) -> bool:
        return self.trainable


class Node:
    """One recorded operation: where its gradients go, what it saved, how it computes them.

    Gradients of another size than `expected` are summed and cast by the engine afterwards, as torch's
    `validate_outputs` does: the output's gradient lives through that, recomputed saved tensors do not.
    """

    __slots__ = ("back", "component", "edges", "expected", "saved", "scope", "seq")

    def __init__(self, tape: Tape, back: Callable, edges: list, saved: list, expected: Sequence[Size]):
        tape.sequence += 1
        self.seq = tape.sequence
        self.scope = tape.scope
        self.component = tape.component  # its gradients are booked where its output was
        self.back = back
        self.edges = edges
        self.saved = saved
        self.expected = expected


def operation(
    tape: Tape,
    inputs: tuple[Tensor | None, ...],
    size: Size,
    back: Callable | None = None,
    *,
    keep: Sequence[Tensor] = (),
    keep_out: bool = False,
    also: Sequence[Size] = (),
    expected: Sequence[Size] = (),
    view: bool = False,
    learns: bool = False,
) -> Tensor:
    """The result of one operation, a tensor of `size`; recorded where an input wants a gradient.

    back: from the result's gradient (and what was saved) to one gradient, or None, per input; None where the
    gradient passes through as it is. It must not hold tensors: sizes alone.
    keep: what autograd saves beside the result (`keep_out`) and further results of the sizes in `also`.
    view: the result lies in the first input's storage.
    learns: a gradient is asked for at the result itself.
    """
    learns = learns or any(x is not None and x.requires_grad for x in inputs)
    saved = [save(tape, x) for x in keep] if learns else []
    out = Tensor(inputs[0].storage, *size) if view and inputs[0] is not None else tape.new(*size)
    others = [tape.new(*each) for each in also]
    if learns:
        saved += [save(tape, x) for x in ([out] if keep_out else []) + others]
        edges = [
            None if x is None or not x.requires_grad else x if isinstance(x, Parameter) else x.node for x in inputs
        ]
        if tape.recomputing is None:
            for edge in edges:
                if isinstance(edge, Parameter):
                    edge.uses += 1
        count = len(inputs)
        out.node = Node(tape, back or (lambda g: (g,) * count), edges, saved, expected)
    return out


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


def save(tape: Tape, tensor: Tensor) -> object:
    """What autograd keeps of `tensor`: itself, or a promise to recompute it."""
    if tape.recomputing is not None:
        frame = tape.recomputing
        assert frame.recomputed is not None
        frame.recomputed.append(tensor.detach())
        if len(frame.recomputed) == frame.count:
            raise _StopRecompute
        return None
    if tape.frames:
        frame = tape.frames[-1]
        frame.count += 1
        return _Held(frame, frame.count - 1)
    return tensor.detach() if tensor.node is not None else tensor


def _unpack(tape: Tape, held: object) -> Tensor:
    if not isinstance(held, _Held):
        return held  # type: ignore[return-value]
    frame = held.frame
    if frame.recomputed is None:
        frame.recomputed = []
        tape.recomputing = frame
        tape.component = "activations"
        try:
            frame.run()
        except _StopRecompute:
            pass
        finally:
            tape.recomputing = None
    tensor = frame.recomputed[held.index]
    assert tensor is not None, "a saved tensor was taken twice"
    frame.recomputed[held.index] = None
    return tensor


def checkpoint(tape: Tape, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """torch.utils.checkpoint(fn, x, use_reentrant=False)."""

    def run() -> Tensor:
        with tape.autocast():
            return fn(x)

    tape.frames.append(_Frame(run))
    try:
        return fn(x)
    finally:
        tape.frames.pop()


def _alone(tensor: Tensor) -> bool:
    """Whether the gradient buffer is the only owner (torch adds in place then): one name in the caller's frame,
    one slot in the buffer, the argument here and getrefcount's own argument; one owner of the storage."""
    return not tensor.view and sys.getrefcount(tensor) <= 4 and sys.getrefcount(tensor.storage) <= 2


def backward(tape: Tape, root: Tensor, accumulated: Callable[[Parameter], None] | None = None) -> None:
    """Run the recorded graph back from `root`, newest node first, as torch's engine does.

    Each part of the model is a phase of its own, `backward:<scope>`. `accumulated` is called with each parameter that
    has its gradient whole (torch's register_post_accumulate_grad_hook).
    """
    assert root.node is not None
    buffers: dict[Node | Parameter, Tensor] = {root.node: tape.new(root.n, root.b)}
    heap: list[tuple[int, int, Node]] = [(-root.node.seq, 0, root.node)]
    ties = 0
    scope = None
    while heap:
        node = heapq.heappop(heap)[2]
        if node.scope != scope:
            scope = node.scope
            tape.enter(f"backward:{scope}")
        saved = [_unpack(tape, held) for held in node.saved]
        tape.component = node.component
        g = buffers.pop(node)
        grads: list[Tensor | None] = list(node.back(g, *saved))
        del saved
        for i, size in enumerate(node.expected):
            grad = grads[i]
            if grad is not None and (grad.n, grad.b) != size:
                grads[i] = tape.new(*size)
            del grad
        del g
        node.saved = []
        for i, edge in enumerate(node.edges):
            grad, grads[i] = grads[i], None
            if edge is None or grad is None:
                continue
            old = buffers.get(edge)
            if old is None:
                buffers[edge] = grad
                if isinstance(edge, Node):
                    ties += 1
                    heapq.heappush(heap, (-edge.seq, ties, edge))
            elif not _alone(old):
                buffers[edge] = tape.new(old.n, max(old.b, grad.b))
            del old, grad
            if isinstance(edge, Parameter):
                edge.uses -= 1
                if edge.uses == 0:
                    _accumulate(tape, edge, buffers.pop(edge))
                    if accumulated is not None:
                        accumulated(edge)
    tape.component = "activations"


def _accumulate(tape: Tape, parameter: Parameter, grad: Tensor) -> None:
    """torch's AccumulateGrad: the first gradient is taken over, later ones are added in place."""
    if parameter.grad is None:
        tape.move(grad.storage.nbytes, grad.storage.component, "gradients")
        grad.storage.component = "gradients"
        parameter.grad = grad
