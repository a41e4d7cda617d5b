"""Release under the Trainers of transformers and TRL, and the updates that OneTrainer and sd-scripts make in backward.

The sequences of the last two are those of https://github.com/Nerogar/OneTrainer (GenericTrainer, commit
00f380accc4c66087d76cf81e4873a1f4065635b) and https://github.com/kohya-ss/sd-scripts (SDXL, commit
0010c81a3353b6bb51e698ca649442e730817a8f).
"""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from cruxy_triton import CruxyOptimizer, MetaLion, release, release_gradients

# -- transformers, TRL ------------------------------------------------------------------


@pytest.fixture
def trainer(small_model, tmp_path):
    """trainer(kind, dtype, folder, **arguments) -> (Trainer of a small tied model, released)."""
    transformers = pytest.importorskip("transformers")

    def new(kind="transformers", dtype=torch.float16, folder="out", attach=True, **arguments):
        path = small_model("llama", tie_word_embeddings=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        optimizer = MetaLion(model.parameters(), lr=3e-4, state_bits=4, clip="tensor")
        released = release_gradients(model, optimizer)
        common = {
            "output_dir": str(tmp_path / folder), "per_device_train_batch_size": 4, "max_grad_norm": 0.0,
            "use_cpu": True, "report_to": [], "logging_steps": 1, "disable_tqdm": True, "seed": 3,
            "gradient_checkpointing": True, "learning_rate": 3e-4, "bf16": False, **arguments,
        }  # fmt: skip
        if kind == "trl":
            trl = pytest.importorskip("trl")
            from datasets import Dataset

            data = Dataset.from_list([{"text": f"the number after {i} is {i + 1}"} for i in range(40)])
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            made = trl.SFTTrainer(
                model, trl.SFTConfig(**common, max_length=32), train_dataset=data, processing_class=tokenizer,
                optimizers=(optimizer, None),
            )  # fmt: skip
        else:
            rows = [{"input_ids": torch.arange(12) + i, "labels": torch.arange(12) + i} for i in range(40)]
            made = transformers.Trainer(
                model, transformers.TrainingArguments(**common), train_dataset=rows, optimizers=(optimizer, None)
            )
        if attach:
            released.attach(made)
        return made, released

    return new


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_a_trainer(trainer, kind):
    """Float16 weights, checkpointed layers, a tied table; the loss falls and the law hears of it."""
    made, released = trainer(kind, max_steps=12)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.1
    optimizer = released._optimizer
    assert released.metrics()["loss_scale"] >= 2**10
    assert optimizer.metrics()["loss"] == pytest.approx(losses[-2], 0.05)
    assert all(p.grad is None for p in made.model.parameters())


def test_a_trainer_resumes_with_the_same_bits(trainer):
    whole, _ = trainer(max_steps=6)
    whole.train()
    first, _ = trainer(folder="half", max_steps=6, save_strategy="steps", save_steps=3)
    first.train()
    again, released = trainer(folder="half", max_steps=6)
    again.train(resume_from_checkpoint=first.args.output_dir + "/checkpoint-3")
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert released.metrics()["loss_scale"] > 1


def test_a_trainers_settings_are_checked(trainer):
    for name, value in (("gradient_accumulation_steps", 2), ("max_grad_norm", 1.0)):
        made, released = trainer(attach=False, **{name: value})
        with pytest.raises(ValueError, match=f"the Trainer has {name}={value}; with release set {name}="):
            released.attach(made)
        if name == "max_grad_norm":
            released._passes.scaled = False
            with pytest.raises(RuntimeError, match="clip_grad_norm_ comes"):
                made.train()
    made, _ = trainer(attach=False)
    with pytest.raises(RuntimeError, match=r"released.attach\(trainer\) for a Trainer"):
        made.train()


# -- trainers with hooks of their own ------------------------------------------------------------------


def one_trainer(model, optimizer, schedule, steps):
    handles = []
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter.requires_grad:

                def hook(tensor, group=group, i=i):
                    torch.nn.utils.clip_grad_norm_(tensor, 1e9)
                    optimizer.step_parameter(tensor, group, i)
                    tensor.grad = None

                handles.append(parameter.register_post_accumulate_grad_hook(hook))
    for step in steps:
        model.loss(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()


def one_trainer_with_its_scaler(model, optimizer, schedule, steps):
    """As above; its scaler calls `step_parameter` alone, and nobody `step`."""
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):

            def hook(tensor, group=group, i=i):
                tensor.grad.div_(64.0)
                optimizer.step_parameter(tensor, group, i)
                tensor.grad = None

            parameter.register_post_accumulate_grad_hook(hook)
    for step in steps:
        (64.0 * model.loss(step)).backward()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def sd_scripts(model, optimizer, schedule, steps):
    """Neither `step` nor `zero_grad` is called."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:

                def hook(tensor, group=group):
                    optimizer.step_param(tensor, group)
                    tensor.grad = None

                parameter.register_post_accumulate_grad_hook(hook)
    for step in steps:
        model.loss(step).backward()
        schedule.step()


@pytest.mark.filterwarnings("ignore:Detected call of")  # they call the scheduler without step()
@pytest.mark.parametrize("clip", [None, "tensor"])
@pytest.mark.parametrize("sequence", [one_trainer, one_trainer_with_its_scaler, sd_scripts])
def test_the_calls_of_other_trainers(make, sequence, clip, monkeypatch):
    """The bits of `release_gradients` where each tensor is a layer."""
    by_tensor = lambda model: [(name, [p]) for name, p in model.named_parameters()]  # noqa: E731
    monkeypatch.setattr(release, "layer_groups", by_tensor)

    def new():
        model = make()
        optimizer = CruxyOptimizer(
            [
                {"params": model.layers.parameters(), "lr": 2e-3},
                {"params": [model.embed.weight, *model.norm.parameters()]},
            ],
            lr=5e-3,
            clip=clip,
        )
        assert optimizer.supports_fused_back_pass is True
        return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))

    model, optimizer, schedule = new()
    sequence(model, optimizer, schedule, range(14))
    other, plain, follow = new()
    released = release_gradients(other, plain)
    for step in range(14):
        other.loss(step).backward()
        plain.step()
        follow.step()
    assert released.metrics()["layers"] == 21
    optimizer.state_dict()  # ends the last step, where nobody has
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(optimizer.control.nan_to_num(7), plain.control.nan_to_num(7))
    assert torch.equal(optimizer._release, plain._release)


def test_a_tensor_of_somebody_else(make):
    model, other = make(), make()
    optimizer = CruxyOptimizer(model.parameters())
    p = other.embed.weight
    optimizer.step_parameter(p, optimizer.param_groups[0], 0)  # without a gradient there is nothing to do
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="a tensor or a group of another optimizer"):
        optimizer.step_parameter(p, optimizer.param_groups[0], 0)
    with pytest.raises(ValueError, match="a tensor or a group of another optimizer"):
        optimizer.step_param(p, {"params": [p]})


def test_a_fused_run_resumes(make):
    """sd-scripts saves the optimizer's state between two steps that nobody has ended."""
    model, saved, end = make(), None, None
    for attempt in range(2):
        optimizer = CruxyOptimizer(model.parameters(), lr=1e-2, clip="tensor")
        if attempt:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        schedule = LambdaLR(optimizer, lambda step: 1.0)
        if not attempt:
            sd_scripts(model, optimizer, schedule, range(6))
            state = optimizer.state_dict()
            saved = {n: t.clone() for n, t in model.state_dict().items()}, torch.utils._pytree.tree_map(
                lambda t: t.clone() if isinstance(t, torch.Tensor) else t, state
            )  # fmt: skip
            for step in range(6, 9):
                model.loss(step).backward()
            end = [p.detach().clone() for p in model.parameters()]
            model = make()
        else:
            sd_scripts(model, optimizer, schedule, range(6, 9))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), end, strict=True))
