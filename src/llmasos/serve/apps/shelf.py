"""`GET /llmasos/v1/store`: the applications that the server's indexes have: those of `LLMASOS_APP_INDEX`, and the one
that comes with LLMasOS."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query
from packaging.version import Version

from llmasos.client.types.store import StoreApp, StoreAppList, StoreFault, StoreVersion
from llmasos.errors import LLMasOSError
from llmasos.serve.native.common import responses
from llmasos.store.packages import Apps, Found, Index, Release, indexes, search

_Words = Annotated[str, Query(max_length=200, description="All of these words are in the name or the summary")]
_Places = Annotated[list[str], Query(max_length=20, description="Other indexes than the server's, folders or URLs")]


def create_router(apps: Apps) -> APIRouter:
    router = APIRouter(prefix="/llmasos/v1/store", tags=["LLMasOS"])

    @router.get("", summary="Applications that can be installed", responses=responses())
    async def look(query: _Words = "", index: _Places = []) -> StoreAppList:  # noqa: B006, as FastAPI wants it
        return await asyncio.to_thread(find, apps, indexes(index), query.split())

    return router


def find(apps: Apps, asked: Sequence[Index], words: Sequence[str]) -> StoreAppList:
    """An index that can't be read is named; what the others have is shown all the same. Installing from them is then
    refused, as the application may belong to the one that can't be read."""
    read: list[Index] = []
    faults: list[StoreFault] = []
    for index in asked:
        try:
            read.append(_Read(index))
        except LLMasOSError as e:
            faults.append(StoreFault(index=str(index), message=" ".join(filter(None, (e.message, e.hint)))))
    here = {one.name: one.version for one in apps.list()}
    found = [one for one in search(read, words) if one.release.kind == "app"]
    data = [_shown(one, here.get(one.app)) for one in found]
    return StoreAppList(indexes=[str(index) for index in asked], data=data, faults=faults)


class _Read(Index):
    """An index, read once."""

    def __init__(self, index: Index) -> None:
        super().__init__(index.place)
        self._apps, self._shown = index.apps, str(index)

    def __str__(self) -> str:
        return self._shown

    @property
    def apps(self) -> dict[str, dict[str, Release]]:
        return self._apps


def _shown(found: Found, installed: str | None) -> StoreApp:
    releases = found.index.apps[found.name]
    versions = [
        StoreVersion(
            version=one, published=releases[one].published, size=releases[one].size, yanked=releases[one].yanked
        )
        for one in sorted(releases, key=Version, reverse=True)
    ]
    facts = found.release.model_dump(include={"summary", "license", "size", "published", "key_id"})
    return StoreApp(
        name=found.name,
        app=found.app,
        version=found.version,
        index=str(found.index),
        installed=installed,
        versions=versions,
        **facts,
    )
