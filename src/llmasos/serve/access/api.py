"""Keys, usage and the audit log over HTTP: `/llmasos/v1/keys`, `/usage`, `/audit`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session

from llmasos.client.types.access import (
    AuditLog,
    AuditRecord,
    CreatedKey,
    CreateKeyRequest,
    KeyInfo,
    KeyList,
    UpdateKeyRequest,
    UsageRecord,
    UsageReport,
)
from llmasos.client.types.base import ErrorBody
from llmasos.errors import InvalidInputError
from llmasos.serve.access import audit, registry, usage
from llmasos.serve.access.access import Access
from llmasos.serve.access.tables import UsageRow
from llmasos.serve.caller import caller_of
from llmasos.store.database import utc_now

_WRONG = {
    400: "A field is wrong or unknown; `param` names it.",
    401: "A key is needed, or the one sent is not known, expired or revoked.",
    403: "The key lacks the scope.",
    404: "There is no such key.",
}
# PostgreSQL takes every character but NUL
_Word = Annotated[str, Query(max_length=200, pattern=r"^[^\x00]*$")]


def create_router(access: Access) -> APIRouter:
    router = APIRouter(
        prefix="/llmasos/v1",
        tags=["Access"],
        responses={status: {"model": ErrorBody, "description": text} for status, text in _WRONG.items()},
    )

    @router.post("/keys", summary="Make a key", status_code=201)
    async def create(body: CreateKeyRequest, request: Request) -> CreatedKey:
        given = new_fields(body)
        who = _who(request)
        key, text = await access.database.run(lambda session: registry.create(session, given, **who))
        await access.directory.refresh()
        return CreatedKey(**registry.facts(key), key=text)

    @router.get("/keys", summary="List the keys")
    async def list_keys() -> KeyList:
        found = await access.database.run(registry.keys, read_only=True)
        return KeyList(data=[KeyInfo(**registry.facts(key)) for key in found])

    @router.get("/keys/{key_id}", summary="Show a key")
    async def show(key_id: str) -> KeyInfo:
        key = await access.database.run(lambda session: registry.find(session, key_id), read_only=True)
        return KeyInfo(**registry.facts(key))

    @router.patch("/keys/{key_id}", summary="Change a key's rights and limits")
    async def update(key_id: str, body: UpdateKeyRequest, request: Request) -> KeyInfo:
        given = changed_fields(body)
        who = _who(request)
        key = await access.database.run(lambda session: registry.update_key(session, key_id, given, **who))
        await access.directory.refresh()
        return KeyInfo(**registry.facts(key))

    @router.delete("/keys/{key_id}", summary="Revoke a key, for good")
    async def revoke(key_id: str, request: Request) -> KeyInfo:
        who = _who(request)
        key = await access.database.run(lambda session: registry.revoke(session, key_id, **who))
        await access.directory.refresh()
        return KeyInfo(**registry.facts(key))

    @router.get("/usage", summary="What was used per day, key and model; without the scope `manage`, one's own")
    async def read_usage(
        request: Request,
        since: date | None = None,
        until: date | None = None,
        key: _Word | None = None,
        model: _Word | None = None,
    ) -> UsageReport:
        caller = caller_of(request)
        own = None if "manage" in caller.scopes else (caller.key_id or usage.NO_KEY)
        await access.ledger.flush()
        rows = await access.database.run(
            lambda session: usage_records(session, since=since, until=until, key=key, model=model, only=own),
            read_only=True,
        )
        return UsageReport(data=rows)

    @router.get("/audit", summary="Who did what to keys, models and settings")
    async def read_audit(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100, before: Annotated[int | None, Query(ge=1, le=2**53)] = None
    ) -> AuditLog:
        await access.ledger.flush()
        return await access.database.run(lambda session: audit_log(session, limit, before), read_only=True)

    return router


def _who(request: Request) -> dict[str, Any]:
    return {"actor": caller_of(request).actor, "request_id": request.state.request_id}


def new_fields(body: CreateKeyRequest) -> dict[str, Any]:
    """Of what is asked, what the registry takes. Raises InvalidInputError for a moment that is past."""
    given = body.model_dump(exclude_unset=True)
    given |= {"name": body.name, "scopes": list(dict.fromkeys(body.scopes))}
    _check_expires(given)
    return given


def changed_fields(body: UpdateKeyRequest) -> dict[str, Any]:
    given = body.model_dump(exclude_unset=True)
    if not given:
        raise InvalidInputError("Nothing is to be changed.", hint="Name what should be.")
    if "scopes" in given:
        given["scopes"] = list(dict.fromkeys(given["scopes"]))
    _check_expires(given)
    return given


def _check_expires(given: dict[str, Any]) -> None:
    if given.get("expires") is not None and given["expires"] <= utc_now():
        raise InvalidInputError(f"expires={given['expires'].isoformat()} is past.", param="expires")


def usage_records(
    session: Session,
    *,
    since: date | None = None,
    until: date | None = None,
    key: str | None = None,
    model: str | None = None,
    only: str | None = None,
) -> list[UsageRecord]:
    """`key`: id or name. `only`: whatever is asked, this id's. Raises KeyNotFoundError."""
    key_id = registry.find(session, key).id if key is not None else only
    if only is not None and key_id != only:
        return []
    rows = usage.report(session, since=since, until=until, key_id=key_id, model=model)
    return _records(rows, {one.id: one.name for one in registry.keys(session)})


def _records(rows: Sequence[UsageRow], names: dict[str, str]) -> list[UsageRecord]:
    return [
        UsageRecord(
            day=row.day,
            key_id=row.key_id or None,
            key_name=names.get(row.key_id),
            model=row.model or None,
            requests=row.requests,
            errors=row.errors,
            prompt_tokens=row.prompt_tokens,
            cached_tokens=row.cached_tokens,
            output_tokens=row.output_tokens,
        )
        for row in rows
    ]


def audit_log(session: Session, limit: int, before: int | None = None) -> AuditLog:
    rows = audit.read(session, limit=limit + 1, before=before)
    found = [
        AuditRecord(
            id=row.id,
            at=row.at,
            actor=row.actor,
            action=row.action,
            target=row.target,
            details=row.details,
            request_id=row.request_id,
        )
        for row in rows[:limit]
    ]
    return AuditLog(data=found, has_more=len(rows) > limit)
