"""`llmasos key`: make, list, show and revoke keys, and see what was used with them.

Works on the database of this machine, running server or not (a server notices within a second); with --url on that of a
server elsewhere, over HTTP and with the key in LLMASOS_API_KEY.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import quote, urlencode

from llmasos.cli.messages import t
from llmasos.cli.render import emit, pairs, say, table
from llmasos.errors import InvalidInputError

if TYPE_CHECKING:
    from llmasos.client.types.access import CreatedKey, CreateKeyRequest, KeyInfo, UsageRecord

Action = Literal["create", "ls", "show", "revoke", "usage"]
Scope = Literal["inference", "manage", "publish"]

_LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "requests_per_day",
    "tokens_per_day",
    "tokens_per_month",
    "max_parallel",
)
_SPAN = re.compile(r"([1-9][0-9]{0,5})([hdw])")
_SPANS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def key(
    action: Action = "ls",
    name: str | None = None,
    /,
    *,
    scope: tuple[Scope, ...] = (),
    model: tuple[str, ...] = (),
    app: tuple[str, ...] = (),
    expires: str | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    requests_per_day: int | None = None,
    tokens_per_day: int | None = None,
    tokens_per_month: int | None = None,
    max_parallel: int | None = None,
    priority: int | None = None,
    share_cache: bool = False,
    since: str | None = None,
    until: str | None = None,
    url: str | None = None,
    json: bool = False,
) -> None:
    """`llmasos key ACTION [NAME]`."""
    rights = {"scopes": list(scope), "models": list(model), "apps": list(app), "expires": expires}
    limits = dict(
        zip(
            _LIMITS,
            (
                requests_per_minute,
                tokens_per_minute,
                requests_per_day,
                tokens_per_day,
                tokens_per_month,
                max_parallel,
            ),
            strict=True,
        )
    )
    made = {**rights, **limits, "priority": priority, "share_cache": share_cache}
    chosen = {field: value for field, value in made.items() if not (value is None or value is False or value == [])}
    days = {field: value for field, value in {"since": since, "until": until}.items() if value is not None}
    _check(action, name, chosen, days)
    with_keys: Callable[[], Keys] = (lambda: _Remote(url)) if url is not None else _Local
    keys = with_keys()
    try:
        _ACTIONS[action](keys, name or "", chosen, days, json)
    finally:
        keys.close()


def _check(action: Action, name: str | None, chosen: dict[str, Any], days: dict[str, str]) -> None:
    """What would have no effect is refused."""
    command = f"llmasos key {action}"
    if name is None and action in ("create", "show", "revoke"):
        raise InvalidInputError(t("key.name", command=command), hint=f"{command} NAME", param="name")
    if name is not None and action == "ls":
        raise InvalidInputError(t("usage.extra", value=name), hint=f"llmasos key show {name}")
    stray = [*(chosen if action != "create" else ()), *(days if action != "usage" else ())]
    if stray:
        option = f"--{_FLAGS.get(stray[0], stray[0]).replace('_', '-')}"
        raise InvalidInputError(
            t("key.stray", option=option, command=command), hint=t("usage.see_help", command="llmasos key")
        )


_FLAGS = {"scopes": "scope", "models": "model", "apps": "app"}


def _create(keys: Keys, name: str, chosen: dict[str, Any], days: dict[str, str], as_json: bool) -> None:
    from pydantic import ValidationError

    from llmasos.client.types.access import CreateKeyRequest

    if "expires" in chosen:
        chosen["expires"] = _moment(chosen["expires"])
    try:
        request = CreateKeyRequest(name=name, **chosen)
    except ValidationError as e:
        first = e.errors()[0]
        field = str(first["loc"][0])
        flag = field if field == "name" else f"--{_FLAGS.get(field, field).replace('_', '-')}"
        raise InvalidInputError(f"{flag}: {first['msg']}.", param=field) from None
    made = keys.create(request)
    if as_json:
        emit(made.model_dump(mode="json"))
        return
    print(made.key)
    say(t("key.once", name=made.name, id=made.id))


def _ls(keys: Keys, name: str, chosen: dict[str, Any], days: dict[str, str], as_json: bool) -> None:
    found = keys.all()
    if as_json:
        emit([one.model_dump(mode="json") for one in found])
        return
    if not found:
        say(t("key.none"))
        return
    heads = [t(f"head.{head}") for head in ("id", "name", "state", "scopes", "model", "expires", "last_used")]
    rows = [
        (
            one.id,
            one.name,
            t(f"key.{one.state}"),
            ", ".join(one.scopes),
            t("key.all") if one.models is None else ", ".join(one.models),
            _when(one.expires),
            _when(one.last_used),
        )
        for one in found
    ]
    print(table(heads, rows))


def _show(keys: Keys, name: str, chosen: dict[str, Any], days: dict[str, str], as_json: bool) -> None:
    one = keys.show(name)
    if as_json:
        emit(one.model_dump(mode="json"))
    else:
        print(_facts(one))


def _facts(one: KeyInfo) -> str:
    facts = [
        (t("head.id"), one.id),
        (t("head.name"), one.name),
        (t("head.state"), t(f"key.{one.state}")),
        (t("head.scopes"), ", ".join(one.scopes)),
        (t("head.models"), t("key.all") if one.models is None else ", ".join(one.models)),
        (t("head.apps"), t("key.all") if one.apps is None else ", ".join(one.apps)),
        *((t(f"head.{field}"), str(getattr(one, field))) for field in _LIMITS if getattr(one, field) is not None),
        (t("head.priority"), str(one.priority)),
        (t("head.share_cache"), t("yes") if one.share_cache else "-"),
        (t("head.created"), _when(one.created)),
        (t("head.expires"), _when(one.expires)),
        (t("head.last_used"), _when(one.last_used)),
    ]
    return pairs(facts + ([(t("head.revoked"), _when(one.revoked))] if one.revoked else []))


def _revoke(keys: Keys, name: str, chosen: dict[str, Any], days: dict[str, str], as_json: bool) -> None:
    one = keys.revoke(name)
    if as_json:
        emit(one.model_dump(mode="json"))
    else:
        say(t("key.gone", name=one.name, id=one.id))


def _usage(keys: Keys, name: str, chosen: dict[str, Any], days: dict[str, str], as_json: bool) -> None:
    since, until = (_day(field, days[field]) if field in days else None for field in ("since", "until"))
    found = keys.usage(name or None, since, until)
    if as_json:
        emit([one.model_dump(mode="json") for one in found])
        return
    if not found:
        say(t("key.unused"))
        return
    counts = ("requests", "errors", "prompt_tokens", "cached_tokens", "output_tokens")
    heads = [t(f"head.{head}") for head in ("day", "key", "model", *counts)]
    rows = [
        (
            one.day.isoformat(),
            one.key_name or one.key_id or "-",
            one.model or "-",
            *(str(getattr(one, count)) for count in counts),
        )
        for one in found
    ]
    total = (t("key.total"), "", "", *(str(sum(getattr(one, count) for one in found)) for count in counts))
    print(table(heads, [*rows, total]))


_ACTIONS = {"create": _create, "ls": _ls, "show": _show, "revoke": _revoke, "usage": _usage}


def _moment(text: str) -> datetime:
    """`30d`, `12h`, `2w` from now, or a date or time in ISO 8601 (UTC where it names no zone)."""
    if (span := _SPAN.fullmatch(text)) is not None:
        return datetime.now(UTC) + int(span[1]) * _SPANS[span[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidInputError(
            t("key.bad_expires", value=text), hint=t("key.bad_expires.hint"), param="--expires"
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _day(field: str, text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise InvalidInputError(
            t("key.bad_day", option=f"--{field}", value=text), hint=t("key.bad_day.hint"), param=f"--{field}"
        ) from None


def _when(moment: datetime | None) -> str:
    return "-" if moment is None else f"{moment:%Y-%m-%d %H:%M} UTC"


class Keys(Protocol):
    """Where keys are, here or elsewhere."""

    def create(self, request: CreateKeyRequest) -> CreatedKey: ...
    def all(self) -> list[KeyInfo]: ...
    def show(self, name: str) -> KeyInfo: ...
    def revoke(self, name: str) -> KeyInfo: ...
    def usage(self, name: str | None, since: date | None, until: date | None) -> list[UsageRecord]: ...
    def close(self) -> None: ...


class _Local:
    """The database that this machine's server uses."""

    def __init__(self) -> None:
        import getpass

        from llmasos.store.database import Database

        self._database = Database.open()
        self._actor = f"local:{getpass.getuser()}"

    def create(self, request: CreateKeyRequest) -> CreatedKey:
        from llmasos.client.types.access import CreatedKey
        from llmasos.serve.access import api, registry

        with self._database.session() as session:
            made, text = registry.create(session, api.new_fields(request), actor=self._actor)
        return CreatedKey(**registry.facts(made), key=text)

    def all(self) -> list[KeyInfo]:
        from llmasos.client.types.access import KeyInfo
        from llmasos.serve.access import registry

        with self._database.session(read_only=True) as session:
            return [KeyInfo(**registry.facts(one)) for one in registry.keys(session)]

    def show(self, name: str) -> KeyInfo:
        from llmasos.client.types.access import KeyInfo
        from llmasos.serve.access import registry

        with self._database.session(read_only=True) as session:
            return KeyInfo(**registry.facts(registry.find(session, name)))

    def revoke(self, name: str) -> KeyInfo:
        from llmasos.client.types.access import KeyInfo
        from llmasos.serve.access import registry

        with self._database.session() as session:
            return KeyInfo(**registry.facts(registry.revoke(session, name, actor=self._actor)))

    def usage(self, name: str | None, since: date | None, until: date | None) -> list[UsageRecord]:
        from llmasos.serve.access import api

        with self._database.session(read_only=True) as session:
            return api.usage_records(session, key=name, since=since, until=until)

    def close(self) -> None:
        self._database.close()


class _Remote:
    """A server's own API."""

    def __init__(self, url: str) -> None:
        from llmasos.client.http import Http, Target
        from llmasos.client.providers.table import own_server

        base = url.rstrip("/").removesuffix("/v1")
        endpoint = own_server(base)
        headers = {"authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        variable = endpoint.provider.key_variable or "LLMASOS_API_KEY"
        self._http = Http(Target(f"{base}/llmasos/v1", endpoint.provider.name, headers, variable))

    def create(self, request: CreateKeyRequest) -> CreatedKey:
        from llmasos.client.types.access import CreatedKey

        # sent twice, it would be two keys
        body = request.model_dump(mode="json", exclude_unset=True)
        return CreatedKey.model_validate(self._http.json("POST", "/keys", body, once=True))

    def all(self) -> list[KeyInfo]:
        from llmasos.client.types.access import KeyList

        return KeyList.model_validate(self._http.json("GET", "/keys")).data

    def show(self, name: str) -> KeyInfo:
        return self._one("GET", name)

    def revoke(self, name: str) -> KeyInfo:
        return self._one("DELETE", name)

    def _one(self, method: str, name: str) -> KeyInfo:
        from llmasos.client.types.access import KeyInfo

        return KeyInfo.model_validate(self._http.json(method, f"/keys/{quote(name, safe='')}"))

    def usage(self, name: str | None, since: date | None, until: date | None) -> list[UsageRecord]:
        from llmasos.client.types.access import UsageReport

        asked = {"key": name, "since": since, "until": until}
        query = urlencode({field: str(value) for field, value in asked.items() if value is not None})
        return UsageReport.model_validate(self._http.json("GET", f"/usage?{query}")).data

    def close(self) -> None:
        self._http.close()
