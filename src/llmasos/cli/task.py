"""`llmasos task`: one task on a text, a batch over a file, a pipeline, and what pipelines have done."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.cli.messages import t
from llmasos.cli.render import PLAIN_EVERY, cell_width, emit, note, say, span, working
from llmasos.errors import InvalidInputError

if TYPE_CHECKING:
    from llmasos.tasks import Task

_MOST_NAME = 255
"""Bytes of a file's name; a longer word is a text."""
MANY_PARTS = 8
"""Questions to a model (lines, of a batch) that are no long work yet."""
_FILE_NAME = re.compile(r"\S+\.(txt|md|markdown|rst|tex|html?|csv|tsv|jsonl?|ya?ml|xml|log|pdf|docx|py)", re.IGNORECASE)


def task(action: str, /, *inputs: str, model: str | None = None, parallel: int = 8, json: bool = False) -> int | None:
    """`llmasos task NAME [INPUT...]`, or `ls`, `batch`, `pipeline`, `runs` for NAME."""
    if action == "ls":
        _list(inputs, json)
    elif action == "batch":
        return _batch(inputs, model, parallel, json)
    elif action == "pipeline":
        _pipeline(inputs, model, json)
    elif action == "runs":
        _runs(inputs, json)
    else:
        _run(action, inputs, model, json)
    return None


def _run(name: str, words: Sequence[str], model: str | None, as_json: bool) -> None:
    from llmasos.apps.sandbox import run_python
    from llmasos.cli.chat import check_writes
    from llmasos.cli.fetch import load
    from llmasos.cli.inputs import parse
    from llmasos.inference.llm import LLM
    from llmasos.tasks import find_task

    wanted = find_task(name)
    schema = wanted.inputs.model_json_schema()
    given = wanted.given(parse(schema, _files(words, "text" in schema["properties"])))
    with load(model or wanted.default_model) as llm, _progress(t("task.working", task=name)) as tell:
        if wanted.use == "chat" and not (isinstance(llm, LLM) and llm.model.config.num_labels):  # which classify
            check_writes(llm)
        forecast = _Forecast(name, llm.name, tell)
        result = wanted(
            model=llm,
            on_progress=lambda now: forecast(now.done, now.total, now.at_once),
            run_code=run_python,
            **dict(given),
        )
    if as_json or type(result).__str__ is _plain_str():
        emit(result.model_dump(mode="json"))
    else:
        print(str(result).rstrip("\n"))


def _plain_str() -> Any:
    """Of outputs that have no text of their own."""
    from pydantic import BaseModel

    return BaseModel.__str__


def _files(words: Sequence[str], takes_text: bool) -> list[str]:
    """The first word may name a file, which stands for its text, for tasks that are about one."""
    if not takes_text or not words or words[0].startswith(("-", "@")):
        return list(words)
    first = words[0]
    is_file = len(first.encode()) <= _MOST_NAME and "\0" not in first and Path(first).expanduser().is_file()
    if not is_file and _FILE_NAME.fullmatch(first):  # nobody wants to wait for a summary of its name
        raise InvalidInputError(t("task.no_file", file=first), hint=t("task.as_text", text=first), param="text")
    return [f"@{first}" if is_file else first, *words[1:]]


class _Forecast:
    """Says before long work of how many parts it is, after the first of them how long it will take, and every few
    seconds how far it is; short work says nothing where there is no terminal."""

    def __init__(
        self, task: str, model: str, tell: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._task, self._model, self._tell, self._clock = task, model, tell, clock
        self._began: float | None = None
        self._last = 0.0
        self._before = 0
        self._is_announced = self._is_told = False

    def __call__(self, done: int, total: int, at_once: int) -> None:
        now = self._clock()
        if self._began is None:
            self._began = self._last = now
            self._before = done  # of a batch that goes on
        done, total = done - self._before, total - self._before
        if total > MANY_PARTS and not self._is_announced:
            self._is_announced = True
            note(t("task.long", task=self._task, model=self._model, total=total))
        if not done:
            self._tell(f"0/{total}")
            return
        # of those that run at once the first is done about when all are
        left = (now - self._began) * (total - done) / max(done, min(at_once, total))
        line = t("task.left", done=done, total=total, left=span(left))
        self._tell(line)
        is_first = self._is_announced and not self._is_told and left > PLAIN_EVERY
        if not sys.stderr.isatty() and done < total and (is_first or now - self._last >= PLAIN_EVERY):
            self._is_told, self._last = True, now
            say(f"{self._task}: {line}")


def _progress(message: str) -> AbstractContextManager[Callable[[str], None]]:
    """What `working` shows; nothing where there is no terminal."""
    import contextlib

    @contextlib.contextmanager
    def shown() -> Any:
        with working(message) as show:
            yield show or (lambda _: None)

    return shown()


def _list(words: Sequence[str], as_json: bool) -> None:
    from llmasos.tasks import TASKS, find_task

    _at_most(words, 1)
    found = [find_task(words[0])] if words else list(TASKS.values())
    if as_json:
        emit(found[0].describe() if words else [one.describe() for one in found])
    elif words:
        print(_about(found[0]))
    else:
        width = max(map(cell_width, TASKS))
        for one in found:
            print(f"{one.name:<{width}}  {one.summary}")


def _about(one: Task[Any, Any]) -> str:
    lines = [f"{one.name}  {one.summary}", "", str(one.__doc__), ""]
    schema = one.inputs.model_json_schema()
    for name, field in schema["properties"].items():
        kind = "|".join(map(str, field["enum"])) if "enum" in field else field.get("type", "JSON")
        default = f" [{field['default']}]" if field.get("default") not in (None, "", []) else ""
        lines.append(f"  --{name.replace('_', '-')} {kind}{default}  {field.get('description', '')}".rstrip())
    return "\n".join(lines)


def _batch(words: Sequence[str], model: str | None, parallel: int, as_json: bool) -> int:
    """Exit code 0 also where lines have errors, which stand in the output: the count says how many."""
    from llmasos.apps.sandbox import run_python
    from llmasos.tasks import find_task
    from llmasos.tasks.batch import run_batch

    if len(words) != 3:
        raise InvalidInputError(t("task.batch_words"), hint="llmasos task batch sentiment in.jsonl out.jsonl")
    name, source, target = words
    with _progress(t("task.working", task=name)) as tell:
        forecast = _Forecast(name, model or find_task(name).default_model, tell)
        found = run_batch(
            name,
            source,
            target,
            model=model,
            parallel=parallel,
            run_code=run_python,
            on_progress=lambda now: forecast(now.done, now.total, parallel),
        )
    if as_json:
        emit({"total": found.total, "failed": found.failed, "resumed": found.resumed})
    else:
        say(t("task.batch_done", total=found.total, failed=found.failed, resumed=found.resumed, file=target))
    return 0


def _pipeline(words: Sequence[str], model: str | None, as_json: bool) -> None:
    from llmasos.apps.sandbox import run_python
    from llmasos.cli.inputs import parse
    from llmasos.tasks.pipeline import Pipeline

    if not words:
        raise InvalidInputError(t("task.pipeline_file"), hint="llmasos task pipeline FILE --NAME VALUE", param="file")
    pipeline = Pipeline.load(words[0])
    values = parse({"properties": {name: {} for name in pipeline.input_names}}, words[1:])
    with _progress(t("task.working", task=pipeline.name)) as tell:
        found = pipeline.run(
            values, model=model, on_step=lambda step: tell(f"{step.id}: {step.state}"), run_code=run_python
        )
    if isinstance(found, str) and not as_json:
        print(found)
    else:
        emit(found)


def _runs(words: Sequence[str], as_json: bool) -> None:
    from llmasos.tasks.history import open_history

    _at_most(words, 1)
    with open_history() as history:
        if words:
            emit(history.get(words[0]).model_dump(mode="json"))
            return
        found = history.list()
    if as_json:
        emit([one.model_dump(mode="json") for one in found])
        return
    for one in found:
        print(f"{one.id}  {one.created:%Y-%m-%d %H:%M}  {one.state:<7}  {one.pipeline}  {one.error or ''}".rstrip())


def _at_most(words: Sequence[str], num: int) -> None:
    if len(words) > num:
        raise InvalidInputError(t("usage.extra", value=words[num]), hint=t("usage.see_help", command="llmasos task"))
