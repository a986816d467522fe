"""The card of a model: `llmasos.json` beside its files says what it is, where it came from and its hashes."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llmasos.errors import FormatError, InvalidInputError, NotFoundError

CARD_NAME = "llmasos.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,127}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}


def stays_inside(path: str) -> bool:
    """Whether `path` lies in the folder it is put in, on every platform."""
    return not any(mark in path for mark in "\\:\0") and not any(part in ("", ".", "..") for part in path.split("/"))


class CardFile(BaseModel):
    """One file: `path` relative to the model's folder with `/`, `size` in bytes, hex SHA-256."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    path: str
    size: int
    sha256: str
    linked_from: str | None = None

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        if not stays_inside(path):
            raise ValueError(f"the path {path!r} points outside the model's folder")
        return path


class Upstream(BaseModel):
    """Who made the weights: the repository and, where known, the exact revision."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    repo: str | None = None
    revision: str | None = None
    url: str | None = None


class DataHash(BaseModel):
    """Something that a model learnt from: `ref` as it was named; `digest`: the SHA-256 of a file, the revision of a
    dataset of the hub."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    ref: str
    digest: str


class Lineage(BaseModel):
    """How a model was trained here: from which one (None: from scratch), by which run, at which step, on what."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    run: str
    method: str
    tuning: str
    base: str | None = None
    step: int
    data: list[DataHash] = Field(default_factory=list)
    version: str = ""
    """Of LLMasOS."""


class Card(BaseModel):
    """What the library knows of one model, or of an adapter (`kind`) of the model `base`. `serves_as`: the name under
    which it is served, where that can be no folder's. `error` is set instead of the facts when the card on disk is
    damaged."""

    model_config = ConfigDict(extra="ignore")
    name: str
    kind: Literal["model", "adapter"] = "model"
    base: str | None = None
    serves_as: str | None = None
    lineage: Lineage | None = None
    format: Literal["safetensors", "gguf"] | None = None
    architecture: str | None = None
    family: str | None = None
    use: str | None = None
    source: str = ""
    upstream: Upstream = Upstream()
    licence: str | None = None
    files: list[CardFile] = Field(default_factory=list)
    notice: str | None = None
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    error: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


def check_name(name: str) -> str:
    """`name` if it can be a folder in the library on every platform; InvalidInputError otherwise."""
    if not _NAME.fullmatch(name) or name.endswith(".") or name.split(".")[0].lower() in _RESERVED:
        raise InvalidInputError(
            f"{name!r} cannot be the name of a model.",
            hint="Use letters, digits and . _ + @ -, starting with a letter or digit, at most 128 characters.",
            param="name",
        )
    return name


def tidy_name(text: str) -> str:
    """The nearest allowed name to `text`."""
    return check_name(re.sub(r"[^A-Za-z0-9._+@-]+", "-", text).strip("-._+@")[:128].rstrip("."))


def read_card(folder: Path) -> Card:
    """The card in `folder`. The folder's own name counts, so a renamed folder is a renamed model.

    Raises NotFoundError without a card and FormatError for a damaged one.
    """
    path = folder / CARD_NAME
    try:
        card = Card.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{folder} has no {CARD_NAME}.", hint="`llmasos import` adds a model folder.") from None
    except (OSError, ValidationError) as e:
        reason = e.errors()[0]["msg"] if isinstance(e, ValidationError) else str(e)
        raise FormatError(
            f"{path} is damaged: {reason}.", hint=f"`llmasos rm {folder.name}` and pull the model again."
        ) from e
    return card.model_copy(update={"name": folder.name, "error": None})


def is_of_run(folder: Path, card: Card) -> bool:
    """Whether what lies in `folder` was made by the run that `card` tells of."""
    return card.lineage is not None and is_by(folder, card.lineage.run)


def is_by(folder: Path, run: str) -> bool:
    """Whether what lies in `folder` was made by `run`, as its card calls it."""
    try:
        before = read_card(folder).lineage
    except (NotFoundError, FormatError):
        return False
    return before is not None and before.run == run


def write_card(folder: Path, card: Card) -> None:
    text = card.model_dump_json(indent=2, exclude={"error"}, exclude_none=True)
    (folder / CARD_NAME).write_text(text + "\n", encoding="utf-8")
