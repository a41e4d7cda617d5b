"""CruxyOptimizer under random lives: groups, swaps, copies, state dicts, scalers, closures, threads, bad gradients.

Beside it lives a shadow, made anew at random moments from the optimizer's state dict: both take the same steps and
have to stay the same bits. A step with a non-finite gradient or loss changes nothing, a refused call neither.
"""

import copy
import io
import math
import pickle
import random
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cruxy_triton import CruxyOptimizer

sys.path.insert(0, str(Path(__file__).parent))
from soak_common import Fault, soak

SHAPES = ((3,), (5, 4), (65,), (2, 3, 7), (), (130,), (1,), (0,))
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)


def twin_of(p: Tensor) -> Parameter:
    """A parameter with the same values and strides."""
    return Parameter(torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(p.detach()))


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


class Life:
    """Parameters, an optimizer over them, and what it was made with."""

    def __init__(self, made_with: dict[str, Any], groups: list[dict[str, Any]]) -> None:
        self.made_with = made_with
        self.optimizer = CruxyOptimizer([dict(g, params=list(g["params"])) for g in groups], **made_with)

    @property
    def params(self) -> list[Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def shadow(self, rng: random.Random) -> "Life":
        """Another one with the same values, by way of the state dict."""
        state = self.optimizer.state_dict()
        if rng.random() < 0.5:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=rng.random() < 0.5)
        groups = [{"params": [twin_of(p) for p in g["params"]]} | own(g) for g in self.optimizer.param_groups]
        other = Life(self.made_with, groups)
        other.optimizer.load_state_dict(state)
        return other

    def memory(self) -> list[Tensor]:
        """Everything that a step may change, as copies."""
        kept = [p.detach().clone() for p in self.params]
        for p in self.params:
            state = self.optimizer.state.get(p, {})
            kept += [state[name].clone() for name in sorted(state) if name != "step"]
        return kept


def own(group: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v
        for k, v in group.items()
        if k in ("use_lion", "use_nesterov", "decoupled_weight_decay", "use_gc", "maximize")
    }


class Case:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.done: list[str] = []
        rng = self.rng
        made_with: dict[str, Any] = {
            "mode": rng.choice(("meta3", "meta3", "stability_v2", "stability_v1")), "lr": 10 ** rng.uniform(-4, -1),
            "betas": (0.9, rng.choice((0.99, 0.999))), "weight_decay": rng.choice((0.0, 0.1)),
            "use_lion": rng.random() < 0.5, "meta_interval": rng.choice((1, 3, 10)), "guard": rng.random() < 0.7,
            "bounds": rng.choice(((0.1, 4.0), None)), "history": rng.choice((0, 3, 1000)),
            "backend": rng.choice((None, "torch", "native")), "capturable": rng.random() < 0.2,
            "gamma_norm": rng.choice((1.5, 2.3)), "seed": rng.randrange(1 << 24),
        }  # fmt: skip
        self.coded = made_with["use_lion"] and rng.random() < 0.5
        if self.coded:
            made_with["state_bits"] = 8
        self.narrow = self.coded or made_with["backend"] == "native"  # both have no float64
        self.life = Life(made_with, [self.group() for _ in range(rng.randrange(1, 4))])
        self.other: Life | None = None
        self.taken = self.skipped = 0

    def group(self) -> dict[str, Any]:
        rng = self.rng
        group: dict[str, Any] = {"params": [self.parameter() for _ in range(rng.randrange(1, 4))]}
        for name, value in (
            ("lr", 10 ** rng.uniform(-4, -1)),
            ("weight_decay", 0.05),
            ("maximize", True),
            ("use_gc", True),
        ):
            if rng.random() < 0.25:
                group[name] = value
        return group

    def parameter(self) -> Parameter:
        dtype = self.rng.choice(DTYPES[: 4 if self.narrow else 5])
        values = torch.randn(self.rng.choice(SHAPES), generator=self.generator).to(dtype)
        if values.dim() > 1 and self.rng.random() < 0.3:
            values = values.mT.contiguous().mT
        return Parameter(values)

    # -- what may happen ------------------------------------------------------------------

    def step(self) -> None:
        rng, lives = self.rng, [self.life] + ([self.other] if self.other else [])
        bad = rng.choice(("gradient", "loss", "found_inf")) if rng.random() < 0.12 else None
        size = 10 ** rng.uniform(-3, 1)
        for position, p in enumerate(self.life.params):
            gone = rng.random() < 0.15
            g = (torch.randn(p.shape, generator=self.generator) * size).to(p.dtype)
            if bad == "gradient" and g.numel() and position == 0:
                g.view(-1)[0] = rng.choice((math.nan, math.inf))
            if g.dim() > 1 and rng.random() < 0.2:
                g = g.mT.contiguous().mT
            for life in lives:
                life.params[position].grad = None if gone else g.clone(memory_format=torch.preserve_format)
        grads = [p.grad for p in self.life.params if p.grad is not None]
        really = any(not bool(g.isfinite().all()) for g in grads) or (bad in ("loss", "found_inf") and bool(grads))
        loss: Any = rng.choice((None, 1.5, torch.tensor(1.25), torch.tensor([0.5], dtype=torch.float64)))
        if bad == "loss":
            loss = rng.choice((math.nan, torch.tensor(math.inf)))
        way = rng.choice(("plain", "plain", "closure", "scaler"))
        before = [life.memory() for life in lives] if really else []
        self.done.append(f"step {way} {bad or ''}")
        for life in lives:
            optimizer = life.optimizer
            if way == "closure" and bad != "found_inf":
                optimizer.step(lambda: loss)
            elif way == "scaler" or bad == "found_inf":
                # As torch.amp.GradScaler leaves them for optimizers that unscale by themselves.
                optimizer.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
                optimizer.found_inf = torch.tensor(float(bad == "found_inf"))  # type: ignore[attr-defined]
                optimizer.step(loss=loss)
                del optimizer.grad_scale, optimizer.found_inf
            else:
                optimizer.step(loss=loss)
        if grads:
            self.taken, self.skipped = self.taken + (not really), self.skipped + really
        for life, kept in zip(lives, before, strict=False):
            now = life.memory()
            if len(now) == len(kept) and not all(torch.equal(bits(a), bits(b)) for a, b in zip(kept, now, strict=True)):
                raise Fault("a skipped step changed a parameter or a state")
        metrics = self.life.optimizer.metrics(wait=True)
        counted = (metrics["step"], metrics["skipped_steps"])
        if counted != (self.taken, self.skipped):
            raise Fault(f"(steps, skipped steps) counted are {counted}; expected {(self.taken, self.skipped)}")
        finite = [p for p in self.life.params if not bool(p.isfinite().all())]
        if finite:
            raise Fault("a parameter is not finite any more")
        self.compare()

    def compare(self) -> None:
        if self.other is None:
            return
        a, b = self.life.memory(), self.other.memory()
        if len(a) != len(b):
            raise Fault(f"the shadow keeps {len(b)} tensors, the optimizer {len(a)}")
        count = len(self.life.params)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if not torch.equal(bits(x), bits(y)):
                what = f"parameter {i}" if i < count else "a state"
                off = float((x.double() - y.double()).abs().max())
                raise Fault(f"{what} ({x.dtype}, {tuple(x.shape)}) differs from the shadow's by {off:.3g}")
        mine, its = (life.optimizer.metrics(wait=True) for life in (self.life, self.other))
        for name in mine:
            if repr(mine[name]) != repr(its[name]):
                raise Fault(f"metrics()[{name!r}] is {mine[name]!r}, the shadow's {its[name]!r}")

    def make_shadow(self) -> None:
        self.other = self.life.shadow(self.rng)

    def round_trip(self) -> None:
        self.life.optimizer.load_state_dict(copy.deepcopy(self.life.optimizer.state_dict()))

    def pickle(self) -> None:
        self.life.optimizer = pickle.loads(pickle.dumps(self.life.optimizer))

    def deepcopy(self) -> None:
        old = self.life.optimizer
        self.life.optimizer = copy.deepcopy(old)
        for p in (p for g in old.param_groups for p in g["params"]):
            p.data.zero_()  # what was copied must not look back

    def swap_data(self) -> None:
        for p in self.life.params:
            if self.rng.random() < 0.5:
                p.data = p.data.clone(memory_format=self.rng.choice((torch.preserve_format, torch.contiguous_format)))

    def add_group(self) -> None:
        group = self.group()
        if self.other:
            self.other.optimizer.add_param_group(group | {"params": [twin_of(p) for p in group["params"]]})
        self.life.optimizer.add_param_group(group)

    def drop_group(self) -> None:
        groups = self.life.optimizer.param_groups
        if len(groups) < 2:
            return
        index = self.rng.randrange(len(groups))
        for life in [self.life] + ([self.other] if self.other else []):
            for p in life.optimizer.param_groups.pop(index)["params"]:
                life.optimizer.state.pop(p, None)

    def settings(self) -> None:
        index = self.rng.randrange(len(self.life.optimizer.param_groups))
        name, value = self.rng.choice((("lr", 10 ** self.rng.uniform(-4, -2)), ("weight_decay", 0.02), ("eps", 1e-6)))
        for life in [self.life] + ([self.other] if self.other else []):
            life.optimizer.param_groups[index][name] = value

    def forget(self) -> None:
        """The state of one parameter is cleared, as some libraries do where they replace it."""
        index = self.rng.randrange(len(self.life.params))
        for life in [self.life] + ([self.other] if self.other else []):
            life.optimizer.state.pop(life.params[index], None)

    def look(self) -> None:
        repr(self.life.optimizer)
        rows = self.life.optimizer.history()
        size = self.life.made_with["history"]
        if len(rows) > size:
            raise Fault(f"history() has {len(rows)} rows; {size} were asked for")
        if rows and rows[-1]["step"] != self.taken:
            raise Fault(f"the newest row of history() is of step {rows[-1]['step']}; expected {self.taken}")

    def refused(self) -> None:
        rng, optimizer = self.rng, self.life.optimizer
        state = copy.deepcopy(optimizer.state_dict())
        held = [key for key, value in state["state"].items() if value]

        def add(*values: float, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
            optimizer.add_param_group({"params": [Parameter(torch.tensor(values, dtype=dtype))], **settings})

        def load(**changed: Any) -> None:
            """`changed` replaces entries of one parameter's state; None takes them out."""
            entry = state["state"][rng.choice(held)]
            for name, value in changed.items():
                entry.pop(name, None)
                if value is not None:
                    entry[name] = value
            optimizer.load_state_dict(state)

        def load_control(control: Tensor) -> None:
            state["param_groups"][0]["control"] = control
            optimizer.load_state_dict(state)

        ways: dict[str, Any] = {
            "known parameter": lambda: optimizer.add_param_group({"params": [self.life.params[0]]}),
            "negative lr": lambda: add(1.0, lr=-1.0),
            "betas of 1": lambda: add(1.0, betas=(0.9, 1.0)),
            "complex": lambda: add(1.0, dtype=torch.complex64),
            "fewer groups": lambda: optimizer.load_state_dict(state | {"param_groups": state["param_groups"][1:]}),
            "two numbers as a loss": lambda: optimizer.step(loss=torch.ones(2)),
        }
        if held:
            ways |= {
                "shape": lambda: load(exp_avg=torch.zeros(1999)),
                "no exp_avg": lambda: load(exp_avg=None),
                "foreign key": lambda: load(z=torch.ones(1)),
                "control": lambda: load_control(torch.zeros(3)),
            }
            if self.coded:
                ways["scales"] = lambda: load(exp_avg_scale=torch.zeros(999, dtype=torch.bfloat16))
        way = rng.choice(list(ways))
        for p in self.life.params:  # so that a step has something to refuse
            p.grad = torch.zeros_like(p)
        before, groups = self.life.memory(), len(optimizer.param_groups)
        self.done.append(way)
        try:
            ways[way]()
        except (ValueError, TypeError) as error:
            if len(str(error)) < 10:
                raise Fault(f"{way}: the message is {str(error)!r}") from None
        except Exception as error:
            raise Fault(f"{way}: {type(error).__name__} instead of a refusal: {error}") from error
        else:
            raise Fault(f"{way}: not refused")
        now = self.life.memory()
        same = len(now) == len(before) and all(torch.equal(bits(a), bits(b)) for a, b in zip(before, now, strict=True))
        if not same or len(optimizer.param_groups) != groups:
            raise Fault(f"{way}: refused, but something was changed")

    def threads(self) -> None:
        """Copies of the optimizer in two threads go where they go one after the other."""
        pairs = [[self.life.shadow(self.rng) for _ in range(2)] for _ in range(2)]
        seeds = [self.rng.getrandbits(20) for _ in range(2)]
        errors: list[BaseException] = []

        def work(life: Life, seed: int) -> None:
            try:
                generator = torch.Generator().manual_seed(seed)
                for _ in range(4):
                    for p in life.params:
                        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                    life.optimizer.step(loss=1.0)
            except BaseException as error:
                errors.append(error)

        for life, seed in zip(pairs[0], seeds, strict=True):
            work(life, seed)
        workers = [threading.Thread(target=work, args=pair) for pair in zip(pairs[1], seeds, strict=True)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise Fault(f"in a thread: {type(errors[0]).__name__}: {errors[0]}") from errors[0]
        for a, b in zip(*pairs, strict=True):
            if not all(torch.equal(bits(x), bits(y)) for x, y in zip(a.memory(), b.memory(), strict=True)):
                raise Fault("two threads gave other bits than one after the other")

    def live(self) -> None:
        actions = (
            self.make_shadow, self.round_trip, self.pickle, self.deepcopy, self.swap_data, self.add_group,
            self.drop_group, self.settings, self.forget, self.look, self.refused, self.threads,
        )  # fmt: skip
        for _ in range(self.rng.randrange(5, 40)):
            if self.rng.random() < 0.6:
                self.step()
                continue
            action = self.rng.choice(actions)
            self.done.append(action.__name__)
            action()
            if action.__name__ in ("pickle", "deepcopy", "drop_group", "make_shadow") and self.other is not None:
                self.compare()


def case(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        here = Case(seed)
        try:
            here.live()
        except Exception as error:
            settings = {
                k: v for k, v in here.life.made_with.items() if k in ("mode", "use_lion", "state_bits", "backend")
            }
            kind = "" if isinstance(error, Fault) else f"{type(error).__name__}: "
            raise Fault(f"{kind}{error}\n    with {settings} after {', '.join(here.done[-6:])}") from error


if __name__ == "__main__":
    soak(case)
