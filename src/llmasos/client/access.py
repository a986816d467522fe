"""Who may use the server, as `client.access`: keys, usage, the audit log. All but one's own usage needs the scope
`manage`."""

from __future__ import annotations

from datetime import date
from typing import Any

from pydantic import ValidationError

from llmasos.client.http import AsyncHttp, Http, path_of
from llmasos.client.providers.openai import parsed
from llmasos.client.types.access import (
    AuditLog,
    CreatedKey,
    CreateKeyRequest,
    KeyInfo,
    KeyList,
    UpdateKeyRequest,
    UsageRecord,
    UsageReport,
)
from llmasos.errors import InvalidInputError


def _checked(request: type[CreateKeyRequest] | type[UpdateKeyRequest], fields: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a body: moments may be datetimes, and None means something."""
    try:
        return request.model_validate(fields).model_dump(mode="json", exclude_unset=True)
    except ValidationError as e:
        first = e.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidInputError(f"{name}: {first['msg']}.", param=name) from e


def _usage(since: date | str | None, until: date | str | None, key: str | None, model: str | None) -> str:
    return path_of("usage", since=since, until=until, key=key, model=model)


class AccessControl:
    """Blocking. `fields` are those of `CreateKeyRequest` and `UpdateKeyRequest`."""

    def __init__(self, http: Http) -> None:
        """`http` asks `native_target` of the server."""
        self._http, self._label = http, http.target.label

    def create_key(self, name: str, **fields: Any) -> CreatedKey:
        """A new key. Its text is in this answer (`key`) and never told again."""
        body = _checked(CreateKeyRequest, {"name": name, **fields})
        return parsed(CreatedKey, self._http.json("POST", "/keys", body, once=True), self._label)

    def keys(self) -> list[KeyInfo]:
        return parsed(KeyList, self._http.json("GET", "/keys"), self._label).data

    def key(self, id: str) -> KeyInfo:
        return parsed(KeyInfo, self._http.json("GET", path_of("keys", id)), self._label)

    def update_key(self, id: str, **fields: Any) -> KeyInfo:
        """What is left out stays; None takes a limit away."""
        body = _checked(UpdateKeyRequest, fields)
        return parsed(KeyInfo, self._http.json("PATCH", path_of("keys", id), body), self._label)

    def revoke_key(self, id: str) -> KeyInfo:
        return parsed(KeyInfo, self._http.json("DELETE", path_of("keys", id)), self._label)

    def usage(
        self,
        *,
        since: date | str | None = None,
        until: date | str | None = None,
        key: str | None = None,
        model: str | None = None,
    ) -> list[UsageRecord]:
        """Per day, key and model; days are UTC's, as dates or `YYYY-MM-DD`."""
        return parsed(UsageReport, self._http.json("GET", _usage(since, until, key, model)), self._label).data

    def audit(self, *, limit: int | None = None, before: int | None = None) -> AuditLog:
        """Who did what to keys, models and settings, the newest first."""
        return parsed(AuditLog, self._http.json("GET", path_of("audit", limit=limit, before=before)), self._label)


class AsyncAccessControl:
    """The same for asyncio."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http, self._label = http, http.target.label

    async def create_key(self, name: str, **fields: Any) -> CreatedKey:
        body = _checked(CreateKeyRequest, {"name": name, **fields})
        return parsed(CreatedKey, await self._http.json("POST", "/keys", body, once=True), self._label)

    async def keys(self) -> list[KeyInfo]:
        return parsed(KeyList, await self._http.json("GET", "/keys"), self._label).data

    async def key(self, id: str) -> KeyInfo:
        return parsed(KeyInfo, await self._http.json("GET", path_of("keys", id)), self._label)

    async def update_key(self, id: str, **fields: Any) -> KeyInfo:
        body = _checked(UpdateKeyRequest, fields)
        return parsed(KeyInfo, await self._http.json("PATCH", path_of("keys", id), body), self._label)

    async def revoke_key(self, id: str) -> KeyInfo:
        return parsed(KeyInfo, await self._http.json("DELETE", path_of("keys", id)), self._label)

    async def usage(
        self,
        *,
        since: date | str | None = None,
        until: date | str | None = None,
        key: str | None = None,
        model: str | None = None,
    ) -> list[UsageRecord]:
        return parsed(UsageReport, await self._http.json("GET", _usage(since, until, key, model)), self._label).data

    async def audit(self, *, limit: int | None = None, before: int | None = None) -> AuditLog:
        data = await self._http.json("GET", path_of("audit", limit=limit, before=before))
        return parsed(AuditLog, data, self._label)
