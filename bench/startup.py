"""How long `import llmasos` and `llmasos --help` take as whole processes, whether they load torch, and how much memory
one answer of the default model needs at its peak.

    python bench/startup.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import MODEL, model_file, report

LLMASOS = str(Path(sys.executable).with_name("llmasos"))
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import": [sys.executable, "-c", "import llmasos"],
    "help": [LLMASOS, "--help"],
}


def milliseconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1000


def loads_torch(command: list[str]) -> bool:
    shown = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    )
    return any(line.split("|")[-1].strip() == "torch" for line in shown.stderr.splitlines())


def peak_megabytes(command: list[str]) -> float:
    """Peak resident memory of a process, as the system accounts for it."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    model_file()  # fetched before the memory of an answer is measured
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.rounds):
        for name, command in COMMANDS.items():
            times[name].append(milliseconds(command))
    report(
        bench="startup",
        **{f"{name}_ms": round(statistics.median(values), 1) for name, values in times.items()},
        torch_loaded={name: loads_torch(command) for name, command in COMMANDS.items()},
        run_peak_mb=round(peak_megabytes([LLMASOS, "run", MODEL, "What is the capital of France?"]), 1),
    )


if __name__ == "__main__":
    main()
