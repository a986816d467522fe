"""One task over a file of JSON lines: `run_batch("sentiment", "in.jsonl", "out.jsonl", model=...)`.

A line of the input is an object with the task's inputs, or a text for the first of them. The line of the output with
the same number has `index`, `key` (a hash of task, model and input line) and either `output` or `error`. Lines are
written in order, each synced to the disk, so what stands in the output is what is done: after a crash the same call
goes on behind it, and nothing is lost or there twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel
from pydantic_core import from_json, to_json

from llmasos.errors import BusyError, InvalidInputError, LLMasOSError, NotFoundError
from llmasos.settings import settings
from llmasos.tasks.base import Answer, Run, RunCode, Task, find_task
from llmasos.tasks.model import Model, model_of, run_sync

PARALLEL = 8
"""Lines at once."""
_AHEAD = 4
"""Lines that may be finished before the first unfinished one, for each that runs."""


@dataclass(frozen=True)
class BatchProgress:
    """Lines; `resumed` of the done ones were there before, `failed` of them are errors."""

    done: int
    total: int
    failed: int
    resumed: int


OnBatch = Callable[[BatchProgress], None]


def run_batch(task: str, source: Path | str, target: Path | str, **options: Any) -> BatchProgress:
    """How it ended. `options`: those of `arun_batch`."""
    return run_sync(arun_batch(task, source, target, **options))


async def arun_batch(
    task: str,
    source: Path | str,
    target: Path | str,
    *,
    model: Any = None,
    parallel: int = PARALLEL,
    on_progress: OnBatch | None = None,
    run_code: RunCode | None = None,
    answer: Answer | None = None,
) -> BatchProgress:
    """Run `task` for every line of `source` and write to `target`, which may hold the beginning already.

    `run_code`: what a task may run programs with. `answer` is asked instead of the model, of which then only the name
    counts; what it raises that is no LLMasOSError ends the batch.

    What is wrong with a line is an error in its line. Raises NotFoundError for a task or file that there is not,
    InvalidInputError where `target` holds something else, BusyError while another process writes it, and what loading
    the model raises.
    """
    found = find_task(task)
    if parallel < 1:
        raise InvalidInputError(f"parallel={parallel} is less than 1.", param="parallel")
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if not source.is_file():
        raise NotFoundError(f"There is no file {source}.")
    if target.exists() and target.samefile(source):
        raise InvalidInputError(f"{target} is the input itself.", param="target")
    with _alone(target):
        asked = found.default_model if model is None else model
        name = asked if isinstance(asked, str) else asked.name
        work = _Batch(found, name, source, target, on_progress)
        try:
            if work.num_done < work.total:
                work.tell()
                if answer is None:
                    answer = _asking(await asyncio.to_thread(model_of, asked), run_code)
                await work.run(answer, parallel)
            return work.progress()
        finally:
            work.close()


def _asking(model: Model, run_code: RunCode | None) -> Answer:
    async def answer(_: str, task: Task[Any, Any], given: Any) -> BaseModel:
        output: BaseModel = await task.function(Run(model, run_code=run_code), given)
        return output

    return answer


class _Batch:
    def __init__(
        self, task: Task[Any, Any], model: str, source: Path, target: Path, on_progress: OnBatch | None
    ) -> None:
        self._task, self._model_name, self._source, self._on_progress = task, model, source, on_progress
        self.total = sum(1 for _ in _lines(source))
        self._fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        self.num_failed = 0
        try:
            self.num_done = self.num_resumed = self._recover(target)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._fd)

    def progress(self) -> BatchProgress:
        return BatchProgress(self.num_done, self.total, self.num_failed, self.num_resumed)

    def _recover(self, target: Path) -> int:
        """How many lines are done. A line that a crash cut short is cut off; one of another input is an error."""
        whole = done = 0
        source = _lines(self._source)
        with target.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                text = next(source, None)
                if text is None or not self._is_ours(line, done, text):
                    raise InvalidInputError(
                        f"Line {done + 1} of {target} is not of this batch: task, model or input differ.",
                        hint="Name another output, or delete it.",
                        param="target",
                    )
                done, whole = done + 1, whole + len(line)
        if whole < target.stat().st_size:
            os.ftruncate(self._fd, whole)
        return done

    def _is_ours(self, line: bytes, index: int, text: bytes) -> bool:
        try:
            entry = from_json(line)
            self.num_failed += "error" in entry
            return bool(entry["index"] == index and entry["key"] == self._key(text))
        except (ValueError, TypeError, KeyError):
            return False

    def _key(self, text: bytes) -> str:
        return hashlib.sha256(b"\0".join((self._task.name.encode(), self._model_name.encode(), text))).hexdigest()[:16]

    async def run(self, answer: Answer, parallel: int) -> None:
        """A window over the input moves on as its first line is written."""
        at_once = asyncio.Semaphore(parallel)
        window: deque[asyncio.Task[dict[str, Any]]] = deque()

        async def one(index: int, text: bytes) -> dict[str, Any]:
            async with at_once:
                return {"index": index, "key": self._key(text), **await self._answer(answer, text)}

        try:
            for index, text in enumerate(_lines(self._source)):
                if index < self.num_resumed:
                    continue
                window.append(asyncio.ensure_future(one(index, text)))
                if len(window) >= parallel * _AHEAD:
                    await self._write(await window.popleft())
            while window:
                await self._write(await window.popleft())
        finally:
            for left in window:
                left.cancel()
            await asyncio.gather(*window, return_exceptions=True)

    async def _answer(self, answer: Answer, text: bytes) -> dict[str, Any]:
        try:
            value = from_json(text)
        except ValueError as e:
            return {"error": {"code": "invalid_json", "message": f"The line is no JSON: {e}."}}
        first = next(iter(self._task.inputs.model_fields))
        inputs = {first: value} if isinstance(value, str) else value
        try:
            if not isinstance(inputs, dict):
                raise InvalidInputError("The line is neither an object nor a text.")
            output = await answer(self._model_name, self._task, self._task.given(inputs))
            return {"output": output.model_dump(mode="json")}
        except LLMasOSError as e:
            return {"error": {"code": e.code, "message": e.message} | ({"hint": e.hint} if e.hint else {})}

    async def _write(self, entry: dict[str, Any]) -> None:
        writing = asyncio.ensure_future(asyncio.to_thread(self._append, to_json(entry) + b"\n"))
        try:
            await asyncio.shield(writing)
        finally:
            # who is cancelled meanwhile has written the line all the same: it counts, and the file stays open for it
            await asyncio.wait([writing])
            if writing.exception() is None:
                self.num_done += 1
                self.num_failed += "error" in entry
                self.tell()

    def tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.progress())

    def _append(self, line: bytes) -> None:
        view = memoryview(line)
        while view:
            view = view[os.write(self._fd, view) :]
        os.fsync(self._fd)


def _lines(path: Path) -> Iterator[bytes]:
    """Those that are not empty."""
    with path.open("rb") as file:
        for line in file:
            if text := line.strip():
                yield text


def _alone(target: Path) -> Any:
    """A lock on the output, kept in the home: beside the output it would be one more file of the user's."""
    name = hashlib.sha256(str(target.absolute().resolve()).encode()).hexdigest()[:32]
    folder = settings().home / "cache" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock", timeout=0, thread_local=False)
    try:
        return lock.acquire()
    except Timeout:
        raise BusyError(f"Another process is writing {target}.", hint="Wait for it, or name another output.") from None
