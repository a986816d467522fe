"""Rows of every form become the same conversations; bad rows are refused with field and value, never with a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.data import SCHEMAS, RowError, open_dataset
from llmasos.data.schemas import Example, detect, read, schema_of
from llmasos.errors import FormatError, InvalidInputError

ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Hello."}
CHAT = [ASKED, SAID]
KIND = {"system": "Be kind."}
SYSTEM = {"role": "system", "content": "Be kind."}


def example(row: dict[str, Any]) -> Example:
    return read(detect(row), row, "f:1")


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("messages", {"messages": CHAT}, CHAT),
        ("messages", {"messages": json.dumps(CHAT)}, CHAT),
        ("messages", {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, CHAT),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], **KIND},
            [SYSTEM, *CHAT],
        ),
        ("sharegpt", {"conversations": CHAT, "tools": "[]"}, CHAT),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello."}, CHAT),
        (
            "alpaca",
            {"instruction": "Hi", "input": "you", "output": "Hello.", "history": [["Hi", "Hello."]], **KIND},
            [SYSTEM, *CHAT, {"role": "user", "content": "Hi\n\nyou"}, SAID],
        ),
        ("completion", {"prompt": "Hi", "completion": "Hello."}, CHAT),
        ("completion", {"question": "Hi", "answer": "Hello."}, CHAT),
        ("completion", {"prompt": [ASKED], "completion": [SAID]}, CHAT),
        ("kto", {"prompt": "Hi", "completion": "Hello.", "label": True}, CHAT),
        ("reward", {"prompt": "Hi", "completion": "Hello.", "score": 0.5}, CHAT),
        ("reward", {"messages": CHAT, "score": "1"}, CHAT),
        ("preference", {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}, CHAT),
        ("preference", {"prompt": [ASKED], "chosen": CHAT, "rejected": [ASKED, {**SAID, "content": "Go."}]}, CHAT),
        ("preference", {"chosen": CHAT, "rejected": [ASKED, {**SAID, "content": "Go."}]}, CHAT),
    ],
)  # fmt: skip
def test_every_form_is_known_by_its_columns(name: str, row: dict[str, Any], messages: list[Any]) -> None:
    assert detect(row).name == name
    found = example(row)
    assert found.messages == messages
    assert (found.label is True, found.score is not None) == (name == "kto", name == "reward")
    if name == "preference":
        assert found.rejected == [ASKED, {**SAID, "content": "Go."}]


def test_calls_of_functions_become_tool_calls() -> None:
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
    ]
    found = example({"conversations": turns, "tools": '[{"name": "f"}]'})
    assert [one["role"] for one in found.messages] == ["user", "assistant", "tool"]
    assert found.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert found.tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": None}, "messages is empty"),
        ({"messages": 5}, "messages is a int, not a list: 5"),
        ({"messages": "hello"}, "messages is text and no JSON list: 'hello'"),
        ({"messages": ["hi"]}, r"messages\[0\] is a str, not an object with role and content: 'hi'"),
        ({"messages": [ASKED]}, "messages has no message of the assistant, so there is nothing to learn"),
        ({"messages": [ASKED, {"role": "usr", "content": "x"}]}, r"messages\[1\].role is none of .*: 'usr'"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\].role is missing"),
        ({"messages": [ASKED, {"role": "assistant"}]}, r"messages\[1\] has no content"),
        ({"messages": [ASKED, {"role": "assistant", "content": 3}]}, r"messages\[1\] has content of type int"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, r"conversations\[0\].value is a int, not text: 3"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, r"value is no call .*: 'f\(x\)'"),
        ({"text": 7}, "text is a int, not text: 7"),
        ({"text": None}, "text is null"),
        ({"text": "  "}, "text is empty"),
        ({"instruction": "a", "output": ""}, "output is empty"),
        ({"instruction": "a", "output": "b", "history": [1]}, r"history\[0\] is no pair of texts: 1"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "label is neither true nor false: 'good'"),
        ({"prompt": "a", "completion": "b", "score": "good"}, "score is no number: 'good'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen is the same as rejected"),
        ({"messages": CHAT, "tools": "f"}, "tools is text and no JSON list: 'f'"),
        ({"a": 1, "b": 2}, r"the columns \(a, b\) are of no known schema"),
    ],
)
def test_what_is_wrong_is_said_with_field_and_value(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        example(row)


def test_a_later_row_of_another_form_is_wrong_and_has_its_place() -> None:
    with pytest.raises(RowError, match=r"^d/f\.jsonl:9: messages is missing; the row has text") as caught:
        read(SCHEMAS["messages"], {"text": "x"}, "d/f.jsonl:9")
    assert (caught.value.where, caught.value.field) == ("d/f.jsonl:9", "messages")


def test_the_schema_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [], "score": 1}\n')
    [file] = open_dataset(tmp_path / "a.jsonl")
    assert schema_of(file).name == "reward" and schema_of(file, "messages").name == "messages"
    with pytest.raises(InvalidInputError, match="no schema 'chats'"):
        schema_of(file, "chats")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(FormatError, match="has no rows"):
        schema_of(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    "messages conversations text prompt completion chosen rejected label score tools instruction output history system"
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={name: JSON | st.sampled_from(["user", "assistant", "gpt", "x"]) for name in
                  ("role", "content", "from", "value", "tool_calls")},
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(NAMES.split()), JSON | st.lists(MESSAGE, max_size=3), max_size=5))
def test_any_row_is_an_example_or_an_error_with_its_place(row: dict[str, Any]) -> None:
    for schema in SCHEMAS.values():
        try:
            found = read(schema, row, "f.jsonl:3")
        except RowError as e:
            assert e.message.startswith("f.jsonl:3: ") and e.where == "f.jsonl:3"
        else:
            assert found.kind == schema.kind
