"""The library from the command line: search, ls, show, import, verify, rm."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import sys
from typing import TYPE_CHECKING, Any

from llmasos.cli.messages import t
from llmasos.cli.render import Reporter, emit, pairs, say, size, table
from llmasos.errors import ChecksumError, InvalidInputError, LLMasOSError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path

    from llmasos.store import Card, Entry, ImportPlan, Library, Verification


def search(*query: str, json: bool = False) -> None:
    """`llmasos search`: catalogue and library."""
    from llmasos.model_zoo import search_models

    found = search_models(" ".join(query))
    if json:
        emit([dataclasses.asdict(info) for info in found])
    elif not found:
        say(t("search.none", query=" ".join(query)))
    else:
        heads = [t(f"head.{name}") for name in ("name", "family", "use", "licence", "installed", "upstream")]
        marks = {True: t("yes"), False: ""}
        rows = [(m.name, m.family, m.use, m.licence, marks[m.installed], m.notice or m.upstream) for m in found]
        print(table(heads, rows))


def ls(*, json: bool = False) -> None:
    """`llmasos ls`: installed models, and the adapters that were trained here."""
    from llmasos.store import Library
    from llmasos.store.adapters import adapter_cards

    library = Library()
    cards, adapters = library.list(), adapter_cards()
    if json:
        emit([card_facts(card, library) for card in cards] + [jsonlib.loads(c.model_dump_json()) for c in adapters])
    elif not cards and not adapters:
        say(t("ls.none", home=library.root))
    else:
        heads = [t(f"head.{name}") for name in ("name", "format", "family", "size", "licence", "source")]
        rows: list[tuple[str, ...]] = [
            (c.name, c.format or "-", c.family or "-", size(c.size), c.licence or "-", c.error or c.source or "-")
            for c in cards
        ]
        rows += [
            (c.serves_as or c.name, t("ls.adapter"), t("ls.of", model=c.base), size(c.size), c.licence or "-", _run(c))
            for c in adapters
        ]
        print(table(heads, rows))


def _run(card: Card) -> str:
    return card.lineage.run if card.lineage is not None else "-"


def card_facts(card: Card, library: Library) -> dict[str, Any]:
    """What --json gives for an installed model."""
    facts: dict[str, Any] = jsonlib.loads(card.model_dump_json())
    place = {"path": str(library.root / card.name), "installed": True, "disk_size": library.disk_size(card.name)}
    return {"name": card.name, "size": card.size, **place, **facts}


def show(model: str, /, *, json: bool = False) -> None:
    """`llmasos show`: an installed model or adapter, or what the catalogue knows of one."""
    from llmasos.store import Library
    from llmasos.store.adapters import find_adapter
    from llmasos.store.card import read_card

    library = Library()
    try:
        folder = library.folder(model)
    except NotFoundError:
        if (adapter := find_adapter(model)) is not None:
            _show_adapter(read_card(adapter.path), adapter.path, as_json=json)
            return
        resolved = library.resolve(model)
        if resolved.entry is None:
            raise
        _show_entry(resolved.entry, as_json=json)
        return
    card = next(card for card in library.list() if card.name == folder.name)
    config = _config(card, library)
    if json:
        emit(card_facts(card, library) | {"config": config})
        return
    upstream = " @ ".join(filter(None, (card.upstream.repo or card.upstream.url, card.upstream.revision)))
    facts = [
        (t("head.name"), card.name),
        (t("head.architecture"), ", ".join(filter(None, (card.architecture, card.family, card.format)))),
        (t("head.upstream"), upstream or "-"),
        (t("head.licence"), card.licence or "-"),
        (t("head.source"), card.source or "-"),
        (t("head.path"), str(folder)),
        (t("head.size"), t("show.size", size=size(card.size), disk=size(library.disk_size(card.name)))),
        (t("head.installed"), f"{card.created:%Y-%m-%d %H:%M}"),
    ]
    facts += [(t(f"config.{name}"), str(value)) for name, value in config.items()]
    facts += [(t("head.error"), card.error)] if card.error else []
    facts += [(t("head.notice"), card.notice)] if card.notice else []
    print(pairs(facts))
    print()
    rows = [(f.path, size(f.size), f.sha256[:16] or "-", f.linked_from or "") for f in card.files]
    print(table([t("head.file"), t("head.size"), "SHA-256", t("head.linked")], rows))


def _show_adapter(card: Card, folder: Path, *, as_json: bool) -> None:
    if as_json:
        emit(jsonlib.loads(card.model_dump_json()) | {"path": str(folder), "installed": True})
        return
    facts = [
        (t("head.name"), card.serves_as or card.name),
        (t("ls.adapter"), t("ls.of", model=card.base)),
        (t("head.source"), _run(card)),
        (t("head.licence"), card.licence or "-"),
        (t("head.path"), str(folder)),
        (t("head.size"), size(card.size)),
        (t("head.installed"), f"{card.created:%Y-%m-%d %H:%M}"),
    ]
    print(pairs(facts))


def _config(card: Card, library: Library) -> dict[str, int]:
    """The sizes of the model, from its headers; nothing where they cannot be read, which the card says already."""
    from llmasos.store.headers import opener, read_facts

    if card.error:
        return {}
    try:
        config = read_facts([file.path for file in card.files], opener(library.root / card.name)).config
    except (LLMasOSError, OSError):
        return {}
    names = ("context_length", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "vocab_size")
    return {name: getattr(config, name) for name in names}


def _show_entry(entry: Entry, *, as_json: bool) -> None:
    if as_json:
        emit({**dataclasses.asdict(entry), "url": entry.url, "installed": False})
        return
    facts = [
        (t("head.name"), ", ".join((entry.name, *entry.aliases))),
        (t("head.architecture"), f"{entry.architecture}, {entry.family}"),
        (t("head.use"), entry.use),
        (t("head.upstream"), entry.repo),
        (t("head.licence"), entry.licence),
        (t("head.source"), ", ".join(entry.sources)),
        (t("head.installed"), t("show.not_installed", name=entry.name)),
    ]
    print(pairs(facts + ([(t("head.notice"), entry.notice)] if entry.notice else [])))


def import_model(
    path: str,
    /,
    *,
    name: str | None = None,
    copy: bool = False,
    link: bool = False,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """`llmasos import`: a model of this disk into the library, by link unless told to copy."""
    from llmasos import store

    if copy and link:
        raise InvalidInputError(t("import.both"), hint=t("import.both.hint"), param="copy")
    mode: Any = "copy" if copy else "link"
    if dry_run:
        _show_import(store.import_model(path, name=name, mode=mode, dry_run=True), as_json=json)
        return
    with Reporter() as report:
        card = store.import_model(path, name=name, mode=mode, on_progress=report)
    if json:
        emit(card_facts(card, store.Library()))
    else:
        say(t("import.done", name=card.name, count=len(card.files), size=size(card.size)))


def _show_import(plan: ImportPlan, *, as_json: bool) -> None:
    if as_json:
        emit(dataclasses.asdict(plan) | {"copied_bytes": plan.copied_bytes, "dry_run": True})
        return
    print(t("import.plan", name=plan.name, architecture=plan.architecture, folder=plan.folder))
    rows = [(f.path, size(f.size), f.how, str(f.source)) for f in plan.files]
    print(table([t("head.file"), t("head.size"), t("head.how"), t("head.source")], rows))
    print(t("import.cost", size=size(plan.copied_bytes)))


def verify(model: str | None = None, /, *, json: bool = False) -> int:
    """`llmasos verify`: one model or all of them; exit code 5 if a file is missing or changed."""
    from llmasos.store import Library

    library = Library()
    names = [library.folder(model).name] if model is not None else [card.name for card in library.list()]
    results: list[dict[str, Any]] = []
    for name in names:
        results.append(_verify(library, name))
        if not json:
            _show_verified(results[-1])
    if json:
        emit(results)
    elif not names:
        say(t("ls.none", home=library.root))
    return 0 if all(result["ok"] for result in results) else ChecksumError.exit_code


def _verify(library: Library, name: str) -> dict[str, Any]:
    try:
        with Reporter() as report:
            found: Verification = library.verify(name, on_progress=report)
    except LLMasOSError as e:
        return {"name": name, "ok": False, "missing": [], "changed": [], "extra": [], "error": e.message}
    return {
        "name": name,
        "ok": found.ok,
        "missing": list(found.missing),
        "changed": list(found.changed),
        "extra": list(found.extra),
        "error": None,
    }


def _show_verified(result: dict[str, Any]) -> None:
    print(f"{result['name']}: {t('verify.ok') if result['ok'] else t('verify.bad')}")
    for kind in ("missing", "changed", "extra"):
        for path in result[kind]:
            print(f"  {t(f'verify.{kind}')}: {path}")
    if result["error"]:
        print(f"  {result['error']}")
    if not result["ok"]:
        say(t("verify.hint", name=result["name"]))


def rm(model: str, /, *, yes: bool = False, json: bool = False) -> int | None:
    """`llmasos rm`: asks on a terminal, wants --yes elsewhere."""
    from llmasos.store import Library
    from llmasos.store.adapters import find_adapter, remove_adapter
    from llmasos.store.library import disk_size

    library, adapter = Library(), None
    try:
        folder = library.folder(model)
    except NotFoundError:
        if (adapter := find_adapter(model)) is None:
            raise
        folder = adapter.path
    name = folder.name
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidInputError(t("rm.no_terminal", name=name), hint=t("rm.no_terminal.hint", name=name))
        print(t("rm.ask", name=name, size=size(disk_size(folder))), end=" ", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes", "是"):
            say(t("rm.kept", name=name))
            return 1
    freed = library.remove(name) if adapter is None else remove_adapter(name)
    if json:
        emit({"removed": name, "freed_bytes": freed})
    else:
        say(t("rm.done", name=name, size=size(freed)))
    return None
