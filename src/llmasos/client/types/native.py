"""LLMasOS's own API below `/llmasos/v1`: models, plans, pulls, uploads, requests, logs, the machine.

Sizes are bytes, durations seconds, moments ISO 8601 in UTC.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from llmasos.client.types.base import WireRequest, WireResponse

ModelState = Literal["absent", "loading", "ready", "failed", "stopping"]
PullState = Literal["waiting", "running", "paused", "done", "failed", "cancelled"]
LogLevel = Literal["debug", "info", "warning", "error"]


class ReplicaInfo(WireResponse):
    """One process of a model."""

    pid: int | None = None
    device: str
    state: str
    busy: int = 0
    step_seconds: float = 0.0
    """For how long its engine's current step has been running."""


class LoadProgress(WireResponse):
    """How far a load is. `phase`: plan (what it needs is told from its headers), room (it waits until others have made
    some), start (of its process), download, check, unpack, load (of its weights). `done` of `total` bytes of the phase;
    `seconds` since the process was started, of those that it is expected to take without a download."""

    phase: str
    done: int = 0
    total: int | None = None
    seconds: float = 0.0
    expected_seconds: float | None = None


class ModelStatus(WireResponse):
    """What the server does with one model. `busy` requests use it, `waiting` ones wait until it is loaded.

    Bytes are by device: `predicted_bytes` is what is set aside for it, `measured_bytes` what its processes have.
    """

    name: str
    reference: str
    state: ModelState
    loading: LoadProgress | None = None
    """Of a model that is."""
    pinned: bool = False
    replicas: list[ReplicaInfo] = Field(default_factory=list)
    num_replicas: int = 1
    """As many are wanted."""
    predicted_bytes: dict[str, int] = Field(default_factory=dict)
    measured_bytes: dict[str, int] = Field(default_factory=dict)
    context_length: int | None = None
    busy: int = 0
    waiting: int = 0
    num_running: int = 0
    """Completions that the engine computes."""
    num_waiting: int = 0
    """Completions that wait in the engine."""
    num_generated_tokens: int = 0
    """Since the model was loaded; two readings give its tokens per second."""
    kv_cache_usage: float = 0.0
    """Share of the pages of keys and values in use; 1 is all."""
    load_seconds: float | None = None
    last_used: datetime | None = None
    keep_alive: float | None = None
    """Seconds that it stays after its last request; null: until its room is needed."""
    expires_at: datetime | None = None
    """When it is unloaded if nobody asks for it until then; null: not by time, or in use."""
    loads: int = 0
    restarts: int = 0
    evictions: dict[str, int] = Field(default_factory=dict)
    """By reason: room, idle, unloaded."""
    why_evicted: str | None = None
    """Why it was unloaded the last time."""
    last_error: str | None = None
    retry_at: datetime | None = None
    """When a failed or crashed model may be started again."""


class ModelStatusList(WireResponse):
    object: Literal["list"] = "list"
    data: list[ModelStatus]


class LibraryModel(WireResponse):
    """A model on the server's disk. `error` says what is wrong with a damaged one."""

    name: str
    format: str | None = None
    architecture: str | None = None
    family: str | None = None
    use: str | None = None
    licence: str | None = None
    source: str = ""
    notice: str | None = None
    size: int = 0
    created: datetime | None = None
    error: str | None = None
    state: ModelState = "absent"
    loading: LoadProgress | None = None


class LibraryModelList(WireResponse):
    object: Literal["list"] = "list"
    data: list[LibraryModel]


class CatalogModel(WireResponse):
    """A model that can be pulled by its name."""

    name: str
    family: str
    architecture: str
    use: str
    licence: str
    upstream: str
    languages: list[str] = Field(default_factory=list)
    aliases: list[str] = Field(default_factory=list)
    installed: bool = False
    notice: str | None = None


class CatalogModelList(WireResponse):
    object: Literal["list"] = "list"
    data: list[CatalogModel]


class RemovedModel(WireResponse):
    name: str
    freed_bytes: int


class LoadRequest(WireRequest):
    model: str = Field(min_length=1, max_length=500)
    pin: bool | None = None
    """Keep it whatever else is asked for; null leaves that as it is."""
    keep_alive: float | None = Field(default=None, ge=-1, le=1e9)
    """Seconds that it stays after its last request, until the server ends; -1: until its room is needed; null leaves
    that as it is."""


class UnloadRequest(WireRequest):
    model: str = Field(min_length=1, max_length=500)
    force: bool = False
    """Also while it answers requests: those get an error that can be retried."""


class PinRequest(WireRequest):
    model: str = Field(min_length=1, max_length=500)
    pinned: bool = True


class PlanRequest(WireRequest):
    """`context` tokens per request (null: the model's own, at most 4096), `concurrency` requests at once."""

    model: str = Field(min_length=1, max_length=500)
    context: int | None = Field(default=None, ge=1, le=2**31)
    concurrency: int = Field(default=1, ge=1, le=2**20)
    device: str = "auto"
    dtype: str = "auto"


class PlanFile(WireResponse):
    path: str
    size: int | None = None


class ModelPlan(WireResponse):
    """What a model costs before a byte of it is fetched. `memory_bytes` = weights + KV cache + activations;
    `max_context` is the largest context that fits, 0 if none does."""

    name: str
    source: str
    installed: bool
    architecture: str
    format: str
    licence: str | None = None
    notice: str | None = None
    files: list[PlanFile]
    download_bytes: int
    disk_bytes: int
    disk_free: int
    weights_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    memory_bytes: int
    memory_free: int
    device: str
    dtype: str
    context: int
    context_length: int
    max_context: int
    concurrency: int
    fits_disk: bool
    fits_memory: bool
    fits: bool
    verdict: str


class PullRequest(WireRequest):
    """`name`: what the model is to be called in the library."""

    model: str = Field(min_length=1, max_length=2000)
    name: str | None = Field(default=None, min_length=1, max_length=128)


class PullJob(WireResponse):
    """One pull. `done` of `total` bytes; `message` is its latest line for people, `error` why it failed.

    A pull that the server's end interrupted is paused. Paused and failed ones go on from the bytes that are there.
    """

    id: str
    model: str
    name: str
    state: PullState
    phase: str = ""
    file: str = ""
    done: int = 0
    total: int | None = None
    message: str = ""
    error: str | None = None
    error_code: str | None = None
    created: datetime
    updated: datetime


class PullJobList(WireResponse):
    object: Literal["list"] = "list"
    data: list[PullJob]


class UploadRequest(WireRequest):
    """`name`: what the model will be called in the library."""

    name: str = Field(min_length=1, max_length=128)


class UploadFile(WireResponse):
    path: str
    size: int
    sha256: str


class ModelUpload(WireResponse):
    """A model that is being sent, file by file."""

    id: str
    name: str
    files: list[UploadFile] = Field(default_factory=list)


class RequestInfo(WireResponse):
    """A request in flight. `state`: waiting for its model or its turn, or running. `key`: the name of the caller's
    key."""

    id: str
    route: str
    model: str | None = None
    key: str | None = None
    state: Literal["waiting", "running"]
    age_seconds: float
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0


class RequestInfoList(WireResponse):
    object: Literal["list"] = "list"
    data: list[RequestInfo]


class CancelledRequest(WireResponse):
    id: str
    cancelled: bool = True


class LogLine(WireResponse):
    """`fields`: what belongs to the event besides its text, e.g. status and times of a request."""

    time: datetime
    level: str
    logger: str
    message: str
    request_id: str | None = None
    fields: dict[str, Any] = Field(default_factory=dict)


class LogLineList(WireResponse):
    object: Literal["list"] = "list"
    data: list[LogLine]


class DeviceInfo(WireResponse):
    """`budget_bytes`: what the server may take of it, where it was told."""

    name: str
    kind: str
    memory_total: int
    memory_free: int | None = None
    budget_bytes: int | None = None


class SystemInfo(WireResponse):
    version: str
    python: str
    torch: str
    platform: str
    pid: int
    started: datetime
    uptime_seconds: float
    home: str
    disk_free: int
    offline: bool
    device: str
    """Where a model goes when nothing else is said."""
    dtype: str
    cpu_cores: int
    cpu_percent: float
    memory_rss: int
    """Of the server's own process, without its models'."""
    devices: list[DeviceInfo]


class DoctorCheck(WireResponse):
    name: Literal["home", "device", "sandbox"]
    status: Literal["ok", "warning", "error"]
    detail: str


class SandboxRow(WireResponse):
    """What applications are held to on this system: by which means, or why not."""

    what: str
    by: list[str]
    why: str


class DoctorReport(WireResponse):
    """`settings`: in force in the server, with secrets as "…"."""

    checks: list[DoctorCheck]
    sandbox: list[SandboxRow]
    settings: dict[str, str]
