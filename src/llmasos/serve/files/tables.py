"""The tables of this room."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from llmasos.store.database import Base


class FileRow(Base):
    """A file; its bytes are `<home>/files/<id>` of the home that `place` names (`Storage.place`). It is gone for
    everybody from the moment `expires`."""

    __tablename__ = "files"
    __table_args__ = (Index(None, "key_id", "created"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str | None]
    place: Mapped[str]
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int]
    created: Mapped[datetime]
    expires: Mapped[datetime | None] = mapped_column(index=True)


class UploadRow(Base):
    """A file that comes in parts. `file_seconds`: how long the file lives once it is whole."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str | None]
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int]
    created: Mapped[datetime]
    expires: Mapped[datetime] = mapped_column(index=True)
    status: Mapped[str]
    file_seconds: Mapped[int | None]
    file_id: Mapped[str | None]


class PartRow(Base):
    """A part of an upload; its bytes are `<home>/files/<id>`."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(index=True)
    bytes: Mapped[int]
    created: Mapped[datetime]
