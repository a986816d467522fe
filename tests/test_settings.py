"""Settings: where a value comes from, and that a wrong one is an error which names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmasos.errors import InvalidInputError
from llmasos.settings import Settings


def read(home: Path, config: str = "", **environ: str) -> Settings:
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(config, encoding="utf-8")
    return Settings.read({"LLMASOS_HOME": str(home), **environ})


def test_the_environment_goes_before_the_file_and_the_file_before_the_default(home: Path) -> None:
    assert read(home).threads == 0
    assert read(home, "threads = 3").threads == 3
    assert read(home, "threads = 3", LLMASOS_THREADS="2").threads == 2
    assert read(home, "offline = true").offline and not read(home, "offline = true", LLMASOS_OFFLINE="0").offline


def test_an_empty_value_is_as_if_it_were_not_set(home: Path) -> None:
    found = read(home, 'log_level = ""\nlang = ""\ndtype = ""', LLMASOS_LOG_LEVEL="", LANG="zh_CN.UTF-8")
    assert (found.log_level, found.lang, found.dtype) == ("warning", "zh", "auto")


def test_words_with_choices_are_read_in_any_case(home: Path) -> None:
    found = read(home, LLMASOS_LOG_LEVEL="DEBUG", LLMASOS_LANG="ZH")
    assert (found.log_level, found.lang) == ("debug", "zh")


@pytest.mark.parametrize(
    ("variable", "value", "hint"),
    [
        ("LLMASOS_LOG_LEVEL", "loud", "debug or info or warning or error"),
        ("LLMASOS_LANG", "xx", "en or zh"),
        ("LLMASOS_OFFLINE", "maybe", "LLMASOS_OFFLINE=1"),
        ("LLMASOS_THREADS", "many", "at least 0"),
        ("LLMASOS_THREADS", "-2", "at least 0"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_variable(home: Path, variable: str, value: str, hint: str) -> None:
    with pytest.raises(InvalidInputError, match=hint) as caught:
        read(home, **{variable: value})
    assert caught.value.param == variable and repr(value) in caught.value.message


@pytest.mark.parametrize("line", ["threads = 2.5", "threads = true", 'log_level = "loud"', "log_level = 3"])
def test_a_wrong_value_in_the_file_is_an_error_that_names_the_setting(home: Path, line: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read(home, line)
    assert caught.value.param == line.split()[0]
