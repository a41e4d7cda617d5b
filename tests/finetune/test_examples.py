"""The examples of finetune run as they are, with a stand-in for the model; at full size their plans fit 4 GiB."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.planner import Card, plan

EXAMPLES = Path(__file__).parents[2] / "examples"
# example: (the planner's name of its model, what it prints at last)
NAMES = {
    "tinyllama": ("tinyllama-1.1b", None),
    "qwen": ("qwen2.5-1.5b", None),
    "gemma2b": ("gemma-2b", None),
    "phi2": ("phi-2", "held-out loss"),
}
NOTEBOOK = EXAMPLES / "finetune_t4.ipynb"


@pytest.mark.parametrize("name", NAMES)
def test_an_example_with_a_stand_in(name: str, command) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"finetune_{name}.py", "--tiny"],
        cwd=command.folder, env=command.environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (fell,) = [line for line in lines if line.startswith("held-out loss ")]
    before, _, after = fell.removeprefix("held-out loss ").partition(" -> ")
    assert float(after) < float(before)
    (folder,) = (command.folder / "runs").iterdir()
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished"
    settings = full_size(name)
    kept = {"load_in_4bit", "lora_r", "target_modules", "optimizer", "state_bits", "max_seq_length", "vram_bytes"}
    assert {k: run["recipe"][k] for k in kept & set(settings)} == {k: settings[k] for k in kept & set(settings)}
    if name == "gemma2b":
        assert (folder / "merged" / "model.safetensors").is_file()
    if name == "phi2":
        assert any(line.startswith("phi on CPU") or " MiB at the peak" in line for line in lines)
    else:
        assert lines.index(fell) < len(lines) - 1, "it asks the result something"


def full_size(name: str) -> dict[str, Any]:
    """SETTINGS of an example, without importing it."""
    tree = ast.parse((EXAMPLES / f"finetune_{name}.py").read_text(encoding="utf-8"))
    (found,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "SETTINGS"]
    return eval(compile(ast.Expression(found), name, "eval"), {"__builtins__": {}})


@pytest.mark.parametrize("name", NAMES)
def test_at_full_size_it_fits(name: str) -> None:
    settings = full_size(name)
    recipe = Recipe(**settings)
    pinned = ("load_in_4bit", "lora_r", "target_modules", "optimizer", "state_bits", "max_seq_length")
    given = {n: getattr(recipe, n) for n in pinned if n in settings}
    answer = plan(NAMES[name][0], Card.budget(recipe.vram_bytes), alternatives=False, **given)
    assert answer.hf_id.partition("/")[0] == settings["model"].partition("/")[0]
    assert answer.fits
    assert answer.config.max_seq_length >= 256


def cells(kind: str) -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_one() -> None:
    """The fields that the format of version 4.5 requires (nbformat.readthedocs.io), and nothing left of a run."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert all(line.endswith("\n") for line in cell["source"][:-1]), cell["id"]
        assert not cell["source"][-1].endswith("\n")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            assert "".join(cell["source"]).isascii()


FULL_CARD = '''
class Allocator:  # what torch would do under set_per_process_memory_fraction
    fraction = 1.0
    def empty(self, count, *, dtype, device):
        if count > self.fraction * TOTAL:
            raise torch.OutOfMemoryError("CUDA out of memory")
card, TOTAL = Allocator(), 15 << 30
torch.cuda.is_available = lambda: True
torch.cuda.mem_get_info = lambda: (TOTAL, TOTAL)
torch.cuda.get_device_name = lambda: "Tesla T4"
torch.cuda.empty_cache = lambda: None
torch.cuda.set_per_process_memory_fraction = lambda part: setattr(card, "fraction", part)
torch.empty = card.empty
'''


@pytest.mark.parametrize("card", [False, True], ids=["no card", "a card"])
def test_the_notebook_runs(card: bool, small_model, sums: Path, command) -> None:
    """Without a card all of it, with a small model in place of its settings; the cap's cells with one played here."""
    code = {cell["id"]: "".join(cell["source"]) for cell in cells("code")}
    (settings,) = [c["id"] for c in cells("code") if "parameters" in c["metadata"].get("tags", [])]
    assert code["install"].startswith("%pip install ")
    del code["install"]
    code[settings] += f"\nMODEL, DATA, SUBSET, STEPS = {str(small_model())!r}, {str(sums)!r}, None, 2\n"
    if card:
        parts = [code[settings], "import torch", FULL_CARD, code["cap"], code["cap-holds"]]
        parts += ["card.fraction = 1.0", 'assert not held("cuda"), "a cap that is none passes"']
    else:
        parts = list(code.values())
    done = subprocess.run(
        [sys.executable, "-c", "\n\n".join(parts)],
        cwd=command.folder, env=command.environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if card:
        assert "Tesla T4: 3.85 of 15.00 GiB for tensors" in done.stdout
        assert "more than the cap is refused" in done.stdout
    else:
        assert "step 2/2" in done.stdout
        assert "# Fine-tuning" in done.stdout
