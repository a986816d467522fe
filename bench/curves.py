"""The curves of runs in one picture: an SVG that stands alone, for documents.

    python bench/curves.py OUT.svg TITLE [--train] [--first STEP] NAME=FOLDER [NAME=FOLDER ...]

FOLDER: of a run (`evaluations.jsonl`, `log.jsonl` or `metrics.csv`). Held-out loss by step; --train: training loss,
smoothed. What `curves/` has was drawn from the runs of LOG.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from pathlib import Path

from llmasos.train.logs.charts import Curve, Point, chart, smoothed

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
STYLE = """svg{background:#fff;font:12px sans-serif}path{fill:none;stroke-width:2}.grid{stroke:#e5e7eb;stroke-width:1}
text{fill:#4b5563}"""


def held_out(folder: Path) -> list[Point]:
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    return [(one["step"], one["loss"]) for one in map(json.loads, lines)]


def trained(folder: Path) -> list[Point]:
    if (folder / "log.jsonl").exists():
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    else:
        rows = list(csv.DictReader((folder / "metrics.csv").open(newline="")))
    return smoothed([(float(row["step"]), float(row["loss"])) for row in rows])


def drawn(title: str, curves: list[Curve]) -> str:
    figure = chart("curves", title, title, curves)
    found = re.search(r"<svg.*</svg>", figure, re.DOTALL)
    assert found is not None
    style = STYLE + "".join(f".run{i}{{stroke:{colour}}}" for i, colour in enumerate(COLOURS))
    keys = "".join(
        f'<path class="run{i}" d="M500 {24 + 18 * i}h24"/><text x="530" y="{28 + 18 * i}">{curve.name}</text>'
        for i, curve in enumerate(curves)
    )
    head = f'<title id="curves-title">{title}</title><style>{style}</style>'
    svg = found[0].replace(">", f' xmlns="http://www.w3.org/2000/svg">{head}', 1)
    return svg.replace("</svg>", f"{keys}</svg>\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("title")
    parser.add_argument("runs", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--first", type=int, default=0, metavar="STEP")
    args = parser.parse_args()
    read = trained if args.train else held_out
    curves = []
    for i, run in enumerate(args.runs):
        name, _, folder = run.partition("=")
        points = [point for point in read(Path(folder)) if point[0] >= args.first]
        curves.append(Curve(name, points, f"run{i}"))
    args.out.write_text(drawn(args.title, curves))


if __name__ == "__main__":
    main()
