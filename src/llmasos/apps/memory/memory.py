"""`Memory`: the conversations of a database."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import delete, func, select, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from llmasos.apps.memory.items import Message, items_of, messages_of
from llmasos.apps.memory.tables import ConversationRow, ConversationTextRow, ItemRow, add_texts
from llmasos.client.types.agents import ConversationInfo
from llmasos.errors import InvalidInputError, NotFoundError
from llmasos.store.database import Database, utc_now

TITLE = "title"
"""The label that names a conversation; without it, its first question does."""
_TITLE_CHARS = 80
_SNIPPET_CHARS = 160
_SHORTEST = 3
"""Characters of a word that the index of SQLite finds (it holds groups of three); shorter ones are looked for in every
text."""
_MAX_WORDS = 20


class Memory:
    """Conversations of one key of a server (`key_id`), or those without a key: of this machine's user.

    Any thread may use it. `search` uses an index where the database is SQLite with FTS5, and reads every text
    elsewhere; both find parts of words, whatever their case.
    """

    def __init__(self, database: Database, key_id: str | None = None) -> None:
        self._database, self._key_id = database, key_id
        self._is_own = False
        self._has_index: bool | None = None

    @classmethod
    def open(cls, url: str | None = None) -> Memory:
        """That of the home, or of another database (`sqlite:////path/to.db`, made if it is new). Close it at last."""
        memory = cls(Database.open(url))
        memory._is_own = True
        return memory

    def close(self) -> None:
        if self._is_own:
            self._database.close()

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # writing

    def create(self, messages: Sequence[Mapping[str, Any]] = (), *, title: str = "") -> str:
        """The id of a new conversation."""
        id = f"conv_{secrets.token_hex(24)}"
        with self._database.session() as session:
            labels = {TITLE: title} if title else {}
            session.add(ConversationRow(id=id, key_id=self._key_id, created=utc_now(), labels=labels))
            session.flush()
            self._append(session, id, messages)
        return id

    def add(self, id: str, messages: Sequence[Mapping[str, Any]]) -> None:
        """Messages in OpenAI's form, behind those that are there. Raises NotFoundError."""
        with self._database.session() as session:
            self._row(session, id, to_write=True)
            self._append(session, id, messages)

    def _append(self, session: Session, id: str, messages: Sequence[Mapping[str, Any]]) -> None:
        items = items_of(messages)
        last = session.scalar(select(func.max(ItemRow.position)).where(ItemRow.owner_id == id))
        for position, item in enumerate(items, start=0 if last is None else last + 1):
            facts = {"position": position, "id": item["id"], "key_id": self._key_id}
            session.add(ItemRow(owner_id=id, is_output=False, item=item, **facts))
        add_texts(session, id, items)

    def rename(self, id: str, title: str) -> None:
        with self._database.session() as session:
            row = self._row(session, id, to_write=True)
            row.labels = {**row.labels, TITLE: title}

    def delete(self, id: str) -> None:
        """Raises NotFoundError."""
        with self._database.session() as session:
            row = self._row(session, id, to_write=True)
            session.execute(delete(ItemRow).where(ItemRow.owner_id == id))
            session.execute(delete(ConversationTextRow).where(ConversationTextRow.conversation_id == id))
            session.delete(row)

    # reading

    def messages(self, id: str) -> Sequence[Message]:
        """Raises NotFoundError."""
        with self._database.session(read_only=True) as session:
            self._row(session, id)
            wanted = select(ItemRow.item).where(ItemRow.owner_id == id).order_by(ItemRow.position)
            return messages_of(session.scalars(wanted))

    def get(self, id: str) -> ConversationInfo:
        """Raises NotFoundError."""
        with self._database.session(read_only=True) as session:
            self._row(session, id)
            return self._infos(session, [id])[0]

    def list(self, *, limit: int = 50) -> Sequence[ConversationInfo]:
        """Those that were last added to first."""
        with self._database.session(read_only=True) as session:
            moment = func.coalesce(func.max(ConversationTextRow.created), ConversationRow.created)
            wanted = (
                select(ConversationRow.id)
                .outerjoin(ConversationTextRow, ConversationTextRow.conversation_id == ConversationRow.id)
                .where(self._own())
                .group_by(ConversationRow.id, ConversationRow.created)
                .order_by(moment.desc(), ConversationRow.id)
                .limit(limit)
            )
            return self._infos(session, list(session.scalars(wanted)))

    def search(self, query: str, *, limit: int = 20) -> Sequence[ConversationInfo]:
        """Conversations with a message that holds all words of `query` (text in quotes is one word), the best first:
        by bm25 with the index, else the newest first. Raises InvalidInputError for a query without words."""
        words = _words(query)
        if not words:
            raise InvalidInputError("There is nothing to look for.", param="query")
        use_index = all(len(word) >= _SHORTEST for word in words) and self._index()
        with self._database.session(read_only=True) as session:
            found = self._indexed(session, words, limit) if use_index else self._scanned(session, words, limit)
            infos = {one.id: one for one in self._infos(session, list(found))}
        for id, info in infos.items():
            info.snippet = _snippet(found[id], words)
        return [infos[id] for id in found]

    def export(self, id: str | None = None) -> Iterator[dict[str, Any]]:
        """Each conversation as a JSON object with its `messages`; all of them, or one."""
        ids = [id] if id is not None else [one.id for one in self.list(limit=1 << 31)]
        for one in ids:
            info = self.get(one)
            facts = info.model_dump(mode="json", include={"id", "title", "created", "updated"})
            yield {**facts, "messages": self.messages(one)}

    # how it is done

    def _own(self) -> Any:
        column = ConversationRow.key_id
        return column.is_(None) if self._key_id is None else column == self._key_id

    def _row(self, session: Session, id: str, *, to_write: bool = False) -> ConversationRow:
        is_id = id.isascii() and id.isprintable() and len(id) <= 256  # databases do not take every text
        row = session.get(ConversationRow, id, with_for_update=to_write) if is_id else None
        if row is None or row.key_id != self._key_id:
            raise NotFoundError(f"There is no conversation {id!r}.", hint="`llmasos memory ls` lists them.")
        return row

    def _infos(self, session: Session, ids: Sequence[str]) -> Sequence[ConversationInfo]:
        rows = {row.id: row for row in session.scalars(select(ConversationRow).where(ConversationRow.id.in_(ids)))}
        texts = ConversationTextRow
        counted = select(texts.conversation_id, func.count(), func.max(texts.created)).where(
            texts.conversation_id.in_(ids), texts.role.in_(("user", "assistant"))
        )
        counts = {id: (num, last) for id, num, last in session.execute(counted.group_by(texts.conversation_id))}
        firsts = (
            select(func.min(texts.id))
            .where(texts.conversation_id.in_(ids), texts.role == "user")
            .group_by(texts.conversation_id)
        )
        titles = {row.conversation_id: row.text for row in session.scalars(select(texts).where(texts.id.in_(firsts)))}
        found = []
        for id in ids:
            num, last = counts.get(id, (0, None))
            title = str(rows[id].labels.get(TITLE) or _shortened(titles.get(id, ""), _TITLE_CHARS))
            created = rows[id].created
            found.append(
                ConversationInfo(id=id, title=title, created=created, updated=last or created, num_messages=num)
            )
        return found

    def _index(self) -> bool:
        """Make the index of SQLite where there is none yet; triggers keep it from then on. False: no FTS5 here."""
        if self._has_index is None:
            self._has_index = self._database.is_sqlite and self._make_index()
        return self._has_index

    def _make_index(self) -> bool:
        known = "SELECT 1 FROM sqlite_master WHERE name = 'conversation_search'"
        with self._database.session(read_only=True) as session:
            if session.execute(text(known)).first() is not None:
                return True
        try:
            with self._database.session() as session:
                if session.execute(text(known)).first() is None:
                    for statement in _INDEX:
                        session.execute(text(statement))
            return True
        except DatabaseError:  # SQLite was built without FTS5 or its trigrams
            return False

    def _indexed(self, session: Session, words: Sequence[str], limit: int) -> dict[str, str]:
        """By id of the conversation, the text that fits best."""
        own = "IS NULL" if self._key_id is None else "= :key"
        quoted = " AND ".join('"' + word.replace('"', '""') + '"' for word in words)
        rows = session.execute(
            text(
                "SELECT t.conversation_id, t.text FROM conversation_search s "
                "JOIN conversation_texts t ON t.id = s.rowid JOIN conversations c ON c.id = t.conversation_id "
                f"WHERE conversation_search MATCH :query AND c.key_id {own} "
                "ORDER BY bm25(conversation_search), t.id DESC"
            ),
            {"query": quoted} | ({} if self._key_id is None else {"key": self._key_id}),
        )
        return _firsts(rows, limit)

    def _scanned(self, session: Session, words: Sequence[str], limit: int) -> dict[str, str]:
        texts = ConversationTextRow
        wanted = (
            select(texts.conversation_id, texts.text)
            .join(ConversationRow, ConversationRow.id == texts.conversation_id)
            .where(self._own(), *(texts.text.icontains(word, autoescape=True) for word in words))
            .order_by(texts.id.desc())
        )
        return _firsts(session.execute(wanted), limit)


_INDEX = (
    "CREATE VIRTUAL TABLE conversation_search USING fts5("
    "text, content='conversation_texts', content_rowid='id', tokenize='trigram')",
    "CREATE TRIGGER conversation_search_add AFTER INSERT ON conversation_texts BEGIN "
    "INSERT INTO conversation_search(rowid, text) VALUES (new.id, new.text); END",
    "CREATE TRIGGER conversation_search_remove AFTER DELETE ON conversation_texts BEGIN "
    "INSERT INTO conversation_search(conversation_search, rowid, text) VALUES ('delete', old.id, old.text); END",
    "INSERT INTO conversation_search(conversation_search) VALUES ('rebuild')",
)


def _firsts(rows: Any, limit: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for id, words in rows:
        found.setdefault(id, words)
        if len(found) == limit:
            break
    return found


def _words(query: str) -> list[str]:
    """Words, and phrases in quotes."""
    found = []
    for at, part in enumerate(query.replace("\0", " ").split('"')):
        found += [part.strip()] if at % 2 else part.split()
    return [word for word in found if word][:_MAX_WORDS]


def _shortened(given: str, most: int) -> str:
    words = " ".join(given.split())
    return words if len(words) <= most else words[: most - 1] + "…"


def _snippet(given: str, words: Sequence[str]) -> str:
    """The text around the first word that was looked for."""
    flat = " ".join(given.split())
    at = min((place for word in words if (place := flat.lower().find(word.lower())) >= 0), default=0)
    start = max(0, at - _SNIPPET_CHARS // 3)
    cut = flat[start : start + _SNIPPET_CHARS]
    return ("…" if start else "") + cut + ("…" if start + _SNIPPET_CHARS < len(flat) else "")
