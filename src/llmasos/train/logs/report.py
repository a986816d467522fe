"""report.html of a run: one file with curves, samples, options and data; light and dark, without scripts or requests.

write_report(folder)         of one run, from what it left (see `files`)
write_comparison(runs, path) curves of several runs in one picture
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from llmasos import __version__
from llmasos.train.events import Evaluation
from llmasos.train.logs.charts import Curve, Point, chart, smoothed
from llmasos.train.logs.runs import REPORT, Run, compare, fact_of, open_folder, plan_error
from llmasos.train.logs.watch import Watcher
from llmasos.train.logs.words import Words, amount, duration, number

T = TypeVar("T")
Drawn: TypeAlias = tuple[str, list[Curve], bool]
"""A figure's title and curves, and whether its values begin at zero."""
SHARE = 0.02
MOST_SAMPLES, MOST_ROWS = 40, 400
"""Evaluations whose answers, and rows of a table, that a report has; more of them are left out evenly."""
SUMMARY = (
    *("state", "method", "model", "steps", "first_loss", "last_loss", "best_loss", "bits_per_byte", "train_loss"),
    *("tokens", "trained_tokens", "time", "speed", "mfu", "memory", "weights", "trained_weights", "device", "started"),
    *("sessions", "reason"),
)
_STYLE = """
:root{color-scheme:light dark;--text:#1a1c20;--soft:#565c66;--page:#fff;--card:#f5f6f8;--edge:#d5d9e0;--line:#1f5fbf;
--dots:#a3460a;--raw:#9dbbe6;--r2:#23794a;--r3:#8338a8;--r4:#b3224f;--r5:#52606d}
@media(prefers-color-scheme:dark){:root{--text:#e7e9ee;--soft:#a5adba;--page:#15171b;--card:#1f2228;--edge:#3a404a;
--line:#7db2ff;--dots:#ffab6b;--raw:#3d5c8a;--r2:#6cd39b;--r3:#d3a0ee;--r4:#ff8fae;--r5:#b4c0cc}}
*{box-sizing:border-box}body{margin:0 auto;max-width:62rem;padding:1.5rem 1rem 3rem;background:var(--page);
color:var(--text);font:16px/1.5 system-ui,sans-serif}h1{font-size:1.6rem;margin:0 0 1rem}
h2{font-size:1.15rem;margin:2rem 0 .6rem}
h3{font-size:.9rem;margin:.6rem 0 0;color:var(--soft)}.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.3rem .6rem;border-bottom:1px solid var(--edge);
overflow-wrap:anywhere}th{font-weight:600;color:var(--soft)}td.n,th.n{text-align:right;
font-variant-numeric:tabular-nums;white-space:nowrap}.cards{display:grid;gap:.6rem;
grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));margin:0}.cards div{background:var(--card);
border:1px solid var(--edge);border-radius:.5rem;padding:.5rem .8rem}dt{color:var(--soft);font-size:.85rem}
dd{margin:0;font-weight:600;overflow-wrap:anywhere}figure{margin:0 0 1.4rem;overflow-x:auto}figcaption{font-weight:600}
svg{width:100%;min-width:30rem;height:auto;background:var(--card);border:1px solid var(--edge);border-radius:.5rem}
svg text{fill:var(--soft);font-size:12px}path{fill:none;stroke-width:2;vector-effect:non-scaling-stroke}
.grid{stroke:var(--edge);stroke-width:1}.raw{stroke:var(--raw);stroke-width:1}.line,.run0{stroke:var(--line)}
.dots,.run1{stroke:var(--dots);stroke-dasharray:6 3}.run2{stroke:var(--r2);stroke-dasharray:2 3}
.run3{stroke:var(--r3);stroke-dasharray:10 3}.run4{stroke:var(--r4);stroke-dasharray:8 3 2 3}.run5{stroke:var(--r5)}
circle{fill:var(--page);stroke-width:2;stroke-dasharray:none!important}.legend{display:flex;flex-wrap:wrap;gap:1.2rem;
list-style:none;margin:.3rem 0 0;padding:0;color:var(--soft)}.key{display:inline-block;width:1.8rem;height:0;
margin-right:.4rem;vertical-align:middle;border-top:3px solid var(--line)}.key.raw{border-color:var(--raw)}
.key.dots,.key.run1{border-top:3px dashed var(--dots)}.key.run2{border-top:3px dotted var(--r2)}
.key.run3{border-top:3px dashed var(--r3)}.key.run4{border-top:3px double var(--r4)}.key.run5{border-color:var(--r5)}
details{border:1px solid var(--edge);border-radius:.5rem;padding:.4rem .8rem;margin:.5rem 0}
summary{cursor:pointer;font-weight:600}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);
padding:.5rem .8rem;border-radius:.4rem;margin:.2rem 0 .8rem;font:14px/1.45 ui-monospace,monospace}
footer{color:var(--soft);margin-top:2.5rem;font-size:.85rem}
"""


class Report(Watcher):
    """Writes the report at the run's beginning and end, and at evaluations, but no more than SHARE of the time."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self._clock = folder, clock
        self._due = 0.0

    def began(self, step: int, num_steps: int) -> None:
        write_report(self.folder)

    def evaluated(self, evaluation: Evaluation) -> None:
        begin = self._clock()
        if begin >= self._due:
            write_report(self.folder)
            end = self._clock()
            self._due = end + (end - begin) / SHARE

    def ended(self, step: int, reason: str) -> None:
        write_report(self.folder)


def write_report(folder: Path, path: Path | None = None, *, language: str = "") -> Path:
    """Of the run in `folder`, by default as report.html in it; `language` "" is that of the settings."""
    return _write(path or folder / REPORT, report_of(open_folder(folder), Words(language)))


def write_comparison(runs: Sequence[Run], path: Path, *, language: str = "") -> Path:
    return _write(path, comparison_of(runs, Words(language)))


def _write(path: Path, text: str) -> Path:
    from llmasos.models.load import write_atomically

    write_atomically(path, text.encode("utf-8", "replace").decode())
    return path


def report_of(run: Run, words: Words) -> str:
    title = words("report.title", name=run.name)
    parts = [
        _cards((words(word), shown_fact(run, word, words)) for word in SUMMARY if shown_fact(run, word, words)),
        _section(words("report.curves"), _curves(run, words) or f"<p>{words('report.none')}</p>"),
        _section(words("report.evaluations"), _evaluations(run, words) or f"<p>{words('report.none')}</p>"),
        _section(words("report.samples"), _samples(run, words) or f"<p>{words('report.no_samples')}</p>"),
        _section(words("report.skipped"), _skipped(run, words)),
        _section(words("report.plan"), _plan(run, words)),
        _section(words("report.data"), _data(run, words)),
        _section(words("report.options"), _mapping(run.fact("config", {}), words)),
        _section(words("report.machine"), _mapping(_machine(run), words)),
    ]
    return _page(title, parts, words)


def comparison_of(runs: Sequence[Run], words: Words) -> str:
    found = compare(runs)
    heads = ["", *found.names]
    facts = [[words(word), *(shown_fact(run, word, words) or "–" for run in runs)] for word in found.facts]
    options = [[name, *(_text(value) for value in values)] for name, values in found.options.items()]
    losses = [[str(step), *map(number, values)] for step, values in spread([*found.losses.items()], MOST_ROWS)]
    drawn: list[Drawn] = [
        (title, [Curve(run.name, points(run), f"run{at % 6}") for at, run in enumerate(runs)], False)
        for title, points in (
            (f"{words('report.held_out')}: {words('report.loss')}", _held_out),
            (f"{words('report.training')}: {words('report.loss')}", _smooth_loss),
            (words("report.bits"), _bits),
        )
    ]
    parts = [
        _section(words("report.summary"), _table(heads, facts)),
        _section(words("report.curves"), _charts(drawn, words)),
        _section(words("report.evaluations"), _table([words("step"), *found.names], losses) if losses else ""),
        _section(words("report.options"), _table([words("name"), *found.names], options) if options else ""),
    ]
    return _page(" – ".join(found.names), parts, words)


def shown_fact(run: Run, word: str, words: Words) -> str:
    """A fact in the words of people; "" where it is not known."""
    if word == "reason":  # where the state does not say it
        return str(run.fact(word, "")) if run.state == "failed" else ""
    if word == "sessions":
        num = len(run.fact("sessions", []))
        return str(num) if num > 1 else ""
    if word in _FACTS:
        return _text(run.fact(_FACTS[word], ""))
    value = fact_of(run, word)
    if value is None:
        return ""
    match word:
        case "state":
            return words(f"ended.{value}")
        case "steps":
            return f"{value:,} / {run.fact('steps', 0):,}"
        case "time":
            return duration(value)
        case "memory":
            return amount(value)
        case "mfu":
            return f"{value:.1%}"
        case "tokens" | "weights" | "trained_weights":
            return f"{value:,}"
    return value if isinstance(value, str) else number(value)


_FACTS = {
    "method": "method",
    "model": "model.name",
    "trained_tokens": "measured.num_trained",
    "started": "created",
}


def _curves(run: Run, words: Words) -> str:
    loss = _points(run, "loss")
    of_parts = [name for name in run.metrics.names if name.startswith("loss.")]
    memory = [(x, y / 2**30) for x, y in _points(run, "memory")]
    training, held_out = words("report.training"), words("report.held_out")
    losses = [
        Curve(training, loss, "raw"),
        Curve(f"{training} ({words('report.smooth')})", smoothed(loss)),
        Curve(held_out, _held_out(run), "dots"),
    ]

    def one(title: str, points: Sequence[Point], kind: str = "line", *, from_zero: bool = False) -> Drawn:
        return title, [Curve(title, points, kind)], from_zero

    drawn: list[Drawn] = [
        (words("report.loss"), losses, False),
        one(words("report.bits"), _bits(run), "dots"),
        *(one(name, smoothed(_points(run, name))) for name in of_parts),
        one(words("report.rate"), _points(run, "rate"), from_zero=True),
        one(words("report.norm"), _points(run, "gradient_norm"), from_zero=True),
        one(words("report.speed"), smoothed(_points(run, "tokens_per_second")), from_zero=True),
        one("MFU", smoothed(_points(run, "mfu")), from_zero=True),
        one(words("report.memory"), memory, from_zero=True),
    ]
    return _charts(drawn, words)


def _charts(drawn: Sequence[Drawn], words: Words) -> str:
    found = []
    for i, (title, curves, from_zero) in enumerate(drawn):
        told = "; ".join(f"{curve.name}: {_range(curve.points, words)}" for curve in curves if curve.points)
        found.append(chart(f"c{i}", title, told, curves, from_zero=from_zero))
    return "\n".join(found)


def _range(points: Sequence[Point], words: Words) -> str:
    known = [(x, y) for x, y in points if y == y] or [(0.0, float("nan"))]
    (begin, first), (end, last) = known[0], known[-1]
    values = [y for _, y in known]
    ends = {"begin": f"{begin:.0f}", "first": number(first), "end": f"{end:.0f}", "last": number(last)}
    return words("report.range", **ends, least=number(min(values)), most=number(max(values)))


def _points(run: Run, name: str) -> list[Point]:
    return list(zip(run.metrics.numbers("step"), run.metrics.numbers(name), strict=True))


def _smooth_loss(run: Run) -> list[Point]:
    return smoothed(_points(run, "loss"))


def _held_out(run: Run) -> list[Point]:
    return [(one["step"], one["loss"]) for one in run.evaluations if one["loss"] is not None]


def _bits(run: Run) -> list[Point]:
    found = [(one["step"], one.get("bits_per_byte")) for one in run.evaluations]
    return [(step, bits) for step, bits in found if bits is not None]


def _evaluations(run: Run, words: Words) -> str:
    heads = [words("step"), words("loss"), words("bits_per_byte"), words("trained_tokens"), words("seconds")]
    rows = [
        (
            str(one["step"]),
            number(one["loss"]),
            number(one.get("bits_per_byte")),
            f"{one.get('num_tokens') or 0:,}",
            f"{one.get('seconds') or 0:.1f}",
        )
        for one in spread(run.evaluations, MOST_ROWS)
    ]
    return _table(heads, rows, numbers=True) if rows else ""


def _samples(run: Run, words: Words) -> str:
    """The last ones first, and open."""
    out: list[str] = []
    asked = [one for one in run.evaluations if one.get("samples")]
    for one in reversed(spread(asked, MOST_SAMPLES)):
        said = "".join(
            f"<h3>{words('report.prompt')}</h3><pre>{_html(each.get('prompt', ''))}</pre>"
            f"<h3>{words('report.answer')}</h3><pre>{_html(each.get('text', ''))}</pre>"
            for each in one["samples"]
        )
        after = words("report.after", step=f"{one['step']:,}")
        out.append(f"<details{'' if out else ' open'}><summary>{after}</summary>{said}</details>")
    return "\n".join(out)


def _skipped(run: Run, words: Words) -> str:
    rows = [[row["step"], row["skipped"]] for row in run.metrics.rows if row.get("skipped")]
    return _table([words("step"), words("reason")], spread(rows, MOST_ROWS)) if rows else ""


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, the first and the last too."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _plan(run: Run, words: Words) -> str:
    """What was predicted, what was measured, and how far off the prediction was."""
    plan = run.fact("plan", {})
    rows = [[name, amount(size), "–", "–"] for name, size in plan.get("parts", {}).items() if size]
    if memory := plan.get("memory"):
        rows.append([words("memory"), *_compared(memory, run.fact("measured.memory", 0), amount)])
    if seconds := plan.get("seconds"):
        took = [value for value in run.metrics.numbers("seconds") if value == value]
        rows.append([words("time"), *_compared(seconds, sum(took) if run.state == "finished" else 0, duration)])
    others = {name: value for name, value in plan.items() if name not in ("parts", "memory", "seconds", "available")}
    rows += [[name, _text(value), "–", "–"] for name, value in others.items() if value not in (None, "", [], {})]
    heads = [words("name"), words("report.planned"), words("report.measured"), words("report.off")]
    return _table(heads, rows) if rows else ""


def _compared(predicted: float, measured: float, shown: Callable[[Any], str]) -> list[str]:
    error = plan_error(predicted, measured)
    return [shown(predicted), shown(measured) if measured else "–", "–" if error is None else f"{error:+.1%}"]


def _data(run: Run, words: Words) -> str:
    heads = [words("file"), words("rows"), words("tokens"), words("hash")]
    rows = [
        [_text(one.get(name)) for name in ("file", "num_samples", "num_tokens", "digest")]
        for one in run.fact("data.files", [])
    ]
    return _table(heads, rows) if rows else ""


def _machine(run: Run) -> dict[str, Any]:
    return {**run.fact("device", {}), **run.fact("versions", {}), "git": run.fact("git.commit")}


def _mapping(values: Mapping[str, Any], words: Words) -> str:
    rows = [[name, _text(value)] for name, value in values.items() if value not in (None, "", [], {})]
    return _table([words("name"), words("value")], rows) if rows else ""


def _text(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return number(value)
        case Mapping():
            return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _html(text: str) -> str:
    """For a page: a text of a model may hold anything, and XML's characters only are allowed."""
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))


def _cards(facts: Iterable[tuple[str, str]]) -> str:
    return (
        '<dl class="cards">' + "".join(f"<div><dt>{_html(k)}</dt><dd>{_html(v)}</dd></div>" for k, v in facts) + "</dl>"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_html(title)}</h2>\n{body}</section>" if body else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    kind = ' class="n"' if numbers else ""
    head = "".join(f'<th scope="col"{kind}>{_html(cell)}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row"{kind}>{_html(first)}</th>'
        + "".join(f"<td{kind}>{_html(cell)}</td>" for cell in rest)
        + "</tr>\n"
        for first, *rest in rows
    )
    name = escape(", ".join(filter(None, heads)), quote=True)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    return f'<div class="wide" tabindex="0" role="region" aria-label="{name}">{table}</div>'


def _page(title: str, parts: Sequence[str], words: Words) -> str:
    made = words("report.made", version=__version__, time=datetime.now(UTC).isoformat(timespec="seconds"))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="{"zh-CN" if words.language == "zh" else "en"}">\n<head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_html(title)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><main><h1>{_html(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main><footer>{_html(made)}</footer></body></html>\n"
    )
