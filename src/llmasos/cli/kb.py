"""`llmasos kb`: knowledge bases of this machine: add documents, search them, ask a model about them."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from llmasos.cli.messages import t
from llmasos.cli.render import PLAIN_EVERY, cell_width, emit, say, size, table, working
from llmasos.errors import InvalidInputError

if TYPE_CHECKING:
    from llmasos.apps.knowledge import Changes, KnowledgeBase, Passage, Progress

Action = Literal["add", "search", "ask", "ls", "rm", "sync"]
Mode = Literal["hybrid", "vector", "text"]

_TAKES = {
    "add": {"encoder"},
    "search": {"encoder", "top", "mode", "rerank"},
    "ask": {"encoder", "top", "mode", "rerank", "model", "max_tokens"},
    "ls": set[str](),
    "rm": {"yes"},
    "sync": {"encoder"},
}
"""The options of each action, beside --json."""
_NO_WORDS = {"add": "kb.no_words.add", "search": "kb.no_words.search", "ask": "kb.no_words.ask"}
_TOP = 5
_SHOWN = 300
"""Characters of a passage in a list for people."""


def kb(
    action: Action = "ls",
    name: str | None = None,
    /,
    *words: str,
    encoder: str | None = None,
    model: str | None = None,
    mode: Mode | None = None,
    top: int | None = None,
    rerank: str | None = None,
    max_tokens: int | None = None,
    yes: bool = False,
    json: bool = False,
) -> int | None:
    """`llmasos kb ACTION NAME ...`."""
    given = {"encoder": encoder, "model": model, "mode": mode, "top": top, "rerank": rerank, "max_tokens": max_tokens}
    options = {option: value for option, value in (given | {"yes": yes or None}).items() if value is not None}
    _check(action, name, words, options)
    if action == "ls":
        _ls(name, json)
    elif action == "rm":
        return _rm(name or "", words, yes, json)
    elif action in ("add", "sync"):
        return _change(action, name or "", words, encoder, json)
    else:
        _find(action, name or "", " ".join(words), options, json)
    return None


def _check(action: Action, name: str | None, words: tuple[str, ...], options: dict[str, Any]) -> None:
    """What is missing, and what would have no effect, is refused."""
    command = f"llmasos kb {action}"
    if name is None and action != "ls":
        raise InvalidInputError(t("kb.name", command=command), hint="llmasos kb ls", param="name")
    if not words and action in _NO_WORDS:
        raise InvalidInputError(t(_NO_WORDS[action]), hint=f"{command} {name} …", param="words")
    if words and action in ("ls", "sync"):
        raise InvalidInputError(t("usage.extra", value=words[0]), hint=t("usage.see_help", command="llmasos kb"))
    if stray := [option for option in options if option not in _TAKES[action]]:
        option = f"--{stray[0].replace('_', '-')}"
        raise InvalidInputError(
            t("key.stray", option=option, command=command), hint=t("usage.see_help", command="llmasos kb")
        )


def _ls(name: str | None, as_json: bool) -> None:
    from llmasos.apps.knowledge import KnowledgeBase, names

    if name is None:
        found = [KnowledgeBase.open(one, create=False).stats() for one in names()]
        if as_json:
            emit([asdict(one) for one in found])
        elif not found:
            say(t("kb.none"))
        else:
            heads = [t(f"head.{head}") for head in ("name", "documents", "chunks", "size", "model")]
            print(table(heads, [(s.name, str(s.files), str(s.chunks), size(s.size), s.model) for s in found]))
        return
    files = KnowledgeBase.open(name, create=False).files()
    if as_json:
        emit([asdict(file) for file in files])
    elif not files:
        say(t("kb.empty", name=name))
    else:
        heads = [t(f"head.{head}") for head in ("file", "title", "chunks", "size")]
        print(table(heads, [(f.path, f.title, str(f.chunks), size(f.size)) for f in files]))


def _rm(name: str, paths: tuple[str, ...], yes: bool, as_json: bool) -> int | None:
    from llmasos.apps.knowledge import KnowledgeBase, delete

    base = KnowledgeBase.open(name, create=False)
    if paths:
        removed = [one for path in paths for one in base.remove(path)]
        if as_json:
            emit({"name": name, "removed": removed})
        else:
            say(t("kb.removed", name=name, count=len(removed)))
        return None
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidInputError(t("rm.no_terminal", name=name), hint=f"llmasos kb rm {name} --yes")
        print(t("rm.ask", name=name, size=size(base.stats().size)), end=" ", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes", "是"):
            say(t("rm.kept", name=name))
            return 1
    freed = base.stats().size
    delete(name)
    if as_json:
        emit({"removed": name, "freed_bytes": freed})
    else:
        say(t("rm.done", name=name, size=size(freed)))
    return None


def _change(action: Action, name: str, sources: tuple[str, ...], encoder: str | None, as_json: bool) -> int:
    """Exit code 4 where some file of a folder could not be read."""
    from llmasos.apps.knowledge import Changes, KnowledgeBase

    whole = Changes()
    with KnowledgeBase.open(name, model=encoder, create=action == "add") as base, _Reporter() as report:
        if action == "sync":
            whole = base.sync(on_progress=report)
        for source in sources:
            _join(whole, base.add(source, on_progress=report))
        stats = base.stats()
    if as_json:
        emit({"name": name, **asdict(whole), "documents": stats.files, "chunks": stats.chunks})
    else:
        counts = {kind: len(getattr(whole, kind)) for kind in ("added", "replaced", "unchanged", "removed")}
        say(t("kb.changed", name=name, **counts, documents=stats.files, chunks=stats.chunks))
        for path, why in whole.failed.items():
            say(t("kb.failed", path=path, why=why))
    return 4 if whole.failed else 0


def _join(whole: Changes, more: Changes) -> None:
    for kind in ("added", "replaced", "unchanged", "removed"):
        getattr(whole, kind).extend(getattr(more, kind))
    whole.failed.update(more.failed)


def _find(action: Action, name: str, query: str, options: dict[str, Any], as_json: bool) -> None:
    from llmasos.apps.knowledge import KnowledgeBase
    from llmasos.inference.llm import LLM

    mode: Mode = options.get("mode", "hybrid")
    with KnowledgeBase.open(name, model=options.get("encoder"), create=False) as base:
        ranker: Any = LLM.from_pretrained(options["rerank"]) if "rerank" in options else None
        try:
            k = options.get("top", _TOP)
            if action == "search":
                found = base.search(query, k, mode=mode, rerank=ranker)
                _show(found, as_json)
            else:
                _ask(base, query, k, mode, ranker, options, as_json)
        finally:
            if ranker is not None:
                ranker.close()


def _show(found: list[Passage], as_json: bool) -> None:
    if as_json:
        emit([asdict(passage) | {"citation": passage.citation} for passage in found])
    elif not found:
        say(t("kb.nothing"))
    for number, passage in enumerate(() if as_json else found, 1):
        text = " ".join(passage.text.split())
        print(f"[{number}] {passage.citation}  ({passage.score:.3f})")
        print(f"    {text[:_SHOWN]}{'…' if len(text) > _SHOWN else ''}")


def _ask(
    base: KnowledgeBase, question: str, k: int, mode: Mode, ranker: Any, options: dict[str, Any], as_json: bool
) -> None:
    from llmasos.apps.knowledge import answer
    from llmasos.inference.llm import LLM
    from llmasos.store import DEFAULT_MODEL

    limit = {"max_tokens": options["max_tokens"]} if "max_tokens" in options else {}
    with LLM.from_pretrained(options.get("model", DEFAULT_MODEL)) as model, working(t("kb.thinking")):
        found = answer(question, base, model, k=k, mode=mode, rerank=ranker, **limit)
    if as_json:
        passages = [asdict(passage) | {"citation": passage.citation} for passage in found.passages]
        reason = "length" if found.is_cut else "stop"
        emit({"answer": found.text, "citations": found.citations, "passages": passages, "finish_reason": reason})
        return
    print(found.text)
    for number in found.citations:
        print(f"[{number}] {found.passages[number - 1].citation}")
    if found.is_cut:
        say(t("kb.cut"))
    elif not found.citations:
        say(t("kb.uncited"))


class _Reporter:
    """What is being read: a line that changes on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._draw("")

    def __call__(self, now: Progress) -> None:
        path = now.path if cell_width(now.path) <= 60 else f"…{now.path[-40:]}"
        line = t("kb.progress", number=now.number, files=now.files, path=path, done=now.done, total=now.total)
        if self._is_terminal:
            self._draw(line)
        elif time.monotonic() - self._last >= PLAIN_EVERY:
            self._last = time.monotonic()
            say(line)

    def _draw(self, line: str) -> None:
        if self._is_terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
