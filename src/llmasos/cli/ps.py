"""Models in a server's memory: ps, load, unload, stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from llmasos.cli.messages import t
from llmasos.cli.render import emit, say, size, table, working
from llmasos.cli.server import server
from llmasos.errors import InvalidInputError, LLMasOSError

if TYPE_CHECKING:
    from llmasos.client.native import Native
    from llmasos.client.types.native import LoadProgress, ModelStatus

LOOK_S = 0.5
"""Seconds between two looks at a load."""
LONG_STEP_S = 60.0
"""A step of an engine that takes longer is worth a remark."""


def ps(*, url: str | None = None, api_key: str | None = None, json: bool = False) -> None:
    """`llmasos ps`: the models that a server has, and what became of the others."""
    with server(url, api_key) as native:
        found = native.status()
    if json:
        emit([one.model_dump(mode="json") for one in found])
    elif not found:
        say(t("ps.none"))
    else:
        heads = [t(f"head.{name}") for name in ("name", "state", "device", "memory", "requests", "until", "remark")]
        print(table(heads, [_row(one) for one in found]))


def _row(one: ModelStatus) -> tuple[str, ...]:
    return (one.name, t(f"state.{one.state}"), devices(one), memory(one), requests(one), until(one), remark(one))


def devices(one: ModelStatus) -> str:
    names = sorted({replica.device for replica in one.replicas})
    copies = f" x{len(one.replicas)}" if len(one.replicas) > 1 else ""
    return (", ".join(names) + copies) or "-"


def memory(one: ModelStatus) -> str:
    """What it has, or with a tilde what it is expected to take."""
    if total := sum(one.measured_bytes.values()):
        return size(total)
    return f"~{size(total)}" if (total := sum(one.predicted_bytes.values())) else "-"


def requests(one: ModelStatus) -> str:
    running, waiting = max(one.busy, one.num_running), one.waiting + one.num_waiting
    return f"{running}+{waiting}" if waiting else str(running)


def until(one: ModelStatus) -> str:
    if one.state != "ready":
        return "-"
    if one.pinned:
        return t("ps.pinned")
    if one.expires_at is None:
        return t("ps.in_use") if one.busy else t("ps.forever")
    seconds = max(0, round((one.expires_at - datetime.now(UTC)).total_seconds()))
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min"


def remark(one: ModelStatus) -> str:
    if one.loading is not None:
        return progress(one.loading)
    if (seconds := max((replica.step_seconds for replica in one.replicas), default=0.0)) >= LONG_STEP_S:
        return t("ps.long_step", seconds=round(seconds))
    return one.last_error or (one.why_evicted if one.state == "absent" else None) or ""


def progress(load: LoadProgress) -> str:
    """How far a load is, in words."""
    name = t(f"phase.{load.phase}")
    if load.phase in ("download", "check", "unpack"):
        of = f" / {size(load.total)} ({load.done * 100 // load.total} %)" if load.total else ""
        return f"{name} {size(load.done)}{of}"
    if load.expected_seconds is None:
        return name
    return t("ps.seconds", phase=name, seconds=round(load.seconds), expected=max(1, round(load.expected_seconds)))


def load(
    model: str, /, *, pin: bool = False, url: str | None = None, api_key: str | None = None, json: bool = False
) -> None:
    """`llmasos load`: returns when the model is ready."""
    with server(url, api_key) as native, working(t("load.working", ref=model)) as show:
        one = _load(native, model, pin or None, show)
    if json:
        emit(one.model_dump(mode="json"))
        return
    seconds = f"{one.load_seconds:.1f}" if one.load_seconds is not None else "-"
    say(t("load.done", name=one.name, memory=memory(one), seconds=seconds))


def _load(native: Native, model: str, pin: bool | None, show: Callable[[str], None] | None) -> ModelStatus:
    """Load, and `show` meanwhile how far it is."""
    if show is None:
        return native.load(model, pin=pin)
    over: Future[ModelStatus] = Future()

    def wait() -> None:
        try:
            over.set_result(native.load(model, pin=pin))
        except BaseException as e:
            over.set_exception(e)

    threading.Thread(target=wait, daemon=True).start()
    while True:
        with suppress(TimeoutError):
            return over.result(LOOK_S)
        with suppress(LLMasOSError):  # the load itself says what is wrong
            for one in native.status():
                if one.loading is not None and one.name.lower() == model.lower():
                    show(progress(one.loading))


def unload(
    *models: str,
    all: bool = False,
    force: bool = False,
    url: str | None = None,
    api_key: str | None = None,
    json: bool = False,
) -> None:
    """`llmasos unload` and `llmasos stop`: take models out of memory; the server goes on."""
    if bool(models) == all:
        raise InvalidInputError(t("unload.which"), hint=t("unload.which.hint"), param="models")
    with server(url, api_key) as native:
        names = models or tuple(one.name for one in native.status() if one.state in ("ready", "loading"))
        left = [native.unload(name, force=force) for name in names]
    if json:
        emit([one.model_dump(mode="json") for one in left])
        return
    for one in left:
        say(t("unload.done", name=one.name))
    if not left:
        say(t("ps.none"))
