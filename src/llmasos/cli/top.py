"""`llmasos top`: a live view of a server: models, requests, tokens per second, memory, queues."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmasos.cli import ps
from llmasos.cli.messages import t
from llmasos.cli.render import emit, size
from llmasos.cli.server import server
from llmasos.errors import InvalidInputError, NetworkError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from llmasos.client.native import Native
    from llmasos.client.types.native import ModelStatus, RequestInfo, SystemInfo

SHOWN_REQUESTS = 30


@dataclass(frozen=True)
class View:
    """One look at a server. `rates`: tokens per second since the look before, by model."""

    at: float
    system: SystemInfo
    models: list[ModelStatus]
    requests: list[RequestInfo]
    rates: dict[str, float]

    def facts(self) -> dict[str, Any]:
        models = [
            one.model_dump(mode="json") | {"tokens_per_second": round(self.rates.get(one.name, 0.0), 2)}
            for one in self.models
        ]
        requests = [one.model_dump(mode="json") for one in self.requests]
        return {"system": self.system.model_dump(mode="json"), "models": models, "requests": requests}


def look(native: Native, before: View | None = None) -> View:
    models, now = native.status(), time.monotonic()
    rates: dict[str, float] = {}
    if before is not None:
        counted = {one.name: one.num_generated_tokens for one in before.models}
        seconds = max(now - before.at, 1e-3)
        rates = {
            one.name: max(0, one.num_generated_tokens - counted.get(one.name, one.num_generated_tokens)) / seconds
            for one in models
        }
    return View(now, native.system(), models, native.requests(), rates)


def top(
    *,
    once: bool = False,
    every: float = 1.0,
    url: str | None = None,
    api_key: str | None = None,
    json: bool = False,
) -> None:
    """Until q or Ctrl-C. `once`: one look and out; `json`: that look for programs."""
    if not 0.1 <= every <= 3600:
        raise InvalidInputError(t("top.every", value=every), param="every")
    with server(url, api_key) as native:
        first = look(native)
        if json or once or not sys.stdout.isatty():
            time.sleep(min(every, 1.0))  # two looks make a rate
            view = look(native, first)
            emit(view.facts()) if json else _print(view)
            return
        with contextlib.suppress(KeyboardInterrupt):
            _live(native, first, every)


def _print(view: View) -> None:
    from rich.console import Console

    Console().print(picture(view))


def _live(native: Native, view: View, every: float) -> None:
    from rich.live import Live

    with keys() as pressed, Live(picture(view), screen=True, auto_refresh=False) as live:
        shown = picture(view)
        while True:
            live.update(shown, refresh=True)
            if pressed(every) in ("q", "Q", "\x03"):
                return
            try:
                view = look(native, view)
                shown = picture(view)
            except NetworkError as e:
                shown = _lost(e)


def _lost(e: NetworkError) -> RenderableType:
    from rich.text import Text

    return Text(t("top.lost", reason=e.message), style="bold red")


def picture(view: View) -> RenderableType:
    """The view as it is drawn."""
    from rich.console import Group
    from rich.text import Text

    system = view.system
    memory = [
        f"{one.name} {size(one.memory_total - one.memory_free)} / {size(one.memory_total)}"
        if one.memory_free is not None
        else f"{one.name} {size(one.memory_total)}"
        for one in system.devices
    ]
    rate = sum(view.rates.values())
    running = sum(request.state == "running" for request in view.requests)
    head = Text.assemble(
        ("LLMasOS ", "bold"),
        f"{system.version}  ",
        t("top.up", time=_span(system.uptime_seconds)),
        f"  CPU {system.cpu_percent:.0f} %  ",
        "  ".join(memory),
        "\n",
        t("top.totals", running=running, waiting=len(view.requests) - running, rate=f"{rate:.1f}"),
    )
    parts: list[RenderableType] = [head, Text(), _models(view)]
    if view.requests:
        parts += [Text(), _requests(view.requests)]
    return Group(*parts, Text(t("top.quit"), style="dim"))


def _table(*heads: str) -> Table:
    from rich.table import Table

    found = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        found.add_column(t(f"head.{head}"), overflow="ellipsis", no_wrap=True)
    return found


def _models(view: View) -> Table:
    from rich.markup import escape

    found = _table("name", "state", "device", "memory", "requests", "speed", "cache", "until", "remark")
    for one in view.models:
        speed = f"{view.rates.get(one.name, 0.0):.1f}"
        cache = f"{one.kv_cache_usage * 100:.0f} %" if one.state == "ready" else "-"
        facts = (ps.devices(one), ps.memory(one), ps.requests(one), speed, cache, ps.until(one), ps.remark(one))
        found.add_row(*map(escape, (one.name, t(f"state.{one.state}"), *facts)))
    return found


def _requests(requests: list[RequestInfo]) -> Table:
    from rich.markup import escape

    found = _table("request", "route", "model", "key", "state", "age", "prompt", "output")
    for one in requests[:SHOWN_REQUESTS]:
        state = t("state.running" if one.state == "running" else "state.waiting")
        counts = (f"{one.age_seconds:.1f} s", str(one.num_prompt_tokens), str(one.num_output_tokens))
        found.add_row(*map(escape, (one.id, one.route, one.model or "-", one.key or "-", state, *counts)))
    return found


def _span(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes else f"{int(seconds)} s"


@contextlib.contextmanager
def keys() -> Iterator[Callable[[float], str]]:
    """A function that waits some seconds for a key and returns it, or "" if none was pressed."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        yield _windows_key
        return
    if not sys.stdin.isatty():
        yield _no_key
        return
    import select

    def pressed(seconds: float) -> str:
        return sys.stdin.read(1) if select.select([sys.stdin], [], [], seconds)[0] else ""

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _no_key(seconds: float) -> str:
    threading.Event().wait(seconds)
    return ""


def _windows_key(seconds: float) -> str:
    import msvcrt

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if msvcrt.kbhit():  # type: ignore[attr-defined,unused-ignore]  # there on Windows
            found: str = msvcrt.getwch()  # type: ignore[attr-defined,unused-ignore]  # likewise
            return found
        time.sleep(0.05)
    return ""
