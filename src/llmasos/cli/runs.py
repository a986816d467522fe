"""`llmasos runs`: training runs of this machine: the list, one of them, several side by side, the report anew."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmasos.cli.messages import t
from llmasos.cli.render import emit, pairs, say, table
from llmasos.errors import InvalidInputError

if TYPE_CHECKING:
    from llmasos.train.logs.runs import Run

Action = Literal["ls", "show", "compare", "report"]
_BARS = "▁▂▃▄▅▆▇█"
_POINTS = 60
"""Characters of a curve."""
_NUM_NAMES = {"ls": (0, 0), "show": (1, 1), "compare": (2, 6), "report": (1, 1)}
"""How many runs an action takes."""


def runs(action: Action = "ls", /, *names: str, output: str | None = None, json: bool = False) -> int | None:
    """`llmasos runs [ACTION] [NAME...]`."""
    from llmasos.train.logs.runs import list_runs, open_run

    least, most = _NUM_NAMES[action]
    if not least <= len(names) <= most:
        needed = "" if not most else " NAME" if most == 1 else " NAME NAME"
        raise InvalidInputError(t(f"runs.names.{action}"), hint=f"llmasos runs {action}{needed}", param="names")
    if output is not None and action not in ("compare", "report"):
        raise InvalidInputError(
            t("key.stray", option="--output", command=f"llmasos runs {action}"),
            hint=t("usage.see_help", command="llmasos runs"),
        )
    if action == "ls":
        _list(list_runs(), json)
        return None
    found = [open_run(name) for name in names]
    if action == "show":
        _show(found[0], json)
    elif action == "compare":
        _compare(found, output, json)
    else:
        _report(found[0], output, json)
    return None


def _list(found: Sequence[Run], as_json: bool) -> None:
    from llmasos.cli.jobs import age
    from llmasos.cli.messages import language
    from llmasos.train.logs.progress import shown
    from llmasos.train.logs.words import Words, number

    if as_json:
        emit([_brief(run) for run in found])
        return
    if not found:
        say(t("runs.none"))
        return
    rows = []
    for run in found:
        created = run.facts.get("created")
        rows.append(
            (
                shown(run.name),
                shown(str(run.fact("method", "-"))),
                shown(str(run.fact("model.name", "-"))),
                _word(run, "state"),
                _word(run, "steps"),
                number(run.fact("evaluations.last.loss")),
                age(datetime.fromisoformat(created)) if created else "-",
            )
        )
    words = Words(language())
    heads = [words(head) for head in ("name", "method", "model", "state", "steps", "last_loss")]
    print(table([*heads, t("head.age")], rows))


def _brief(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "folder": str(run.folder),
        "method": run.fact("method"),
        "model": run.fact("model.name"),
        "state": run.state,
        "step": run.step,
        "steps": run.fact("steps"),
        "evaluation": run.fact("evaluations.last"),
        "created": run.fact("created"),
    }


def _word(run: Run, word: str) -> str:
    from llmasos.cli.messages import language
    from llmasos.train.logs.report import shown_fact
    from llmasos.train.logs.words import Words

    return shown_fact(run, word, Words(language())) or "-"


def _show(run: Run, as_json: bool) -> None:
    from llmasos.cli.messages import language
    from llmasos.train.logs.progress import shown
    from llmasos.train.logs.report import SUMMARY, shown_fact
    from llmasos.train.logs.runs import REPORT
    from llmasos.train.logs.words import Words, number

    if as_json:
        emit({**run.facts, "state": run.state, "step": run.step, "folder": str(run.folder), "all": run.evaluations})
        return
    words = Words(language())
    facts = [(words(word), shown_fact(run, word, words)) for word in SUMMARY]
    facts += [(words("folder"), str(run.folder))]
    facts += [(t("runs.report"), str(run.folder / REPORT))] if (run.folder / REPORT).exists() else []
    print(pairs([(name, shown(value)) for name, value in facts if value]))
    if losses := [loss for loss in run.metrics.numbers("loss") if loss == loss]:
        print(f"\n{words('report.loss')}\n{number(losses[0])} {curve(losses)} {number(losses[-1])}")
    if run.evaluations:
        rows = [
            (str(one["step"]), number(one["loss"]), number(one.get("bits_per_byte")), f"{one.get('num_tokens') or 0:,}")
            for one in run.evaluations
        ]
        heads = [words(word) for word in ("step", "loss", "bits_per_byte", "trained_tokens")]
        print(f"\n{table(heads, rows)}")
        for sample in run.evaluations[-1].get("samples", []):
            print(f"\n> {shown(sample.get('prompt', ''))}\n{shown(sample.get('text', ''))}")


def curve(values: Sequence[float]) -> str:
    """One character for each stretch of the values, by its mean."""
    num = min(_POINTS, len(values))
    parts = [values[i * len(values) // num : (i + 1) * len(values) // num] for i in range(num)]
    means = [sum(part) / len(part) for part in parts]
    least, most = min(means), max(means)
    if not most - least < float("inf") or most == least:
        return _BARS[0] * num
    return "".join(_BARS[min(len(_BARS) - 1, int((mean - least) / (most - least) * len(_BARS)))] for mean in means)


def _compare(found: Sequence[Run], output: str | None, as_json: bool) -> None:
    from dataclasses import asdict

    from llmasos.cli.messages import language
    from llmasos.train.logs.progress import shown
    from llmasos.train.logs.report import shown_fact, write_comparison
    from llmasos.train.logs.runs import compare
    from llmasos.train.logs.words import Words, number

    compared = compare(found)
    path = write_comparison(found, _file(output), language=language()) if output else None
    if as_json:
        emit(asdict(compared) | ({"report": str(path)} if path else {}))
        return
    words, names = Words(language()), list(map(shown, compared.names))
    rows = [[words(word), *(shown(shown_fact(run, word, words)) or "-" for run in found)] for word in compared.facts]
    options = compared.options.items()
    rows += [[name, *("-" if v is None else shown(str(v), 60) for v in values)] for name, values in options]
    print(table(["", *names], rows))
    if compared.losses:
        common = {step: values for step, values in compared.losses.items() if None not in values}
        every = common if len(common) > 1 else compared.losses
        steps = [[str(step), *map(number, values)] for step, values in every.items()]
        print(f"\n{words('report.held_out')}: {words('report.loss')}")
        print(table([words("step"), *names], steps))
    if path:
        say(t("runs.written", path=path))


def _report(run: Run, output: str | None, as_json: bool) -> None:
    """Where it lies, or as it is asked for: with what is known now, in the language of now."""
    from llmasos.cli.messages import language
    from llmasos.train.logs.report import write_report
    from llmasos.train.logs.runs import REPORT

    path = write_report(run.folder, _file(output) if output else run.folder / REPORT, language=language())
    if as_json:
        emit({"report": str(path)})
    else:
        print(path)


def _file(output: str) -> Path:
    path = Path(output).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise InvalidInputError(t("runs.no_file", path=output), hint="--output report.html", param="output")
    return path
