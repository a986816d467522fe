"""Conversations: items that belong together, kept until they are deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from llmasos.client.types.response_items import InputItem, ItemReference
from llmasos.client.types.responses import Conversation, ConversationRequest, ConversationUpdate
from llmasos.errors import UnsupportedError
from llmasos.serve.caller import Caller
from llmasos.serve.responses import store
from llmasos.serve.responses.request import messages, new_id, stored
from llmasos.serve.responses.tables import ConversationRow
from llmasos.serve.storage import Storage
from llmasos.store.database import utc_now


class Conversations:
    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    async def create(self, caller: Caller, body: ConversationRequest) -> Conversation:
        items = _checked(body.items or ())

        def work(session: Session) -> Conversation:
            row = ConversationRow(
                id=new_id("conv"), key_id=caller.key_id, created=utc_now(), labels=body.metadata or {}
            )
            session.add(row)
            session.flush()
            store.add_to_conversation(session, row.id, caller.key_id, items)
            return _shown(row)

        return await self.storage.run(work)

    async def get(self, caller: Caller, id: str) -> Conversation:
        return await self.storage.run(lambda s: _shown(store.conversation(s, id, caller.key_id)), read_only=True)

    async def update(self, caller: Caller, id: str, body: ConversationUpdate) -> Conversation:
        def work(session: Session) -> Conversation:
            row = store.conversation(session, id, caller.key_id, to_write=True)
            row.labels = body.metadata or {}
            return _shown(row)

        return await self.storage.run(work)

    async def delete(self, caller: Caller, id: str) -> None:
        await self.storage.run(lambda session: store.remove_conversation(session, id, caller.key_id))

    async def items(self, caller: Caller, id: str) -> list[dict[str, Any]]:
        return await self.storage.run(lambda s: store.conversation_items(s, id, caller.key_id), read_only=True)

    async def item(self, caller: Caller, id: str, item_id: str) -> dict[str, Any]:
        found = next((item for item in await self.items(caller, id) if item["id"] == item_id), None)
        if found is None:
            raise store.ItemNotFoundError(item_id)
        return found

    async def add(self, caller: Caller, id: str, given: Sequence[InputItem]) -> list[dict[str, Any]]:
        items = _checked(given)
        await self.storage.run(lambda session: store.add_to_conversation(session, id, caller.key_id, items))
        return items

    async def remove_item(self, caller: Caller, id: str, item_id: str) -> Conversation:
        def work(session: Session) -> Conversation:
            store.remove_item(session, id, caller.key_id, item_id)
            return _shown(store.conversation(session, id, caller.key_id))

        return await self.storage.run(work)


def _checked(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """The items as they are kept. What no response could go on from is refused now."""
    for i, item in enumerate(items):
        if isinstance(item, ItemReference):
            raise UnsupportedError("Give the item itself, not a reference.", param=f"items.{i}.type")
    # the call that an output belongs to may be in the conversation already
    messages(None, (), [item for item in items if item.type != "function_call_output"], where="items")
    return list(stored(items))


def _shown(row: ConversationRow) -> Conversation:
    return Conversation(id=row.id, created_at=int(row.created.timestamp()), metadata=row.labels)
