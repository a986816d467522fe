"""Processes that tokenise, each of them a `worker`.

They are plain child processes and not `multiprocessing`, which would run the user's own script again in each. One ends
when its parent does: its input ends then.
"""

from __future__ import annotations

import json
import pickle
import queue
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

from llmasos.data.masks import Masker
from llmasos.data.pieces import Recipe, write_piece
from llmasos.data.readers import Raw
from llmasos.errors import LLMasOSError, StoreError, error_of

Rows = list[tuple[int, Raw]]


class Workers:
    """`do` hands a piece to one that is free; leaving the `with` waits for all. One worker: this process itself.

    Raises the error of the earliest piece that has one.
    """

    def __init__(self, recipe: Recipe, num: int) -> None:
        self._recipe, self._num = recipe, num
        self._masker = Masker(recipe.tokenizer, template=recipe.template) if num == 1 else None
        self._todo: queue.Queue[tuple[Rows, Path] | None] = queue.Queue(maxsize=2)
        self._errors: list[tuple[str, LLMasOSError]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Workers:
        return self

    def do(self, rows: Rows, path: Path) -> None:
        if self._masker:
            write_piece(self._masker, self._recipe, rows, path)
            return
        if len(self._threads) < self._num:
            self._threads.append(threading.Thread(target=self._attend, daemon=True))
            self._threads[-1].start()
        while not self._errors:
            try:
                self._todo.put((rows, path), timeout=0.2)
                return
            except queue.Full:
                continue
        self._finish()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or self._threads:
            self._finish(silent=kind is not None)

    def _finish(self, *, silent: bool = False) -> None:
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._errors and not silent:
            raise min(self._errors, key=lambda error: error[0])[1]

    def _attend(self) -> None:
        """One child and what it is given. After an error, the rest is taken and left undone."""
        with subprocess.Popen(
            [sys.executable, "-m", "llmasos.data.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdin and child.stdout
            is_first = True
            while item := self._todo.get():
                rows, path = item
                if self._errors:
                    continue
                try:
                    if is_first:
                        pickle.dump(self._recipe, child.stdin)
                        is_first = False
                    pickle.dump(item, child.stdin)
                    child.stdin.flush()
                    answer = child.stdout.readline()
                    if not answer:
                        raise OSError("it ended")
                    if facts := json.loads(answer):
                        self._errors.append((path.name, error_of(facts)))
                except OSError as e:
                    lines = f"lines {rows[0][0]} to {rows[-1][0]} of {self._recipe.file.name}"
                    lost = StoreError(f"A process that tokenised {lines} was lost: {e}.", hint="Was memory short?")
                    self._errors.append((path.name, lost))
