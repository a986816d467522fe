"""`llmasos.toml`: what an application's author says of it, and what it asks for.

    [app]          name version summary license python entry
    [models]       default = "gpt2", or { min_context = 4096, capabilities = ["tools"], max_size = "2GB" }
    [permissions]  net fs.read fs.write env exec gpu models knowledge
    [resources]    memory cpu processes disk timeout concurrency
    [config]       what the user sets: name = { type = "choice", choices = ["a", "b"], default = "a" }

A model, an adapter or a dataset has [package] with its kind instead, and nothing else:

    [package]      kind = "model", "adapter" or "dataset"; name version summary license; base of an adapter: its model

Versions are those of PEP 440 in their normal spelling (1.2, 1.2.0rc1), without epoch and local part, because they are
folders, too. Every key that is not known is an error.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llmasos.errors import FormatError, InvalidInputError
from llmasos.store.card import stays_inside

MANIFEST = "llmasos.toml"
MAX_MANIFEST = 1 << 20  # bytes

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}
_HOST = re.compile(
    r"(\*|(\*\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*|\[[0-9a-f:]+\])(:(?P<port>[0-9]{1,5}))?"
)
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_SIZE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) ?([KMGT])i?B")
_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}
_SPAN = re.compile(r"([0-9]{1,6})(s|m|h)")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def check_app_name(name: str) -> str:
    """`name` if it can name an application; InvalidInputError otherwise."""
    if not _NAME.fullmatch(name) or len(name) > 64 or name in _RESERVED:
        raise InvalidInputError(
            f"{name!r} cannot be the name of an application.",
            hint="Use lower-case letters, digits and single hyphens, a letter first, at most 64 characters.",
            param="name",
        )
    return name


def _said(error: InvalidInputError) -> ValueError:
    return ValueError(f"{error.message} {error.hint}")


def _app_name(name: str) -> str:
    try:
        return check_app_name(name)
    except InvalidInputError as e:
        raise _said(e) from None


def _version(text: str) -> str:
    try:
        version = Version(text)
    except InvalidVersion:
        raise ValueError("is no version of PEP 440; write one like 1.0.0") from None
    if version.epoch or version.local:
        raise ValueError("has an epoch or a local part; write one like 1.0.0")
    if str(version) != text:
        raise ValueError(f"is not in its normal spelling; write {str(version)!r}")
    return text


def _python(text: str) -> str:
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        raise ValueError('is no range of versions; write one like ">=3.11"') from None
    return text


def _entry(text: str) -> str:
    path, colon, name = text.partition(":")
    if not stays_inside(path) or not path.endswith(".py") or (colon and not name.isidentifier()):
        raise ValueError('names no file of the application; write "app.py" or "app.py:name"')
    return text


def _net(text: str) -> str:
    match = _HOST.fullmatch(text)
    if not match or not 0 < int(match["port"] or 1) < 65536:
        raise ValueError('is no host; write "api.example.com", "api.example.com:443", "*.example.com", or "*" for any')
    return text


def _folder(text: str) -> str:
    root, _, rest = text.partition("/")
    whole = line(rest).rstrip("/")
    if root not in ("", "$data", "$inputs") or (whole and not stays_inside(whole)) or text == "":
        raise ValueError('is neither "$data", "$inputs", something below them, nor an absolute path')
    return text.rstrip("/") or "/"


def _variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError("is no name of an environment variable")
    return text


def line(text: str) -> str:
    """`text` if it shows as what it is in one line. Raises ValueError for control and direction characters: with them a
    permission sheet could say anything."""
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _DIRECTIONS for c in text):
        raise ValueError("has a control character")
    return text


def _size(text: str) -> str:
    if not _SIZE.fullmatch(text):
        raise ValueError('is no size; write one like "512MB" or "2GB"')
    return text


def _span(text: str) -> str:
    if not _SPAN.fullmatch(text) or not seconds(text):
        raise ValueError('is no span of time; write one like "30s", "5m" or "2h"')
    return text


def num_bytes(size: str) -> int:
    """A size of a manifest in bytes; its units are powers of 1024."""
    match = _SIZE.fullmatch(size)
    assert match is not None, size
    return int(float(match[1]) * (1 << _UNITS[match[2]]))


def seconds(span: str) -> int:
    """A span of time of a manifest in seconds."""
    match = _SPAN.fullmatch(span)
    assert match is not None, span
    return int(match[1]) * _SECONDS[match[2]]


def _not_vision(capability: Any) -> Any:
    if capability == "vision":
        raise ValueError("no vision model is supported yet")
    return capability


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Line = Annotated[str, AfterValidator(line)]
Net = Annotated[str, AfterValidator(_net)]
Folder = Annotated[str, AfterValidator(_folder)]
Size = Annotated[str, AfterValidator(_size)]
Key = Annotated[str, Field(pattern=f"^{_KEY.pattern}$")]


Kind = Literal["app", "model", "adapter", "dataset"]


class AppTable(_Strict):
    """`entry`: the file that has the application, "app.py:name" where it has several. `license`: an SPDX expression.
    `base`: the model that an adapter is for."""

    name: Annotated[str, AfterValidator(_app_name)]
    version: Annotated[str, AfterValidator(_version)]
    summary: Line = Field(min_length=1, max_length=200)
    license: Line = Field(min_length=1, max_length=100)
    python: Annotated[str, AfterValidator(_python)] = ">=3.11"
    entry: Annotated[str, AfterValidator(_entry)] = "app.py"
    kind: Kind = "app"
    base: Line | None = Field(default=None, min_length=1, max_length=200)

    @model_validator(mode="after")
    def _of_its_kind(self) -> AppTable:
        if self.base is not None and self.kind != "adapter":
            raise ValueError(f"base has no meaning for a package of the kind {self.kind!r}")
        if self.kind != "app" and (stray := sorted({"entry", "python"} & self.model_fields_set)):
            raise ValueError(f"{stray[0]} has no meaning for a package of the kind {self.kind!r}")
        return self


class ModelNeed(_Strict):
    """What a model must have: tokens of context, abilities; `max_size` of its files."""

    min_context: int | None = Field(default=None, ge=1)
    capabilities: list[Annotated[Literal["tools", "embed"], BeforeValidator(_not_vision)]] = []
    max_size: Size | None = None


class FileAccess(_Strict):
    read: list[Folder] = []
    write: list[Folder] = []


class Permissions(_Strict):
    """`net`: hosts, every port of them where none is given. `fs`: "$data" is the application's own folder, "$inputs"
    the files that a call brings. `models`: names of [models] that it may ask. `knowledge`: the server's knowledge bases
    that it may search."""

    net: list[Net] = []
    fs: FileAccess = FileAccess()
    env: list[Annotated[str, AfterValidator(_variable)]] = []
    exec: bool = False
    gpu: bool = False
    models: list[str] = []
    knowledge: list[Key] = []


class Resources(_Strict):
    """`cpu`: cores. `disk`: of its own folder. `timeout`: of one call. `concurrency`: calls at once."""

    memory: Size | None = None
    cpu: float | None = Field(default=None, gt=0, le=1024)
    processes: int | None = Field(default=None, ge=1, le=100_000)
    disk: Size | None = None
    timeout: Annotated[str, AfterValidator(_span)] | None = None
    concurrency: int | None = Field(default=None, ge=1, le=100_000)


class ConfigEntry(_Strict):
    """One value that the user sets. `minimum` and `maximum` limit a number, or the length of a string."""

    type: Literal["string", "number", "bool", "choice", "secret", "folder", "file"]
    label: Line = ""
    description: Line = ""
    required: bool = False
    default: str | int | float | bool | None = None
    choices: list[Line] = []
    minimum: float | None = None
    maximum: float | None = None

    @model_validator(mode="after")
    def _fits(self) -> ConfigEntry:
        if (self.type == "choice") != bool(self.choices):
            raise ValueError('choices = ["a", "b"] belongs to type = "choice", and only to it')
        if self.type not in ("string", "number") and (self.minimum, self.maximum) != (None, None):
            raise ValueError(f"minimum and maximum have no meaning for type = {self.type!r}")
        if None not in (self.minimum, self.maximum) and (self.minimum or 0) > (self.maximum or 0):
            raise ValueError(f"minimum = {self.minimum:g} is above maximum = {self.maximum:g}")
        if self.default is not None:
            self.check(self.default)
        return self

    def check(self, value: Any) -> Any:
        """`value` if the user may set it. Raises ValueError that says what is allowed."""
        kind = {"number": (int, float), "bool": (bool,)}.get(self.type, (str,))
        if not isinstance(value, kind) or (self.type == "number" and isinstance(value, bool)):
            raise ValueError(f"{value!r} is no {self.type}")
        if self.type == "secret" and value is self.default:
            raise ValueError("a secret has no default: everyone could read it")
        if self.type == "choice" and value not in self.choices:
            raise ValueError(f"{value!r} is none of {', '.join(self.choices)}")
        size: float = len(value) if isinstance(value, str) else value
        if self.minimum is not None and size < self.minimum:
            raise ValueError(f"{value!r} is below minimum = {self.minimum:g}")
        if self.maximum is not None and size > self.maximum:
            raise ValueError(f"{value!r} is above maximum = {self.maximum:g}")
        return value


class Manifest(_Strict):
    app: AppTable
    models: dict[Key, Annotated[Line, Field(min_length=1)] | ModelNeed] = {}
    permissions: Permissions = Permissions()
    resources: Resources = Resources()
    config: dict[Key, ConfigEntry] = {}

    @model_validator(mode="before")
    @classmethod
    def _either(cls, data: Any) -> Any:
        """[package] is [app] by another name."""
        if isinstance(data, dict) and "package" in data and "app" not in data:
            return {"app" if key == "package" else key: value for key, value in data.items()}
        return data

    @model_validator(mode="after")
    def _of_its_kind(self) -> Manifest:
        if self.app.kind != "app" and (stray := self.model_fields_set - {"app"}):
            raise ValueError(f"[{sorted(stray)[0]}] has no meaning for a package of the kind {self.app.kind!r}")
        return self

    @property
    def name(self) -> str:
        return self.app.name

    @property
    def kind(self) -> Kind:
        return self.app.kind

    @property
    def version(self) -> Version:
        return Version(self.app.version)


def parse_manifest(text: bytes | str, file: str = MANIFEST) -> Manifest:
    """The manifest in `text`. Raises FormatError that names the file, the key, its value and what to do."""
    try:
        data = tomllib.loads(text if isinstance(text, str) else text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise FormatError(f"{file} is not valid TOML: {e}.", hint="Correct the file.") from e
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as e:
        raise _wrong(file, e) from e
    for name in manifest.permissions.models:
        if name not in manifest.models:
            known = ", ".join(manifest.models) or "none"
            raise FormatError(
                f"{file}: permissions.models names {name!r}, which [models] does not have.",
                hint=f"It has: {known}.",
            )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`. Raises FormatError, also where there is none."""
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(
            f"{folder} has no {MANIFEST}.", hint="`llmasos app new NAME` writes one to begin with."
        ) from None
    if len(text) > MAX_MANIFEST:
        raise FormatError(f"{path} is longer than {MAX_MANIFEST} bytes.", hint="Keep only what it is for.")
    return parse_manifest(text, str(path))


_PARTS = ("str", "ModelNeed", "constrained-str", "int", "float", "bool")  # pydantic's names for branches of a union


def _wrong(file: str, error: ValidationError) -> FormatError:
    found = error.errors()
    # of a union's branches the one that got furthest is the one that was meant
    first = max(found, key=lambda one: len(one["loc"])) if found[0]["loc"][:1] == ("models",) else found[0]
    where = ""
    for part in first["loc"]:
        if isinstance(part, int):
            where += f"[{part}]"
        elif part not in _PARTS and not str(part).startswith(("function-", "constrained-")):
            where += f".{part}" if where else str(part)
    kind, value = first["type"], first.get("input")
    if kind == "missing":
        return FormatError(f"{file}: {where} is missing.", hint=f"Add {where.rpartition('.')[2]} = … to it.")
    if kind == "extra_forbidden":
        return FormatError(f"{file}: there is no key {where}.", hint=_known_keys(first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(value, dict | list) else f" = {value!r}"
    return FormatError(
        f"{file}: {where}{shown}: {reason[:1].lower()}{reason[1:].rstrip('.')}.", hint=f"Correct {where}."
    )


def _known_keys(location: tuple[int | str, ...]) -> str:
    table: Any = Manifest  # a class of this module
    for part in location[:-1]:
        if part in ("models", "config"):
            table = ModelNeed if part == "models" else ConfigEntry
        elif part in table.model_fields:
            table = table.model_fields[str(part)].annotation
    return f"Known there: {', '.join(table.model_fields)}."


@dataclass(frozen=True, order=True)
class Grant:
    """One thing that an application may do: `kind` is net, fs.read, fs.write, env, exec, gpu, models or knowledge."""

    kind: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.value}".rstrip()

    def covers(self, other: Grant) -> bool:
        """Whether who has this one has the other, too."""
        if self.kind == "fs.write" and other.kind == "fs.read":
            return False  # what may be written need not be readable
        if self.kind != other.kind:
            return False
        if self.kind == "net":
            return _covers_host(self.value, other.value)
        if self.kind.startswith("fs."):
            return other.value == self.value or other.value.startswith(f"{self.value.rstrip('/')}/")
        return self.value == other.value


def _covers_host(wide: str, narrow: str) -> bool:
    (host, port), (other, other_port) = (_split_host(one) for one in (wide, narrow))
    if port and port != other_port:
        return False
    return host in ("*", other) or (host.startswith("*.") and other.endswith(host[1:]))


def _split_host(text: str) -> tuple[str, str]:
    host, colon, port = text.rpartition(":")
    return (host, port) if colon and port.isdigit() and (not text.startswith("[") or "]:" in text) else (text, "")


def grants(manifest: Manifest) -> tuple[Grant, ...]:
    """All that the manifest asks for, in the order of the table."""
    asked = manifest.permissions
    lists = {"net": asked.net, "fs.read": asked.fs.read, "fs.write": asked.fs.write, "env": asked.env}
    found = [Grant(kind, value) for kind, values in lists.items() for value in values]
    found += [Grant(kind) for kind, given in (("exec", asked.exec), ("gpu", asked.gpu)) if given]
    found += [Grant("models", name) for name in asked.models] + [Grant("knowledge", name) for name in asked.knowledge]
    return tuple(dict.fromkeys(found))


def widened(old: Manifest, new: Manifest) -> tuple[Grant, ...]:
    """What `new` may do and `old` may not."""
    had = grants(old)
    return tuple(grant for grant in grants(new) if not any(one.covers(grant) for one in had))


def sheet(manifest: Manifest) -> dict[str, Any]:
    """The permission sheet as data: who asks, for what, and within which limits."""
    app = manifest.app
    models = {
        name: need if isinstance(need, str) else need.model_dump(exclude_defaults=True)
        for name, need in manifest.models.items()
    }
    return {
        "kind": app.kind,
        "name": app.name,
        "version": app.version,
        "summary": app.summary,
        "license": app.license,
        "permissions": [{"kind": grant.kind, "value": grant.value} for grant in grants(manifest)],
        "models": models,
        "resources": manifest.resources.model_dump(exclude_none=True),
        "config": {name: entry.type for name, entry in manifest.config.items()},
    }
