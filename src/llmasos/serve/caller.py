"""Who asks: what the gate learned of a request's sender, and what holds for it."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request


@dataclass(frozen=True)
class Caller:
    """`key_id` is None where no key was asked for (an open loopback server)."""

    key_id: str | None = None
    name: str = "anyone"


ANYONE = Caller()


def caller_of(request: Request) -> Caller:
    found = getattr(request.state, "caller", ANYONE)
    assert isinstance(found, Caller)
    return found
