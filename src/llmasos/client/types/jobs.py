"""Jobs below `/llmasos/v1/jobs`: work that goes on without its request."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from llmasos.client.types.base import WireResponse

JobState = Literal["queued", "running", "paused", "done", "failed", "cancelled"]


class JobError(WireResponse):
    """Why a job failed."""

    code: str
    message: str
    hint: str = ""


class Job(WireResponse):
    """`kind`: pull, task_batch, pipeline, package_check, fine_tuning, app. `name`: what it is about. `progress`: from 0
    to 1; null where the kind does not tell. `result` is the kind's own. `can_pause`: whether it can be paused and go
    on."""

    id: str
    kind: str
    name: str
    state: JobState
    progress: float | None = None
    message: str = ""
    created: datetime
    updated: datetime
    result: Any = None
    error: JobError | None = None
    can_pause: bool = False


class JobList(WireResponse):
    data: list[Job]
