"""A model that a client sends: file by file into a hidden folder of the library, checked as a whole, then moved into
its place in one rename.

Weights are safetensors or GGUF; what else a model's folder holds has one of the known names. Anything else is refused
before a byte of it is written, and no name leaves the folder.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fastapi import APIRouter, Request, Response

from llmasos.client.types.native import LibraryModel, ModelUpload, UploadFile, UploadRequest
from llmasos.errors import BusyError, DiskFullError, FormatError, InvalidInputError, NotFoundError, PickleRefusedError
from llmasos.serve.native import worker
from llmasos.serve.native.common import responses
from llmasos.serve.native.library import library_model
from llmasos.store.card import CARD_NAME, Card, CardFile, check_name, stays_inside, write_card
from llmasos.store.library import Library, model_lock
from llmasos.store.pull import DISK_MARGIN, disk_free, size
from llmasos.store.sources import belongs_to_model, is_pickle_name
from llmasos.store.transfer import disk_errors

FOLDER = ".uploads"
FORGOTTEN_AFTER = 7 * 86400.0
"""Seconds after the last byte of an upload that was never completed."""
MOST_FILES = 2000
_STATE = "upload.json"
_ID = re.compile(r"upload_[0-9a-f]{16}")
_FLUSH = 4 << 20
_TEXTS = (".json", ".txt", ".md", ".model", ".jinja")
"""Files that may be sent beside those of a model, and are left out of it."""


class UploadNotFoundError(NotFoundError):
    param = "id"


class Uploads:
    """The uploads of one library. `max_bytes` is the longest file."""

    def __init__(self, *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._busy: set[tuple[str, str]] = set()

    @property
    def root(self) -> Path:
        return Library().root / FOLDER

    def begin(self, name: str) -> ModelUpload:
        """Raises InvalidInputError for what can't be a model's name, BusyError for a name that is taken."""
        check_name(name)
        _check_free(name)
        self._sweep()
        id = f"upload_{secrets.token_hex(8)}"
        folder = self.root / id
        with disk_errors(folder):
            (folder / "files").mkdir(parents=True)
            _write(folder, name, [])
        return ModelUpload(id=id, name=name)

    def get(self, id: str) -> ModelUpload:
        name, files = self._read(id)
        return ModelUpload(id=id, name=name, files=files)

    async def receive(self, id: str, path: str, request: Request) -> UploadFile:
        """The request's body as the file `path`, written as it comes."""
        _, files = await asyncio.to_thread(self._read, id)
        check_file(path)
        if len(files) >= MOST_FILES:
            raise InvalidInputError(f"An upload holds at most {MOST_FILES} files.", param="path")
        declared = request.headers.get("content-length", "")
        length = int(declared) if declared.isascii() and declared.isdigit() else 0
        self._check_length(length)
        needed, free = length + DISK_MARGIN, disk_free(self.root)
        if needed > free:
            raise DiskFullError(
                f"{path} needs {size(needed)} and the server has {size(free)} free.", hint="`llmasos rm` makes room."
            )
        with self._alone(id, path):
            return await self._write_body(id, path, request)

    async def _write_body(self, id: str, path: str, request: Request) -> UploadFile:
        target = self.root / id / "files" / path
        part = target.with_name(f"{target.name}.part")
        digest, count = hashlib.sha256(), 0
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as f:
                    pieces: list[bytes] = []
                    waiting = 0
                    async for piece in request.stream():
                        count += len(piece)
                        self._check_length(count)
                        pieces.append(piece)
                        waiting += len(piece)
                        if waiting >= _FLUSH:
                            await asyncio.to_thread(_flush, f, digest, pieces)
                            waiting = 0
                    await asyncio.to_thread(_flush, f, digest, pieces)
                os.replace(part, target)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        file = UploadFile(path=path, size=count, sha256=digest.hexdigest())
        name, files = self._read(id)
        _write(self.root / id, name, [*(one for one in files if one.path != path), file])
        return file

    async def complete(self, id: str) -> Card:
        """Check the whole and install it. Raises the errors of opening a model; the upload then stays."""
        name, files = await asyncio.to_thread(self._read, id)
        with self._alone(id, ""):
            folder = self.root / id / "files"
            facts = await worker.run("check", {"folder": str(folder)})
            known = {file.path: file for file in files}
            card = Card(
                name=name,
                format=facts["format"],
                architecture=facts["architecture"],
                family=facts["family"],
                source=f"file:{Library().root / name}",
                files=[CardFile(**known[path].model_dump()) for path in facts["files"]],
            )
            await asyncio.to_thread(self._install, id, folder, card)
        return card

    def _install(self, id: str, folder: Path, card: Card) -> None:
        library = Library()
        kept = {file.path for file in card.files}
        with model_lock(library.home, card.name), disk_errors(library.root):
            _check_free(card.name)
            for file in [path for path in folder.rglob("*") if path.is_file()]:
                if file.relative_to(folder).as_posix() not in kept:
                    file.unlink()
            write_card(folder, card)
            os.replace(folder, library.root / card.name)
        shutil.rmtree(self.root / id, ignore_errors=True)

    def drop(self, id: str) -> None:
        self._read(id)
        shutil.rmtree(self.root / id, ignore_errors=True)

    def _read(self, id: str) -> tuple[str, list[UploadFile]]:
        try:
            if not _ID.fullmatch(id):
                raise FileNotFoundError
            state = json.loads((self.root / id / _STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UploadNotFoundError(
                f"There is no upload {id!r}.", hint="POST /llmasos/v1/uploads begins one."
            ) from None
        return state["name"], [UploadFile(**file) for file in state["files"]]

    def _check_length(self, length: int) -> None:
        if length > self.max_bytes:
            raise TooLongError(
                f"The file is longer than {self.max_bytes} bytes, this server's limit.",
                hint="llmasos serve --max-upload",
            )

    @contextmanager
    def _alone(self, id: str, path: str) -> Iterator[None]:
        """Only one request at a time writes a file, and none while the upload is completed."""
        if any((busy == id and path in ("", one)) or (busy, one) == (id, "") for busy, one in self._busy):
            raise BusyError(f"Another request is at {path or 'this upload'}.", hint="Wait for it.")
        self._busy.add((id, path))
        try:
            yield
        finally:
            self._busy.discard((id, path))

    def _sweep(self) -> None:
        """Deletes what was begun long ago and never completed."""
        try:
            folders = list(self.root.iterdir())
        except FileNotFoundError:
            return
        for folder in folders:
            state = folder / _STATE
            if not state.exists() or time.time() - state.stat().st_mtime > FORGOTTEN_AFTER:
                shutil.rmtree(folder, ignore_errors=True)


class TooLongError(InvalidInputError):
    http_status = 413


def check_file(path: str) -> None:
    """Raises FormatError for a name that leaves the folder, PickleRefusedError for weights that can run code, and
    InvalidInputError for anything that is no part of a model."""
    if not stays_inside(path) or path == CARD_NAME or len(path) > 500 or any(ord(c) < 32 for c in path):
        raise FormatError(f"The file name {path[:100]!r} is refused.", hint="Names stay inside the model's folder.")
    if is_pickle_name(path):
        raise PickleRefusedError(
            f"{path} would be a pickle, which can run any code when it is loaded.",
            hint="Send .safetensors or .gguf files: transformers' `save_pretrained` writes them.",
        )
    harmless = path.count("/") <= 1 and path.lower().endswith(_TEXTS)
    if not belongs_to_model(path) and not harmless:
        raise InvalidInputError(
            f"{path} is no part of a model.",
            hint="Send .safetensors with config.json and the tokenizer's files, or .gguf.",
            param="path",
        )


def _check_free(name: str) -> None:
    library = Library()
    if (library.root / name).exists():
        raise BusyError(f"The library has a model {name!r} already.", hint="Choose another name, or delete that one.")


def _flush(f: IO[bytes], digest: hashlib._Hash, pieces: list[bytes]) -> None:
    for piece in pieces:
        digest.update(piece)
    f.writelines(pieces)
    pieces.clear()


def _write(folder: Path, name: str, files: list[UploadFile]) -> None:
    state = {"name": name, "files": [file.model_dump() for file in files]}
    temporary = folder / f"{_STATE}.tmp"
    temporary.write_text(json.dumps(state), encoding="utf-8")
    os.replace(temporary, folder / _STATE)


def create_router(uploads: Uploads) -> APIRouter:
    router = APIRouter(prefix="/uploads")
    body = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

    @router.post("", status_code=201, summary="Begin to upload a model", responses=responses(409))
    async def begin(body: UploadRequest) -> ModelUpload:
        return await asyncio.to_thread(uploads.begin, body.name)

    @router.get("/{id}", summary="What has arrived of it", responses=responses(404))
    async def get(id: str) -> ModelUpload:
        return await asyncio.to_thread(uploads.get, id)

    @router.put(
        "/{id}/{path:path}",
        summary="Send one file",
        openapi_extra={"requestBody": {"required": True, **body}},
        responses=responses(404, 409, 413, 422, 507),
    )
    async def put(id: str, path: str, request: Request) -> UploadFile:
        return await uploads.receive(id, path, request)

    @router.post(
        "/{id}/complete",
        status_code=201,
        summary="Check the files and install the model",
        responses=responses(404, 409, 422),
    )
    async def complete(id: str) -> LibraryModel:
        return library_model(await uploads.complete(id), {})

    @router.delete("/{id}", status_code=204, summary="Give an upload up", responses=responses(404))
    async def drop(id: str) -> Response:
        await asyncio.to_thread(uploads.drop, id)
        return Response(status_code=204)

    return router
