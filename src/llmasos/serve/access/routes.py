"""Who may call what: one line for every route of the server.

A route that is missing here answers 404, and a test that walks over the application's routes fails. Access:

    open        everyone, without a key
    any         every key, whatever its scopes
    inference   keys with this scope
    manage      keys with this scope
    metrics     keys with the scope `manage`; without a key from this machine itself
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from starlette.routing import compile_path

Access = Literal["open", "any", "inference", "manage", "metrics"]


@dataclass(frozen=True)
class Rule:
    """`path` is spelt as the route spells it. `counted`: requests for it count against the key's limits. `upload`: the
    body may be as long as an upload."""

    method: str
    path: str
    access: Access
    counted: bool = False
    upload: bool = False


def _asks(path: str) -> Rule:
    """A route that has a model work."""
    return Rule("POST", path, "inference", counted=True)


RULES = (
    # the server
    Rule("GET", "/healthz", "open"),
    Rule("GET", "/readyz", "open"),
    Rule("GET", "/metrics", "metrics"),
    Rule("GET", "/version", "any"),
    Rule("GET", "/openapi.json", "any"),
    # OpenAI
    Rule("GET", "/v1/models", "any"),
    Rule("GET", "/v1/models/{model:path}", "any"),
    _asks("/v1/chat/completions"),
    _asks("/v1/completions"),
    _asks("/v1/embeddings"),
    Rule("POST", "/v1/load_lora_adapter", "manage"),
    Rule("POST", "/v1/unload_lora_adapter", "manage"),
    # Anthropic
    _asks("/v1/messages"),
    Rule("POST", "/v1/messages/count_tokens", "inference"),
    # Ollama
    Rule("GET", "/", "open"),
    Rule("GET", "/api/version", "any"),
    Rule("GET", "/api/tags", "any"),
    Rule("GET", "/api/ps", "any"),
    Rule("POST", "/api/show", "any"),
    _asks("/api/chat"),
    _asks("/api/generate"),
    _asks("/api/embed"),
    _asks("/api/embeddings"),
    Rule("POST", "/api/pull", "manage"),
    Rule("DELETE", "/api/delete", "manage"),
    Rule("POST", "/api/copy", "manage"),
    Rule("POST", "/api/create", "manage"),
    Rule("POST", "/api/push", "manage"),
    Rule("POST", "/api/blobs/{digest}", "manage"),
    # keys, usage, audit log
    Rule("POST", "/llmasos/v1/keys", "manage"),
    Rule("GET", "/llmasos/v1/keys", "manage"),
    Rule("GET", "/llmasos/v1/keys/{key_id}", "manage"),
    Rule("PATCH", "/llmasos/v1/keys/{key_id}", "manage"),
    Rule("DELETE", "/llmasos/v1/keys/{key_id}", "manage"),
    Rule("GET", "/llmasos/v1/usage", "any"),  # without the scope `manage`: one's own
    Rule("GET", "/llmasos/v1/audit", "manage"),
)

_EXACT = {(rule.method, rule.path): rule for rule in RULES if "{" not in rule.path}
_PATTERNS: list[tuple[Rule, re.Pattern[str]]] = [
    (rule, compile_path(rule.path)[0]) for rule in RULES if "{" in rule.path
]


@lru_cache(maxsize=1024)
def rule_for(method: str, path: str) -> Rule | None:
    """The rule of a request; None where there is none, so no route either."""
    wanted = "GET" if method == "HEAD" else method
    if (found := _EXACT.get((wanted, path))) is not None:
        return found
    return next((rule for rule, pattern in _PATTERNS if rule.method == wanted and pattern.match(path)), None)


def methods_of(path: str) -> list[str]:
    """What else may be done with this path."""
    return sorted({rule.method for rule in RULES if rule_for(rule.method, path) is not None})
