"""`llmasos data`: what a dataset is and what is wrong with it, what a batch looks like, a tokenizer of one's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmasos.cli.messages import t
from llmasos.cli.render import emit, pairs, say, size, working
from llmasos.errors import FormatError, InvalidInputError

if TYPE_CHECKING:
    from llmasos.data import Batch, Report
    from llmasos.text import Tokenizer

_BAR = 40


def data(
    action: Literal["validate", "inspect", "tokenizer"],
    /,
    *refs: str,
    model: str | None = None,
    schema: str | None = None,
    columns: str | None = None,
    template: str | None = None,
    max_length: int = 2048,
    vocab_size: int = 32_768,
    output: str | None = None,
    json: bool = False,
) -> int | None:
    """`llmasos data ACTION DATA...`. Exit code 4 after `validate` of data with something wrong."""
    if not refs:
        raise InvalidInputError(t("data.none"), hint=f"llmasos data {action} FILE", param="data")
    if action == "validate":
        return _validate(refs, model, schema, columns, template, json)
    if action == "inspect":
        inspect_batch(refs, model, schema=schema, columns=columns, template=template, max_length=max_length)
    else:
        _train_tokenizer(refs, vocab_size, schema, columns, output, json)
    return None


def inspect_batch(
    refs: tuple[str, ...],
    model: str | None,
    *,
    schema: str | None = None,
    columns: str | None = None,
    template: str | None = None,
    max_length: int = 2048,
) -> None:
    """Print the first batch of these data."""
    from llmasos.data import Batches, parse_columns

    if model is None:
        raise InvalidInputError(t("data.no_model"), hint="llmasos data inspect FILE --model NAME", param="model")
    tokenizer = _tokenizer(model)
    batches = Batches(
        refs,
        tokenizer,
        max_length=max_length,
        schema=schema,
        columns=parse_columns(columns) if columns else None,
        template=_template(template),
        prefetch=0,
    )
    with working(t("data.tokenising")):
        batch = next(iter(batches))
    print_batch(batch, tokenizer)


def print_batch(batch: Batch, tokenizer: Tokenizer) -> None:
    from llmasos.data import show_batch

    if colour := sys.stdout.isatty():
        print(t("data.legend"))
    print(show_batch(batch, tokenizer, colour=colour))


def _validate(
    refs: tuple[str, ...],
    model: str | None,
    schema: str | None,
    columns: str | None,
    template: str | None,
    as_json: bool,
) -> int:
    from llmasos.data import parse_columns, validate

    tokenizer = _tokenizer(model) if model else None
    named = parse_columns(columns) if columns else None
    with working(t("data.reading")):
        reports = [
            report
            for ref in refs
            for report in validate(ref, tokenizer, schema=schema, columns=named, template=_template(template))
        ]
    if as_json:
        emit([report.to_dict() for report in reports])
    else:
        print("\n\n".join(map(_text, reports)))
    return 0 if all(report.is_good for report in reports) else FormatError.exit_code


def _text(report: Report) -> str:
    facts = [(t("data.file"), report.file)]
    if report.schema:
        facts.append((t("data.what"), f"{report.schema} ({report.kind})"))
    facts.append((t("data.rows"), f"{report.num_rows:,}"))
    if report.num_messages:
        roles = ", ".join(f"{role} {num:,}" for role, num in report.roles.most_common())
        facts.append((t("data.messages"), f"{report.num_messages:,} ({roles})"))
    facts.append((t("data.characters"), f"{report.num_chars:,}"))
    lines = []
    if report.lengths:
        shares = ", ".join(f"{name} {report.quantile(share):,}" for name, share in _SHARES)
        facts.append((t("data.tokens"), f"{shares} ({t('data.measured', count=f'{len(report.lengths):,}')})"))
        facts.append((t("data.trained"), f"{report.num_trained / max(1, sum(report.lengths)):.0%}"))
        most = max(num for _, num in report.histogram())
        for bound, num in report.histogram():
            bar = "█" * -(-num * _BAR // most)
            lines.append(f"  ≤ {bound:>7,} {bar} {num:,}")
    problems = []
    for problem in report.problems:
        problems.append(f"  {problem.where}: {problem.what}" if problem.where else f"  {problem.what}")
    hints = dict.fromkeys(f"  → {problem.hint}" for problem in report.problems if problem.hint)
    verdict = t("data.good") if report.is_good else t("data.bad", count=f"{max(report.num_bad, 1):,}")
    if report.num_bad > len(problems) > 0:
        problems.append(f"  … {report.num_bad - len(problems):,}")
    return "\n".join([pairs(facts), *lines, verdict, *problems, *hints])


_SHARES = (("50%", 0.5), ("90%", 0.9), ("99%", 0.99), ("max", 1.0))


def _train_tokenizer(
    refs: tuple[str, ...], vocab_size: int, schema: str | None, columns: str | None, output: str | None, as_json: bool
) -> None:
    from llmasos.data import parse_columns, train_tokenizer

    if output is None:
        raise InvalidInputError(t("data.no_output"), hint="llmasos data tokenizer FILE --output FOLDER", param="output")
    folder = Path(output).expanduser()
    if (folder / "tokenizer.json").exists():
        raise InvalidInputError(t("data.taken", folder=output), hint=t("data.other_folder"), param="output")
    with working(t("data.learning")):
        tokenizer = train_tokenizer(
            refs, vocab_size=vocab_size, schema=schema, columns=parse_columns(columns) if columns else None
        )
    tokenizer.save_pretrained(folder)
    if as_json:
        emit({"folder": str(folder), "vocab_size": tokenizer.vocab_size})
    else:
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        say(t("data.saved", folder=output, tokens=f"{tokenizer.vocab_size:,}", size=size(num_bytes)))


def _tokenizer(model: str) -> Tokenizer:
    """Of an installed model, a model's files, or a folder with nothing but a tokenizer."""
    from llmasos.store import ensure
    from llmasos.text import load_tokenizer

    folder = Path(model).expanduser()
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    return load_tokenizer(ensure(model))


def _template(template: str | None) -> str | None:
    """A file stands for the template in it."""
    if template and "{" not in template and Path(template).is_file():
        return Path(template).read_text(encoding="utf-8")
    return template
