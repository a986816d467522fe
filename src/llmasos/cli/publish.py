"""Publishing to an index that a server hosts: the upload, its checks, their report."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.cli.messages import t
from llmasos.cli.render import emit, say, working
from llmasos.errors import InvalidInputError, ProviderError

if TYPE_CHECKING:
    from llmasos.client.http import Http
    from llmasos.store.packages import Index

ON_SERVER = "http://127.0.0.1:8000/llmasos/v1/index"
_OUTCOMES = {
    "passed": "check.passed",
    "warning": "check.warning",
    "failed": "check.failed",
    "skipped": "check.skipped",
}


def publish_to_server(index: Index, file: Path, owner: str | None, as_json: bool) -> int:
    """Exit code 4 where a check has failed."""
    from llmasos.client.jobs import Jobs
    from llmasos.client.packages import Packages

    if owner is None:
        raise InvalidInputError(t("package.needs_owner"), hint=f"--owner NAME --index {index}", param="owner")
    if not file.is_file():
        raise InvalidInputError(t("package.no_file", file=file), hint="llmasos app pack", param="file")
    with _server_of(index) as http, working(t("package.checking", file=file)) as show:
        id = Packages(http).publish(file, owner=owner).id
        room = Jobs(http)
        try:
            for job in room.follow(id):
                if show is not None:
                    show(job.message)
        except ProviderError:
            if room.get(id).result is None:
                raise
        report = room.get(id).result
    if as_json:
        emit(report)
    else:
        _show(report)
        what = "package.published" if report["passed"] else "package.not_published"
        say(t(what, name=report["name"], version=report["version"], index=index))
    return 0 if report["passed"] else 4


def _show(report: dict[str, Any]) -> None:
    for check in report["checks"]:
        print(f"{t(_OUTCOMES[check['outcome']])}  {check['name']}")
        for line in check["details"]:
            print(f"    {line}")


def yank_on_server(index: Index, name: str, version: str, reason: str) -> str | None:
    from llmasos.client.packages import Packages

    if not reason.strip():
        raise InvalidInputError(t("package.needs_reason"), hint='--reason "loses data"', param="reason")
    with _server_of(index) as http:
        return Packages(http).yank(name, version, reason).yanked


def _server_of(index: Index) -> AbstractContextManager[Http]:
    """The server that hosts the index. Raises InvalidInputError for another one behind a URL."""
    from llmasos.cli.server import own_api

    root = index.place.removesuffix("/llmasos/v1/index")
    if root == index.place:
        raise InvalidInputError(t("package.no_server", index=index), hint=f"--index {ON_SERVER}", param="index")
    return own_api(root, None)
