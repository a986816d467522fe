"""Installed applications below `/llmasos/v1/apps`. Sizes are bytes, durations seconds, moments ISO 8601 in UTC."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from llmasos.client.types.base import WireRequest, WireResponse

AppState = Literal["idle", "starting", "running", "waiting", "stopped", "damaged"]
"""`idle`: not running, its next call starts it. `waiting`: it crashed; calls are refused until `retry_at`. `stopped`:
somebody stopped it; it stays so until it is started. `damaged`: `error` says why."""


class AppGrant(WireResponse):
    """One permission: `kind` is net, fs.read, fs.write, env, exec, gpu, models or knowledge."""

    kind: str
    value: str = ""


class AppEnforcement(WireResponse):
    """One promise of the sandbox. `by`: the means that hold it; none: it is not enforced here, and `why` names what it
    needs."""

    what: str
    by: list[str] = Field(default_factory=list)
    why: str = ""


class AppLimits(WireResponse):
    """What holds for its processes together (`open_files`, `file_size`: for each); null: no limit. `timeout`: of one
    call; `concurrency`: calls at once; `cores`: processors."""

    memory: int | None = None
    cores: int | None = None
    processes: int | None = None
    open_files: int | None = None
    file_size: int | None = None
    disk: int | None = None
    timeout: float | None = None
    concurrency: int | None = None


class AppUse(WireResponse):
    """What a running application takes now, and its calls since it was started. `disk`: of its data folder."""

    pid: int
    started: datetime
    memory: int = 0
    cpu_seconds: float = 0.0
    processes: int = 0
    disk: int = 0
    calls: int = 0
    running_calls: int = 0


class AppExit(WireResponse):
    """How its process ended last. `reason`: exited, signal, killed, memory, cpu, processes, disk, file_size; `start`:
    it did not answer in time after its start; `health`: it no longer answered."""

    at: datetime
    reason: str
    code: int | None = None
    log: list[str] = Field(default_factory=list)
    """Its last lines."""


class AppConfigEntry(WireResponse):
    """A value that the user sets; `value` is null for a secret even if it is set."""

    type: str
    label: str = ""
    description: str = ""
    required: bool = False
    is_set: bool = False
    value: Any = None
    default: Any = None
    choices: list[str] = Field(default_factory=list)
    minimum: float | None = None
    maximum: float | None = None


class AppInfo(WireResponse):
    """An installed application. Without the scope `manage`: without `enforced`, `use`, `last_exit`, `config`, `key_id`,
    `source`."""

    object: Literal["app"] = "app"
    name: str
    version: str
    versions: list[str] = Field(default_factory=list)
    """All that are here; the others can be rolled back to."""
    summary: str = ""
    license: str = ""
    title: str = ""
    state: AppState
    error: str | None = None
    retry_at: datetime | None = None
    model: str | None = None
    """Its name among the models, `app/NAME`, if it can chat."""
    permissions: list[AppGrant] = Field(default_factory=list)
    models: dict[str, Any] = Field(default_factory=dict)
    """What it needs of models, by its own names for them: a model's name, or an object of requirements."""
    limits: AppLimits = Field(default_factory=AppLimits)
    config: dict[str, AppConfigEntry] = Field(default_factory=dict)
    enforced: list[AppEnforcement] = Field(default_factory=list)
    use: AppUse | None = None
    last_exit: AppExit | None = None
    num_crashes: int = 0
    """In a row, without a call that was answered."""
    key_id: str | None = None
    """Its access key: limits and priority are set there, usage is told by it."""
    publisher: str | None = None
    source: str | None = None
    installed: datetime | None = None


class AppList(WireResponse):
    object: Literal["list"] = "list"
    data: list[AppInfo]


class AppSheet(WireResponse):
    """What an install or update asks to be accepted. `asked`: all permissions, or in an update those that it adds.
    `enforced`: what this system would hold it to. `accept`: send it to accept exactly this package."""

    name: str
    version: str
    summary: str
    license: str
    previous: str | None = None
    publisher: str | None = None
    source: str
    yanked: str | None = None
    asked: list[AppGrant]
    permissions: list[AppGrant]
    models: dict[str, Any] = Field(default_factory=dict)
    resources: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, str] = Field(default_factory=dict)
    enforced: list[AppEnforcement] = Field(default_factory=list)
    accept: str


class InstallAppRequest(WireRequest):
    """`reference`: NAME or NAME==VERSION of an index, or a package file on the server. `index`: indexes in their order;
    default: the server's. `accept`: what the sheet's `accept` says, or true for whatever it asks. `trust`: the id of a
    publisher's new key."""

    reference: str = Field(min_length=1, max_length=1000)
    index: list[str] = Field(default_factory=list, max_length=20)
    accept: str | bool = False
    trust: str | None = Field(default=None, max_length=200)


class AppAction(WireRequest):
    """Body of `POST /apps/{name}/{action}`, all of it optional. `version`: for rollback."""

    index: list[str] = Field(default_factory=list, max_length=20)
    accept: str | bool = False
    trust: str | None = Field(default=None, max_length=200)
    version: str | None = Field(default=None, max_length=100)


class ConfigureAppRequest(WireRequest):
    """Values by name; null takes one away."""

    config: dict[str, Any]


class RemovedApp(WireResponse):
    """`data_kept`: whether its own folder is still there."""

    object: Literal["app.removed"] = "app.removed"
    name: str
    versions: list[str]
    data_kept: bool


class AppLogLine(WireResponse):
    """`stream`: stdout, stderr, or `server` for what the server did with it."""

    time: datetime
    stream: str
    text: str
