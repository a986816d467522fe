"""What hostile applications do to a server: a table of attacks. One JSON line; loopback only.

    python bench/app_attacks.py [NAME...]

A server in a process of its own; each application of `tests/apps/attacks` is packed, installed on it with a fake
model, called, and uninstalled. `stopped`: all of its attacks failed and nothing outside has changed. `not enforced`:
this system cannot hold it, and the server's report says so. `failed`: anything else; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "apps" / "attacks"))


def main() -> int:
    from driver import ATTACKS, Attacked

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(ATTACKS)}")
    names = parser.parse_args().names or list(ATTACKS)
    rows = []
    with tempfile.TemporaryDirectory(prefix="llmasos-") as folder, Attacked(Path(folder)) as server:
        for name in names:
            begun = time.monotonic()
            row = server.run(name)
            attempts = len(row.pop("told"))
            rows.append({**row, "attempts": attempts, "seconds": round(time.monotonic() - begun, 1)})
            print(f"{name:<14} {row['outcome']:<13} {', '.join(row['by'])}", file=sys.stderr)
        with_victim = server.info("victim")
    count = {kind: sum(row["outcome"] == kind for row in rows) for kind in ("stopped", "not enforced", "failed")}
    print(
        json.dumps(
            {
                "bench": "app_attacks",
                "kernel": platform.release(),
                **{kind.replace(" ", "_"): number for kind, number in count.items()},
                "attempts": sum(row["attempts"] for row in rows),
                "victim_crashes": with_victim["num_crashes"],
                "rows": rows,
            }
        )
    )
    return int(bool(count["failed"]))


if __name__ == "__main__":
    sys.exit(main())
