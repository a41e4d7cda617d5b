"""Held-out loss by optimizer and learning rate on the demo task: how the defaults of `finetune` were chosen.

    python examples/learning_rates.py --seeds 0 1 2

Prints a table of medians over the seeds and writes every run to learning_rates.json. The model is that of
`cruxy-triton finetune --demo tiny`, the data are the docstrings of the other demo; each run takes about half a minute
on two cores.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from cruxy_triton import files
from cruxy_triton.finetune import demo
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.finetune.run import Hooks, finetune, versions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "cruxy", "cruxy-lion"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--output", type=Path, default=Path("learning_rates.json"))
    args = parser.parse_args()

    model, data = demo.tiny(print), demo.questions(print) / "docstrings.jsonl"
    runs = []
    print(f"{'optimizer':<12}" + "".join(f"{rate:>10g}" for rate in args.rates))
    for optimizer in args.optimizers:
        row = f"{optimizer:<12}"
        for rate in args.rates:
            losses = []
            for seed in args.seeds:
                with tempfile.TemporaryDirectory() as folder:
                    recipe = Recipe(
                        model=str(model),
                        data=str(data),
                        output=folder,
                        optimizer=optimizer,
                        lr=rate,
                        lora_r=demo.LORA_R,
                        seed=seed,
                        lr_schedule=args.schedule,
                        max_steps=args.steps,
                        max_seq_length=128,
                        sample_tokens=0,
                        save_steps=10**6,
                    )
                    result = finetune(recipe, RunFolder(folder), Hooks())
                assert result.after is not None
                losses.append(result.after["loss"])
                runs.append({"optimizer": optimizer, "lr": rate, "seed": seed, "loss": result.after["loss"]})
            row += f"{statistics.median(losses):>10.4f}"
            files.write_json(args.output, {"versions": versions(), "steps": args.steps, "runs": runs})
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
