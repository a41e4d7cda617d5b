"""What a run would do, before it does it: the first sequences as the model will see them, and token statistics."""

import itertools
import math
import statistics
from typing import Any

import numpy as np

from cruxy_triton.finetune.data import Rows, Tokens
from cruxy_triton.finetune.recipe import Recipe

SHOWN = 3
# What is trained on stands between these: plain ASCII, because not every terminal shows more.
OPENS, CLOSES = "[[", "]]"
LONGEST_TEXT = 1200  # characters of one part; of longer ones both ends are shown
TOO_LONG = "\n[... {:,} characters ...]\n"


def sequences(rows: Rows, recipe: Recipe, *, packed: bool) -> Rows:
    """The sequences that the trainer makes of `rows`: themselves, or filled up to the sequence length."""
    if not packed:
        return rows
    import datasets
    from trl.data_utils import pack_dataset

    assert recipe.max_seq_length is not None, "the plan decides the sequence length first"
    found = pack_dataset(datasets.Dataset.from_list(rows), recipe.max_seq_length, "wrapped").with_format("numpy")
    return [{name: row[name] for name in ("input_ids", "labels")} for row in found]  # type: ignore[index]


def steps_of(count: int, recipe: Recipe) -> int:
    """Optimizer steps of a run over `count` sequences, counted as transformers does."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    assert recipe.micro_batch_size is not None, "the plan decides the micro-batch size first"
    batches = math.ceil(count / recipe.micro_batch_size)
    return math.ceil(recipe.epochs * max(1, math.ceil(batches / recipe.gradient_accumulation_steps)))


def shown(row: dict[str, np.ndarray], tokenizer: Any) -> str:
    """One sequence as text, special tokens included, what is trained on between `[[` and `]]`.

    The first token of a sequence has nothing before it that could predict it, so that it is never trained on.
    """
    trained = row["labels"] != -100
    trained[:1] = False
    parts = []
    for learns, group in itertools.groupby(range(len(trained)), key=lambda i: bool(trained[i])):
        text = _short(_printable(tokenizer.decode(row["input_ids"][list(group)].tolist())))
        parts.append(f"{OPENS}{text}{CLOSES}" if learns else text)
    return "".join(parts)


def _printable(text: str) -> str:
    """Control characters by their names: they would act on the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _short(text: str) -> str:
    over = len(text) - LONGEST_TEXT
    half = LONGEST_TEXT // 2
    return text if over <= 0 else f"{text[:half]}{TOO_LONG.format(over)}{text[-half:]}"


def of(rows: list[Rows], tokens: list[list[Tokens]], recipe: Recipe, tokenizer: Any, *, packed: bool) -> dict[str, Any]:
    """What there is to see of a run's `rows` (to train on, held out) and of the `tokens` that they were made from."""
    length = math.inf if packed or recipe.max_seq_length is None else recipe.max_seq_length
    fed, evaluated = (sequences(part, recipe, packed=packed) for part in rows)
    return {
        "training": _statistics(rows[0], tokens[0], fed, length),
        "held_out": _statistics(rows[1], tokens[1], evaluated, length),
        "sequences": len(fed),
        "steps": steps_of(len(fed), recipe),
        "batch_size": recipe.batch_size,
        "first": [shown(row, tokenizer) for row in fed[:SHOWN]],
    }


def _statistics(rows: Rows, tokens: list[Tokens], fed: Rows, longest: float) -> dict[str, Any]:
    """Counts of records and tokens, and lengths in tokens. A record without a row has no token to learn from."""
    lengths = sorted(len(row["input_ids"]) for row in rows)
    return {
        "records": len(rows),
        "left_out": len(tokens) - len(rows),
        "cut": sum(len(t.ids) > longest > t.prompt for t in tokens),
        "tokens": sum(lengths),
        "trained_tokens": sum(int((row["labels"][1:] != -100).sum()) for row in fed),
        "lengths": {
            "shortest": lengths[0],
            "median": round(statistics.median(lengths)),
            "95_percent_below": lengths[math.ceil(0.95 * len(lengths)) - 1],
            "longest": lengths[-1],
        },
    }


def lines(found: dict[str, Any]) -> list[str]:
    """What `of` found, for a terminal."""
    told = []
    for name in ("training", "held_out"):
        part, lengths = found[name], found[name]["lengths"]
        told.append(
            f"{name.replace('_', '-')}: {part['records']:,} records, {part['tokens']:,} tokens, "
            f"{part['trained_tokens']:,} of them trained on; lengths {lengths['shortest']:,} to "
            f"{lengths['longest']:,}, median {lengths['median']:,}, 95 % up to {lengths['95_percent_below']:,}; "
            f"{part['cut']:,} cut at the sequence length, {part['left_out']:,} left out"
        )
    told[1] = told[1].replace("of them trained on", "of them evaluated")
    told.append(
        f"steps: {found['steps']:,}, each of {found['batch_size']} sequences; {found['sequences']:,} sequences per "
        "epoch"
    )
    for number, text in enumerate(found["first"], 1):
        told += [f"-- sequence {number} of {found['sequences']:,} (trained on: {OPENS}...{CLOSES}) --", text]
    return [*told, "dry run: nothing was loaded, trained or written"]
