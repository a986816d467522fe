"""The audit log: who did what to keys, models and settings. A row and a log line each; never a key, never a body."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from llmasos.serve.access.tables import AuditRow
from llmasos.store.database import utc_now

log = logging.getLogger("llmasos.audit")


def note(
    session: Session,
    actor: str,
    action: str,
    target: str,
    details: Mapping[str, Any] | None = None,
    *,
    request_id: str | None = None,
    at: datetime | None = None,
) -> None:
    """`actor`: `key:ID`, `local:USER` or `anyone`. `action`: a word pair, e.g. `key.create`."""
    given = dict(details or {})
    row = AuditRow(at=at or utc_now(), actor=actor, action=action, target=target, details=given, request_id=request_id)
    session.add(row)
    # JSON, so that no value can begin a line of its own
    log.info("%s %s %s %s", actor, action, json.dumps(target), json.dumps(given, default=str))


def read(session: Session, *, limit: int, before: int | None = None) -> list[AuditRow]:
    """The newest first; `before`: the id of the last one that was read."""
    query = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
    return list(session.scalars(query if before is None else query.where(AuditRow.id < before)))
