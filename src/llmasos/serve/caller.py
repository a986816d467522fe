"""Who asks: what the gate learned of a request's sender, and what holds for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from fastapi import Request

from llmasos.serve.access.errors import ForbiddenError

Scope = Literal["inference", "manage", "publish", "app"]
"""`inference`: ask models. `manage`: everything that changes or watches the server. `publish`: put packages of its own
into the server's index. `app`: what an installed
application may, from its own process."""


@dataclass(frozen=True)
class Caller:
    """`key_id` is None where no key was asked for (an open loopback server).

    `models` and `apps` are names or patterns (`smollm2-*`) that may be used; None: all. `priority` is the scheduler's
    (smaller is sooner). Callers with different `cache_salt`s share no cached prefixes: how fast an answer comes would
    tell what others have asked.
    """

    key_id: str | None = None
    name: str = "anyone"
    scopes: frozenset[Scope] = frozenset({"inference", "manage", "publish"})
    models: tuple[str, ...] | None = None
    apps: tuple[str, ...] | None = None
    priority: int = 0
    cache_salt: str | None = None

    @property
    def actor(self) -> str:
        """What the audit log calls it."""
        return "anyone" if self.key_id is None else f"key:{self.key_id}"

    def may_use(self, model: str) -> bool:
        return _matches(self.models, model)

    def check_model(self, name: str) -> None:
        """Raises ForbiddenError for a model that is none of the key's."""
        if not _matches(self.models, name):
            raise ForbiddenError(f"This key may not use the model {name!r}.", hint=_allowed(self.models))

    def check_app(self, name: str) -> None:
        """Raises ForbiddenError for an application that is none of the key's."""
        if not _matches(self.apps, name):
            raise ForbiddenError(f"This key may not use the application {name!r}.", hint=_allowed(self.apps))

    def check_scope(self, scope: Scope) -> None:
        if scope not in self.scopes:
            raise ForbiddenError(
                f"This needs the scope {scope!r}; {self._who} has {', '.join(sorted(self.scopes)) or 'none'}.",
                hint=f"llmasos key create NAME --scope {scope}",
            )

    @property
    def _who(self) -> str:
        return "a caller without a key" if self.key_id is None else "this key"

    def request_options(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The engine's request options of a request that asked for `asked`: a request may stand behind its key's
        priority, not before it, and its own cache_salt divides the key's share of the cache further."""
        options = dict(asked)
        if self.key_id is not None:
            options["priority"] = max(self.priority, options.get("priority") or self.priority)
        if self.cache_salt is not None or "cache_salt" in options:
            # who has no share of its own can't name another key's: those begin with an id
            options["cache_salt"] = f"{self.cache_salt or ''}:{options.get('cache_salt') or ''}"
        return options


ANYONE = Caller()


def _matches(allowed: tuple[str, ...] | None, name: str) -> bool:
    return allowed is None or any(fnmatchcase(name, pattern) for pattern in allowed)


def _allowed(names: tuple[str, ...] | None) -> str:
    return f"It may use: {', '.join(names or ()) or 'none'}."


def caller_of(request: Request) -> Caller:
    found = getattr(request.state, "caller", ANYONE)
    assert isinstance(found, Caller)
    return found
