"""Applications: a typed Python function becomes a web service: validated, streaming and described."""

from __future__ import annotations

from llmasos.apps.application import Application
from llmasos.apps.jobs import Job, report_progress
from llmasos.apps.routes import Input, Route

__all__ = ["Application", "Input", "Job", "Route", "report_progress"]
