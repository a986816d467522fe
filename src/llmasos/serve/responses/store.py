"""Responses, conversations and their items in the database. Functions take a session and run in a thread.

Whatever is asked for belongs to the key that asks: what another key stored does not exist for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, literal, select
from sqlalchemy.orm import Session, aliased

from llmasos.apps.memory.tables import ConversationTextRow, add_texts
from llmasos.client.types.responses import Response
from llmasos.errors import InvalidInputError, NotFoundError
from llmasos.serve.responses.tables import ConversationRow, ItemRow, ResponseRow
from llmasos.serve.storage import is_id
from llmasos.store.database import utc_now

MAX_CHAIN = 10_000
"""Responses that one may go on from, one after the other."""
Item = dict[str, Any]


class ResponseNotFoundError(NotFoundError):
    def __init__(self, id: str) -> None:
        super().__init__(f"There is no response {id!r}.", hint="Was it stored (store: true), and by this key?")


class ConversationNotFoundError(NotFoundError):
    def __init__(self, id: str) -> None:
        super().__init__(f"There is no conversation {id!r}.", hint="POST /v1/conversations makes one.")


class ItemNotFoundError(NotFoundError):
    def __init__(self, id: str) -> None:
        super().__init__(f"There is no item {id!r}.")


def save(
    session: Session,
    response: Response,
    key_id: str | None,
    own: Sequence[Item] | None,
    *,
    request: dict[str, Any] | None = None,
    events: list[str] | None = None,
    worker: tuple[str, str] = ("", ""),
) -> None:
    """Write the response as it stands. `own`: its input, None when that is there already. Of a background response
    that was deleted meanwhile, or that another server has ended, nothing is written. `worker`: place and name of the
    server that works on a new one in the background."""
    row = session.get(ResponseRow, response.id, with_for_update=True)
    if own is None and (row is None or row.request is None):
        return
    if row is None:
        row = ResponseRow(
            id=response.id,
            key_id=key_id,
            created=datetime.fromtimestamp(response.created_at, utc_now().tzinfo),
            background=response.background,
            previous_id=response.previous_response_id,
            place=worker[0],
            server=worker[1],
        )
        session.add(row)
    row.status, row.request, row.events = response.status, request, events
    row.body = response.model_dump(mode="json", exclude={"output"})
    output = [item.model_dump(mode="json", exclude_none=True) for item in response.output]
    if own is not None:
        _append(session, response.id, key_id, own)
    _append(session, response.id, key_id, output, is_output=True)
    if response.conversation and response.status in ("completed", "incomplete"):
        items = [row.item for row in _items(session, response.id)]
        # two responses that end at once must not take the same positions
        if session.get(ConversationRow, response.conversation["id"], with_for_update=True) is not None:
            _append(session, response.conversation["id"], key_id, items)
            add_texts(session, response.conversation["id"], items)


def _append(
    session: Session, owner_id: str, key_id: str | None, items: Iterable[Item], *, is_output: bool = False
) -> None:
    last = session.scalar(select(func.max(ItemRow.position)).where(ItemRow.owner_id == owner_id))
    for position, item in enumerate(items, start=0 if last is None else last + 1):
        session.add(
            ItemRow(owner_id=owner_id, position=position, id=item["id"], key_id=key_id, is_output=is_output, item=item)
        )
    session.flush()


def _items(session: Session, owner_id: str) -> Sequence[ItemRow]:
    return session.scalars(select(ItemRow).where(ItemRow.owner_id == owner_id).order_by(ItemRow.position)).all()


def _row(session: Session, id: str, key_id: str | None) -> ResponseRow:
    row = session.get(ResponseRow, id) if is_id(id) else None
    if row is None or row.key_id != key_id:
        raise ResponseNotFoundError(id)
    return row


def load(session: Session, id: str, key_id: str | None) -> Response:
    """Raises ResponseNotFoundError."""
    row = _row(session, id, key_id)
    output = [item.item for item in _items(session, id) if item.is_output]
    return Response.model_validate({**row.body, "output": output})


def stored_events(session: Session, id: str, key_id: str | None) -> list[str] | None:
    return _row(session, id, key_id).events


def remove(session: Session, id: str, key_id: str | None) -> None:
    row = _row(session, id, key_id)
    session.execute(delete(ItemRow).where(ItemRow.owner_id == id))
    session.delete(row)


def remove_before(session: Session, moment: datetime) -> int:
    """Forget responses that are older, in small portions: the number of those that were."""
    ids = session.scalars(select(ResponseRow.id).where(ResponseRow.created < moment).limit(500)).all()
    session.execute(delete(ItemRow).where(ItemRow.owner_id.in_(ids)))
    session.execute(delete(ResponseRow).where(ResponseRow.id.in_(ids)))
    return len(ids)


_UNFINISHED = (
    ResponseRow.background,
    ResponseRow.status.in_(("queued", "in_progress")),
    ResponseRow.request.is_not(None),
)


def servers_at_work(session: Session, place: str) -> set[str]:
    """Those of this place that have, or had when they ended, unfinished background responses."""
    return set(session.scalars(select(ResponseRow.server).where(ResponseRow.place == place, *_UNFINISHED).distinct()))


def take_up(
    session: Session, place: str, server: str, ended: Collection[str]
) -> list[tuple[str, str | None, dict[str, Any]]]:
    """From now on `server` works on what the `ended` ones have left: (id, key_id, request) of each."""
    left = select(ResponseRow).where(ResponseRow.place == place, ResponseRow.server.in_(ended), *_UNFINISHED)
    found = session.scalars(left.order_by(ResponseRow.created).with_for_update()).all()
    for row in found:
        row.server = server
    return [(row.id, row.key_id, row.request) for row in found if row.request is not None]


def context(session: Session, id: str, key_id: str | None, *, param: str = "previous_response_id") -> list[Item]:
    """Every item that led to the response `id` and of it, the oldest first. Raises InvalidInputError."""
    first = select(ResponseRow.id, ResponseRow.previous_id, literal(0).label("depth")).where(ResponseRow.id == id)
    chain = first.cte("chain", recursive=True)
    row = aliased(ResponseRow)
    step = select(row.id, row.previous_id, chain.c.depth + 1).join(chain, row.id == chain.c.previous_id)
    chain = chain.union_all(step.where(chain.c.depth < MAX_CHAIN))
    rows = session.execute(
        select(ResponseRow.id, ResponseRow.previous_id, ResponseRow.key_id, ResponseRow.status)
        .join(chain, ResponseRow.id == chain.c.id)
        .order_by(chain.c.depth)
    ).all()
    missing = rows[-1].previous_id if rows else id
    foreign = next((one.id for one in rows if one.key_id != key_id), missing)
    if foreign is not None:
        raise InvalidInputError(
            f"There is no response {foreign!r} to go on from.",
            hint="Was it stored (store: true), by this key, and not deleted?",
            param=param,
        )
    if rows[0].status not in ("completed", "incomplete"):
        raise InvalidInputError(
            f"The response {id!r} is {rows[0].status}; there is nothing to go on from.", param=param
        )
    found: dict[str, list[Item]] = {}
    for item in session.scalars(
        select(ItemRow).join(chain, ItemRow.owner_id == chain.c.id).order_by(ItemRow.owner_id, ItemRow.position)
    ):
        found.setdefault(item.owner_id, []).append(item.item)
    return [item for one in reversed(rows) for item in found.get(one.id, ())]


def input_items(session: Session, id: str, key_id: str | None) -> list[Item]:
    """Everything that the response was made from, the oldest first."""
    row = _row(session, id, key_id)
    before = context(session, row.previous_id, key_id) if row.previous_id else []
    return before + [item.item for item in _items(session, id) if not item.is_output]


def item_by_id(session: Session, id: str, key_id: str | None) -> Item | None:
    same_key = ItemRow.key_id.is_(None) if key_id is None else ItemRow.key_id == key_id
    found = session.scalars(select(ItemRow).where(ItemRow.id == id, same_key).limit(1)).first()
    return found.item if found is not None else None


def conversation(session: Session, id: str, key_id: str | None, *, to_write: bool = False) -> ConversationRow:
    row = session.get(ConversationRow, id, with_for_update=to_write) if is_id(id) else None
    if row is None or row.key_id != key_id:
        raise ConversationNotFoundError(id)
    return row


def conversation_items(session: Session, id: str, key_id: str | None) -> list[Item]:
    conversation(session, id, key_id)
    return [row.item for row in _items(session, id)]


def add_to_conversation(session: Session, id: str, key_id: str | None, items: Sequence[Item]) -> None:
    conversation(session, id, key_id, to_write=True)
    _append(session, id, key_id, items)
    add_texts(session, id, items)


def remove_item(session: Session, id: str, key_id: str | None, item_id: str) -> None:
    conversation(session, id, key_id)
    if not is_id(item_id):
        raise ItemNotFoundError(item_id)
    removed = session.execute(delete(ItemRow).where(ItemRow.owner_id == id, ItemRow.id == item_id))
    if not removed.rowcount:  # type: ignore[attr-defined]  # a DELETE's result has it
        raise ItemNotFoundError(item_id)
    texts = ConversationTextRow
    session.execute(delete(texts).where(texts.conversation_id == id, texts.item_id == item_id))


def remove_conversation(session: Session, id: str, key_id: str | None) -> None:
    row = conversation(session, id, key_id)
    session.execute(delete(ItemRow).where(ItemRow.owner_id == id))
    session.execute(delete(ConversationTextRow).where(ConversationTextRow.conversation_id == id))
    session.delete(row)
