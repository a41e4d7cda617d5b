"""Training data: from a JSONL file, a text file or a datasets id to records that TRL's SFTTrainer takes.

After reading there are two forms:
  text        {"text": str}                         trained on every token, packed to full sequences
  completion  {"prompt": ..., "completion": ...}    trained on the completion; both are strings, or lists of
                                                    messages where the tokenizer has a chat template
A conversation becomes one completion record for each assistant turn, with what came before as its prompt:
that trains every answer with any chat template, also those that cannot mark the assistant's tokens.
"""

import hashlib
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cruxy_triton.errors import UserError

# Accepted field sets, in the order in which they are looked for. The prompt fields come first, the
# answer last; instruction records may carry an "input" (Alpaca).
FORMS = (
    ("messages", ("messages",)),
    ("completion", ("prompt", "completion")),
    ("question", ("question", "answer")),
    ("instruction", ("instruction", "output")),
    ("text", ("text",)),
)
ACCEPTED = "messages; prompt + completion; question + answer; instruction (+ input) + output; text"

# For records that ask and answer, where the model has no chat template of its own.
QUESTION_TEMPLATE = "Question: {question}\nAnswer:"

TEXT_SUFFIXES = {".txt", ".md", ".text", ".rst"}
TEXT_CHUNK_CHARACTERS = 8192


@dataclass
class Data:
    """Records for training and for the held-out evaluation, and what was found on the way."""

    form: str
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    skipped_empty: int
    fingerprint: str

    @property
    def packed(self) -> bool:
        return self.form == "text"

    def longest(self, tokenizer: Any) -> int:
        """Tokens of the longest training record, rounded up to a multiple of 64; a text has no limit of its own."""
        if self.packed:
            return sys.maxsize
        whole = [_whole(record, tokenizer) for record in self.train]
        lengths = (len(ids) for ids in tokenizer(whole, add_special_tokens=False)["input_ids"])
        return math.ceil((max(lengths) + 2) / 64) * 64  # 2: what the tokenizer may add at both ends


def _whole(record: dict[str, Any], tokenizer: Any) -> str:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str):
        return prompt + completion
    return tokenizer.apply_chat_template(prompt + completion, tokenize=False)


def load(
    source: str,
    *,
    eval_source: str | None,
    eval_fraction: float,
    max_eval_samples: int,
    seed: int,
    subset: str | None = None,
    split: str = "train",
    chat: bool = False,
) -> Data:
    """Reads `source` (path or datasets id) and splits off the held-out records.

    `chat` says whether the tokenizer has a chat template to be used. Question/answer and instruction
    records become messages then, and `Question: ... Answer:` text otherwise; prompt/completion records
    are taken as they are. A held-out split of a text is its end, of records a random choice by `seed`.
    Raises UserError with the line number where a line cannot be used.
    """
    form, groups, skipped, digest = _read(source, subset, split, chat)
    if eval_source is not None:
        eval_form, held_out, eval_skipped, eval_digest = _read(eval_source, subset, split, chat)
        if (eval_form == "text") != (form == "text"):
            raise UserError(
                f"--eval-data {eval_source} holds {eval_form} records and {source} {form} records; "
                "give both in the same form"
            )
        skipped += eval_skipped
        digest = hashlib.sha256((digest + eval_digest).encode()).hexdigest()
        train = groups
    else:
        if len(groups) < 2:
            raise UserError(
                f"{source} holds only {len(groups)} usable record; at least 2 are needed, one to train on and "
                "one to evaluate on (or give --eval-data)"
            )
        count = min(max(1, round(len(groups) * eval_fraction)), len(groups) - 1)
        if form == "text":
            train, held_out = groups[:-count], groups[-count:]
        else:
            order = list(range(len(groups)))
            random.Random(seed).shuffle(order)
            chosen = set(order[:count])
            train = [group for i, group in enumerate(groups) if i not in chosen]
            held_out = [groups[i] for i in sorted(chosen)]
    held_out = [record for group in held_out for record in group][:max_eval_samples]
    return Data(form, [record for group in train for record in group], held_out, skipped, digest)


# The records of one line belong together: turns of a conversation must not be split between training and
# evaluation.
Group = list[dict[str, Any]]


def _read(source: str, subset: str | None, split: str, chat: bool) -> tuple[str, list[Group], int, str]:
    path = Path(source).expanduser()
    if path.is_file():
        digest = _digest(path)
        if path.suffix.lower() in TEXT_SUFFIXES:
            return "text", _text_records(path), 0, digest
        rows = _json_rows(path)
    else:
        rows, digest = _dataset_rows(source, subset, split)
    form, groups, skipped = _normalise(rows, source, chat)
    if not groups:
        raise UserError(f"{source} holds nothing to learn: all {skipped} records have an empty answer")
    return form, groups, skipped, digest


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start} cannot be decoded); expected JSONL or plain text"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _text_records(path: Path) -> list[Group]:
    """Cuts a text at line ends into pieces of about 8,192 characters, so that the end can be held out."""
    text = _decode(path)
    if not text.strip():
        raise UserError(f"{path} is empty; expected text to train on")
    pieces: list[str] = []
    piece: list[str] = []
    size = 0
    limit = max(1, min(TEXT_CHUNK_CHARACTERS, len(text) // 40))
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= limit:
            pieces.append("".join(piece))
            piece, size = [], 0
    if "".join(piece).strip():
        pieces.append("".join(piece))
    return [[{"text": p}] for p in pieces]


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place for messages, object) of each line; a file that holds one JSON list works too."""
    text = _decode(path)
    if not text.strip():
        raise UserError(f"{path} is empty; expected one JSON object a line (fields: {ACCEPTED})")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {error.lineno} is not valid JSON: {error.msg}") from None
        yield from ((f"{path}: record {i}", row) for i, row in enumerate(rows, 1))
        return
    # JSON's own line ends only: str.splitlines() would also cut at U+2028, which JSON allows in a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}: line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            shown = line.strip()[:60]
            raise UserError(
                f"{path}: line {number} is not JSON ({error.msg} at column {error.colno}): {shown!r}; expected one "
                "JSON object a line (a plain text needs a name that ends in .txt)"
            ) from None


def _dataset_rows(source: str, subset: str | None, split: str) -> tuple[Iterator[tuple[str, Any]], str]:
    if source.endswith((".json", ".jsonl", *TEXT_SUFFIXES)) or (source.count("/") > 1 and not Path(source).exists()):
        raise UserError(f"data file {source} does not exist")
    import datasets

    try:
        dataset = datasets.load_dataset(source, subset, split=split)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{source} is neither a file here nor a dataset that could be loaded (subset {subset}, split {split}): "
            f"{first_line}"
        ) from None
    assert isinstance(dataset, datasets.Dataset)
    rows = ((f"{source}: record {i}", row) for i, row in enumerate(dataset, 1))
    return rows, dataset._fingerprint


def _normalise(rows: Iterator[tuple[str, Any]], source: str, chat: bool) -> tuple[str, list[Group], int]:
    form = None
    form_place = ""
    groups: list[Group] = []
    skipped = 0
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place} is a JSON {_json_type(row)}; expected an object with fields ({ACCEPTED})")
        found, fields = _form_of(row, place)
        if form is None:
            form, form_place = found, place
        elif found != form:
            raise UserError(f"{place} holds a {found} record, but {form_place} a {form} record; use one form a file")
        group = _convert(found, row, fields, place, chat)
        if group:
            groups.append(group)
        else:
            skipped += 1
    if form is None:
        raise UserError(f"{source} is empty; expected records with fields {ACCEPTED}")
    return ("text" if form == "text" else "completion"), groups, skipped


def _json_type(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]


def _form_of(row: dict, place: str) -> tuple[str, tuple[str, ...]]:
    for form, fields in FORMS:
        if all(row.get(f) is not None for f in fields):
            return form, fields
    shown = ", ".join(map(str, row)) or "none"
    raise UserError(f"{place} has no known fields: found {shown}; accepted are {ACCEPTED}")


def _convert(form: str, row: dict, fields: tuple[str, ...], place: str, chat: bool) -> Group:
    """The records that TRL takes; empty when there is nothing to learn."""
    if form == "messages":
        return _turns([], _messages(row["messages"], place, chat))
    if form == "completion" and isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return _turns(*(_messages(row[f], place, chat) for f in fields))
    for f in fields:
        if not isinstance(row[f], str):
            raise UserError(f"{place}: field {f!r} is a JSON {_json_type(row[f])}; expected a string")
    if not row[fields[-1]].strip():
        return []
    if form == "text":
        return [{"text": row["text"]}]
    if form == "completion":
        return [{"prompt": row["prompt"], "completion": row["completion"]}]
    question, answer = row[fields[0]], row[fields[1]]
    if form == "instruction" and row.get("input"):
        question = f"{question}\n\n{row['input']}"
    if chat:
        return _turns([{"role": "user", "content": question}], [{"role": "assistant", "content": answer}])
    # The blank between "Answer:" and the answer belongs to the completion: tokenizers merge it with the
    # first word, and a prompt must end on a token boundary.
    return [{"prompt": QUESTION_TEMPLATE.format(question=question), "completion": f" {answer}"}]


def _messages(messages: Any, place: str, chat: bool) -> list[dict[str, str]]:
    if not chat:
        raise UserError(
            f"{place} holds messages, but the model's tokenizer has no chat template (or --no-chat-template is "
            "given); use a chat model or records with prompt and completion"
        )
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not valid:
        raise UserError(f'{place}: messages must be a list of {{"role": string, "content": string}}')
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _turns(prompt: list[dict[str, str]], conversation: list[dict[str, str]]) -> Group:
    """One record for each non-empty assistant turn of `conversation`, with all that precedes it as prompt."""
    return [
        {"prompt": prompt + conversation[:i], "completion": [message]}
        for i, message in enumerate(conversation)
        if message["role"] == "assistant" and message["content"].strip() and (prompt or i)
    ]
