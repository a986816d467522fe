"""A task: a name, typed inputs, a typed output, and a function of a model. `TASKS` has all of them.

A task asks a model for JSON of a schema and reads that; what a model writes freely is never taken apart.

    @task("keywords", "The words that a text is about")
    async def keywords(run: Run, given: KeywordsInput) -> Keywords: ...
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import typing
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from llmasos.errors import ContextOverflowError, InvalidInputError, NotFoundError, ProviderError
from llmasos.tasks import texts
from llmasos.tasks.model import Messages, Model, model_of, run_sync

I = TypeVar("I", bound="Inputs")  # noqa: E741 (inputs)
O = TypeVar("O", bound=BaseModel)  # noqa: E741 (output)
R = TypeVar("R", bound=BaseModel)
S = TypeVar("S")

Use = Literal["chat", "embed"]
AT_ONCE = 8
"""Questions of one task: a long text is no reason to keep everybody else waiting."""
MARGIN = 4
"""Tokens that are left free: what ends an answer."""


@dataclass(frozen=True)
class Progress:
    """`done` of `total` questions to the model; the total may change. Up to `at_once` of them ran at the same time."""

    done: int
    total: int
    at_once: int = 1


OnProgress = Callable[[Progress], None]


class Ran(Protocol):
    """How a program ended. `reason`: `exited`, or what ended it."""

    @property
    def ok(self) -> bool: ...
    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...
    @property
    def reason(self) -> str: ...


RunCode = Callable[[str], Ran]
"""Runs a Python program where it can do no harm (`llmasos.apps.sandbox.run_python`). Blocking."""


class Inputs(BaseModel):
    """Base of every task's inputs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Run:
    """One call of a task: its model, how far it is, and what runs programs, where there is that."""

    def __init__(self, model: Model, on_progress: OnProgress | None = None, *, run_code: RunCode | None = None) -> None:
        self.model, self.run_code = model, run_code
        self._on_progress = on_progress
        self._done = self._total = self._expected = self._running = self._at_once = 0

    async def ask(
        self, messages: Messages, reply: type[R], *, max_tokens: int, schema: Mapping[str, Any] | None = None
    ) -> R:
        """The model's answer as `reply`, whose JSON Schema (or `schema`) it follows.

        An answer that the limit of tokens cut short counts as far as it goes: a text ends early, a list lacks its last
        entry. Raises ContextOverflowError, and ProviderError for an answer of another form.
        """
        return (await self.ask_whole(messages, reply, max_tokens=max_tokens, schema=schema))[0]

    async def ask_whole(
        self, messages: Messages, reply: type[R], *, max_tokens: int, schema: Mapping[str, Any] | None = None
    ) -> tuple[R, bool]:
        """The same, and whether it was cut short."""
        form = json_schema(reply) if schema is None else schema
        answer = await self.counted(self.model.ask(messages, form, max_tokens=max_tokens))
        return _read(answer.text, answer.is_cut, reply, self.model.name), answer.is_cut

    async def counted(self, question: Awaitable[S]) -> S:
        """Its answer; it is a step of the progress that is told."""
        if self._expected:
            self._expected -= 1
        else:
            self._total += 1
        self._running += 1
        self._at_once = max(self._at_once, self._running)
        self._tell()
        try:
            return await question
        finally:
            self._running -= 1
            self._done += 1
            self._tell()

    @contextlib.contextmanager
    def expecting(self, num_questions: int) -> Iterator[None]:
        """So many questions are asked within, as far as is known now: progress tells of them before the first."""
        self._expected += num_questions
        self._total += num_questions
        try:
            yield
        finally:
            self._total -= self._expected  # those that were not asked after all
            self._expected = 0
            self._tell()

    def _tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(self._done, self._total, max(self._at_once, 1)))

    async def pieces(
        self, text: str, build: Callable[[str], Messages], *, max_tokens: int, most: int | None = None
    ) -> list[str]:
        """`text` in pieces so that `build(piece)` leaves room for `max_tokens` in the model's context; of about `most`
        tokens at most. Raises ContextOverflowError where the instructions alone fill it."""
        return await asyncio.to_thread(self._pieces, text, build, max_tokens, most)

    def _pieces(self, text: str, build: Callable[[str], Messages], max_tokens: int, most: int | None) -> list[str]:
        limit = self.model.context_length - max_tokens - MARGIN
        room = limit - self.model.count(build(""))
        if room < 1:
            raise ContextOverflowError(self.model.count(build("")), max_tokens + MARGIN, self.model.context_length)
        room = room if most is None else min(room, most)
        return texts.split(text, lambda piece: self.model.count(build(piece)) <= limit, self.model.count_text, room)

    async def each(self, asked: Sequence[S], ask: Callable[[S], Awaitable[R]]) -> list[R]:
        """Several at once: the engine makes one batch of them. An error ends the others. Each is taken to be one
        question to the model."""
        at_once = asyncio.Semaphore(AT_ONCE)

        async def one_of(one: S) -> R:
            async with at_once:
                return await ask(one)

        work = [asyncio.ensure_future(one_of(one)) for one in asked]
        try:
            with self.expecting(len(work)):
                return list(await asyncio.gather(*work))
        finally:
            for one in work:
                one.cancel()
            await asyncio.gather(*work, return_exceptions=True)


class Task(Generic[I, O]):
    """Call it for a result, `await task.arun(...)` where there is an event loop."""

    def __init__(
        self,
        name: str,
        summary: str,
        function: Callable[[Run, I], Awaitable[O]],
        inputs: type[I],
        output: type[O],
        use: Use,
    ) -> None:
        self.name, self.summary, self.function = name, summary, function
        self.inputs, self.output, self.use = inputs, output, use
        self.__doc__ = inspect.getdoc(function)
        self.__name__ = name

    def __repr__(self) -> str:
        return f"Task({self.name!r})"

    def __call__(
        self,
        *args: Any,
        model: Any = None,
        on_progress: OnProgress | None = None,
        run_code: RunCode | None = None,
        **inputs: Any,
    ) -> O:
        """The task's output. `args` and `inputs` are its inputs, in their order and by name.

        `model`: an LLM, a name of one (`llmasos.model_zoo.get_model`), `provider:model`; the last one that was named
        stays in memory. `run_code` is what a task may run programs with. Raises InvalidInputError for wrong inputs, and
        what the model raises.
        """
        return run_sync(self.arun(*args, model=model, on_progress=on_progress, run_code=run_code, **inputs))

    async def arun(
        self,
        *args: Any,
        model: Any = None,
        on_progress: OnProgress | None = None,
        run_code: RunCode | None = None,
        **inputs: Any,
    ) -> O:
        """The same for asyncio; cancelling it stops the model."""
        given = self.given(self._named(args, inputs))
        asked = model if model is not None else self.default_model
        found = await asyncio.to_thread(model_of, asked)
        return await self.function(Run(found, on_progress, run_code=run_code), given)

    @property
    def default_model(self) -> str:
        from llmasos.store import DEFAULT_MODEL

        return DEFAULT_MODEL if self.use == "chat" else "all-minilm-l6-v2"

    def given(self, inputs: Mapping[str, Any]) -> I:
        """The inputs, checked. Raises InvalidInputError that names the first wrong one."""
        try:
            return self.inputs.model_validate(inputs)
        except ValidationError as e:
            first = e.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            more = f" ({e.error_count() - 1} more)" if e.error_count() > 1 else ""
            raise InvalidInputError(
                f"{self.name}: {where or 'inputs'}: {first['msg']}{more}.",
                hint=f"Its inputs: {', '.join(self.inputs.model_fields)}.",
                param=where or None,
            ) from None

    def _named(self, args: Sequence[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        names = list(self.inputs.model_fields)
        if len(args) > len(names):
            raise InvalidInputError(
                f"{self.name} has {len(names)} inputs; {len(args)} were given.", hint=f"They are: {', '.join(names)}."
            )
        named = dict(zip(names, args, strict=False))
        if twice := sorted(named.keys() & inputs.keys()):
            raise InvalidInputError(f"{self.name}: {twice[0]} was given twice.", param=twice[0])
        return named | dict(inputs)

    def describe(self) -> dict[str, Any]:
        """Name, summary, and the JSON Schemas of inputs and output."""
        return {
            "name": self.name,
            "summary": self.summary,
            "input": self.inputs.model_json_schema(),
            "output": self.output.model_json_schema(mode="serialization"),
        }


TASKS: dict[str, Task[Any, Any]] = {}
Answer = Callable[[str, Task[Any, Any], Any], Awaitable[BaseModel]]
"""The output of a task for inputs by the model of a name: what batches and pipelines of a server ask."""


def task(name: str, summary: str, *, use: Use = "chat") -> Callable[[Callable[[Run, I], Awaitable[O]]], Task[I, O]]:
    """Make a task of a function and put it on the list. `summary`: one line, for people."""

    def made(function: Callable[[Run, I], Awaitable[O]]) -> Task[I, O]:
        hints = typing.get_type_hints(function)
        given = next(kind for argument, kind in hints.items() if argument not in ("run", "return"))
        found = Task(name, summary, function, given, hints["return"], use)
        TASKS[name] = found
        return found

    return made


def find_task(name: str) -> Task[Any, Any]:
    """Raises NotFoundError that names those there are."""
    try:
        return TASKS[name]
    except KeyError:
        raise NotFoundError(f"There is no task {name!r}.", hint=f"There are: {', '.join(TASKS)}.") from None


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def shots(*pairs: tuple[str, BaseModel]) -> list[dict[str, str]]:
    """Questions with their answers, as turns before the real one."""
    found = []
    for question, answer in pairs:
        found += [user(question), {"role": "assistant", "content": answer.model_dump_json()}]
    return found


def object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """An object that has all of these properties and no other."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def json_schema(reply: type[BaseModel]) -> dict[str, Any]:
    """Without titles, which only cost tokens where an API shows them to its model, and without room for properties that
    the class does not have."""
    found: dict[str, Any] = _plain(reply.model_json_schema())
    return found


def _plain(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        name: {key: _plain(one) for key, one in value.items()} if name in ("properties", "$defs") else _plain(value)
        for name, value in schema.items()
        if not (name == "title" and isinstance(value, str))
    }
    return {"additionalProperties": False, **found} if "properties" in found else found


def _read(text: str, is_cut: bool, reply: type[R], name: str) -> R:
    if is_cut:
        text = text.rstrip("\ufffd")  # a character of which some tokens were left
    try:
        if not is_cut:
            return reply.model_validate(from_json(text))
        with contextlib.suppress(ValidationError):
            return reply.model_validate(from_json(text, allow_partial=True))
        found = from_json(text, allow_partial="trailing-strings")
        try:
            return reply.model_validate(found)
        except ValidationError as e:
            if not _drop_last(found, e):
                raise
            return reply.model_validate(found)
    except ValueError as e:  # pydantic's ValidationError is one
        if is_cut:
            raise InvalidInputError(
                f"{name} ran out of tokens before its answer was one.",
                hint="Ask for more words, or take another model.",
            ) from e
        raise ProviderError(
            f"{name} answered in another form than it was asked for: {text[:80]!r}.",
            hint="Take a model whose API enforces response_format, or a local one.",
        ) from e


def _drop_last(found: Any, error: ValidationError) -> bool:
    """Takes the entry out that the cut has spoilt: the last one of a list."""
    for one in error.errors(include_url=False, include_input=False):
        place = found
        for step in one["loc"]:
            if isinstance(place, list):
                if step != len(place) - 1:
                    return False
                del place[-1]
                return True
            if not isinstance(place, dict) or step not in place:
                break
            place = place[step]
    return False
