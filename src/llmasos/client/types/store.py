"""What could be installed: `GET /llmasos/v1/store`, the applications of the server's indexes."""

from __future__ import annotations

from pydantic import Field

from llmasos.client.types.base import WireResponse


class StoreVersion(WireResponse):
    """`yanked`: why nobody should take it any more; null: it is fine."""

    version: str
    published: str = ""
    size: int = 0
    yanked: str | None = None


class StoreApp(WireResponse):
    """An application of an index. `name`: OWNER/NAME where the index has owners, `app`: what it is called when it is
    installed; `version`: the newest that is not yanked, `versions`: all, the newest first;
    `index`: where it is; `key_id`: who signed this version, null: nobody; `installed`: the version that is here."""

    name: str
    app: str
    version: str
    summary: str = ""
    license: str = ""
    size: int = 0
    published: str = ""
    key_id: str | None = None
    index: str
    installed: str | None = None
    versions: list[StoreVersion] = Field(default_factory=list)


class StoreFault(WireResponse):
    """An index that could not be read."""

    index: str
    message: str


class StoreAppList(WireResponse):
    """`indexes`: those that were asked, in their order; an application belongs to the first that has its name."""

    indexes: list[str]
    data: list[StoreApp]
    faults: list[StoreFault] = Field(default_factory=list)
