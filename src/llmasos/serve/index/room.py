"""The index in `<home>/index`: a folder index with owners. An upload is kept aside, checked as a job, and published if
nothing failed; the report is kept beside.

    <home>/index/index.json
    <home>/index/packages/OWNER/NAME/NAME-VERSION.llmapp
    <home>/index/reports/OWNER/NAME/VERSION.json
    <home>/index/owners.json        whose key published first under an owner's name; others are refused
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from llmasos.client.types.packages import PackageCheck, PackageReport
from llmasos.errors import FormatError, InvalidInputError, LLMasOSError, NotFoundError
from llmasos.serve.access.errors import ForbiddenError
from llmasos.serve.caller import Caller
from llmasos.serve.index.start import try_start
from llmasos.serve.jobs.room import Jobs, Kept, Kind, Work, new_id
from llmasos.serve.native import worker
from llmasos.serve.storage import check_room
from llmasos.store.packages import Found, Index, check_app_name, open_package
from llmasos.store.packages.checks import Finding, look_into
from llmasos.store.packages.index import INDEX
from llmasos.store.packages.installed import version_of
from llmasos.store.packages.pack import SUFFIX, write_whole
from llmasos.store.transfer import disk_errors, file_sha256

_CHUNK = 4 << 20
_INCOMING = ".incoming"
_PUBLIC = re.compile(r"packages/[a-z0-9-]+/[a-z0-9-]+/[A-Za-z0-9.-]+\.llmapp")


class ChecksFailedError(FormatError):
    """The report of the job's result says which."""

    code = "checks_failed"


class HostedIndex(Kind):
    """Its checks are jobs of this kind."""

    name = "package_check"
    scope = "publish"
    at_once = 1
    can_pause = False

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        jobs.add(self)

    @property
    def root(self) -> Path:
        return self._jobs.storage.home / "index"

    @property
    def index(self) -> Index:
        return Index(self.root)

    def document(self) -> bytes:
        """`index.json`. Blocking."""
        try:
            return (self.root / INDEX).read_bytes()
        except FileNotFoundError:
            return b'{"apps": {}, "format": 1}\n'

    def file(self, path: str) -> Path:
        """A package of the index. Blocking. Raises NotFoundError."""
        found = self.root / path
        if not _PUBLIC.fullmatch(path) or not found.is_file():
            raise NotFoundError(f"The index has no {path}.", hint=f"{INDEX} lists what there is.")
        return found

    def report(self, owner: str, name: str, version: str) -> PackageReport:
        """Blocking. Raises NotFoundError."""
        path = self._report_path(owner, name, version)
        try:
            return PackageReport.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            which = f"{owner}/{name} {version}"
            raise NotFoundError(f"There is no report of {which}.", hint="It was not published.") from None

    async def receive(self, owner: str, body: AsyncIterator[bytes], caller: Caller) -> Work:
        """Take a package and begin its checks. Raises InvalidInputError, ForbiddenError for an owner that is another
        key's, FormatError for what may be no package."""
        check_app_name(owner)
        await asyncio.to_thread(self._check_owner, owner, caller.key_id, "manage" in caller.scopes)
        id = new_id(self.name)
        path = self._incoming(id)
        try:
            await self._write(path, body)
            name, version, sha256 = await asyncio.to_thread(self._look, path, owner)
            spec = {"owner": owner, "version": version, "sha256": sha256, "may_all": "manage" in caller.scopes}
            title = f"{owner}/{name} {version}"
            return self._jobs.go_on(await self._jobs.make(self.name, title, spec, caller, id=id))
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    async def _write(self, path: Path, body: AsyncIterator[bytes]) -> None:
        """As it comes."""
        with disk_errors(path):
            await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
            with path.open("wb") as file:
                waiting = bytearray()
                async for piece in body:
                    waiting += piece
                    if len(waiting) >= _CHUNK:
                        await asyncio.to_thread(_put, file, bytes(waiting))
                        waiting.clear()
                await asyncio.to_thread(_put, file, bytes(waiting))

    def _look(self, path: Path, owner: str) -> tuple[str, str, str]:
        """What can be refused before a job is made of it."""
        with open_package(path) as package:
            app = package.manifest.app
        sha256 = file_sha256(path)
        known = self.index.apps.get(f"{owner}/{app.name}", {}) if (self.root / INDEX).exists() else {}
        same = next((v for v in known if version_of(v) == version_of(app.version)), None)
        if same is not None and known[same].sha256 != sha256:
            raise InvalidInputError(
                f"{owner}/{app.name} {same} is there already, with other bytes, and versions never change.",
                hint="Give it a new version in llmasos.toml, pack and publish again.",
                param="version",
            )
        return app.name, app.version, sha256

    # the job

    async def run(self, work: Work) -> Any:
        spec, path = work.job.spec, self._incoming(work.job.id)
        work.change(progress=0.1, message="reading")
        findings = await asyncio.to_thread(_look_into, path)
        work.change(progress=0.5, message="trying")
        if any(one.outcome == "failed" for one in findings):
            findings.append(Finding("start", "skipped", ("Something else failed before.",)))
        else:
            findings.append(await self._tried(path))
        report = await asyncio.to_thread(self._reported, path, spec, findings)
        work.change(progress=0.9, message="publishing", result=report.model_dump(mode="json"))
        if not report.passed:
            await self.clear(work.job, is_forgotten=False)
            failed = ", ".join(check.name for check in report.checks if check.outcome == "failed")
            raise ChecksFailedError(
                f"{report.name} {report.version} is not published: {failed}.", hint="The job's result is the report."
            )
        await asyncio.to_thread(self._publish, path, spec, work.job.key_id, report)
        return report.model_dump(mode="json")

    async def _tried(self, path: Path) -> Finding:
        """An application is started, a model is opened."""
        folder = path.with_suffix("")
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        try:
            manifest = await asyncio.to_thread(self._unpack, path, folder)
            if manifest.kind == "app":
                return await try_start(manifest, folder)
            if manifest.kind == "model":
                await worker.run("check", {"folder": str(folder)})
                return Finding("open", "passed")
            return Finding("start", "skipped", (f"Nothing of the kind {manifest.kind} starts.",))
        except LLMasOSError as e:
            return Finding("open", "failed", (e.message,))
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _unpack(self, path: Path, folder: Path) -> Any:
        with open_package(path) as package:
            check_room(path.parent, sum(info.file_size for info in package.archive.infolist()))
            package.extract(folder)
            return package.manifest

    def _reported(self, path: Path, spec: dict[str, Any], findings: list[Finding]) -> PackageReport:
        with open_package(path) as package:
            app = package.manifest.app
        checks = [PackageCheck(name=one.name, outcome=one.outcome, details=list(one.details)) for one in findings]
        return PackageReport(
            name=f"{spec['owner']}/{app.name}",
            version=app.version,
            kind=app.kind,
            sha256=file_sha256(path),
            checked=datetime.now(UTC).replace(microsecond=0).isoformat(),
            passed=all(check.outcome != "failed" for check in checks),
            checks=checks,
        )

    def _publish(self, path: Path, spec: dict[str, Any], key_id: str | None, report: PackageReport) -> None:
        """Report first: none is published without."""
        owner, name = report.name.split("/")
        with self._owners() as owners:
            _check_owner(owners, owner, key_id, spec["may_all"])
            target = self._report_path(owner, name, report.version)
            if not target.exists():
                with write_whole(target) as temporary:
                    temporary.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
            self.index.publish(path, owner)
            if owner not in owners:
                with write_whole(self.root / "owners.json") as temporary:
                    temporary.write_text(json.dumps({**owners, owner: key_id}, indent=2, sort_keys=True) + "\n")

    async def give_up(self, job: Kept) -> Any:
        return None

    async def clear(self, job: Kept, *, is_forgotten: bool) -> None:
        path = self._incoming(job.id)
        await asyncio.to_thread(path.unlink, missing_ok=True)
        await asyncio.to_thread(shutil.rmtree, path.with_suffix(""), ignore_errors=True)

    # taking back

    def yank(self, name: str, version: str, reason: str, caller: Caller) -> Found:
        """Blocking. Raises NotFoundError, ForbiddenError for another's package."""
        owner, _, app = name.partition("/")
        check_app_name(owner), check_app_name(app)
        self._check_owner(owner, caller.key_id, "manage" in caller.scopes)
        if not (self.root / INDEX).exists():
            raise NotFoundError(f"The index has no {name}.")
        return self.index.yank(name, version, reason)

    # owners

    def _check_owner(self, owner: str, key_id: str | None, may_all: bool) -> None:
        with self._owners() as owners:
            _check_owner(owners, owner, key_id, may_all)

    def _owners(self) -> _Owners:
        return _Owners(self.root)

    def _incoming(self, id: str) -> Path:
        return self.root / _INCOMING / f"{id}{SUFFIX}"

    def _report_path(self, owner: str, name: str, version: str) -> Path:
        check_app_name(owner), check_app_name(name)
        return self.root / "reports" / owner / name / f"{version_of(version)}.json"


class _Owners:
    """Who may publish under which name, while nobody else changes it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        with disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(root / ".owners.lock", thread_local=False)

    def __enter__(self) -> dict[str, str | None]:
        self._lock.acquire()
        try:
            found: dict[str, str | None] = json.loads((self._root / "owners.json").read_text(encoding="utf-8"))
            return found
        except FileNotFoundError:
            return {}
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _check_owner(owners: dict[str, str | None], owner: str, key_id: str | None, may_all: bool) -> None:
    if owner in owners and owners[owner] != key_id and not may_all:
        raise ForbiddenError(
            f"{owner} is the name of another publisher here.", hint="Choose another owner, or ask who runs the server."
        )


def _look_into(path: Path) -> list[Finding]:
    try:
        with open_package(path) as package:
            return look_into(package)
    except LLMasOSError as e:
        return [Finding("manifest", "failed", (e.message,))]


def _put(file: Any, data: bytes) -> None:
    check_room(Path(file.name).parent, len(data))
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
