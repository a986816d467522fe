"""Tasks below `/llmasos/v1/tasks`: the list, and batches and pipelines as jobs."""

from __future__ import annotations

from typing import Any

from pydantic import Field, JsonValue

from llmasos.client.types.base import WireRequest, WireResponse


class TaskInfo(WireResponse):
    """A task. `input` and `output` are JSON Schemas; a request has the input's fields and `model`."""

    name: str
    summary: str
    input: dict[str, Any]
    output: dict[str, Any]


class TaskList(WireResponse):
    data: list[TaskInfo]


class TaskBatchRequest(WireRequest):
    """One task over many inputs: those of an uploaded file of JSON lines, or `lines`. A line is an object with the
    task's inputs, or a text for the first of them."""

    task: str = Field(min_length=1, max_length=100)
    model: str = Field(min_length=1, max_length=500)
    input_file_id: str | None = None
    lines: list[JsonValue] | None = Field(default=None, min_length=1, max_length=10_000)
    parallel: int = Field(default=8, ge=1, le=32)


class PipelineRequest(WireRequest):
    """Steps and what they take. `model`: for steps that name none."""

    pipeline: dict[str, Any]
    inputs: dict[str, Any] = Field(default_factory=dict)
    model: str | None = Field(default=None, min_length=1, max_length=500)
