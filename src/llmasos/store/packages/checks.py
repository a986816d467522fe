"""What can be seen in a package without running it: licence, size, secrets, imports against what is declared, and what
its code uses against what it asks for.

Code can hide what it does from such a look (names made at run time, native libraries); the sandbox holds it all the
same. The checks are for authors who forgot something, and for users who read the report.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llmasos.errors import LLMasOSError
from llmasos.store.packages.manifest import Manifest
from llmasos.store.packages.pack import secret_in
from llmasos.store.packages.requirements import LOCK_FILE, parse_requirements
from llmasos.store.packages.sign import verify
from llmasos.store.packages.unpack import Package

Outcome = Literal["passed", "warning", "failed", "skipped"]
MOST_DETAILS = 20
MOST_SOURCE = 4 << 20
"""Bytes of a file of code that are read; longer ones are said."""

_NET = {
    *("socket", "socketserver", "ssl", "http", "urllib.request", "ftplib", "smtplib", "imaplib", "poplib", "nntplib"),
    *("telnetlib", "xmlrpc", "asyncore", "httpx", "requests", "aiohttp", "urllib3", "websockets", "websocket", "grpc"),
    *("paramiko", "boto3", "openai", "anthropic", "huggingface_hub", "pycurl", "zmq", "dns", "redis", "psycopg"),
}
_EXEC = {"subprocess", "multiprocessing", "pty", "ctypes", "cffi", "pexpect", "sh"}
_EXEC_CALLS = re.compile(
    r"os\.(system|popen|fork|forkpty|posix_spawnp?|startfile|(exec|spawn)[lv]p?e?)"
    r"|asyncio\.create_subprocess_(exec|shell)|concurrent\.futures\.ProcessPoolExecutor"
)
_NET_CALLS = re.compile(r"asyncio\.(open_connection|start_server)|urllib\.request\..*")
_DYNAMIC = {"eval", "exec", "compile", "__import__", "importlib.import_module", "runpy.run_path", "runpy.run_module"}
_FREE_VARIABLES = re.compile(
    r"LLMASOS_\w+|HOME|PATH|TMPDIR|TEMP|TMP|LANG|LC_ALL|TZ|(HTTPS?|ALL|NO)_PROXY", re.IGNORECASE
)
_NATIVE = (".so", ".dll", ".dylib", ".pyd", ".exe")


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    outcome: Outcome
    details: tuple[str, ...] = ()


def look_into(package: Package) -> list[Finding]:
    """All checks of an open package. Reads every byte of it. Blocking."""
    manifest = package.manifest
    whole = _whole(package)
    if whole.outcome == "failed":
        return [whole]  # its bytes can't be trusted any further
    found = [whole, _licence(package), _size(package), _secrets(package)]
    if manifest.kind != "app":
        return found
    uses, broken = _uses(package)
    return [*found, _code(package, uses, broken), _imports(package, uses), _permissions(manifest, uses)]


def _finding(name: str, failed: Iterable[str] = (), warned: Iterable[str] = ()) -> Finding:
    bad, odd = list(dict.fromkeys(failed)), list(dict.fromkeys(warned))
    details = (*bad, *odd)
    if len(details) > MOST_DETAILS:
        details = (*details[:MOST_DETAILS], f"and {len(details) - MOST_DETAILS} more")
    return Finding(name, "failed" if bad else "warning" if odd else "passed", details)


def _whole(package: Package) -> Finding:
    """The manifest was read when the package was opened."""
    try:
        package.check()
        publisher = verify(package)
    except LLMasOSError as e:
        return Finding("manifest", "failed", (e.message,))
    warned = [] if publisher else ["Nobody signed it: who publishes the next version can't be told."]
    return _finding("manifest", warned=warned)


def _licence(package: Package) -> Finding:
    text = package.manifest.app.license
    try:
        canonicalize_license_expression(text)
        failed = []
    except InvalidLicenseExpression:
        failed = [f"{text!r} is no SPDX expression; write one like Apache-2.0, or LicenseRef-NAME for another."]
    has_text = any(
        name.rpartition("/")[2].upper().startswith(("LICENSE", "LICENCE", "COPYING")) for name in package.hashes
    )
    return _finding("licence", failed, [] if has_text else ["The text of the licence is not in it."])


def _size(package: Package) -> Finding:
    infos = package.archive.infolist()
    total, biggest = sum(info.file_size for info in infos), max(infos, key=lambda info: info.file_size)
    warned = []
    if package.manifest.kind == "app" and total > 50 << 20:
        warned.append(f"{total} bytes, of which {biggest.orig_filename} has {biggest.file_size}.")
    return _finding("size", warned=warned)


def _secrets(package: Package) -> Finding:
    failed = []
    for name in package.hashes:
        with package.archive.open(name) as file:
            if why := secret_in(name, file):
                failed.append(f"{name} looks like a secret: {why}.")
    return _finding("secrets", failed)


# code


@dataclass
class Uses:
    """What the code uses; each with the places, as FILE:LINE. `tried`: imports that may fail."""

    imports: dict[str, str] = field(default_factory=dict)
    tried: dict[str, str] = field(default_factory=dict)
    net: dict[str, str] = field(default_factory=dict)
    exec: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    dynamic: dict[str, str] = field(default_factory=dict)


def _uses(package: Package) -> tuple[Uses, list[str]]:
    uses, broken = Uses(), []
    for name in package.hashes:
        if not name.endswith(".py"):
            continue
        with package.archive.open(name) as file:
            source = file.read(MOST_SOURCE + 1)
        if len(source) > MOST_SOURCE:
            broken.append(f"{name} is too long to be looked into.")
            continue
        try:
            tree = ast.parse(source, name)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            broken.append(f"{name} is no Python: {e}.")
            continue
        try:
            _Look(name, uses).visit(tree)
        except RecursionError:
            broken.append(f"{name} is nested too deeply to be looked into.")
    return uses, broken


class _Look(ast.NodeVisitor):
    def __init__(self, file: str, uses: Uses) -> None:
        self._file, self._uses = file, uses
        self._names: dict[str, str] = {}
        self._num_tries = 0

    def _at(self, node: ast.AST) -> str:
        return f"{self._file}:{getattr(node, 'lineno', 0)}"

    def visit_Import(self, node: ast.Import) -> None:
        for one in node.names:
            self._names[one.asname or one.name.partition(".")[0]] = (
                one.name if one.asname else one.name.partition(".")[0]
            )
            self._module(one.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or not node.module:
            return
        self._module(node.module, node)
        for one in node.names:
            full = f"{node.module}.{one.name}"
            self._names[one.asname or one.name] = full
            self._used(full, node)
            if full in _NET:
                self._uses.net.setdefault(full, self._at(node))

    def _module(self, name: str, node: ast.stmt) -> None:
        top = name.partition(".")[0]
        (self._uses.tried if self._num_tries else self._uses.imports).setdefault(top, self._at(node))
        for kind, known in ((self._uses.net, _NET), (self._uses.exec, _EXEC)):
            if top in known or any(name == one or name.startswith(f"{one}.") for one in known):
                kind.setdefault(name, self._at(node))

    def visit_Try(self, node: ast.Try) -> None:
        self._num_tries += 1
        for one in node.body:
            self.visit(one)
        self._num_tries -= 1
        for part in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(part)

    def visit_If(self, node: ast.If) -> None:
        if self._full(node.test) not in ("typing.TYPE_CHECKING", "TYPE_CHECKING"):
            for one in node.body:
                self.visit(one)
        self.visit(node.test)
        for one in node.orelse:
            self.visit(one)

    def visit_Call(self, node: ast.Call) -> None:
        full = self._full(node.func)
        if full in ("os.getenv", "os.environ.get", "os.environ.pop", "os.environ.setdefault"):
            self._variable(node.args[0] if node.args else None, node)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if self._full(node.value) == "os.environ":
            self._variable(node.slice, node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if full := self._full(node):
            self._used(full, node)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._used(self._names.get(node.id, node.id), node)

    def _used(self, full: str, node: ast.AST) -> None:
        if _EXEC_CALLS.fullmatch(full):
            self._uses.exec.setdefault(full, self._at(node))
        if _NET_CALLS.fullmatch(full):
            self._uses.net.setdefault(full, self._at(node))
        if full in _DYNAMIC:
            self._uses.dynamic.setdefault(full, self._at(node))

    def _variable(self, name: ast.expr | None, node: ast.AST) -> None:
        known = isinstance(name, ast.Constant) and isinstance(name.value, str)
        text = name.value if known and isinstance(name, ast.Constant) else "?"
        if not _FREE_VARIABLES.fullmatch(str(text)):
            self._uses.env.setdefault(str(text), self._at(node))

    def _full(self, node: ast.expr) -> str:
        """The dotted name with what it was imported from; empty for what is no name."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self._names.get(node.id, node.id), *reversed(parts)])


def _code(package: Package, uses: Uses, broken: list[str]) -> Finding:
    warned = [f"{where}: {name} runs code that can't be looked into." for name, where in uses.dynamic.items()]
    warned += [
        f"{name} is native code, which can't be looked into." for name in package.hashes if name.endswith(_NATIVE)
    ]
    return _finding("code", broken, warned)


def _imports(package: Package, uses: Uses) -> Finding:
    own = {name.partition("/")[0].removesuffix(".py") for name in package.hashes}
    # what lies deeper is found by applications that put its folder on the path
    own |= {name.rpartition("/")[2].removesuffix(".py") for name in package.hashes if name.endswith(".py")}
    try:
        declared = _declared(package)
    except LLMasOSError as e:
        return Finding("imports", "failed", (e.message,))

    def missing(found: Mapping[str, str]) -> list[str]:
        return [
            f"{where}: {name} is imported, and {LOCK_FILE} does not name it."
            for name, where in found.items()
            if name not in own and name not in sys.stdlib_module_names and not _is_declared(name, declared)
        ]

    return _finding("imports", missing(uses.imports), missing(uses.tried))


def _declared(package: Package) -> set[str]:
    found = set(_base())
    if LOCK_FILE in package.hashes:
        with package.archive.open(LOCK_FILE) as file:
            found |= {canonicalize_name(one.name) for one in parse_requirements(file.read(MOST_SOURCE), LOCK_FILE)}
    return found


def _is_declared(module: str, declared: set[str]) -> bool:
    homes = _distributions().get(module, [])
    return canonicalize_name(module) in declared or any(canonicalize_name(one) in declared for one in homes)


@cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


@cache
def _base() -> frozenset[str]:
    """LLMasOS and what comes with it."""
    try:
        needs = importlib.metadata.requires("llmasos") or []
    except importlib.metadata.PackageNotFoundError:
        needs = []
    plain = (Requirement(one) for one in needs)
    return frozenset(canonicalize_name(one.name) for one in plain if "extra" not in str(one.marker)) | {"llmasos"}


def _permissions(manifest: Manifest, uses: Uses) -> Finding:
    asked = manifest.permissions
    failed: list[str] = []
    warned: list[str] = []

    def compare(is_asked: bool, used: Mapping[str, str], key: str) -> None:
        if used and not is_asked:
            failed.extend(
                f"{where}: {name} is used, and permissions.{key} does not ask for it." for name, where in used.items()
            )
        elif is_asked and not used:
            warned.append(f"permissions.{key} is asked for, and nothing is seen that uses it.")

    compare(bool(asked.net), uses.net, "net")
    compare(asked.exec, uses.exec, "exec")
    seen = {name: where for name, where in uses.env.items() if name != "?"}
    failed.extend(
        f"{where}: the variable {name} is read, and permissions.env does not name it."
        for name, where in seen.items()
        if name not in asked.env
    )
    warned.extend(
        f"permissions.env names {name}, and nothing is seen that reads it." for name in asked.env if name not in seen
    )
    if "?" in uses.env:
        warned.append(f"{uses.env['?']}: a variable is read whose name is made at run time.")
    return _finding("permissions", failed, warned)
