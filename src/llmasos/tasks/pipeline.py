"""Pipelines: tasks that use each other's results. From Python or YAML:

    name: reviews
    steps:
      - id: moods
        task: sentiment
        map: ${inputs.reviews}          # once for each; ${item} is it
        inputs: {text: "${item}"}
      - id: summary
        task: summarise
        when: ${inputs.summarise}       # else the step is skipped and its result is null
        inputs: {text: "Reviews: ${inputs.reviews}", words: 40}
    output: {moods: "${moods}", summary: "${summary.text}"}

`${...}` is a path into the inputs, the results of former steps, or the item: names and `[numbers]`; of a list, a name
is that of each of its entries. Alone it is the value itself, inside a text it is written there (lists of texts in
lines). Steps run as soon as what they refer to is there, at once where they can.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json, to_json, to_jsonable_python

from llmasos import __version__
from llmasos.errors import InvalidInputError, LLMasOSError, NetworkError, ServerError
from llmasos.formats.yaml import read_yaml
from llmasos.settings import settings
from llmasos.tasks.base import Answer, Run, RunCode, Task, find_task
from llmasos.tasks.history import History, StepRecord, new_run_id, open_history
from llmasos.tasks.model import Model, model_of, run_sync

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_PATH = re.compile(r"\w[\w-]*(?:\.\w[\w-]*|\[\d+\])*")
_RESERVED = ("inputs", "item")
RETRY_SECONDS = 1.0
"""Before the second try; twice as long before each further one."""

OnStep = Callable[[StepRecord], None]


class Step(BaseModel):
    """One task of a pipeline; `inputs` are its, with references."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    id: str = Field(pattern=r"^\w[\w-]*$")
    task: str
    inputs: dict[str, Any] = {}
    over: Any = Field(None, alias="map", description="a list, or a reference to one: the task runs for each entry")
    when: Any = Field(True, description="where this is empty, false or null, the step is skipped")
    retry: int = Field(0, ge=0, le=10, description="further tries after an error of a model's server or the network")
    cache: bool = Field(True, description="use the result of an equal question to the same model")
    model: str | None = Field(None, description="another one than the pipeline's")


class Pipeline(BaseModel):
    """Steps and what they make. Raises InvalidInputError for references to what there is not, and for circles."""

    model_config = ConfigDict(extra="forbid")

    name: str = "pipeline"
    model: str | None = None
    steps: list[Step] = Field(min_length=1)
    output: Any = Field(None, description="with references; default: the last step's result")
    parallel: int = Field(8, ge=1, le=256, description="calls of tasks at once, at most")

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Pipeline:
        """Checked. Raises InvalidInputError, and NotFoundError for a task that there is not."""
        try:
            found = cls.model_validate(document)
        except ValidationError as e:
            first = e.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise InvalidInputError(
                f"The pipeline is wrong at {where or 'its top'}: {first['msg']}.", param=where
            ) from None
        found._check()
        return found

    @classmethod
    def load(cls, path: Path | str) -> Pipeline:
        """From a YAML (or JSON) file. Raises NotFoundError, FormatError, and what `of` raises."""
        path = Path(path).expanduser()
        return cls.of({"name": path.stem, **read_yaml(path, like="`steps:`")})

    @property
    def input_names(self) -> list[str]:
        """What the pipeline takes, as its references tell."""
        told = [[step.inputs, step.over, step.when] for step in self.steps]
        paths = [_steps(path) for path in _references([told, self.output])]
        return list(dict.fromkeys(str(path[1]) for path in paths if path[0] == "inputs" and len(path) > 1))

    def model_of(self, step: Step, asked: Any = None) -> Any:
        """The step's own, else the one that is asked for, the pipeline's, the task's."""
        return step.model or asked or self.model or find_task(step.task).default_model

    def run(self, inputs: Mapping[str, Any] | None = None, /, **options: Any) -> Any:
        """The output, as JSON values. `options`: those of `arun`."""
        return run_sync(self.arun(inputs, **options))

    async def arun(
        self,
        inputs: Mapping[str, Any] | None = None,
        /,
        *,
        model: Any = None,
        history: History | None = None,
        run_id: str | None = None,
        record: bool = True,
        cache: Path | None = None,
        on_step: OnStep | None = None,
        run_code: RunCode | None = None,
        answer: Answer | None = None,
    ) -> Any:
        """`model`: for steps that name none; default: the pipeline's, else each task's own. The run is kept in
        `history` (default: the home's; none without `record`) under `run_id` (default: a new one), results of tasks in
        the folder `cache` (default: the home's). `run_code`: what a task may run programs with. `answer` is asked
        instead of models, of which then only the names count. An error of a step ends the others, and is raised."""
        self._check()
        given = dict(inputs or {})
        with contextlib.ExitStack() as stack:
            kept = stack.enter_context(open_history()) if record and history is None else history if record else None
            folder = cache or settings().home / "cache" / "tasks"
            run = _PipelineRun(self, given, model, folder, on_step, run_code, answer)
            id = run_id or new_run_id()
            try:
                if kept is not None:
                    shown = model if isinstance(model, str) else getattr(model, "name", self.model)
                    await _whole(asyncio.to_thread(kept.begin, self.name, shown, to_jsonable_python(given), id=id))
                found = await run.result()
            except BaseException as e:
                if kept is not None:
                    text = str(e) if isinstance(e, LLMasOSError) else f"{type(e).__name__.strip('_')}: {e}"
                    text = "It was cancelled." if isinstance(e, asyncio.CancelledError) else text
                    kept.end(id, run.records, error=text)  # also when it was cancelled: no awaiting here
                raise
            if kept is not None:
                wrapped = found if isinstance(found, dict) else {"value": found}
                await asyncio.to_thread(kept.end, id, run.records, output=wrapped)
            return found

    def _check(self) -> None:
        names = [step.id for step in self.steps]
        if twice := next((name for name in names if names.count(name) > 1 or name in _RESERVED), None):
            why = "reserved" if twice in _RESERVED else "there twice"
            raise InvalidInputError(f"The step id {twice!r} is {why}.", param="steps")
        for step in self.steps:
            task = find_task(step.task)
            if wrong := sorted(step.inputs.keys() - task.inputs.model_fields.keys()):
                raise InvalidInputError(
                    f"Step {step.id}: {step.task} has no input {wrong[0]!r}.",
                    hint=f"Its inputs: {', '.join(task.inputs.model_fields)}.",
                    param=wrong[0],
                )
            for head in _heads([step.over, step.when]):
                self._check_head(step.id, head, names, in_map=False)
            for head in _heads(step.inputs):
                self._check_head(step.id, head, names, in_map=step.over is not None)
        for head in _heads(self.output):
            self._check_head("output", head, names, in_map=False)
        try:
            TopologicalSorter({step.id: self._needs(step) for step in self.steps}).prepare()
        except CycleError as e:
            raise InvalidInputError(f"Steps wait for each other: {' -> '.join(e.args[1])}.", param="steps") from None

    def _check_head(self, where: str, head: str, names: list[str], *, in_map: bool) -> None:
        if head not in names and head != "inputs" and not (head == "item" and in_map):
            raise InvalidInputError(
                f"{where} refers to {head!r}, which is no step{' of a map' if head == 'item' else ''}.",
                hint=f"There are: inputs, {', '.join(names)}.",
                param="steps",
            )

    def _needs(self, step: Step) -> set[str]:
        return _heads([step.inputs, step.over, step.when]) - set(_RESERVED)


class _PipelineRun:
    def __init__(
        self,
        pipeline: Pipeline,
        inputs: dict[str, Any],
        model: Any,
        cache: Path,
        on_step: OnStep | None,
        run_code: RunCode | None,
        answer: Answer | None,
    ) -> None:
        self.records: list[StepRecord] = []
        self._pipeline, self._model, self._cache, self._on_step = pipeline, model, cache, on_step
        self._values: dict[str, Any] = {"inputs": to_jsonable_python(inputs)}
        self._at_once = asyncio.Semaphore(pipeline.parallel)
        self._models: dict[str, asyncio.Task[Model]] = {}
        self._run_code, self._answer = run_code, answer

    async def result(self) -> Any:
        steps = self._pipeline.steps
        started: dict[str, asyncio.Task[None]] = {}
        order = TopologicalSorter({step.id: self._pipeline._needs(step) for step in steps}).static_order()
        by_id = {step.id: step for step in steps}
        try:
            async with asyncio.TaskGroup() as group:
                for id in order:
                    before = [started[name] for name in self._pipeline._needs(by_id[id])]
                    started[id] = group.create_task(self._step(by_id[id], before))
        except BaseExceptionGroup as e:
            raise _first(e) from None
        output = self._pipeline.output
        return self._values[steps[-1].id] if output is None else resolved(output, self._values)

    async def _step(self, step: Step, before: list[asyncio.Task[None]]) -> None:
        for one in before:
            await asyncio.shield(one)
        record = StepRecord(id=step.id, task=step.task, state="done")
        started = time.monotonic()
        try:
            if not _holds(resolved(step.when, self._values)):
                record.state = "skipped"
                self._values[step.id] = None
            else:
                self._values[step.id] = await self._value(step, record)
        except LLMasOSError as e:
            record.state, record.error = "failed", str(e)
            e.message = f"Step {step.id}: {e.message}"
            raise
        except asyncio.CancelledError:
            record.state, record.error = "failed", "another step failed first"
            raise
        finally:
            record.seconds = round(time.monotonic() - started, 3)
            self.records.append(record)
            if self._on_step is not None:
                self._on_step(record)

    async def _value(self, step: Step, record: StepRecord) -> Any:
        task = find_task(step.task)
        if step.over is None:
            return await self._call(task, step, resolved(step.inputs, self._values), record)
        items = resolved(step.over, self._values)
        if not isinstance(items, list):
            raise InvalidInputError(f"map needs a list, not {type(items).__name__}.", param="map")
        given = [resolved(step.inputs, {**self._values, "item": one}) for one in items]
        try:
            async with asyncio.TaskGroup() as group:
                calls = [group.create_task(self._call(task, step, one, record)) for one in given]
        except BaseExceptionGroup as e:
            raise _first(e) from None
        return [call.result() for call in calls]

    async def _call(self, task: Task[Any, Any], step: Step, inputs: Any, record: StepRecord) -> Any:
        given = task.given(inputs)
        async with self._at_once:
            name, answer = await self._answer_of(task, step)
            record.num_calls += 1
            file = self._cache / f"{_key(task.name, name, given)}.json"
            if step.cache and (found := await asyncio.to_thread(_recalled, file)) is not None:
                record.num_cached += 1
                return found
            for attempt in range(step.retry + 1):
                record.attempts += 1
                try:
                    output = await answer(name, task, given)
                    break
                except (NetworkError, ServerError):
                    if attempt == step.retry:
                        raise
                await asyncio.sleep(RETRY_SECONDS * 2**attempt)
            value = output.model_dump(mode="json")
            if step.cache:
                await asyncio.to_thread(_keep, file, value)
            return value

    async def _answer_of(self, task: Task[Any, Any], step: Step) -> tuple[str, Answer]:
        """The name of the step's model, and what asks it."""
        wanted = self._pipeline.model_of(step, self._model)
        if self._answer is not None:
            return wanted, self._answer
        model = await self._loaded(wanted)

        async def answer(_: str, task: Task[Any, Any], given: Any) -> BaseModel:
            output: BaseModel = await task.function(Run(model, run_code=self._run_code), given)
            return output

        return model.name, answer

    async def _loaded(self, wanted: Any) -> Model:
        """Each is loaded once."""
        if not isinstance(wanted, str):
            return model_of(wanted)
        if wanted not in self._models:
            self._models[wanted] = asyncio.ensure_future(asyncio.to_thread(model_of, wanted))
        return await asyncio.shield(self._models[wanted])


async def _whole(work: Coroutine[Any, Any, Any]) -> None:
    """A thread goes on when who waits for it is cancelled, and would write after what is written then."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first; the others are what came of it."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


# references


def resolved(value: Any, values: Mapping[str, Any]) -> Any:
    """`value` with every reference replaced. Raises InvalidInputError for one that leads nowhere."""
    if isinstance(value, dict):
        return {key: resolved(one, values) for key, one in value.items()}
    if isinstance(value, list):
        return [resolved(one, values) for one in value]
    if not isinstance(value, str):
        return value
    if whole := _REFERENCE.fullmatch(value.strip()):
        return _at(whole[1], values)
    return _REFERENCE.sub(lambda match: _written(_at(match[1], values)), value)


def _at(path: str, values: Mapping[str, Any]) -> Any:
    found: Any = values
    for step in _steps(path):
        found = _entry(found, step, path)
    return found


def _entry(value: Any, step: str | int, path: str) -> Any:
    if value is None:
        return None  # of a step that was skipped
    if isinstance(value, list) and isinstance(step, str):
        return [_entry(one, step, path) for one in value]
    try:
        return value[step]
    except (KeyError, IndexError, TypeError):
        raise InvalidInputError(f"${{{path}}} leads nowhere: there is no {step!r}.", param="inputs") from None


def _steps(path: str) -> list[str | int]:
    if not _PATH.fullmatch(path.strip()):
        raise InvalidInputError(f"${{{path}}} is no reference.", hint="Write ${step.field[0]}.", param="inputs")
    return [int(number) if number else name for name, number in re.findall(r"(\w[\w-]*)|\[(\d+)\]", path)]


def _written(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "\n".join(value)
    return to_json(value).decode()


def _heads(value: Any) -> set[str]:
    """The first names of all references in a value."""
    return {str(_steps(path)[0]) for path in _references(value)}


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for one in value.values():
            yield from _references(one)
    elif isinstance(value, list):
        for one in value:
            yield from _references(one)
    elif isinstance(value, str):
        yield from _REFERENCE.findall(value)


def _holds(value: Any) -> bool:
    """A condition `{value: ..., is: ...}` (or `in:` a list), or anything that is not empty."""
    if isinstance(value, dict) and "value" in value:
        if "is" in value:
            return bool(value["value"] == value["is"])
        if isinstance(value.get("in"), list):
            return value["value"] in value["in"]
    return bool(value) and value != "false"


# the cache


def _key(task: str, model: str, given: BaseModel) -> str:
    content = to_json({"version": __version__, "task": task, "model": model, "inputs": given.model_dump(mode="json")})
    return hashlib.sha256(content).hexdigest()


def _recalled(file: Path) -> Any:
    try:
        return from_json(file.read_bytes())
    except (OSError, ValueError):
        return None


def _keep(file: Path, value: Any) -> None:
    """Whole or not at all: another process may be reading."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "wb") as out:
        out.write(to_json(value))
    os.replace(name, file)
