"""Conversations that are kept: listed, searched, gone on with, exported. The same that the server has at
`/v1/conversations`."""

from __future__ import annotations

from llmasos.apps.memory.memory import Memory

__all__ = ["Memory"]
