"""The index of packages that a server hosts, below `/llmasos/v1/index`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmasos.client.types.base import WireRequest, WireResponse


class PackageRelease(WireResponse):
    """One version of a package. `file`: path beside `index.json`; `key_id`: who signed it; `yanked`: why not to take
    it."""

    file: str
    sha256: str
    size: int
    kind: str = "app"
    summary: str = ""
    license: str = ""
    key_id: str | None = None
    published: str = ""
    yanked: str | None = None


class PackageIndex(WireResponse):
    """`index.json`: releases by version by name, which is OWNER/NAME."""

    format: int
    apps: dict[str, dict[str, PackageRelease]]


class PackageCheck(WireResponse):
    """What one check found. A package with one that failed is not published."""

    name: str
    outcome: Literal["passed", "warning", "failed", "skipped"]
    details: list[str] = Field(default_factory=list)


class PackageReport(WireResponse):
    """What the checks said of a package. `name`: OWNER/NAME."""

    name: str
    version: str
    kind: str
    sha256: str
    checked: str
    passed: bool
    checks: list[PackageCheck]


class YankRequest(WireRequest):
    """`reason`: one line for those who ask for the version. `name`: OWNER/NAME."""

    name: str = Field(min_length=1, max_length=200)
    version: str = Field(min_length=1, max_length=100)
    reason: str = Field(min_length=1, max_length=1000)
