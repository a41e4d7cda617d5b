"""Reading training data: every accepted form, and one clear sentence for what cannot be used."""

import json
from pathlib import Path

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
        ('{"prompt": "P", "completion": ""}\n' * 3, "all 3 records have an empty answer"),
        (GOOD, "only 1 usable record"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "no chat template"),
        ("[1, 2", "line 1 is not valid JSON"),
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
