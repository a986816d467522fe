"""The server's index of packages as `client.packages`: what it has, publishing, reports, yanking."""

from __future__ import annotations

from pathlib import Path

from llmasos.client.http import AsyncHttp, Http, Request, path_of
from llmasos.client.providers.openai import parsed
from llmasos.client.types.jobs import Job
from llmasos.client.types.packages import PackageIndex, PackageRelease, PackageReport


def _publish(content: bytes | Path, owner: str) -> Request:
    where = path_of("index", "packages", owner)
    if isinstance(content, Path):
        return Request("POST", where, file=content, once=True)
    return Request("POST", where, data=content, once=True)


class Packages:
    """Blocking."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def index(self) -> PackageIndex:
        """All that the server's index has."""
        data = self._http.json("GET", path_of("index", "index.json"))
        return parsed(PackageIndex, data, self._http.target.label)

    def publish(self, content: bytes | Path, *, owner: str) -> Job:
        """Have a package checked and, if it passes, published as OWNER/NAME. The result of the job is the report."""
        return parsed(Job, self._http.send(_publish(content, owner)), self._http.target.label)

    def report(self, name: str, version: str) -> PackageReport:
        """What the checks said of OWNER/NAME."""
        data = self._http.json("GET", path_of("index", "reports", *name.split("/"), version))
        return parsed(PackageReport, data, self._http.target.label)

    def yank(self, name: str, version: str, reason: str) -> PackageRelease:
        """Take a version of OWNER/NAME out of every choice but the exact one."""
        body = {"name": name, "version": version, "reason": reason}
        data = self._http.json("POST", path_of("index", "yank"), body)
        return parsed(PackageRelease, data, self._http.target.label)


class AsyncPackages:
    """The same for asyncio."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def index(self) -> PackageIndex:
        data = await self._http.json("GET", path_of("index", "index.json"))
        return parsed(PackageIndex, data, self._http.target.label)

    async def publish(self, content: bytes | Path, *, owner: str) -> Job:
        return parsed(Job, await self._http.send(_publish(content, owner)), self._http.target.label)

    async def report(self, name: str, version: str) -> PackageReport:
        data = await self._http.json("GET", path_of("index", "reports", *name.split("/"), version))
        return parsed(PackageReport, data, self._http.target.label)

    async def yank(self, name: str, version: str, reason: str) -> PackageRelease:
        body = {"name": name, "version": version, "reason": reason}
        data = await self._http.json("POST", path_of("index", "yank"), body)
        return parsed(PackageRelease, data, self._http.target.label)
