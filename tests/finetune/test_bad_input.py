"""Bad input ends in one clear sentence and exit code 2, never a traceback, and leaves earlier output alone."""

import json
import shutil
from pathlib import Path

import pytest

GOOD = '{"prompt": "P", "completion": "C"}\n'


@pytest.fixture
def model(small_model) -> Path:
    return small_model()


def check(done, *says: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("cruxy-triton") and "error:" in line]
    assert len(errors) == 1, done.stderr
    for word in says:
        assert word in errors[0]


# Everything that is refused before a slow import is checked in the process of the test, through main(): the
# same code path as the command, without seconds of start-up each. The processes below show the exit path.
def main(capsys: pytest.CaptureFixture, *words: str | Path):
    from types import SimpleNamespace

    from cruxy_triton import cli

    code = cli.main([str(w) for w in words])
    out = capsys.readouterr()
    return SimpleNamespace(returncode=code, stdout=out.out, stderr=out.err)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lr", "-1"], "--lr is -1.0; expected a finite number"),
        (["--lr", "nan"], "--lr is nan"),
        (["--batch-size", "0"], "--batch-size is 0; expected a whole number from 1"),
        (["--batch-size", "6", "--micro-batch-size", "4"], "not a multiple of --micro-batch-size 4"),
        (["--max-seq-length", "4"], "expected a whole number of at least 8 tokens"),
        (["--epochs", "0"], "--epochs is 0.0"),
        (["--eval-fraction", "1.5"], "expected a finite number between 0 and 1"),
        (["--lora-dropout", "1"], "--lora-dropout is 1.0"),
        (["--optimizer", "adma"], "'adma'; expected one of cruxy, cruxy-lion, adamw, sgd; did you mean adamw?"),
        (["--mode", "bogus"], "--mode is 'bogus'; expected one of meta3"),
        (["--sample-tokens", "-1"], "--sample-tokens is -1; expected a whole number of at least 0"),
        (["--seed", "-1"], "--seed is -1; expected a whole number from 0 to"),
        (["--lora-alpha", "0"], "--lora-alpha is 0.0; expected a finite number above 0"),
        (["--lora-alpha", "nan"], "--lora-alpha is nan"),
        (["--lora-alpha", "inf"], "--lora-alpha is inf"),
        (["--lora-r", "many"], "--lora-r is 'many'; expected a whole number"),
        (["--record-gradients", "-1"], "--record-gradients is -1"),
        (["--vram", "0"], "expected 256 MiB to 4 TiB"),
        (["--method", "full", "--lora-r", "4"], "--lora-r with --method full, which has no adapters; leave it out"),
        (["--method", "full", "--load-in-4bit"], "4-bit weights cannot learn; leave --load-in-4bit out"),
        (["--method", "full", "--record-gradients", "2"], "--record-gradients needs --no-release"),
        (["--method", "full", "--release", "--batch-size", "4", "--micro-batch-size", "2"], "a step of every micro"),
        (["--method", "full", "--release", "--optimizer", "sgd"], "sgd has no update in backward"),
        (["--method", "full", "--release", "--layerwise", "blade"], "--layerwise blade compares the gradients of all"),
        (["--method", "full", "--merge"], "--method full writes a whole model already; leave --merge out"),
        (["--method", "full", "--dtype", "float16", "--optimizer", "adamw"], "cannot train float16 weights"),
        (["--method", "fill"], "--method is 'fill'; expected one of lora, full; did you mean full?"),
        (["--state-bits", "4"], "--state-bits 4 is for --optimizer cruxy-lion; cruxy keeps 32 or 8 bits"),
        (["--output", ""], "--output is ''; expected some text"),
        (["--data", "y.jsonl"], "--data is given twice"),
        (["--batch", "4"], "unrecognized arguments: --batch 4; it is --micro-batch-size"),
        (["--lora", "4"], "did you mean --lora-r?"),
        (["--vram", "lots"], "expected something like 4GiB"),
        (["--unknown-flag"], "unrecognized arguments: --unknown-flag"),
    ],
)
def test_settings(words: list[str], says: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    done = main(capsys, "finetune", "some/model", "--data", "x.jsonl", *words)
    check(done, says)
    assert list(tmp_path.iterdir()) == []


def test_missing_arguments(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    check(main(capsys, "finetune"), "MODEL is missing", "--demo")
    check(main(capsys, "finetune", "some/model"), "--data FILE is missing")
    check(main(capsys, "finetune", "--resume"), "--resume needs --output")
    check(main(capsys, "finetune", "--demo", "--data", "x.jsonl"), "--demo brings its own model and data")
    check(main(capsys), "which command?")
    check(main(capsys, "fintune"), "unknown command 'fintune'", "did you mean finetune?")


def test_output_folder(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text(GOOD * 9)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("keep")
    words = ("finetune", model, "--data", "d.jsonl", "--output")
    check(main(capsys, *words, "full"), "is not empty", "--overwrite")
    check(main(capsys, *words, "full", "--overwrite"), "no run.json")
    check(main(capsys, *words, "d.jsonl"), "is a file")
    check(main(capsys, *words, "d.jsonl/below"), "not writable")
    check(main(capsys, "finetune", "--resume", "--output", "nothing"), "holds no run to resume")
    assert (tmp_path / "full" / "precious").read_text() == "keep"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl", "full"]


def test_model(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "d.jsonl").write_text(GOOD * 9)

    def made(name: str, config: str | None, weights: bool = True) -> str:
        folder = tmp_path / name
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(config)
        if weights:
            (folder / "model.safetensors").write_bytes(b"")
        return name

    llama = (model / "config.json").read_text()
    for name, says in [
        ("./nowhere", "does not exist"),
        ("d.jsonl", "is a file; expected a folder"),
        ("no-such-owner/no-such-model", "neither a folder here nor a Hugging Face model"),
        (made("empty", None), "has no config.json"),
        (made("weightless", llama, weights=False), "has no weights"),
        (made("broken", "{"), "cannot be read as JSON"),
        (made("nameless", "{}"), "names no model_type"),
        (made("t5", json.dumps({"model_type": "vit"})), "is no causal language model"),
        (made("future", json.dumps({"model_type": "llama9000"})), "cannot be loaded"),
        (made("tokenless", llama), "tokenizer"),
    ]:
        check(main(capsys, "finetune", name, "--data", "d.jsonl", "--output", "run"), says)
    assert not (tmp_path / "run").exists()


def test_a_hub_that_does_not_answer_is_asked_once(model: Path, command) -> None:
    """Its libraries would ask five times, for 23 seconds, and warn each time."""
    (command.folder / "d.jsonl").write_text(GOOD * 9)
    for words, says in (
        (("no-such-owner/no-such-model", "--data", "d.jsonl"), "neither a folder here nor a Hugging Face model"),
        ((model, "--data", "no-such-owner/no-such-set"), "neither a file here nor a dataset"),
    ):
        done = command("finetune", *words, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
        check(done, says)
        assert "Retrying" not in done.stderr
        assert len(done.stderr.splitlines()) <= 2, done.stderr


def test_lengths_budget_and_targets(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "long " * 200, "completion": "C"}) * 1 + "\n" + GOOD)
    words = ("finetune", model, "--data", "d.jsonl", "--output", "run")
    check(main(capsys, *words, "--max-seq-length", "4096"), "beyond the 512 tokens")
    check(main(capsys, *words, "--vram", "100MiB"), "256 MiB")
    check(main(capsys, *words, "--device", "cuda"), "no CUDA device")
    check(main(capsys, *words, "--sample-tokens", "512"), "--sample-tokens 512 is beyond the 512 tokens")
    check(main(capsys, *words, "--attention", "flash"), "does not run on CPU", "sdpa-cpu")
    check(main(capsys, *words, "--dtype", "float16"), "cannot train on a CPU")
    check(main(capsys, *words, "--target-modules", "banana"), "banana")
    assert not (tmp_path / "run").exists()


def test_a_budget_that_nothing_fits_names_the_smallest_need(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text(GOOD * 9)
    large = tmp_path / "large"  # the plan comes before the weights, so that these need not exist
    shutil.copytree(model, large)
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "head_dim": 512}
    (large / "config.json").write_text(json.dumps(config))
    words = ("finetune", large, "--data", "d.jsonl", "--output", "run", "--vram", "1GiB")
    check(main(capsys, *words), "no configuration of", "the smallest (", "--load-in-4bit")
    assert not (tmp_path / "run").exists()


def test_records_that_do_not_fit_the_sequence_length(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text((json.dumps({"prompt": "long " * 200, "completion": "C"}) + "\n") * 6)
    words = ("finetune", model, "--data", "d.jsonl", "--output", "run", "--max-seq-length", "16")
    check(main(capsys, *words), "leaves no token of an answer")


def test_as_a_process_with_and_without_debug(model: Path, command) -> None:
    (command.folder / "d.jsonl").write_text(GOOD + "{broken\n")
    words = ("finetune", model, "--data", "d.jsonl", "--output", "run")
    done = command(*words)
    check(done, "line 2 is not JSON")
    assert done.stdout == ""
    debug = command(*words, "--debug")
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr
    assert "UserError" in debug.stderr
    assert not (command.folder / "run").exists()


@pytest.mark.parametrize("content", ["not json", "[]", "{}", '{"recipe": {"model": "m"}}'])
def test_a_damaged_run_folder(content: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    check(main(capsys, "finetune", "--resume", "--output", "run"), "run.json")


WRONG = [
    (("finetune", "MODEL", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
    (("finetune", "MODEL", "--data", "d.jsonl", "--micro-batch-size", "3"), "not a multiple of --micro-batch-size 3"),
    (("finetune", "MODEL", "--data", "d.jsonl", "--retry", "--no-rerty"), "did you mean --no-retry?"),
    (("finetune", "--resume", "--output", "."), "holds no run to resume"),
    (("generate", "d.jsonl", "--prompt", "hello"), "d.jsonl is a file"),
    (("merge", "MODEL"), "holds no adapter to merge"),
    (("plan", "MODEL", "--vram", "4"), "Was the unit forgotten?"),
    (("doctor", "--jsno"), "did you mean --json?"),
]


def test_a_person_who_does_everything_wrong_gets_one_sentence_each_time(model: Path, command) -> None:
    """As processes, one after the other in the same folder, which stays as it was."""
    (command.folder / "d.jsonl").write_text(GOOD * 9)
    for words, says in WRONG:
        done = command(*(model if word == "MODEL" else word for word in words))
        check(done, says)
        assert done.stdout == ""
        assert [p.name for p in command.folder.iterdir()] == ["d.jsonl"], words
