"""What clipping does to Cruxy's Lion at a good rate, at half and at twice that: global, tensor by tensor, none.

    python examples/clipping.py --text FILE           # Tiny Shakespeare

The character model of `cruxy-triton bench stress` (0.8 M parameters), 400 steps at a constant rate, meta3, betas
.9/.95, weight decay .3. Prints the validation losses, with --output FILE into a file as well (docs/measurements.md
has them); half a minute per run on a core.
"""

import argparse
import json
import math
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from cruxy_triton import CruxyOptimizer, files
from cruxy_triton.bench.characters import CharacterModel, Size, Text, read_text

SIZE = Size(steps=400)
SETTINGS = {"use_lion": True, "betas": (0.9, 0.95), "weight_decay": 0.3}


def run(text: Text, lr: float, clip: str | None, seed: int) -> dict[str, float | str | int | None]:
    """One run from scratch; deterministic per seed."""
    torch.manual_seed(seed)
    model = CharacterModel(text.symbols, SIZE)
    optimizer = CruxyOptimizer(model.parameters(), lr=lr, clip=clip, **SETTINGS)
    for step in range(SIZE.steps):
        loss = model.loss(*text.batch(seed * 1_000_003 + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss.detach())
    found = model.held_out_loss(text)
    return {"lr": lr, "clip": clip, "seed": seed, "loss": round(found, 4) if math.isfinite(found) else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = Text(read_text(args.text), SIZE)
    runs = []
    for seed in args.seeds:
        for lr in args.rates:
            for clip in ("global", "tensor", None):
                runs.append(run(text, lr, clip, seed))
                print(runs[-1], flush=True)
    if args.output is None:
        return 0
    report = {
        "what": "Validation loss by clipping, rate and seed, by examples/clipping.py",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("cruxy-triton", "torch")},
        "steps": SIZE.steps,
    }
    lines = ",\n  ".join(map(json.dumps, runs))
    files.write_text(args.output, json.dumps(report, indent=1)[:-2] + f',\n "runs": [\n  {lines}\n ]\n}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
