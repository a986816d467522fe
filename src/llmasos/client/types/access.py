"""Keys, usage and the audit log below `/llmasos/v1`. Moments are ISO 8601 in UTC, days are UTC's."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, Field

from llmasos.client.types.base import WireRequest, WireResponse

KeyScope = Literal["inference", "manage", "publish"]
KeyState = Literal["active", "expired", "revoked"]


def _line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("has characters that can't be printed")
    return text


def _utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as e:
        raise ValueError("is beyond the calendar") from e


_Name = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_line)]
_Pattern = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_line)]
_Patterns = Annotated[list[_Pattern], Field(max_length=1000)]
_Scopes = Annotated[list[KeyScope], Field(min_length=1, max_length=3)]
_Limit = Annotated[int, Field(ge=1, le=2**53 - 1)]  # what JavaScript can count to
_Priority = Annotated[int, Field(ge=-1000, le=1000)]
_Moment = Annotated[AwareDatetime, Field(strict=False), AfterValidator(_utc)]  # JSON has no type of its own for it


class _KeyFields(WireRequest):
    models: _Patterns | None = None
    """Models that it may use, `*` standing for any characters; null: all."""
    apps: _Patterns | None = None
    """Applications that it may use; null: all."""
    expires: _Moment | None = None
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    requests_per_day: _Limit | None = None
    tokens_per_day: _Limit | None = None
    tokens_per_month: _Limit | None = None
    max_parallel: _Limit | None = None
    """Requests that it may have running at once."""


class CreateKeyRequest(_KeyFields):
    """A new key. Null limits: none."""

    name: _Name
    scopes: _Scopes = Field(default=["inference"])
    priority: _Priority = 0
    """The scheduler's: smaller is sooner. Its requests may ask for a later place, not for an earlier one."""
    share_cache: bool = False
    """Whether cached prefixes are shared with other keys that share theirs."""


class UpdateKeyRequest(_KeyFields):
    """What is left out stays; null takes a limit away."""

    # None is no value of these, only the mark of what was left out
    name: _Name = Field(default=None)  # type: ignore[assignment]  # absent: unchanged; null is refused
    scopes: _Scopes = Field(default=None)  # type: ignore[arg-type]  # absent: unchanged; null is refused
    priority: _Priority = Field(default=None)  # type: ignore[assignment]  # absent: unchanged; null is refused
    share_cache: bool = Field(default=None)  # type: ignore[assignment]  # absent: unchanged; null is refused


class KeyInfo(WireResponse):
    """A key without its secret; `id` is the part of its text that everybody may know."""

    object: Literal["key"] = "key"
    id: str
    name: str
    state: KeyState
    scopes: list[KeyScope | Literal["app"]]
    """`app`: the key of an installed application, which only its own process can use."""
    models: list[str] | None = None
    apps: list[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    max_parallel: int | None = None
    priority: int = 0
    share_cache: bool = False
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    last_used: datetime | None = None


class CreatedKey(KeyInfo):
    """The only answer that holds the key itself."""

    key: str


class KeyList(WireResponse):
    object: Literal["list"] = "list"
    data: list[KeyInfo]


class UsageRecord(WireResponse):
    """What one key did with one model on one day. `key_id` is null for requests without a key, `model` for those that
    reached none."""

    day: date
    key_id: str | None
    key_name: str | None
    model: str | None
    requests: int
    errors: int
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt tokens, those that had not to be computed again."""
    output_tokens: int


class UsageReport(WireResponse):
    object: Literal["list"] = "list"
    data: list[UsageRecord]


class AuditRecord(WireResponse):
    """`actor`: `key:ID`, `local:USER` (the command line) or `anyone`."""

    id: int
    at: datetime
    actor: str
    action: str
    target: str
    details: dict[str, Any]
    request_id: str | None = None


class AuditLog(WireResponse):
    """The newest first. With `has_more`, `before=` the last id gives what follows."""

    object: Literal["list"] = "list"
    data: list[AuditRecord]
    has_more: bool
