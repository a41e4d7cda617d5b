"""Trainers that make any optimizer themselves: each call as their public code does it, with the words of our page."""

import ast
import copy
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cruxy_triton import CruxyOptimizer

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
    return (net(x) - x.sin().sum(1, keepdim=True)).square().mean()


def groups(net: Any) -> list[dict[str, Any]]:
    """As both make them: each part with a rate of its own, and names for their logs."""
    return [{"params": list(net[0].parameters()), "lr": 1e-2, "initial_lr": 1e-2, "name": "text encoder"},
            {"params": list(net[2].parameters()), "lr": 2e-2, "initial_lr": 2e-2, "name": "unet"}]  # fmt: skip


def made_by_sd_scripts(optimizer_type: str, optimizer_args: list[str], params: Any, lr: float) -> Any:
    """What `get_optimizer` of kohya-ss/sd-scripts does with a name that it does not know (`library.train_util`)."""
    keywords = {}
    for word in optimizer_args:
        key, value = word.split("=")
        keywords[key] = ast.literal_eval(value)
    *path, name = optimizer_type.split(".")
    return getattr(importlib.import_module(".".join(path)), name)(params, lr=lr, **keywords)


def words_for_sd_scripts() -> tuple[str, list[str], float]:
    (line,) = re.findall(r"^accelerate launch train_network\.py (.*)$", PAGE, re.MULTILINE)
    words = shlex.split(line)
    start = words.index("--optimizer_args") + 1
    end = next(i for i in range(start, len(words)) if words[i].startswith("--"))
    options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    return options["--optimizer_type"], words[start:end], float(options["--max_grad_norm"])


@pytest.mark.filterwarnings("ignore:CruxyOptimizer.*gets no loss")
def test_sd_scripts(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    kind, words, max_grad_norm = words_for_sd_scripts()

    def prepared() -> tuple[nn.Module, Any, Any]:
        net = model()
        optimizer = made_by_sd_scripts(kind, words, groups(net), 1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 100))
        return accelerator.prepare(net, optimizer, schedule)

    def train(net: nn.Module, optimizer: Any, schedule: Any, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            with accelerator.accumulate(net):
                loss = loss_of(net, step)
                accelerator.backward(loss)
                if accelerator.sync_gradients and max_grad_norm != 0.0:
                    accelerator.clip_grad_norm_(net.parameters(), max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    run = prepared()
    cruxy = run[1].optimizer
    assert type(cruxy) is CruxyOptimizer
    assert (cruxy.param_groups[0]["rule"], cruxy.state_bits) == ("lion", 8)
    losses = train(*run, 0, 100)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    accelerator.save_state(str(tmp_path))  # --save_state
    further = train(*run, 100, 140)
    accelerator.load_state(str(tmp_path))
    assert train(*run, 100, 140) == further


def made_by_onetrainer(parameters: list[dict[str, Any]], learning_rate: float) -> Any:
    """The lines of our page where `create_optimizer` of Nerogar/OneTrainer has an entry (`modules.util.create`)."""
    entry = PAGE.partition("## OneTrainer")[2]
    (lines,) = re.findall(r"```python\n(.*?)```", entry, re.DOTALL)
    config = type("TrainConfig", (), {"learning_rate": learning_rate})()
    names = {"parameters": parameters, "config": config}
    exec(lines, names)
    return names["optimizer"]


@pytest.mark.filterwarnings("ignore:CruxyOptimizer.*gets no loss")
def test_onetrainer():
    """A step under a GradScaler, and its backups: the groups' names and rates are its own, its keys in the state."""
    net = model()
    optimizer = made_by_onetrainer(groups(net), 1e-3)
    assert type(optimizer) is CruxyOptimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def train(first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            loss = loss_of(net, step)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    losses = train(0, 100)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    saved = {**copy.deepcopy(optimizer.state_dict()), "param_group_mapping": ["text encoder", "unet"]}
    saved["param_group_optimizer_mapping"] = ["LION", "LION"]
    weights = copy.deepcopy(net.state_dict())
    further = train(100, 140)
    net.load_state_dict(weights)
    optimizer = made_by_onetrainer(groups(net), 1e-3)
    optimizer.load_state_dict(saved)
    assert [group["name"] for group in optimizer.param_groups] == ["text encoder", "unet"]
    assert train(100, 140) == further


def test_a_word_that_the_optimizer_does_not_have_is_named():
    with pytest.raises(TypeError, match="fused"):
        made_by_sd_scripts("cruxy_triton.CruxyOptimizer", ["fused=True"], model().parameters(), 1e-3)
