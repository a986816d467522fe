"""Lines of the rooms of the house, and of the engine's core, which has a limit: `python bench/sizes.py`.

Ends in one JSON line; exits with 1 where the core has grown beyond its limit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "llmasos"
CORE = ("scheduler", "cache", "runner", "sampler", "engine")
CORE_LIMIT = 3500


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def main() -> None:
    rooms = {
        room.name: sum(lines(p) for p in ([room] if room.is_file() else room.rglob("*.py")))
        for room in sorted(SOURCE.iterdir())
        if room.suffix == ".py" or (room.is_dir() and any(room.glob("*.py")))
    }
    core = {name: lines(SOURCE / "inference" / f"{name}.py") for name in CORE}
    total = sum(core.values())
    print(json.dumps({"core": core, "core_total": total, "core_limit": CORE_LIMIT, "rooms": rooms}))
    if total > CORE_LIMIT:
        sys.exit(f"The engine's core has {total} lines; its limit is {CORE_LIMIT}.")


if __name__ == "__main__":
    main()
