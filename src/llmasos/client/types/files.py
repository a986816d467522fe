"""OpenAI's Files, Uploads and Batches on the wire.

Source: OpenAI API reference. A batch is a file of requests, one JSON object a line, that are answered when there is
room; its results are files again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llmasos.client.types.base import KeptRequest, WireRequest, WireResponse
from llmasos.client.types.response_items import Id
from llmasos.client.types.responses import Metadata

FilePurpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
PURPOSES: tuple[FilePurpose, ...] = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]


class ExpiresAfter(WireRequest):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2592000, description="From an hour to 30 days.")


class File(WireResponse):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"


class FileList(WireResponse):
    object: Literal["list"] = "list"
    data: list[File]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class DeletedFile(WireResponse):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class UploadRequest(KeptRequest):
    """Body of POST /v1/uploads: a file that will come in parts, within an hour."""

    bytes: int = Field(ge=1, description="Of all parts together.")
    filename: str = Field(min_length=1, max_length=1024)
    mime_type: str = Field(max_length=255)
    purpose: FilePurpose
    expires_after: ExpiresAfter | None = None


class CompleteUploadRequest(WireRequest):
    """Body of POST /v1/uploads/{id}/complete."""

    part_ids: list[Id] = Field(min_length=1, max_length=10_000, description="In the order of the file.")
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = Field(None, description="Of the whole file.")


class Upload(WireResponse):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: File | None = None


class UploadPart(WireResponse):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class BatchRequest(KeptRequest):
    """Body of POST /v1/batches."""

    input_file_id: Id = Field(description="A file with purpose batch: one request a line.")
    endpoint: BatchEndpoint
    completion_window: str = Field(
        description="What is not done by then is not done at all: 24h, or any number of m, h or d up to 30d."
    )
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchLine(WireRequest):
    """One line of a batch's input file."""

    custom_id: str = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


class BatchError(WireResponse):
    """`line` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(WireResponse):
    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchCounts(WireResponse):
    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchInputDetails(WireResponse):
    cached_tokens: int = 0


class BatchOutputDetails(WireResponse):
    reasoning_tokens: int = 0


class BatchUsage(WireResponse):
    input_tokens: int = 0
    input_tokens_details: BatchInputDetails = Field(default_factory=BatchInputDetails)
    output_tokens: int = 0
    output_tokens_details: BatchOutputDetails = Field(default_factory=BatchOutputDetails)
    total_tokens: int = 0


class Batch(WireResponse):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: BatchCounts = Field(default_factory=BatchCounts)
    usage: BatchUsage | None = None
    metadata: dict[str, str] | None = None


class BatchList(WireResponse):
    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False
