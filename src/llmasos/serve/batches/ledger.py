"""The results of one batch: two files that only grow, one line a request. They are the truth about what is done."""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmasos.client.types.files import BatchError, BatchInputDetails, BatchOutputDetails, BatchUsage
from llmasos.serve.files.form import disk_errors
from llmasos.serve.storage import check_room


class Ledger:
    """Opened, it knows what earlier runs have done. A line that a crash cut short is cut off. Blocking throughout, but
    `answered` and `failed` are one short write each."""

    def __init__(self, output: Path, errors: Path) -> None:
        self.done: set[str] = set()
        self.num_completed = self.num_failed = 0
        self.tokens: Counter[str] = Counter()
        self._folder = output.parent
        with disk_errors():
            output.parent.mkdir(parents=True, exist_ok=True)
            self._output, self._errors = _Journal(output), _Journal(errors)
        for journal in (self._output, self._errors):
            for entry in journal.recovered:
                self._count(entry)
            journal.recovered = []

    def answered(self, custom_id: str, status: int, request_id: str, body: bytes) -> None:
        """`body`: JSON text without line ends. Errors that an HTTP request would get go to the error file."""
        text = body.decode("utf-8")
        response = f'{{"status_code": {status}, "request_id": {json.dumps(request_id)}, "body": {text}}}'
        self._write(status == 200, custom_id, response, "null")

    def failed(self, custom_id: str | None, error: BatchError) -> None:
        """A request that was never answered."""
        self._write(False, custom_id, "null", json.dumps(error.model_dump(exclude_none=True)))

    def _write(self, good: bool, custom_id: str | None, response: str, error: str) -> None:
        head = f'{{"id": "batch_req_{secrets.token_hex(16)}", "custom_id": {json.dumps(custom_id)}'
        line = f'{head}, "response": {response}, "error": {error}}}'
        with disk_errors():
            check_room(self._folder, len(line))
            (self._output if good else self._errors).append(line)
        self._count(json.loads(line))

    def _count(self, entry: dict[str, Any]) -> None:
        if (custom_id := entry["custom_id"]) is not None:
            self.done.add(custom_id)
        response = entry["response"]
        if response is None or response["status_code"] != 200:
            self.num_failed += 1
            return
        self.num_completed += 1
        self.tokens.update(_tokens(response["body"].get("usage") or {}))

    @property
    def usage(self) -> BatchUsage:
        t = self.tokens
        return BatchUsage(
            input_tokens=t["input"],
            input_tokens_details=BatchInputDetails(cached_tokens=t["cached"]),
            output_tokens=t["output"],
            output_tokens_details=BatchOutputDetails(reasoning_tokens=t["reasoning"]),
            total_tokens=t["input"] + t["output"],
        )

    @property
    def has_output(self) -> bool:
        return self._output.size > 0

    @property
    def has_errors(self) -> bool:
        return self._errors.size > 0

    def sync(self) -> None:
        """What was written survives a power cut, too."""
        with disk_errors():
            self._output.sync()
            self._errors.sync()

    def clear(self) -> None:
        """Forget everything: the input is checked anew."""
        self._output.truncate(0)
        self._errors.truncate(0)
        self.done.clear()
        self.tokens.clear()
        self.num_completed = self.num_failed = 0

    def close(self) -> None:
        """Files that stayed empty go."""
        self._output.close()
        self._errors.close()


def _tokens(usage: dict[str, Any]) -> dict[str, int]:
    """The counts of any of the endpoints by one name."""
    read = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    made = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
    return {
        "input": usage.get("prompt_tokens") or usage.get("input_tokens") or 0,
        "output": usage.get("completion_tokens") or usage.get("output_tokens") or 0,
        "cached": read.get("cached_tokens") or 0,
        "reasoning": made.get("reasoning_tokens") or 0,
    }


class _Journal:
    """A file of JSON lines that grows by whole lines. `recovered`: what stood in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o600)
        self._is_synced = True
        self.size = 0
        self.recovered: list[dict[str, Any]] = []
        for entry, num_bytes in _whole_lines(path):
            self.recovered.append(entry)
            self.size += num_bytes
        self.truncate(self.size)

    def append(self, line: str) -> None:
        data = line.encode("utf-8") + b"\n"
        try:
            written = os.write(self._fd, data)
            while written < len(data):  # a disk that is nearly full takes a part; the next write says so
                written += os.write(self._fd, data[written:])
        except OSError:
            self.truncate(self.size)
            raise
        self.size += len(data)
        self._is_synced = False

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        self.size = size

    def sync(self) -> None:
        if not self._is_synced:
            self._is_synced = True
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
        if not self.size:
            self.path.unlink(missing_ok=True)


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Entries and their lengths in bytes, up to the first line that is not whole: a killed server or a power cut left
    it, and everything after it."""
    with path.open("rb") as file:
        for raw in file:
            try:
                entry = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict) or not {"custom_id", "response", "error"} <= entry.keys():
                return
            yield entry, len(raw)
