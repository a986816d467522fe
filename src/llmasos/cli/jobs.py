"""`llmasos jobs`: work of a server that goes on without its request: pulls, batches of tasks, pipelines, checks."""

from __future__ import annotations

import json as jsonlib
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from llmasos.cli.messages import t
from llmasos.cli.render import emit, pairs, say, table, working
from llmasos.cli.server import own_api
from llmasos.errors import InvalidInputError

if TYPE_CHECKING:
    from llmasos.client.types.jobs import Job

Action = Literal["ls", "show", "follow", "pause", "resume", "cancel"]


def jobs(
    action: Action = "ls",
    id: str | None = None,
    /,
    *,
    kind: str | None = None,
    url: str | None = None,
    api_key: str | None = None,
    json: bool = False,
) -> int | None:
    """`llmasos jobs [ACTION] [ID]`. Exit code 1 after `follow` of a job that did not become done."""
    from llmasos.client.jobs import Jobs

    if (id is None) != (action == "ls"):
        hint = "llmasos jobs ls" if id else f"llmasos jobs {action} ID"
        raise InvalidInputError(t("jobs.extra" if id else "jobs.id", action=action), hint=hint, param="id")
    if kind is not None and action != "ls":
        raise InvalidInputError(
            t("key.stray", option="--kind", command=f"llmasos jobs {action}"),
            hint=t("usage.see_help", command="llmasos jobs"),
        )
    with own_api(url, api_key) as http:
        room = Jobs(http)
        if id is None:
            _list(room.list(kind=kind), json)
        elif action == "follow":
            return _follow(room, id, json)
        else:
            does = {"show": room.get, "pause": room.pause, "resume": room.resume, "cancel": room.cancel}
            _show(does[action](id), json)
    return None


def _list(found: list[Job], as_json: bool) -> None:
    if as_json:
        emit([one.model_dump(mode="json") for one in found])
    elif not found:
        say(t("jobs.none"))
    else:
        heads = [t(f"head.{head}") for head in ("id", "kind", "name", "state", "progress", "age", "remark")]
        print(table(heads, [_row(one) for one in found]))


def _row(one: Job) -> tuple[str, ...]:
    return (one.id, one.kind, one.name, t(f"job.{one.state}"), _share(one), age(one.created), _remark(one))


def _share(one: Job) -> str:
    return "-" if one.progress is None else f"{one.progress:.0%}"


def _remark(one: Job) -> str:
    return one.error.message if one.error else one.message


def age(moment: datetime) -> str:
    seconds = max(0, round((datetime.now(UTC) - moment).total_seconds()))
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds // divisor} {unit}"
    return f"{seconds // 86_400} d"


def _show(one: Job, as_json: bool) -> None:
    if as_json:
        emit(one.model_dump(mode="json"))
        return
    facts = [
        (t("head.id"), one.id),
        (t("head.kind"), one.kind),
        (t("head.name"), one.name),
        (t("head.state"), t(f"job.{one.state}")),
        (t("head.progress"), _share(one)),
        (t("head.created"), one.created.isoformat(timespec="seconds")),
    ]
    facts += [(t("head.remark"), one.message)] if one.message else []
    facts += [(t("head.error"), f"{one.error.message} {one.error.hint}".strip())] if one.error else []
    print(pairs(facts))
    if one.result is not None:
        print(jsonlib.dumps(one.result, ensure_ascii=False, indent=2))


def _follow(room: object, id: str, as_json: bool) -> int:
    from llmasos.client.jobs import Jobs
    from llmasos.errors import ProviderError

    assert isinstance(room, Jobs)
    last: Job | None = None
    with nullcontext(None) if as_json else working(id) as show:
        try:
            for last in room.follow(id):
                if as_json:
                    print(jsonlib.dumps(last.model_dump(mode="json"), ensure_ascii=False), flush=True)
                elif show is not None:
                    show(f"{_share(last)} {_remark(last)}".strip())
        except ProviderError:
            if last is None or last.state != "failed":
                raise
    assert last is not None
    if not as_json:
        _show(last, False)
    return 0 if last.state == "done" else 1
