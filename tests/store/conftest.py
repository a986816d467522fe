"""Fixtures of this room: see store_web."""

from store_web import web

__all__ = ["web"]
