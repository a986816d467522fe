"""Who may call what: one line for every route of the server.

A route that is missing here answers 404, and a test that walks over the application's routes fails. Access:

    open        everyone, without a key
    any         every key, whatever its scopes
    inference   keys with this scope
    manage      keys with this scope
    publish     keys with this scope, or manage
    metrics     keys with the scope `manage`; without a key from this machine itself
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from starlette.routing import compile_path

from llmasos.tasks import BUILT_IN

Access = Literal["open", "any", "inference", "manage", "publish", "metrics"]


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


def _native(method: str, path: str, *, upload: bool = False) -> Rule:
    """A route of the server's own API, which is for those who run the server."""
    return Rule(method, f"/llmasos/v1{path}", "manage", upload=upload)


def _own(method: str, path: str, *, upload: bool = False) -> Rule:
    """A route to what the caller has left with the server: files, responses."""
    return Rule(method, f"/v1{path}", "inference", upload=upload)


RULES = (
    # the server
    Rule("GET", "/healthz", "open"),
    Rule("GET", "/readyz", "open"),
    Rule("GET", "/metrics", "metrics"),
    Rule("GET", "/console", "open"),  # a page without data: what it shows it asks for
    Rule("GET", "/console/{path:path}", "open"),
    Rule("GET", "/version", "any"),
    Rule("GET", "/openapi.json", "any"),
    Rule("GET", "/llms.txt", "any"),
    Rule("GET", "/.well-known/llmasos.json", "any"),
    # OpenAI
    Rule("GET", "/v1/models", "any"),
    Rule("GET", "/v1/models/{model:path}", "any"),
    _asks("/v1/chat/completions"),
    _asks("/v1/completions"),
    _asks("/v1/embeddings"),
    _asks("/v1/rerank"),
    _asks("/v2/rerank"),
    _asks("/rerank"),
    _asks("/v1/score"),
    _asks("/score"),
    Rule("POST", "/tokenize", "inference"),
    Rule("POST", "/detokenize", "inference"),
    Rule("POST", "/v1/load_lora_adapter", "manage"),
    Rule("POST", "/v1/unload_lora_adapter", "manage"),
    _asks("/v1/responses"),
    _own("POST", "/responses/input_tokens"),
    _own("GET", "/responses/{response_id}"),
    _own("DELETE", "/responses/{response_id}"),
    _own("POST", "/responses/{response_id}/cancel"),
    _own("GET", "/responses/{response_id}/input_items"),
    _own("POST", "/conversations"),
    _own("GET", "/conversations/{conversation_id}"),
    _own("POST", "/conversations/{conversation_id}"),
    _own("DELETE", "/conversations/{conversation_id}"),
    _own("POST", "/conversations/{conversation_id}/items"),
    _own("GET", "/conversations/{conversation_id}/items"),
    _own("GET", "/conversations/{conversation_id}/items/{item_id}"),
    _own("DELETE", "/conversations/{conversation_id}/items/{item_id}"),
    _own("POST", "/files", upload=True),
    _own("GET", "/files"),
    _own("GET", "/files/{file_id}"),
    _own("DELETE", "/files/{file_id}"),
    _own("GET", "/files/{file_id}/content"),
    _own("POST", "/uploads"),
    _own("POST", "/uploads/{upload_id}/parts", upload=True),
    _own("POST", "/uploads/{upload_id}/complete"),
    _own("POST", "/uploads/{upload_id}/cancel"),
    _own("POST", "/batches"),
    _own("GET", "/batches"),
    _own("GET", "/batches/{batch_id}"),
    _own("POST", "/batches/{batch_id}/cancel"),
    # OpenAI's fine-tuning: it takes the machine for hours, and adds to what is served
    Rule("POST", "/v1/fine_tuning/jobs", "manage"),
    Rule("GET", "/v1/fine_tuning/jobs", "manage"),
    Rule("GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}", "manage"),
    Rule("GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", "manage"),
    Rule("GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", "manage"),
    Rule("POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/{action}", "manage"),
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
    # LLMasOS: models, pulls, uploads, the machine
    _native("GET", "/models"),
    _native("GET", "/models/{name}"),
    _native("DELETE", "/models/{name}"),
    _native("GET", "/catalog"),
    _native("POST", "/plan"),
    _native("GET", "/status"),
    _native("POST", "/load"),
    _native("POST", "/unload"),
    _native("POST", "/pin"),
    _native("GET", "/pulls"),
    _native("POST", "/pulls"),
    _native("GET", "/pulls/{id}"),
    _native("GET", "/pulls/{id}/events"),
    _native("POST", "/pulls/{id}/pause"),
    _native("POST", "/pulls/{id}/resume"),
    _native("POST", "/pulls/{id}/cancel"),
    _native("POST", "/uploads"),
    _native("GET", "/uploads/{id}"),
    _native("PUT", "/uploads/{id}/{path:path}", upload=True),
    _native("POST", "/uploads/{id}/complete"),
    _native("DELETE", "/uploads/{id}"),
    _native("GET", "/requests"),
    _native("POST", "/requests/{id}/cancel"),
    _native("GET", "/logs"),
    _native("GET", "/system"),
    _native("GET", "/doctor"),
    # LLMasOS: jobs; without the scope `manage`, one's own
    Rule("GET", "/llmasos/v1/jobs", "any"),
    Rule("GET", "/llmasos/v1/jobs/{id}", "any"),
    Rule("GET", "/llmasos/v1/jobs/{id}/events", "any"),
    Rule("POST", "/llmasos/v1/jobs/{id}/{action}", "any"),
    # LLMasOS: the index of packages that this server hosts
    Rule("GET", "/llmasos/v1/index/index.json", "any"),
    Rule("GET", "/llmasos/v1/index/packages/{path:path}", "any"),
    Rule("GET", "/llmasos/v1/index/reports/{owner}/{name}/{version}", "any"),
    Rule("POST", "/llmasos/v1/index/packages/{owner}", "publish", upload=True),
    Rule("POST", "/llmasos/v1/index/yank", "publish"),
    # LLMasOS: tasks
    Rule("GET", "/llmasos/v1/tasks", "any"),
    *(_asks(f"/llmasos/v1/tasks/{name}") for name in BUILT_IN),
    _asks("/llmasos/v1/tasks/batch"),  # and each of its lines
    _asks("/llmasos/v1/tasks/pipeline"),
    # LLMasOS: knowledge bases
    _native("GET", "/knowledge"),
    _native("POST", "/knowledge"),
    _native("GET", "/knowledge/{name}"),
    _native("DELETE", "/knowledge/{name}"),
    _native("GET", "/knowledge/{name}/documents"),
    _native("PUT", "/knowledge/{name}/documents/{path:path}"),
    _native("DELETE", "/knowledge/{name}/documents/{path:path}"),
    _asks("/llmasos/v1/knowledge/{name}/search"),
    _asks("/llmasos/v1/knowledge/{name}/ask"),
    # LLMasOS: applications
    Rule("GET", "/llmasos/v1/apps", "any"),  # those that the key may use
    _native("POST", "/apps"),
    _native("PUT", "/apps", upload=True),
    Rule("GET", "/llmasos/v1/apps/openapi.json", "any"),
    Rule("GET", "/llmasos/v1/apps/{name}", "any"),
    _native("PATCH", "/apps/{name}"),
    _native("DELETE", "/apps/{name}"),
    _native("GET", "/apps/{name}/logs"),
    _native("POST", "/apps/{name}/{action}"),
    _native("GET", "/store"),
    *(
        Rule(method, "/apps/{name}/{path:path}", "inference", counted=True)
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
    ),
    # LLMasOS: agents, conversations
    _asks("/llmasos/v1/agents/runs"),
    Rule("GET", "/llmasos/v1/agents/runs", "inference"),
    Rule("GET", "/llmasos/v1/agents/runs/{id}", "inference"),
    Rule("DELETE", "/llmasos/v1/agents/runs/{id}", "inference"),
    _asks("/llmasos/v1/agents/runs/{id}/continue"),
    Rule("POST", "/llmasos/v1/agents/runs/{id}/cancel", "inference"),
    Rule("GET", "/llmasos/v1/agents/tools", "any"),
    Rule("GET", "/llmasos/v1/conversations", "inference"),
    # LLMasOS: keys, usage, audit log
    _native("POST", "/keys"),
    _native("GET", "/keys"),
    _native("GET", "/keys/{key_id}"),
    _native("PATCH", "/keys/{key_id}"),
    _native("DELETE", "/keys/{key_id}"),
    Rule("GET", "/llmasos/v1/usage", "any"),  # without the scope `manage`: one's own
    _native("GET", "/audit"),
)

KNOWLEDGE_SEARCH = "/llmasos/v1/knowledge/{name}/search"
_FOR_APPS = {
    *("/healthz", "/version", "/v1/models", "/v1/models/{model:path}"),
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/messages/count_tokens"),
    *("/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/tokenize", "/detokenize"),
    *("/llmasos/v1/tasks", *(f"/llmasos/v1/tasks/{name}" for name in BUILT_IN), KNOWLEDGE_SEARCH),
}


def is_for_apps(rule: Rule) -> bool:
    """Whether an installed application may ask for this from its process, with the models that it was granted. Nothing
    that is kept for it: that has no limit of its own."""
    return rule.path in _FOR_APPS


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
