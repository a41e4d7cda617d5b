"""Reading training data: every accepted form, and one clear sentence for what cannot be used."""

import csv
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cruxy_triton.errors import UserError
from cruxy_triton.finetune import data

USER, ASSISTANT = "user", "assistant"


def write(tmp_path: Path, rows: list | str, name: str = "data.jsonl") -> str:
    path = tmp_path / name
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def read(source: str, *, chat: bool = False, **options) -> data.Data:
    defaults = {"eval_source": None, "eval_fraction": 0.25, "max_eval_samples": 100, "seed": 0}
    return data.load(source, chat=chat, **{**defaults, **options})


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "chat", "expected"),
    [
        (
            {"question": "Q", "answer": "A"},
            False,
            {"prompt": "Question: Q\nAnswer:", "completion": " A"},
        ),
        (
            {"question": "Q", "answer": "A"},
            True,
            {"prompt": [message(USER, "Q")], "completion": [message(ASSISTANT, "A")]},
        ),
        (
            {"instruction": "I", "input": "X", "output": "O"},
            False,
            {"prompt": "Question: I\n\nX\nAnswer:", "completion": " O"},
        ),
        (
            {"instruction": "I", "input": "", "output": "O"},
            False,
            {"prompt": "Question: I\nAnswer:", "completion": " O"},
        ),
        ({"prompt": "P", "completion": "C"}, True, {"prompt": "P", "completion": "C"}),
        (
            {"prompt": [message(USER, "P")], "completion": [message(ASSISTANT, "C")]},
            True,
            {"prompt": [message(USER, "P")], "completion": [message(ASSISTANT, "C")]},
        ),
        ({"text": "T"}, False, {"text": "T"}),
        ({"id": 3, "text": "T", "prompt": None}, False, {"text": "T"}),
    ],
    ids=["question", "question-chat", "instruction-input", "instruction", "prompt", "messages", "text", "extras"],
)
def test_record_forms(tmp_path: Path, row: dict, chat: bool, expected: dict) -> None:
    found = read(write(tmp_path, [row] * 8), chat=chat)
    assert found.train == [expected] * 6
    assert found.held_out == [expected] * 2


def test_each_assistant_turn_is_a_record_with_its_history(tmp_path: Path) -> None:
    conversation = [
        message("system", "S"),
        message(USER, "1"),
        message(ASSISTANT, "one"),
        message(USER, "2"),
        message(ASSISTANT, "two"),
    ]
    found = read(write(tmp_path, [{"messages": conversation}] * 4), chat=True)
    assert found.form == "completion"
    assert found.train[:2] == [
        {"prompt": conversation[:2], "completion": [conversation[2]]},
        {"prompt": conversation[:4], "completion": [conversation[4]]},
    ]
    # Turns of one conversation stay on one side of the split: 3 and 1 conversations of 2 turns each.
    assert (len(found.train), len(found.held_out)) == (6, 2)


def test_split_is_disjoint_complete_and_decided_by_the_seed(tmp_path: Path) -> None:
    source = write(tmp_path, [{"prompt": str(i), "completion": "x"} for i in range(40)])
    first, again, other = read(source), read(source), read(source, seed=1)
    prompts = [r["prompt"] for r in first.train + first.held_out]
    assert sorted(prompts, key=int) == [str(i) for i in range(40)]
    assert len(first.held_out) == 10
    assert first.held_out == again.held_out
    assert first.held_out != other.held_out


def test_a_text_is_cut_at_lines_without_loss_and_its_end_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(2000))
    found = read(write(tmp_path, text, "book.txt"))
    assert found.packed
    assert "".join(r["text"] for r in found.train + found.held_out) == text
    assert found.held_out[-1]["text"].endswith("line 1999\n")
    assert all(r["text"].endswith("\n") for r in found.train)


def test_json_list_and_byte_order_mark_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "P", "completion": "C"}] * 4
    found = read(write(tmp_path, "\ufeff" + json.dumps(rows), "data.json"))
    assert len(found.train) + len(found.held_out) == 4


def test_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    row = '{"prompt": "a\u2028b", "completion": "c"}\n'
    assert read(write(tmp_path, row * 4)).train[0]["prompt"] == "a\u2028b"


def test_records_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"question": "Q", "answer": a} for a in ("A", " ", "B", "", "C", "D")]
    found = read(write(tmp_path, rows))
    assert found.skipped_empty == 2
    assert len(found.train) + len(found.held_out) == 4


def test_separate_held_out_file(tmp_path: Path) -> None:
    source = write(tmp_path, [{"prompt": "P", "completion": "C"}] * 3)
    held_out = write(tmp_path, [{"prompt": "E", "completion": "C"}] * 5, "eval.jsonl")
    found = read(source, eval_source=held_out, max_eval_samples=4)
    assert len(found.train) == 3
    assert found.held_out == [{"prompt": "E", "completion": "C"}] * 4
    assert found.fingerprint != read(source).fingerprint


def test_datasets_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = "".join(json.dumps({"question": str(i), "answer": "A"}) + "\n" for i in range(8))
    (folder / "train.jsonl").write_text(rows)
    found = read(str(folder))
    assert len(found.train) == 6
    assert found.train[0]["completion"] == " A"


GOOD = '{"prompt": "P", "completion": "C"}\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (GOOD + "{not json}\n", "line 2 is not JSON"),
        (GOOD + "\n" + GOOD + "plain words\n", "line 4 is not JSON"),
        (GOOD + "[1, 2]\n", "line 2 is a JSON list"),
        ('"word"\n', "line 1 is a JSON string"),
        ('{"q": "Q", "a": "A"}\n', "found q, a; accepted are messages; prompt + completion"),
        ("{}\n", "found none"),
        (GOOD + '{"text": "T"}\n', "line 2 holds a text record, but"),
        ('{"prompt": "P", "completion": 3}\n', "field 'completion' is a JSON number"),
        ('{"prompt": "P", "completion": {"text": "C"}}\n', "field 'completion' is a JSON object"),
        ('{"prompt": "P", "completion": ""}\n' * 3, "all 3 records have an empty answer"),
        (GOOD, "only 1 usable record"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "no chat template"),
        ("[1, 2", "line 1 is not valid JSON"),
        ('{"question": null, "answer": "A"}\n', "line 1: field 'question' is null"),
        ('{"question": "Q", "answer": null}\n' * 3, "all 3 records have an empty answer"),
        ('{"conversations": [{"from": "human", "value": "x"}]}\n', "name conversations `messages`"),
        (GOOD + '{"prompt": "P", "completion": "a\\ud83d"}\n', "line 2: field 'completion' holds half of a surrogate"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        read(write(tmp_path, text))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "must be a list"),
        ([{"role": "user"}], "must be a list"),
        ([{"role": "user", "content": None}], "must be a list"),
        ([{"role": "user", "content": "never answered"}], "nothing to learn"),
        (
            [{"role": "human", "content": "Q"}, {"role": "gpt", "content": "A"}],
            r"line 1: no message has the role 'assistant', but there is 'human', 'gpt'; expected",
        ),
        ([{"role": "user", "content": "a\ud83d"}], "line 1: message 1 holds half of a surrogate"),
    ],
)
def test_bad_messages(tmp_path: Path, messages: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read(write(tmp_path, [{"messages": messages}]), chat=True)


def test_binary_file_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="not UTF-8"):
        read(str(tmp_path / "x.jsonl"))
    with pytest.raises(UserError, match="does not exist"):
        read(str(tmp_path / "nothing.jsonl"))


def test_mixed_forms_of_train_and_eval(tmp_path: Path) -> None:
    source = write(tmp_path, GOOD * 4)
    with pytest.raises(UserError, match="same form"):
        read(source, eval_source=write(tmp_path, "some text\n" * 9, "eval.txt"))


def test_an_answer_that_is_null_is_left_out_and_counted(tmp_path: Path) -> None:
    found = read(write(tmp_path, [{"question": "Q", "answer": a} for a in ("A", None, "B", "C")]))
    assert found.skipped_empty == 1
    assert [str(loss) for loss in found.losses] == ["warning: 1 of 4 records are left out: they have no answer"]


@pytest.mark.parametrize("kind", ["jsonl.gz", "txt.gz", "csv", "parquet"])
def test_other_kinds_of_files(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Where is {i},\nsay?", "completion": "Hère"} for i in range(8)]
    path = tmp_path / f"data.{kind}"
    if kind.endswith("gz"):
        lines = [json.dumps(row) if kind == "jsonl.gz" else "a line of text\r" for row in rows]
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read(str(path))
    if kind == "txt.gz":
        assert found.packed
    else:
        assert sorted(map(str, found.train + found.held_out)) == sorted(map(str, rows))
    path.write_bytes(path.read_bytes()[:-30] + b"\xff\0")
    with pytest.raises(UserError, match=f"data.{kind}"):
        read(str(path))
    with pytest.raises(UserError, match="does not exist"):
        read(str(tmp_path / f"absent.{kind}"))


def test_csv_lines_that_do_not_fit_the_header(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 3 has more fields than the first line names"):
        read(write(tmp_path, "prompt,completion\nP,C\nP,C,D\n", "data.csv"))


@pytest.mark.parametrize("text", ["word " * 4000, "x" * 20000, "word " * 100], ids=["words", "one word", "short"])
def test_a_text_of_one_line_is_cut_without_loss(text: str, tmp_path: Path) -> None:
    found = read(write(tmp_path, text, "book.txt"))
    assert "".join(r["text"] for r in found.train + found.held_out) == text
    if " " in text:
        assert all(r["text"].endswith(" ") for r in found.train)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [{"question": "Q", "answer": "A", "context": "a long story", "id": "5a"}] * 8,
            "warning: 8 of 8 records have a field 'context', which is not used",
        ),
        (
            [{"question": str(i), "answer": "A", "remark": "one of many" if i == 3 else ""} for i in range(40)],
            "note: 1 of 40 records have a field 'remark', which is not used",
        ),
        (
            [
                {
                    "messages": [
                        message(USER, str(i)),
                        {"role": ASSISTANT, "content": "let me see", "tool_calls": [{"name": "look"}]},
                    ]
                }
                for i in range(8)
            ],
            "warning: 8 of 8 records have a field 'messages: tool_calls', which is not used",
        ),
        (
            [{"prompt": "P", "completion": "C"}] * 8,
            "warning: 2 of 2 held-out records are trained on too, so they prove nothing",
        ),
        (
            [{"question": "Q", "answer": "A", "context": "巴黎是法国的首都", "id": "5a"}] * 8,
            "warning: 8 of 8 records have a field 'context', which is not used",
        ),
        (
            [{"question": "Q", "answer": "A", "Context": "France", "topic": "France"}] * 8,
            "warning: 8 of 8 records have a field 'Context', which is not used",
        ),
        (
            [{"question": "Q", "answer": "A", "notes": "กรุงเทพเป็นเมืองหลวง"}] * 8,
            "warning: 8 of 8 records have a field 'notes', which is not used",
        ),
        (
            [
                {"messages": [message(ASSISTANT, "Hello."), message(USER, str(i)), message(ASSISTANT, "!")]}
                for i in range(8)
            ],
            "warning: 8 of 8 conversations open with a turn of the assistant, which is not trained on",
        ),
        ([{"prompt": str(i), "completion": "C"} for i in range(8)], None),
        ([{"instruction": str(i), "input": "two words", "output": "O", "category": "x"} for i in range(8)], None),
    ],
    ids=["context", "remark", "tools", "duplicates", "chinese", "one word", "thai", "opening", "nothing", "alpaca"],
)
def test_what_is_not_used_is_said(rows: list, says: str | None, tmp_path: Path) -> None:
    found = read(write(tmp_path, rows), chat="messages" in rows[0])
    assert (says in [str(loss) for loss in found.losses]) if says else not found.losses


@pytest.mark.parametrize("kind", ["records", "conversations", "text"])
def test_no_more_is_held_out_than_is_evaluated(kind: str, tmp_path: Path) -> None:
    """What --max-eval-samples cuts off is trained on; where that cannot be, it is said how much is lost."""
    turns = 3 if kind == "conversations" else 1
    rows: Any = [{"prompt": str(i), "completion": "C"} for i in range(40)]
    if kind == "conversations":
        rows = [{"messages": [message(USER, str(i)), message(ASSISTANT, "C")] * turns} for i in range(40)]
    if kind == "text":
        rows = "".join(f"line {i}\n" for i in range(400))
    source = write(tmp_path, rows, "book.txt" if kind == "text" else "data.jsonl")
    everything = read(source, chat=True, eval_fraction=0.5)
    cut = read(source, chat=True, eval_fraction=0.5, max_eval_samples=7)
    total = len(everything.train) + len(everything.held_out)
    assert len(cut.held_out) == 7 // turns * turns
    assert len(cut.train) == total - len(cut.held_out)
    assert not cut.losses
    if turns > 1:
        cut = read(source, chat=True, max_eval_samples=2)
        assert (len(cut.held_out), len(cut.train)) == (2, total - 3)
    else:
        cut = read(source, eval_source=source, max_eval_samples=2)
        assert (len(cut.held_out), len(cut.train)) == (2, total)
    lost = total - 2 if turns == 1 else 1
    assert str(cut.losses[0]).endswith(
        f"{lost} of {lost + 2} held-out records are beyond the 2 of --max-eval-samples: not used"
    )


@pytest.mark.parametrize("form", ["prompt", "chat", "text", "merging"])
def test_tokens_are_those_that_trl_would_make(form: str, small_model, tmp_path: Path, monkeypatch) -> None:
    """TRL's own preparation of the same records is the oracle: input ids, labels, cutting and leaving out."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(small_model("qwen2", chat=True))
    rows: list[dict[str, Any]] = {
        "prompt": [{"prompt": "p " * (i % 30), "completion": f" argument {i}"} for i in range(40)],
        "chat": [
            {"messages": [message(USER, "u " * (i % 30)), message(ASSISTANT, f"It is {i}."), message(USER, "?"),
                          message(ASSISTANT, "Yes.")]}
            for i in range(20)
        ],
        "text": [{"text": f"line {i}\n" * (i + 1)} for i in range(8)],
        "merging": [{"prompt": "the arg", "completion": "ument"}, {"prompt": "a", "completion": "rgument<|end|>"}] * 3,
    }[form]  # fmt: skip
    records = read(write(tmp_path, rows), chat=True).train
    monkeypatch.setattr(data, "TOKENIZED_AT_ONCE", 7)
    found, cut = data.fit(data.tokenize(records, tokenizer), 24 if form != "text" else 10_000)

    kind = "text" if form == "text" else "completion"
    arguments = SFTConfig(output_dir=str(tmp_path), max_length=24 if form != "text" else None, use_cpu=True)
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=kind == "completion")
    oracle = SFTTrainer._prepare_dataset(
        trainer, datasets.Dataset.from_list(records), tokenizer, arguments, False, None, "train"
    )
    assert [row["input_ids"].tolist() for row in found] == list(oracle["input_ids"])
    assert [row["labels"].tolist() for row in found] == list(oracle["labels"])
    if form in ("prompt", "chat"):
        assert 0 < cut <= len(found) < len(records)


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(small_model, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model("qwen2", chat=True))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    good = [message(USER, "u"), message(ASSISTANT, "a")]
    source = write(tmp_path, [{"messages": good}] * 4 + [{"messages": [message("system", "s"), *good]}])
    found = read(source, chat=True, eval_fraction=0.01)
    with pytest.raises(UserError, match=r"line 5: .* \(roles system, user, assistant\): System role not supported"):
        data.tokenize(found.train + found.held_out, tokenizer)
