"""What comes around a run: settings from a file, a look before it, evaluations during it, a rate that it finds."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cruxy_triton import cli, settings
from cruxy_triton.cli import finetune as command_module
from cruxy_triton.cli.arguments import Parser
from cruxy_triton.cli.config import with_file
from cruxy_triton.cli.finetune import configure
from cruxy_triton.errors import UserError
from cruxy_triton.finetune import data, preview, run
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe

# -- --config ------------------------------------------------------------------------------------------


def parsed(*words: str) -> Any:
    """The namespace of a command line of finetune, as `run` sees it."""
    args = cli.build_parser("finetune").parse_args(["finetune", *words])
    parser = Parser(prog="cruxy-triton finetune")
    configure(parser)
    if args.config is not None:
        with_file(args, parser)
    return args


def from_file(tmp_path: Path, text: str, *words: str) -> Any:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    return parsed("--config", str(tmp_path / "run.yaml"), *words)


def test_every_option_may_stand_in_a_file_and_means_what_it_means_when_typed(tmp_path: Path) -> None:
    parser = Parser()
    configure(parser)
    examples = {"text": "some words", "switch": "", "int": "8", "float": "0.25", "size": "3GiB", "names": "a,b"}
    examples["pattern"] = "a=2,b=3"
    tried = 0
    for action in parser._actions:
        flag = next((f for f in action.option_strings if not f.startswith("--no-")), None)
        if flag in (None, "--help", "-h", "--config"):
            continue
        setting = getattr(action, "setting", None)
        choices: Any = action.choices if setting is None else setting.choices
        value = str(choices[-1]) if choices else examples["text" if setting is None else setting.kind]
        key = flag[2:].replace("-", "_")
        if action.nargs == 0:
            for text, word in (("true", flag), ("false", f"--no-{flag[2:]}")):
                typed = parsed(*([word] if text == "true" or word in action.option_strings else []))
                found = from_file(tmp_path, f"{key}: {text}\n")
                assert {**vars(found), "config": None} == vars(typed), key
        else:
            assert {**vars(from_file(tmp_path, f"{key}: {value}\n")), "config": None} == vars(parsed(flag, value)), key
        tried += 1
    assert tried > 50
    text = "model: ./m\ntarget-modules: [q_proj, v_proj]\nvram_bytes: 4GiB\nrank_pattern:\n  q_proj: 8\n"
    assert from_file(tmp_path, text).given == {
        "rank_pattern": ["q_proj=8"], "model": "./m", "target_modules": ["q_proj", "v_proj"], "vram_bytes": 2**32,
    }  # fmt: skip


def test_what_is_typed_wins_and_words_are_taken_as_they_stand(tmp_path: Path) -> None:
    text = "lr: 2e-4\nrevision: 1.10\nsplit: no\nseed:\nmax_steps: ~\nsubset: 2026-01-31\ndemo: true\nplan: a.json\n"
    found = from_file(tmp_path, text, "--lr", "1e-3", "--plan", "b.json")
    assert found.given == {"lr": 1e-3, "revision": "1.10", "split": "no", "subset": "2026-01-31"}
    assert (found.demo, found.plan) == ("smollm2", "b.json")
    assert from_file(tmp_path, "learning_rate: auto\n").given == {"lr": "auto"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1\n", "unknown key learning_rat; did you mean learning_rate?"),
        ("zzz: 1\n", "unknown key zzz; expected the options of --help, without dashes"),
        ("lr: fast\n", "--lr is 'fast'; expected a finite number of at least 0 or auto"),
        ("lr: 1\nlearning_rate: 1\n", "--lr is given twice"),
        ("lr: 1\nlr: 2\n", "lr is set twice"),
        ("merge: maybe\n", "merge is 'maybe'; expected true or false"),
        ("load_in_4bit: 4\n", "load_in_4bit is '4'; expected true or false"),
        ("- lr\n", "holds no settings"),
        ("", "holds no settings"),
        ("lr: [1\n", "is not YAML (line 2"),
        ("config: other.yaml\n", "unknown key config"),
        ("optimizer: adamm\n", "did you mean adamw?"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        from_file(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'run.yaml'}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read \(No such file"):
        parsed("--config", str(tmp_path / "none.yaml"))


# -- --dry-run -----------------------------------------------------------------------------------------


def test_a_dry_run_as_a_process_shows_and_writes_nothing(command, small_model, sums: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {small_model(chat=True)}\ndata: {sums}\nmax_seq_length: 40\nbatch_size: 2\n")
    before = sorted(tmp_path.rglob("*"))
    done = command("finetune", "--config", config, "--dry-run", "--json", "--batch-size", "4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sorted(tmp_path.rglob("*")) == before
    assert found["first"][0] == "<|user|>What is 2 plus 3?<|end|><|assistant|>[[2 + 3 = 5<|end|>]]"
    assert (found["batch_size"], found["steps"]) == (4, 24)
    assert found["recipe"]["batch_size"] == 4
    assert "plan: 40 tokens" in done.stderr
    assert "dry run: nothing was loaded, trained or written" in done.stderr


@pytest.mark.parametrize("packed", [False, True])
def test_the_preview_is_what_the_trainer_feeds(packed: bool, small_model, sums: Path, tmp_path: Path) -> None:
    """First sequences, their number, the tokens trained on and the steps are those of the trainer itself."""
    from trl import SFTConfig, SFTTrainer

    source = sums
    if packed:
        source = tmp_path / "text.txt"
        source.write_text("\n".join(f"line {i} of a text" for i in range(120)))
    folder = small_model()
    settings = {"max_seq_length": 32, "batch_size": 6, "micro_batch_size": 2, "epochs": 1.5, "sample_tokens": 4}
    recipe = Recipe(model=str(folder), data=str(source), output=str(tmp_path / "run"), max_eval_samples=4, **settings)
    found = run.dry_run(recipe, RunFolder(recipe.output), run.Hooks())

    kept: list[Any] = []
    real = SFTTrainer.__init__

    def watch(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        kept.append(self)

    monkey = pytest.MonkeyPatch()
    monkey.setattr(SFTTrainer, "__init__", watch)
    try:
        result = run.finetune(recipe, RunFolder(recipe.output), run.Hooks())
    finally:
        monkey.undo()
    trainer = kept[0]
    assert isinstance(trainer.args, SFTConfig)
    assert found["steps"] == result.step
    assert found["sequences"] == len(trainer.train_dataset)
    tokenizer = trainer.processing_class
    for text, row in zip(found["first"], trainer.train_dataset, strict=False):
        assert text.replace("[[", "").replace("]]", "") == tokenizer.decode(row["input_ids"])
        learned = [i for i, label in zip(row["input_ids"][1:], row["labels"][1:], strict=True) if label != -100]
        assert text.partition("[[")[2].removesuffix("]]") == tokenizer.decode(learned)
    trained = sum(label != -100 for row in trainer.train_dataset for label in row["labels"][1:])
    assert found["training"]["trained_tokens"] == trained
    assert found["held_out"]["trained_tokens"] == result.before["tokens"]


def test_long_and_hostile_text_is_shown_short_and_harmless(small_model) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model())
    ids = tokenizer("\x1b[2Jsay " + "word " * 2000)["input_ids"]
    row = data._row(torch.tensor(ids, dtype=torch.int32).numpy(), 1)
    text = preview.shown(row, tokenizer)
    assert "\x1b" not in text
    assert "characters ...]" in text
    assert len(text) < 2 * preview.LONGEST_TEXT


def test_records_that_are_cut_and_left_out_are_counted(small_model, tmp_path: Path) -> None:
    lines = [{"prompt": "a b c", "completion": " d" * n} for n in (1, 2, 60, 70)] * 3
    lines += [{"prompt": "x " * 90, "completion": "y"}] * 2
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "e.jsonl").write_text(json.dumps({"prompt": "e f", "completion": " g"}))
    recipe = Recipe(
        model=str(small_model()), data=str(tmp_path / "d.jsonl"), eval_data=str(tmp_path / "e.jsonl"),
        output=str(tmp_path / "run"), max_seq_length=32,
    )  # fmt: skip
    found = run.dry_run(recipe, RunFolder(recipe.output), run.Hooks())
    assert (found["training"]["records"], found["training"]["cut"], found["training"]["left_out"]) == (12, 6, 2)
    assert found["training"]["lengths"]["longest"] == 32
    with pytest.raises(UserError, match="leave out --resume"):
        command_module.run(parsed("--dry-run", "--resume", "--output", "x"))


# -- evaluations during the run --------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing of the run catches it."""


@pytest.fixture
def train(tmp_path: Path, small_model, sums: Path) -> Any:
    """train(output, **settings) -> (result, run.json, rows of metrics, lines said): a few steps of a small Llama."""

    def go(output: str, *, resume: bool = False, **settings: Any) -> Any:
        said: list[str] = []
        folder = RunFolder(tmp_path / output, resume=resume)
        if resume:
            recipe = run.resume_recipe(folder, settings)
        else:
            few = {
                "max_steps": 6, "batch_size": 2, "micro_batch_size": 1, "max_seq_length": 64, "max_eval_samples": 6,
                "save_steps": 2, "sample_tokens": 0, "lr": 0.01, "lora_dropout": 0.1, "lora_r": 4,
            }  # fmt: skip
            model = {"model": str(small_model()), "data": str(sums), "output": str(folder.path)}
            recipe = Recipe(**{**model, **few, **settings})
        result = run.finetune(recipe, folder, run.Hooks(say=said.append))
        record = json.loads((folder.path / "run.json").read_text())
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in folder.read_metrics()]
        return result, record, rows, said

    return go


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def held_out(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def test_evaluating_changes_nothing_in_the_training(train, tmp_path: Path) -> None:
    plain = train("plain")
    watched = train("watched", eval_steps=2, load_best_model_at_end=False)
    assert [r for r in watched[2] if "loss" in r] == [r for r in plain[2] if "loss" in r]
    assert same(tmp_path / "plain", tmp_path / "watched")
    assert list(held_out(watched[2])) == [0, 2, 4, 6]
    assert held_out(watched[2])[6] == held_out(plain[2])[6]


@pytest.fixture
def ruin(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run that leaves its held-out records behind after the first step: they are of another kind."""
    words = ("help", "argument", "option", "action", "usage", "dest")
    lines = [{"question": f"Is {w} there?", "answer": f"The {w} parser = {w} prints it"} for w in words]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {
        "lr": 0.3, "lr_schedule": "constant", "optimizer": "adamw", "guard": "off", "lora_dropout": 0.0,
        "eval_data": str(tmp_path / "other.jsonl"),
    }  # fmt: skip


def test_the_adapter_is_that_of_the_lowest_held_out_loss(train, ruin, tmp_path: Path) -> None:
    """Its weights are those of a run that ends there."""
    result, record, rows, said = train("run", eval_steps=1, **ruin)
    losses = {step: loss for step, loss in held_out(rows).items() if step}
    best = min(losses, key=lambda step: losses[step])
    assert best < 6, "the last evaluation is the best: this test shows nothing"
    found = {"step": best, "loss": losses[best], "count": 6, "since": 6 - best, "stopped": False}
    assert record["result"]["best"] == found
    assert record["result"]["after"]["loss"] == pytest.approx(losses[best], abs=1e-6)
    assert result.step == 6
    train("short", max_steps=best, **ruin)
    assert same(tmp_path / "run", tmp_path / "short")
    train("last", **ruin)
    assert not same(tmp_path / "run", tmp_path / "last")
    assert f"The adapter is that of step {best}" in (tmp_path / "run" / "report.md").read_text()
    assert any(line.startswith(f"taking the adapter of step {best}") for line in said)
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_a_run_stops_early_and_resumes_as_if_it_had_not_been_killed(train, ruin, tmp_path: Path, monkeypatch) -> None:
    from cruxy_triton.finetune import report
    from cruxy_triton.finetune.train import Trainer

    ruin |= {"max_steps": 12, "eval_steps": 1, "early_stopping_patience": 2, "save_steps": 2}
    result, record, rows, said = train("whole", **ruin)
    best = record["result"]["best"]
    assert best["stopped"]
    assert (best["since"], result.step) == (2, best["step"] + 2)
    assert result.step < 12
    assert "Stopped early, after 2 evaluations" in (tmp_path / "whole" / "report.md").read_text()
    assert any(line.startswith("stopping early") for line in said)

    # Killed in the evaluation that would have stopped it; and killed when all is trained.
    real, calls = Trainer.held_out, 0

    def dies(self: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == result.step + 1:  # the first is that before the training
            raise Killed
        return real(self)

    def fails(*args: Any) -> None:
        raise Killed

    for owner, name, fault, output in (
        (Trainer, "held_out", dies, "killed"),
        (report, "save", fails, "trained"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            with pytest.raises(Killed):
                train(output, **ruin)
    for name in ("killed", "trained"):
        again, resumed, resumed_rows, _ = train(name, resume=True)
        assert again.step == result.step
        assert resumed["result"]["best"] == best
        assert resumed_rows == rows
        assert same(tmp_path / name, tmp_path / "whole")


def test_patience_without_evaluations_is_refused() -> None:
    with pytest.raises(UserError, match="give --eval-steps N too"):
        Recipe(model="m", data="d", output="o", early_stopping_patience=2)
    assert parsed("--early-stopping-threshold", ".1").given == {"early_stopping_threshold": 0.1}


# -- --lr auto -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", ["cruxy", "adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cruxy-lion", "sgd"))]
)
def test_the_run_is_that_of_the_rate_found(optimizer: str, train, tmp_path: Path) -> None:
    """Every optimizer: the search leaves weights, optimizer, random numbers and guard as they were."""
    _, record, rows, said = train("auto", lr="auto", optimizer=optimizer)
    found = record["rate_search"]
    assert record["recipe"]["lr"] == record["lr"] == found["lr"]
    losses = {row["lr"]: row["loss"] for row in found["tried"]}
    assert found["lr"] == min(losses, key=lambda lr: losses[lr])
    assert len(set(losses.values())) == len(losses) >= 3, "the rates make no difference"
    assert min(losses.values()) < found["before"]
    rates = sorted(losses)
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([3.0] * (len(rates) - 1))
    assert found["at_edge"] or rates[0] < found["lr"] < rates[-1]
    assert found["steps"] == 6  # no more than the run has
    assert sum(line.startswith("  ") and " after 6 steps" in line for line in said) == len(rates)
    _, plain, plain_rows, _ = train("plain", lr=found["lr"], optimizer=optimizer)
    assert rows == plain_rows
    assert same(tmp_path / "auto", tmp_path / "plain")
    assert "rate_search" not in plain
    report = (tmp_path / "auto" / "report.md").read_text()
    assert "## The learning rate" in report
    assert f"| {found['lr']:g} | **" in report


def test_a_resumed_run_searches_no_second_time(train, tmp_path: Path, monkeypatch) -> None:
    from cruxy_triton.finetune import rate
    from cruxy_triton.finetune import train as train_module

    with monkeypatch.context() as patch:
        real = train_module.Trainer._save_checkpoint

        def dies(self: Any, *args: Any) -> None:
            real(self, *args)
            raise Killed

        patch.setattr(train_module.Trainer, "_save_checkpoint", dies)
        with pytest.raises(Killed):
            train("run", lr="auto")
    monkeypatch.setattr(rate, "search", lambda *a, **k: pytest.fail("searched again"))
    before = json.loads((tmp_path / "run" / "run.json").read_text())["rate_search"]
    result, record, _, _ = train("run", resume=True, lr="auto")
    assert result.finished
    assert record["rate_search"] == before
    train("fixed")
    with pytest.raises(UserError, match="'auto' is given now"):
        run.resume_recipe(RunFolder(tmp_path / "fixed", resume=True), {"lr": "auto"})


def test_the_grid_is_extended_while_the_best_is_at_its_edge() -> None:
    from cruxy_triton.finetune import rate

    for good in (1e-2, 1.0, 3.0, 9.0, 81.0):
        asked: list[float] = []

        def judged(lr: float, good: float = good, asked: list[float] = asked) -> float:
            asked.append(lr)
            return abs(torch.tensor(lr / good).log().item())

        best, at_edge = rate._climb([1.0, 3.0, 9.0], judged)
        assert best == pytest.approx(good, rel=0.75)
        assert not at_edge
        assert len(asked) == len(set(asked))
        assert {min(asked) < best, max(asked) > best} == {True}
    best, at_edge = rate._climb([1.0, 3.0, 9.0], lambda lr: -lr)
    assert at_edge
    assert best == pytest.approx(9.0 * 3.0 ** (rate.MOST_RATES - 3))
    assert rate._climb([1.0, 3.0, 9.0], lambda lr: float("inf") if lr > 2 else 1 / lr)[0] == 1.0


def test_a_search_that_cannot_be_is_one_sentence(train, tmp_path: Path, small_model) -> None:
    (tmp_path / "two.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    with pytest.raises(UserError, match="--lr auto needs at least 2 training records"):
        train("run", lr="auto", data=str(tmp_path / "two.jsonl"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--lr auto is for adapters"):
        settings.check_together({"lr": "auto", "method": "full"})
