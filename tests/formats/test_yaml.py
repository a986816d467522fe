"""Files of names and values; what they are refused for in runs and pipelines is tested there."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmasos.errors import FormatError
from llmasos.formats.yaml import MOST_REPEATED, read_yaml


def laughs(num: int) -> str:
    """2^num values, for who would count them."""
    return "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, num))


def read(tmp_path: Path, text: str, **options: Any) -> dict[str, Any]:
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    return read_yaml(file, like="a", **options)


def test_aliases_and_merges_are_read_and_repeat_so_much(tmp_path: Path) -> None:
    assert read(tmp_path, "a: &a {b: 1}\nc: {<<: *a, d: *a}\n")["c"] == {"b": 1, "d": {"b": 1}}
    assert read(tmp_path, laughs(8))["a7"]["y"]["x"]["x"] is not None
    with pytest.raises(FormatError, match="repeat more than 100,000 values"):
        read(tmp_path, laughs(60))
    rows = "".join(f"- {i}\n" for i in range(2 * MOST_REPEATED // 10))
    assert len(read(tmp_path, f"a:\n{rows}b:\n{rows}")["b"]) == 2 * MOST_REPEATED // 10, "what is written out is not"


@pytest.mark.parametrize("text", ["a: &a {b: 1, c: *a}", "a: &a [*a]", "a: &a [[{b: *a}]]", "&a b: *a"])
def test_what_would_stand_inside_of_itself_is_refused(text: str, tmp_path: Path) -> None:
    if text.startswith("&"):  # of the key alone
        assert read(tmp_path, text) == {"b": "b"}
        return
    with pytest.raises(FormatError, match="an alias stands inside of what it names"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "a twice: in line 1 and in line 3"),
        ("yes: 1\ntrue: 2", "true twice"),
        ("1: a\n0x1: b", "0x1 twice"),
        ("~: a\nnull: b", "null twice"),
        ("x: [{a: 1}, {b: 1,\n b: 2}]", r"x\[1\].b twice: in line 1 and in line 2"),
        ("a: {<<: {b: 1, b: 2}}", "a.<<.b twice"),
        ("x: &x {a: 1}\ny: {<<: *x, <<: *x}", "y.<< twice"),
    ],
)
def test_a_name_is_said_once_whatever_it_looks_like(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=said):
        read(tmp_path, text)


def test_dots_join_names_only_where_they_do(tmp_path: Path) -> None:
    for text in ('{"a.b": 1, "a": {"b": 2}}', "1: a\n'1': b", '{"a[0].b": 1, "a": [{"b": 2}]}'):
        assert read(tmp_path, text) == yaml.safe_load(text)
    with pytest.raises(FormatError, match=r"a\.b twice: in line 1 and in line 2"):
        read(tmp_path, "a.b: 1\na: {c: 3, b: 2}", is_dotted=True)
    assert read(tmp_path, "a.b: 1\na.c: 2\na: {d: 3}", is_dotted=True) == {"a.b": 1, "a.c": 2, "a": {"d": 3}}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000, "a: " + "[" * 5000 + "]" * 5000, "a: b: c", "? [a]\n: b\n? {c: 1}\n: 2", "a: 1\n---\nb: 2",
        "a: 2024-13-45", "a: 0x_", "a: !!int x", "a: !!bool x", "a: !!timestamp x", "a: " + "1" * 5000,
        "a: 2024-01-01 00:00:00 +99:00", 'a: "\\UFFFFFFFF"', "<<: 3", "a: !!python/name:os.system",
    ],
)  # fmt: skip
def test_what_is_no_yaml_is_told(text: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not valid YAML"):
        read(tmp_path, text)


def test_a_value_that_is_none_of_its_kind_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"(?s)'2024-13-45' is no timestamp.*line 2, column 7"):
        read(tmp_path, "a: 1\nseed: 2024-13-45")


@given(st.text("ab:{}[],&*<! \n-.?|\"'#~0x_", max_size=40) | st.binary(max_size=40))
def test_any_file_is_read_as_yaml_reads_it_or_refused(tmp_path: Path, text: str | bytes) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    try:
        found = read_yaml(file, like="a")
    except FormatError:
        return
    assert found == yaml.safe_load(file.read_text(encoding="utf-8"))
