"""What the features share: the running server, the register of features, and what is asked."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EMBEDDER = "all-minilm-l6-v2"

QUESTION = [{"role": "user", "content": "What is the capital of Germany?"}]
SIMILAR = ["A cat sat on the mat.", "A kitten lies on a rug.", "Shares fell after the bank raised its rates."]
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOL = {"type": "function", "function": WEATHER}
PLAIN = {"max_tokens": 24, "temperature": 0}
CALLED = {"max_tokens": 80, "temperature": 0}
PAST = (("Berlin", "12 degrees and rain"), ("Rome", "25 degrees and sun"), ("Oslo", "3 degrees and snow"))
"""A model this small calls functions of its own accord only where it sees how that went before."""


def weather(city: str) -> str:
    return "18 degrees and wind" if city == "Paris" else f"unknown in {city}"


def example() -> list[dict[str, Any]]:
    """Questions, calls and answers as OpenAI's messages, and a new question."""
    messages: list[dict[str, Any]] = []
    for i, (city, found) in enumerate(PAST):
        call = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        calls = [{"id": f"call_{i}", "type": "function", "function": call}]
        messages += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "tool_call_id": f"call_{i}", "content": found},
            {"role": "assistant", "content": f"It is {found} in {city}."},
        ]
    return [*messages, {"role": "user", "content": "What is the weather in Paris?"}]


def is_nearer(vectors: Sequence[Sequence[float]]) -> bool:
    """The first two of three are more alike than the first and the last, and all have length 1."""
    a, b, c = vectors
    assert all(abs(math.hypot(*v) - 1) < 1e-3 for v in vectors), "embeddings have length 1"
    return _dot(a, b) > _dot(a, c) + 0.2


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@dataclass
class Server:
    """`llmasos serve` as a process of its own, and what is measured of it."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def v1(self) -> str:
        return self.url + "/v1"

    def memory(self) -> dict[str, float]:
        """MB that are resident, by process; with whether the server itself has torch mapped."""
        import psutil

        own = psutil.Process(self.process.pid)
        models = {
            f"{child.cmdline()[-1]}_mb": round(child.memory_info().rss / 1e6)
            for child in own.children()
            if "llmasos.inference.host.child" in child.cmdline()
        }
        has_torch = any("libtorch" in Path(one.path).name for one in own.memory_maps())
        return {"server_mb": round(own.memory_info().rss / 1e6), **models, "server_has_torch": has_torch}


Feature = Callable[[Server], None]
FEATURES: dict[str, dict[str, Feature]] = {}


def feature(client: str, name: str) -> Callable[[Feature], Feature]:
    def add(function: Feature) -> Feature:
        FEATURES.setdefault(client, {})[name] = function
        return function

    return add


def ended(look: Callable[[], Any], seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while (batch := look()).status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.25)
    assert batch.status == "completed", batch
    return batch
