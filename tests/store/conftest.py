"""Fixtures of this room: see store_web."""

from store_web import home, web

__all__ = ["home", "web"]
