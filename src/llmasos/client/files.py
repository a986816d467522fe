"""Files and batches, as `client.files` and `client.batches`: many requests in one file, answered when there is room."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing, closing, contextmanager
from pathlib import Path
from typing import IO, Any

from llmasos.client.http import AsyncHttp, Http, Request, path_of
from llmasos.client.providers.openai import parsed
from llmasos.client.types.files import Batch, BatchList, DeletedFile, File, FileList

_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
Content = str | Path | bytes | IO[bytes]


@contextmanager
def _uploading(content: Content, purpose: str, filename: str | None) -> Iterator[Request]:
    """The request that sends a file; its bytes are read as they are sent. A str is a path."""
    if isinstance(content, str | Path):
        path = Path(content)
        with path.open("rb") as file:
            yield _upload(file, purpose, filename or path.name)
    else:
        yield _upload(content, purpose, filename or "file.jsonl")


def _upload(file: bytes | IO[bytes], purpose: str, filename: str) -> Request:
    form = ({"purpose": purpose}, {"file": (filename, file, "application/octet-stream")})
    return Request("POST", "/files", form=form, once=True)


def _batch(
    input_file_id: str, endpoint: str, completion_window: str, metadata: Mapping[str, str] | None
) -> dict[str, Any]:
    body = {"input_file_id": input_file_id, "endpoint": endpoint, "completion_window": completion_window}
    return body if metadata is None else {**body, "metadata": dict(metadata)}


class Files:
    """Blocking."""

    def __init__(self, http: Http) -> None:
        self._http, self._label = http, http.target.label

    def upload(self, content: Content, *, purpose: str = "batch", filename: str | None = None) -> File:
        """`content` is a path, bytes, or an open file. Its name is the path's unless `filename` gives one."""
        with _uploading(content, purpose, filename) as request:
            return parsed(File, self._http.send(request), self._label)

    def list(
        self,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int | None = None,
        order: str | None = None,
    ) -> FileList:
        """One page; with `has_more`, `after=` its `last_id` gives the next."""
        path = path_of("files", purpose=purpose, after=after, limit=limit, order=order)
        return parsed(FileList, self._http.json("GET", path), self._label)

    def retrieve(self, id: str) -> File:
        return parsed(File, self._http.json("GET", path_of("files", id)), self._label)

    def content(self, id: str) -> bytes:
        return b"".join(self._http.pieces("GET", path_of("files", id, "content")))

    def download(self, id: str, path: str | Path) -> int:
        """Write the content to `path` as it comes; gives the number of bytes."""
        with (
            closing(self._http.pieces("GET", path_of("files", id, "content"))) as pieces,
            Path(path).open("wb") as file,
        ):
            return sum(file.write(piece) for piece in pieces)

    def delete(self, id: str) -> DeletedFile:
        return parsed(DeletedFile, self._http.json("DELETE", path_of("files", id)), self._label)


class AsyncFiles:
    """The same for asyncio."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http, self._label = http, http.target.label

    async def upload(self, content: Content, *, purpose: str = "batch", filename: str | None = None) -> File:
        with _uploading(content, purpose, filename) as request:
            return parsed(File, await self._http.send(request), self._label)

    async def list(
        self,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int | None = None,
        order: str | None = None,
    ) -> FileList:
        path = path_of("files", purpose=purpose, after=after, limit=limit, order=order)
        return parsed(FileList, await self._http.json("GET", path), self._label)

    async def retrieve(self, id: str) -> File:
        return parsed(File, await self._http.json("GET", path_of("files", id)), self._label)

    async def content(self, id: str) -> bytes:
        async with aclosing(self._http.pieces("GET", path_of("files", id, "content"))) as pieces:
            return b"".join([piece async for piece in pieces])

    async def download(self, id: str, path: str | Path) -> int:
        size = 0
        async with aclosing(self._http.pieces("GET", path_of("files", id, "content"))) as pieces:
            with Path(path).open("wb") as file:
                async for piece in pieces:
                    size += await asyncio.to_thread(file.write, piece)
        return size

    async def delete(self, id: str) -> DeletedFile:
        return parsed(DeletedFile, await self._http.json("DELETE", path_of("files", id)), self._label)


class Batches:
    """Blocking."""

    def __init__(self, http: Http) -> None:
        self._http, self._label = http, http.target.label

    def create(
        self,
        input_file_id: str,
        *,
        endpoint: str,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
    ) -> Batch:
        """Have every line of an uploaded file answered by `endpoint`, e.g. /v1/chat/completions."""
        body = _batch(input_file_id, endpoint, completion_window, metadata)
        return parsed(Batch, self._http.json("POST", "/batches", body, once=True), self._label)

    def retrieve(self, id: str) -> Batch:
        return parsed(Batch, self._http.json("GET", path_of("batches", id)), self._label)

    def list(self, *, after: str | None = None, limit: int | None = None) -> BatchList:
        """One page, the newest first."""
        return parsed(BatchList, self._http.json("GET", path_of("batches", after=after, limit=limit)), self._label)

    def cancel(self, id: str) -> Batch:
        """What is done by then can be read."""
        return parsed(Batch, self._http.json("POST", path_of("batches", id, "cancel")), self._label)

    def wait(self, id: str, *, interval: float = 2.0) -> Batch:
        """The batch once it is over, however it ended; asked for every `interval` seconds."""
        while (batch := self.retrieve(id)).status not in _ENDED:
            time.sleep(interval)
        return batch


class AsyncBatches:
    """The same for asyncio."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http, self._label = http, http.target.label

    async def create(
        self,
        input_file_id: str,
        *,
        endpoint: str,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
    ) -> Batch:
        body = _batch(input_file_id, endpoint, completion_window, metadata)
        return parsed(Batch, await self._http.json("POST", "/batches", body, once=True), self._label)

    async def retrieve(self, id: str) -> Batch:
        return parsed(Batch, await self._http.json("GET", path_of("batches", id)), self._label)

    async def list(self, *, after: str | None = None, limit: int | None = None) -> BatchList:
        data = await self._http.json("GET", path_of("batches", after=after, limit=limit))
        return parsed(BatchList, data, self._label)

    async def cancel(self, id: str) -> Batch:
        return parsed(Batch, await self._http.json("POST", path_of("batches", id, "cancel")), self._label)

    async def wait(self, id: str, *, interval: float = 2.0) -> Batch:
        while (batch := await self.retrieve(id)).status not in _ENDED:
            await asyncio.sleep(interval)
        return batch
