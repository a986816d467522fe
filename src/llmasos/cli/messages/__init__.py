"""What the command line says, one table per language with the same keys. `t` looks a message up."""

from __future__ import annotations

import importlib
from typing import Any

from llmasos.errors import LLMasOSError
from llmasos.settings import settings

LANGUAGES = ("en", "zh")


def language() -> str:
    """The language of the settings; English while they cannot be read, because their error must be said too."""
    try:
        return settings().lang
    except LLMasOSError:
        return "en"


def table(lang: str) -> dict[str, str]:
    found: dict[str, str] = importlib.import_module(f"llmasos.cli.messages.{lang}").MESSAGES
    return found


def t(key: str, **values: Any) -> str:
    """The message `key` in the user's language, with `{names}` filled in."""
    return table(language())[key].format(**values)


def has(key: str) -> bool:
    return key in table(language())
