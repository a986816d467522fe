"""Applications: a typed Python function becomes a web service: validated, streaming and described.

Names load on first use: the sandbox's launcher, which lives here, too, needs none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmasos.apps.application import Application as Application
    from llmasos.apps.chat import ChatRequest as ChatRequest
    from llmasos.apps.chat import Message as Message
    from llmasos.apps.depends import Depends as Depends
    from llmasos.apps.files import Audio as Audio
    from llmasos.apps.files import File as File
    from llmasos.apps.files import Image as Image
    from llmasos.apps.files import Upload as Upload
    from llmasos.apps.jobs import Job as Job
    from llmasos.apps.jobs import report_progress as report_progress
    from llmasos.apps.llm import Requirement as Requirement
    from llmasos.apps.routes import Input as Input
    from llmasos.apps.routes import Route as Route
    from llmasos.apps.sessions import Session as Session
    from llmasos.client.leaving import check_cancelled as check_cancelled
    from llmasos.client.leaving import is_cancelled as is_cancelled

__all__ = [
    "Application",
    "Audio",
    "ChatRequest",
    "Depends",
    "File",
    "Image",
    "Input",
    "Job",
    "Message",
    "Requirement",
    "Route",
    "Session",
    "Upload",
    "check_cancelled",
    "is_cancelled",
    "report_progress",
]

_HOMES = {
    "Application": "application",
    "Audio": "files",
    "ChatRequest": "chat",
    "Depends": "depends",
    "File": "files",
    "Image": "files",
    "Input": "routes",
    "Job": "jobs",
    "Message": "chat",
    "Requirement": "llm",
    "Route": "routes",
    "Session": "sessions",
    "Upload": "files",
    "check_cancelled": "leaving",
    "is_cancelled": "leaving",
    "report_progress": "jobs",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home = _HOMES[name]
        return getattr(
            importlib.import_module("llmasos.client.leaving" if home == "leaving" else f"{__name__}.{home}"), name
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
