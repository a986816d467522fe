"""An application whose routes have all shapes; every surface is tested with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from llmasos.apps import Application, Depends, File, Image, Upload

app = Application(title="Six routes", version="1.2.0")


class Point(BaseModel):
    x: float
    y: float = 0.0


@dataclass
class Box:
    corners: list[Point]
    area: float


@app.route("/add", tool=True, read_only=True, examples=[{"a": 1, "b": 2}])
def add(a: int, b: Annotated[int, Field(ge=0, le=100, description="At most a hundred.")] = 2) -> int:
    """Add two numbers."""
    return a + b


@app.route("/say", tool=True)
def say(words: str, style: Literal["plain", "loud"] = "plain") -> Iterator[str]:
    """Repeat words.

    One after the other, in a style.

    Args:
        words: What is said.
    """
    for word in words.split(" "):
        yield (word.upper() if style == "loud" else word) + " "


@app.route("/box", tool=True)
def box(points: list[Point], scale: float = 1.0) -> Box:
    """The box around points."""
    if not points:
        raise ValueError("no points")
    xs, ys = [p.x for p in points], [p.y for p in points]
    low, high = Point(x=min(xs), y=min(ys)), Point(x=max(xs), y=max(ys))
    return Box([low, high], (high.x - low.x) * (high.y - low.y) * scale)


@app.route("/count")
async def count(to: Annotated[int, Field(ge=1, le=10)]) -> AsyncIterator[int]:
    """Count up."""
    for n in range(1, to + 1):
        yield n


@app.route("/notes/{name}", methods=["GET"], tool=True, read_only=True)
async def note(name: str) -> dict[str, str] | None:
    """A note by its name; null if there is none."""
    return {"name": name, "text": "你好"} if name == "greeting" else None


@app.route("/forget", methods=["POST"], tool=True, destructive=True)
def forget(names: list[str], really: bool = False) -> list[str]:
    """Forget notes."""
    return sorted(names) if really else []


@app.route("/stamp", tool=True)
def stamp(picture: Image, name: str = "stamped.png") -> Image:
    """The same picture under another name."""
    return Image(picture.data, name)


@app.route("/sizes", output="table")
def sizes(
    files: list[File], note: Annotated[File, Upload(max_size="1KB", accept=("text/*",))] | None = None
) -> list[dict[str, str | int]]:
    """Names and sizes of files."""
    return [{"name": file.name, "bytes": file.size} for file in [*files, *([note] if note else [])]]


def manner(polite: bool = False) -> Iterator[str]:
    yield "Good day" if polite else "Hi"


@app.route("/greet", tool=True)
def greet(name: str, words: Annotated[str, Depends(manner)]) -> str:
    """Greet somebody."""
    return f"{words}, {name}"


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
"""A PNG of one pixel, as base64."""
CALLS = [
    ("add", {"a": 1}, 3),
    ("add", {"a": 1, "b": 40}, 41),
    ("say", {"words": "a b c", "style": "loud"}, "A B C "),
    ("box", {"points": [{"x": 1, "y": 2}, {"x": 3}]}, {"corners": [{"x": 1, "y": 0}, {"x": 3, "y": 2}], "area": 4}),
    ("count", {"to": 3}, [1, 2, 3]),
    ("note", {"name": "greeting"}, {"name": "greeting", "text": "你好"}),
    ("note", {"name": "other"}, None),
    ("forget", {"names": ["b", "a"], "really": True}, ["a", "b"]),
    ("greet", {"name": "Ada"}, "Hi, Ada"),
    ("greet", {"name": "Ada", "polite": True}, "Good day, Ada"),
    ("stamp", {"picture": f"data:;base64,{PIXEL}"}, f"data:image/png;name=stamped.png;base64,{PIXEL}"),
    (
        "sizes",
        {"files": ["data:text/plain;name=%E4%BD%A0.txt;base64,aGVsbG8=", "AAEC"], "note": "data:text/plain,hi"},
        [{"name": "你.txt", "bytes": 5}, {"name": "file.bin", "bytes": 3}, {"name": "file.txt", "bytes": 2}],
    ),
]
"""A route's name, inputs, the result."""
app.state.calls = CALLS
