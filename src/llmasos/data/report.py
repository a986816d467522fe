"""What a dataset is, and what is wrong with it: every row is looked at, and some are tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmasos.data.masks import Masker
from llmasos.data.readers import Columns, DataFile, open_dataset
from llmasos.data.schemas import Example, RowError, read, schema_of
from llmasos.errors import LLMasOSError
from llmasos.text import Tokenizer

MOST_PROBLEMS = 20
MOST_MEASURED = 2000
"""Rows of a file that are tokenised, for the lengths: every row, then every second of all, and so on."""


@dataclass(frozen=True)
class Problem:
    where: str
    what: str
    hint: str = ""


@dataclass
class Report:
    """Of one file."""

    file: str
    schema: str = ""
    kind: str = ""
    num_rows: int = 0
    num_bad: int = 0
    num_messages: int = 0
    roles: Counter[str] = field(default_factory=Counter)
    num_chars: int = 0
    problems: list[Problem] = field(default_factory=list)
    """The first ones."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of the measured rows, in ascending order."""
    num_trained: int = 0
    """Tokens that are trained in them."""

    @property
    def is_good(self) -> bool:
        return not self.num_bad and not self.problems and self.num_rows > 0

    def quantile(self, share: float) -> int:
        return self.lengths[min(int(share * len(self.lengths)), len(self.lengths) - 1)] if self.lengths else 0

    def histogram(self) -> list[tuple[int, int]]:
        """Upper bounds, powers of two, and how many rows have as many tokens and more than the bound before."""
        counts = Counter(max(8, 1 << (length - 1).bit_length()) for length in self.lengths)
        return [(bound, counts[bound]) for bound in _bounds(counts)]

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self) | {"roles": dict(self.roles), "histogram": self.histogram(), "is_good": self.is_good}
        lengths = {str(share): self.quantile(share) for share in (0.5, 0.9, 0.99, 1.0)} if self.lengths else {}
        return facts | {"lengths": lengths, "num_measured": len(self.lengths)}


def validate(
    ref: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    schema: str | None = None,
    columns: Columns = None,
    template: str | None = None,
) -> list[Report]:
    """A report on each file of the dataset. What is wrong with rows stands in it; raises only what opening raises."""
    masker = Masker(tokenizer, template=template) if tokenizer else None
    return [_of_file(file, masker, schema) for file in open_dataset(ref, columns=columns)]


def _of_file(file: DataFile, masker: Masker | None, wanted: str | None) -> Report:
    report = Report(file.name)
    step = 1
    measured: list[tuple[int, int]] = []
    try:
        schema = schema_of(file, wanted)
        report.schema, report.kind = schema.name, schema.kind
        for line, raw in file.raw():
            where = f"{file.name}:{line}"
            report.num_rows += 1
            try:
                example = read(schema, file.fields(line, raw), where)
                _count(report, example)
                if masker and example.kind in ("text", "chat") and not report.num_rows % step:
                    measured += _measured(masker, example, where)
                    if len(measured) >= 2 * MOST_MEASURED:
                        measured, step = measured[::2], step * 2
            except LLMasOSError as e:
                report.num_bad += 1
                _note(report, e)
    except LLMasOSError as e:  # the file cannot be read on
        _note(report, e)
    report.lengths = sorted(length for length, _ in measured)
    report.num_trained = sum(num for _, num in measured)
    return report


def _measured(masker: Masker, example: Example, where: str) -> Sequence[tuple[int, int]]:
    try:
        return [(len(sample.tokens), int(sample.trained.sum())) for sample in masker(example)]
    except RowError as e:
        raise e.at(where) from None


def _count(report: Report, example: Example) -> None:
    report.num_messages += len(example.messages)
    report.roles.update(message["role"] for message in example.messages)
    contents = (message.get("content") for message in example.messages)
    report.num_chars += len(example.text) + sum(len(content) for content in contents if isinstance(content, str))


def _note(report: Report, e: LLMasOSError) -> None:
    if len(report.problems) < MOST_PROBLEMS:
        where = getattr(e, "where", "")
        report.problems.append(Problem(where, e.message.removeprefix(f"{where}: "), e.hint))


def _bounds(counts: Counter[int]) -> list[int]:
    found, bound = [], min(counts, default=0)
    while counts and bound <= max(counts):
        found.append(bound)
        bound *= 2
    return found
