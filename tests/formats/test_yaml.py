"""Files of names and values; what they are refused for in runs and pipelines is tested there."""

from pathlib import Path

import pytest

from llmasos.errors import FormatError
from llmasos.formats.yaml import read_yaml

LAUGHS = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 60))


def test_what_is_used_in_many_places_is_looked_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(LAUGHS)  # 2^59 values, for who would count them
    assert read_yaml(file, like="a")["a59"]["y"]["x"]["x"] is not None
    file.write_text("a: &a {b: 1, c: *a}\n")
    assert read_yaml(file, like="a")["a"]["b"] == 1


@pytest.mark.parametrize("text", ["[" * 5000, "a: " + "[" * 5000 + "]" * 5000, "a: b: c", "? [a]\n: b\n? {c: 1}\n: 2"])
def test_what_is_no_yaml_is_told(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(FormatError, match="is not valid YAML"):
        read_yaml(file, like="a")
