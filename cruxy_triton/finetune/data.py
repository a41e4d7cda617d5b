"""Training data: from a JSONL file, a text file or a datasets id to records that TRL's SFTTrainer takes.

After reading there are two forms:
  text        {"text": str}                         trained on every token, packed to full sequences
  completion  {"prompt": ..., "completion": ...}    trained on the completion; both are strings, or lists of
                                                    messages where the tokenizer has a chat template
A conversation becomes one completion record for each assistant turn, with what came before as its prompt:
that trains every answer with any chat template, also those that cannot mark the assistant's tokens.

Then each record becomes token ids, once: what is too long, what the chat template refuses and what is lost is
known before the model is loaded.
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import random
import statistics
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cruxy_triton import files
from cruxy_triton.environment import expect_no_hub_in_vain
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
FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz", *TEXT_SUFFIXES)
TEXT_CHUNK_CHARACTERS = 8192
TOKENIZED_AT_ONCE = 1000  # records; tokenizers give lists of Python integers, ten times as large as what is kept

# Roles of messages; a conversation in which nobody is the assistant and somebody has another role is misnamed.
ROLES = {"system", "developer", "user", "assistant", "tool", "function"}

# Fields that say something for the model to read, be it a single word.
CONTEXT = {"context", "contexts", "input", "system", "system_prompt", "passage", "document", "background", "history"}

LOUD = 0.1  # from this part of the data on, what is lost is a warning instead of a note

Rows = list[dict[str, np.ndarray]]  # input_ids and labels of a sequence, int32


class Record(dict[str, Any]):
    """One record, and the `place` (file and line) that it comes from."""

    place: str


@dataclass(frozen=True)
class Loss:
    """`count` of `total` things in the data are not trained on as they stand; `what` says which and how."""

    count: int
    total: int
    what: str

    def __str__(self) -> str:
        loud = self.count >= LOUD * self.total
        return f"{'warning' if loud else 'note'}: {self.count:,} of {self.total:,} {self.what}"


@dataclass
class Data:
    """Records for training and for the held-out evaluation, and what was lost on the way to them."""

    form: str
    train: list[Record]
    held_out: list[Record]
    skipped_empty: int
    fingerprint: str
    losses: list[Loss] = field(default_factory=list)

    @property
    def packed(self) -> bool:
        return self.form == "text"

    @property
    def asked(self) -> str:
        """How a question is put: "chat" (the model's template), "question" (QUESTION_TEMPLATE) or "plain"."""
        prompt = self.train[0].get("prompt", "")
        if isinstance(prompt, list):
            return "chat"
        start, end = QUESTION_TEMPLATE.split("{question}")
        return "question" if prompt.startswith(start) and prompt.endswith(end) else "plain"


@dataclass(frozen=True)
class Tokens:
    """The token ids of one record; the first `prompt` of them are not trained on."""

    ids: np.ndarray  # int32
    prompt: int


def tokenize(records: list[Record], tokenizer: Any) -> list[Tokens]:
    """The ids that TRL's SFTTrainer would make of `records`; raises UserError with the place of one that has none."""
    return [
        Tokens(np.array(whole, dtype=np.int32), _shared(prompt, whole))
        for start in range(0, len(records), TOKENIZED_AT_ONCE)
        for prompt, whole in zip(*_ids(records[start : start + TOKENIZED_AT_ONCE], tokenizer), strict=True)
    ]


def _ids(records: list[Record], tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Of each record the ids of the prompt and those of prompt and completion."""
    if "text" in records[0]:
        texts = [_ended(record["text"], tokenizer) for record in records]
        return [[]] * len(texts), tokenizer(texts)["input_ids"]
    if isinstance(records[0]["prompt"], str):
        prompts = tokenizer([record["prompt"] for record in records])["input_ids"]
        return prompts, tokenizer([r["prompt"] + _ended(r["completion"], tokenizer) for r in records])["input_ids"]
    prompts, wholes = [], []
    for record in records:
        try:
            prompts.append(_chat_ids(tokenizer, record["prompt"], add_generation_prompt=True))
            wholes.append(_chat_ids(tokenizer, record["prompt"] + record["completion"]))
        except Exception as error:  # whatever a template's own code raises
            roles = ", ".join(m["role"] for m in record["prompt"] + record["completion"])
            raise UserError(
                f"{record.place}: the model's chat template refuses this conversation (roles {roles}): "
                f"{str(error).strip().partition(chr(10))[0]}"
            ) from error
    return prompts, wholes


def _ended(text: str, tokenizer: Any) -> str:
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _chat_ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def _shared(prompt: list[int], whole: list[int]) -> int:
    """How many ids the two have in common at the start: a tokenizer may merge the prompt's end with what follows."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    return sum(1 for _ in same)


def longest(sequences: list[Tokens]) -> int:
    """Length of the longest sequence, rounded up to a multiple of 64."""
    return math.ceil(max(len(s.ids) for s in sequences) / 64) * 64


def fit(sequences: list[Tokens], length: int) -> tuple[Rows, int]:
    """Rows (input_ids, labels) of at most `length` tokens, and how many were cut for that.

    A sequence whose prompt fills the length alone has nothing to learn from and gets no row.
    """
    kept = [s for s in sequences if s.prompt < min(length, len(s.ids))]
    return [_row(s.ids[:length], s.prompt) for s in kept], sum(len(s.ids) > length for s in kept)


def _row(ids: np.ndarray, prompt: int) -> dict[str, np.ndarray]:
    return {"input_ids": ids, "labels": np.where(np.arange(len(ids)) < prompt, np.int32(-100), ids)}


def token_statistics(rows: Rows) -> dict[str, int]:
    """Tokens in all, those trained on, and the lengths' median and maximum."""
    lengths = [len(row["input_ids"]) for row in rows]
    return {
        "tokens": sum(lengths),
        "trained_tokens": sum(int((row["labels"] != -100).sum()) for row in rows),
        "median_length": round(statistics.median(lengths)),
        "longest": max(lengths),
    }


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
    form, groups, skipped, digest, losses = _read(source, subset, split, chat)
    if eval_source is not None:
        eval_form, held_out, eval_skipped, eval_digest, eval_losses = _read(eval_source, subset, split, chat)
        losses += eval_losses
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
        count = min(max(1, round(len(groups) * eval_fraction)), len(groups) - 1, max_eval_samples)
        if form == "text":
            train, held_out = groups[:-count], groups[-count:]
        else:
            order = list(range(len(groups)))
            random.Random(seed).shuffle(order)
            # Whole lines, and no more than will be evaluated: the rest is trained on.
            sizes = itertools.accumulate(len(groups[i]) for i in order[:count])
            chosen = set(order[: max(1, sum(size <= max_eval_samples for size in sizes))])
            train = [group for i, group in enumerate(groups) if i not in chosen]
            held_out = [groups[i] for i in sorted(chosen)]
    training = [record for group in train for record in group]
    evaluation = [record for group in held_out for record in group]
    if (left := len(evaluation) - max_eval_samples) > 0:
        what = f"held-out records are beyond the {max_eval_samples:,} of --max-eval-samples: not used"
        losses.append(Loss(left, len(evaluation), what))
        del evaluation[max_eval_samples:]
    if skipped:
        losses.append(Loss(skipped, skipped + len(train) + len(held_out), "records are left out: they have no answer"))
    known = {hash(json.dumps(record)) for record in training}
    if both := sum(hash(json.dumps(record)) in known for record in evaluation):
        losses.append(Loss(both, len(evaluation), "held-out records are trained on too, so they prove nothing"))
    return Data(form, training, evaluation, skipped, digest, losses)


# The records of one line belong together: turns of a conversation must not be split between training and
# evaluation.
Group = list[Record]


def _read(source: str, subset: str | None, split: str, chat: bool) -> tuple[str, list[Group], int, str, list[Loss]]:
    path = Path(source).expanduser()
    if path.is_file():
        digest = files.digest(path)
        kind = path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
        if kind in TEXT_SUFFIXES:
            return "text", _text_records(path), 0, digest, []
        rows = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(kind, _json_rows)(path)
    else:
        rows, digest = _dataset_rows(source, subset, split)
    form, groups, skipped, losses = _normalise(rows, source, chat)
    if not groups:
        raise UserError(f"{source} holds nothing to learn: all {skipped} records have an empty answer")
    return form, groups, skipped, digest, losses


def _decode(path: Path) -> str:
    opened: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start} cannot be decoded); expected JSONL, CSV or plain text, as "
            "it is or in .gz, or .parquet"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _text_records(path: Path) -> list[Group]:
    """Cuts a text at line ends into pieces of about 8,192 characters, so that the end can be held out."""
    text = _decode(path)
    if not text.strip():
        raise UserError(f"{path} is empty; expected text to train on")
    limit = max(1, min(TEXT_CHUNK_CHARACTERS, len(text) // 40))
    for longest_line in (TEXT_CHUNK_CHARACTERS, limit):  # the second for a text of one line
        pieces = [""]
        for line in _lines(text, longest_line):
            if len(pieces[-1]) >= limit:
                pieces.append("")
            pieces[-1] += line
        if len(pieces) > 1:
            break
    if not pieces[-1].strip():
        pieces.pop()
    return [[_record(f"{path}: piece {i}", text=piece)] for i, piece in enumerate(pieces, 1)]


def _lines(text: str, longest_line: int) -> Iterator[str]:
    """The lines of `text` with their ends; one that is too long in several, cut at blanks where there are some."""
    for line in text.splitlines(keepends=True):
        while len(line) > longest_line:
            cut = line.rfind(" ", 0, longest_line) + 1 or longest_line
            yield line[:cut]
            line = line[cut:]
        yield line


def _record(place: str, **fields: Any) -> Record:
    record = Record(fields)
    record.place = place
    return record


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit((1 << 31) - 1)
    reader = csv.DictReader(io.StringIO(_decode(path)), strict=True)
    try:
        for row in reader:
            if None in row:
                raise UserError(f"{path}: line {reader.line_num} has more fields than the first line names")
            yield f"{path}: line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is not CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet: {str(error).partition(chr(10))[0]}") from None
    yield from ((f"{path}: record {i}", row) for i, row in enumerate(rows, 1))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place for messages, object) of each line; a file that holds one JSON list works too."""
    text = _decode(path)
    if not text.strip():
        raise UserError(f"{path} is empty; expected one JSON object per line (fields: {ACCEPTED})")
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
                "JSON object per line (a plain text needs a name that ends in .txt)"
            ) from None


def _dataset_rows(source: str, subset: str | None, split: str) -> tuple[Iterator[tuple[str, Any]], str]:
    if not Path(source).expanduser().exists():
        if source.lower().endswith(FILE_SUFFIXES) or source.count("/") > 1:
            raise UserError(f"data file {source} does not exist")
        expect_no_hub_in_vain()
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


def _normalise(rows: Iterator[tuple[str, Any]], source: str, chat: bool) -> tuple[str, list[Group], int, list[Loss]]:
    form = None
    form_place = ""
    groups: list[Group] = []
    skipped = 0
    unused: Counter[str] = Counter()
    opening = 0
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place} is a JSON {_json_type(row)}; expected an object with fields ({ACCEPTED})")
        found, fields = _form_of(row, place)
        if form is None:
            form, form_place = found, place
        elif found != form:
            raise UserError(f"{place} holds a {found} record, but {form_place} a {form} record; use one form a file")
        group = _convert(found, row, fields, place, chat)
        unused.update(_unused(found, row, fields))
        opening += any(m["role"] == "assistant" for m in _given_messages(row, fields)[:1])
        if group:
            groups.append(group)
        else:
            skipped += 1
    if form is None:
        raise UserError(f"{source} is empty; expected records with fields {ACCEPTED}")
    total = len(groups) + skipped
    losses = [Loss(count, total, f"records have a field {name!r}, which is not used") for name, count in unused.items()]
    if opening:
        losses.append(Loss(opening, total, "conversations open with a turn of the assistant, which is not trained on"))
    return ("text" if form == "text" else "completion"), groups, skipped, losses


def _unused(form: str, row: dict, fields: tuple[str, ...]) -> set[str]:
    """Fields that hold words, or a structure, and that `_convert` does not take."""
    used = {*fields, "input"} if form == "instruction" else set(fields)
    found = {name for name, value in row.items() if name not in used and _says_something(name, value)}
    for message in _given_messages(row, fields):
        found |= {f"messages: {name}" for name, v in message.items() if name not in ("role", "content") and v}
    return found


def _given_messages(row: dict, fields: tuple[str, ...]) -> list[dict]:
    return [message for f in fields if isinstance(row[f], list) for message in row[f]]


def _says_something(name: str, value: Any) -> bool:
    """Whether a field looks like text or a structure, not like a key, a label or a number of the record."""
    if not isinstance(value, str):
        return isinstance(value, (list, dict)) and bool(value)
    # Lo: letters without case, of scripts most of which set no blanks between words (Chinese, Japanese, Thai, ...)
    caseless = any(unicodedata.category(character) == "Lo" for character in value)
    return caseless or len(value.split()) > (0 if name.lower() in CONTEXT else 1)


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)  # parquet has other types too


def _form_of(row: dict, place: str) -> tuple[str, tuple[str, ...]]:
    for form, fields in FORMS:
        if all(row.get(f) is not None for f in fields):
            return form, fields
    for form, fields in FORMS:
        if all(f in row for f in fields):
            if (null := next(f for f in fields if row[f] is None)) == fields[-1]:
                return form, fields  # without an answer: left out, and counted
            raise UserError(f"{place}: field {null!r} is null; expected a string")
    shown = ", ".join(map(str, row)) or "none"
    hint = ""
    if "conversations" in row:
        hint = " (name conversations `messages`, their `from` `role` and their `value` `content`)"
    raise UserError(f"{place} has no known fields: found {shown}; accepted are {ACCEPTED}{hint}")


def _convert(form: str, row: dict, fields: tuple[str, ...], place: str, chat: bool) -> Group:
    """The records to train on; empty when there is nothing to learn."""
    if row[fields[-1]] is None:
        return []
    if form == "messages":
        return _turns([], _messages(row["messages"], place, chat), place)
    if form == "completion" and isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return _turns(_messages(row["prompt"], place, chat), _messages(row["completion"], place, chat), place)
    for f in fields:
        if not isinstance(row[f], str):
            raise UserError(f"{place}: field {f!r} is a JSON {_json_type(row[f])}; expected a string")
        _check_text(row[f], f"{place}: field {f!r}")
    if not row[fields[-1]].strip():
        return []
    if form == "text":
        return [_record(place, text=row["text"])]
    if form == "completion":
        return [_record(place, prompt=row["prompt"], completion=row["completion"])]
    question, answer = row[fields[0]], row[fields[1]]
    if form == "instruction" and row.get("input"):
        question = f"{question}\n\n{row['input']}"
        _check_text(question, f"{place}: field 'input'")
    if chat:
        return _turns([{"role": "user", "content": question}], [{"role": "assistant", "content": answer}], place)
    # The blank between "Answer:" and the answer belongs to the completion: tokenizers merge it with the
    # first word, and a prompt must end on a token boundary.
    return [_record(place, prompt=QUESTION_TEMPLATE.format(question=question), completion=f" {answer}")]


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place} holds half of a surrogate pair ({text[error.start]!r}, character {error.start}), which is no "
            "text; write the whole character or leave it out"
        ) from None


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
    roles = dict.fromkeys(m["role"] for m in messages)
    if "assistant" not in roles and (other := [role for role in roles if role not in ROLES]):
        raise UserError(
            f"{place}: no message has the role 'assistant', but there is {', '.join(map(repr, other))}; expected the "
            "roles system, user and assistant"
        )
    for number, message in enumerate(messages, 1):
        _check_text(message["content"], f"{place}: message {number}")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _turns(prompt: list[dict[str, str]], conversation: list[dict[str, str]], place: str) -> Group:
    """One record for each non-empty assistant turn of `conversation`, with all that precedes it as prompt."""
    return [
        _record(place, prompt=prompt + conversation[:i], completion=[message])
        for i, message in enumerate(conversation)
        if message["role"] == "assistant" and message["content"].strip() and (prompt or i)
    ]
