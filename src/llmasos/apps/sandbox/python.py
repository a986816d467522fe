"""Python code that somebody else wrote, a model for one: run in the sandbox, with its output."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmasos.apps.sandbox.policy import MB, Limits, Policy, python_paths
from llmasos.apps.sandbox.report import enforced, missing
from llmasos.apps.sandbox.run import Reason, start
from llmasos.errors import UnsupportedError

OUTPUT_BYTES = MB
"""How much of each stream is kept."""
NEEDED = ("files_read", "files_write", "network")
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Result:
    """`exit_code`: negative for a signal, None if all was killed. `reason`: `exited`, or what ended it (run.Exit).
    `truncated`: it printed more than OUTPUT_BYTES."""

    stdout: str
    stderr: str
    exit_code: int | None
    reason: Reason
    truncated: bool = False

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and self.reason == "exited"


def run_python(code: str, *, timeout: float = 10.0, memory: int = 512 * MB, needs: Collection[str] = NEEDED) -> Result:
    """Run a program with this Python and its packages: no network, no other programs, nothing to write but a temporary
    folder that is its working folder and is gone afterwards. `timeout`: seconds; `memory`: bytes.

    Raises UnsupportedError, without running it, if this system cannot enforce what it `needs` (rows of `enforced`)."""
    with tempfile.TemporaryDirectory(prefix="llmasos-") as name:
        folder = Path(name).resolve()
        limits = Limits(
            memory=memory,
            cpu_seconds=math.ceil(timeout),
            processes=32,
            file_size=20 * MB,
            disk=50 * MB,
            wall_seconds=timeout,
        )
        lacking = [row.what for row in missing(enforced()) if row.what in needs]
        if lacking:
            raise UnsupportedError(
                f"This system cannot keep a program from: {', '.join(lacking)}.",
                hint="`llmasos doctor` says why. Code that you trust runs with needs=().",
                param="needs",
            )
        policy = Policy(read=python_paths(), write=(folder,), limits=limits)
        (folder / "main.py").write_text(code, encoding="utf-8")
        command = [sys.executable, "-I", "-B", "-X", "utf8", "main.py"]
        process = start(command, policy, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        readers = [_Reader(stream) for stream in (process.stdout, process.stderr) if stream is not None]
        end = process.wait()
        out, err = (reader.text() for reader in readers)
    reason = end.reason
    if reason == "exited" and end.code == 1 and err.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        reason = "memory"  # the kernel gave no more, and Python said so
    return Result(out, err, end.code, reason, any(reader.truncated for reader in readers))


class _Reader:
    """Reads a pipe to its end, so that the writer never waits, and keeps the beginning."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._kept, self.truncated = stream, bytearray(), False
        self._thread = threading.Thread(target=self._read, name="llmasos-sandbox-output", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._stream as stream:
            while data := stream.read1(_CHUNK):  # type: ignore[attr-defined]  # a pipe of Popen has it
                room = OUTPUT_BYTES - len(self._kept)
                self._kept += data[:room]
                self.truncated |= len(data) > room

    def text(self) -> str:
        self._thread.join()
        return self._kept.decode("utf-8", "replace")
