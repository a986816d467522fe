"""`llmasos app new … ls`: applications as packages, made, signed, published, found, installed and changed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.cli.messages import t
from llmasos.cli.publish import ON_SERVER, publish_to_server, yank_on_server
from llmasos.cli.render import emit, pairs, say, size, table
from llmasos.errors import InvalidInputError

if TYPE_CHECKING:
    from llmasos.store.packages import Grant, Installed, Manifest, Publisher, Request

_RIGHTS = {
    "net": "package.net",
    "fs.read": "package.read",
    "fs.write": "package.write",
    "env": "package.env",
    "exec": "package.exec",
    "gpu": "package.gpu",
    "models": "package.models",
    "knowledge": "package.knowledge",
}
_YES = ("y", "yes", "是")


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags that only packages have. What nobody typed is empty."""

    index: tuple[str, ...] = ()
    out: str | None = None
    yes: bool = False
    trust: str | None = None
    reason: str | None = None
    data: bool = False
    owner: str | None = None


def package(action: str, words: Sequence[str], options: Options, as_json: bool) -> int | None:
    """`llmasos app ACTION [WORD...]`. Flags and words that would have no effect are refused."""
    does = _ACTIONS[action]
    flags = {field.name for field in dataclasses.fields(options) if getattr(options, field.name) != field.default}
    check_flags(action, flags, does.flags)
    if len(words) < does.least:
        what = does.usage.split()[0]
        raise InvalidInputError(
            t("usage.missing", option=what), hint=f"llmasos app {action} {does.usage}", param=what.lower()
        )
    if len(words) > does.most:
        raise InvalidInputError(t("usage.extra", value=words[does.most]), hint=f"llmasos app {action} {does.usage}")
    return does.function(words, options, as_json)


def check_flags(action: str, typed: set[str], known: Sequence[str]) -> None:
    if stray := sorted(typed - set(known)):
        raise InvalidInputError(
            t("key.stray", option=f"--{stray[0]}", command=f"llmasos app {action}"),
            hint=t("usage.see_help", command="llmasos app"),
            param=stray[0],
        )


def _new(words: Sequence[str], options: Options, as_json: bool) -> None:
    from llmasos.store.packages.template import create

    folder = Path(words[0])
    files = create(folder)
    if as_json:
        emit({"folder": str(folder), "files": [str(file) for file in files]})
    else:
        say(t("package.new", folder=folder))


def _pack(words: Sequence[str], options: Options, as_json: bool) -> None:
    from llmasos.store.packages import pack

    done = pack(Path(words[0] if words else "."), Path(options.out) if options.out else None)
    num_bytes = done.path.stat().st_size
    if as_json:
        emit({"file": str(done.path), "sha256": done.sha256, "size": num_bytes, "files": list(done.files)})
    else:
        say(t("package.packed", file=done.path, count=len(done.files), size=size(num_bytes)))


def _sign(words: Sequence[str], options: Options, as_json: bool) -> None:
    from llmasos.store.packages import sign

    publisher = sign(Path(words[0]))
    if as_json:
        emit({"file": words[0], "key_id": publisher.key_id, "public_key": publisher.public_key})
    else:
        say(t("package.signed", file=words[0], key_id=publisher.key_id))


def _verify(words: Sequence[str], options: Options, as_json: bool) -> None:
    from llmasos.store.packages import open_package, sheet, verify

    with open_package(Path(words[0])) as opened:
        opened.check()
        publisher, manifest, files = verify(opened), opened.manifest, list(opened.hashes)
    if as_json:
        emit({**sheet(manifest), "key_id": publisher.key_id if publisher else None, "files": files})
    else:
        print("\n".join(sheet_lines(manifest, publisher)))
        say(t("package.whole", count=len(files)))


def _publish(words: Sequence[str], options: Options, as_json: bool) -> int | None:
    from llmasos.store.packages import indexes

    index = _one(indexes(options.index, bundled=False))
    if index.is_url:
        return publish_to_server(index, Path(words[0]), options.owner, as_json)
    if options.owner is not None:
        raise InvalidInputError(t("package.owner_of_folder"), hint=f"--index {ON_SERVER}", param="owner")
    found = index.publish(Path(words[0]))
    if as_json:
        emit({"index": str(index), "name": found.name, "version": found.version, **found.release.model_dump()})
    else:
        say(t("package.published", name=found.name, version=found.version, index=index))
    return None


def _yank(words: Sequence[str], options: Options, as_json: bool) -> None:
    from llmasos.store.packages import indexes

    name, _, version = words[0].partition("==")
    index = _one(indexes(options.index, bundled=False))
    reason = options.reason or ""
    if index.is_url:
        yanked = yank_on_server(index, name, version, reason)
    else:
        yanked = index.yank(name, version, reason).release.yanked
    if as_json:
        emit({"name": name, "version": version, "yanked": yanked})
    else:
        say(t("package.yanked", name=name, version=version, reason=yanked))


def _one(found: Sequence[Any]) -> Any:
    if len(found) != 1:
        raise InvalidInputError(t("package.one_index", count=len(found)), hint="--index FOLDER", param="index")
    return found[0]


def _search(words: Sequence[str], options: Options, as_json: bool) -> None:
    from llmasos.store.packages import indexes, search

    found = search(indexes(options.index), words)
    if as_json:
        emit([{"name": f.name, "version": f.version, "index": str(f.index), **f.release.model_dump()} for f in found])
    elif not found:
        say(t("package.none_found"))
    else:
        heads = (t("head.name"), t("head.version"), t("head.licence"), t("head.index"), t("head.summary"))
        rows = [(f.name, f.version, f.release.license, str(f.index), f.release.summary) for f in found]
        print(table(heads, rows))


def _install(words: Sequence[str], options: Options, as_json: bool) -> None:
    from llmasos.serve.apps.trial import install_checked
    from llmasos.store.packages import Packages, Shelf, indexes

    asked = () if words[0].endswith(".llmapp") else indexes(options.index)
    accept, shelf = _accept(options.yes), Packages().for_install(words[0], asked)
    if isinstance(shelf, Shelf):
        _tell(shelf.install(words[0], asked, accept=accept, trust=options.trust), "package.installed", as_json)
        return
    found, trial = install_checked(
        shelf, lambda apps: apps.install(words[0], asked, accept=accept, trust=options.trust)
    )
    _tell(found, "package.unchecked" if trial.unsure else "package.installed", as_json)


def _update(words: Sequence[str], options: Options, as_json: bool) -> None:
    from llmasos.serve.apps.trial import install_checked
    from llmasos.store.packages import Packages, Shelf, indexes

    apps = Packages().of(words[0])
    before = apps.get(words[0]).version
    asked, accept = indexes(options.index), _accept(options.yes)
    if isinstance(apps, Shelf):
        found = apps.update(words[0], asked, accept=accept, trust=options.trust)
    else:
        found, _ = install_checked(apps, lambda apps: apps.update(words[0], asked, accept=accept, trust=options.trust))
    _tell(found, "package.updated" if found.version != before else "package.newest", as_json)


def _rollback(words: Sequence[str], options: Options, as_json: bool) -> None:
    from llmasos.store.packages import Packages

    version = words[1] if len(words) > 1 else None
    _tell(Packages().of(words[0]).rollback(words[0], version), "package.rolled_back", as_json)


def _tell(found: Installed, message: str, as_json: bool) -> None:
    if as_json:
        emit(_facts(found))
    else:
        say(t(message, name=found.name, version=found.version))
        if found.manifest is not None and found.manifest.kind != "app":
            say(t(_USED[found.manifest.kind], name=found.name))


_USED = {"model": "package.use_model", "adapter": "package.use_adapter", "dataset": "package.use_dataset"}


def _uninstall(words: Sequence[str], options: Options, as_json: bool) -> int | None:
    from llmasos.serve.apps.installing import uninstall
    from llmasos.store.packages import Packages

    apps, name = Packages().of(words[0]), words[0]
    if not apps.has(name):
        apps.get(name)  # says so, before anybody is asked
    if not options.yes:
        if not sys.stdin.isatty():
            hint = f"llmasos app uninstall {name} --yes"
            raise InvalidInputError(t("rm.no_terminal", name=name), hint=hint, param="yes")
        if not _agreed(t("package.ask_data" if options.data else "package.ask_uninstall", name=name)):
            say(t("rm.kept", name=name))
            return 1
    gone = uninstall(apps, name, options.data)
    data = apps.data(name)
    if as_json:
        emit({"name": name, "versions": gone, "data": str(data) if data.exists() else None})
    else:
        say(t("package.uninstalled", name=name, versions=", ".join(gone) or "-"))
        if data.exists():
            say(t("package.data_kept", folder=data))
    return None


def _ls(words: Sequence[str], options: Options, as_json: bool) -> None:
    from llmasos.store.packages import Packages

    found = Packages().list()
    if as_json:
        emit([_facts(one) for one in found])
    elif not found:
        say(t("package.none_installed"))
    else:
        heads = (t("head.name"), t("head.version"), t("head.others"), t("head.source"), t("head.summary"))
        print(table(heads, [_row(one) for one in found]))


def _row(one: Installed) -> tuple[str, ...]:
    others = ", ".join(version for version in one.versions if version != one.version)
    source = one.record.source if one.record else ""
    return one.name, one.version, others, source, one.error or (one.manifest.app.summary if one.manifest else "")


def _facts(one: Installed) -> dict[str, Any]:
    from llmasos.store.packages import sheet

    facts = {"name": one.name, "version": one.version, "folder": str(one.folder), "versions": list(one.versions)}
    facts |= one.record.model_dump() if one.record else {}
    return (
        facts | ({"sheet": sheet(one.manifest)} if one.manifest else {}) | ({"error": one.error} if one.error else {})
    )


def _accept(yes: bool) -> Callable[[Request], bool]:
    """Shows the sheet; then --yes, or an answer on the terminal, decides."""

    def ask(request: Request) -> bool:
        for line in sheet_lines(request.manifest, request.publisher, request):
            say(line)
        return yes or (sys.stdin.isatty() and _agreed(t("package.ask")))

    return ask


def _agreed(question: str) -> bool:
    print(question, end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in _YES


def sheet_lines(manifest: Manifest, publisher: Publisher | None, request: Request | None = None) -> list[str]:
    """The permission sheet for people; of an update only the rights that it adds."""
    from llmasos.store.packages import grants

    app = manifest.app
    facts = [
        (t("head.name"), f"{app.name} {app.version}"),
        (t("head.summary"), app.summary),
        (t("head.licence"), app.license),
        (t("head.signed"), publisher.key_id if publisher else t("package.unsigned")),
    ]
    if request:
        facts.append((t("head.source"), request.source))
    facts += [(t("head.model"), f"{name}: {_need(need)}") for name, need in manifest.models.items()]
    limits = manifest.resources.model_dump(exclude_none=True)
    if limits:
        facts.append((t("head.limits"), ", ".join(f"{name} {value}" for name, value in limits.items())))
    asked = request.asked if request else grants(manifest)
    added = request is not None and request.previous is not None
    lines = pairs(facts).splitlines()
    if request and request.yanked is not None:
        lines += ["", t("package.is_yanked", reason=request.yanked)]
    title = "package.asks_more" if added else "package.asks" if asked else "package.asks_nothing"
    return [*lines, "", t(title), *(f"  {_right(grant)}" for grant in asked), t("package.not_enforced")]


def _need(need: Any) -> str:
    if isinstance(need, str):
        return need
    facts = need.model_dump(exclude_defaults=True)
    return ", ".join(f"{k} {'+'.join(v) if isinstance(v, list) else v}" for k, v in facts.items()) or "-"


def _right(grant: Grant) -> str:
    return t(_RIGHTS[grant.kind], value=grant.value)


@dataclasses.dataclass(frozen=True)
class _Action:
    function: Callable[[Sequence[str], Options, bool], int | None]
    usage: str
    least: int
    most: int
    flags: tuple[str, ...] = ()


_ACTIONS = {
    "new": _Action(_new, "NAME", 1, 1),
    "pack": _Action(_pack, "[FOLDER] [--out FILE]", 0, 1, ("out",)),
    "sign": _Action(_sign, "FILE", 1, 1),
    "verify": _Action(_verify, "FILE", 1, 1),
    "publish": _Action(_publish, "FILE --index FOLDER|URL [--owner NAME]", 1, 1, ("index", "owner")),
    "yank": _Action(_yank, "NAME==VERSION --reason TEXT --index FOLDER|URL", 1, 1, ("index", "reason")),
    "search": _Action(_search, "[WORD...] [--index INDEX]", 0, 1000, ("index",)),
    "install": _Action(_install, "NAME [--index INDEX]", 1, 1, ("index", "yes", "trust")),
    "update": _Action(_update, "NAME [--index INDEX]", 1, 1, ("index", "yes", "trust")),
    "rollback": _Action(_rollback, "NAME [VERSION]", 1, 2),
    "uninstall": _Action(_uninstall, "NAME [--data]", 1, 1, ("yes", "data")),
    "ls": _Action(_ls, "", 0, 0),
}
