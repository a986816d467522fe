"""`llmasos log`: what a server has to say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmasos.cli.server import server

if TYPE_CHECKING:
    from llmasos.client.types.native import LogLine

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
"""Clients choose some of these texts, and a terminal would obey them."""


def log(
    *,
    follow: bool = False,
    level: Literal["debug", "info", "warning", "error"] | None = None,
    request: str | None = None,
    limit: int = 100,
    url: str | None = None,
    api_key: str | None = None,
    json: bool = False,
) -> None:
    """The latest lines, oldest first; with `follow` until Ctrl-C. With `json` one object per line."""
    with server(url, api_key) as native:
        for line in native.logs(follow=follow, level=level, request_id=request, limit=limit):
            print(line.model_dump_json() if json else text_of(line), flush=follow)


def text_of(line: LogLine) -> str:
    parts = [f"{line.time.astimezone():%Y-%m-%d %H:%M:%S}", f"{line.level:<7}", line.message.translate(_CONTROL)]
    if line.request_id:
        parts.append(f"[{line.request_id}]")
    exception = str(line.fields.get("exception", ""))
    kept = "\n".join(row.translate(_CONTROL) for row in exception.splitlines())
    return " ".join(parts) + (f"\n{kept}" if kept else "")
